"""What a person's own next command does to what was trained, and what else a user trips over."""

import copy
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from common import (
    FINISHED,
    NO_NETWORK,
    SMALL,
    SMALL_RUN,
    TRAINER,
    checkpoints,
    events,
    failed_in_one_line,
    folder_content,
    header_of,
    joined,
    pack_safetensors,
    posix_only,
    run_command,
    state_of,
    succeeded,
    train_losses,
    with_right_checksum,
    write_token_file,
)

import train_gpt2 as gpt2
from train_gpt2 import InputError

TOP = Path(TRAINER).parent


def in_order(text, *parts):
    """Whether the parts stand in a text, one after the other."""
    position = 0
    for part in parts:
        position = text.find(part, position)
        if position < 0:
            return False
    return True


# --------------------------------------------------------------------------------------------------
# The matrix: the state of --output_dir, and the command


def finished(folder, call):
    succeeded(call(*SMALL_RUN, "--output_dir", folder))


def only_weights(folder, call):
    """A finished run whose checkpoints somebody has deleted."""
    finished(folder, call)
    for checkpoint in checkpoints(folder):
        checkpoint.unlink()


def stopped(folder, call):
    succeeded(call(*SMALL_RUN, "--output_dir", folder, "--num_iterations", 5))
    for name in FINISHED:
        (folder / name).unlink()


def only_a_checkpoint(folder, call):
    """Copied from elsewhere, one file alone."""
    stopped(folder, call)
    (folder / "main.log").unlink()
    (folder / ".lock").unlink()


def stopped_early(folder, call):
    """Killed before its first checkpoint: there is a log, and nothing else."""
    folder.mkdir()
    (folder / "main.log").write_text("s:0 tel:5.5000\ns:1 trl:5.4000\n")


def half_saved(folder, call):
    """Killed while it wrote its first checkpoint."""
    stopped_early(folder, call)
    (folder / "checkpoint_00000003.safetensors.tmp").write_bytes(bytes(1000))


def damaged(folder, call):
    stopped(folder, call)
    for path in checkpoints(folder):
        path.write_bytes(path.read_bytes()[:-100])


def another_model(folder, call):
    """What save_pretrained leaves, or a download of Hugging Face's."""
    gpt2.GPT2(gpt2.GPT2Config(16, 256, 1, 2, 8), 1, 1).save_pretrained(folder)


def other_files(folder, call):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint_best").mkdir()
    (folder / "checkpoint_best" / "notes.txt").write_text("mine too")


STATES = {
    "missing": lambda folder, call: None,
    "empty": lambda folder, call: folder.mkdir(),
    "finished": finished,
    "only weights": only_weights,
    "stopped": stopped,
    "only a checkpoint": only_a_checkpoint,
    "stopped early": stopped_early,
    "half saved": half_saved,
    "damaged": damaged,
    "another model": another_model,
    "other files": other_files,
}
COMMANDS = {
    "train": (*SMALL_RUN, "--output_dir", "{}"),
    "resume": (*SMALL_RUN, "--output_dir", "{}", "--resume", 1),
    "generate": ("--model", "{}", "--inference_only", 1, "--max_new_tokens", 3),
}
USED = "holds a run: go on with --resume 1, or choose another --output_dir"
NO_MODEL = "holds no model.safetensors"
STOPPED = "holds a run that was stopped: use --model"
WHAT_HAPPENS = {  # None: all goes well; else what the one line of the error says
    ("missing", "train"): None,
    ("missing", "resume"): None,
    ("missing", "generate"): "no such model",
    ("empty", "train"): None,
    ("empty", "resume"): None,
    ("empty", "generate"): NO_MODEL,
    ("finished", "train"): USED,
    ("finished", "resume"): None,
    ("finished", "generate"): None,
    ("only weights", "train"): USED,
    ("only weights", "resume"): "fine-tune from them with --model",
    ("only weights", "generate"): None,
    ("stopped", "train"): USED,
    ("stopped", "resume"): None,
    ("stopped", "generate"): STOPPED,
    ("only a checkpoint", "train"): USED,
    ("only a checkpoint", "resume"): None,
    ("only a checkpoint", "generate"): STOPPED,
    ("stopped early", "train"): USED,
    ("stopped early", "resume"): None,
    ("stopped early", "generate"): NO_MODEL,
    ("half saved", "train"): USED,
    ("half saved", "resume"): None,
    ("half saved", "generate"): NO_MODEL,
    ("damaged", "train"): USED,
    ("damaged", "resume"): "is whole: choose another --output_dir",
    ("damaged", "generate"): STOPPED,
    ("another model", "train"): USED,
    ("another model", "resume"): "fine-tune from them with --model",
    ("another model", "generate"): None,
    ("other files", "train"): None,
    ("other files", "resume"): None,
    ("other files", "generate"): NO_MODEL,
}
MAY_BE_REWRITTEN = {  # by a run that goes on
    "main.jsonl", "main.log", ".lock", *FINISHED, *(f"best/{name}" for name in FINISHED),
}  # fmt: skip


