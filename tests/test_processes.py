"""
Several processes: mpiexec -n N python train_gpt2.py

These tests need an MPI and mpi4py: pip install mpi4py mpich. The processes talk over TCP on this
machine, as they would between machines.
"""

import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from common import (
    FINISHED,
    NO_NETWORK,
    TRAINER,
    VOCABULARY_FOLDER,
    as_hugging_face,
    checkpoints,
    events,
    file_model,
    loaded,
    need_gpt2_vocabulary,
    read_plainly,
    state_of,
    step_of,
    tensor_bytes,
    write_token_file,
)

import train_gpt2 as gpt2
from extras import hellaswag, llmc, processes
from test_gpt2 import assert_same_bits, random_model, random_tokens, relative_error

MPIEXEC = os.path.join(os.path.dirname(sys.executable), "mpiexec")
if not os.path.exists(MPIEXEC):
    MPIEXEC = shutil.which("mpiexec")
HAS_MPI = bool(MPIEXEC) and importlib.util.find_spec("mpi4py") is not None
needs_mpi = pytest.mark.skipif(
    not HAS_MPI or os.name == "nt", reason="needs MPI: pip install mpi4py mpich"
)
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs /proc")

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


def trainer_changed(text):
    """A program that changes the trainer, the module g, in some lines, and then runs it.

    The lines know the number `rank` of their process.
    """
    return f"""if True:
    import os, sys, time
    sys.path.insert(0, {os.path.dirname(TRAINER)!r})
    import train_gpt2 as g
    from extras import processes
    rank = int(os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
{text.rstrip()}
    sys.exit(g.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text of bytes for training and validation."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 20_000), ("val", 4_000)):
        write_token_file(folder / "data" / f"{name}.bin", rng.integers(97, 105, n))
    return folder


FLAGS = (
    "--model", "bytes", "--input_bin", "data/train.bin",
    "--input_val_bin", "data/val.bin", "--batch_size", 1, "--sequence_length", 32,
    "--total_batch_size", 192, "--warmup_iters", 3, "--val_loss_every", 5, "--val_max_steps", 5,
    "--sample_every", 0, "--log_every", 1,
)  # fmt: skip
RUN = (TRAINER, *FLAGS)


def train_losses(stdout):
    """{update: loss} of what a run printed."""
    found = re.findall(r"(?m)^step (\d+)/\d+: train loss (\S+)", stdout)
    return {int(step): float(loss) for step, loss in found}


def val_losses(stdout):
    return [float(loss) for loss in re.findall(r"(?m)^val loss (\S+)$", stdout)]


# --------------------------------------------------------------------------------------------------
# The arithmetic

TOGETHER = """
import sys
sys.path[:0] = {paths!r}
from test_processes import *
processes.PIECE = 1000  # many pieces, the last of which is short
world = processes.join()
dtype, V = np.dtype({dtype!r}), {V}
model, batches, loader = model_and_batches(dtype, V, world.size, world.rank)
shared = world.share_model(model)
found = ten_updates(lambda *rest: gpt2.train_step(shared, loader, 1, *rest))
rows = [model.flat[0]]
for row in model.flat[2:]:
    rows.append(np.concatenate(list(world.pieces(row))))  # the test looks at all of m and v
if world.rank == 0:
    np.savez({path!r}, losses=found, flat=rows)
world.comm.Barrier()
"""


def model_and_batches(dtype, V, n, rank=0):
    """A model, ten updates' batches for n processes, and a loader of those of one process."""
    model = random_model(2, 8, dtype, V=V, C=25, NH=5)
    batches = random_tokens(10, n, B=2, T=8, V=V)
    of_rank = iter(batches[:, rank])
    return model, batches, SimpleNamespace(next_batch=lambda: next(of_rank))


def ten_updates(step):
    """(loss, norm) of ten updates with a schedule, weight decay and clipping."""
    found = []
    for i in range(10):
        found.append(step(gpt2.learning_rate_at(i, 10, 1e-3, 3, 0.1), 0.1, 0.5))
    return np.array(found)


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
    covered = np.zeros(length, int)
    for rank in range(n):
        world = SimpleNamespace(rank=rank, size=n)
        part = processes.Processes.part(world, length)
        assert part == processes.Processes.part(SimpleNamespace(rank=0, size=n), length, rank)
        covered[part] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("shuffle_seed", [None, 7])
