"""A run: its loop, its checkpoints, its output and its command line, as their user meets them.

Most runs go through main() in this process, with a model so small that one takes a moment.
"""

import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from common import run_trainer, token_file

import train_gpt2 as gpt2

CONFIG = gpt2.GPT2Config(max_seq_len=16, vocab_size=256, num_layers=2, num_heads=2, channels=16)
RUN = """--model model --input_bin train_0.bin train_1.bin --input_val_bin val.bin --batch_size 2
    --sequence_length 8 --num_iterations 8"""
FLAGS = f"""{RUN} --learning_rate 3e-2 --warmup_iters 3 --learning_rate_decay_frac 0.1
    --weight_decay 0.1 --grad_clip 1 --shuffle 1 --seed 3 --total_batch_size 32 --prompt ab
    --top_k 5 --temperature 0.8 --val_loss_every 2 --val_max_steps 4 --sample_every 3
    --max_new_tokens 6 --log_every 1 --checkpoint_every 2 --output_dir o"""

if os.name == "nt":
    pytest.skip("Windows has no such signals: use Linux or macOS", allow_module_level=True)
STOPS = {getattr(signal, f"SIG{name}") for name in "INT TERM HUP USR1 USR2 XCPU".split()}
USUAL = signal.default_int_handler  # KeyboardInterrupt


def offline(*args):
    raise ConnectionError("no network: try again")


def just_before(patch, owner, name, number, happens):
    """Call happens() before the call of that number of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def changed(*args, **more):
        if next(calls) == number:
            happens(*args)
        return original(*args, **more)

    patch.setattr(owner, name, changed)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, token files, and two runs: whole, whose lines are in said.txt, and
    part, the same one, ended in its sixth update: its checkpoints are of updates 2 and 4.
    """
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    gpt2.GPT2(CONFIG, 2, 8, seed=1).save_pretrained(place / "model")
    token_file(place / "train_0.bin", rng.integers(97, 123, 100))
    token_file(place / "train_1.bin", rng.integers(97, 123, 61))
    token_file(place / "val.bin", rng.integers(97, 150, 70))  # which it learns, then unlearns
    token_file(place / "one.bin", [97])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "stdout", io.StringIO())  # which has no fileno(), as in some editors
        assert gpt2.main([*FLAGS.split(), "--output_dir", "whole"]) == 0
        (place / "said.txt").write_text(sys.stdout.getvalue(), encoding="utf-8")
        just_before(patch, gpt2, "train_step", 6, offline)
        assert gpt2.main([*FLAGS.split(), "--output_dir", "part"]) == 1
    return place


@pytest.fixture
def call(place, tmp_path, monkeypatch, capfd):
    """call("--flag x", "--other", 1): main() in this process, in a copy of that folder, without a
    network: (exit code, stdout, stderr). It must leave the handlers of signals as they were.
    """
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # there is no power cut, either
    monkeypatch.setattr("prepro_tinyshakespeare.provide", offline)

    def call(*flags):
        capfd.readouterr()
        code = gpt2.main(shlex.split(" ".join(map(str, flags))))
        return code, *capfd.readouterr()

    before = {number: signal.signal(number, USUAL) for number in STOPS}
    yield call
    after = {signal.signal(number, handler) for number, handler in before.items()}
    assert after == {USUAL}


def stdout_of(result):
    """What a run printed that ended well."""
    assert result[0] == 0 and result[2] == "", result
    return result[1]


def line_of(result, code=1):
    """The one line with which a run ended before its first update or evaluation."""
    assert result[0] == code and re.fullmatch(r"error: .*\n", result[2]), result
    assert told(result[1]) == []
    return result[2]


def told(stdout):
    """What a run said of its updates, validations and samples, but for what a clock says."""
    lines = re.findall(r"(?m)^(?:step|val loss|--- sample).*", stdout)
    return [re.sub(r", \d+ ms.*", "", line) for line in lines]


