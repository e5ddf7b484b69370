"""Training is the work; lines on a terminal and in a log are not, and must not end it.

A run waits here before an update until the test has done something to it: closed its terminal, let
it run out of room, moved its folder away. It must then end as if nothing had happened, and where it
can't, it must say what is not saved.
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from common import (
    NO_NETWORK,
    SMALL_RUN,
    TRAINER,
    checkpoints,
    events,
    failed_in_one_line,
    joined,
    run_command,
    step_of,
    stopped_where,
    succeeded,
    whole_state,
)

pty = pytest.importorskip("pty", reason="Windows has no such terminals: use Linux or macOS")
resource = pytest.importorskip("resource", reason="Windows has no such limits: use Linux or macOS")

PATIENCE = 120  # seconds
ENVIRONMENT = os.environ | NO_NETWORK | {"PYTHONPATH": os.path.dirname(TRAINER)}
ENVIRONMENT |= {"PYTHONUNBUFFERED": ""}  # with it, Python forgets at once what it can't print

# It runs the trainer as `python train_gpt2.py` does, and waits before some updates for a file.
WAITING = """if True:
    import os, runpy, sys, time
    here, numbers, *sys.argv[:] = sys.argv[1:]
    update = 0
    def watch(frame, event, arg):
        global update
        if event == "call" and frame.f_code.co_name == "train_step":
            update += 1
            if str(update) in numbers.split():
                os.mkdir(f"{here}/at_{update}")
                while not os.path.exists(f"{here}/go_{update}"):
                    time.sleep(0.01)
    os.fsync = lambda handle: None  # what it protects from, a power cut, does not happen here
    sys.setprofile(watch)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextlib.contextmanager
def waiting_run(small_folder, here, *flags, wait=(4,), **options):
    """A run that waits before some of its updates: at(number), go(number), ends() -> exit code.

    It keeps what it saves in here/run.
    """
    numbers = " ".join(map(str, wait))
    command = [sys.executable, "-c", WAITING, here, numbers, TRAINER, *flags]
    process = subprocess.Popen(
        [*map(str, command), "--output_dir", str(here / "run")],
        cwd=small_folder, env=ENVIRONMENT, **options,
    )  # fmt: skip

    def at(number):
        began = time.monotonic()
        while not (here / f"at_{number}").exists():
            assert process.poll() is None and time.monotonic() - began < PATIENCE
            time.sleep(0.01)

    def go(number):
        (here / f"go_{number}").mkdir()

    try:
        yield SimpleNamespace(
            process=process, at=at, go=go, ends=lambda: process.wait(timeout=PATIENCE)
        )
    finally:
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


def read_terminal(master, word):
    """What comes from a terminal, up to a word."""
    seen = b""
    while word not in seen:
        seen += os.read(master, 4096)
    return seen


def assert_as_if_nothing_had_happened(here, uninterrupted):
    assert (here / "run" / "main.log").read_text() == uninterrupted.state["log"]
    assert whole_state(here / "run") == uninterrupted.state
    assert not list((here / "run").glob("*.tmp"))


