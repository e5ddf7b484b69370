"""Checkpoints: what a run leaves behind, and going on from it, bit for bit."""

import io
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from common import (
    KILL,
    SMALL,
    SMALL_RUN,
    STOP_SIGNALS,
    TRAINER,
    checkpoint_folders,
    events,
    failed_in_one_line,
    folder_content,
    posix_only,
    read_plainly,
    read_up_to,
    run_command,
    run_to_a_moment,
    running_command,
    stopped_where,
    succeeded,
    tensor_bytes,
    train_losses,
    whole_state,
    write_token_file,
)

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2
from test_gpt2 import relative_error
from train_gpt2 import InputError


def random_moments(lines, n, seed):
    """One in every n-th of a run's lines."""
    rng = random.Random(seed)
    return [rng.randrange(lines * i // n, lines * (i + 1) // n) + 1 for i in range(n)]


def test_a_run_that_ended_and_goes_on_equals_one_run(call_main, tmp_path):
    """8 updates, then up to 12. The learning rate stays at its peak: a decay is another one in 8
    updates."""
    flags, found = (*SMALL_RUN, "--checkpoint_every", 5, "--learning_rate_decay_frac", 1), []
    for i, ends in enumerate(([12], [8, 12], [4, 4, 8, 12])):
        folder, stdout = tmp_path / str(i), ""
        for end in ends:
            more = ("--output_dir", folder, "--num_iterations", end, "--resume", int(stdout != ""))
            stdout += succeeded(call_main(*flags, *more))
        found.append((whole_state(folder), re.sub(r"(?m)^(step \d+)/\d+:", r"\1:", events(stdout))))
    assert found[0] == found[1] == found[2] and found[0][0]["step"] == 12


@posix_only
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_run_stopped_at_any_moment_goes_on_to_the_same_bits(
    small_folder, uninterrupted, tmp_path, number
):
    """Nothing is printed or logged twice, nothing is missing, and what the last line says is what
    to type."""

    def stop_and_go_on(moment):
        folder = tmp_path / str(moment)
        flags = (*uninterrupted.flags, "--output_dir", folder)
        code, first, _ = run_to_a_moment(small_folder, moment, number, *flags)
        assert code == 128 + number and "\nfinishing this step" in first, moment
        step, hint = stopped_where(first)
        assert shlex.split(hint) == ["--output_dir", str(folder), "--resume", "1"]
        assert checkpoint_folders(folder)[-1].name == f"checkpoint_{step:08d}"
        second = succeeded(run_command(small_folder, *flags, "--resume", 1))
        assert whole_state(folder) == uninterrupted.state, moment
        assert events(first) + events(second) == uninterrupted.events, moment

    with ThreadPoolExecutor(2) as pool:  # in the last fifth there may be nothing left to stop
        list(pool.map(stop_and_go_on, random_moments(uninterrupted.lines, 5, number)[:4]))


@posix_only
def test_a_stop_at_each_line_of_the_loop_loses_nothing(call_main, uninterrupted, tmp_path):
    """... where only the stop itself makes a checkpoint. For each line of train(), the signal comes
    just before it is executed for the sixth time, or for the last."""
    codes = [
        gpt2.train.__code__,
        *(c for c in gpt2.train.__code__.co_consts if hasattr(c, "co_code")),
    ]
    counts, target = {}, None

    def trace(frame, event, arg):
        if frame.f_code in codes:
            if event == "line":
                counts[frame.f_lineno] = counts.get(frame.f_lineno, 0) + 1
                if target == (frame.f_lineno, counts[frame.f_lineno]):
                    signal.raise_signal(signal.SIGINT)
            return trace

    def call_traced(*flags):
        before = sys.gettrace()
        counts.clear()
        sys.settrace(trace)
        try:
            return call_main(*flags)
        finally:
            sys.settrace(before)

    succeeded(call_traced(*SMALL_RUN, "--output_dir", tmp_path / "all"))
    targets = [(line, min(6, count)) for line, count in counts.items()]
    assert len(targets) > 30
    for target in targets:
        folder = tmp_path / str(target[0])
        code, first, error = call_traced(*SMALL_RUN, "--output_dir", folder)
        assert code == 130 and not error
        second = ""
        if first.splitlines()[-1].startswith("stopped: "):
            assert checkpoint_folders(folder), target
            second = succeeded(call_main(*SMALL_RUN, "--output_dir", folder, "--resume", 1))
        assert events(first) + events(second) == uninterrupted.events, target
        assert (folder / "main.log").read_text() == uninterrupted.state["log"], target
        assert tensor_bytes(folder / "model.safetensors") == uninterrupted.state["final"], target


@posix_only
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(small_folder, uninterrupted, tmp_path):
    """Ten moments, one in every tenth of the run, most in the making of a checkpoint; a hundred
    with LONG_TESTS=1."""

    def kill_and_go_on(moment):
        flags = (*uninterrupted.flags, "--output_dir", tmp_path / str(moment))
        code, first, _ = run_to_a_moment(small_folder, moment, KILL, *flags)
        assert code == -KILL and uninterrupted.events.startswith(events(first)), moment
        code, second, _ = run_to_a_moment(small_folder, 0, 0, *flags, "--resume", 1)
        assert code == 0 and uninterrupted.events.endswith(events(second)), moment
        assert (
            whole_state(tmp_path / str(moment)) == uninterrupted.state and "damaged" not in second
        ), moment
        assert len(checkpoint_folders(tmp_path / str(moment))) == 2, moment
        assert not list((tmp_path / str(moment)).rglob("*tmp*")), moment

    n = 100 if os.environ.get("LONG_TESTS") == "1" else 10
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill_and_go_on, random_moments(uninterrupted.lines, n, 0)))