def steps_of(folder):
    return [int(path[-20:-12]) for path in reversed(gpt2.list_checkpoints(folder))]


def log_of(folder):
    """The entries of main.jsonl, but for what a clock says."""
    entries = [json.loads(line) for line in Path(folder, "main.jsonl").read_text().splitlines()]
    of_the_clock = ("ms", "tokens_per_second", "best")  # or of the disk
    return [{k: x for k, x in e.items() if k not in of_the_clock} for e in entries]


def result_of(folder):
    """All that a run must end with, to the bit."""
    tensors, metadata = gpt2.read_safetensors(gpt2.list_checkpoints(folder)[0])
    state = json.loads(metadata["state"])
    del tensors["crc32"], state["settings"], state["threads"]
    tensors = {name: stored.tobytes() for name, stored in tensors.items()}
    names = ("model.safetensors", "best/model.safetensors", "config.json")
    return tensors, state, log_of(folder), [Path(folder, name).read_bytes() for name in names]


def losses_by_hand(model, tokens):
    """The loss of each token, in passages of 8."""
    passages = [tokens[start : start + 9].tolist() for start in range(0, len(tokens) - 1, 8)]
    return np.concatenate([model.token_losses(p[:1], [p[1:]])[0] for p in passages])


def test_a_run_is_what_the_interface_computes(place, monkeypatch):
    """Rebuilt from GPT2, DataLoader and train_step: what is printed, logged and left."""
    monkeypatch.chdir(place)
    stdout = Path("said.txt").read_text("utf-8")
    model = gpt2.GPT2.from_pretrained("model", 2, 8)
    loader = gpt2.DataLoader(gpt2.open_shards(["train_0.bin", "train_1.bin"]), 2, 8, 3)
    tokens = np.fromfile("val.bin", "<u2")[512:]
    args = gpt2.parse_args(FLAGS.split())
    found, printed, validations, losses = iter(log_of("whole")), [], [], []
    for step in range(9):
        if step % 2 == 0:
            entry = next(found)
            loss, bits = entry["val_loss"], entry["bits_per_byte"]
            assert (entry["step"], entry["val_tokens"]) == (step, 64)
            assert loss == pytest.approx(losses_by_hand(model, tokens)[:64].mean(), rel=1e-5)
            assert bits == pytest.approx(loss / math.log(2))
            printed.append(f"val loss {loss:.6f} ({bits:.2f} bits per byte)")
            validations.append((loss, step, model.params["wte"].tobytes()))
        if step in (0, 3, 6, 8):
            text = "".join(gpt2.sample_text(args, model, gpt2.tokenizer("bytes"), 6, step))
            assert f"--- sample\n{text}\n" in stdout
            printed.append("--- sample")
        if step < 8:
            rate = gpt2.learning_rate_at(step, 8, 3e-2, 3, 0.1)
            loss, norm = gpt2.train_step(model, loader, 2, rate, weight_decay=0.1, grad_clip=1)
            assert next(found) == {"step": step + 1, "train_loss": loss, "norm": norm, "lr": rate}
            line = f"step {step + 1}/8: train loss {loss:.6f} (norm {norm:.4f}, lr {rate:.1e}"
            printed.append(line)
            losses.append(loss)
    assert told(stdout) == printed and next(found, None) is None

    *_, best_line, last_line, write, look = stdout.splitlines()
    loss, step, best = min(validations)
    assert step == 4 and best_line == f"best val loss {loss:.4f} at update 4, in whole/best"
    assert "--model whole/best" in write and "--model whole/best" in look
    summary = f"8 updates, train loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    assert re.fullmatch(rf"{summary}, \S+ s, \d+ tok/s, saved in whole", last_line)
    for folder, wte in (("whole/best", best), ("whole", model.params["wte"].tobytes())):
        assert gpt2.GPT2.from_pretrained(folder, 1, 8).params["wte"].tobytes() == wte
    assert steps_of("whole") == [6, 8]


