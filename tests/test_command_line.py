"""The command line: flags, what is printed, where things go, and what goes wrong."""

import io
import itertools
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys

import numpy as np
import pytest
from common import (
    FINISHED,
    SMALL,
    SMALL_DATA,
    SMALL_RUN,
    as_read,
    batches_by_hand,
    checkpoints,
    events,
    failed_in_one_line,
    folder_content,
    posix_only,
    read_up_to,
    run_command,
    running_command,
    sharp_model,
    succeeded,
    tensor_bytes,
    train_losses,
    whole_state,
    write_token_file,
)

import train_gpt2 as gpt2

# ---- The command line

DESIGNED_FLAGS = """--model --input_bin --input_val_bin --output_dir --batch_size --sequence_length
    --total_batch_size --num_iterations --learning_rate --warmup_iters --learning_rate_decay_frac
    --weight_decay --grad_clip --shuffle --val_loss_every --val_max_steps --sample_every --log_every
    --overfit_single_batch --hellaswag_eval --hellaswag_limit
    --inference_only --recompute --checkpoint_every --resume --seed --prompt
    --max_new_tokens
    --temperature --top_k""".split()


LLMC_DEFAULTS = {
    "model": "gpt2",
    "batch_size": 4,
    "sequence_length": 64,
    "num_iterations": 40,
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "val_loss_every": 10,
    "sample_every": 20,
}


def test_help_opens_with_three_examples_and_names_every_flag(tmp_path):
    text = succeeded(run_command(tmp_path, "--help", env={"COLUMNS": "300"}))
    opening, rest = text.split("options:")
    examples = re.findall(r'python train_gpt2.py((?: --\S+ (?:".*?"|\S+))*)', opening)
    assert len(examples) == 3 and re.match(r"usage:\s+python train_gpt2\.py\s", opening)
    bare, training, speaking = [gpt2.parse_flags(shlex.split(example)) for example in examples]
    assert bare == {} and training["model"] in gpt2.FRESH
    assert speaking["model"] == training["output_dir"]
    assert speaking["inference_only"] == 1 and speaking["prompt"] == "To be, or"
    assert "OPENBLAS_NUM_THREADS" in opening
    words = " ".join(rest.split())
    for name, (default, meaning) in gpt2.FLAGS.items():
        assert words.count(f" --{name} X {meaning} (default: {default!r})") == 1


def test_a_model_that_is_not_there_is_missed_before_anything_is_fetched(tmp_path):
    code, stdout, error = run_command(tmp_path, "--model", "nonesuch")
    assert "'nonesuch': no such model" in failed_in_one_line((code, stdout, error))
    assert stdout == "" and "fetch" not in error


def test_flags_and_defaults_are_those_of_the_design():
    assert {f"--{name}" for name in gpt2.FLAGS} == set(DESIGNED_FLAGS)
    assert {name: gpt2.DEFAULTS[name] for name in LLMC_DEFAULTS} == LLMC_DEFAULTS
    assert gpt2.parse_flags([]) == {}
    for name, default in gpt2.DEFAULTS.items():
        value = gpt2.parse_flags([f"--{name}", str(default)])[name]
        assert value == default and type(value) is type(default)
    assert gpt2.FLAGS == gpt2.FLAGS_OF_A_RUN | gpt2.FLAGS_THAT_MAY_CHANGE
    assert not gpt2.FLAGS_OF_A_RUN.keys() & gpt2.FLAGS_THAT_MAY_CHANGE.keys()
    assert gpt2.BYTES_DEFAULTS.keys() <= gpt2.FLAGS.keys()


def test_formats_md_lists_the_flags_that_may_change():
    path = os.path.join(os.path.dirname(gpt2.__file__), "figures", "FORMATS.md")
    with open(path, encoding="utf-8") as file:
        listed = re.search(r"these flags may be given anew:(.*?)\. The others", file.read(), re.S)
    named = re.findall("`--([a-z_]+)`", listed[1])
    assert sorted([*named, "resume"]) == sorted(gpt2.FLAGS_THAT_MAY_CHANGE)