def test_processes_see_the_batches_of_one(shuffle_seed):
    """Two shards, three processes, through several epochs: the same batches, the same positions."""
    tokens = np.random.default_rng(3).integers(0, 50, 400).astype(np.uint16)

    def loader():
        return gpt2.DataLoader([tokens[:240], tokens[240:]], 2, 8, shuffle_seed)

    one = loader()
    several = []
    for rank in range(3):
        several.append(processes.SharedLoader(SimpleNamespace(rank=rank, size=3), loader()))
    for round_number in range(30):
        for other in several:
            inputs, targets = one.next_batch()
            same = other.next_batch()
            assert (inputs == same[0]).all() and (targets == same[1]).all()
        assert {tuple(other.position) for other in several} == {tuple(one.position)}
        if round_number == 20:
            for other in [one, *several]:
                other.seek([1, 16, 3])


@pytest.mark.parametrize("shuffle_seed", [None, 7])
def test_a_position_means_the_same_for_every_number_of_processes(shuffle_seed):
    """Where three processes have stopped, two go on: with the batches that come next."""
    tokens = np.random.default_rng(3).integers(0, 50, 400).astype(np.uint16)
    one = gpt2.DataLoader([tokens], 2, 8, shuffle_seed)
    in_order = [one.next_batch() for _ in range(60)]
    position = [0, 0, 0]
    seen = 0
    for size in (3, 2, 1, 5):
        loaders = []
        for rank in range(size):
            world = SimpleNamespace(rank=rank, size=size)
            loaders.append(
                processes.SharedLoader(world, gpt2.DataLoader([tokens], 2, 8, shuffle_seed))
            )
            loaders[-1].seek(position)
        for _ in range(3):
            for loader in loaders:
                inputs, targets = loader.next_batch()
                assert (inputs == in_order[seen][0]).all()
                assert (targets == in_order[seen][1]).all()
                seen += 1
        position = list(loaders[0].position)


LOSSES = """
import sys
sys.path[:0] = {paths!r}
from test_processes import *
world = processes.join()
model = random_model(1, 8, np.float64)
seen = []
alone = model.token_losses
model.token_losses = lambda context, mine: seen.append(len(mine)) or alone(context, mine)
shared = world.share_model(model)
found = shared.token_losses(*context_and_continuations({k}))
seen = world.comm.gather(sum(seen))
if world.rank == 0:
    np.savez({path!r}, seen, *found)
"""


def context_and_continuations(k):
    rng = np.random.default_rng(1)
    return [5, 4], [rng.integers(0, 53, 1 + i % 3).tolist() for i in range(k)]


@needs_mpi
@pytest.mark.parametrize("n, k, shares", [(2, 4, [2, 2]), (3, 4, [2, 1, 1]), (3, 2, [1, 1, 0])])
def test_the_losses_of_texts_are_shared_out(n, k, shares, folder):
    """Each process computes some of the continuations, and all know the losses of all."""
    here = str(Path(__file__).parent)
    path = str(folder / f"losses-{n}-{k}.npz")
    program = LOSSES.format(paths=[str(Path(here).parent), here], k=k, path=path)
    result = run_all(n, "-c", program, folder=folder)
    assert result.returncode == 0, result.stderr
    expected = random_model(1, 8, np.float64).token_losses(*context_and_continuations(k))
    with np.load(path) as found:
        assert found["arr_0"].tolist() == shares
        assert len(found.files) == 1 + k
        for i, losses in enumerate(expected):
            assert relative_error(found[f"arr_{i + 1}"], losses) < 1e-12


def test_the_plan_counts_a_share_of_the_moments():
    config = gpt2.GPT2Config()
    args = gpt2.settings({})
    one, four = gpt2.memory_plan(args, config), gpt2.memory_plan(args, config, 4)
    assert four["moments"] == one["moments"] // 4
    assert {**one, "moments": 0} == {**four, "moments": 0}


# --------------------------------------------------------------------------------------------------
# Whole runs


@needs_mpi
def test_a_run_on_one_goes_on_with_three_and_with_two(folder):
    """Its losses and weights are those of a run on one process; its files open as such a run's."""
    run = [*RUN, "--learning_rate_decay_frac", 1]  # a schedule that does not depend on the end
    whole = run_all(1, *run, "--num_iterations", 12, "--output_dir", "whole", folder=folder)
    assert whole.returncode == 0, whole.stderr
    expected = train_losses(whole.stdout)

    found = {}
    for n, until in ((1, 4), (3, 8), (2, 12)):
        flags = [*run, "--output_dir", "parts", "--resume", 1, "--num_iterations", until]
        result = run_all(n, *flags, folder=folder)
        assert result.returncode == 0, result.stderr
        found |= train_losses(result.stdout)
    assert sorted(found) == list(range(1, 13))
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5

    newest = [checkpoints(folder / name)[-1] for name in ("whole", "parts")]
    whole_tensors, parts_tensors = (read_plainly(path.read_bytes()) for path in newest)
    assert whole_tensors.keys() == parts_tensors.keys() >= {"m", "v", "transformer.wte.weight"}
    for name in whole_tensors.keys() - {"crc32"}:
        assert relative_error(parts_tensors[name], whole_tensors[name]) < 1e-3, name
    whole_state, parts_state = map(state_of, newest)
    for name in ("step", "position", "data"):
        assert whole_state[name] == parts_state[name]
    assert loaded(folder / "parts").config == loaded(folder / "whole").config