# --------------------------------------------------------------------------------------------------
# Stopped, killed, and gone on with

PLACES = [  # the function, the number of its call at which the run ends, and the signal
    (gpt2.GPT2, "batch_losses", 2, signal.SIGINT),  # in the validation before the first update
    (gpt2, "train_step", 5, signal.SIGHUP),
    (gpt2, "log", 6, signal.SIGUSR1),
    (gpt2.zlib, "crc32", 10, signal.SIGUSR2),  # the first checkpoint is half written
    (gpt2, "save_huggingface", 2, signal.SIGXCPU),  # the best weights
    (gpt2.GPT2, "batch_losses", 10, signal.SIGTERM),
    (gpt2, "sample", 15, signal.SIGINT),
    (gpt2.GPT2, "batch_losses", 18, signal.SIGTERM),  # in the last validation
    (gpt2, "sample", 20, signal.SIGINT),  # in the last sample
]


@pytest.mark.parametrize("owner, name, number, stop", PLACES)
def test_stopped_or_killed_and_gone_on_with(owner, name, number, stop, call, monkeypatch):
    """Stopped by a signal, or killed, which leaves what lies in the folder at that moment."""

    def happens(*args):
        shutil.copytree("a run", "killed")
        signal.raise_signal(stop)

    just_before(monkeypatch, owner, name, number, happens)
    code, stdout, error = call(FLAGS, "--output_dir 'a run'")
    assert code == 128 + stop and error == "" and "finishing this update; once more" in stdout
    first = told(stdout)
    updates = [i for i, line in enumerate(first) if line.startswith("step")]
    seam = updates[-1] + 1 if updates else 0
    last, _, go_on = stdout.splitlines()[-1].partition(", go on with ")
    assert last.startswith(f"stopped: {len(updates)} updates")
    assert name != "batch_losses" or "val loss" not in "".join(first[seam:])
    assert not os.path.exists("a run/model.safetensors")

    second = told(stdout_of(call(go_on)))  # which repeats what followed it
    assert second[: len(first) - seam] == first[seam:]
    assert first[:seam] + second == told(Path("said.txt").read_text("utf-8"))
    assert result_of("a run") == result_of("whole")

    checkpoints = steps_of("killed")
    stdout = stdout_of(call(FLAGS, "--output_dir killed --resume 1"))
    assert ("resuming from" in stdout) == (checkpoints != [])
    assert result_of("killed") == result_of("whole")
    assert not list(Path("killed").rglob("*.tmp"))


def test_kill_9(place, tmp_path):
    words = [sys.executable, gpt2.__file__, *FLAGS.split(), "--output_dir", tmp_path]
    with subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, encoding="utf-8") as run:
        next(line for line in run.stdout if line.startswith("step 3"))
        run.kill()
    resumed = run_trainer("--output_dir", tmp_path, "--resume", 1, cwd=place)
    assert "resuming from" in stdout_of(resumed)
    assert result_of(tmp_path) == result_of(place / "whole")


HANG_UPS = [  # how SIGHUP is handled before, how often it comes, the exit code, checkpoints
    (USUAL, 1, 128 + signal.SIGHUP, [2, 4]),
    (USUAL, 2, 130, [2]),  # the second one does what it did before, at once
    (signal.SIG_IGN, 1, 0, [6, 8]),  # as under nohup
]


@pytest.mark.parametrize("handler, times, code, steps", HANG_UPS)
def test_a_terminal_goes_away(handler, times, code, steps, call, monkeypatch):
    """From the fourth update on each line that is printed is an error."""
    signal.signal(signal.SIGHUP, handler)
    with open(os.devnull) as unwritable, monkeypatch.context() as patch:

        def hang_up(*args):
            patch.setattr(sys, "stdout", unwritable)
            for _ in range(times):
                signal.raise_signal(signal.SIGHUP)

        just_before(patch, gpt2, "train_step", 4, hang_up)
        assert call(FLAGS)[0] == code
    assert signal.signal(signal.SIGHUP, USUAL) == handler
    assert steps_of("o") == steps
    assert code or result_of("o") == result_of("whole")


