"""What a person asks while it trains: how long, what is normal, which weights are the best, why."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from common import (
    FINISHED,
    SMALL_RUN,
    call_main,
    failed_in_one_line,
    folder_content,
    small_folder,
    succeeded,
    tensor_bytes,
    train_losses,
)

import train_gpt2 as gpt2

__all__ = ["call_main", "small_folder"]  # fixtures


def entries_of(folder):
    return [json.loads(line) for line in (folder / "main.jsonl").read_text().splitlines()]


def best_of(folder):
    """The Best of a folder, by its file alone."""
    header = (folder / "best" / "model.safetensors").read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    return int(metadata["step"]), float(metadata["val_loss"]), int(metadata["val_tokens"])


# --------------------------------------------------------------------------------------------------
# Before the first update


def test_a_run_says_what_it_is_and_what_is_normal(call_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # or there is a line on several processes
    flags = "--model bytes --num_iterations 3 --val_loss_every 0 --sample_every 0".split()
    lines = succeeded(call_main(*flags)).splitlines()
    tokens = int(re.search(r"training data: .*, ([\d,]+) tokens$", lines[2])[1].replace(",", ""))
    assert "a validation reads " not in "".join(lines)
    at = [lines.index(line) for line in lines if line.startswith("run: ")][0]
    assert lines[at] == f"run: 3 updates of 1,024 tokens, {3 * 1024 / tokens:.3g} epochs"
    assert lines[at + 1] == "a model that knows nothing has a loss of ln(256) = 5.55"
    assert "reach its peak only at update 100" in lines[at + 2]  # which is more than 3
    assert lines[at + 3].startswith("step 1/3: ")


def test_of_given_weights_nothing_is_said_of_a_model_that_knows_nothing(call_main, tmp_path):
    stdout = succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path))
    assert "knows nothing" not in stdout and "by heart" not in stdout
    more = ("--output_dir", tmp_path, "--resume", 1, "--num_iterations", 14)
    assert "\nrun: 14 updates of 16 tokens, " in succeeded(call_main(*more))


def test_many_epochs_are_said_and_where_the_best_weights_are(call_main, tmp_path):
    flags = [*SMALL_RUN, "--num_iterations", 300, "--sample_every", 0, "--val_loss_every", 300]
    stdout = succeeded(call_main(*flags, "--output_dir", tmp_path / "o"))
    epochs = float(re.search(r"(?m)^run: 300 updates of 16 tokens, (\S+) epochs$", stdout)[1])
    assert epochs > 10
    where = tmp_path / "o" / "best"
    assert f"by heart; the best weights are kept in {where}\n" in stdout
    assert "; --output_dir would keep the best weights\n" in succeeded(call_main(*flags))


# --------------------------------------------------------------------------------------------------
# Time left


class Ticks:
    """A clock that goes on only when somebody works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(gpt2.time, "perf_counter", lambda: self.now)

    def takes(self, monkeypatch, name, seconds):
        """Let each call of one of the trainer's functions take so many seconds."""
        function = getattr(gpt2, name)

        def slow(*arguments):
            self.now += seconds
            return function(*arguments)

        monkeypatch.setattr(gpt2, name, slow)


def seconds_left(stdout):
    """{step: seconds} from the printed lines."""
    found = {}
    for step, text in re.findall(r"(?m)^step (\d+)/.*, ([\d:]+) left\)$", stdout):
        *hours, minutes, seconds = map(int, text.split(":"))
        found[int(step)] = 3600 * sum(hours) + 60 * minutes + seconds
    return found


def test_the_time_left_counts_updates_validations_samples_and_checkpoints(
    call_main, tmp_path, monkeypatch
):
    ticks = Ticks(monkeypatch)
    for name, seconds in (
        ("train_step", 100.0), ("validate", 300.0), ("sample_aloud", 40.0), ("save", 70.0),
    ):  # fmt: skip
        ticks.takes(monkeypatch, name, seconds)
    flags = """--num_iterations 100 --val_loss_every 5 --sample_every 3 --checkpoint_every 4
        --log_every 1""".split()
    flags = [*SMALL_RUN, *flags, "--output_dir", tmp_path]
    left = seconds_left(succeeded(call_main(*flags)))
    whole = ticks.now

    assert sorted(left) == list(range(1, 101))
    done = {}
    spent = 300.0  # the validation before the first update
    for step in range(1, 101):
        spent += 100
        done[step] = spent
        spent += 300 if step % 5 == 0 else 0
        spent += 40 if step % 3 == 0 or step == 100 else 0
        spent += 70 if step % 4 == 0 else 0
    assert spent == whole
    for step in range(4, 101):  # by then there has been one of each, but for the first checkpoint
        unknown = 70 * 25 if step == 4 else 0
        assert left[step] == round(whole - done[step] - unknown), step
    assert abs(left[10] / (whole - done[10]) - 1) < 0.15