@pytest.mark.parametrize("state, command", WHAT_HAPPENS, ids=map("-".join, WHAT_HAPPENS))
def test_every_command_on_every_folder(state, command, call_main, tmp_path):
    folder = tmp_path / "o"
    STATES[state](folder, call_main)
    before = folder_content(folder) if folder.exists() else {}
    flags = [str(flag).format(folder) for flag in COMMANDS[command]]
    result = call_main(*flags)
    expected = WHAT_HAPPENS[state, command]
    after = folder_content(folder) if folder.exists() else {}
    after_names = set(after)

    if expected is None:
        assert result[0] == 0 and not result[2], result
    else:
        assert expected in failed_in_one_line(result)
        assert "step " not in result[1] and after_names - {".lock"} == set(before) - {".lock"}

    goes_on = command == "resume" and expected is None
    for name, content in before.items():
        if name in after:
            changed = after[name] != content
            assert not changed or goes_on and os.path.basename(name) in MAY_BE_REWRITTEN, name
        else:  # only the older checkpoints of a run that went on may be gone
            assert goes_on and name.startswith("checkpoint_0"), name
    if goes_on or command == "train" and expected is None:
        assert {"checkpoint_00000012.safetensors", "main.log", *FINISHED} <= after_names
        assert not any(name.endswith(".tmp") for name in after_names)


def test_the_matrix_is_whole():
    assert set(WHAT_HAPPENS) == {(state, command) for state in STATES for command in COMMANDS}


# --------------------------------------------------------------------------------------------------
# A run that ended, and the next command