CLOSED = [  # flags, what the shell does with the streams, the exit code
    (RUN, ">&-", 0),
    (RUN, ">/dev/full 2>&1", 0),
    ("--batchsize 4", ">&- 2>&-", 2),
    ("--model nonesuch", ">&- 2>/dev/full", 1),
    ("--model model --inference_only 1 --max_new_tokens 99999999", "| head -c 99 >&2", 0),
]


@pytest.mark.parametrize("flags, streams, code", CLOSED)
def test_nobody_need_hear_of_it(flags, streams, code, place):
    shell = ["sh", "-c", f'"$@" {streams}', "sh"]
    found, stdout, stderr = run_trainer(*flags.split(), cwd=place, under=shell)
    assert (found, stdout) == (code, "") and "rror" not in stderr


# --------------------------------------------------------------------------------------------------
# What lies in the folder

USED = "holds a run: go on with --resume 1"
WEIGHTS = "holds weights, but no whole checkpoint to resume"
NO_RUN = "to begin one"
NO_MODEL = "expected weights in a .safetensors file"
FOLDER = "a[b]*?"
STATES = {  # which files of which folder it has, and what each of COMMANDS says; None: all is well
    "missing": ("part", "^$", None, None, NO_RUN, "no such model"),
    "other files": (".", "^said.txt", None, None, NO_RUN, NO_MODEL),
    "a log": ("part", "main", USED, None, NO_RUN, NO_MODEL),
    "a part": ("part", "", USED, None, None, None),
    "checkpoints": ("part", "checkpoint", USED, None, None, None),
    "a whole run": ("whole", "", USED, None, None, None),
    "the best": ("whole", "best|main", USED, WEIGHTS, WEIGHTS, NO_MODEL),
    "a model": ("model", "", USED, WEIGHTS, WEIGHTS, None),
}
COMMANDS = {
    "train": f"{FLAGS} --output_dir {FOLDER}",
    "resume with --model": f"{FLAGS} --output_dir {FOLDER} --resume 1",
    "resume": f"--output_dir {FOLDER} --resume 1",
    "generate": f"--model {FOLDER} --inference_only 1 --max_new_tokens 3",
}


