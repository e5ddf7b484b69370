"""Several processes: mpiexec -n N python -m extras.processes.

What several processes compute is compared with the trainer by itself. A fault is put into one of
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

import numpy as np
import pytest

import train_gpt2 as gpt2

TRAINER = os.path.abspath(gpt2.__file__)
BESIDE = os.path.join(os.path.dirname(sys.executable), "mpiexec")
MPIEXEC = BESIDE if os.path.exists(BESIDE) else shutil.which("mpiexec")
pytestmark = pytest.mark.skipif(
    os.name == "nt" or not MPIEXEC or not importlib.util.find_spec("mpi4py"),
    reason="needs MPI and mpi4py, and signals: pip install mpi4py mpich, not on Windows",
)
ENVIRONMENT = os.environ | {"PYTHONPATH": os.path.dirname(TRAINER), "OPENBLAS_NUM_THREADS": "1"}
FLAGS = """--model bytes --input_bin train_0.bin train_1.bin --input_val_bin val.bin --batch_size 2
    --sequence_length 16 --total_batch_size 256 --warmup_iters 3 --num_iterations 8
    --learning_rate_decay_frac 1 --val_loss_every 4 --sample_every 0 --checkpoint_every 3
    --log_every 1 --output_dir run""".split()

# Small pieces, so that a part of the model has several. The first process opens its run before the
# others do, and it alone samples. In the end a process holds no moments but its own.
PROGRAM = """if True:
    import os, resource, signal, sys
    import train_gpt2 as gpt2
    from extras import processes
    rank = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
    processes.PIECE = 50_000
    if rank > 0:
        del gpt2.GPT2.next_logits, gpt2.Model.next_logits
    open_run, train = gpt2.open_run, gpt2.train

    def open_in_order(*args, first):
        assert first or os.path.exists("opened")
        run = open_run(*args, first=first)
        open("opened", "w").close()
        return run

    def train_and_look(run):
        complete = train(run)
        moments = run.model.flat[2:].copy()
        moments[:, run.model.own] = 0
        assert not moments.any()
        return complete

    gpt2.open_run, gpt2.train = open_in_order, train_and_look
    {fault}
    sys.exit(processes.main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with two shards of training data, one for validation, and a model."""
    rng = np.random.default_rng(0)
    for name, n in (("train_0", 1500), ("train_1", 900), ("val", 700)):
        header = struct.pack("<4i", 20240520, 1, n, 256).ljust(1024, b"\0")
        tokens = rng.integers(97, 105, n).astype("<u2")
        (tmp_path / f"{name}.bin").write_bytes(header + tokens.tobytes())
    gpt2.GPT2(gpt2.GPT2Config(16, 256, 1, 1, 4), 1, 1).save_pretrained(tmp_path / "model")
    return tmp_path


def command(n, *flags, fault=""):
    """The command with which n processes train; 0 is the trainer by itself."""
    program = PROGRAM.format(fault=fault.strip().replace("\n", "\n    "))
    several = [MPIEXEC, "-n", str(n), sys.executable, "-c", program]
    return [*(several if n else [sys.executable, TRAINER]), *FLAGS, *map(str, flags)]


def trained(n, folder, *flags, fault="", code=0):
    """What a run prints: (stdout, stderr). It must end with that exit code, and within a minute."""
    done = subprocess.run(
        command(n, *flags, fault=fault), cwd=folder, env=ENVIRONMENT, text=True,
        capture_output=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def left_in(folder):
    """What a run has left: what it measured, all numbers of its last checkpoint, the steps of its
    checkpoints, and the position in its data.
    """
    paths = gpt2.list_checkpoints(str(folder))
    tensors, metadata = gpt2.read_safetensors(paths[0], checksum=True)
    numbers = [tensor.array.ravel() for name, tensor in tensors.items() if name != "crc32"]
    entries = [json.loads(line) for line in (folder / "main.jsonl").read_text().splitlines()]
    names = ("step", "train_loss", "norm", "val_loss", "val_tokens")
    measured = [[entry.get(name, 0) for name in names] for entry in entries]
    steps = [int(path[-20:-12]) for path in paths]
    return measured, np.concatenate(numbers), steps, json.loads(metadata["state"])["position"]


def assert_same(found, expected, exactly=False):
    """Two runs have left the same: to the bit, or to what the order of a sum changes."""
    assert found[2:] == expected[2:]
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert np.array_equal(one, other) if exactly else np.allclose(one, other, 1e-3, 2e-5)


def or_slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("n", [or_slow(1), or_slow(2), 4])
def test_n_processes_equal_one(n, folder):
    """In losses, norms, validations, weights, moments, position, and in what they print."""
    flags = ["--sample_every", 4, "--max_new_tokens", 20, "--temperature", 0]
    stdout, _ = trained(0, folder, *flags, "--output_dir", "alone")
    found, stderr = trained(n, folder, *flags)
    several = left_in(folder / "run")
    assert_same(several, left_in(folder / "alone"))
    assert stderr == "" and len(several[1]) == 3 * 437_760 and np.abs(several[1]).max() > 1

    lines = [[line.split()[:2] for line in text.splitlines()] for text in (stdout, found)]
    assert [words for words in lines[1] if words != ["processes:", f"{n},"]] == lines[0]
    samples = [text.split("--- sample")[-1].split("train loss")[0] for text in (stdout, found)]
    assert samples[0] == samples[1]

    trained(n, folder, *flags, "--output_dir", "again")
    assert_same(left_in(folder / "again"), several, exactly=True)


@pytest.mark.parametrize("numbers", [(1, 2, 4), or_slow((4, 0, 2))])
def test_a_run_goes_on_with_another_number_of_processes(numbers, folder):
    """0 is the trainer by itself."""
    trained(0, folder, "--output_dir", "alone")
    for n, until in zip(numbers, (2, 5, 8), strict=True):
        stdout, _ = trained(n, folder, "--num_iterations", until, "--resume", 1)
        assert (f"resuming from run/checkpoint_{until - 3:08d}" in stdout) == (until > 2)
    measured, *others = left_in(folder / "run")
    ends = [row for row in measured if row[0] in (2, 5) and row[4]]  # the last validations of parts
    measured = [row for row in measured if row not in ends]
    assert len(ends) == 2
    assert_same((measured, *others), left_in(folder / "alone"))


def test_an_evaluation_is_shared(folder):
    """44 passages, which are no multiple of 6 rows. The last passage is a short one."""
    flags = ["--num_iterations", 0, "--model", "model", "--batch_size", 3]
    printed = [trained(n, folder, *flags, "--output_dir", f"run{n}")[0] for n in (0, 2)]
    losses = [text[text.index("val loss ") :] for text in printed]
    assert losses[0] == losses[1] and "perplexity" in losses[0]


AT_UPDATE_6 = """
update = gpt2.update

def update_with_a_signal(run):
    if run.step == 5 and rank == {rank}:
        os.kill(os.getpid(), signal.{name})
    update(run)

gpt2.update = update_with_a_signal
"""


@pytest.mark.parametrize(
    "name, rank, code, saved",
    [("SIGTERM", 1, 143, [6, 3]), or_slow("SIGINT", 0, 130, [6, 3]), ("SIGKILL", 1, 9, [3])],
)
def test_a_signal_to_one_process(name, rank, code, saved, folder):
    """All finish the update, or all end at once. The run then goes on to the same bits."""
    trained(2, folder, "--output_dir", "whole")
    stdout, _ = trained(2, folder, fault=AT_UPDATE_6.format(rank=rank, name=name), code=code)
    steps = [int(path[-20:-12]) for path in gpt2.list_checkpoints(str(folder / "run"))]
    assert steps == saved and ("stopped: 6 updates" in stdout) == (name != "SIGKILL")
    trained(2, folder, "--resume", 1)
    assert_same(left_in(folder / "run"), left_in(folder / "whole"), exactly=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_all(name, folder):
    """Ctrl-C goes to mpiexec and to all that it has started, SIGTERM to mpiexec alone."""
    run = subprocess.Popen(
        command(2, "--num_iterations", 10**6), cwd=folder, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not run.stdout.readline().startswith("step 2/"):
        assert run.poll() is None
    send = os.killpg if name == "SIGINT" else os.kill
    send(run.pid, getattr(signal, name))
    stdout, _ = run.communicate(timeout=20)
    step = left_in(folder / "run")[2][0]
    assert f"stopped: {step} updates" in stdout and f"step {step + 1}/" not in stdout


FULL_DISK = """
save_checkpoint = gpt2.save_checkpoint

def save(run):
    if rank == 0 and run.step >= 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, resource.RLIM_INFINITY))
    save_checkpoint(run)