def test_a_used_folder_is_refused_before_anything_is_fetched(tmp_path):
    """Without data or network: the refusal comes before either is missed."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "main.log").write_text("s:0 tel:5.5000\n")
    result = run_command(tmp_path, "--output_dir", "o", "--seed", 7)
    assert USED in failed_in_one_line(result) and result[1] == ""
    assert (tmp_path / "o" / "main.log").read_text() == "s:0 tel:5.5000\n"


def test_ten_more_updates_please(call_main, tmp_path):
    """A run without --checkpoint_every, run to its end, goes on as one that was longer."""
    flags = (*SMALL_RUN, "--learning_rate_decay_frac", 1, "--output_dir")
    succeeded(call_main(*flags, tmp_path / "short"))
    more = succeeded(call_main(*flags, tmp_path / "short", "--resume", 1, "--num_iterations", 22))
    whole = succeeded(call_main(*flags, tmp_path / "whole", "--num_iterations", 22))
    assert train_losses(more) == train_losses(whole)[12:]
    weights = [tmp_path / name / "model.safetensors" for name in ("short", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_nothing_falls_back_when_a_folder_is_named(call_main, tmp_path):
    """--resume 1 without --model on a finished run, with no network: the run goes on as it was."""
    succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "o"))
    stdout = succeeded(call_main("--output_dir", tmp_path / "o", "--resume", 1))
    assert "from scratch" not in stdout and "channels 16" in stdout


def test_the_run_that_falls_back_is_kept_as_well(call_main, tmp_path):
    """Nothing was asked for by name but where to keep it; and it goes on as what it was."""
    flags = ("--output_dir", tmp_path / "o")
    short = ("--val_max_steps", 1, "--max_new_tokens", 3, "--num_iterations")
    stdout = succeeded(call_main(*flags, *short, 1))
    assert "--> so a small GPT will learn from scratch, by bytes\n" in stdout
    assert "saved in" in stdout and "channels 128" in stdout
    stdout = succeeded(call_main(*flags, "--resume", 1, "--num_iterations", 2))
    assert "from scratch" not in stdout and "\nstep 2/2: " in stdout and "channels 128" in stdout


def test_a_signal_after_the_last_validation_repeats_it_and_logs_it_once(
    call_main, tmp_path, monkeypatch
):
    flags = (*SMALL_RUN, "--sample_every", 0, "--output_dir", tmp_path / "o")
    add = gpt2.Log.add

    def and_a_signal(self, step, **values):
        add(self, step, **values)
        if step == 12 and "val_loss" in values:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(gpt2.Log, "add", and_a_signal)
    code, first, _ = call_main(*flags)
    monkeypatch.setattr(gpt2.Log, "add", add)
    assert code == 130 and first.count("\nval loss") == 4
    lines = (tmp_path / "o" / "main.log").read_text()
    second = succeeded(call_main(*flags, "--resume", 1))
    [again] = [line for line in second.splitlines() if line.startswith("val loss")]
    assert f"\n{again}\n" in first and "saved in" in second
    assert (tmp_path / "o" / "main.log").read_text() == lines


def test_handlers_are_as_they_were_and_a_thread_may_call_main(call_main):
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGPIPE")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = [signal.getsignal(number) for number in numbers]
    codes = []
    flags = [str(flag) for flag in (*SMALL_RUN, "--num_iterations", 1)]
    thread = threading.Thread(target=lambda: codes.append(gpt2.main(flags)))
    thread.start()
    thread.join()
    assert gpt2.main(flags) == 0 and codes == [0]
    assert [signal.getsignal(number) for number in numbers] == before


@posix_only
@pytest.mark.parametrize("what", ["validate", "print_sample"])
def test_ctrl_c_does_not_wait_for_a_validation_or_a_sample(what, call_main, tmp_path, monkeypatch):
    """The signal comes in its first part. The checkpoint says that it is still to be done."""
    calls = []

    def hooked(*arguments, **named):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **named)

    if what == "validate":
        original = gpt2.GPT2.forward
        monkeypatch.setattr(gpt2.GPT2, "forward", hooked)
    else:
        original = gpt2.sample
        monkeypatch.setattr(gpt2, "sample", hooked)
    flags = (*SMALL_RUN, "--val_max_steps", 50, "--max_new_tokens", 50, "--output_dir")
    code, stdout, _ = call_main(*flags, tmp_path / "o")
    assert code == 130 and len(calls) == 1
    steps = 0 if what == "validate" else 4
    assert stdout.count("\nstep ") == steps and stdout.count("\nval loss") == steps / 4 * 2
    monkeypatch.undo()


# --------------------------------------------------------------------------------------------------
# Input that is not what it should be


def forge(path, state=None, metadata=None):
    """Change what stands in a checkpoint, with the right checksum."""
    data = path.read_bytes()
    header, end = header_of(data)
    if state is not None:
        header["__metadata__"]["state"] = json.dumps(state_of(path) | state)
    header["__metadata__"] |= metadata or {}
    path.write_bytes(with_right_checksum(pack_safetensors(header, data[end:])))


@pytest.fixture
def one_checkpoint(call_main, tmp_path):
    """(path, resume): of a run with one checkpoint, and a function that goes on with it."""
    flags = ("--output_dir", tmp_path / "o")
    succeeded(call_main(*SMALL_RUN, *flags, "--num_iterations", 3))
    [path] = checkpoints(tmp_path / "o")
    return path, lambda: call_main(*flags, "--resume", 1)


def test_a_forged_checkpoint_is_one_if_all_is_right(one_checkpoint):
    """Or else the tests below would prove nothing."""
    path, resume = one_checkpoint
    forge(path, {"settings": state_of(path)["settings"] | {"num_iterations": 4}}, {"more": "x"})
    assert "\nstep 4/4: " in succeeded(resume())


ODD_VALUES = [None, "x", -1, 1.5, [], [1, 2, 3, 4], {}, [None], ["a", "b"], True, [[1]], 1 << 70]
ODD_VALUES += [[0, 0, 1.5], [9, 0, 0], [0, 10**6, 0], [0, -8, 0], "9" * 5000, {"training": 7}]


@pytest.mark.parametrize("name", ["step", "position", "data", "settings"])
def test_a_forged_state_is_refused_in_one_line(name, one_checkpoint):
    path, resume = one_checkpoint
    original = path.read_bytes()
    for value in ODD_VALUES:
        if name == "data" and value == {}:
            continue  # of a run that knows nothing of its data
        forge(path, {name: value})
        before = folder_content(path.parent)
        failed_in_one_line(resume())
        assert folder_content(path.parent) == before, value
        path.write_bytes(original)


@pytest.mark.parametrize("name", ["step", "position", "data", "settings"])
def test_a_state_that_lacks_something_is_refused_in_one_line(name, one_checkpoint):
    path, resume = one_checkpoint
    state = state_of(path)
    del state[name]
    forge(path, metadata={"state": json.dumps(state)})
    assert "is whole" in failed_in_one_line(resume())


@pytest.mark.parametrize(
    "state",
    [None, 5, "", "[]", "{}", "null", "{", "\ud800", '{"step": NaN}', "[" * 100_000, "9" * 5000],
    ids=lambda state: ascii(state)[:20],
)
def test_a_state_that_is_none_is_refused_in_one_line(state, one_checkpoint):
    path, resume = one_checkpoint
    forge(path, metadata={"state": state})
    result = resume()
    assert "is whole" in failed_in_one_line(result) and " is damaged: " in result[1]


@pytest.mark.parametrize(
    "n_head",
    [None, 2.5, [2], "", "0", "3", "-2", "two", "9" * 5000],
    ids=lambda n_head: ascii(n_head)[:20],
)
def test_forged_heads_are_refused_in_one_line(n_head, one_checkpoint):
    path, resume = one_checkpoint
    (path.parent / "config.json").unlink()  # which would say it
    forge(path, metadata={"n_head": n_head})
    assert "is whole" in failed_in_one_line(resume())


@pytest.mark.parametrize("setting", ["batch_size", "sequence_length", "learning_rate", "recompute"])
@pytest.mark.parametrize("value", [None, [1], {}, "seven", -3, 7.5, 1 << 70, True, "\ud800", "--"])
def test_a_forged_setting_is_refused_in_one_line(setting, value, one_checkpoint):
    path, resume = one_checkpoint
    forge(path, {"settings": state_of(path)["settings"] | {setting: value}})
    if (setting, value) == ("learning_rate", 7.5):
        assert resume()[0] == 0
    else:
        assert "is whole" in failed_in_one_line(resume())


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": 7},
        {"inference_only": 1},
        {"total_batch_size": 3},
        {"sequence_length": 17},
        {"batch_size": 10**9},
        {"batch_size": 10**18},
        {"num_iterations": "--"},
        {"no_such_flag": 1},
        {"help": 1},
        {"help": ""},
        {"h": ""},
        {"": ""},
    ],
    ids=str,
)
def test_settings_that_make_no_run_are_refused_in_one_line(changes, one_checkpoint):
    path, resume = one_checkpoint
    forge(path, {"settings": state_of(path)["settings"] | changes})
    before = folder_content(path.parent)
    result = resume()
    failed_in_one_line(result)
    assert "\nstep " not in result[1] and "usage" not in result[1]
    assert folder_content(path.parent) == before


def test_half_a_character_in_a_text_of_the_settings_harms_nothing(one_checkpoint):
    """JSON can spell what no encoding can write."""
    path, resume = one_checkpoint
    settings = {"model": "\ud800", "prompt": "\udcff", "num_iterations": 4, "sample_every": 1}
    forge(path, {"settings": state_of(path)["settings"] | settings})
    assert "\nstep 4/4: " in succeeded(resume())


@pytest.mark.parametrize(
    "flags",
    [
        "--learning_rate nan",
        "--batch_size 0",
        "--prompt=--",
        "--no_such_flag 1",
        "--num_iterations",
        "--temperature inf",
        "--recompute 7",
    ],
)
def test_a_refused_flag_is_one_line_that_names_help(flags, tmp_path):
    code, stdout, error = run_command(tmp_path, *flags.split())
    assert code == 2 and stdout == "" and error.count("\n") == 1 and "--help" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--checkpoint_every 5", "--checkpoint_every needs --output_dir"),
        ("--resume 1", "--resume needs --output_dir"),
        ("--prompt= --inference_only 1", "--prompt is empty"),
    ],
)
def test_flags_that_can_not_be_meant(flags, message, tmp_path):
    assert message in failed_in_one_line(run_command(tmp_path, *flags.split()))


@posix_only
@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "pipe.safetensors", "--inference_only", 1],
        ["--model", "pipe.bin", "--inference_only", 1],
        [*SMALL_RUN, "--input_bin", "pipe.bin"],
        ["--model", "folder", "--inference_only", 1],
    ],
    ids=["safetensors", "llm.c", "tokens", "config.json"],
)
def test_a_pipe_does_not_make_it_wait_for_ever(flags, small_folder, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(small_folder, here)
    (here / "folder").mkdir()
    for name in ("pipe.safetensors", "pipe.bin", "folder/config.json", "folder/model.safetensors"):
        os.mkfifo(here / name)
    error = failed_in_one_line(run_command(here, *flags))
    assert "found a folder, a pipe or a device" in error


def test_sizes_that_make_no_model_name_the_file(tmp_path):
    model = gpt2.GPT2(SMALL, 1, 1)
    model.save_pretrained(tmp_path)
    weights = str(tmp_path / "model.safetensors")  # of another writer, who says nothing of heads
    gpt2.write_safetensors(weights, gpt2.huggingface_tensors(model.params), {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_head": 3}))
    with pytest.raises(InputError, match="(?s)" + str(tmp_path) + ".*16 channels.*3 heads"):
        gpt2.GPT2.from_pretrained(tmp_path)


def test_a_token_beyond_the_vocabulary_in_a_later_shard_is_found_at_the_start(
    call_main, small_folder, tmp_path, monkeypatch
):
    shutil.copytree(small_folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    write_token_file(tmp_path / "here" / "train_1.bin", [*range(97, 150), 256, *range(97, 120)])
    result = call_main(*SMALL_RUN, "--output_dir", "o")
    error = failed_in_one_line(result)
    assert "train_1.bin: its tokens are unknown, up to 256, and those of the model are" in error
    assert "step" not in result[1]


def test_nothing_of_a_validation_file_is_needed_without_validation(call_main, tmp_path):
    flags = (*SMALL_RUN, "--val_loss_every", 0, "--num_iterations", 2, "--input_val_bin", "none")
    assert "val loss" not in succeeded(call_main(*flags))


def test_divergence_prints_no_warnings_of_numpys(small_folder):
    flags = (*SMALL_RUN, "--learning_rate", 1e6, "--grad_clip", 0)
    _, stdout, error = run_command(small_folder, *flags)
    assert "Warning" not in stdout + error and error.count("\n") == 1


def test_generation_stops_when_nobody_reads(small_folder):
    """| head: the process is gone long before the text would be."""
    flags = "--model model --inference_only 1 --max_new_tokens 100000000"
    command = f"{shlex.quote(sys.executable)} {shlex.quote(TRAINER)} {flags} | head -c 200"
    began = time.monotonic()
    subprocess.run(command, shell=True, cwd=small_folder, capture_output=True, timeout=60)
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("value", ["auto", "", "0", "-3", "4,2", "2.5"])
def test_odd_numbers_of_threads_are_no_traceback(value, small_folder):
    environment = {"OPENBLAS_NUM_THREADS": value, "OMP_NUM_THREADS": value}
    flags = (*SMALL_RUN, "--num_iterations", 1)
    assert "1 updates" in succeeded(run_command(small_folder, *flags, env=environment))


# --------------------------------------------------------------------------------------------------
# Large models


def test_a_model_that_only_generates_asks_for_no_more_than_it_uses():
    """d48 is GPT-2 XL: 6.2 GB of weights, where training would take four times that."""
    L, C = gpt2.FRESH["d48"]
    config = gpt2.GPT2Config(num_layers=L, num_heads=C // 64, channels=C)
    args = gpt2.settings({"inference_only": 1, "batch_size": 1, "sequence_length": 1024})
    plan = gpt2.memory_plan(args, config)
    assert set(plan) == {"parameters", "activations"}
    model = gpt2.GPT2(config, 1, 1024, seed=None, training=False)  # pages of zeros cost nothing
    assert model.blob.nbytes == sum(plan.values()) < 8e9
    assert model.grads == model.m == model.v == {}


# --------------------------------------------------------------------------------------------------
# What lives says so


ALIVE = """
import sys, time
sys.path.insert(0, {top!r})
import train_gpt2
with train_gpt2.Progress("reading a model"):
    time.sleep(3.3)