@needs_mpi
def test_a_checkpoint_has_the_same_bits_on_every_number_of_processes(folder, tmp_path):
    """Read and written again by three, two and one: m, v, weights, position. And the other way."""
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")
    flags = [*RUN, "--output_dir", "run", "--num_iterations", 4]
    first = run_all(1, *flags, folder=place)
    assert first.returncode == 0, first.stderr
    [path] = checkpoints(place / "run")
    expected = tensor_bytes(path)
    position = state_of(path)["position"]
    assert len(expected["m"]) == len(expected["v"]) == 4 * 437_760
    for part in np.array_split(np.frombuffer(expected["m"], "<f4"), 3):
        assert np.count_nonzero(part) > 0.9 * len(part)  # zeros would be equal for nothing

    for top_k, n in enumerate((3, 2, 1, 3, 1), 1):  # another value, so that it is saved anew
        path.rename(place / "run" / "before")
        path.write_bytes((place / "run" / "before").read_bytes())
        result = run_all(n, *flags, "--top_k", top_k, "--resume", 1, folder=place)
        assert result.returncode == 0, result.stderr
        assert checkpoints(place / "run") == [path]
        assert state_of(path)["settings"]["top_k"] == top_k  # it has been written
        found = tensor_bytes(path)
        assert found.keys() == expected.keys() and state_of(path)["position"] == position
        for name in expected.keys() - {"crc32"}:
            assert found[name] == expected[name], (n, name)


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_what_is_printed_is_that_of_one_process(n, folder):
    """Losses to 1e-5, and each line once. The validation takes 5 batches of each process."""
    flags = [*RUN, "--num_iterations", 6]
    one = run_all(1, *flags, "--val_max_steps", 5 * n, folder=folder)
    several = run_all(n, *flags, folder=folder)
    assert several.returncode == 0 and not several.stderr, several.stderr
    for losses in (train_losses, val_losses):
        expected, found = losses(one.stdout), losses(several.stdout)
        assert len(found) == len(expected) >= 3
        if losses is train_losses:
            assert found.keys() == expected.keys()
            expected, found = expected.values(), found.values()
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5

    lines = several.stdout.splitlines()
    assert [line for line in lines if f"memory in each of {n} processes" in line] == lines[1:2]
    assert len(lines) == len(one.stdout.splitlines())
    help_text = run_all(n, TRAINER, "--help", folder=folder)
    assert help_text.returncode == 0 and help_text.stdout.count("--total_batch_size X") == 1


@needs_mpi
def test_a_sample_is_printed_once(folder):
    flags = [*RUN, "--num_iterations", 2, "--sample_every", 2, "--max_new_tokens", 30]
    outputs = []
    for n in (1, 3):
        result = run_all(n, *flags, "--prompt", "abc", "--temperature", 0, folder=folder)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout.partition("--- sample\n")[2].rpartition("\ntrain loss ")[0])
    assert outputs[0] == outputs[1] and outputs[0].startswith("abc") and len(outputs[0]) > 20


@needs_mpi
def test_what_is_missing_is_made_once(tmp_path):
    """Three processes find a text and no tokens, and questions and no tokens of them."""
    need_gpt2_vocabulary()
    place = tmp_path / "work"
    (place / "data").mkdir(parents=True)
    letters = np.random.default_rng(1).choice(list("abcdefgh \n"), 300_000)
    (place / "data" / "tiny_shakespeare.txt").write_text("".join(letters))
    question = {"ctx": "A dog", "endings": ["runs", "sees a cat", "is", "up"], "label": 1}
    text = json.dumps(question) + "\n"
    (place / "data" / "hellaswag_val.jsonl").write_text(text * 50)
    file_model(V=50257, C=6, max_seq_len=64).save_pretrained(place / "model")

    flags = ["--model", "model", "--num_iterations", 1, "--sequence_length", 16]
    flags += ["--val_max_steps", 1, "--hellaswag_eval", 1, "--output_dir", "run"]
    env = {"TIKTOKEN_CACHE_DIR": VOCABULARY_FOLDER, **NO_NETWORK}
    slowly = trainer_changed("""
    os.fsync = lambda handle: time.sleep(0.5)
    """)
    result = run_all(3, "-c", slowly, *flags, folder=place, env=env)
    assert result.returncode == 0, result.stderr
    assert re.search(r"hellaswag \d+/50 ", result.stdout)
    names = ["hellaswag_val.bin", "hellaswag_val.jsonl", "tiny_shakespeare.txt"]
    names += ["tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"]
    assert sorted(os.listdir(place / "data")) == names
    assert len(gpt2.TokenFile(str(place / "data" / names[-1]))) == 32768