def content_of(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", STATES)
def test_every_command_on_every_folder(state, command, call):
    source, pattern, *outcomes = STATES[state]
    expected = outcomes[list(COMMANDS).index(command)]
    before = {name: data for name, data in content_of(source).items() if re.search(pattern, name)}
    for name, data in before.items():
        path = Path(FOLDER, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    result = call(COMMANDS[command])
    assert expected in line_of(result) if expected else stdout_of(result)
    if expected or command == "generate":
        assert content_of(FOLDER) == before
    else:
        assert result_of(FOLDER)[0] == result_of("whole")[0]


def edit(name, change):
    path = Path(name)
    path.write_bytes(change(path.read_bytes()))


def flip(data):
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


OLD, NEW = (f"part/checkpoint_0000000{step}.safetensors" for step in (2, 4))
TAKEN = f"{NEW} is damaged: "
BLIND = "--output_dir part --resume 1 --num_iterations 5 --val_loss_every 0".split()
ALL = "--num_iterations 8 --val_loss_every 2"
MAY_NOT_CHANGE = """model batch_size sequence_length total_batch_size learning_rate warmup_iters
    learning_rate_decay_frac weight_decay grad_clip shuffle overfit_single_batch recompute seed
    val_max_steps""".split()
MAY_CHANGE = """--total_batch_size 0 --sequence_length 0 --input_bin train_?.bin
    --sample_every 1 --log_every 2 --checkpoint_every 3 --prompt x --max_new_tokens 5
    --top_k 4 --temperature 0.5"""
GOING_ON = {  # what happens before, the exit code, what is said, more flags
    "other flags": (None, 0, f"resuming from {NEW}", MAY_CHANGE),
    "cut": (lambda patch: edit(NEW, lambda data: data[:-1000]), 0, TAKEN),
    "a bit": (lambda patch: edit(NEW, flip), 0, TAKEN),
    "format": (lambda patch: patch.setattr(gpt2, "CHECKPOINT", "other"), 1, "expected 'other'"),
    "all": (lambda patch: [edit(OLD, flip), edit(NEW, flip)], 1, "no whole checkpoint to resume"),
    "threads": (lambda patch: patch.setattr(gpt2, "THREADS", 7), 0, "7 threads in place of"),
    "half line": (lambda patch: edit("part/main.jsonl", lambda log: log + log[:9]), 0, "resuming"),
    "a folder": (lambda patch: os.mkdir(NEW.replace("4", "9")), 0, f"resuming from {NEW}"),
    "lock": (lambda patch: gpt2.lock_folder("part", 1), 1, "another run is writing"),
    "new": (lambda patch: gpt2.lock_folder("n", 1), 1, "another run is", "--output_dir n"),
    "train": (lambda patch: edit("train_1.bin", flip), 1, "the training data has changed"),
    "val": (lambda patch: edit("val.bin", flip), 1, "the validation data has changed"),
    "val, later": (lambda patch: [gpt2.main(BLIND), edit("val.bin", flip)], 1, "has changed", ALL),
    "moved": (lambda patch: os.rename("val.bin", "v.bin"), 0, "resuming", "--input_val_bin v.bin"),
    "fewer": (None, 1, "has done 4 updates: use --num_", "--num_iterations 3"),
    "more": (None, 0, "was 2.74e-02 and goes on with 2.82e-02", "--num_iterations 9"),
}
for name in MAY_NOT_CHANGE:
    GOING_ON[name] = (None, 1, f"can't go on with --{name} ", f"--{name} 7")


@pytest.mark.parametrize("what", GOING_ON)
def test_going_on(what, call, monkeypatch):
    """Either to the same end, or a line says why not."""
    happens, code, said, *flags = GOING_ON[what]
    held = happens and happens(monkeypatch)  # a lock, for instance
    result = call("--output_dir part --resume 1", *flags)
    del held
    if code:
        assert said in line_of(result)
        return
    assert said in stdout_of(result) and ("note: " in result[1]) == (what in ("threads", "more"))
    assert what == "more" or result_of("part") == result_of("whole")


FULL = [  # what finds no room, from which time on, and what it is called
    ("main.jsonl", 3, "the log"),
    ("checkpoint_", 0, "a checkpoint"),
    ("best/model", 0, "the best weights"),
    ("o/model", 0, "the weights"),
]


@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize("part, since, what", FULL)
def test_without_room_no_run_ends(part, since, what, times, call, monkeypatch):
    """What can be written later is. What can't be is said once, and by the exit code."""
    calls = itertools.count()

    def open_on_a_full_disk(path, mode="r", **more):
        file = open(path, mode, **more)
        written = mode in ("ab", "wb") and part in str(path)
        if written and since <= next(calls) < since + times:
            with file:
                file.write(b'{"half')
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(gpt2, "open", open_on_a_full_disk, raising=False)
    code, stdout, error = result = call(FLAGS)
    assert stdout.count(f"can't write {what}: [Errno 28] No space left on device; the run") == 1
    assert told(stdout) == told(Path("said.txt").read_text("utf-8"))
    assert not list(Path("o").rglob("*.tmp"))
    if times == 1 and part != "o/model":  # which is written but once
        stdout_of(result)
        assert result_of("o") == result_of("whole")
    else:
        remedy = "begin again with another" if part == "checkpoint_" else "go on with --output_dir"
        assert code == 1 and f"lacks {what}: make room, then {remedy}" in error
        assert "saved in" not in stdout
        assert ("best val loss" in stdout) == (part != "best/model")


# --------------------------------------------------------------------------------------------------
# Flags, numbers that are not finite, memory

NONSENSE = """--batchsize 4, --num_iterations, --batch_size 1.5, --seed -1, 4,
    --learning_rate nan, --temperature inf, --num_iterations 1000000000000000000,
    --checkpoint_every 2, --resume 1"""
WRONG = [  # flags, and what the one line says
    (f"{RUN} --sequence_length 17", "the model's context"),
    (f"{RUN} --batch_size 0", "batch size 0: expected at least 1"),
    (f"{RUN} --batch_size 99", "use a smaller --batch_size or --sequence_length"),
    (f"{RUN} --total_batch_size 40", "not a multiple of B*T of all processes, 16: try 32"),
    (f"{RUN} --input_val_bin=~/none.bin", os.path.expanduser("~/none.bin")),
    (f"{RUN} --input_val_bin one.bin", "the validation data has no token after its first"),
    (f"{RUN} --output_dir val.bin/o", "val.bin"),
    (f"{RUN} --inference_only 1 --model d6", "(fresh, for training)"),
    ("--model model --input_bin train_0.bin", "no validation data is named"),
    ("--model model --input_val_bin val.bin", "no training data is named"),
    ("--model gpt2", "no network"),
    ("--input_bin train_0.bin --val_loss_every 0", "no network"),
    ("--inference_only 1", "no network"),
    ("--num_iterations 0", "no network"),
    ("--model model --input_bin train_0.bin --num_iterations 0", "--input_val_bin"),
]
WRONG += [(f"{RUN} {flags}", "(--help lists all flags)") for flags in NONSENSE.split(",")]


@pytest.mark.parametrize("flags, words", WRONG)
def test_a_wrong_command_is_one_line(call, flags, words):
    assert words in line_of(call(flags), code=2 if "--help" in words else 1)


def test_if_no_model_is_named_a_small_one_learns(call, monkeypatch):
    os.mkdir("data")
    flags = "--num_iterations 1 --batch_size 1 --val_max_steps 1 --max_new_tokens 3"
    for folder, named in (("data/first", ""), ("o", "--output_dir o")):
        stdout = stdout_of(call(flags, named))
        assert "--> so a small GPT learns from scratch (--model d2)\n" in stdout
        assert f"saved in {folder}\n" in stdout and steps_of(folder) == [1]
    assert "kept in no folder" in stdout_of(call(flags)) and not os.path.exists("main.jsonl")
    assert "step 2/2" in stdout_of(call("--output_dir o --resume 1 --num_iterations 2"))
    assert [e["step"] for e in log_of("o") if "val_loss" in e] == [0, 1, 2]

    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "kernel.json"])  # main() in a notebook
    damaged = lambda what: gpt2.require(False, "it is damaged")
    monkeypatch.setattr("prepro_tinyshakespeare.provide", damaged)
    assert gpt2.main() == 1  # which is no reason to train something else


