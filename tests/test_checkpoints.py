"""Checkpoints: what a run leaves behind, and going on from it, bit for bit."""

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from common import (
    KILL,
    SMALL,
    SMALL_RUN,
    STOP_SIGNALS,
    TRAINER,
    all_joined,
    checkpoints,
    events,
    failed_in_one_line,
    folder_content,
    header_of,
    joined,
    posix_only,
    read_plainly,
    read_up_to,
    run_command,
    run_state,
    run_to_a_moment,
    running_command,
    state_of,
    step_of,
    stopped_where,
    succeeded,
    tensor_bytes,
    whole_state,
    with_right_checksum,
    write_token_file,
)

import train_gpt2 as gpt2
from train_gpt2 import InputError


@pytest.fixture
def early(uninterrupted, tmp_path):
    """A folder of its own with what the run left that was killed: checkpoints of step 4 and 5."""
    folder = tmp_path / "early"
    shutil.copytree(uninterrupted.early, folder)
    return folder


full_device = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="only Linux has a device that is always full"
)


# --------------------------------------------------------------------------------------------------
# Ended, stopped or killed, and gone on with


def random_moments(lines, n, seed):
    """One in every n-th of a run's lines."""
    rng = random.Random(seed)
    return [rng.randrange(lines * i // n, lines * (i + 1) // n) + 1 for i in range(n)]


def test_a_run_that_ended_and_goes_on_equals_one_run(call_main, tmp_path):
    """8 updates, then up to 12. The learning rate stays at its peak: a decay is another one in 8
    updates."""
    flags, found = (*SMALL_RUN, "--checkpoint_every", 5, "--learning_rate_decay_frac", 1), []
    for i, ends in enumerate(([12], [8, 12], [4, 4, 8, 12])):
        folder, sessions = tmp_path / str(i), []
        for end in ends:
            more = ("--output_dir", folder, "--num_iterations", end)
            more += ("--resume", int(len(sessions) > 0))
            sessions.append(succeeded(call_main(*flags, *more)))
        said = re.sub(r"(?m)^(step \d+)/\d+:", r"\1:", all_joined(*sessions))
        found.append((whole_state(folder), said))
    assert found[0] == found[1] == found[2] and found[0][0]["step"] == 12


@posix_only
@pytest.mark.parametrize("number", STOP_SIGNALS[:2])
def test_a_run_stopped_at_any_moment_goes_on_to_the_same_bits(
    small_folder, uninterrupted, tmp_path, number
):
    """No line is logged twice, nothing is missing, and what the last line says is what to type."""

    def stop_and_go_on(moment):
        folder = tmp_path / str(moment)
        flags = (*uninterrupted.flags, "--output_dir", folder)
        code, first, _ = run_to_a_moment(small_folder, moment, number, *flags)
        assert code == 128 + number and "\nfinishing this step" in first, moment
        step, hint = stopped_where(first)
        assert shlex.split(hint) == ["--output_dir", str(folder), "--resume", "1"]
        assert step_of(checkpoints(folder)[-1]) == step
        second = succeeded(run_command(small_folder, *flags, "--resume", 1))
        assert whole_state(folder) == uninterrupted.state, moment
        assert joined(first, second) == uninterrupted.events, moment

    with ThreadPoolExecutor(2) as pool:  # in the last fifth there may be nothing left to stop
        list(pool.map(stop_and_go_on, random_moments(uninterrupted.lines, 5, number)[:4]))


@posix_only
def test_a_stop_at_each_line_of_the_loop_loses_nothing(call_main, uninterrupted, tmp_path):
    """... where only the stop itself makes a checkpoint. For each line of the loop and of what it
    calls, the signal comes just before it is executed for the sixth time, or for the last."""
    functions = [gpt2.train, gpt2.validate, gpt2.sample_aloud, gpt2.print_sample, gpt2.save]
    functions += [gpt2.save_checkpoint, gpt2.finish, gpt2.Log.add, gpt2.Log.write]
    codes = {function.__code__ for function in functions}
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
    assert len(targets) > 100
    stops = 0
    for target in targets:
        folder = tmp_path / str(target[0])
        code, first, error = call_traced(*SMALL_RUN, "--output_dir", folder)
        stopped = first.splitlines()[-1].startswith("stopped: ")
        assert code == (130 if stopped else 0) and not error, target
        said = events(first)
        if stopped:
            [checkpoint] = checkpoints(folder)
            assert step_of(checkpoint) == stopped_where(first)[0], target
            second = succeeded(call_main(*SMALL_RUN, "--output_dir", folder, "--resume", 1))
            said = joined(first, second)
            stops += 1
        assert said == uninterrupted.events, target
        assert (folder / "main.log").read_text() == uninterrupted.state["log"], target
        assert tensor_bytes(folder / "model.safetensors") == uninterrupted.state["final"], target
        shutil.rmtree(folder)
    assert stops > 50


@posix_only
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(small_folder, uninterrupted, tmp_path):
    """Ten moments, one in every tenth of the run, most in the making of a checkpoint; a hundred
    with LONG_TESTS=1."""

    def kill_and_go_on(moment):
        folder = tmp_path / str(moment)
        flags = (*uninterrupted.flags, "--output_dir", folder)
        code, first, _ = run_to_a_moment(small_folder, moment, KILL, *flags)
        assert code == -KILL and uninterrupted.events.startswith(events(first)), moment
        left = [step_of(path) for path in checkpoints(folder)]
        assert len(left) <= 3, moment  # three, if it was killed before it deleted the oldest
        code, second, _ = run_to_a_moment(small_folder, 0, 0, *flags, "--resume", 1)
        assert code == 0 and uninterrupted.events.endswith(events(second)), moment
        assert len(events(first)) + len(events(second)) >= len(uninterrupted.events), moment
        assert whole_state(folder) == uninterrupted.state and " is damaged" not in second, moment
        expected = left if left[-1:] == [12] else [11, 12]  # the next one that is saved deletes it
        assert [step_of(path) for path in checkpoints(folder)] == expected, moment
        assert not list(folder.rglob("*tmp*")), moment

    n = 100 if os.environ.get("LONG_TESTS") == "1" else 10
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill_and_go_on, random_moments(uninterrupted.lines, n, 0)))


