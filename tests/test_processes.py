"""Several processes: mpiexec -n N python -m extras.processes.

What several processes compute is compared with the trainer by itself. Faults are put into one of
them by a few lines that run before main(): they know the number `rank` of their process.
"""

import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

import train_gpt2 as gpt2

TRAINER = os.path.abspath(gpt2.__file__)
MPIEXEC = os.path.join(os.path.dirname(sys.executable), "mpiexec")
MPIEXEC = MPIEXEC if os.path.exists(MPIEXEC) else shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(
    os.name == "nt" or not MPIEXEC or not importlib.util.find_spec("mpi4py"),
    reason="needs MPI and mpi4py: pip install mpi4py mpich",
)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.path.dirname(TRAINER),
    "OPENBLAS_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # Open MPI
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
FLAGS = """--model bytes --input_bin train_0.bin train_1.bin --input_val_bin val.bin --batch_size 2
    --sequence_length 16 --total_batch_size 256 --warmup_iters 3 --num_iterations 8
    --learning_rate_decay_frac 1 --val_loss_every 4 --val_max_steps 0 --sample_every 0
    --checkpoint_every 3 --log_every 1 --output_dir run""".split()

# Small pieces, so that a part of the model has several. In the end, what belongs to others is 0.
PROGRAM = """if True:
    import os, signal, sys, time
    import numpy as np
    import train_gpt2 as gpt2
    from extras import processes
    rank = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
    processes.PIECE = 50_000
    train = gpt2.train

    def checked(run):
        complete = train(run)
        moments = run.model.flat[2:].copy()
        moments[:, run.model.own] = 0
        assert not moments.any()
        return complete

    gpt2.train = checked
    {fault}
    sys.exit(processes.main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with two shards of training data and one for validation."""
    rng = np.random.default_rng(0)
    for name, n in (("train_0", 1500), ("train_1", 900), ("val", 700)):
        header = struct.pack("<4i", 20240520, 1, n, 256).ljust(1024, b"\0")
        tokens = rng.integers(97, 105, n).astype("<u2")
        (tmp_path / f"{name}.bin").write_bytes(header + tokens.tobytes())
    gpt2.GPT2(gpt2.GPT2Config(16, 256, 1, 1, 4), 1, 1).save_pretrained(tmp_path / "model")
    return tmp_path


def command(n, *flags, fault=""):
    """The command with which n processes train; 0 is the trainer by itself."""
    flags = [*FLAGS, *map(str, flags)]
    if n == 0:
        return [sys.executable, TRAINER, *flags]
    program = PROGRAM.format(fault=fault.strip().replace("\n", "\n    "))
    return [MPIEXEC, "-n", str(n), sys.executable, "-c", program, *flags]


