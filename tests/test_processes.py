"""
Several processes: mpiexec -n N python train_gpt2.py

These tests need an MPI and mpi4py: pip install mpi4py mpich. The processes talk over TCP on this
machine, as they would between machines.
"""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from common import TRAINER, checkpoint_folders, events, read_plainly, write_token_file

import train_gpt2 as gpt2
from test_gpt2 import random_model, random_tokens, relative_error

MPIEXEC = os.path.join(os.path.dirname(sys.executable), "mpiexec")
if not os.path.exists(MPIEXEC):
    MPIEXEC = shutil.which("mpiexec")
HAS_MPI = bool(MPIEXEC) and importlib.util.find_spec("mpi4py") is not None
needs_mpi = pytest.mark.skipif(
    not HAS_MPI or os.name == "nt", reason="needs MPI: pip install mpi4py mpich"
)

ENVIRONMENT = {
    "MPIR_CVAR_CH4_NETMOD": "ofi",  # MPICH: through libfabric,
    "FI_PROVIDER": "tcp",  # which uses TCP,
    "FI_TCP_IFACE": "lo",  # on this machine,
    "MPIR_CVAR_NOLOCAL": "1",  # and no shared memory
    "OMPI_MCA_btl": "tcp,self",  # Open MPI, likewise
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OPENBLAS_NUM_THREADS": "1",
}


def command(n, *arguments):
    return [MPIEXEC, "-n", str(n), sys.executable, *map(str, arguments)]


def run_all(n, *arguments, folder, env=None, timeout=120):
    """Run a program on n processes to its end: what subprocess.run returns."""
    return subprocess.run(
        command(n, *arguments),
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text of bytes for training and validation."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 20_000), ("val", 4_000)):
        write_token_file(folder / "data" / f"{name}.bin", rng.integers(97, 105, n))
    return folder


RUN = (
    TRAINER, "--model", "bytes", "--input_bin", "data/train.bin",
    "--input_val_bin", "data/val.bin", "--batch_size", 1, "--sequence_length", 32,
    "--total_batch_size", 192, "--warmup_iters", 3, "--val_loss_every", 5, "--val_max_steps", 5,
    "--sample_every", 0,
)  # fmt: skip


def losses(stdout):
    """{(update or "val" and its number): loss} of what a run printed."""
    found = {}
    for line in stdout.splitlines():
        if line.startswith("step "):
            found[int(line.split()[1].split("/")[0])] = float(line.split()[4])
        elif line.startswith("val loss "):
            found["val", len(found)] = float(line.split()[2])
    return found


# --------------------------------------------------------------------------------------------------
# The arithmetic

TOGETHER = """
import sys
sys.path[:0] = {paths!r}
from test_processes import *
gpt2.PIECE = 1000  # many pieces, the last of which is short
world = gpt2.join_world()
dtype, V = np.dtype({dtype!r}), {V}
model, batches, loader = model_and_batches(dtype, V, world.size, world.rank)
found = ten_updates(lambda *rest: gpt2.train_step_together(world, model, loader, 1, *rest))
for row in model.flat[2:]:
    world.gather_params(row)  # the test looks at all of m and v
if world.rank == 0:
    np.savez({path!r}, losses=found, flat=model.flat[[0, 2, 3]])
world.wait()
"""


def model_and_batches(dtype, V, n, rank=0):
    """A model, ten updates' batches for n processes, and a loader of those of one process."""
    model = random_model(2, 8, dtype, V=V, C=25, NH=5)
    batches = random_tokens(10, n, B=2, T=8, V=V)
    of_rank = iter(batches[:, rank])
    return model, batches, SimpleNamespace(next_batch=lambda: next(of_rank))


def ten_updates(step):
    """(loss, norm) of ten updates with a schedule, weight decay and clipping."""
    args = gpt2.settings({"num_iterations": 10, "learning_rate": 1e-3, "warmup_iters": 3})
    args.learning_rate_decay_frac = 0.1
    return np.array([step(gpt2.learning_rate_at(i, args), 0.1, 0.5, i + 1) for i in range(10)])


def alone(dtype, V, n):
    """The same on one process, with n micro-batches for each update."""
    model, batches, _ = model_and_batches(dtype, V, n)
    in_order = iter(batches.reshape(-1, *batches.shape[2:]))
    loader = SimpleNamespace(next_batch=lambda: next(in_order))
    found = ten_updates(lambda *rest: gpt2.train_step(model, loader, n, *rest))
    return found, model.flat[[0, 2, 3]]


def together(dtype, V, n, folder):
    path = str(folder / f"{n}-{dtype}-{V}.npz")
    here = str(Path(__file__).parent)
    paths = [str(Path(here).parent), here]
    program = TOGETHER.format(paths=paths, dtype=dtype, V=V, path=path)
    result = run_all(n, "-c", program, folder=folder)
    assert result.returncode == 0, result.stderr
    with np.load(path) as found:
        return found["losses"], found["flat"]


@needs_mpi
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_n_processes_equal_one_with_n_micro_batches(n, dtype, tolerance, folder):
    """Parameters, m, v, losses and norms, after ten updates. n does not divide their number."""
    found, flat = together(dtype, 56, n, folder)
    expected, expected_flat = alone(np.dtype(dtype), 56, n)
    assert len(flat[0]) % n > 0
    assert relative_error(found, expected) < tolerance
    for row, expected_row in zip(flat, expected_flat, strict=True):
        assert relative_error(row, expected_row) < tolerance


@needs_mpi
def test_two_runs_have_the_same_bits(folder):
    first = together("float32", 56, 3, folder)
    second = together("float32", 56, 3, folder)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 5, 12, 1000])