def test_one_slow_update_is_not_taken_for_the_rule(monkeypatch):
    clock = gpt2.Clock(
        gpt2.settings({"num_iterations": 30, "val_loss_every": 0, "sample_every": 0})
    )
    assert clock.left(0) == ""
    for seconds in (60.0, 2.0, 2.0):
        clock.seconds["update"].append(seconds)
    assert clock.left(3) == ", 0:54 left"
    clock.every["validation"], clock.seconds["validation"] = 3, [10.0]
    assert clock.left(3) == ", 2:34 left"  # with the validations after 3, 6, ..., 30
    assert clock.left(3, evaluated=True) == ", 2:24 left"
    assert clock.left(30) == ", 0:10 left"
    assert clock.left(30, evaluated=True) == ", 0:00 left"
    clock.seconds["update"].extend([4000.0] * 30)
    clock.every["validation"] = 0
    clock.seconds["validation"] = []
    assert clock.left(3) == ", 30:00:00 left"


# --------------------------------------------------------------------------------------------------
# Printed lines, and the log for programs


@pytest.mark.parametrize(
    "updates, every",
    [(1, 1), (40, 1), (100, 1), (101, 2), (200, 2), (201, 5), (1600, 20), (10**6, 10**4)],
)
def test_a_long_run_prints_40_to_100_lines(updates, every):
    args = gpt2.settings({"num_iterations": updates})
    assert gpt2.lines_every(args) == every
    assert updates <= 100 or 40 <= updates // every <= 100
    args.log_every = 7
    assert gpt2.lines_every(args) == 7


def test_the_first_the_last_and_those_before_an_evaluation_are_printed(call_main, tmp_path):
    flags = """--num_iterations 30 --log_every 7 --val_loss_every 10 --sample_every 0
        --checkpoint_every 12""".split()
    stdout = succeeded(call_main(*SMALL_RUN, *flags, "--output_dir", tmp_path))
    steps = [int(step) for step in re.findall(r"(?m)^step (\d+)/30: ", stdout)]
    assert steps == [1, 7, 10, 12, 14, 20, 21, 24, 28, 30]
    entries = entries_of(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(31))
    printed = [entry["train_loss"] for entry in entries if entry["step"] in steps]
    assert train_losses(stdout) == [round(loss, 6) for loss in printed]


def test_a_line_of_json_for_each_step(call_main, tmp_path):
    stdout = succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path))
    first, *entries = entries_of(tmp_path)
    assert list(first) == ["step", "val_loss", "val_tokens"] and first["step"] == 0
    for step, entry in enumerate(entries, start=1):
        names = ["step", "train_loss", "norm", "lr", "ms", "tokens_per_second"]
        names += ["val_loss", "val_tokens"] if step % 4 == 0 else []
        assert list(entry) == names and entry["step"] == step
        assert entry["tokens_per_second"] == pytest.approx(16e3 / entry["ms"])
        assert (
            f"step {step}/12: train loss {entry['train_loss']:.6f} (norm {entry['norm']:.4f}, "
            in stdout
        )
    values = [entry["val_loss"] for entry in (first, *entries) if "val_loss" in entry]
    assert re.findall(r"(?m)^val loss (\S+)$", stdout) == [f"{value:.6f}" for value in values]
    assert {entry.get("val_tokens") for entry in (first, *entries)} == {32, None}


def test_what_is_known_of_a_resumed_step_later_is_a_line_of_its_own(call_main, tmp_path):
    """An entry that is in the file does not change any more."""
    flags = (*SMALL_RUN, "--val_loss_every", 0, "--output_dir", tmp_path)
    succeeded(call_main(*flags))
    before = (tmp_path / "main.jsonl").read_bytes()
    more = ("--output_dir", tmp_path, "--resume", 1, "--val_loss_every", 4)
    succeeded(call_main(*more))
    after = (tmp_path / "main.jsonl").read_bytes()
    assert after.startswith(before)
    assert list(json.loads(after[len(before) :])) == ["step", "val_loss", "val_tokens"]
    succeeded(call_main(*more))
    assert (tmp_path / "main.jsonl").read_bytes() == after