gpt2.save_checkpoint = save
"""


def test_a_disk_that_is_full_amid_the_moments(folder):
    """The first process does not get to the end of a checkpoint. The other one goes on with it."""
    stdout, stderr = trained(2, folder, fault=FULL_DISK, code=1)
    assert stdout.count("can't write a checkpoint: ") == 1 and "step 8/8" in stdout
    assert "error: run lacks a checkpoint: make room" in stderr
    assert left_in(folder / "run")[2] == [3]


ON_ONE = "if rank == 1:\n    "
FAULTS = {  # flags, lines that run first, what is said, exit code
    "flag": (["--colour", "red"], "", "error: unrecognized arguments: --colour red", 2),
    "prompt": (["--inference_only", 1], "", "error: --inference_only 1 writes nothing", 2),
    "total": (["--total_batch_size", 96], "", "of B*T * 2 processes = 64: try 64", 1),
    "folder": (["--output_dir", "model"], "", "model holds a run: go on with --resume 1", 1),
    "nan": (["--learning_rate", 1e12], "", "error: update 2: the loss is nan: try", 1),
    "memory": ([], f"{ON_ONE}gpt2.available_memory = lambda: 1000", "MB, 0 MB are free: try", 1),
    "fault": ([], f"{ON_ONE}processes.adamw = None", "'NoneType' object is not callable", 1),
    "data": ([], f"{ON_ONE}sys.argv += ['--input_bin', 'val.bin']", "different flags or data", 1),
    "weights": ([], f"{ON_ONE}gpt2.GPT2.init_weights = print", "different weights", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_said_once_and_ends_all(fault, folder):
    flags, lines, said, code = FAULTS[fault]
    _, stderr = trained(2, folder, *flags, fault=lines, code=code)
    ours = [line for line in stderr.splitlines() if "rror: " in line]
    assert len(ours) == 1 and said in ours[0], stderr
    assert ("Traceback" in stderr) == (fault == "fault")


@pytest.mark.parametrize(
    "lines, said",
    [
        ("import train_gpt2 as program", "mpiexec -n N python -m extras.processes FLAGS"),
        ("sys.modules['mpi4py'] = None; from extras import processes as program", "pip install"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(lines, said, folder):
    """The trainer itself is started under mpiexec, or there is no mpi4py."""
    program = f"import sys; {lines}; sys.exit(program.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *FLAGS], cwd=folder, env=ENVIRONMENT | {"PMI_SIZE": "2"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and said in done.stderr
