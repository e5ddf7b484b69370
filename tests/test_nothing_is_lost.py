"""What a person's own next command does to what was trained, and what else a user trips over."""

import copy
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from common import (
    NO_NETWORK,
    SMALL,
    SMALL_RUN,
    TRAINER,
    checkpoint_folders,
    events,
    failed_in_one_line,
    folder_content,
    pack_safetensors,
    posix_only,
    run_command,
    succeeded,
    train_losses,
    write_token_file,
)

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2
from train_gpt2 import InputError

TOP = Path(TRAINER).parent
FINISHED = ("config.json", "generation_config.json", "main.log", "model.safetensors")


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
    """A finished run of an earlier version, which left no checkpoint."""
    finished(folder, call)
    for checkpoint in checkpoint_folders(folder):
        shutil.rmtree(checkpoint)


def stopped(folder, call):
    succeeded(call(*SMALL_RUN, "--output_dir", folder, "--num_iterations", 5))
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()


def stopped_early(folder, call):
    """Killed before its first checkpoint: there is a log, and nothing else."""
    folder.mkdir()
    (folder / "main.log").write_text("s:0 tel:5.5000\ns:1 trl:5.4000\n")


def damaged(folder, call):
    stopped(folder, call)
    for checkpoint in checkpoint_folders(folder):
        path = checkpoint / "optimizer.safetensors"
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
    "stopped early": stopped_early,
    "damaged": damaged,
    "another model": another_model,
    "other files": other_files,
}
COMMANDS = {
    "train": (*SMALL_RUN, "--output_dir", "{}"),
    "resume": (*SMALL_RUN, "--output_dir", "{}", "--resume", 1),
    "generate": ("--model", "{}", "--inference_only", 1, "--max_new_tokens", 3),
    "write tensors": (*SMALL_RUN, "--output_dir", "{}", "--write_tensors", 1),
}
USED = "holds a run: go on with --resume 1, or choose another --output_dir"
NO_MODEL = "no such file"
WHAT_HAPPENS = {  # None: all goes well; else what the one line of the error says
    ("missing", "train"): None,
    ("missing", "resume"): None,
    ("missing", "generate"): NO_MODEL,
    ("missing", "write tensors"): None,
    ("empty", "train"): None,
    ("empty", "resume"): None,
    ("empty", "generate"): "No such file",
    ("empty", "write tensors"): None,
    ("finished", "train"): USED,
    ("finished", "resume"): None,
    ("finished", "generate"): None,
    ("finished", "write tensors"): None,
    ("only weights", "train"): USED,
    ("only weights", "resume"): "fine-tune from them with --model",
    ("only weights", "generate"): None,
    ("only weights", "write tensors"): None,
    ("stopped", "train"): USED,
    ("stopped", "resume"): None,
    ("stopped", "generate"): "holds checkpoints of a run that was stopped: use --model",
    ("stopped", "write tensors"): None,
    ("stopped early", "train"): USED,
    ("stopped early", "resume"): None,
    ("stopped early", "generate"): "No such file",
    ("stopped early", "write tensors"): None,
    ("damaged", "train"): USED,
    ("damaged", "resume"): "is whole: choose another --output_dir",
    ("damaged", "generate"): "holds checkpoints of a run that was stopped: use --model",
    ("damaged", "write tensors"): None,
    ("another model", "train"): USED,
    ("another model", "resume"): "fine-tune from them with --model",
    ("another model", "generate"): None,
    ("another model", "write tensors"): None,
    ("other files", "train"): None,
    ("other files", "resume"): None,
    ("other files", "generate"): "No such file",
    ("other files", "write tensors"): None,
}
MAY_BE_REWRITTEN = {"main.log", ".lock", *FINISHED}  # by a run that goes on


@pytest.mark.parametrize("state, command", WHAT_HAPPENS, ids="-".join)
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
        else:  # only the oldest checkpoint of a run that went on may be gone
            assert goes_on and name.startswith("checkpoint_0"), name


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
    result = call_main("--output_dir", tmp_path / "new", "--num_iterations", 1)
    assert "from scratch" not in result[1] and "can't fetch" in failed_in_one_line(result)


def test_a_signal_after_the_last_update_is_no_second_validation(call_main, tmp_path, monkeypatch):
    flags = (*SMALL_RUN, "--sample_every", 0, "--output_dir", tmp_path / "o")
    write = gpt2.write_log_line

    def and_a_signal(run, kind, value):
        write(run, kind, value)
        if kind == "tel" and run.step == 12:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(gpt2, "write_log_line", and_a_signal)
    code, first, _ = call_main(*flags)
    monkeypatch.setattr(gpt2, "write_log_line", write)
    assert code == 130 and first.count("val loss") >= 4
    second = succeeded(call_main(*flags, "--resume", 1))
    assert "\nval loss" not in second and "saved in" in second