@needs_mpi
def test_main_log_is_written_once(folder, tmp_path):
    """The lines of one process, in order, also after going on."""
    expected = {}
    for n in (1, 3):
        out = tmp_path / f"run{n}"
        flags = [*RUN, "--output_dir", out, "--checkpoint_every", 4, "--val_max_steps", 15 // n]
        for until in (6, 8):
            more = ["--num_iterations", until, "--resume", 1]
            result = run_all(n, *flags, *more, folder=folder)
            assert result.returncode == 0, result.stderr
        lines = (out / "main.log").read_text().splitlines()
        expected[n] = [line.rpartition(":")[0] for line in lines]
        names = {".lock", "main.log", "main.jsonl", "best", *FINISHED}
        names |= {path.name for path in checkpoints(out)}
        assert {path.name for path in out.iterdir()} == names
    steps = [f"s:{step} trl" for step in range(1, 9)]
    assert [line for line in expected[3] if "trl" in line] == steps
    assert expected[3] == expected[1]


@needs_mpi
def test_cores_are_shared_out_unless_the_user_did(folder):
    program = (
        f"import sys; sys.path.insert(0, {os.path.dirname(TRAINER)!r}); import train_gpt2 as g; "
        "w = g.join_processes(); g.share_cores(w.local_size); n = w.comm.gather(g.THREADS); "
        "w.rank or print(n, file=sys.__stdout__)"
    )
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    unset = {"OPENBLAS_NUM_THREADS": "", "OMP_NUM_THREADS": "", "MPIR_CVAR_NOLOCAL": "0"}
    result = run_all(2, "-c", program, folder=folder, env=unset)
    assert result.stdout.strip() == f"[{cores}, {cores}]", result
    result = run_all(2, "-c", program, folder=folder, env={"OPENBLAS_NUM_THREADS": "5"})
    assert result.stdout.strip() == "[5, 5]"


def write_examples(path, n):
    """n questions of HellaSwag's kind, in bytes."""
    rng = np.random.default_rng(2)
    examples = []
    for _ in range(n):
        endings = [rng.integers(97, 105, rng.integers(1, 9)).tolist() for _ in range(4)]
        context = rng.integers(97, 105, 12).tolist()
        examples.append(hellaswag.Example(context, endings, int(rng.integers(4))))
    hellaswag.write(str(path), examples)


@needs_mpi
def test_hellaswag_is_scored_once_and_together(folder, tmp_path):
    """The score of one process, to which each has contributed its share."""
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")
    write_examples(place / "data" / "hellaswag_val.bin", 40)
    program = trainer_changed("""
    before = g.GPT2.token_losses
    count = 0
    def counted(self, context, continuations):
        global count
        count += len(continuations)
        return before(self, context, continuations)
    g.GPT2.token_losses = counted
    import atexit
    atexit.register(lambda: sys.stderr.write(f"rank {rank}: {count} endings\\n"))
    """)
    flags = [*FLAGS, "--num_iterations", 5, "--val_loss_every", 5, "--hellaswag_eval", 1]
    scores = []
    shares = {1: [320], 2: [160, 160], 3: [160, 80, 80]}
    for n in (1, 2, 3):
        env = {"PMI_RANK": "0"} if n == 1 else {}
        result = run_all(n, "-c", program, *flags, "--output_dir", f"run{n}", folder=place, env=env)
        assert result.returncode == 0, result.stderr
        scores.append(re.findall(r"(?m)^hellaswag .*$", result.stdout))
        assert len(scores[-1]) == 2
        found = re.findall(r"rank (\d): (\d+) endings", result.stderr)
        assert [int(count) for _, count in sorted(found)] == shares[n]
        log = (place / f"run{n}" / "main.log").read_text()
        assert log.count(" eval:") == 2
    assert scores[0] == scores[1] == scores[2]


SEEN_AT_THE_END = """
import atexit, os, sys
@atexit.register
def tell():
    main = sys.modules["__main__"]
    copies = [name for name, module in sys.modules.items() if hasattr(module, "train_step")]
    late = [f"extras.{name}" in sys.modules for name in ("processes", "hellaswag", "llmc")]
    told = ["modules:", os.path.basename(getattr(main, "__file__", "")), copies, *late]
    sys.stderr.write(" ".join(map(str, told)) + "\\n")  # at one go: two processes write at once
"""


@needs_mpi
@pytest.mark.parametrize(
    "flags, hellaswag_too, llmc_too",
    [
        ([], False, False),
        (["--hellaswag_eval", 1], True, True),
        (["--model", "model.bin"], False, True),
    ],
    ids=["plain", "hellaswag", "bin"],
)
def test_there_is_one_copy_of_the_trainer(flags, hellaswag_too, llmc_too, folder, tmp_path):
    """It is __main__ and nothing else, whatever it has imported late."""
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")
    write_examples(place / "data" / "hellaswag_val.bin", 3)
    model = file_model(V=256, max_seq_len=64)
    config = gpt2.asdict(model.config)
    llmc.write_model(str(place / "model.bin"), config, model.params)
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(SEEN_AT_THE_END)

    env = {"PYTHONPATH": str(place / "site")}
    run = [*RUN, "--num_iterations", 1, "--output_dir", "run"]
    for resume in (0, 1):
        more = ["--resume", resume]
        result = run_all(2, *run, *flags, *more, folder=place, env=env)
        assert result.returncode == 0, result.stderr
        told = [line for line in result.stderr.splitlines() if line.startswith("modules:")]
        expected = f"modules: train_gpt2.py ['__main__'] True {hellaswag_too} "
        assert len(told) == 2 and all(line.startswith(expected) for line in told), told
        if resume == 0:
            assert all(line.endswith(f" {llmc_too}") for line in told), told


# --------------------------------------------------------------------------------------------------
# Faults


def ended(result, *parts, code=1):
    """One line of ours says all of these, and the run has failed."""
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, result.stderr
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    assert "Traceback" not in result.stderr


@needs_mpi
def test_another_flag_on_one_process(folder):
    program = trainer_changed("""
    sys.argv += ["--seed", str(rank)]
    """)
    result = run_all(2, "-c", program, *FLAGS, folder=folder)
    ended(result, "process 1 has other flags than process 0")


@needs_mpi
def test_other_code_on_one_process(folder, tmp_path):
    """Another version of the trainer on one of the machines, which differs in a blank."""
    for name in ("zero", "one"):
        (tmp_path / name).mkdir()
        shutil.copytree(Path(TRAINER).parent / "extras", tmp_path / name / "extras")
        text = Path(TRAINER).read_text() + ("# \n" if name == "one" else "")
        (tmp_path / name / "train_gpt2.py").write_text(text)
    program = (
        "import os, runpy, sys; rank = os.environ.get('PMI_RANK') or "
        "os.environ['OMPI_COMM_WORLD_RANK']; "
        f"sys.path.insert(0, {str(tmp_path)!r} + ('/one' if rank == '1' else '/zero')); "
        "import train_gpt2; sys.exit(train_gpt2.main())"
    )
    result = run_all(2, "-c", program, *FLAGS, folder=folder)
    ended(result, "process 1 has other code than process 0")


@needs_mpi
@pytest.mark.parametrize("what", ["train", "val"])
def test_other_data_on_one_process(what, folder):
    """Of the same size, so that only its checksum differs."""
    program = trainer_changed(f"""
    class Turned(g.TokenFile):
        def __getitem__(self, piece):
            tokens = super().__getitem__(piece)
            return tokens[::-1] if rank == 1 and {what!r} in self.path else tokens
    g.TokenFile = Turned
    """)
    result = run_all(2, "-c", program, *FLAGS, folder=folder)
    ended(result, "process 1 has other data than process 0")


@needs_mpi
def test_other_weights_on_one_process(folder):
    program = trainer_changed("""
    before = g.init_weights
    g.init_weights = lambda params, seed: before(params, seed + rank)
    """)
    result = run_all(2, "-c", program, *FLAGS, folder=folder)
    ended(result, "process 1 has other weights than process 0")


NOT_FINITE = """
    before = g.gelu_forward
    def gelu(out, inp):
        before(out, inp)
        out[0, 0, 0] = g.math.nan
    if rank == {victim}:
        g.gelu_forward = gelu
"""


@needs_mpi
@pytest.mark.parametrize("victim", [0, 1])
def test_a_nan_on_one_process_ends_all(victim, folder):
    """In one line, which names the place, on whichever process that was."""
    program = trainer_changed(NOT_FINITE.format(victim=victim))
    began = time.monotonic()
    result = run_all(2, "-c", program, *FLAGS, "--val_loss_every", 0, folder=folder)
    ended(result, "update 1: the loss is nan; it began in", "of layer 0")
    assert time.monotonic() - began < 20


@needs_mpi
def test_a_nan_in_the_validation_ends_all(folder):
    program = trainer_changed(NOT_FINITE.format(victim=1))
    result = run_all(2, "-c", program, *FLAGS, folder=folder)
    ended(result, "the validation loss is nan; it began in", "of layer 0")


@needs_mpi
def test_an_error_of_all_is_said_once(folder):
    result = run_all(3, *RUN, "--input_bin", "data/none.bin", folder=folder)
    ended(result, "data/none.bin: no such token file")
    result = run_all(3, *RUN, "--total_batch_size", 100, folder=folder)
    ended(result, "--total_batch_size 100 is not a multiple of B*T * 3 processes = 96: try 96")
    result = run_all(3, *RUN, "--colour", "red", folder=folder)
    ended(result, "--colour", code=2)


@needs_mpi
@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_of_one_ends_all(victim, folder):
    """Its disk has no such file, or it has too little memory; the others would wait for ever."""
    program = trainer_changed(f"""
    if rank == {victim}:
        g.available_memory = lambda: 1000
    """)
    began = time.monotonic()
    result = run_all(2, "-c", program, *FLAGS, folder=folder)
    ended(result, "needs", ", 0 MB are free")
    assert time.monotonic() - began < 20


@needs_mpi
@pytest.mark.parametrize("victim", [0, 1])
def test_a_fault_of_ours_on_one_process_ends_all(victim, folder):
    """With its traceback, once."""
    program = trainer_changed(f"""
    def broken(*args):
        raise KeyError("a fault")
    if rank == {victim}:
        g.adamw = broken
    """)
    began = time.monotonic()
    result = run_all(2, "-c", program, *FLAGS, folder=folder)
    assert result.returncode == 1 and result.stderr.count("KeyError: 'a fault'") == 1
    assert time.monotonic() - began < 20


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
    assert "mpiexec needs mpi4py" in result.stderr and "pip install mpi4py" in result.stderr


@needs_mpi
def test_several_processes_without_the_file_for_them(folder, tmp_path):
    """The trainer was copied alone: it says what is missing, and works on one process."""
    shutil.copy(TRAINER, tmp_path / "train_gpt2.py")
    run = [tmp_path / "train_gpt2.py", *FLAGS, "--num_iterations", 1]
    result = run_all(2, *run, folder=folder)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "extras is needed here, and does not lie beside" in result.stderr
    assert run_all(1, *run, folder=folder).returncode == 0


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
        start_new_session=True,
    )  # fmt: skip
    lines = []
    end = threading.Timer(20, process.kill)  # mpiexec's end is that of all its processes
    for line in process.stdout:
        lines.append(line)
        if len(lines) == moment:
            ranks = {rank_of(environment): pid for pid, environment in processes_in(folder)}
            end.start()
            send(process, ranks)
    process.wait()
    in_time = end.is_alive()
    end.cancel()
    assert end.ident, f"it ended before line {moment}"
    assert in_time, "it went on for 20 s"
    time.sleep(0.2)
    assert not processes_in(folder)
    return process.returncode, "".join(lines)