def room_for(process, nbytes):
    """Let no file of a process grow beyond that many bytes, as if the disk were full."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("this system can't limit another process: run it on Linux")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


# --------------------------------------------------------------------------------------------------
# Nobody reads any more


def test_a_terminal_that_goes_away_does_not_end_a_run(small_folder, uninterrupted, tmp_path):
    """Under nohup, or when a multiplexer dies: each line then is an error of input and output."""
    master, slave = pty.openpty()
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    streams = {"stdin": slave, "stdout": slave, "stderr": slave, "preexec_fn": ignore}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **streams) as run:
        os.close(slave)
        run.at(4)
        read_terminal(master, b"step 3/12")
        os.close(master)
        run.go(4)
        assert run.ends() == 0
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_one_stream_alone_may_be_the_terminal_that_goes_away(
    gone, small_folder, uninterrupted, tmp_path
):
    """On stderr that is the line which says what takes so long."""
    master, slave = pty.openpty()
    other = "stderr" if gone == "stdout" else "stdout"
    with open(tmp_path / "other", "wb") as file:
        streams = {gone: slave, other: file, "stdin": subprocess.DEVNULL}
        with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **streams) as run:
            os.close(slave)
            run.at(4)
            read_terminal(master, b"step 3/12" if gone == "stdout" else b"left: 2 s")
            os.close(master)
            if gone == "stderr":
                time.sleep(1.5)  # the next second is announced to nobody
            run.go(4)
            assert run.ends() == 0
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)
    said = (tmp_path / "other").read_text(errors="replace")
    assert events(said) == (uninterrupted.events if gone == "stderr" else "")


def test_a_session_that_ends_stops_its_run_with_a_checkpoint(small_folder, uninterrupted, tmp_path):
    """The window is closed: the system sends SIGHUP, and nothing can be printed any more."""
    master, slave = pty.openpty()

    def own_the_terminal():
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = {"stdin": slave, "stdout": slave, "stderr": slave, "preexec_fn": own_the_terminal}
    with waiting_run(small_folder, tmp_path, *SMALL_RUN, **streams) as run:
        os.close(slave)
        run.at(4)
        read_terminal(master, b"step 3/12")
        os.close(master)
        time.sleep(0.2)
        run.go(4)
        assert run.ends() == 128 + signal.SIGHUP
    [checkpoint] = checkpoints(tmp_path / "run")
    assert step_of(checkpoint) == 4
    go_on = ("--output_dir", tmp_path / "run", "--resume", 1, "--checkpoint_every", 1)
    succeeded(run_command(small_folder, *go_on))
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


def test_sighup_finishes_the_update_and_writes_a_checkpoint(small_folder, uninterrupted, tmp_path):
    pipe = {"stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **pipe) as run:
        run.at(4)
        run.process.send_signal(signal.SIGHUP)
        run.go(4)
        first = run.process.stdout.read()
        assert run.ends() == 129
    step, hint = stopped_where(first)
    assert step == 4 == step_of(checkpoints(tmp_path / "run")[-1]) and "\nfinishing this" in first
    second = succeeded(run_command(small_folder, *uninterrupted.flags, *hint.split()))
    assert joined(first, second) == uninterrupted.events
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


def test_a_sighup_that_is_ignored_stays_ignored(small_folder, uninterrupted, tmp_path):
    """As under nohup, which ignores it before the trainer begins."""
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    streams = {"stdout": subprocess.DEVNULL, "preexec_fn": ignore}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **streams) as run:
        run.at(4)
        run.process.send_signal(signal.SIGHUP)
        run.go(4)
        assert run.ends() == 0
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


@pytest.mark.parametrize("full", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids=" ".join)
def test_output_to_a_full_disk_does_not_end_a_run(full, small_folder, uninterrupted, tmp_path):
    """What counts is saved, so the exit code is 0."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full: run it on Linux")
    command = [sys.executable, TRAINER, *map(str, uninterrupted.flags)]
    with open("/dev/full", "wb") as device, open(tmp_path / "other", "wb") as other:
        streams = {"stdout": other, "stderr": other} | dict.fromkeys(full, device)
        command += ["--output_dir", tmp_path / "run"]
        done = subprocess.run(command, cwd=small_folder, env=ENVIRONMENT, **streams)
    assert done.returncode == 0
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)
    said = (tmp_path / "other").read_text(errors="replace")
    assert events(said) == ("" if "stdout" in full else uninterrupted.events)


CLOSED = pytest.mark.parametrize("closed", [[1], [2], [1, 2], [0, 1, 2]], ids=str)