@posix_only
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_from_outside_and_the_words_that_go_on(small_folder, tmp_path, number):
    """A run without an end is stopped; told to go on, and when to end, it equals one that knew its
    end."""
    flags = (
        *SMALL_RUN,
        "--learning_rate_decay_frac",
        1,
        "--val_loss_every",
        7,
        "--sample_every",
        0,
    )
    endless = (*flags, "--num_iterations", 10**9, "--output_dir", tmp_path / "stopped")
    with running_command(small_folder, *endless) as process:
        read_up_to(process, "step 3/")
        process.send_signal(number)
        words = process.stdout.read()
        assert process.wait() == 128 + number and "\nfinishing this step" in words
    step, hint = stopped_where(words)
    stdout = succeeded(run_command(small_folder, *shlex.split(hint), "--num_iterations", step + 40))
    assert f"\nresuming from {tmp_path}" in stdout and f"\nstep {step + 1}/{step + 40}: " in stdout
    whole = (*flags, "--num_iterations", step + 40, "--output_dir", tmp_path / "whole")
    assert events(succeeded(run_command(small_folder, *whole))).endswith(events(stdout))
    for name in ("main.log", "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_going_on_with_no_other_flags_finishes_the_run_as_it_was_ordered(
    call_main, uninterrupted, tmp_path
):
    """As many updates, validations and samples, as long and as bold: the checkpoint knows what was
    set."""
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    stdout = succeeded(call_main("--output_dir", tmp_path, "--resume", 1))
    assert whole_state(tmp_path) == uninterrupted.state and uninterrupted.events.endswith(
        events(stdout)
    )


@posix_only
def test_the_second_signal_stops_at_once(small_folder):
    """An update that would take hours is under way."""
    with running_command(small_folder, *SMALL_RUN, "--total_batch_size", 16 * 10**7) as process:
        read_up_to(process, "val loss ")
        process.send_signal(signal.SIGINT)
        read_up_to(process, "finishing this step; once more, and it stops at once")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130 and process.stdout.read() == ""