@needs_mpi
@needs_proc
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_the_run_goes_on(victim, folder, uninterrupted_run, tmp_path):
    """At random moments, five for each rank; fifty with LONG_TESTS=1. The same bits."""
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
        for name in ("model.safetensors", "main.log"):
            left = (place / f"run{i}" / name).read_bytes()
            assert left == (folder / "uninterrupted" / name).read_bytes()
        names = [path.name for path in checkpoints(place / f"run{i}")]
        assert names == [path.name for path in checkpoints(folder / "uninterrupted")]
        for name in names:
            found, expected = (
                tensor_bytes(path / name) for path in (place / f"run{i}", folder / "uninterrupted")
            )
            assert found["m"] == expected["m"] and found["v"] == expected["v"]


def forwards_signals():
    """Whether this mpiexec passes Ctrl-C and SIGTERM on. Open MPI's kills after half a second."""
    text = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True).stdout
    return "HYDRA" in text.upper()


STOPS = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGUSR1] if os.name == "posix" else [])


def stopped_together(place, n, send, *more):
    """Stop a run without end: its last line names the step of the one checkpoint that it left."""
    flags = [*RUN, "--num_iterations", 10**6, "--output_dir", "run", "--val_loss_every", 0, *more]
    code, stdout = strike(place, n, flags, 8, send)
    last = re.search(r"stopped: (\d+) updates, .*, go on with --output_dir run --resume 1", stdout)
    assert code != 0 and last, stdout
    steps = train_losses(stdout)
    assert len(steps) == int(last[1]) == max(steps)
    [checkpoint] = checkpoints(place / "run")
    assert step_of(checkpoint) == len(steps)
    assert len((place / "run" / "main.log").read_text().splitlines()) == len(steps)
    return code, stdout