def test_parts_cover_the_vector_once(n, length):
    world = gpt2.World()
    world.size = n
    covered = np.zeros(length, int)
    for rank in range(n):
        covered[world.part(length, rank)] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("shuffle_seed", [None, 7])
def test_processes_see_the_batches_of_one(shuffle_seed):
    """Two shards, three processes, through several epochs: the same batches, the same positions."""
    tokens = np.random.default_rng(3).integers(0, 50, 400).astype(np.uint16)

    def loader(rank, size):
        made = gpt2.DataLoader(tokens[:240], 2, 8, 50, shuffle_seed, rank, size)
        made.shards, made.sizes = [tokens[:240], tokens[240:]], [240, 160]
        made.names = ["a", "b"]
        made.seek([0, 0, 0])
        return made

    one = loader(0, 1)
    several = [loader(rank, 3) for rank in range(3)]
    for _ in range(30):
        for other in several:
            inputs, targets = one.next_batch()
            same = other.next_batch()
            assert (inputs == same[0]).all() and (targets == same[1]).all()
        assert {tuple(other.position) for other in several} == {tuple(one.position)}


# --------------------------------------------------------------------------------------------------
# Whole runs


@needs_mpi
def test_a_run_on_one_goes_on_with_three_and_with_two(folder):
    """Its losses are those of a run on one process; its files open as such a run's do."""
    run = [*RUN, "--learning_rate_decay_frac", 1]  # a schedule that does not depend on the end
    whole = run_all(1, *run, "--num_iterations", 12, "--output_dir", "whole", folder=folder)
    assert whole.returncode == 0, whole.stderr
    expected = losses(whole.stdout)

    found = {}
    for n, until in ((1, 4), (3, 8), (2, 12)):
        flags = [*run, "--output_dir", "parts", "--resume", 1, "--num_iterations", until]
        result = run_all(n, *flags, folder=folder)
        assert result.returncode == 0, result.stderr
        found |= {key: loss for key, loss in losses(result.stdout).items() if isinstance(key, int)}
    assert sorted(found) == list(range(1, 13))
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5

    names = ["whole", "parts"]
    files = [checkpoint_folders(folder / name)[-1] / "optimizer.safetensors" for name in names]
    whole_moments, parts_moments = (read_plainly(file.read_bytes()) for file in files)
    assert whole_moments.keys() == parts_moments.keys() == {"m", "v"}


@needs_mpi
def test_what_is_printed_is_that_of_one_process(folder):
    """Losses to 1e-5, and each line once."""
    flags = [*RUN, "--num_iterations", 6]
    one = run_all(1, *flags, folder=folder)
    three = run_all(3, *flags, folder=folder)
    assert three.returncode == 0 and not three.stderr, three.stderr
    expected, found = losses(one.stdout), losses(three.stdout)
    assert found.keys() == expected.keys() and len(found) >= 8
    assert max(abs(found[key] - expected[key]) for key in found) < 1e-5
    assert three.stdout.count("memory in each of 3 processes") == 1