@posix_only
def test_a_run_killed_while_it_is_taken_up_again_loses_nothing(
    small_folder, uninterrupted, tmp_path
):
    """... while it reads the checkpoint, and while it reads and cuts the logs."""
    where = "run_command resume load_checkpoint read_state old_entries begin parse_json"

    def half_done(name):
        shutil.copytree(uninterrupted.early, tmp_path / name)
        return (*uninterrupted.flags, "--output_dir", tmp_path / name, "--resume", 1)

    lines = run_to_a_moment(small_folder, 0, 0, *half_done("all"), where=where)[2]
    assert lines > 100

    def kill_and_go_on(moment, where):
        folder = tmp_path / f"{moment} {where}"
        flags = half_done(folder.name)
        code, stdout, _ = run_to_a_moment(small_folder, moment, KILL, *flags, where=where)
        assert code == -KILL and "step 6/" not in stdout, (moment, where)
        assert [step_of(path) for path in checkpoints(folder)] == [4, 5], (moment, where)
        stdout = succeeded(run_command(small_folder, *flags))
        assert f"resuming from {folder}/checkpoint_00000005.safetensors\n" in stdout
        assert whole_state(folder) == uninterrupted.state, (moment, where)
        assert not list(folder.rglob("*tmp*")), (moment, where)

    moments = [(moment, where) for moment in random_moments(lines - 10, 5, 1)]
    moments += [(moment, "atomic_write") for moment in (2, 4, 6, 8)]  # its first is main.log's
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill_and_go_on, *zip(*moments, strict=True)))


def test_what_a_killed_run_was_writing_does_not_stay_for_ever(call_main, uninterrupted, early):
    """The half of a checkpoint that nobody will write again may be as large as a whole one."""
    (early / "checkpoint_00000006.safetensors.tmp").write_bytes(b"half a checkpoint")
    (early / "main.log.tmp").write_bytes(b"half a log")
    (early / "mine.tmp").write_bytes(b"not ours")
    succeeded(call_main("--output_dir", early, "--resume", 1, "--checkpoint_every", 0))
    assert [path.name for path in early.glob("*tmp*")] == ["mine.tmp"]
    assert whole_state(early) == uninterrupted.state


@posix_only
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_from_outside_and_the_words_that_go_on(small_folder, tmp_path, number):
    """A run without an end is stopped; told to go on, and when to end, it equals one that knew its
    end."""
    flags = (*SMALL_RUN, "--learning_rate_decay_frac", 1)
    flags += ("--val_loss_every", 7, "--sample_every", 0)
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
        stopped, never = tmp_path / "stopped" / name, tmp_path / "whole" / name
        assert stopped.read_bytes() == never.read_bytes()