def command_with_closed_streams(folder, closed, *flags):
    """The exit code of `python train_gpt2.py FLAGS >&-`, and what it prints to what is open."""

    def close():
        for number in closed:
            os.close(number)

    done = subprocess.run(
        [sys.executable, TRAINER, *map(str, flags)], cwd=folder, preexec_fn=close,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
        env=ENVIRONMENT,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@CLOSED
def test_streams_may_be_closed_from_the_beginning(closed, small_folder, uninterrupted, tmp_path):
    flags = (*uninterrupted.flags, "--output_dir", tmp_path / "run")
    code, stdout, error = command_with_closed_streams(small_folder, closed, *flags)
    assert code == 0 and error == ""
    assert events(stdout) == ("" if 1 in closed else uninterrupted.events)
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


@CLOSED
@pytest.mark.parametrize("flags, expected", [("--model nonesuch", 1), ("--batchsize 4", 2)])
def test_an_error_that_nobody_can_read_has_its_exit_code(closed, flags, expected, tmp_path):
    code, _, error = command_with_closed_streams(tmp_path, closed, *flags.split())
    assert code == expected and (2 in closed or error.startswith("error: "))


def test_a_pipe_that_is_full_and_does_not_wait_costs_lines_only(
    small_folder, uninterrupted, tmp_path
):
    """Some programs hand down a pipe that gives an error where others would wait."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 512)
    pipe = {"stdout": write_end, "wait": ()}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **pipe) as run:
        os.close(write_end)
        assert run.ends() == 0
    os.close(read_end)
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


# --------------------------------------------------------------------------------------------------
# The log can't be written, or is gone


def rename_the_folder(folder):
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    "happens",
    [lambda folder: (folder / "main.log").unlink(), rename_the_folder, shutil.rmtree],
    ids=["log deleted", "folder renamed", "folder deleted"],
)
def test_a_log_that_is_gone_is_written_anew(happens, small_folder, uninterrupted, tmp_path):
    quiet = {"stdout": subprocess.DEVNULL}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **quiet) as run:
        run.at(4)
        happens(tmp_path / "run")
        run.go(4)
        assert run.ends() == 0
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


def test_lines_for_a_log_that_can_not_be_written_are_written_later(
    small_folder, uninterrupted, tmp_path
):
    """Where main.log was there is a folder for four updates."""
    log = tmp_path / "run" / "main.log"
    quiet = {"stdout": subprocess.DEVNULL, "wait": (4, 8)}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **quiet) as run:
        run.at(4)
        log.unlink()
        log.mkdir()
        run.go(4)
        run.at(8)
        log.rmdir()
        run.go(8)
        assert run.ends() == 0
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


def test_a_log_that_lacks_lines_in_the_end_is_said(small_folder, uninterrupted, tmp_path):
    log = tmp_path / "run" / "main.log"
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **streams) as run:
        run.at(4)
        log.unlink()
        log.mkdir()
        run.go(4)
        error = run.process.stderr.read()
        assert "main.log" in failed_in_one_line((run.ends(), "", error))
    log.rmdir()
    log.write_text(uninterrupted.state["log"])  # all else is there
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


@pytest.mark.parametrize("more", [0, 7])
def test_a_full_disk_for_a_while_costs_nothing(more, small_folder, uninterrupted, tmp_path):
    """Neither a line of the log, of which a part may still fit, nor the later checkpoints."""
    pipe = {"stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace", "wait": (4, 8)}
    log = tmp_path / "run" / "main.log"
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **pipe) as run:
        run.at(4)
        lines = log.read_bytes()
        room_for(run.process, len(lines) + more)
        run.go(4)
        run.at(8)
        assert log.read_bytes() == lines
        assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [2, 3]
        room_for(run.process, resource.RLIM_INFINITY)
        run.go(8)
        said = run.process.stdout.read()
        assert run.ends() == 0
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)

    for step in (4, 5, 6, 7):
        reason = os.strerror(errno.EFBIG)
        assert f"can't save step {step}: " in said and reason in said
    assert said.count("the last checkpoint is that of step 3") == 4
    assert said.count("can't keep the best weights: ") == 1  # after update 4
    without = [line for line in events(said).splitlines() if not line.startswith("can't ")]
    assert without == uninterrupted.events.splitlines()


def test_before_the_first_checkpoint_a_full_disk_says_that_there_is_none(
    small_folder, uninterrupted, tmp_path
):
    pipe = {"stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace", "wait": (1, 2)}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **pipe) as run:
        run.at(1)
        room_for(run.process, 1000)
        run.go(1)
        run.at(2)
        room_for(run.process, resource.RLIM_INFINITY)
        run.go(2)
        said = run.process.stdout.read()
        assert run.ends() == 0
    assert "can't save step 1: " in said and "; the last checkpoint is none\n" in said
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_is_not_saved_in_the_end_is_said_with_an_exit_code(
    stopped, small_folder, uninterrupted, tmp_path
):
    """And with room again, the command in that line leads to the same bits."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "wait": (4, 10)}
    streams |= {"encoding": "utf-8", "errors": "replace"}
    with waiting_run(small_folder, tmp_path, *uninterrupted.flags, **streams) as run:
        run.at(4)
        run.go(4)
        run.at(10)
        room_for(run.process, 20_000)
        if stopped:
            run.process.send_signal(signal.SIGTERM)
        run.go(10)
        said, error = run.process.communicate()
        line = failed_in_one_line((run.ends(), said, error))
    folder = tmp_path / "run"
    assert str(folder) in line and "a checkpoint of the last step" in line
    assert ("the weights" in line) == (not stopped)
    assert f"go on with --output_dir {folder} --resume 1" in line
    assert "saved in" not in said and "can't save step 10: " in said
    assert ("\nstep 11/12: " in said) == (not stopped)
    assert [step_of(path) for path in checkpoints(folder)] == [8, 9]

    succeeded(run_command(small_folder, "--output_dir", folder, "--resume", 1))
    assert_as_if_nothing_had_happened(tmp_path, uninterrupted)