with train_gpt2.Progress("validating") as progress:
    progress.done = 0.5
    time.sleep(2.3)
with train_gpt2.Progress("quick"):
    pass
"""


@posix_only
def test_on_a_terminal_what_takes_long_says_so_and_in_a_pipe_nothing_does():
    import pty

    command = [sys.executable, "-c", ALIVE.format(top=str(TOP))]
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ours, theirs = pty.openpty()
    subprocess.run(command, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    assert in_order(shown, "reading a model: 2 s", "validating: 2 s, 2 s left", "\033[K")
    assert "quick" not in shown
    assert piped.communicate() == (b"", b"") and piped.returncode == 0


def test_all_that_may_take_long_is_announced(call_main, tmp_path, monkeypatch):
    announced = []
    init = gpt2.Progress.__init__

    def remember(self, what):
        announced.append(self)
        init(self, what)

    monkeypatch.setattr(gpt2.Progress, "__init__", remember)
    succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "o", "--num_iterations", 2))
    names = [progress.what for progress in announced]
    expected = ["reading model", "checking the training tokens", "checking the validation tokens"]
    expected += ["validating", "step 1/2", "step 2/2, 0:00 left", "validating"]
    expected += [f"saving to {tmp_path / 'o' / 'best'}", f"saving to {tmp_path / 'o'}"]
    assert names == expected
    announced.clear()
    succeeded(call_main("--output_dir", tmp_path / "o", "--resume", 1))
    assert announced[0].what == f"reading {checkpoints(tmp_path / 'o')[-1]}"


# --------------------------------------------------------------------------------------------------
# A notebook's habits


def test_paths_numpy_integers_and_seeds(tmp_path):
    config = gpt2.GPT2Config(*np.array([16, 256, 2, 2, 16]))
    assert config == gpt2.GPT2Config(16, 256, 2, 2, 16)
    gpt2.GPT2(config, 1, 8).save_pretrained(tmp_path)
    model = gpt2.GPT2.from_pretrained(Path(tmp_path), 1, 8)
    found = [list(model.generate([1], 5, rng=rng)) for rng in (42, np.random.default_rng(42))]
    assert found[0] == found[1]


def test_a_copy_is_a_model_of_its_own():
    model = gpt2.GPT2(SMALL, 1, 8)
    twin = copy.deepcopy(model)
    twin.params["wte"][...] = 7
    assert (twin.flat[0, :256] == 7).all() and not (model.params["wte"] == 7).any()


# --------------------------------------------------------------------------------------------------
# A text of one's own, and no network

TEXT = "To be, or not to be, that is the question:\n" * 60


@pytest.fixture
def offline(tmp_path):
    """run(program, *flags) in a folder with a text of one's own, without a network."""
    (tmp_path / "my.txt").write_text(TEXT)

    def run(program, *flags):
        environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "no vocabulary")}
        return run_command(tmp_path, *flags, program=[str(TOP / program)], env=environment)

    return run