def test_the_last_lines_are_as_wide_as_a_terminal(call_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--model bytes --num_iterations 200 --batch_size 1 --sequence_length 8".split()
    flags += "--val_loss_every 50 --val_max_steps 1 --sample_every 0 --output_dir o".split()
    lines = succeeded(call_main(*flags)).splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert 100 <= len(steps) <= 102 and max(map(len, steps)) <= 80
    assert max(map(len, lines[-4:])) <= 80
    train, val, best, last = lines[-4:]
    assert re.fullmatch(r"train loss +\d+\.\d{4} .{50} \d+\.\d{4}", train)
    assert re.fullmatch(r"val   loss +\d+\.\d{4} .{5} \d+\.\d{4}", val)
    assert best.startswith("best val loss ") and last.startswith("200 updates, train loss ")


# --------------------------------------------------------------------------------------------------
# The best weights


VALIDATE = gpt2.validate


def losses_are(monkeypatch, losses):
    """Let the validations of a run have these losses."""
    losses = itertools.chain(losses, itertools.repeat(9.0))

    def told(run):
        loss = next(losses)

        class Model:
            config, params = run.model.config, run.model.params
            acts = {"losses": np.full((2, 8), loss)}

            def forward(self, *batch, train):
                assert not train

        model, run.model = run.model, Model()
        try:
            VALIDATE(run)
        finally:
            run.model = model

    monkeypatch.setattr(gpt2, "validate", told)


def test_the_weights_with_the_least_validation_loss_are_kept(call_main, tmp_path, monkeypatch):
    """5.0, before the first update, does not count: these are the weights that one has."""
    losses_are(monkeypatch, [5.0, 5.3, 5.2, 5.4])
    flags = (*SMALL_RUN, "--checkpoint_every", 4, "--output_dir", tmp_path / "o")
    stdout = succeeded(call_main(*flags))
    said = f"best val loss 5.2000 at update 8 of 12, on 32 tokens, in {tmp_path / 'o' / 'best'}\n"
    assert said in stdout and best_of(tmp_path / "o") == (8, 5.2, 32)

    at_8 = tensor_bytes(tmp_path / "o" / "checkpoint_00000008.safetensors")
    best = tensor_bytes(tmp_path / "o" / "best" / "model.safetensors")
    assert best == {name: data for name, data in at_8.items() if name.startswith("transformer.")}
    assert {path.name for path in (tmp_path / "o" / "best").iterdir()} == set(FINISHED)
    best = gpt2.GPT2.from_pretrained(tmp_path / "o" / "best", 1, 8)
    assert best.config == gpt2.GPT2.from_pretrained(tmp_path / "o", 1, 8).config
    stdout = succeeded(call_main(*SMALL_RUN, "--model", tmp_path / "o" / "best"))
    assert "step 12/12: " in stdout


def test_a_resumed_run_goes_on_knowing_the_best(call_main, tmp_path, monkeypatch):
    flags = ("--output_dir", tmp_path, "--resume", 1, "--num_iterations")
    losses_are(monkeypatch, [5.0, 5.2, 5.3, 5.4])
    succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path))
    before = folder_content(tmp_path / "best")
    losses_are(monkeypatch, [5.4, 5.3])
    assert "best val loss 5.2000 at update 4 of 16" in succeeded(call_main(*flags, 16))
    assert folder_content(tmp_path / "best") == before
    losses_are(monkeypatch, [5.3, 5.1])
    assert "best val loss 5.1000 at update 20 of 20" in succeeded(call_main(*flags, 20))
    assert best_of(tmp_path) == (20, 5.1, 32)


def test_a_loss_on_other_tokens_is_not_compared(call_main, tmp_path, monkeypatch):
    losses_are(monkeypatch, [5.0, 5.0, 5.0, 5.0])
    succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path))
    before = folder_content(tmp_path / "best")
    losses_are(monkeypatch, [4.4, 4.3])
    more = ("--output_dir", tmp_path, "--resume", 1, "--num_iterations", 16, "--val_max_steps", 3)
    stdout = succeeded(call_main(*more))
    assert f"\n{tmp_path}/best rests on 32 tokens and stays as it is: move it away" in stdout
    assert "best val loss 5.0000 at update 4 of 16, on 32 tokens" in stdout
    assert folder_content(tmp_path / "best") == before