def trained(n, folder, *flags, fault="", code=0):
    """What a run prints: (stdout, stderr). It must end with that exit code, and within a minute."""
    done = subprocess.run(
        command(n, *flags, fault=fault), cwd=folder, env=ENVIRONMENT, text=True,
        capture_output=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def left_in(folder):
    """What a run has left: (losses and norms of each update, all numbers of its last checkpoint,
    the steps of its checkpoints, position).
    """
    paths = gpt2.list_checkpoints(str(folder))
    gpt2.check_crc32(paths[0])
    tensors, metadata = gpt2.read_safetensors(paths[0])
    numbers = [tensor.array.ravel() for name, tensor in tensors.items() if name != "crc32"]
    entries = [json.loads(line) for line in (folder / "main.jsonl").read_text().splitlines()]
    names = ("step", "train_loss", "norm", "val_loss", "val_tokens")
    losses = [[entry.get(name, 0) for name in names] for entry in entries]
    steps = [int(path[-20:-12]) for path in paths]
    return losses, np.concatenate(numbers), steps, json.loads(metadata["state"])["position"]


def assert_same(found, expected, exactly=False):
    """Two runs have left the same, to float32's rounding or to the bit."""
    assert found[2:] == expected[2:]
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert np.array_equal(one, other) if exactly else np.allclose(one, other, 1e-3, 2e-5)


@needs_mpi
@pytest.mark.parametrize("n", [2, pytest.param(1, marks=pytest.mark.slow), 4])
def test_n_processes_equal_one(n, folder):
    """Losses, validations, norms, weights, moments, position; and what is printed."""
    flags = ["--sample_every", 4, "--max_new_tokens", 20, "--temperature", 0]
    stdout, _ = trained(0, folder, *flags, "--output_dir", "alone")
    alone = left_in(folder / "alone")
    found, stderr = trained(n, folder, *flags)
    several = left_in(folder / "run")
    assert_same(several, alone)
    assert stderr == "" and np.abs(several[1]).max() > 1

    lines = [line for line in found.splitlines() if not line.startswith("processes: ")]
    assert [line.split()[:2] for line in lines] == [line.split()[:2] for line in stdout.splitlines()]
    sample = [text.split("--- sample")[-1].split("train loss")[0] for text in (stdout, found)]
    assert sample[0] == sample[1]

    trained(n, folder, *flags, "--output_dir", "again")
    assert_same(left_in(folder / "again"), several, exactly=True)


@needs_mpi
@pytest.mark.parametrize("numbers", [(1, 2, 4), pytest.param((4, 0, 2), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(numbers, folder):
    """0 is the trainer by itself. What is read is what was written."""
    trained(0, folder, "--output_dir", "alone")
    for n, until in zip(numbers, (2, 5, 8), strict=True):
        before = left_in(folder / "run") if until > 2 else None
        stdout, _ = trained(n, folder, "--num_iterations", until, "--resume", 1)
        assert (f"resuming from run/checkpoint_{until - 3:08d}" in stdout) == (until > 2)
    assert_same(left_in(folder / "run"), left_in(folder / "alone"))
    assert len(before[1]) == 3 * 437_760


AT_UPDATE_5 = """
backward = processes.SharedGPT2.backward

def backward_with_a_signal(self):
    backward(self)
    if self.updates == 5 and self.micro_batch == 1 and rank == {rank}:
        os.kill(os.getpid(), signal.{name})

processes.SharedGPT2.backward = backward_with_a_signal
"""


@needs_mpi
@pytest.mark.parametrize(
    "name, rank, code, saved",
    [("SIGTERM", 1, 143, [6, 3]), ("SIGKILL", 1, 9, [3]), ("SIGINT", 0, 130, [6, 3])],
)
def test_a_signal_to_one_process(name, rank, code, saved, folder):
    """All finish the update, or all end; the run then goes on to the same bits."""
    trained(2, folder, "--output_dir", "whole")
    stdout, _ = trained(2, folder, fault=AT_UPDATE_5.format(rank=rank, name=name), code=code)
    steps = [int(path[-20:-12]) for path in gpt2.list_checkpoints(str(folder / "run"))]
    assert steps == saved and ("stopped: 6 updates" in stdout) == (name != "SIGKILL")
    trained(2, folder, "--resume", 1)
    assert_same(left_in(folder / "run"), left_in(folder / "whole"), exactly=True)


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_mpiexec_and_ctrl_c(number, folder):
    """Ctrl-C goes to mpiexec and to all that it has started, the others to mpiexec alone."""
    run = subprocess.Popen(
        command(2, "--num_iterations", 10**6), cwd=folder, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        for line in run.stdout:
            if line.startswith("step 2/"):
                break
        os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
        stdout, _ = run.communicate(timeout=20)
    finally:
        run.kill()
    steps = left_in(folder / "run")[2]
    assert f"stopped: {steps[0]} updates" in stdout and f"step {steps[0] + 1}/" not in stdout


FULL_DISK = """
import resource
save_checkpoint = gpt2.save_checkpoint

def save(run):
    limit = 2_500_000 if rank == 0 and run.step in {full} else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save_checkpoint(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

gpt2.save_checkpoint = save
"""


@needs_mpi
@pytest.mark.parametrize("full, code, saved", [([3], 0, [8, 6]), ([6, 8], 1, [3])])
def test_a_disk_that_is_full_amid_the_moments(full, code, saved, folder):
    """The first process can't write checkpoints for a while, or to the end. No other one waits."""
    stdout, stderr = trained(2, folder, fault=FULL_DISK.format(full=full), code=code)
    assert stdout.count("can't write a checkpoint: ") == 1 and "step 8/8" in stdout
    assert ("lacks a checkpoint: make room" in stderr) == (code == 1)
    assert left_in(folder / "run")[2] == saved


ON_ONE = "if rank == 1:\n    "
FAULTS = {  # flags, lines that run first, what is said, exit code
    "flag": (["--colour", "red"], "", "error: unrecognized arguments: --colour red", 2),
    "prompt": (["--model", "model", "--inference_only", 1], "", "error: one process continues a prompt", 1),
    "total": (["--total_batch_size", 96], "", "is not a multiple of B*T * 2 processes = 64: try", 1),
    "file": (["--input_bin", "none.bin"], "", "error: none.bin", 1),
    "nan": (["--learning_rate", 1e18], "", "error: update 2: the loss is nan: try", 1),
    "memory": ([], f"{ON_ONE}gpt2.available_memory = lambda: 1000", "MB, 0 MB are free: try", 1),
    "fault": ([], f"{ON_ONE}processes.adamw = None", "'NoneType' object is not callable", 1),
    "flags": ([], f"{ON_ONE}sys.argv += ['--grad_clip', '2']", "processes have different flags", 1),
    "data": ([], f"{ON_ONE}sys.argv += ['--input_bin', 'val.bin']", "have different flags or", 1),
    "weights": ([], f"{ON_ONE}gpt2.LN_EPS = gpt2.GPT2.init_weights = lambda *_: 0", "weights", 1),
}


@needs_mpi
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_said_once_and_ends_all(fault, folder):
    flags, lines, said, code = FAULTS[fault]
    _, stderr = trained(2, folder, *flags, fault=lines, code=code)
    ours = [line for line in stderr.splitlines() if "rror: " in line]
    assert len(ours) == 1 and said in ours[0], stderr
    assert ("Traceback" in stderr) == (fault == "fault")