def test_handlers_are_as_they_were_and_a_thread_may_call_main(call_main):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    codes = []
    flags = [str(flag) for flag in (*SMALL_RUN, "--num_iterations", 1)]
    thread = threading.Thread(target=lambda: codes.append(gpt2.main(flags)))
    thread.start()
    thread.join()
    assert gpt2.main(flags) == 0 and codes == [0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


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
    assert stdout.count("\nstep ") == steps
    monkeypatch.undo()


def test_a_disk_without_room_at_the_end_names_the_last_checkpoint(call_main, tmp_path, monkeypatch):
    write = prepro.write_safetensors

    def full(path, *rest):
        if "checkpoint_00000012" in path or checkpoint_folders(tmp_path / "o")[1:]:
            raise OSError(28, "No space left on device", path)
        write(path, *rest)

    monkeypatch.setattr(prepro, "write_safetensors", full)
    flags = (*SMALL_RUN, "--checkpoint_every", 5, "--output_dir", tmp_path / "o")
    error = failed_in_one_line(call_main(*flags))
    assert in_order(error, "can't save to", "No space left", "checkpoint_00000010")


def test_on_a_terminal_a_full_disk_waits_for_room(call_main, tmp_path, monkeypatch):
    write, tries = prepro.write_safetensors, []

    def full_twice(path, *rest):
        tries.append(path)
        if len(tries) <= 2:
            raise OSError(28, "No space left on device", path)
        write(path, *rest)

    class Terminal:
        isatty = staticmethod(lambda: True)
        readline = staticmethod(lambda: "\n")

    monkeypatch.setattr(prepro, "write_safetensors", full_twice)
    monkeypatch.setattr(sys, "stdin", Terminal)
    stdout = succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "o"))
    assert stdout.count("Make room and press Enter") == 2 and "saved in" in stdout
    assert gpt2.GPT2.from_pretrained(tmp_path / "o", 1, 8).config == SMALL


# --------------------------------------------------------------------------------------------------
# Input that is not what it should be


def forge(folder, **changes):
    """Change the state in a checkpoint, with the right checksum."""
    path = folder / "optimizer.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:end])
    state = json.loads(header["__metadata__"]["state"])
    state |= changes
    text = json.dumps(state)
    header["__metadata__"] = {"state": text, "crc32": str(zlib.crc32(text.encode()))}
    path.write_bytes(pack_safetensors(header, data[end:]))


ODD_VALUES = [None, "x", -1, 1.5, [], [1, 2, 3, 4], {}, [None], ["a", "b"], True, [[1]], 1 << 70]


@pytest.mark.parametrize(
    "name",
    ["step", "position", "evaluated", "tokens", "tokens_crc32", "settings", "crc32"],
)
def test_a_forged_state_is_refused_in_one_line(name, call_main, tmp_path):
    flags = (*SMALL_RUN, "--output_dir", tmp_path / "o")
    succeeded(call_main(*flags, "--num_iterations", 3))
    [folder] = checkpoint_folders(tmp_path / "o")
    original = (folder / "optimizer.safetensors").read_bytes()
    right = json.loads(prepro.read_safetensors(str(folder / "optimizer.safetensors"))[1]["state"])

    for value in ODD_VALUES:
        if value == right[name] or name == "step" and value is True:
            continue
        forge(folder, **{name: value})
        failed_in_one_line(call_main(*flags, "--resume", 1))
        (folder / "optimizer.safetensors").write_bytes(original)


@pytest.mark.parametrize("setting", ["batch_size", "sequence_length", "learning_rate", "model"])
@pytest.mark.parametrize("value", [None, [1], {}, "seven", -3, 1 << 70])
def test_a_forged_setting_is_refused_in_one_line(setting, value, call_main, tmp_path):
    flags = ("--output_dir", tmp_path / "o", "--resume", 1)
    succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "o", "--num_iterations", 3))
    [folder] = checkpoint_folders(tmp_path / "o")
    metadata = prepro.read_safetensors(str(folder / "optimizer.safetensors"))[1]
    settings = json.loads(metadata["state"])["settings"]
    forge(folder, settings=settings | {setting: value})
    result = call_main(*flags)
    if setting == "model" and isinstance(value, str):
        assert result[0] == 0  # the name of where the weights came from is only a name
    elif setting == "learning_rate" and isinstance(value, int):
        assert result[0] in (0, 1) and "Traceback" not in result[2]
    else:
        failed_in_one_line(result)