@pytest.mark.parametrize("damage", ["cut", "no metadata", "missing", "null", "-inf"])
def test_best_weights_that_can_not_be_read_are_written_anew(call_main, tmp_path, damage):
    succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path))
    path = tmp_path / "best" / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "no metadata":
        shutil.copy(tmp_path / "model.safetensors", path)
    elif damage == "null":
        path.write_bytes(re.sub(b'"step": "12"', b'"step": null', path.read_bytes()))
    elif damage == "-inf":
        data = path.read_bytes()
        loss = re.search(b'"val_loss": "([^"]*)"', data)[1]
        path.write_bytes(data.replace(loss, b"-inf".ljust(len(loss))))
    else:
        shutil.rmtree(tmp_path / "best")
    succeeded(call_main("--output_dir", tmp_path, "--resume", 1, "--num_iterations", 16))
    assert best_of(tmp_path)[0] in (12, 16)


def test_without_a_folder_or_a_validation_nothing_is_kept(call_main, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "keep_best", lambda *arguments: pytest.fail("kept"))
    assert "best val loss" not in succeeded(call_main(*SMALL_RUN))
    flags = (*SMALL_RUN, "--val_loss_every", 0, "--output_dir", tmp_path)
    assert "best val loss" not in succeeded(call_main(*flags))


def test_best_weights_without_a_checkpoint_are_not_overwritten(call_main, tmp_path, monkeypatch):
    """A run that was killed before its first checkpoint has left them."""
    succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "o"))
    for path in (tmp_path / "o").iterdir():
        if path.name != "best":
            path.unlink()
    before, of_best = folder_content(tmp_path / "o"), folder_content(tmp_path / "o" / "best")
    new = call_main(*SMALL_RUN, "--output_dir", tmp_path / "o")
    assert "holds a run" in failed_in_one_line(new)
    assert folder_content(tmp_path / "o") == before

    losses_are(monkeypatch, [1.0, 9.0, 9.0, 9.0])  # those that are there were better
    stdout = succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "o", "--resume", 1))
    assert "NO RUN TO RESUME" in stdout
    assert folder_content(tmp_path / "o" / "best") == of_best


def test_best_weights_that_can_not_be_written_end_no_run(call_main, tmp_path, monkeypatch):
    save = gpt2.save_huggingface

    def full(folder, *arguments):
        if folder.endswith("best"):
            raise OSError(28, "No space left on device")
        save(folder, *arguments)

    monkeypatch.setattr(gpt2, "save_huggingface", full)
    stdout = succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path))
    assert stdout.count("can't keep the best weights: [Errno 28] No space left on device") == 3
    assert "best val loss" not in stdout and "saved in" in stdout


# --------------------------------------------------------------------------------------------------
# One number of a validation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_a_validation_is_the_same_for_any_batch_size(
    call_main, small_folder, monkeypatch, batch_size
):
    """Of five passages in this case, whose losses are averaged token by token."""
    monkeypatch.setattr(gpt2, "VAL_TOKENS", {256: 40})
    flags = "--model model --input_bin train_*.bin --input_val_bin val.bin --num_iterations 0"
    flags = [*flags.split(), "--sequence_length", 8, "--sample_every", 0]
    stdout = succeeded(call_main(*flags, "--batch_size", batch_size))
    loss = float(re.search(r"(?m)^val loss (\S+)$", stdout)[1])

    val = np.fromfile(small_folder / "val.bin", "<u2")[512:].astype(np.int64)
    model = gpt2.GPT2.from_pretrained(small_folder / "model", 1, 8)
    truth = []
    for i in range(5):
        window = val[i * 8 : i * 8 + 9]
        truth.append(model.forward(window[None, :-1], window[None, 1:], train=False))
    assert loss == pytest.approx(np.mean(truth), abs=2e-6)


def test_how_many_passages_a_validation_reads():
    def passages(vocab_size, size=1, tokens=(10**5, 10**5), **flags):
        run = SimpleNamespace(
            args=gpt2.settings(flags),
            world=SimpleNamespace(size=size),
            model=SimpleNamespace(config=gpt2.GPT2Config(vocab_size=vocab_size)),
            data={"validation": [(n, 0) for n in tokens]},
        )
        return gpt2.val_passages(run)

    assert passages(50257) == 20 and passages(50257, batch_size=8, size=3) == 20
    assert passages(50257, sequence_length=1024) == 5
    assert passages(256) == 480 and passages(256, sequence_length=1024) == 30
    assert passages(50257, val_max_steps=7, batch_size=8, size=3) == 168
    assert passages(256, tokens=(64 * 11 + 1, 64 * 8), batch_size=4) == 11 + 7  # no more is there