@posix_only
def test_under_nohup_a_terminal_that_goes_away_ends_nothing(small_folder, tmp_path):
    command = [sys.executable, TRAINER, *SMALL_RUN, "--num_iterations", 10**9]
    command = ["nohup", *map(str, command), "--output_dir", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=small_folder, encoding="utf-8", errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with process:
        read_up_to(process, "step 3/")
        process.send_signal(signal.SIGHUP)
        read_up_to(process, "step 100/")
        process.send_signal(signal.SIGTERM)
        words = process.stdout.read()
    assert process.returncode == 143 and words.count("finishing this step") == 1
    assert len(checkpoints(tmp_path)) == 1


def test_going_on_with_no_other_flags_finishes_the_run_as_it_was_ordered(
    call_main, uninterrupted, early
):
    """As many updates, validations and samples, as long and as bold: the checkpoint knows what was
    set."""
    stdout = succeeded(call_main("--output_dir", early, "--resume", 1))
    assert whole_state(early) == uninterrupted.state
    assert uninterrupted.events.endswith(events(stdout)) and "\nstep 6/12: " in stdout


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
    flags = (*SMALL_RUN, "--learning_rate_decay_frac", 1)
    flags += ("--val_loss_every", 0, "--sample_every", 0)
    endless = (*flags, "--num_iterations", 10**9, "--output_dir", tmp_path / "stopped")
    with running_command(small_folder, *endless, stderr=subprocess.PIPE) as process:
        read_up_to(process, "step 3/")
        process.stdout.close()
        if interrupted:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in ((130, 141) if interrupted else (141,))  # 128 + SIGPIPE
        assert process.stderr.read() == ""
    [checkpoint] = checkpoints(tmp_path / "stopped")
    end = ("--num_iterations", step_of(checkpoint) + 5)
    go_on = ("--output_dir", tmp_path / "stopped", "--resume", 1)
    succeeded(run_command(small_folder, *go_on, *end))
    succeeded(run_command(small_folder, *flags, *end, "--output_dir", tmp_path / "whole"))
    for name in ("main.log", "model.safetensors"):
        stopped, never = tmp_path / "stopped" / name, tmp_path / "whole" / name
        assert stopped.read_bytes() == never.read_bytes()


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
    assert len(checkpoints(tmp_path)) == 1 and b"go on with" in words[-1]


@posix_only
def test_a_closed_stdout_is_no_error(small_folder, tmp_path):
    """A file that is opened then may get its number, 1; nothing must be written there by
    mistake."""
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--sample_every", 0)
    command = shlex.join([sys.executable, TRAINER, *map(str, flags)]) + " >&-"
    done = subprocess.run(command, shell=True, cwd=small_folder, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "main.log").read_text().startswith("s:0 tel:")


@full_device
def test_a_full_disk_under_stdout_is_no_error(small_folder, uninterrupted, tmp_path):
    command = [sys.executable, TRAINER, *map(str, uninterrupted.flags), "--output_dir", tmp_path]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=small_folder, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert whole_state(tmp_path) == uninterrupted.state


@posix_only
def test_a_terminal_that_is_closed_stops_the_run_and_loses_nothing(small_folder, tmp_path):
    """Its window is closed: SIGHUP comes, and all that is printed from then on is an error."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    flags = (*SMALL_RUN, "--num_iterations", 10**9, "--output_dir", tmp_path)
    process = subprocess.Popen(
        [sys.executable, TRAINER, *map(str, flags)], cwd=small_folder,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"step 3/" not in said:
        said += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=30) == 128 + signal.SIGHUP
    [checkpoint] = checkpoints(tmp_path)
    stdout = succeeded(
        run_command(
            small_folder, "--output_dir", tmp_path, "--resume", 1,
            "--num_iterations", step_of(checkpoint),
        )
    )  # fmt: skip
    assert f"resuming from {checkpoint}\n" in stdout


@posix_only
def test_a_reader_that_goes_away_while_a_model_speaks_is_no_error(small_folder):
    gpt2.GPT2(SMALL, 1, 8, seed=1).save_pretrained(small_folder / "speaker")
    flags = ("--model", "speaker", "--inference_only", 1, "--max_new_tokens", 3000)
    with running_command(small_folder, *flags, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=30) == 0 and process.stderr.read() == ""


@posix_only
def test_a_stopped_run_without_an_output_dir_promises_nothing(small_folder):
    with running_command(small_folder, *SMALL_RUN, "--num_iterations", 10**9) as process:
        read_up_to(process, "nothing of this run will be kept: --output_dir names a folder")
        read_up_to(process, "step 2/")
        process.send_signal(signal.SIGTERM)
        words = process.stdout.read()
        assert process.wait() == 143 and "go on" not in words
    last = words.splitlines()[-1]
    assert re.match(r"stopped: \d+ updates, train loss ", last)
    assert last.endswith("nothing is kept without --output_dir")


# --------------------------------------------------------------------------------------------------
# A damaged checkpoint


def flipped(data, at, bit=1):
    data = bytearray(data)
    data[at] ^= bit
    return bytes(data)


def middle_of(data, name):
    """Where the middle of a tensor is in a checkpoint's bytes."""
    header, end = header_of(data)
    return end + sum(header[name]["data_offsets"]) // 2


def replaced(data, old, new):
    assert data.count(old) == 1
    return data.replace(old, new)


WQKV = "transformer.h.2.attn.c_attn.weight"
DAMAGES = {
    "length of the header": lambda data: flipped(data, 0),
    "high bit of the header": lambda data: flipped(data, 9, 128),
    "name of a tensor": lambda data: flipped(data, data.index(b"wpe.weight")),
    "place of a tensor": lambda data: flipped(data, data.index(b'data_offsets": [') + 16),
    "heads": lambda data: replaced(data, b'"n_head": "2"', b'"n_head": "4"'),
    "step": lambda data: replaced(data, rb"\"step\": 5", rb"\"step\": 6"),
    "position": lambda data: replaced(data, rb"\"position\": [0", rb"\"position\": [1"),
    "seed": lambda data: replaced(data, rb"\"seed\": 1337", rb"\"seed\": 1338"),
    "parameters": lambda data: flipped(data, middle_of(data, WQKV)),
    "m": lambda data: flipped(data, middle_of(data, "m")),
    "v": lambda data: flipped(data, middle_of(data, "v")),
    "checksum": lambda data: flipped(data, -1, 4),
    "last byte missing": lambda data: data[:-1],
    "second half missing": lambda data: data[: len(data) // 2],
    "all but eight bytes missing": lambda data: data[:8],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data[:-4096] + bytes(4096),
    "text": lambda data: b"<html>404 Not Found</html>" * 100,
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_announced_and_the_one_before_taken(
    call_main, uninterrupted, early, damage
):
    before, newest = checkpoints(early)
    data = newest.read_bytes()
    newest.write_bytes(DAMAGES[damage](data))
    assert newest.read_bytes() != data
    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1))
    announced = rf"(?m)^{re.escape(str(newest))} is damaged: .*: taking the one before it$"
    assert re.search(announced, stdout) and f"\nresuming from {before}\n" in stdout
    assert uninterrupted.events.endswith(events(stdout)) and "\nstep 5/" in stdout
    assert whole_state(early) == uninterrupted.state


def test_a_missing_checkpoint_is_no_damage(call_main, uninterrupted, early):
    before, newest = checkpoints(early)
    newest.unlink()
    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1))
    assert " is damaged" not in stdout and f"resuming from {before}\n" in stdout
    assert whole_state(early) == uninterrupted.state


@posix_only
def test_what_is_no_file_is_damage_too(call_main, uninterrupted, early):
    """A folder and a pipe of a checkpoint's name: nothing waits for somebody to write to it."""
    os.mkfifo(early / "checkpoint_00000020.safetensors")
    (early / "checkpoint_00000021.safetensors").mkdir()
    (early / "checkpoint_00000022.safetensors").symlink_to("nowhere")
    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1))
    assert stdout.count(" is damaged: ") == 3 and "\nstep 6/" in stdout
    for step in (20, 21, 22):
        path = early / f"checkpoint_{step:08d}.safetensors"
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    assert whole_state(early) == uninterrupted.state


def test_no_bit_of_a_checkpoint_may_change(early):
    """One of each byte of the checksum and of 1000 others; and no byte may be missing. With
    LONG_TESTS=1, one of each byte of the header as well."""
    path = checkpoints(early)[-1]
    data = path.read_bytes()
    rng = random.Random(1)
    end = header_of(data)[1]
    places = [*range(8), *range(len(data) - 4, len(data))]
    n = end - 8 if os.environ.get("LONG_TESTS") == "1" else 500
    places += rng.sample(range(8, end), n)
    places += rng.sample(range(end, len(data) - 4), 500)
    wrong = [flipped(data, at, 1 << rng.randrange(8)) for at in places]
    wrong += [data[: rng.randrange(len(data))] for _ in range(100)]
    for one in wrong:
        path.write_bytes(one)
        with pytest.raises(InputError) as caught:
            gpt2.read_state(str(path))
        assert str(caught.value).isprintable() and str(path) in str(caught.value)
    path.write_bytes(data)
    assert gpt2.read_state(str(path))[0]["step"] == 5