def test_a_run_in_another_thread(call):
    """Only the main thread could note signals."""
    with ThreadPoolExecutor() as threads:
        stdout_of(threads.submit(call, RUN).result())


def test_what_has_no_prompt_needs_no_encoder(call, monkeypatch):
    """A vocabulary of one's own decodes without tiktoken."""
    tokens = gpt2.tokenizer("bytes")
    tokens.encode = offline
    monkeypatch.setattr(gpt2, "tokenizer", lambda *args: tokens)
    flags = "--model model --inference_only 1 --max_new_tokens 3"
    stdout_of(call(flags))
    assert "no network" in line_of(call(flags, "--prompt a"))


SPOILT = [("the loss", gpt2, "train_step", 6), ("the gradient norm", gpt2.GPT2, "grad_norm", 6),
          ("the validation loss", gpt2.GPT2, "batch_losses", 17)]  # the last one


@pytest.mark.parametrize("what, owner, name, number", SPOILT)
def test_what_is_not_finite_changes_nothing(what, owner, name, number, call, monkeypatch):
    seen = []

    def spoil(model, *args):
        (model.grads if "norm" in what else model.params)["fcw"][1] = math.nan
        seen.extend([model, model.flat[[0, 2, 3]].copy()])

    just_before(monkeypatch, owner, name, number, spoil)
    code, _, error = call(FLAGS)
    assert code == 1 and f"{what} is nan: try a smaller --learning_rate" in error
    model, flat = seen
    np.testing.assert_array_equal(model.flat[[0, 2, 3]], flat)
    assert steps_of("o") == ([6, 8] if "validation" in what else [2, 4])
    assert not os.path.exists("o/model.safetensors")