@pytest.mark.parametrize(
    "flags",
    [
        "--batchsize 4",
        "--batch 4",
        "--batch_size",
        "--batch_size four",
        "--batch_size 1.5",
        "--batch_size 0",
        "4",
        "--sequence_length 0",
        "--log_every -1",
        "--seed -1",
        "--recompute 3",
        "--learning_rate fast",
        "--learning_rate nan",
        "--learning_rate -1",
        "--temperature inf",
        "--num_iterations 99999999999999999999",
        "--write_tensors 1",
        "--prompt=--",
    ],
)
def test_a_command_line_without_sense_is_exit_code_2(flags, capsys, monkeypatch):
    monkeypatch.setattr(gpt2, "run_command", lambda *args: pytest.fail(f"accepted: {args}"))
    code = gpt2.main(flags.split())
    [line] = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("error: ") and "--help" in line


def test_a_wrong_flag_in_the_shell(tmp_path):
    code, stdout, error = run_command(tmp_path, "--batchsize", "4")
    assert code == 2 and "--batchsize" in error and error.count("\n") == 1 and stdout == ""


def test_learning_rate_worked_by_hand():
    """Warm-up over 4 of 12 updates to 8, then down to a quarter of it, 2. Half way that is 5, the
    middle; a quarter of the way 5 + 3 * sqrt(1/2)."""
    root = math.sqrt(0.5)
    by_hand = {0: 2, 1: 4, 2: 6, 3: 8, 4: 8, 6: 5 + 3 * root, 8: 5, 10: 5 - 3 * root, 12: 2}
    for step, lr in by_hand.items():
        assert gpt2.learning_rate_at(step, 12, 8.0, 4, 0.25) == pytest.approx(lr, rel=1e-12)
    no_decay = [gpt2.learning_rate_at(step, 12, 8.0, 4, 1.0) for step in (3, 4, 7, 11)]
    assert no_decay == [8] * 4 == [gpt2.learning_rate_at(step, 12, 8.0) for step in (0, 1, 6, 11)]
    at_once_and_down_to_nothing = [gpt2.learning_rate_at(step, 12, 8.0, 0, 0.0) for step in (0, 6)]
    assert at_once_and_down_to_nothing == pytest.approx([8, 4])
    only_warm_up = [gpt2.learning_rate_at(step, 12, 8.0, 12, 0.0) for step in range(12)]
    assert only_warm_up == pytest.approx([8 * (step + 1) / 12 for step in range(12)])


def test_a_warm_up_that_does_not_end_is_said(call_main):
    flags = (*SMALL_RUN, "--val_loss_every", 0, "--sample_every", 0, "--warmup_iters")
    assert "\nthe learning rate would reach its peak only at update 13\n" in succeeded(
        call_main(*flags, 13)
    )
    assert "peak" not in succeeded(call_main(*flags, 12))


def picture_by_hand(losses, blocks):
    """For at most 50 losses: the lowest is blocks[0], the highest blocks[7]."""
    low, high = min(losses), max(losses)
    return "".join(blocks[round((x - low) / max(high - low, 1e-9) * 7)] for x in losses)