def test_what_is_whole_and_no_checkpoint_is_not_taken_for_one(call_main, uninterrupted, early):
    """Weights without a state under a checkpoint's name, also with a checksum."""
    before, newest = checkpoints(early)
    model = gpt2.GPT2.from_pretrained(newest, 1, 8)
    tensors = gpt2.huggingface_tensors(model.params)
    for checksum, message in ((False, "it has no checksum"), (True, "expected JSON")):
        gpt2.write_safetensors(str(newest), tensors, {"n_head": "2"}, checksum=checksum)
        flags = ("--output_dir", early, "--resume", 1, "--num_iterations", 4)
        stdout = succeeded(call_main(*uninterrupted.flags, *flags))
        line = stdout.splitlines()[0]
        assert line.startswith(f"{newest} is damaged: ") and message in line
        assert f"resuming from {before}\n" in stdout


def test_weights_that_are_not_finite_are_not_gone_on_with(call_main, uninterrupted, early):
    """... although the checksum is right."""
    _, newest = checkpoints(early)
    data = newest.read_bytes()
    for name in (WQKV, "m", "v"):
        at = middle_of(data, name) // 4 * 4
        at += (header_of(data)[1] - at) % 4
        newest.write_bytes(with_right_checksum(data[:at] + b"\0\0\xc0\x7f" + data[at + 4 :]))
        flags = ("--output_dir", early, "--resume", 1, "--num_iterations", 4)
        stdout = succeeded(call_main(*uninterrupted.flags, *flags))
        assert "holds a value that is not finite: taking the one before it" in stdout


def test_a_damaged_checkpoint_is_replaced_when_its_update_comes_again(
    call_main, uninterrupted, early
):
    """Or else the run would end with a broken newest checkpoint, and the next find it."""
    flags = (*uninterrupted.flags, "--output_dir", early, "--resume", 1)
    succeeded(call_main(*flags))
    newest = checkpoints(early)[-1]
    for _round in range(2):
        newest.write_bytes(b"damaged")
        assert f"{newest} is damaged: " in succeeded(call_main(*flags))
        assert whole_state(early) == uninterrupted.state
        stdout = succeeded(call_main(*flags))
        assert "is damaged" not in stdout and f"resuming from {newest}\n" in stdout


def test_if_all_checkpoints_are_damaged_nothing_is_overwritten(call_main, uninterrupted, early):
    for path, damage in zip(checkpoints(early), ("checksum", "m"), strict=True):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = folder_content(early)
    result = call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1)
    assert f"no checkpoint in {early} is whole" in failed_in_one_line(result)
    assert result[1].count(" is damaged: ") == 2 and "step " not in result[1]
    assert folder_content(early) == before


# --------------------------------------------------------------------------------------------------
# main.log

LOGS = {
    "missing": None,
    "empty": lambda text: b"",
    "cut in a line": lambda text: text[: text.index(b'{"step": 4') + 40],
    "garbage in a line": lambda text: text[:40] + bytes(range(256)) + text[40:],
    "lines missing": lambda text: b"".join(text.splitlines(keepends=True)[2:]),
    "odd lines": lambda text: b'{"step": 1, "train_loss": NaN}\n\n[]\n{"step": true}\nnull\n'
                              b'{"train_loss": 1}\n{"step": 1, "val_loss": "5"}\n\xd9\n' + text,
    "another future": lambda text: text + b'{"step": 6, "train_loss": 9.9}\n{"step": 12, "x": 0}\n',
    "zeros at its end": lambda text: text + bytes(4096),
    "line ends of Windows": lambda text: text.replace(b"\n", b"\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("damage", LOGS)
def test_a_damaged_log_harms_no_run_and_keeps_its_whole_lines(
    call_main, uninterrupted, early, damage
):
    """It had lines of the 6th update, which is made again: they are not there twice."""
    path = early / "main.jsonl"
    text = path.read_bytes()
    assert b'\n{"step": 6, "train_loss": ' in text
    damaged = LOGS[damage](text) if LOGS[damage] else b""
    path.write_bytes(damaged)
    if not LOGS[damage]:
        path.unlink()
        (early / "main.log").unlink()
    whole_lines = set(damaged.replace(b"\r\n", b"\n").split(b"\n"))
    whole_steps = {json.loads(line)["step"] for line in text.splitlines() if line in whole_lines}
    expected = []
    for line in uninterrupted.state["log"].splitlines():
        step = int(re.match(r"s:(\d+) ", line)[1])
        if step > 5 or step in whole_steps:
            expected.append(line)

    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1))
    assert uninterrupted.events.endswith(events(stdout)) and " is damaged" not in stdout
    lost = len({1, 2, 3, 4, 5} - whole_steps)
    said = f"main.jsonl lacks {lost} of 5 updates, and the logs go on without them\n"
    assert (said in stdout) == (lost > 0 and damage != "missing")
    assert (early / "main.log").read_text().splitlines() == expected
    assert whole_state(early) | {"log": ""} == uninterrupted.state | {"log": ""}


def test_main_log_follows_from_main_jsonl(call_main, uninterrupted, early):
    (early / "main.log").write_bytes(b"s:1 trl:9.9999\ns:4 tel:9.9")
    succeeded(call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1))
    assert whole_state(early) == uninterrupted.state


def test_main_log_alone_is_not_begun_anew(call_main, uninterrupted, early):
    (early / "main.jsonl").unlink()
    before = folder_content(early)
    result = call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1)
    assert "has main.log, but no main.jsonl: put it back" in failed_in_one_line(result)
    assert folder_content(early) == before


@pytest.mark.parametrize("name", ["main.log", "main.jsonl"])
def test_a_log_that_is_a_folder_is_refused_in_one_line(name, call_main, uninterrupted, early):
    (early / name).unlink()
    (early / name).mkdir()
    before = folder_content(early)
    result = call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1)
    assert f"{name}" in failed_in_one_line(result)
    assert folder_content(early) == before