@posix_only
@pytest.mark.parametrize("interrupted", [True, False], ids=["with_it_ctrl_c", "by_itself"])
def test_a_reader_that_goes_away_stops_the_run_and_loses_nothing(
    small_folder, tmp_path, interrupted
):
    """Ctrl-C on `python train_gpt2.py | tee log` ends tee as well; `| head` has enough after ten
    lines."""
    flags = (
        *SMALL_RUN,
        "--learning_rate_decay_frac",
        1,
        "--val_loss_every",
        0,
        "--sample_every",
        0,
    )
    endless = (*flags, "--num_iterations", 10**9, "--output_dir", tmp_path / "stopped")
    with running_command(small_folder, *endless, stderr=subprocess.PIPE) as process:
        read_up_to(process, "step 3/")
        process.stdout.close()
        if interrupted:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in ((130, 141) if interrupted else (141,))  # 128 + SIGPIPE
        assert process.stderr.read() == ""
    [folder] = checkpoint_folders(tmp_path / "stopped")
    step = int(folder.name[-8:])
    succeeded(
        run_command(
            small_folder,
            "--output_dir",
            tmp_path / "stopped",
            "--resume",
            1,
            "--num_iterations",
            step + 5,
        )
    )
    succeeded(
        run_command(
            small_folder, *flags, "--num_iterations", step + 5, "--output_dir", tmp_path / "whole"
        )
    )
    for name in ("main.log", "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_a_signal_while_a_line_is_being_printed_loses_nothing(call_main, tmp_path, monkeypatch):
    """As when the terminal is slow: print() is waiting for it, and Python allows no second one in
    its midst."""
    words = []

    class SlowTerminal(io.RawIOBase):
        writable = lambda self: True

        def write(self, data):
            words.append(bytes(data))
            if b"step 2/" in words[-1]:
                signal.raise_signal(signal.SIGINT)
            return len(data)

    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BufferedWriter(SlowTerminal()), encoding="utf-8")
    )
    assert call_main(*SMALL_RUN, "--output_dir", tmp_path)[0] == 130
    assert len(checkpoint_folders(tmp_path)) == 1 and b"go on with" in words[-1]


@posix_only
def test_a_closed_stdout_is_no_error(small_folder, tmp_path):
    """A file that is opened then may get its number, 1; nothing must be written there by
    mistake."""
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--sample_every", 0)
    command = shlex.join([sys.executable, TRAINER, *map(str, flags)]) + " >&-"
    done = subprocess.run(command, shell=True, cwd=small_folder, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "main.log").read_text().startswith("s:0 tel:")


@posix_only
def test_a_reader_that_goes_away_while_a_model_speaks_is_no_error(small_folder):
    gpt2.GPT2(SMALL, 1, 8, seed=1).save_pretrained(small_folder / "speaker")
    with running_command(
        small_folder,
        "--model",
        "speaker",
        "--inference_only",
        1,
        "--max_new_tokens",
        3000,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=30) == 0 and process.stderr.read() == ""


@posix_only
def test_a_stopped_run_without_an_output_dir_promises_nothing(small_folder):
    with running_command(small_folder, *SMALL_RUN, "--num_iterations", 10**9) as process:
        read_up_to(process, "step 2/")
        process.send_signal(signal.SIGTERM)
        words = process.stdout.read()
        assert process.wait() == 143 and "go on" not in words
        assert re.match(r"stopped: \d+ updates, train loss ", words.splitlines()[-1])


def flipped(data, at, bit):
    data = bytearray(data)
    data[at] ^= bit
    return bytes(data)