SHORT = ("--num_iterations", 3, "--val_max_steps", 1, "--sample_every", 0, "--batch_size", 2)
MINE = ("--input_bin", "data/my_train.bin", "--input_val_bin", "data/my_val.bin")


def test_a_text_by_bytes_without_a_network(offline, tmp_path):
    stdout = succeeded(offline("prepro_tinyshakespeare.py", "--input", "my.txt", "--bytes", 1))
    assert "data/my_train.bin" in stdout
    paths = [str(tmp_path / "data" / f"my_{name}.bin") for name in ("val", "train")]
    tokens = [gpt2.TokenFile(path) for path in paths]
    assert tokens[0].vocab_size == tokens[1].vocab_size == 256
    both = np.concatenate([part[:] for part in tokens])
    assert both.astype(np.uint8).tobytes() == TEXT.encode()

    run = ("train_gpt2.py", *MINE, *SHORT)
    assert "channels 128" in succeeded(offline(*run, "--model", "bytes", "--output_dir", "o"))
    assert "step 3/3" in succeeded(offline(*run, "--model", "o"))  # a folder of such a model


def test_the_small_model_of_bytes_without_any_data(offline):
    stdout = succeeded(offline("train_gpt2.py", "--model", "bytes", *SHORT))
    assert "channels 128" in stdout and "can't fetch" not in stdout


