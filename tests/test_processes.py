"""Several processes: mpiexec -n N python -m extras.processes.

What several processes compute is compared with the trainer by itself. A fault is put into one of
them by a few lines that run before main(): they know the number `rank` of their process.
"""

import importlib.util
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from common import TRAINER, run_trainer, token_file

import train_gpt2 as gpt2

BESIDE = os.path.join(os.path.dirname(sys.executable), "mpiexec")
MPIEXEC = BESIDE if os.path.exists(BESIDE) else shutil.which("mpiexec")
pytestmark = pytest.mark.skipif(
    os.name == "nt" or not MPIEXEC or not importlib.util.find_spec("mpi4py"),
    reason="needs MPI and mpi4py, and signals: pip install mpi4py mpich, not on Windows",
)
FLAGS = """--model bytes --input_bin train_0.bin train_1.bin --input_val_bin val.bin --batch_size 2
    --sequence_length 16 --total_batch_size 256 --warmup_iters 3 --num_iterations 8
    --learning_rate_decay_frac 1 --val_loss_every 4 --sample_every 0 --checkpoint_every 3
    --log_every 1 --output_dir run""".split()

# Small pieces, so that a part of the model has several. The first process opens its run before the
# others do, and it alone samples. In the end a process holds no moments but its own.
PROGRAM = """if True:
    import os, signal, sys
    import train_gpt2 as gpt2
    from extras import processes
    rank = processes.RANK
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
        token_file(tmp_path / f"{name}.bin", rng.integers(97, 105, n), 256)
    gpt2.GPT2(gpt2.GPT2Config(16, 256, 1, 1, 4), 1, 1).save_pretrained(tmp_path / "model")
    return tmp_path


def trained(n, folder, *flags, fault="", code=0):
    """What a run of n processes prints, 0 being the trainer by itself: (stdout, stderr). It must
    end with that exit code, and within two minutes.
    """
    program, under = [TRAINER], []
    if n:
        program = ["-c", PROGRAM.format(fault=fault.strip().replace("\n", "\n    "))]
        under = [MPIEXEC, "-n", n]
    flags, one_thread = (*FLAGS, *flags), {"OPENBLAS_NUM_THREADS": "1"}
    result = run_trainer(*flags, cwd=folder, env=one_thread, program=program, under=under)
    assert result[0] == code, result
    return result[1:]


def left_in(folder):
    """What a run has left: what it measured, all numbers of its last checkpoint, the steps of its
    checkpoints, and the position in its data.
    """
    paths = gpt2.list_checkpoints(str(folder))
    tensors, metadata = gpt2.read_safetensors(paths[0], checksum=True)
    numbers = [tensor.ravel() for name, tensor in tensors.items() if name != "crc32"]
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


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_n_processes_equal_one(n, folder):
    """In losses, norms, validations, weights, moments, position, and in what they print. The
    parameters can't be cut into 7 equal parts.
    """
    flags = ["--sample_every", 4, "--max_new_tokens", 20, "--temperature", 0]
    flags += ["--total_batch_size", 224, "--val_max_steps", 5]  # batches of one process
    stdout, _ = trained(0, folder, *flags, "--output_dir", "alone")
    found, stderr = trained(n, folder, *flags)
    several = left_in(folder / "run")
    assert_same(several, left_in(folder / "alone"))
    assert stderr == "" and len(several[1]) == 3 * 437_760 and np.abs(several[1]).max() > 1

    found = found.replace(found[found.index("processes: ") : found.index("val loss")], "")
    found = found.replace("SharedGPT2", "GPT2")
    lines = [[line.split()[:2] for line in text.splitlines()] for text in (stdout, found)]
    samples = [text.split("--- sample")[-1].split("best val loss")[0] for text in (stdout, found)]
    assert lines[0] == lines[1] and samples[0] == samples[1]

    trained(n, folder, *flags, "--output_dir", "again")
    assert_same(left_in(folder / "again"), several, exactly=True)


def test_a_run_goes_on_with_another_number_of_processes(folder):
    """Of which one is the trainer by itself."""
    trained(0, folder, "--output_dir", "alone")
    for n, until in ((2, 2), (0, 5), (4, 8)):
        stdout, _ = trained(n, folder, "--num_iterations", until, "--resume", 1)
        assert (f"resuming from run/checkpoint_{until - 3:08d}" in stdout) == (until > 2)
    measured, *others = left_in(folder / "run")
    ends = [row for row in measured if row[0] in (2, 5) and row[4]]  # the last validations of parts
    measured = [row for row in measured if row not in ends]
    assert len(ends) == 2
    assert_same((measured, *others), left_in(folder / "alone"))


AT_UPDATE_6 = """
update = gpt2.update