def test_the_picture_of_the_losses(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert gpt2.sparkline([7, 6, 5, 4, 3, 2, 1, 0]) == "█▇▆▅▄▃▂▁"
    assert gpt2.sparkline([3.0]) == "▁"
    assert (
        gpt2.sparkline([i // 10 for i in range(500)])
        == gpt2.sparkline(range(50))
        == picture_by_hand(range(50), "▁▂▃▄▅▆▇█")
    )
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert gpt2.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "_.-=+*#@"


def test_all_that_a_run_prints_and_logs_is_what_the_api_computes(small_folder, tmp_path):
    """A run, rebuilt from the public functions: batches, micro-batches, schedule, clipping, decay,
    validation and samples; and the form of its lines, which scripts may parse."""
    flags = """--total_batch_size 32 --temperature 0.8 --top_k 5 --seed 3 --prompt ab
        --val_loss_every 5
        --sample_every 6 --recompute 2""".split()
    stdout = succeeded(run_command(small_folder, *SMALL_RUN, *flags, "--output_dir", tmp_path))

    files = [small_folder / name for name in ("train_0.bin", "train_1.bin", "val.bin")]
    *shards, val = (np.fromfile(file, "<u2")[512:] for file in files)
    model = gpt2.GPT2.from_pretrained(str(small_folder / "model"), 2, 8)
    batches, printed, log, norms = batches_by_hand(shards, 2, 8), "", [], []
    for step in range(13):
        if step in (0, 5, 10, 12):
            val_batches = itertools.islice(batches_by_hand([val], 2, 8), 2)
            loss = 0
            for batch in val_batches:
                model.forward(*batch, train=False)
                loss += model.acts["losses"].mean(dtype=np.float64) / 2
            printed += f"val loss {loss:.6f}\n"
            log.append((step, "tel", f"{loss:.4f}"))
        if step in (6, 12):
            tokens = model.generate(list(b"ab"), 12, 0.8, 5, np.random.default_rng([3, step]))
            printed += "--- sample\nab" + bytes(tokens).decode(errors="replace") + "\n"
        if step == 12:
            break
        loss = 0
        for _ in range(2):
            loss += model.forward(*next(batches), grad_scale=0.5) / 2
            model.backward()
        norms.append(model.grad_norm())
        cosine = 1 + math.cos(math.pi * (step - 3) / 9)
        lr = 1e-2 * (step + 1) / 3 if step < 3 else 1e-3 + (1e-2 - 1e-3) * 0.5 * cosine
        model.update(lr, weight_decay=0.1, step=step + 1, grad_scale=min(1, 1 / norms[-1]))
        printed += (
            f"step {step + 1}/12: train loss {loss:.6f} (norm {norms[-1]:.4f}, lr {lr:.1e})\n"
        )
        log.append((step + 1, "trl", f"{loss:.4f}"))
    assert min(norms) < 1 < max(norms)  # some gradients were clipped, some not
    assert events(stdout) == as_read(printed)
    assert (tmp_path / "main.log").read_text() == "".join(
        f"s:{step} {kind}:{x}\n" for step, kind, x in log
    )
    form = r"step \d+/12: train loss \d+\.\d{6} \(norm \d+\.\d{4}, lr \d\.\de-\d\d, "
    form += r"\d+ ms, \d+:\d\d left\)"
    assert len(re.findall(f"(?m)^{form}$", stdout)) == 12

    *_, train_line, val_line, best, last = stdout.splitlines()
    drawings = (("trl", "train loss ", train_line), ("tel", "val   loss ", val_line))
    for kind, begins, line in drawings:
        losses = [loss for _, k, loss in log if k == kind]
        drawn = picture_by_hand([float(loss) for loss in losses], "▁▂▃▄▅▆▇█")
        assert line == f"{begins}{losses[0]:>7} {drawn} {losses[-1]}"
    losses = [loss for _, k, loss in log if k == "trl"]
    farewell = f"12 updates, train loss {losses[0]} -> {losses[-1]}, "
    pattern = rf"{farewell}\d+\.\d s, \d+ tok/s, saved in {re.escape(str(tmp_path))}"
    assert re.fullmatch(pattern, last)
    losses = [(loss, step) for step, k, loss in log if k == "tel" and step > 0]
    least, step = min(losses)
    assert best.startswith(f"best val loss {least} at update {step} of 12, on ")
    assert folder_content(tmp_path).keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "main.jsonl",
        "main.log",
        "model.safetensors",
        "checkpoint_00000012.safetensors",
        *(f"best/{name}" for name in FINISHED),
    }
    np.testing.assert_array_equal(
        gpt2.GPT2.from_pretrained(str(tmp_path), 2, 8).flat[0], model.flat[0]
    )


def test_a_terminal_that_knows_only_ascii(small_folder):
    """The picture falls back to seven-bit characters, and no byte that a model comes up with ends
    the run."""
    flags = (*SMALL_RUN, "--val_loss_every", 0, "--max_new_tokens", 60, "--prompt", "hé")
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    stdout = succeeded(run_command(small_folder, *flags, env=env))
    losses = train_losses(stdout)
    drawn = picture_by_hand([round(loss, 4) for loss in losses], "_.-=+*#@")
    assert stdout.isascii() and len(losses) == 12
    assert f" {drawn} {losses[-1]:.4f}" in stdout.splitlines()[-2]


@posix_only
def test_a_prompt_that_is_no_utf8_reaches_a_model_of_bytes_as_it_is(tmp_path):
    """Elsewhere than on Windows a command line is bytes, and byte 0xff is as good as any other."""
    model = sharp_model(1, 16)  # which tells one context from another
    model.save_pretrained(tmp_path)
    flags = ("--model", tmp_path, "--inference_only", 1, "--max_new_tokens", 60, "--temperature", 0)
    stdout = succeeded(run_command(tmp_path, *flags, "--prompt", os.fsdecode(b"\xffab")))
    assert stdout.endswith(
        as_read(bytes(model.generate(b"\xffab", 60, 0)).decode(errors="replace")) + "\n"
    )


def test_without_an_output_dir_nothing_is_written_and_that_is_said(small_folder, call_main):
    """Before the first update, and at the end; not where there is one."""
    before = folder_content(small_folder)
    first, _, last = succeeded(call_main(*SMALL_RUN)).partition("step 1/12")
    assert re.search(r"(?m)^nothing .*--output_dir", first) and "saved" not in last
    assert "nothing is kept without --output_dir" in last.splitlines()[-1]
    assert folder_content(small_folder) == before


def test_with_an_output_dir_nothing_else_is_said(tmp_path, call_main):
    assert "nothing" not in succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path))