@pytest.fixture
def before_step(monkeypatch):
    """before_step(n, function): it is called before the run's n-th update."""
    train_step, calls, hooks = gpt2.train_step, [], {}

    def hooked(*arguments):
        calls.append(1)
        hooks.get(len(calls), lambda: None)()
        return train_step(*arguments)

    monkeypatch.setattr(gpt2, "train_step", hooked)
    return hooks.__setitem__


@full_device
def test_lines_that_can_not_be_written_are_written_later(
    call_main, uninterrupted, tmp_path, before_step
):
    log, kept = tmp_path / "main.log", tmp_path / "kept"

    def fill_disk():
        log.rename(kept)
        log.symlink_to("/dev/full")

    def make_room():
        assert kept.read_text().endswith(f"{lines[5]}\n") and lines[6].startswith("s:5 ")
        kept.replace(log)

    lines = uninterrupted.state["log"].splitlines()
    before_step(5, fill_disk)  # lines is read later
    before_step(8, make_room)
    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", tmp_path))
    assert events(stdout) == uninterrupted.events
    assert whole_state(tmp_path) == uninterrupted.state


@full_device
def test_lines_that_can_never_be_written_are_an_error_in_the_end_and_not_before(
    call_main, uninterrupted, tmp_path, before_step
):
    log = tmp_path / "main.log"

    def fill_disk():
        log.unlink()
        log.symlink_to("/dev/full")

    before_step(5, fill_disk)
    result = call_main(*uninterrupted.flags, "--output_dir", tmp_path)
    error = failed_in_one_line(result)
    assert f"{tmp_path} lacks the last lines of main.log: make room, then go on with" in error
    assert events(result[1]) == uninterrupted.events and "saved in" not in result[1]
    log.unlink()
    log.write_text(uninterrupted.state["log"])
    assert whole_state(tmp_path) == uninterrupted.state


@posix_only
@pytest.mark.parametrize("what", ["main.log", "."])
def test_a_log_that_somebody_moves_away_is_written_anew(
    call_main, uninterrupted, tmp_path, before_step, what
):
    """... or the whole folder: the run goes on in a new one of its name."""
    folder = tmp_path / "run"
    before_step(6, lambda: os.rename(folder / what, tmp_path / "moved"))
    succeeded(call_main(*uninterrupted.flags, "--output_dir", folder))
    assert whole_state(folder) == uninterrupted.state
    assert (tmp_path / "moved").exists() and len(checkpoints(folder)) == 2


# --------------------------------------------------------------------------------------------------
# A full disk


@pytest.fixture
def no_room_at(monkeypatch):
    """no_room_at(*steps): the checkpoints of these can't be written, and the others can."""
    save_checkpoint, full = gpt2.save_checkpoint, set()

    def fsync(handle):
        raise OSError(28, "No space left on device")

    def save(run):
        with monkeypatch.context() as patch:
            if run.step in full:
                patch.setattr(os, "fsync", fsync)
            save_checkpoint(run)

    monkeypatch.setattr(gpt2, "save_checkpoint", save)

    def set_steps(*steps):
        full.clear()
        full.update(steps)

    return set_steps


def test_a_checkpoint_that_can_not_be_written_is_no_end(
    call_main, uninterrupted, tmp_path, no_room_at
):
    no_room_at(6, 9)
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--checkpoint_every", 3)
    stdout = succeeded(call_main(*flags))
    for step in (6, 9):
        assert (
            f"\ncan't save step {step}: [Errno 28] No space left on device; "
            "the last checkpoint is that of step 3\n"
        ) in stdout
    assert f"saved in {tmp_path}" in stdout
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 12]
    assert not list(tmp_path.glob("*tmp*"))
    assert whole_state(tmp_path) == uninterrupted.state


def test_a_last_checkpoint_that_can_not_be_written_is_an_error_with_its_remedy(
    call_main, uninterrupted, tmp_path, no_room_at
):
    """The weights are there; and the remedy helps."""
    no_room_at(9, 12)
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--checkpoint_every", 3)
    result = call_main(*flags)
    error = failed_in_one_line(result)
    go_on = shlex.join(["--output_dir", str(tmp_path), "--resume", "1"])
    remedy = f"lacks a checkpoint of the last step: make room, then go on with {go_on}\n"
    assert error == f"error: {tmp_path} {remedy}"
    assert "the last checkpoint is that of step 6\n" in result[1] and "saved in" not in result[1]
    assert tensor_bytes(tmp_path / "model.safetensors") == uninterrupted.state["final"]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 6]
    assert not list(tmp_path.glob("*tmp*"))

    no_room_at()
    stdout = succeeded(call_main(*shlex.split(go_on)))
    assert uninterrupted.events.endswith(events(stdout))
    assert whole_state(tmp_path) == uninterrupted.state


def test_a_stop_whose_checkpoint_can_not_be_written_says_so(
    call_main, tmp_path, no_room_at, before_step
):
    no_room_at(5)
    before_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--checkpoint_every", 2)
    result = call_main(*flags)
    assert "lacks a checkpoint of the last step: make room" in failed_in_one_line(result)
    assert "the last checkpoint is that of step 4\n" in result[1]
    assert result[1].splitlines()[-1].startswith("stopped: 5 updates")
    assert "go on with" not in result[1]


def test_a_resumed_run_knows_which_checkpoint_it_came_from(
    call_main, uninterrupted, early, no_room_at
):
    no_room_at(6, 9)
    flags = ("--output_dir", early, "--resume", 1, "--checkpoint_every", 3)
    stdout = succeeded(call_main(*flags))
    for step in (6, 9):
        assert f"\ncan't save step {step}: " in stdout
    assert stdout.count("; the last checkpoint is that of step 5\n") == 2
    assert whole_state(early) == uninterrupted.state