def update_with_a_signal(run):
    if run.step == 5 and rank in {ranks}:
        os.kill(os.getpid(), signal.{name})
    update(run)

gpt2.update = update_with_a_signal
"""


@pytest.mark.parametrize(
    "name, ranks, code, saved",
    [("SIGTERM", [1], 143, [6, 3]), ("SIGINT", [0, 1], 130, [6, 3]), ("SIGKILL", [1], 9, [3])],
)
def test_a_signal_to_some_processes(name, ranks, code, saved, folder):
    """All finish the update, or all end at once. The run then goes on to the same bits."""
    trained(2, folder, "--output_dir", "whole")
    stdout, _ = trained(2, folder, fault=AT_UPDATE_6.format(ranks=ranks, name=name), code=code)
    assert left_in(folder / "run")[2] == saved
    assert ("stopped: 6 updates" in stdout) == (name != "SIGKILL")
    trained(2, folder, "--resume", 1)
    assert_same(left_in(folder / "run"), left_in(folder / "whole"), exactly=True)


ON_ONE = "if rank == 1:\n    "
FAULTS = {  # flags, lines that run first, what is said, exit code
    "flag": ("--colour red", "", "error: unrecognized arguments: --colour red", 2),
    "no run": ("--num_iterations 0 --checkpoint_every 0 --output_dir=", "", "one process eval", 1),
    "total": ("--total_batch_size 96", "", "B*T of all processes, 64: try 64", 1),
    "folder": ("--output_dir model", "", "model holds a run: go on with", 1),
    "nan": ("--learning_rate 1e12", "", "error: update 2: the loss is nan: try", 1),
    "memory": ("", f"{ON_ONE}gpt2.available_memory = lambda: 1000", "MB, 0 MB are free: try", 1),
    "fault": ("", f"{ON_ONE}gpt2.adamw = None", "'NoneType' object is not callable", 1),
    "data": ("", f"{ON_ONE}sys.argv += ['--input_bin', 'val.bin']", "differ in flags, data", 1),
    "weights": ("", f"{ON_ONE}gpt2.GPT2.init_weights = print", "or weights: give all", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_said_once_and_ends_all(fault, folder):
    flags, lines, said, code = FAULTS[fault]
    _, stderr = trained(2, folder, *flags.split(), fault=lines, code=code)
    ours = [line for line in stderr.splitlines() if "rror: " in line]
    assert len(ours) == 1 and said in ours[0], stderr
    assert ("Traceback" in stderr) == (fault == "fault")


NO_MPI4PY = "import sys; sys.modules['mpi4py'] = None; import extras.processes"
STARTS = [([TRAINER], "mpiexec -n N python -m extras"), (["-c", NO_MPI4PY], "pip install")]


@pytest.mark.parametrize("program, said", STARTS)
def test_a_wrong_start_is_one_line(program, said, tmp_path):
    """The trainer itself is started under mpiexec, or there is no mpi4py."""
    code, _, stderr = run_trainer(cwd=tmp_path, env={"PMI_SIZE": "2"}, program=program)
    assert code == 1 and re.fullmatch(rf"error: .*{said}.*\n", stderr)