@posix_only
def test_ctrl_c_without_an_output_dir_says_that_nothing_is_kept(small_folder):
    endless = (*SMALL_RUN, "--num_iterations", 10**9)
    with running_command(small_folder, *endless) as process:
        read_up_to(process, "step 3/")
        process.send_signal(signal.SIGINT)
        last = process.stdout.read().splitlines()[-1]
        assert process.wait() == 130
    assert last.startswith("stopped: ") and "nothing is kept without --output_dir" in last


WITH_THREADS = """if True:
    import sys, train_gpt2
    train_gpt2.share_cores = lambda processes: None
    train_gpt2.THREADS = int(sys.argv[1])
    train_gpt2.BLOCK_BYTES = 512
    train_gpt2.ADAMW_CHUNK = 300
    sys.exit(train_gpt2.main(sys.argv[2:]))
"""


def test_same_bits_in_two_processes_and_for_any_number_of_threads(small_folder, tmp_path):
    """Blocks are made so small here that even this model's rows fill many."""
    found = []
    for i, threads in enumerate((1, 1, 2, 3)):
        flags = (*SMALL_RUN, "--checkpoint_every", 12, "--output_dir", tmp_path / str(i))
        stdout = succeeded(run_command(small_folder, threads, *flags, program=("-c", WITH_THREADS)))
        found.append((events(stdout), whole_state(tmp_path / str(i))))
    assert found[0] == found[1] == found[2] == found[3] and "--- sample" in found[0][0]


def test_micro_batches_give_the_losses_of_the_batch_they_make(call_main, small_folder, tmp_path):
    write_token_file(tmp_path / "long.bin", random.Random(1).choices(range(97, 123), k=900))
    losses = []
    for B in (8, 4, 2):
        flags = ("--input_bin", tmp_path / "long.bin", "--batch_size", B, "--total_batch_size", 64)
        losses.append(train_losses(succeeded(call_main(*SMALL_RUN, *flags))))
    assert len(losses[0]) == 12 and losses[0][0] - losses[0][-1] > 0.1
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=0, atol=1e-5)


def test_overfitting_sees_the_same_batch_always(call_main, small_folder, tmp_path, monkeypatch):
    """... also in every micro-batch, and after a resumption."""
    seen, forward = [], gpt2.GPT2.forward

    def watching(model, inputs, targets, train=True, grad_scale=1.0):
        if train:
            seen.append(np.array([inputs.ravel(), targets.ravel()]))
        return forward(model, inputs, targets, train, grad_scale)

    monkeypatch.setattr(gpt2.GPT2, "forward", watching)
    flags = (*SMALL_RUN, "--overfit_single_batch", 1, "--total_batch_size", 32)
    flags += ("--output_dir", tmp_path)
    succeeded(call_main(*flags, "--checkpoint_every", 1, "--num_iterations", 4))
    succeeded(call_main(*flags, "--resume", 1, "--num_iterations", 7))
    tokens = np.fromfile(small_folder / "train_0.bin", "<u2")[512:]
    np.testing.assert_array_equal(seen, [(tokens[:16], tokens[1:17])] * 14)