DAMAGES = {
    "bit": lambda file, data: file.write_bytes(flipped(data, len(data) // 2, 1)),
    "high bit": lambda file, data: file.write_bytes(flipped(data, 9, 128)),
    "last byte": lambda file, data: file.write_bytes(flipped(data, -1, 4)),
    "cut": lambda file, data: file.write_bytes(data[:-1]),
    "empty": lambda file, data: file.write_bytes(b""),
    "missing": lambda file, data: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "main.log",
        "model.safetensors",
        "optimizer.safetensors",
    ],
)
def test_a_damaged_checkpoint_is_announced_and_the_one_before_taken(
    call_main, uninterrupted, tmp_path, name, damage
):
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    before, newest = checkpoint_folders(tmp_path)
    assert (
        {path.name for path in newest.iterdir()}
        == {path.name for path in before.iterdir()}
        >= {name}
    )
    DAMAGES[damage](newest / name, (newest / name).read_bytes())
    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1))
    assert re.search(
        rf"(?m)^{re.escape(str(newest))} is damaged: .*: taking the one before it$", stdout
    )
    assert f"resuming from {before}\n" in stdout and uninterrupted.events.endswith(events(stdout))
    assert whole_state(tmp_path) == uninterrupted.state


@pytest.mark.parametrize(
    "name, before_digit",
    [
        ("config.json", rb'"n_head": '),
        ("main.log", b"s:1 trl:"),
        ("optimizer.safetensors", rb'step\\": '),
    ],
)
def test_a_wrong_digit_in_a_checkpoint_is_damage(
    call_main, uninterrupted, tmp_path, name, before_digit
):
    """4 heads need the same tensors as 2; 4 is also neither the first loss nor the number of
    updates."""
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    file = checkpoint_folders(tmp_path)[-1] / name
    before = file.read_bytes()
    file.write_bytes(re.sub(rb"(%b)\d" % before_digit, rb"\g<1>4", before))
    assert len(before) == len(file.read_bytes()) and before != file.read_bytes()
    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1))
    assert " is damaged: " in stdout and whole_state(tmp_path) == uninterrupted.state


def test_a_damaged_checkpoint_is_replaced_when_its_update_comes_again(
    call_main, uninterrupted, tmp_path
):
    """Or else the run would end with a broken newest checkpoint, and the next find it."""
    flags = (*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1)
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    succeeded(call_main(*flags))
    newest = checkpoint_folders(tmp_path)[-1]
    for _round in range(2):
        (newest / "model.safetensors").write_bytes(b"damaged")
        assert f"{newest} is damaged: " in succeeded(call_main(*flags))
        assert whole_state(tmp_path) == uninterrupted.state
        stdout = succeeded(call_main(*flags))
        assert "is damaged" not in stdout and f"resuming from {newest}\n" in stdout


def test_if_all_checkpoints_are_damaged_nothing_is_overwritten(call_main, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    for folder, name in zip(
        checkpoint_folders(tmp_path), ("model.safetensors", "optimizer.safetensors"), strict=False
    ):
        DAMAGES["last byte"](folder / name, (folder / name).read_bytes())
    before = folder_content(tmp_path)
    result = call_main(*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1)
    assert f"no checkpoint in {tmp_path} is whole" in failed_in_one_line(result)
    assert result[1].count(" is damaged: ") == 2 and "step " not in result[1]
    assert folder_content(tmp_path) == before


def test_the_last_two_checkpoints_are_kept(call_main, tmp_path):
    """Every third update makes one, and the end of each run."""
    kept = []
    for end in (2, 3, 6, 8, 12):
        flags = ("--checkpoint_every", 3, "--num_iterations", end, "--resume", int(end > 2))
        succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path, *flags))
        kept.append(
            [
                int(folder.name.removeprefix("checkpoint_"))
                for folder in checkpoint_folders(tmp_path)
            ]
        )
    assert kept == [[2], [2, 3], [3, 6], [6, 8], [9, 12]]