def test_given_weights_have_the_loss_that_their_run_had(call_main, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "VAL_TOKENS", {256: 40})
    flags = [*SMALL_RUN, "--val_max_steps", 0, "--output_dir", tmp_path / "o"]
    losses = re.findall(r"(?m)^val loss (\S+)$", succeeded(call_main(*flags)))
    data = "--input_bin train_*.bin --input_val_bin val.bin --sequence_length 8".split()
    for batch_size in (1, 4):
        again = ("--model", tmp_path / "o", "--num_iterations", 0, "--batch_size", batch_size)
        stdout = succeeded(call_main(*again, *data, "--sample_every", 0))
        loss = float(re.search(r"(?m)^val loss (\S+)$", stdout)[1])
        assert loss == pytest.approx(float(losses[-1]), abs=2e-6)


def test_a_model_of_bytes_is_evaluated_on_the_text_it_has_learnt(call_main, tmp_path):
    """It is in no file of tokens."""
    flags = "--num_iterations 2 --val_loss_every 2 --sample_every 0 --output_dir".split()
    stdout = succeeded(call_main("--model", "bytes", *flags, tmp_path / "o"))
    losses = re.findall(r"(?m)^val loss (\S+)$", stdout)
    again = ("--model", tmp_path / "o", "--num_iterations", 0, "--sample_every", 0)
    found = re.findall(r"(?m)^val loss (\S+)$", succeeded(call_main(*again)))
    assert float(found[0]) == pytest.approx(float(losses[-1]), abs=2e-6)


# --------------------------------------------------------------------------------------------------
# The picture of a run


PLOT_RUN = Path(gpt2.__file__).parent / "figures" / "plot_run.py"


def plot(*arguments, **options):
    command = [sys.executable, PLOT_RUN, *arguments]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", **options)
    return found.returncode, found.stdout, found.stderr


def test_a_picture_of_runs(call_main, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    runs = (tmp_path / "_one", tmp_path / r"$\frac$")
    for folder in runs:
        succeeded(call_main(*SMALL_RUN, "--output_dir", folder))
    with open(runs[0] / "main.jsonl", "a") as file:
        file.write('{"step": 13, "tr')  # a killed run has left half a line
    assert succeeded(plot(runs[0])).strip() == str(runs[0] / "run.svg")
    assert b"<svg" in (runs[0] / "run.svg").read_bytes()
    succeeded(plot(*runs, "--output", tmp_path / "both.png"))
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_what_can_not_be_drawn_is_one_line(tmp_path):
    path = tmp_path / "main.jsonl"
    assert "main.jsonl" in failed_in_one_line(plot(tmp_path))
    for text, expected in (
        ("", "is empty"),
        ('{"step": 1}\n[]\n', "line 2"),
        ("{\n", "line 1"),
        ('{"step": 1, "val_loss": "a"}\n', "line 1"),
        ('{"step": 1, "val_loss": 1' + 400 * "0" + "}\n", "line 1"),
        ('{"step": 1, "x": ' + 9999 * "[" + "\n", "line 1"),
    ):
        path.write_text(text)
        assert expected in failed_in_one_line(plot(tmp_path))
    path.write_text('{"step": 1}\n')
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    without = {"env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    assert "pip install matplotlib" in failed_in_one_line(plot(tmp_path, **without))


# --------------------------------------------------------------------------------------------------
# Several processes for a small model


@pytest.mark.parametrize(
    "threads, batch_size, size, there, said",
    [
        (2, 2, 1, True, True),
        (2, 3, 1, True, False),  # a batch that two can't share
        (1, 2, 1, True, False),
        (2, 2, 2, True, False),
        (2, 2, 1, False, False),
    ],
)
def test_a_small_model_hears_of_several_processes(
    threads, batch_size, size, there, said, monkeypatch, capsys
):
    monkeypatch.setattr(gpt2, "THREADS", threads)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace() if there else None)
    run = SimpleNamespace(
        args=gpt2.settings({"batch_size": batch_size, "total_batch_size": 16}),
        world=SimpleNamespace(size=size),
        model=SimpleNamespace(config=gpt2.BYTES_CONFIG),
        data={"training": [(10**6, 0)]},
        val_loader=None,
        step=1,
    )
    gpt2.describe(run)
    command = "mpiexec -n 2 python train_gpt2.py ... --batch_size 1\n"
    assert (command in capsys.readouterr().out) == said