def test_inference_from_a_runs_output_dir(small_folder, tmp_path):
    succeeded(run_command(small_folder, *SMALL_RUN, "--output_dir", tmp_path))
    before, model = folder_content(tmp_path), gpt2.GPT2.from_pretrained(str(tmp_path), 1, 16)
    for flags, settings in (
        (["--temperature", 0], [0]),
        (["--seed", 8, "--top_k", 9], [1.0, 9, np.random.default_rng([8, 0])]),
    ):
        flags += ["--model", tmp_path, "--inference_only", 1]
        flags += ["--prompt", "hé", "--max_new_tokens", 30]
        stdout = succeeded(run_command(tmp_path, *flags))
        new = bytes(model.generate("hé".encode(), 30, *settings))
        words = "hé" + new.decode(errors="replace")
        assert stdout.endswith("MB\n" + as_read(words) + "\n")
    assert folder_content(tmp_path) == before


def empty_data(folder, monkeypatch):
    """Go to a folder with an empty data/, where nothing lies in any cache."""
    (folder / "data").mkdir()
    monkeypatch.chdir(folder)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(folder / "no_cache"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)


@pytest.mark.parametrize(
    "named",
    [
        "--model gpt2",
        "--model d6",
        "--input_bin train_0.bin --input_val_bin val.bin",
        "--input_bin train_0.bin",
        "--input_val_bin val.bin",
        "--inference_only 1",
        "--output_dir run --resume 1",
    ],
)
def test_what_was_asked_for_by_name_is_not_replaced(
    named, call_main, tmp_path, small_folder, monkeypatch
):
    for name in ("train_0.bin", "val.bin"):
        shutil.copy(small_folder / name, tmp_path)
    empty_data(tmp_path, monkeypatch)
    result = call_main(*named.split(), "--num_iterations", 1)
    failed_in_one_line(result)
    assert "from scratch" not in result[1] and "step " not in result[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--input_bin train_0.bin", "--input_bin without its --input_val_bin"),
        ("--input_val_bin val.bin", "--input_val_bin without its --input_bin"),
        ("--input_val_bin val.bin --val_loss_every 0", "--input_val_bin without its --input_bin"),
    ],
)
@pytest.mark.parametrize("model", ["model", "bytes"])
def test_one_data_file_alone_is_refused(flags, said, model, call_main):
    """The other side would be another text, silently."""
    assert said in failed_in_one_line(call_main("--model", model, *flags.split()))


@pytest.mark.parametrize("model", ["model", "bytes"])
def test_training_data_alone_will_do_where_nothing_is_validated(model, call_main):
    flags = "--input_bin train_0.bin --val_loss_every 0 --num_iterations 2 --batch_size 1".split()
    flags += "--sequence_length 8 --max_new_tokens 3".split()
    stdout = succeeded(call_main("--model", model, *flags))
    assert "training data: train_0.bin, 100 tokens" in stdout and "val" not in stdout


def test_the_data_of_a_model_of_bytes_is_what_was_named(call_main):
    flags = "--batch_size 1 --sequence_length 8 --num_iterations 1 --max_new_tokens 3".split()
    stdout = succeeded(call_main("--model", "bytes", *SMALL_DATA, *flags))
    assert "\ntraining data: train_*.bin, 161 tokens\n" in stdout
    assert "\nvalidation data: val.bin, 70 tokens\n" in stdout


def test_with_nothing_at_all_it_learns_from_its_own_files(call_main, tmp_path, monkeypatch):
    """No data, no weights, no network: that is announced, and a small GPT learns by bytes."""
    empty_data(tmp_path, monkeypatch)
    stdout = succeeded(call_main("--num_iterations", 5, "--max_new_tokens", 20))
    cause, arrow, *_ = stdout.splitlines()
    assert "can't fetch" in cause and arrow.startswith("--> ") and "by bytes" in arrow
    assert "training data: train_gpt2.py, test_gpt2.py, prepro_tinyshakespeare.py, " in stdout
    val = [float(loss) for loss in re.findall(r"(?m)^val loss (\S+)", stdout)]
    assert len(val) == 2 and abs(val[0] - math.log(256)) < 0.2 and val[1] < val[0] - 0.1
    farewell = stdout.splitlines()[-1]
    assert farewell.startswith("5 updates, train loss ") and "nothing is kept" in farewell