@pytest.mark.parametrize(
    "flags",
    [
        "--learning_rate nan",
        "--batch_size 0",
        "--prompt=--",
        "--no_such_flag 1",
        "--num_iterations",
        "--temperature inf",
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
        ("--recompute 7", "--recompute 7: expected one of [0, 1, 2]"),
        ("--prompt= --inference_only 1", "--prompt is empty"),
    ],
)
def test_flags_that_can_not_be_meant(flags, message, tmp_path):
    assert message in failed_in_one_line(run_command(tmp_path, *flags.split()))


@posix_only
def test_ctrl_c_during_the_imports(tmp_path):
    """NumPy takes ten seconds to load here. Ctrl-C ends that at once and without a traceback."""
    (tmp_path / "numpy").mkdir()
    slow = "import sys, time\nprint('importing', flush=True)\ntime.sleep(10)\n"
    (tmp_path / "numpy" / "__init__.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, TRAINER], env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT and error == ""


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
    gpt2.GPT2(SMALL, 1, 1).save_pretrained(tmp_path)
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
    assert "train_1.bin: holds token 256" in failed_in_one_line(result)
    assert "step" not in result[1]


def test_data_that_changed_at_equal_length_is_noticed(
    call_main, small_folder, tmp_path, monkeypatch
):
    shutil.copytree(small_folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    succeeded(call_main(*SMALL_RUN, "--output_dir", "o", "--num_iterations", 4))
    data = bytearray(Path("train_0.bin").read_bytes())
    data[1024 + 2 * 90] ^= 1
    Path("train_0.bin").write_bytes(data)
    result = call_main(*SMALL_RUN, "--output_dir", "o", "--resume", 1)
    assert "the training data has changed" in failed_in_one_line(result)


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
    C = gpt2.FRESH["d48"]
    config = gpt2.GPT2Config(num_layers=48, num_heads=C // 64, channels=C)
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
with train_gpt2.Progress("reading a model", 5.0):
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

    program = ALIVE.format(top=str(TOP))
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", program], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    assert in_order(shown, "reading a model: 2 s, 3 s left", "validating: 2 s, 2 s left", "\033[K")
    assert "quick" not in shown
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert piped.stdout == piped.stderr == b""


def test_all_that_may_take_long_is_announced(call_main, tmp_path, monkeypatch):
    announced = []
    init = gpt2.Progress.__init__

    def remember(self, what, expected=None):
        announced.append((what, expected))
        init(self, what, expected)

    monkeypatch.setattr(gpt2.Progress, "__init__", remember)
    succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "o", "--num_iterations", 2))
    names = [what for what, _ in announced]
    expected = ["reading model", "checking the tokens", "validating", "step 1", "step 2"]
    assert names[:5] == expected and names[-1] == f"saving to {tmp_path / 'o'}"
    assert announced[3][1] is None and announced[4][1] > 0  # how long the step before it took


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
    tokens = [prepro.open_tokens(path) for path in paths]
    assert np.concatenate(tokens).astype(np.uint8).tobytes() == TEXT.encode()

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
    assert "holds bytes, and the model's vocabulary is GPT-2's" in failed_in_one_line(result)
    write_token_file(tmp_path / "data" / "my_train.bin", [*range(40_000, 40_300)])
    result = offline("train_gpt2.py", *MINE, *SHORT, "--model", "bytes")
    assert "the model reads bytes, and this is no file of bytes" in failed_in_one_line(result)


@pytest.mark.parametrize(
    "program, flags",
    [
        ("prepro_tinyshakespeare.py", []),
        ("prepro_tinyshakespeare.py", ["--input", "my.txt"]),
        ("train_gpt2.py", ["--model", "gpt2", *MINE]),
        ("train_gpt2.py", ["--model", "d6"]),
        ("train_gpt2.py", ["--output_dir", "o"]),
    ],
    ids=["text", "vocabulary", "weights", "text of d6", "with a folder"],
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
        tokens = np.random.default_rng(1).integers(0, 256, 400)
        write_token_file(project / "data" / f"tiny_shakespeare_{name}.bin", tokens)
    done = subprocess.run(
        [sys.executable, str(project / "train_gpt2.py"), "--model", "d6", "--batch_size", "1"],
        cwd=elsewhere, env={**os.environ, **NO_NETWORK}, capture_output=True, text=True,
    )  # fmt: skip
    found = str(project / "data" / "tiny_shakespeare_train.bin")
    assert f"{found}: holds bytes" in done.stderr, done.stderr


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
            if "--hellaswag" in words or "--hellaswag_eval" in words:
                continue  # there is no network to fetch it from
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


def test_events_of_two_commands_are_told_apart():
    """A guard for the helper that the tests above lean on."""
    assert events("model: x\nval loss 1.0\n") == "val loss 1.0\n"
