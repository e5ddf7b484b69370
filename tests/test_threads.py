"""The threads of `parallel`, BLAS's threads beside them, child processes, and the machine's limits.

What the machine allows is read from files. The tests forge such files in a folder of their own.
"""

import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import train_gpt2 as gpt2

MODULE = gpt2.__name__
HERE = os.path.dirname(os.path.abspath(gpt2.__file__))
NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: run it on Linux")


@pytest.fixture
def forge(tmp_path):
    """forge({path: text}) writes the files of a machine; returns the folder to take for its /."""

    def write(files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return str(tmp_path)

    return write


def run_python(program, **env):
    """What a fresh Python prints. A variable that is None is taken out of its environment."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        [sys.executable, "-c", program.replace("MODULE", MODULE)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=HERE,
        env=inherited | env,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# `parallel`


def test_parallel_runs_side_by_side_in_order_with_one_blas_thread(monkeypatch):
    calls = []
    barrier = threading.Barrier(3)
    monkeypatch.setattr(gpt2, "THREADS", 3)
    monkeypatch.setattr(gpt2, "set_blas_threads", calls.append)

    def task(i):
        barrier.wait(timeout=30)  # which only three threads at once can pass
        calls.append("task")
        return i * i

    assert gpt2.parallel(task, 6) == [0, 1, 4, 9, 16, 25]
    assert calls[:-1].count(1) == 3  # each thread for itself
    assert "task" not in calls[: calls.index(1)]
    assert calls.count("task") == 6
    assert calls[-1] == gpt2.THREADS


@pytest.mark.parametrize("bad", range(4))
def test_parallel_passes_an_error_on(bad, monkeypatch):
    """Whichever thread has met it; and BLAS gets its threads back."""
    calls = []
    barrier = threading.Barrier(4)
    monkeypatch.setattr(gpt2, "THREADS", 4)
    monkeypatch.setattr(gpt2, "set_blas_threads", calls.append)

    def task(i):
        barrier.wait(timeout=30)  # one task for each thread
        return 1 / (i - bad)

    with pytest.raises(ZeroDivisionError):
        gpt2.parallel(task, 4)
    assert calls[-1] == gpt2.THREADS


def test_parallel_does_with_the_threads_it_gets(monkeypatch):
    """None at all, or one."""
    start = threading.Thread.start
    allowed = []

    def no_more(thread):
        if not allowed:
            raise RuntimeError("can't start new thread")
        allowed.pop()
        start(thread)

    monkeypatch.setattr(gpt2, "THREADS", 4)
    monkeypatch.setattr(threading.Thread, "start", no_more)
    for number in (0, 1):
        calls, helpers = queue.SimpleQueue(), []
        monkeypatch.setattr(gpt2, "helpers_of", lambda process, both=(calls, helpers): both)
        allowed[:] = [True] * number
        assert gpt2.parallel(lambda i: i * i, 6) == [0, 1, 4, 9, 16, 25]
        assert len(helpers) == number


@NEEDS_FORK
def test_a_child_process_has_threads_of_its_own(monkeypatch):
    """os.fork copies no threads, so a child that waited for those of its parent would wait long."""
    monkeypatch.setattr(gpt2, "THREADS", 3)
    a = np.ones((300, 300), np.float32)

    def task(i):
        return float((a @ a)[0, 0]) + i

    expected = gpt2.parallel(task, 6)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        answer = gpt2.parallel(task, 6) + [float((a @ a)[0, 0])]  # the last on BLAS's own threads
        os.write(write_end, repr(answer).encode())
        os._exit(0)
    os.close(write_end)
    answered = select.select([read_end], [], [], 30)[0]
    if not answered:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.read(read_end, 1000).decode() == repr(expected + [300.0])
    os.close(read_end)


# What is set up, and when


@NEEDS_LINUX
def test_importing_changes_nothing():
    """No variable, no call into the allocator or BLAS, no thread: these come with `parallel`."""
    program = """if True:
        import ctypes, os
        import numpy
        ctypes_calls = []
        class CDLL(ctypes.CDLL):
            def __init__(self, *args, **kwargs):
                ctypes_calls.append(args)
                super().__init__(*args, **kwargs)
        ctypes.CDLL = CDLL
        before = dict(os.environ), len(os.listdir("/proc/self/task"))
        import MODULE as gpt2
        print((dict(os.environ), len(os.listdir("/proc/self/task"))) == before, ctypes_calls)
        gpt2.parallel(abs, 3)
        print(len(ctypes_calls) > 0)
        """
    assert run_python(program).splitlines() == ["True []", "True"]


@NEEDS_LINUX
def test_a_step_leaves_the_threads_of_blas_asleep():
    """They spin while they wait for each other, which other programs on the cores make long."""
    program = """if True:
        import os, time
        import numpy
        a = numpy.ones((700, 700), numpy.float32)
        a @ a  # now they are there
        blas = set(os.listdir("/proc/self/task")) - {str(os.getpid())}
        time.sleep(0.5)  # and sleep
        import MODULE as gpt2
        def used():
            return sum(int(open(f"/proc/self/task/{t}/schedstat").read().split()[0]) for t in blas)
        model = gpt2.GPT2(gpt2.GPT2Config(64, 256, 2, 4, 128), 16, 64, seed=1)
        tokens = numpy.zeros((16, 64), int)
        before = used()
        for step in (1, 2, 3):
            model.forward(tokens, tokens)
            model.backward()
            model.update(1e-3, step=step)
        print(len(blas), used() - before)
        """
    assert run_python(program, OPENBLAS_NUM_THREADS="2") == "1 0"


# Whichever BLAS NumPy has


def test_blas_really_has_a_setter():
    """Without it two kinds of threads would compete for the cores, and no result would show it."""
    pools = pytest.importorskip("threadpoolctl", reason="pip install threadpoolctl")
    here = os.path.realpath(os.path.dirname(np.__file__) + "/..")
    libraries = pools.ThreadpoolController().select(user_api="blas").lib_controllers
    numpys = [library for library in libraries if here in os.path.realpath(library.filepath)]
    for n in (1, 2, 1):
        gpt2.set_blas_threads(n)
        assert [library.num_threads for library in numpys or libraries] == [n]
    gpt2.set_blas_threads(gpt2.THREADS)


@NEEDS_LINUX
@pytest.mark.parametrize("threads", [1, 2])
def test_blas_uses_one_core_inside_a_task(threads):
    """Seen from outside: the process uses no more time than the threads that run the tasks."""
    program = """if True:
        import threading, time
        import numpy
        import MODULE as gpt2
        gpt2.THREADS = NUMBER
        barrier = threading.Barrier(NUMBER)
        a = numpy.ones((700, 700), numpy.float32)
        a @ a
        time.sleep(0.5)  # BLAS's threads go to sleep
        def task(i):
            barrier.wait(timeout=30)  # each task in a thread of its own
            began = time.thread_time()
            for _ in range(60):
                a @ a
            return time.thread_time() - began
        began = time.process_time()
        tasks = sum(gpt2.parallel(task, NUMBER))
        print(time.process_time() - began < 1.15 * tasks + 0.02)
        """.replace("NUMBER", str(threads))
    assert run_python(program, OPENBLAS_THREAD_TIMEOUT="20", OMP_NUM_THREADS="2") == "True"


@pytest.mark.parametrize(
    "name",
    [
        "scipy_openblas_set_num_threads64_",
        "openblas_set_num_threads64_",
        "openblas_set_num_threads",
        "MKL_Set_Num_Threads",
        "flexiblas_set_num_threads",
        "bli_thread_set_num_threads",
    ],
)
def test_each_blas_is_known_by_its_name(name, monkeypatch):
    calls = []
    blas = SimpleNamespace(**{name: calls.append})
    monkeypatch.setattr(gpt2.ctypes, "CDLL", lambda path: blas)
    gpt2.find_blas_threads_setter.cache_clear()
    gpt2.set_blas_threads(3)
    gpt2.find_blas_threads_setter.cache_clear()
    assert calls == [3]


def test_accelerate_has_one_thread_or_all(monkeypatch):
    calls = []
    blas = SimpleNamespace(BLASSetThreading=calls.append)
    monkeypatch.setattr(gpt2.ctypes, "CDLL", lambda path: blas)
    gpt2.find_blas_threads_setter.cache_clear()
    for n in (1, 8):
        gpt2.set_blas_threads(n)
    gpt2.find_blas_threads_setter.cache_clear()
    assert calls == [1, 0]  # BLAS_THREADING_SINGLE_THREADED, BLAS_THREADING_MULTI_THREADED


@pytest.mark.parametrize("present", [False, True])
def test_threadpoolctl_finds_what_is_left(present, monkeypatch):
    calls = []
    library = SimpleNamespace(set_num_threads=calls.append)
    controller = SimpleNamespace(select=lambda user_api: SimpleNamespace(lib_controllers=[library]))
    module = SimpleNamespace(ThreadpoolController=lambda: controller) if present else None
    monkeypatch.setitem(sys.modules, "threadpoolctl", module)  # None: not to be imported
    monkeypatch.setattr(gpt2.ctypes, "CDLL", lambda path: SimpleNamespace())
    gpt2.find_blas_threads_setter.cache_clear()
    gpt2.set_blas_threads(3)
    gpt2.find_blas_threads_setter.cache_clear()
    assert calls == [3] * present


# How many threads


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 8),  # not on Linux
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        # a container with a namespace of its own sees its group as /
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 8),
        # without one, its path is the host's, which is not mounted
        ({"proc/self/cgroup": "0::/docker/12ab\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        # the process has been moved out of the namespace's root
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        # nested: the smallest counts, wherever it is
        (
            {
                "proc/self/cgroup": "0::/a.slice/b:c/d e\n",  # a colon and a blank may be in a name
                "sys/fs/cgroup/a.slice/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a.slice/b:c/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a.slice/b:c/d e/cpu.max": "400000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "200000 100000\n",
            },
            2,
        ),
        # version 1, in a container and nested on a host
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/12ab\n3:cpuset:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/a/b\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "20000\n",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        # another group's limit is not ours
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/b/cpu.max": "100000 100000\n"}, 8),
    ],
)
def test_cores_are_those_of_the_quota(files, cores, forge, eight_cores):
    assert gpt2.cores_allowed(forge(files)) == cores


def test_cores_are_those_of_the_affinity_where_there_is_one(forge, monkeypatch):
    root = forge({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 7}, raising=False)
    assert gpt2.cores_allowed(root) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert gpt2.cores_allowed(root) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert gpt2.cores_allowed(root) == 1


@pytest.mark.parametrize("processes, share", [(1, 6), (2, 3), (4, 1), (9, 1)])
def test_several_processes_share_what_they_may_use(processes, share, monkeypatch):
    """Not what the machine has: six cores may be this run's, of 64."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(gpt2, "cores_allowed", lambda: 6)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert gpt2.threads_wanted(processes) == share


@pytest.mark.parametrize(
    "env, threads",
    [
        ({"OPENBLAS_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "7"}, 3),
        ({"OPENBLAS_NUM_THREADS": "0"}, 6),
        ({"OPENBLAS_NUM_THREADS": "many"}, 6),
        ({}, 6),
    ],
)
def test_the_number_that_the_user_names_wins(env, threads, monkeypatch):
    monkeypatch.setattr(gpt2, "cores_allowed", lambda: 6)
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, env.get(name, ""))
    assert gpt2.threads_wanted() == threads


# How much memory

GB = 10**9
MEMINFO = f"MemTotal: 9 kB\nMemFree: 5 kB\nMemAvailable: {32 * GB >> 10} kB\nHugePages_Total: 0\n"


def stat(**values):
    return "".join(f"{name} {value}\n" for name, value in values.items())


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, math.inf),
        ({"proc/meminfo": MEMINFO}, 32 * GB),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": f"{9 * GB}\n",
            },
            32 * GB,
        ),
        # files that were read or written count as used, and give way
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/docker/12ab\n",
                "sys/fs/cgroup/memory.max": f"{8 * GB}\n",
                "sys/fs/cgroup/memory.current": f"{7 * GB}\n",
                "sys/fs/cgroup/memory.stat": stat(
                    anon=2 * GB, inactive_file=3 * GB, active_file=2 * GB
                ),
            },
            6 * GB,
        ),
        # nested, and a limit above which the process would crawl
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/user.slice/run.scope\n",
                "sys/fs/cgroup/user.slice/memory.max": f"{10 * GB}\n",
                "sys/fs/cgroup/user.slice/memory.current": f"{7 * GB}\n",
                "sys/fs/cgroup/user.slice/run.scope/memory.max": f"{8 * GB}\n",
                "sys/fs/cgroup/user.slice/run.scope/memory.current": f"{1 * GB}\n",
            },
            3 * GB,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/memory.max": f"{8 * GB}\n",
                "sys/fs/cgroup/a/memory.high": f"{6 * GB}\n",
                "sys/fs/cgroup/a/memory.current": f"{7 * GB}\n",
                "sys/fs/cgroup/a/memory.stat": "",
            },
            0,
        ),
        # version 1: in a container, nested, and without a limit
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "9:memory:/docker/12ab\n4:cpu,cpuacct:/docker/12ab\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GB}\n",
                "sys/fs/cgroup/memory/memory.stat": stat(
                    inactive_file=0, active_file=0, total_inactive_file=GB, total_active_file=GB
                ),
            },
            3 * GB,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "9:memory:/a/b\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{4 * GB}\n",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{3 * GB}\n",
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": f"{1 * GB}\n",
            },
            1 * GB,
        ),
    ],
)
def test_memory_is_that_of_the_innermost_and_the_outermost_limit(files, free, forge, monkeypatch):
    resource = pytest.importorskip("resource")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda what: unlimited)
    found = gpt2.available_memory(forge(files))
    assert found == free or abs(found - free) < 1024  # /proc/meminfo counts in KiB


@NEEDS_LINUX
def test_memory_is_what_ulimit_leaves():
    """`ulimit -v` counts addresses, those that the process already has as well."""
    program = """if True:
        import resource
        import MODULE as gpt2
        limit = 3 << 30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        free = gpt2.available_memory()
        import numpy
        some = numpy.zeros(free - (1 << 20), numpy.uint8)
        try:
            more = numpy.zeros(8 << 20, numpy.uint8)
        except MemoryError:
            print(0 < free < limit)
        """
    assert run_python(program) == "True"