def test_a_text_in_data_comes_before_its_own_files(call_main, tmp_path, monkeypatch):
    empty_data(tmp_path, monkeypatch)
    (tmp_path / "data" / "tiny_shakespeare.txt").write_text("To be, or not to be. " * 1000)
    code, stdout, _ = call_main("--num_iterations", 1, "--max_new_tokens", 3)
    assert code == 0 and "by bytes" in stdout
    assert "training data: tiny_shakespeare.txt, 19,000 tokens" in stdout
    assert "validation data: tiny_shakespeare.txt, 2,000 tokens" in stdout


def test_where_only_the_weights_are_missing_the_fallback_names_what_there_is(
    call_main, tmp_path, monkeypatch
):
    empty_data(tmp_path, monkeypatch)
    for name in ("train", "val"):
        path = tmp_path / "data" / f"tiny_shakespeare_{name}.bin"
        write_token_file(path, [50256, 1, 2] * 999, vocab_size=50257)
    stdout = succeeded(call_main("--num_iterations", 1, "--max_new_tokens", 3))
    assert "by bytes" in stdout and "--model d6" in stdout


def test_the_fallback_is_kept_and_gone_on_with(call_main, tmp_path, monkeypatch):
    empty_data(tmp_path, monkeypatch)
    flags = ("--output_dir", "run", "--max_new_tokens", 3, "--val_loss_every", 0)
    assert "by bytes" in succeeded(call_main(*flags, "--num_iterations", 2))
    stdout = succeeded(call_main("--output_dir", "run", "--resume", 1, "--num_iterations", 3))
    assert "\nstep 3/3: " in stdout and "by bytes" not in stdout
    assert [path.name for path in checkpoints(tmp_path / "run")][-1][-16:] == "0003.safetensors"


@pytest.mark.parametrize("kept, named", [("my run", "my rum"), ("run_1", "run1")])
def test_a_misspelt_folder_to_resume_is_said_aloud_and_begins(kept, named, call_main, tmp_path):
    """A script that always passes --resume 1 must begin; a person must see what happens."""
    short = (*SMALL_RUN, "--num_iterations", 2, "--output_dir")
    succeeded(call_main(*short, tmp_path / kept))
    stdout = succeeded(call_main(*short, tmp_path / named, "--resume", 1))
    [line] = [line for line in stdout.splitlines() if "NO RUN TO RESUME" in line]
    assert line.startswith(f"{tmp_path / named} holds ") and "a new one begins" in line
    assert line.endswith(f": did you mean {shlex.quote(str(tmp_path / kept))}?")
    assert "\nstep 1/2: " in stdout and whole_state(tmp_path / named)["step"] == 2
    assert "RESUME" not in succeeded(call_main(*short, tmp_path / kept, "--resume", 1))
    unlike = succeeded(call_main(*short, tmp_path / "other" / "place", "--resume", 1))
    assert "NO RUN TO RESUME" in unlike and "did you mean" not in unlike