def test_a_plan_beyond_the_machine_names_the_batch_that_fits(call, monkeypatch):
    nbytes = {B: gpt2.GPT2(CONFIG, B, 8).blob.nbytes for B in (1, 3, 5)}
    for fits, asked, room in ((3, 8, nbytes[3]), (4, 12, nbytes[5] - 1), (0, 2, nbytes[1] - 1)):
        monkeypatch.setattr(gpt2, "available_memory", lambda room=room: room)
        with monkeypatch.context() as patch:
            patch.setattr(gpt2.GPT2, "__init__", None)  # nothing is allocated
            line = line_of(call(RUN, "--batch_size", asked))
        assert line.endswith(f"try --batch_size {fits}\n" if fits else "try a smaller --model\n")
        if fits:
            stdout_of(call(RUN, "--batch_size", fits))


# --------------------------------------------------------------------------------------------------
# Validations, samples, and what a person asks

# How many tokens a text has, how many updates are made, how many predictions a validation reads.
READ = [(2, 0, 1), (8, 0, 7), (9, 0, 8), (10, 0, 9), (70, 0, 69), (70, 1, 48)]


@pytest.mark.parametrize("count, iterations, read", READ)
def test_each_token_counts_once_with_any_batch_size(count, iterations, read, call, monkeypatch):
    """All of a text, if nothing is trained, and otherwise as much as VAL_TOKENS says."""
    monkeypatch.setattr(gpt2, "VAL_TOKENS", 48)
    bytes_of = SimpleNamespace(lengths=[i % 5 for i in range(256)], encode=list)
    monkeypatch.setattr(gpt2, "tokenizer", lambda *args: bytes_of)
    tokens = np.fromfile("val.bin", "<u2")[512:][:count]
    token_file(Path("text.bin"), tokens)
    truth = losses_by_hand(gpt2.GPT2.from_pretrained("model", 1, 8), tokens)[:read].mean()
    nbytes = (tokens[1 : read + 1] % 5).mean()
    flags = f"{RUN} --input_val_bin text.bin --num_iterations {iterations} --sample_every 0"
    for batch_size in (1, 2, 3, 10):
        stdout = stdout_of(call(flags, "--batch_size", batch_size))
        loss, bits = re.search(r"\nval loss (\S+) \((\S+) bits per byte\)", stdout).groups()
        assert float(loss) == pytest.approx(truth, abs=2e-6)
        assert float(bits) == pytest.approx(truth / math.log(2) / nbytes, abs=0.0051)
        assert iterations or stdout.endswith(f"perplexity {math.exp(truth):.2f}\n")


def test_a_validation_reads_1280_of_gpt2s_tokens():
    model = gpt2.GPT2(gpt2.GPT2Config(64, 50257, 1, 1, 6), 1, 64)
    run = gpt2.Run(gpt2.parse_args([]), model, "a loader", [np.ones(2000, int)], {}, None)
    gpt2.validate(run)
    assert run.entries[0]["val_tokens"] == 1280