def test_a_folder_with_checkpoints_is_not_begun_anew(call_main, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    before = folder_content(tmp_path)
    error = failed_in_one_line(call_main(*uninterrupted.flags, "--output_dir", tmp_path))
    assert f"{tmp_path} holds a run: go on with --resume 1" in error and "--resume 1" in error
    assert folder_content(tmp_path) == before


def test_settings_that_contradict_the_run_are_refused_by_name(call_main, uninterrupted, tmp_path):
    """Each alone; two at once; and values for which no model could be laid out."""
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    before, was = folder_content(tmp_path), {**gpt2.DEFAULTS, **gpt2.parse_args(SMALL_RUN)}
    was["total_batch_size"] = was["batch_size"] * was["sequence_length"]  # a run knows the number
    fixed = [name for name in gpt2.FLAGS if name not in gpt2.MAY_CHANGE]
    changes = [
        {name: was[name] + {int: 1, float: 0.5, str: "x"}[type(was[name])]} for name in fixed
    ]
    changes += [{"learning_rate": 3.0, "seed": 7}]
    changes += [{"sequence_length": 17}, {"recompute": 2}, {"batch_size": 10**6}]
    for change in changes:
        flags = [word for name, value in change.items() for word in (f"--{name}", value)]
        result = call_main(*SMALL_RUN, "--output_dir", tmp_path, "--resume", 1, *flags)
        named = ", ".join(
            f"--{name} {value!r} (it was {was[name]!r})" for name, value in change.items()
        )
        assert (
            f"can't go on with {named}: " in failed_in_one_line(result)
            and "damaged" not in result[1]
        )
    assert len(fixed) > 14 and folder_content(tmp_path) == before


def test_a_machine_too_small_to_go_on_is_not_called_damage(
    call_main, uninterrupted, tmp_path, monkeypatch
):
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    before = folder_content(tmp_path)
    monkeypatch.setattr(gpt2, "available_memory", lambda: 1000)
    result = call_main(*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1)
    assert "the machine has 0: use" in failed_in_one_line(result) and "damaged" not in result[1]
    assert folder_content(tmp_path) == before


def test_what_may_change_may_change(call_main, uninterrupted, tmp_path):
    flags = """--num_iterations 9 --val_loss_every 1 --val_max_steps 1 --sample_every 9
        --checkpoint_every 2 --hellaswag_eval 0 --hellaswag_limit 3
        --max_new_tokens 3 --temperature 0 --top_k 2 --prompt a""".split()
    assert {flag[2:] for flag in flags[::2]} | {"output_dir", "resume"} == gpt2.MAY_CHANGE
    shutil.copytree(uninterrupted.early, tmp_path / "here")
    stdout = succeeded(
        call_main(*SMALL_RUN, "--output_dir", tmp_path / "here", "--resume", 1, *flags)
    )
    start = int(re.search(r"resuming from .*_(\d+)\n", stdout)[1])
    assert len(re.findall("(?m)^val loss ", stdout)) == 9 - start
    assert re.search(r"(?s)--- sample\na.{3}\n", stdout)
    os.rename(tmp_path / "here", tmp_path / "there")  # a folder may change its name
    stdout = succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "there", "--resume", 1))
    assert "step 10/12: " in stdout and f"saved in {tmp_path / 'there'}" in stdout


@pytest.mark.parametrize("counts", [(100, 60), (61, 100), (161,)])
def test_other_training_data_than_the_run_began_with_is_refused(
    call_main, uninterrupted, small_folder, tmp_path, monkeypatch, counts
):
    """... also as many tokens, cut into other shards: a position in them means something else."""
    shutil.copytree(
        small_folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("train_*")
    )
    shutil.copytree(uninterrupted.early, tmp_path / "run")
    for i, count in enumerate(counts):
        write_token_file(tmp_path / f"train_{i}.bin", [97] * count)
    monkeypatch.chdir(tmp_path)
    error = failed_in_one_line(
        call_main(*uninterrupted.flags, "--output_dir", "run", "--resume", 1)
    )
    assert "tokens of training data" in error