def test_weights_that_can_not_be_written_are_an_error_with_its_remedy(
    call_main, uninterrupted, tmp_path, monkeypatch
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "save_huggingface", full)
        result = call_main(*uninterrupted.flags, "--output_dir", tmp_path)
    error = failed_in_one_line(result)
    reason = "([Errno 28] No space left on device)"
    assert f"{tmp_path} lacks the weights {reason}: make" in error
    assert result[1].count("can't keep the best weights: [Errno 28]") == 3
    assert not (tmp_path / "model.safetensors").exists()
    succeeded(call_main(*shlex.split(error.partition("go on with ")[2])))
    assert whole_state(tmp_path) == uninterrupted.state


@posix_only
def test_a_file_system_that_takes_no_large_file(small_folder, uninterrupted, tmp_path):
    """As it is, without a hook: a checkpoint does not fit, and what is smaller does."""
    import resource

    size = checkpoints(uninterrupted.early)[-1].stat().st_size
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--checkpoint_every", 5)
    result = run_command(
        small_folder, *flags,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
    )  # fmt: skip
    remedy = "make room, then begin again with another --output_dir\n"
    assert f"lacks a checkpoint of the last step: {remedy}" in failed_in_one_line(result)
    assert result[1].count("can't save step ") == 3
    assert result[1].count("; the last checkpoint is none\n") == 3
    assert tensor_bytes(tmp_path / "model.safetensors") == uninterrupted.state["final"]
    assert (tmp_path / "main.log").read_text() == uninterrupted.state["log"]
    assert not checkpoints(tmp_path) and not list(tmp_path.glob("*tmp*"))


@posix_only
def test_a_file_system_that_takes_nothing_ends_no_run(small_folder, uninterrupted, tmp_path):
    """main.log has whole lines, as far as there was room, and not a half one."""
    import resource

    result = run_command(
        small_folder, *SMALL_RUN, "--output_dir", tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )  # fmt: skip
    error = failed_in_one_line(result)
    for part in ("a checkpoint of the last step", "the weights (", "the last lines of main.log: "):
        assert part in error
    said = re.sub(r"(?m)^can't (save step 12|keep the best weights): .*\n", "", events(result[1]))
    assert said == uninterrupted.events
    written = (tmp_path / "main.log").read_text()
    assert written.endswith("\n") and 80 < len(written) <= 100
    assert uninterrupted.state["log"].startswith(written)
    assert folder_content(tmp_path).keys() == {"main.log", "main.jsonl"}


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power cut, a name must not stand for data that never arrived: the file is synced
    before it is renamed, and the folder after that."""
    done, fsync, replace = [], os.fsync, os.replace

    def syncing(handle):
        paths = [tmp_path, *tmp_path.rglob("*")]
        (path,) = [path for path in paths if os.path.samestat(os.stat(path), os.fstat(handle))]
        size = os.fstat(handle).st_size if path.is_file() else 0
        done.append(("sync", path.name if path.is_file() else ".", size))
        fsync(handle)

    def renaming(old, new):
        done.append(("rename", os.path.relpath(old, tmp_path), os.path.relpath(new, tmp_path)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    gpt2.save_checkpoint(run_state(gpt2.GPT2(SMALL, 1, 4), tmp_path))
    [checkpoint] = checkpoints(tmp_path)
    temporary = checkpoint.name + ".tmp"
    assert done == [
        ("sync", temporary, checkpoint.stat().st_size),
        ("rename", temporary, checkpoint.name),
        ("sync", ".", 0),
    ]


# --------------------------------------------------------------------------------------------------
# What is kept, and who may read it


def test_the_last_two_checkpoints_are_kept(call_main, tmp_path):
    """Every third update makes one, and the end of each run."""
    kept = []
    for end in (2, 3, 6, 8, 12):
        flags = ("--checkpoint_every", 3, "--num_iterations", end, "--resume", int(end > 2))
        succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path, *flags))
        kept.append([step_of(path) for path in checkpoints(tmp_path)])
    assert kept == [[2], [2, 3], [3, 6], [6, 8], [9, 12]]


def test_only_what_is_named_like_a_checkpoint_is_pruned(call_main, tmp_path):
    """Names of one's own, copies, and what comes after the current step are not touched."""
    names = ["checkpoint_best.safetensors", "checkpoint_1.safetensors", "checkpoint_00000001.bin"]
    names += ["my_checkpoint_00000001.safetensors", "checkpoint_00000001.safetensors.bak"]
    names += ["checkpoint_99999999.safetensors"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint_00000002").mkdir()
    gpt2.save_checkpoint(run_state(gpt2.GPT2(SMALL, 1, 4), tmp_path))
    (tmp_path / "checkpoint_00000003.safetensors").write_text("old")
    (tmp_path / "checkpoint_00000004.safetensors").write_text("old")
    gpt2.save_checkpoint(run_state(gpt2.GPT2(SMALL, 1, 4), tmp_path))
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [4, 7, 99999999]
    assert (tmp_path / "checkpoint_00000002").is_dir()


def test_a_folder_of_any_name_is_a_folder(call_main, uninterrupted, tmp_path):
    """Brackets and stars mean something to glob, spaces and quotes to a shell."""
    folder = tmp_path / "a [1] * 'b' ö"
    flags = (*uninterrupted.flags, "--output_dir", folder)
    succeeded(call_main(*flags, "--num_iterations", 8, "--learning_rate_decay_frac", 1))
    stdout = succeeded(call_main(*flags, "--learning_rate_decay_frac", 1, "--resume", 1))
    assert f"resuming from {folder}/checkpoint_00000008.safetensors\n" in stdout
    assert [step_of(path) for path in checkpoints(folder)] == [11, 12]


def test_any_reader_of_safetensors_opens_a_checkpoint(uninterrupted, early):
    """The parameters by Hugging Face's names, and two rows of moments in the parameters' order."""
    path = checkpoints(early)[-1]
    found = read_plainly(path.read_bytes())
    sizes = {name: array.shape for name, array in found.items() if name.startswith("transformer.")}
    final = read_plainly((uninterrupted.folder / "model.safetensors").read_bytes())
    assert sizes == {name: array.shape for name, array in final.items()}
    assert set(found) - set(sizes) == {"m", "v", "crc32"}

    model = gpt2.load_checkpoint(str(path), {}, gpt2.one_process())[1]
    assert found["m"].tobytes() == model.flat[2].tobytes() and found["m"].any()
    assert found["v"].tobytes() == model.flat[3].tobytes() and found["v"].any()
    wte = found["transformer.wte.weight"]
    assert wte.tobytes() == model.params["wte"].tobytes() == model.flat[0, : wte.size].tobytes()
    assert (found[WQKV].T == model.params["qkvw"][2]).all()


def test_the_usual_library_opens_a_checkpoint(early):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    path = checkpoints(early)[-1]
    expected = read_plainly(path.read_bytes())
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] == expected[name]).all(), name