SHOWN = [  # a prompt, the ids that are read, what the model writes then, and what is shown of it
    ("", [10], "é\n\t".encode(), "é\n\t"),
    ("ü\n", [195, 188, 10], b"a\xff\xc3", "a\ufffd"),  # no UTF-8, and half a character at the end
    ("\udcff", [255], b"\x1b[2J\x07\r\x00", "\\x1b[2J\\x07\\r\\x00"),
]


@pytest.mark.parametrize("prompt, read, written, shown", SHOWN)
def test_any_prompt_is_gone_on_with_and_harms_no_terminal(prompt, read, written, shown):
    asked = []
    model = SimpleNamespace(generate=lambda *args: asked.extend(args) or written)
    args = SimpleNamespace(seed=7, prompt=prompt, temperature=0.5, top_k=3)
    assert "".join(gpt2.sample_text(args, model, gpt2.tokenizer("bytes"), 20, 9)) == prompt + shown
    *rest, rng = asked
    assert rest == [read, 20, 0.5, 3] and rng.random() == np.random.default_rng([7, 9]).random()


def test_fresh_models_have_defaults_of_their_own():
    rates = [gpt2.parse_args(["--model", name]).learning_rate for name in ("", "d6", "bytes", "d2")]
    assert rates == [1e-4, 1e-3, 4e-3, 2e-3]


def test_the_first_batch_again_and_again(call):
    loader = gpt2.open_run(f"{RUN} --overfit_single_batch 1".split()).loader
    first, again = loader.next_batch(), loader.next_batch()
    np.testing.assert_array_equal(first, again)


def test_what_is_normal_is_said(call, monkeypatch):
    flags = "--model bytes --num_iterations 2 --sample_every 1 --max_new_tokens 70"
    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "sample_text", lambda *args: str(args[-2:]))
        stdout = stdout_of(call(RUN, flags))
    assert re.findall(r"sample\n(.*)", stdout) == ["(64, 0)", "(64, 1)", "(70, 2)"]
    for words in ("2 updates of", f"{gpt2.THREADS} threads", "is kept in no folder: name one",
                  "loss of ln(256) = 5.55"):
        assert words in stdout
    assert "val loss 5.5" in stdout and f"{math.log(256):.6f}" not in stdout  # of zero weights

    stdout = stdout_of(call(RUN, "--num_iterations 40 --val_loss_every 0 --batch_size 8"))
    assert "1 shards are shorter than a batch and are left out" in stdout
    assert "it may learn so small a text by heart" in stdout and "knows nothing" not in stdout
    steps = re.findall(r"(?m)^step (\d+)/40: .*\d ms(?:, \d:\d\d:\d\d left)?\)$", stdout)
    assert [int(step) for step in steps] == [1, *range(2, 41, 2)]

    gpt2.GPT2(gpt2.GPT2Config(16, 300, 1, 2, 8), 1, 8).save_pretrained("m")
    stdout = stdout_of(call(RUN, "--model m"))
    assert stdout.count("no samples: the vocabulary of the model is not known") == 1
    assert "--- sample" not in stdout and re.search(r"\nval loss \S+\n", stdout)


def test_how_long_it_will_still_take(call, monkeypatch):
    """By the updates of this process: each takes 3 s of this clock, and so do the others. A line
    comes at the first, at the last, and when there was none for 10 s.
    """
    monkeypatch.setattr(gpt2.time, "perf_counter", itertools.count(0, 3).__next__)
    stdout = stdout_of(call("--output_dir part --resume 1 --log_every 9"))
    left = re.findall(r"(?m)^step (\d)/8: .*, 3000 ms(?:, (.*) left)?\)$", stdout)
    assert left == [("5", "0:00:09"), ("7", "0:00:05"), ("8", "")]
    assert ", 24.0 s, 5 tok/s, " in stdout  # 4 updates of 32 tokens
