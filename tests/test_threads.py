"""The threads of `parallel`, BLAS's threads beside them, and child processes."""

import os
import select
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import train_gpt2 as gpt2
from test_gpt2 import random_model, random_tokens


def test_parallel_runs_side_by_side_in_order_with_one_blas_thread(monkeypatch):
    calls = []
    barrier = threading.Barrier(3)
    monkeypatch.setattr(gpt2, "ROW_THREADS", 3)
    monkeypatch.setattr(gpt2, "set_blas_threads", calls.append)

    def task(i):
        barrier.wait(timeout=30)  # which only three threads at once can pass
        calls.append("task")
        return i * i

    assert gpt2.parallel(task, 6) == [0, 1, 4, 9, 16, 25]
    assert calls == [1] + ["task"] * 6 + [gpt2.BLAS_THREADS]


@pytest.mark.parametrize("bad", range(4))
def test_parallel_passes_an_error_on(bad, monkeypatch):
    """Whichever thread has met it; and BLAS gets its threads back."""
    calls = []
    barrier = threading.Barrier(4)
    monkeypatch.setattr(gpt2, "ROW_THREADS", 4)
    monkeypatch.setattr(gpt2, "set_blas_threads", calls.append)

    def task(i):
        barrier.wait(timeout=30)  # one task for each thread
        return 1 / (i - bad)

    with pytest.raises(ZeroDivisionError):
        gpt2.parallel(task, 4)
    assert calls == [1, gpt2.BLAS_THREADS]


def test_parallel_does_with_the_threads_it_gets(monkeypatch):
    def no_more(work):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(gpt2, "ROW_THREADS", 4)
    monkeypatch.setattr(gpt2, "POOL", SimpleNamespace(submit=no_more))
    assert gpt2.parallel(lambda i: i * i, 6) == [0, 1, 4, 9, 16, 25]


def test_blas_really_has_a_setter():
    """Without it two kinds of threads would compete for the cores, and no result would show it."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if blas != "scipy-openblas":
        pytest.skip("another BLAS; one with OpenBLAS: pip install --force-reinstall numpy")
    assert gpt2.set_blas_threads.__name__ == "scipy_openblas_set_num_threads64_"


def test_a_child_process_computes_the_same(monkeypatch):
    """os.fork copies no threads, so a child that waited for those of its parent would wait long."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork: run it on Linux or macOS")
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(gpt2, "ROW_THREADS", 3)
    model = random_model(2, 33)
    batch = random_tokens(B=2, T=33)
    loss = model.forward(*batch)

    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, repr(model.forward(*batch)).encode())
        os._exit(0)
    os.close(write_end)
    answered = select.select([read_end], [], [], 30)[0]
    if not answered:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.read(read_end, 100).decode() == repr(loss)
    os.close(read_end)