@needs_mpi
@needs_proc
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_mpiexec_stops_all_with_one_checkpoint(number, folder, tmp_path):
    if number != signal.SIGUSR1 and not forwards_signals():
        pytest.skip("Open MPI's mpiexec kills half a second after Ctrl-C or SIGTERM: use SIGUSR1")
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")
    stopped_together(place, 2, lambda process, ranks: process.send_signal(number))


@needs_mpi
@needs_proc
def test_ctrl_c_in_a_terminal_stops_all_with_one_checkpoint(folder, tmp_path):
    """It goes to mpiexec and to all that belongs to it. The run then goes on on one process."""
    if not forwards_signals():
        pytest.skip("Open MPI's mpiexec kills half a second after Ctrl-C: use SIGUSR1")
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")
    code, stdout = stopped_together(
        place, 3, lambda process, ranks: os.killpg(process.pid, signal.SIGINT)
    )
    assert code == 130
    done = len(train_losses(stdout))
    flags = [*RUN, "--output_dir", "run", "--resume", 1, "--val_loss_every", 0]
    result = run_all(1, *flags, "--num_iterations", done + 2, folder=place)
    assert result.returncode == 0, result.stderr
    assert list(train_losses(result.stdout)) == [done + 1, done + 2]


@needs_mpi
@needs_proc
@pytest.mark.parametrize("rank", [0, 2])
def test_a_signal_to_one_process_stops_all_at_the_same_step(rank, folder, tmp_path):
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")
    code, _ = stopped_together(
        place, 3, lambda process, ranks: os.kill(ranks[rank], signal.SIGTERM)
    )
    assert code == 143