def test_whose_vocabulary_is_bytes_is_said(offline, tmp_path):
    """A model of GPT-2's tokens on bytes, and a model of bytes on GPT-2's tokens."""
    succeeded(offline("prepro_tinyshakespeare.py", "--input", "my.txt", "--bytes", 1))
    result = offline("train_gpt2.py", *MINE, *SHORT, "--model", "d6", "--batch_size", 1)
    error = failed_in_one_line(result)
    assert "its tokens are bytes, up to 117, and those of the model are GPT-2's: write" in error
    write_token_file(tmp_path / "data" / "my_train.bin", [*range(40_000, 40_300)])
    result = offline("train_gpt2.py", *MINE, *SHORT, "--model", "bytes")
    error = failed_in_one_line(result)
    assert "its tokens are unknown, up to 40299, and those of the model are bytes: write" in error
    assert "--bytes 1" in error


@pytest.mark.parametrize(
    "program, flags",
    [
        ("prepro_tinyshakespeare.py", []),
        ("prepro_tinyshakespeare.py", ["--input", "my.txt"]),
        ("train_gpt2.py", ["--model", "gpt2", *MINE]),
        ("train_gpt2.py", ["--model", "d6"]),
    ],
    ids=["text", "vocabulary", "weights", "text of d6"],
)
def test_what_is_missing_names_the_way_without_a_network(program, flags, offline):
    code, _, error = offline(program, *flags)
    assert code == 1 and error.splitlines()[-1].startswith("error: ")
    assert "--bytes 1" in error and "--model bytes" in error