@needs_mpi
def test_cores_are_shared_out_unless_the_user_did(folder):
    program = (
        f"import sys; sys.path.insert(0, {os.path.dirname(TRAINER)!r}); import train_gpt2 as g; "
        "w = g.join_world(); n = w.comm.gather(g.ROW_THREADS); "
        "w.rank or print(n, file=sys.__stdout__)"
    )
    cores = max(1, (os.cpu_count() or 1) // 2)
    unset = {"OPENBLAS_NUM_THREADS": "", "OMP_NUM_THREADS": "", "MPIR_CVAR_NOLOCAL": "0"}
    result = run_all(2, "-c", program, folder=folder, env=unset)
    assert all(1 <= n <= cores for n in eval(result.stdout)), result
    result = run_all(2, "-c", program, folder=folder, env={"OPENBLAS_NUM_THREADS": "5"})
    assert result.stdout.strip() == "[5, 5]"


# --------------------------------------------------------------------------------------------------
# Faults


def ended(result, *parts, code=1):
    """One line of ours says all of these, and the run has failed."""
    assert result.returncode != 0, result.stdout
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    ours = [line for line in lines if all(part in line for part in parts)]
    assert len(ours) == 1, result.stderr
    assert "Traceback" not in result.stderr


@needs_mpi
def test_another_flag_on_one_process(folder):
    program = (
        "import os, sys; rank = os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK']; "
        f"sys.path.insert(0, {os.path.dirname(TRAINER)!r}); import train_gpt2; "
        "sys.exit(train_gpt2.main([*sys.argv[1:], '--seed', rank]))"
    )
    result = run_all(2, "-c", program, *RUN[1:], folder=folder)
    ended(result, "process 1 has other flags than process 0")


@needs_mpi
def test_other_data_on_one_process(folder):
    """Of the same size, so that only its checksum differs."""
    program = (
        "import os, sys; rank = os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK']; "
        f"sys.path.insert(0, {os.path.dirname(TRAINER)!r}); import train_gpt2 as g; "
        "before = g.prepro.open_tokens; "
        "g.prepro.open_tokens = lambda name: before(name)[::1 if rank == '0' else -1]; "
        "sys.exit(g.main(sys.argv[1:]))"
    )
    result = run_all(2, "-c", program, *RUN[1:], folder=folder)
    ended(result, "process 1 has other training data than process 0")


@needs_mpi
def test_a_nan_on_one_process_ends_all(folder):
    program = (
        "import os, sys; rank = os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK']; "
        f"sys.path.insert(0, {os.path.dirname(TRAINER)!r}); import train_gpt2 as g; "
        "before = g.gelu_forward\n"
        "def gelu(out, inp):\n"
        "    before(out, inp)\n"
        "    out[0, 0, 0] = g.math.nan\n"
        "if rank == '1': g.gelu_forward = gelu\n"
        "sys.exit(g.main(sys.argv[1:]))"
    )
    began = time.monotonic()
    result = run_all(2, "-c", program, *RUN[1:], "--val_loss_every", 0, folder=folder)
    ended(result, "update 1: the loss is nan; it began in residual3 of layer 0")
    assert time.monotonic() - began < 20


@needs_mpi
def test_an_error_of_all_is_said_once(folder):
    result = run_all(3, *RUN, "--input_bin", "data/none.bin", folder=folder)
    ended(result, "data/none.bin: no such token file")
    assert result.stderr.count("error: ") == 1


def test_mpiexec_without_mpi4py(folder):
    """One line, which names the command."""
    environment = {**os.environ, "PMI_RANK": "0", "PMI_SIZE": "2"}
    hidden = "import sys; sys.modules['mpi4py'] = None; "
    hidden += f"sys.path.insert(0, {os.path.dirname(TRAINER)!r}); import train_gpt2; "
    hidden += "sys.exit(train_gpt2.main([]))"
    result = subprocess.run(
        [sys.executable, "-c", hidden], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "2 processes" in result.stderr and "pip install mpi4py" in result.stderr


@pytest.fixture(scope="module")
def uninterrupted_run(folder):
    """The output of a run of 30 updates on 2 processes with checkpoints, and where it wrote."""
    flags = [*RUN, "--num_iterations", 30, "--checkpoint_every", 3]
    result = run_all(2, *flags, "--output_dir", "uninterrupted", folder=folder)
    assert result.returncode == 0, result.stderr
    return flags, result.stdout


def processes_in(folder):
    """The processes that were started in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cwd").resolve() == folder.resolve():
                text = (entry / "cmdline").read_bytes()
                if b"train_gpt2" in text and b"mpiexec" not in text and b"hydra" not in text:
                    found.append((int(entry.name), (entry / "environ").read_bytes()))
        except OSError:
            continue
    return found


def rank_of(environment):
    for variable in environment.split(b"\0"):
        name, _, value = variable.partition(b"=")
        if name in (b"PMI_RANK", b"OMPI_COMM_WORLD_RANK"):
            return int(value)
    return None


def strike(folder, n, flags, moment, send):
    """Start a run, call send(mpiexec's process, {rank: pid}) after `moment` lines, and wait.

    Returns (exit code, stdout). Fails if that takes over 20 s, or leaves a process behind.
    """
    process = subprocess.Popen(
        command(n, *flags), cwd=folder, env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if len(lines) == moment:
            ranks = {rank_of(environment): pid for pid, environment in processes_in(folder)}
            send(process, ranks)
    stdout, _ = process.communicate(timeout=20)
    time.sleep(0.2)
    assert not processes_in(folder)
    return process.returncode, "".join(lines) + stdout


@needs_mpi
@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_the_run_goes_on(victim, folder, uninterrupted_run, tmp_path):
    """At random moments, five for each rank; a hundred with LONG_TESTS=1. The same bits."""
    flags, stdout = uninterrupted_run
    many = 50 if os.environ.get("LONG_TESTS") == "1" else 5
    rng = random.Random(victim)
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")

    for i in range(many):
        moment = rng.randint(1, len(stdout.splitlines()) - 4)
        pause = rng.random() * 0.02

        def kill(process, ranks, pause=pause):
            time.sleep(pause)
            os.kill(ranks[victim], signal.SIGKILL)

        run_flags = [*flags, "--output_dir", f"run{i}"]
        code, first = strike(place, 2, run_flags, moment, kill)
        assert code != 0, first
        second = run_all(2, *run_flags, "--resume", 1, folder=place)
        assert second.returncode == 0, second.stderr
        assert events(stdout).endswith(events(second.stdout)) and "damaged" not in second.stdout
        left = (place / f"run{i}" / "model.safetensors").read_bytes()
        assert left == (folder / "uninterrupted" / "model.safetensors").read_bytes()


def forwards_signals():
    """Whether this mpiexec passes Ctrl-C and SIGTERM on. Open MPI's kills after half a second."""
    text = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True).stdout
    return "HYDRA" in text.upper()


STOPS = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGUSR1] if os.name == "posix" else [])