def test_a_checkpoint_is_a_model(call_main, uninterrupted, early, tmp_path):
    """It speaks like the weights of the same step; a stopped run's does; and it can be trained."""
    generate = ("--inference_only", 1, "--max_new_tokens", 20, "--prompt", "ab")

    def words_of(path):
        stdout = succeeded(call_main("--model", path, *generate))
        return stdout.splitlines()[2:]

    newest = checkpoints(uninterrupted.folder)[-1]
    assert words_of(newest) == words_of(uninterrupted.folder)
    assert words_of(checkpoints(early)[-1]) != words_of(newest)

    error = failed_in_one_line(call_main("--model", early, *generate))
    assert f"holds a run that was stopped: use --model {checkpoints(early)[-1]}" in error
    other = (*SMALL_RUN[2:], "--model", newest, "--output_dir", tmp_path / "other")
    assert "step 12/12" in succeeded(call_main(*other))
    model = gpt2.GPT2.from_pretrained(newest, 1, 8)
    assert model.config == SMALL and not model.flat[1:].any()


def test_a_folder_with_checkpoints_is_not_begun_anew(call_main, uninterrupted, early):
    before = folder_content(early)
    error = failed_in_one_line(call_main(*uninterrupted.flags, "--output_dir", early))
    assert f"{early} holds a run: go on with --resume 1" in error
    assert folder_content(early) == before


# --------------------------------------------------------------------------------------------------
# What may change, and what may not


def test_settings_that_contradict_the_run_are_refused_by_name(call_main, early):
    """Each alone; two at once; and values for which no model could be laid out."""
    before, was = folder_content(early), {**gpt2.DEFAULTS, **gpt2.parse_flags(SMALL_RUN)}
    was["total_batch_size"] = was["batch_size"] * was["sequence_length"]  # a run knows the number
    was["recompute"] = 1
    changes = []
    for name in gpt2.FLAGS_OF_A_RUN:
        more = {int: 1, float: 0.5, str: "x"}[type(was[name])]
        changes.append({name: was[name] + more})
    changes += [{"learning_rate": 3.0, "seed": 7}]
    changes += [{"sequence_length": 17}, {"batch_size": 10**6}]
    for change in changes:
        flags = [word for name, value in change.items() for word in (f"--{name}", value)]
        result = call_main(*SMALL_RUN, "--output_dir", early, "--resume", 1, *flags)
        named = ", ".join(
            f"--{name} {value!r} (it was {was[name]!r})" for name, value in change.items()
        )
        assert f"can't go on with {named}: " in failed_in_one_line(result)
        assert " is damaged" not in result[1]
    assert len(changes) > 16 and folder_content(early) == before


def test_what_may_change_may_change(call_main, small_folder, early):
    """A folder may change its name as well, and data its place."""
    shutil.copytree(small_folder, early / "data")
    flags = """--num_iterations 9 --val_loss_every 1 --val_max_steps 1 --sample_every 9
        --checkpoint_every 2 --hellaswag_eval 0 --hellaswag_limit 3
        --max_new_tokens 3 --temperature 0 --top_k 2 --prompt a --log_every 3""".split()
    flags += ["--input_bin", f"{early}/data/train_*.bin"]
    flags += ["--input_val_bin", f"{early}/data/val.bin"]
    changed = {flag[2:] for flag in flags[::2]} | {"output_dir", "resume"}
    assert changed == set(gpt2.FLAGS_THAT_MAY_CHANGE)
    stdout = succeeded(call_main("--output_dir", early, "--resume", 1, *flags))
    assert len(re.findall("(?m)^val loss ", stdout)) == 5  # after updates 5 to 9
    assert re.search(r"(?s)--- sample\na.{3}\n", stdout) and "step 9/9: " in stdout
    assert f"training data: {early}/data/train_*.bin, " in stdout
    there = early.with_name("there")
    os.rename(early, there)
    moved = ("--input_bin", there / "data/train_*.bin", "--input_val_bin", there / "data/val.bin")
    stdout = succeeded(
        call_main("--output_dir", there, "--resume", 1, "--num_iterations", 12, *moved)
    )
    assert "step 10/12: " in stdout and f"saved in {there}" in stdout
    assert [step_of(path) for path in checkpoints(there)] == [10, 12]  # every 2, as ordered before


def test_a_run_whose_flags_changed_is_saved_anew(call_main, early):
    """Or else the next one would go on with those of before."""
    flags = ("--output_dir", early, "--resume", 1)
    succeeded(call_main(*flags, "--num_iterations", 5, "--val_max_steps", 1))
    newest = checkpoints(early)[-1]
    settings = state_of(newest)["settings"]
    assert (settings["num_iterations"], settings["val_max_steps"]) == (5, 1)
    stdout = succeeded(call_main(*flags))
    assert step_of(newest) == 5 and "step 6/" not in stdout


def test_a_checkpoint_of_the_same_step_and_flags_is_not_written_again(call_main, tmp_path):
    """It may have many gigabytes."""
    flags = (*SMALL_RUN, "--output_dir", tmp_path)
    succeeded(call_main(*flags))
    [checkpoint] = checkpoints(tmp_path)
    before = checkpoint.stat()
    for again in ((*flags, "--resume", 1), ("--output_dir", tmp_path, "--resume", 1)):
        succeeded(call_main(*again))
        after = checkpoint.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_machine_too_small_to_go_on_is_not_called_damage(
    call_main, uninterrupted, early, monkeypatch
):
    before = folder_content(early)
    monkeypatch.setattr(gpt2, "available_memory", lambda: 1000)
    result = call_main(*uninterrupted.flags, "--output_dir", early, "--resume", 1)
    assert ", 0 MB are free: " in failed_in_one_line(result) and " is damaged" not in result[1]
    assert folder_content(early) == before