@pytest.mark.parametrize(
    "flags", ["--input_bin nothing.bin --input_val_bin val.bin", "--sequence_length 17",
              "--batch_size 1000000", "--total_batch_size 17", "--model nothing"],
)  # fmt: skip
def test_a_start_that_fails_leaves_no_folder(flags, call_main, tmp_path):
    """... which would be taken for a run, or for a model."""
    failed_in_one_line(call_main(*SMALL_RUN, *flags.split(), "--output_dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_shard_too_short_for_one_sequence_is_told_to_shorten_it(call_main, tmp_path):
    write_token_file(tmp_path / "short.bin", [97] * 8)
    flags = ("--input_bin", tmp_path / "short.bin", "--batch_size")
    assert "use a smaller --sequence_length" in failed_in_one_line(call_main(*SMALL_RUN, *flags, 1))
    assert "use a smaller --batch_size" in failed_in_one_line(call_main(*SMALL_RUN, *flags, 2))


# ---- Memory that is not there, numbers that are none, disks that are full


def small_model_bytes(B):
    """What a run of SMALL with batches of (B, 8) allocates."""
    return 4 * (
        4 * gpt2.count(gpt2.param_shapes(SMALL)) + gpt2.count(gpt2.act_shapes(SMALL, B, 8, 1))
    )


def test_a_plan_beyond_the_machine_is_refused_before_anything_is_allocated(call_main, monkeypatch):
    available = small_model_bytes(3)
    assert available == gpt2.GPT2(SMALL, 3, 8, None).blob.nbytes
    monkeypatch.setattr(gpt2, "available_memory", lambda: available)
    succeeded(call_main(*SMALL_RUN, "--batch_size", 3, "--num_iterations", 1))

    def allocate(*args, **kwargs):
        raise AssertionError("allocated")

    monkeypatch.setattr(gpt2, "GPT2", allocate)
    for batch_size in (4, 40, 1000):
        result = call_main(*SMALL_RUN, "--batch_size", batch_size)
        advice = re.search(r": try (--batch_size [123]|a smaller --model)\n$", result[2])
        assert failed_in_one_line(result) and advice and "\nmemory: " in result[1]
    available = small_model_bytes(1) - 1
    assert failed_in_one_line(call_main(*SMALL_RUN)).endswith(": try a smaller --model\n")


@pytest.mark.parametrize("free", [3, 5, 7.99, 64, 500])
def test_the_batch_that_is_advised_fits_and_no_larger_one_does(call_main, monkeypatch, free):
    """... where a batch fills the rows of the logits, as it does in all but the smallest runs."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", 16)
    between = small_model_bytes(int(free) + 1) - small_model_bytes(int(free))
    available = small_model_bytes(int(free)) + (free - int(free)) * between
    monkeypatch.setattr(gpt2, "available_memory", lambda: available)
    error = failed_in_one_line(call_main(*SMALL_RUN, "--batch_size", 600))
    assert error.endswith(f": try --batch_size {int(free)}\n")


def test_the_plan_of_gpt2_124m(call_main, monkeypatch):
    """124,439,808 parameters of 4 bytes are 498 MB; as much for gradients, twice as much for
    moments."""

    def allocate(*args, **kwargs):
        raise MemoryError("not here")

    monkeypatch.setattr(gpt2, "GPT2", allocate)
    monkeypatch.setattr(gpt2, "available_memory", lambda: math.inf)
    flags = (*SMALL_DATA, "--batch_size", 2, "--sequence_length", 8)
    code, stdout, error = call_main("--model", "d12", *flags)
    assert (code, error) == (1, "error: not here\n") and "model: 124,439,808 parameters: " in stdout
    activations = 4 * gpt2.count(gpt2.act_shapes(gpt2.GPT2Config(), 2, 8, 1))
    assert (
        "\nmemory: parameters 498, gradients 498, moments 996, "
        f"activations {activations / 1e6:.0f}, "
        f"in all {(16 * 124_439_808 + activations) / 1e6:.0f} MB\n"
    ) in stdout


@posix_only
def test_the_limit_of_this_process_counts_and_a_huge_batch_is_refused_at_once(small_folder):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    result = run_command(
        small_folder,
        *SMALL_RUN,
        "--batch_size",
        10**12,
        env={"OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=limit,
    )
    message = re.search(r"(\d+) MB are free: try --batch_size (\d+)\n", failed_in_one_line(result))
    megabytes, fits = map(int, message.groups())
    assert megabytes <= 2147
    assert small_model_bytes(fits) <= (megabytes + 0.5) * 1e6 <= small_model_bytes(fits + 999)


def spoil_after_update(monkeypatch, number, spoil):
    """Let spoil(model) happen right after that update."""
    update = gpt2.GPT2.update

    def updating(model, *args, **settings):
        update(model, *args, **settings)
        if model.updates == number:
            spoil(model)

    monkeypatch.setattr(gpt2.GPT2, "update", updating)


def parameters_and_moments(checkpoint):
    """All but the checksum, which is that of the flags as well."""
    tensors = tensor_bytes(checkpoint)
    assert tensors.pop("crc32")
    return tensors


def put_value(name, l, value):
    return lambda model: model.params[name].__setitem__(... if l is None else l, value)


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize(
    "name, l, value, began",
    [
        ("wte", None, math.nan, "wte"),
        ("wpe", None, math.inf, "wpe"),
        ("lnfb", None, math.nan, "lnfb"),
        ("ln1b", 0, math.nan, "ln1b of layer 0"),
        ("qkvw", 1, math.nan, "qkvw of layer 1"),
        ("fcprojw", 2, math.nan, "fcprojw of layer 2"),
        ("qkvw", 1, 1e30, "att_lse of layer 1"),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_and_names_where_it_began(
    call_main, tmp_path, monkeypatch, recompute, name, l, value, began
):
    flags = (*SMALL_RUN, "--checkpoint_every", 3, "--output_dir", tmp_path, "--recompute")
    flags += (recompute, "--grad_clip", recompute, "--val_loss_every", 0, "--sample_every", 0)
    succeeded(call_main(*flags, "--num_iterations", 3))
    [checkpoint] = checkpoints(tmp_path)
    before = parameters_and_moments(checkpoint)
    spoil_after_update(monkeypatch, 4, put_value(name, l, value))
    error = failed_in_one_line(call_main(*flags, "--resume", 1))
    if recompute == 2:  # of what the layers share, only the last layer's is left
        began = began.replace("att_lse", "residual3")
    assert error.startswith(f"error: update 5: the loss is nan; it began in {began}: try ")
    assert checkpoints(tmp_path) == [checkpoint]
    assert parameters_and_moments(checkpoint) == before


@pytest.mark.parametrize("l", [0, 1, 2])
def test_an_infinite_gradient_stops_the_run_and_names_where_it_began(
    call_main, tmp_path, monkeypatch, l
):
    flags = (*SMALL_RUN, "--checkpoint_every", 3, "--output_dir", tmp_path)
    succeeded(call_main(*flags, "--num_iterations", 3))
    [checkpoint] = checkpoints(tmp_path)
    before, calls = parameters_and_moments(checkpoint), itertools.count(1)
    backward = gpt2.gelu_backward

    def overflowing(dinp, dout, inp):
        backward(dinp, dout, inp)
        if next(calls) == 3 + 3 - l:  # in the second update; the last of three layers comes first
            dinp[...] = np.inf

    monkeypatch.setattr(gpt2, "gelu_backward", overflowing)
    error = failed_in_one_line(call_main(*flags, "--resume", 1))
    began = rf"fc[wb] of layer {l}: try a smaller --learning_rate, or --grad_clip 1\n"
    assert re.fullmatch(rf"error: update 5: the gradient norm is \w+; it began in {began}", error)
    assert checkpoints(tmp_path) == [checkpoint]
    assert parameters_and_moments(checkpoint) == before


def test_a_norm_that_overflows_stops_the_run_though_every_gradient_is_finite(
    call_main, monkeypatch
):
    backward = gpt2.gelu_backward

    def enlarging(dinp, dout, inp):
        backward(dinp, dout, inp)
        dinp[...] = 1e25

    monkeypatch.setattr(gpt2, "gelu_backward", enlarging)
    error = failed_in_one_line(call_main(*SMALL_RUN))
    assert error.startswith("error: update 1: the gradient norm is inf; it began in a sum over ")


def test_validation_that_is_no_number_stops_the_run_too(call_main, tmp_path, monkeypatch):
    """... so a last update that ruins the weights does not pass for success."""
    spoil_after_update(monkeypatch, 12, put_value("fcw", 1, math.nan))
    error = failed_in_one_line(call_main(*SMALL_RUN, "--output_dir", tmp_path))
    assert ": the validation loss is nan; it began in fcw of layer 1: try " in error
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("clip", [0, 1])
def test_a_learning_rate_far_too_high_ends_in_one_line(small_folder, clip):
    flags = ("--learning_rate", "1e18", "--grad_clip", clip)
    flags += ("--val_loss_every", 0, "--sample_every", 0)
    error = failed_in_one_line(run_command(small_folder, *SMALL_RUN, *flags))
    assert re.match(
        r"error: update [2-9]: the (loss|gradient norm) is (nan|inf); it began in \w+", error
    )


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_one_line(call_main, tmp_path, place):
    """Below a regular file nobody can write, not even root, whom permissions don't stop."""
    (tmp_path / "file").write_text("here")
    result = call_main(*SMALL_RUN, "--output_dir", tmp_path / place)
    assert str(tmp_path / place) in failed_in_one_line(result) and "step" not in result[1]