@posix_only
def test_two_runs_do_not_share_a_folder(small_folder, tmp_path):
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--sample_every", 0, "--val_loss_every", 0)
    with running_command(small_folder, *flags, "--num_iterations", 10**9) as first:
        read_up_to(first, "step 2/")
        for more in ((), ("--resume", 1), ("--write_tensors", 1)):
            error = failed_in_one_line(run_command(small_folder, *flags, *more))
            assert f"{tmp_path}: another run is writing there" in error
        assert folder_content(tmp_path).keys() == {"main.log"}
        first.send_signal(signal.SIGINT)
        words = first.stdout.read()
        assert first.wait() == 130
    step = stopped_where(words)[0]
    lines = (tmp_path / "main.log").read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == [f"s:{i + 1}" for i in range(step)]
    stdout = succeeded(
        run_command(small_folder, *flags, "--num_iterations", step + 1, "--resume", 1)
    )
    assert f"\nresuming from {tmp_path}" in stdout


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power cut, a name must not stand for data that never arrived: each file is synced
    before it is renamed, the folder after that and before its own renaming, and last the folder
    around it."""
    done, fsync, replace = [], os.fsync, os.replace

    def syncing(handle):
        paths = [tmp_path, *tmp_path.rglob("*")]
        (path,) = [path for path in paths if os.path.samestat(os.stat(path), os.fstat(handle))]
        done.append(("sync", str(path.relative_to(tmp_path))))
        fsync(handle)

    def renaming(old, new):
        done.append(("rename", os.path.relpath(old, tmp_path)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    gpt2.save_checkpoint(
        gpt2.GPT2(SMALL, 1, 4), str(tmp_path), {"step": 7, "log": ["s:1 trl:5.0000"]}
    )
    files = [path for kind, path in done if kind == "rename"][:-1]
    assert len(files) == 5
    assert all(done.index(("sync", path)) < done.index(("rename", path)) for path in files)
    assert done[-3:] == [("sync", "checkpoint.tmp"), ("rename", "checkpoint.tmp"), ("sync", ".")]


def test_a_run_outlives_the_want_of_a_vocabulary(small_folder, tmp_path, monkeypatch, capsys):
    """Where a sample can't be put into words, the run says why, goes on, and keeps what it
    learned."""

    def no_words(vocab_size):
        raise InputError("no vocabulary here")

    monkeypatch.chdir(small_folder)
    monkeypatch.setattr(prepro, "tokenizer", no_words)
    assert gpt2.main([*SMALL_RUN, "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("none: no vocabulary here") == 3
    assert (tmp_path / "model.safetensors").exists()


# ---- A run of an earlier version, commit 736bf9a

OLD_RUN = Path(__file__).parent / "files" / "run_of_736bf9a"


def test_a_run_of_an_earlier_version_goes_on(call_main, tmp_path, monkeypatch):
    """It had other levels of recomputation, and no --shuffle. Its losses are the same."""
    shutil.copytree(OLD_RUN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    stdout = succeeded(call_main("--output_dir", "run", "--resume", 1))
    expected = train_losses((OLD_RUN / "out.txt").read_text(encoding="utf-8"))
    found = train_losses(stdout)
    assert len(found) == 4 and len(expected) == 12
    assert np.abs(np.array(found) - expected[8:]).max() < 2e-6

    before, after = (
        read_plainly(path.read_bytes())
        for path in (OLD_RUN / "final.safetensors", tmp_path / "old" / "run" / "model.safetensors")
    )
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith("attn.c_attn.bias"):
            # The keys' bias adds the same to all scores of a query, so it has no gradient. What
            # stands there is rounding noise, which differs from one processor to the next.
            C = len(before[name]) // 3
            for biases in (before, after):
                assert np.abs(biases[name][C : 2 * C]).max() < 1e-4
                biases[name][C : 2 * C] = 0
        assert relative_error(after[name], before[name]) < 1e-5, name


@pytest.mark.parametrize("flag, meaning", [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_the_flag_still_takes_the_old_name_of_whole_layers(flag, meaning):
    assert gpt2.parse_args(["--recompute", str(flag)]) == {"recompute": meaning}