@needs_mpi
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_mpiexec_stops_all_with_one_checkpoint(number, folder, tmp_path):
    if number != signal.SIGUSR1 and not forwards_signals():
        pytest.skip("Open MPI's mpiexec kills half a second after Ctrl-C or SIGTERM: use SIGUSR1")
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")
    flags = [*RUN, "--num_iterations", 10**6, "--output_dir", "run", "--val_loss_every", 0]
    code, stdout = strike(place, 2, flags, 8, lambda process, ranks: process.send_signal(number))
    assert code != 0 and "stopped: " in stdout, stdout
    [checkpoint] = checkpoint_folders(place / "run")
    steps = [line for line in stdout.splitlines() if line.startswith("step ")]
    assert int(checkpoint.name.split("_")[1]) == len(steps)


@needs_mpi
def test_a_full_disk_on_process_0_ends_all(folder, tmp_path):
    """The file system that it writes to has no room for a second checkpoint."""
    program = (
        "import os, sys; rank = os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK']; "
        f"sys.path.insert(0, {os.path.dirname(TRAINER)!r}); import train_gpt2 as g\n"
        "before = g.prepro.write_safetensors\n"
        "def write(path, *rest):\n"
        "    if rank == '0' and 'optimizer' in path and g.list_checkpoints('full'):\n"
        "        raise OSError(28, 'No space left on device', path)\n"
        "    before(path, *rest)\n"
        "g.prepro.write_safetensors = write\n"
        "sys.exit(g.main(sys.argv[1:]))"
    )
    flags = [*RUN[1:], "--num_iterations", 9, "--checkpoint_every", 3, "--output_dir", "full"]
    result = run_all(3, "-c", program, *flags, folder=folder)
    ended(result, "can't save to full", "No space left", "checkpoint_00000003")
    assert [path.name for path in checkpoint_folders(folder / "full")] == ["checkpoint_00000003"]


@needs_mpi
def test_the_plan_counts_a_share_of_the_moments():
    config = gpt2.GPT2Config()
    args = gpt2.settings({})
    one, four = gpt2.memory_plan(args, config), gpt2.memory_plan(args, config, 4)
    assert four["moments"] == one["moments"] // 4
    assert {**one, "moments": 0} == {**four, "moments": 0}