# ---- The data


@pytest.fixture
def with_data(call_main, uninterrupted, small_folder, tmp_path, monkeypatch):
    """A folder with the data of a run, and in `run` what it left when killed."""
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True)
    shutil.copytree(uninterrupted.early, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


GO_ON = ("--output_dir", "run", "--resume", 1)


@pytest.mark.parametrize("counts", [(100, 60), (61, 100), (161,), (100, 61, 20)])
def test_other_training_data_than_the_run_began_with_is_refused(call_main, with_data, counts):
    """... also as many tokens, cut into other shards: a position in them means something else."""
    tokens = []
    for name in ("train_0.bin", "train_1.bin"):
        tokens += np.fromfile(name, "<u2", offset=1024).tolist()
        os.remove(name)
    tokens += tokens
    for i, count in enumerate(counts):
        write_token_file(with_data / f"train_{i}.bin", tokens[:count])
        del tokens[:count]
    before = folder_content(with_data / "run")
    result = call_main(*GO_ON)
    error = failed_in_one_line(result)
    assert "the training data has changed since this run began: put it back" in error
    assert folder_content(with_data / "run") == before and " is damaged" not in result[1]


@pytest.mark.parametrize("what, name", [("training", "train_1.bin"), ("validation", "val.bin")])
def test_one_other_token_is_other_data(call_main, uninterrupted, with_data, what, name):
    data = (with_data / name).read_bytes()
    (with_data / name).write_bytes(flipped(data, 1024 + 2 * 50))
    error = failed_in_one_line(call_main(*GO_ON))
    assert f"the {what} data has changed since this run began" in error
    (with_data / name).write_bytes(data)
    succeeded(call_main(*GO_ON))
    assert whole_state(with_data / "run") == uninterrupted.state


def test_data_that_is_gone_is_named(call_main, with_data):
    os.remove("val.bin")
    assert "val.bin: no such token file" in failed_in_one_line(call_main(*GO_ON))


@pytest.mark.parametrize("moved", [("train",), ("val",), ("train", "val")])
def test_data_may_lie_elsewhere(call_main, uninterrupted, with_data, moved):
    """It is known by its content: what is named is taken, and the next one finds it there."""
    flags = {"train": ("--input_bin", "new/train_*"), "val": ("--input_val_bin", "new/val.bin")}
    (with_data / "new").mkdir()
    for path in with_data.glob("*.bin"):
        if path.name.startswith(moved):
            path.rename(with_data / "new" / path.name)
    failed_in_one_line(call_main(*GO_ON))
    named = [word for what in moved for word in flags[what]]
    stdout = succeeded(call_main(*GO_ON, *named))
    assert whole_state(with_data / "run") == uninterrupted.state
    assert ("\ntraining data: new/train_*, 161 tokens\n" in stdout) == ("train" in moved)
    assert ("\nvalidation data: new/val.bin, 70 tokens\n" in stdout) == ("val" in moved)
    assert "val loss" in succeeded(call_main(*GO_ON))


def test_other_data_than_the_runs_is_refused_where_it_is_named(call_main, with_data):
    write_token_file(with_data / "other.bin", [97] * 161)
    for flag, what in (("--input_bin", "training"), ("--input_val_bin", "validation")):
        error = failed_in_one_line(call_main(*GO_ON, flag, "other.bin"))
        assert f"the {what} data has changed" in error


def test_validation_that_is_asked_for_later_is_remembered_from_then_on(call_main, with_data):
    """A run without validation has none to compare with; one that stops validating keeps it."""
    shutil.rmtree("run")
    flags = (*SMALL_RUN, "--learning_rate_decay_frac", 1, "--num_iterations")
    begin = (*flags, 3, "--val_loss_every", 0, "--output_dir", "run")
    assert "validation data" not in succeeded(call_main(*begin))
    more = ("--num_iterations", 4, "--val_loss_every", 1)
    assert "\nval loss" in succeeded(call_main(*GO_ON, *more))
    without = ("--num_iterations", 5, "--val_loss_every", 0)
    assert "\nval loss" not in succeeded(call_main(*GO_ON, *without))
    data = state_of(checkpoints(with_data / "run")[-1])["data"]
    assert [count for count, _ in data["training"]] == [100, 61]
    assert [count for count, _ in data["validation"]] == [70]
    write_token_file(with_data / "val.bin", [97] * 70)
    error = failed_in_one_line(call_main(*GO_ON, "--val_loss_every", 1))
    assert "the validation data has changed" in error


# --------------------------------------------------------------------------------------------------
# Others


@posix_only
def test_two_runs_do_not_share_a_folder(small_folder, tmp_path):
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--sample_every", 0, "--val_loss_every", 0)
    with running_command(small_folder, *flags, "--num_iterations", 10**9) as first:
        read_up_to(first, "step 2/")
        for more in ((), ("--resume", 1)):
            error = failed_in_one_line(run_command(small_folder, *flags, *more))
            assert f"{tmp_path}: another run is writing there" in error
        assert folder_content(tmp_path).keys() == {"main.log", "main.jsonl"}
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


def test_a_run_outlives_the_want_of_a_vocabulary(small_folder, tmp_path, monkeypatch, capsys):
    """Where a sample can't be put into words, the run says why, goes on, and keeps what it
    learned."""

    def no_words(vocab_size):
        raise InputError("no vocabulary here")

    monkeypatch.chdir(small_folder)
    monkeypatch.setattr(gpt2, "tokenizer", no_words)
    assert gpt2.main([*SMALL_RUN, "--output_dir", str(tmp_path)]) == 0
    stdout = capsys.readouterr().out
    assert stdout.count("no vocabulary here; so there will be no samples\n") == 1
    assert "--- sample" not in stdout
    assert (tmp_path / "model.safetensors").exists()