@needs_mpi
@needs_proc
def test_a_signal_while_hellaswag_is_scored(folder, tmp_path):
    """To process 1: all leave it after the same example, and save."""
    place = tmp_path / "work"
    shutil.copytree(folder / "data", place / "data")
    write_examples(place / "data" / "hellaswag_val.bin", 60_000)
    flags = [*RUN, "--num_iterations", 9, "--output_dir", "run", "--hellaswag_eval", 1]

    def send(process, ranks):
        time.sleep(1)
        os.kill(ranks[1], signal.SIGUSR1)

    code, stdout = strike(place, 2, flags, 5, send)
    assert code != 0 and re.search(r"\(stopped after \d+ of 60000\)\nval .*\nstopped: 0 ", stdout)
    assert [step_of(path) for path in checkpoints(place / "run")] == [0]
    assert "eval" not in (place / "run" / "main.log").read_text()


# --------------------------------------------------------------------------------------------------
# A disk that is full

FULL_DISK = """
    import resource
    saves = 0
    before = g.save_checkpoint
    def save(run):
        global saves
        saves += 1
        full = rank == 0 and saves in {which}
        limit = {limit} if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        before(run)
    g.save_checkpoint = save
"""


@needs_mpi
@pytest.mark.parametrize("limit", [10, 1_000_000, 2_500_000, 4_400_000, 5_253_000])
def test_a_disk_that_is_full_for_a_while(limit, folder, tmp_path, limited_run):
    """Process 0 can't write the second checkpoint, from some byte on. The others have to go on.

    1,751,040 bytes are the parameters, then come m and v, each in parts of three processes.
    """
    flags, whole = limited_run
    program = trainer_changed(FULL_DISK.format(which=(2,), limit=limit))
    out = tmp_path / "full"
    result = run_all(3, "-c", program, *flags, "--output_dir", out, folder=folder, timeout=60)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    refused = [line for line in result.stdout.splitlines() if line.startswith("can't save")]
    [line] = refused
    assert line.startswith("can't save step 6: ") and "last checkpoint is that of step 3" in line
    assert [step_of(path) for path in checkpoints(out)] == [3, 9]
    for name in ("checkpoint_00000009.safetensors", "model.safetensors"):
        assert_same_bits(
            as_hugging_face(loaded(out / name).params), as_hugging_face(loaded(whole / name).params)
        )
    names = ["m", "v"]
    found, expected = (
        tensor_bytes(path / "checkpoint_00000009.safetensors") for path in (out, whole)
    )
    assert [name for name in names if found[name] != expected[name]] == []
    assert list(out.glob("*.tmp")) == []