def test_two_texts_of_one_name_do_not_replace_each_other(offline, tmp_path):
    by_bytes = ("--bytes", 1)
    succeeded(offline("prepro_tinyshakespeare.py", "--input", "my.txt", *by_bytes))
    before = folder_content(tmp_path / "data")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "my.txt").write_text(TEXT.upper())
    result = offline("prepro_tinyshakespeare.py", "--input", "sub/my.txt", *by_bytes)
    assert "choose another --output_prefix" in failed_in_one_line(result)
    assert folder_content(tmp_path / "data") == before
    again = offline("prepro_tinyshakespeare.py", "--input", "my.txt", *by_bytes)
    assert "data/my_train.bin" in succeeded(again)  # the same once more is no conflict
    other = ("--output_prefix", "data/upper")
    succeeded(offline("prepro_tinyshakespeare.py", "--input", "sub/my.txt", *by_bytes, *other))


def test_data_beside_the_script_is_found_from_another_folder(tmp_path):
    """The project, copied elsewhere with data/ in it, and started from a folder without data/."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "data").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("train_gpt2.py", "prepro_tinyshakespeare.py"):
        shutil.copy(TOP / name, project)
    for name in ("train", "val"):
        path = project / "data" / f"tiny_shakespeare_{name}.bin"
        write_token_file(path, [97] * 400, vocab_size=256)
    done = subprocess.run(
        [sys.executable, str(project / "train_gpt2.py"), "--model", "d6", "--batch_size", "1"],
        cwd=elsewhere, env={**os.environ, **NO_NETWORK}, capture_output=True, text=True,
    )  # fmt: skip
    found = str(project / "data" / "tiny_shakespeare_train.bin")
    assert f"{found}: its tokens are bytes" in done.stderr, done.stderr


# --------------------------------------------------------------------------------------------------
# The README's commands, twice in a row


def readme_commands():
    """The commands of the README that run the two programs, in its order."""
    lines = (TOP / "README.md").read_text(encoding="utf-8").splitlines()
    programs = ("train_gpt2.py", "prepro_tinyshakespeare.py")
    commands = []
    for line in lines:
        if not line.startswith(("    python ", "    pip ")):
            continue  # what they print stands there too
        for part in line.strip().split("&&"):
            words = shlex.split(part)
            if words[0] == "python" and words[1] in programs:
                commands.append(words[1:])
    return commands


def test_the_readme_names_commands():
    programs = [words[0] for words in readme_commands()]
    assert programs.count("train_gpt2.py") >= 3


def test_the_readme_shows_lines_of_the_file():
    text = (TOP / "README.md").read_text(encoding="utf-8")
    shown = text.split("```python\n")[1].split("```")[0].splitlines()
    lines = [line.strip() for line in Path(TRAINER).read_text(encoding="utf-8").splitlines()]
    assert [line for line in shown if line and line.strip() not in lines] == []
    assert len(text.splitlines()) <= 150


def shortened(words):
    """A command of the README with fewer updates, on a model of bytes in place of a large one."""
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    if words[0] == "train_gpt2.py":
        if flags.get("--model") in ("d6", "gpt2"):
            flags["--model"] = "bytes"
        for name, value in (("--num_iterations", "4"), ("--max_new_tokens", "4")):
            flags[name] = value
        flags |= {"--batch_size": "2", "--val_max_steps": "1", "--warmup_iters": "0"}
    return [words[0], *(word for pair in flags.items() for word in pair)]


def test_the_readmes_commands_twice_in_a_row(tmp_path):
    """Without a network. Each ends as it should, and none destroys what another made."""
    (tmp_path / "my.txt").write_text(TEXT)
    seen = {}
    for again in (False, True):
        for words in readme_commands():
            program, *flags = shortened(words)
            code, _, error = run_command(tmp_path, *flags, program=[str(TOP / program)])
            assert "Traceback" not in error
            refused = again and "--output_dir" in flags and "--resume" not in flags
            if refused:
                assert code == 1 and USED in error
            elif code != 0:
                assert code == 1 and "without a network" in error, (words, error)
            for name, content in seen.items():
                kept = (tmp_path / name).exists() and (tmp_path / name).read_bytes() == content
                assert kept or os.path.basename(name) in MAY_BE_REWRITTEN, (words, name)
            seen = {
                str(path.relative_to(tmp_path)): path.read_bytes()
                for path in tmp_path.rglob("*")
                if path.is_file() and path.name != ".lock"
            }


# --------------------------------------------------------------------------------------------------
# The helpers that these tests lean on


def test_events_of_two_commands_are_told_apart():
    assert events("model: x\nval loss 1.0\n") == "val loss 1.0\n"


STEP, VALIDATED, SAMPLED = "step 4/9: train loss 1.0\n", "val loss 1.0\n", "--- sample\nabc\n"
NEXT = "step 5/9: train loss 0.5\n"


@pytest.mark.parametrize(
    "first, second",
    [
        (STEP + VALIDATED + SAMPLED, VALIDATED + SAMPLED + NEXT),
        (STEP + VALIDATED + "--- sample\nab\n", VALIDATED + SAMPLED + NEXT),
        (STEP + VALIDATED + "--- sample\nab\ufffd\n", VALIDATED + SAMPLED + NEXT),
        (STEP, VALIDATED + SAMPLED + NEXT),
    ],
    ids=["all of it", "a part", "a part of a character", "nothing"],
)
def test_an_evaluation_that_is_repeated_is_told_once(first, second):
    assert joined(first, second) == STEP + VALIDATED + SAMPLED + NEXT


@pytest.mark.parametrize(
    "first, second",
    [
        (STEP + VALIDATED, "val loss 1.1\n" + NEXT),
        (STEP + VALIDATED, NEXT),
        (STEP + VALIDATED + "--- sample\nax\n", VALIDATED + SAMPLED + NEXT),
        (STEP + VALIDATED + VALIDATED, VALIDATED + NEXT),
    ],
    ids=["another loss", "no validation", "another sample", "twice"],
)
def test_an_evaluation_that_is_not_the_same_is_an_error(first, second):
    with pytest.raises(AssertionError):
        joined(first, second)