@pytest.fixture(scope="module")
def limited_run(folder):
    """(flags, the folder of a run with a disk that has room)."""
    flags = [*FLAGS, "--num_iterations", 9, "--checkpoint_every", 3]
    result = run_all(3, TRAINER, *flags, "--output_dir", "room", folder=folder)
    assert result.returncode == 0, result.stderr
    return flags, folder / "room"


@needs_mpi
def test_a_disk_that_stays_full(folder, tmp_path, limited_run):
    """Exit code 1, what to do in the last line, and the run goes on to the same bits."""
    flags, whole = limited_run
    program = trainer_changed(FULL_DISK.format(which=(2, 3), limit=2_500_000))
    run = [*flags, "--output_dir", tmp_path / "full"]
    first = run_all(3, "-c", program, *run, folder=folder, timeout=60)
    ended(first, "lacks a checkpoint of the last step", "make room, then go on with")
    assert [step_of(path) for path in checkpoints(tmp_path / "full")] == [3]
    second = run_all(3, TRAINER, *run, "--resume", 1, folder=folder)
    assert second.returncode == 0, second.stderr
    for name in ("model.safetensors", "main.log"):
        assert (tmp_path / "full" / name).read_bytes() == (whole / name).read_bytes()


@needs_mpi
def test_a_folder_that_another_run_uses(folder, tmp_path):
    run = [*RUN, "--num_iterations", 1, "--output_dir", tmp_path / "run"]
    with gpt2.folder_locked(str(tmp_path / "run")):
        ended(run_all(3, *run, folder=folder), "another run is writing there")
    result = run_all(3, *run, folder=folder)
    assert result.returncode == 0, result.stderr
    ended(run_all(3, *run, folder=folder), "holds a run: go on with --resume 1")


# --------------------------------------------------------------------------------------------------
# A process that does not answer

LATE = """
    processes.PATIENCE = 0.5
    calls = []
    before = {place}
    def late(*args, **kwargs):
        calls.append(1)
        if rank == {late} and len(calls) == 1:
            time.sleep(3)
        return before(*args, **kwargs)
    {place} = late
"""

LATE_AT = {  # where process 1 sleeps for a while, and what process 0 waits for
    "g.check_flags": "the settings",
    "g.GPT2.forward": "the loss",
    "processes.SharedModel.sum_gradients": "the gradients",
    "g.GPT2.grad_norm": "the gradient's norm",
    "g.GPT2.update": "the parameters",
    "g.save_checkpoint": "a checkpoint's part",
}


@needs_mpi
@pytest.mark.parametrize("place", LATE_AT)
def test_who_waits_says_what_for(place, folder, tmp_path):
    """Once, and then all goes on."""
    program = trainer_changed(LATE.format(place=place, late=1))
    flags = [*FLAGS, "--num_iterations", 3, "--val_loss_every", 0, "--output_dir", tmp_path / "run"]
    result = run_all(2, "-c", program, *flags, folder=folder)
    assert result.returncode == 0, result.stderr
    end = "of the others: is one of them, or the network, gone?"
    assert result.stderr == f"process 0 of 2 has waited 0 s for {LATE_AT[place]} {end}\n"
    assert list(train_losses(result.stdout)) == [1, 2, 3]


class Stream(io.StringIO):
    """A stream that keeps what is written to it, each write for itself."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


@pytest.mark.parametrize("to", ["stdout", "stderr"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_is_written_at_one_go(to, end, monkeypatch):
    """Else those of several processes would mix where PYTHONUNBUFFERED is set."""
    stream = Stream()
    monkeypatch.setattr(sys, to, stream)
    gpt2.print_now("a line", end=end, to=to)
    assert stream.writes == ["a line" + end]


def test_a_process_says_a_line_at_one_go(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream())
    processes.say("a line")
    assert sys.stderr.writes == ["a line\n"]
    monkeypatch.setattr(sys, "stderr", None)
    processes.say("a line that nobody can read")


@needs_mpi
def test_who_does_not_wait_long_says_nothing(folder):
    assert processes.PATIENCE == 60
    result = run_all(2, *RUN, "--num_iterations", 3, folder=folder)
    assert result.returncode == 0 and result.stderr == ""
