"""HellaSwag: its file, and the evaluation beside transformers."""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import SMALL_RUN, failed_in_one_line, need_gpt2_vocabulary, succeeded
from fuzzing import fuzz

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2
from test_gpt2 import random_model, relative_error
from train_gpt2 import InputError


def made_up_examples(n, V, T, seed=0):
    """Examples of several lengths. Some endings have one token, some contexts are too long."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        longest = T + 5 if i % 10 == 0 else T - 8
        context = rng.integers(0, V, rng.integers(1, longest)).tolist()
        endings = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(4)]
        examples.append(prepro.Example(context, endings, int(rng.integers(4))))
    return examples


# --------------------------------------------------------------------------------------------------
# The file


def file_by_hand(examples):
    """llm.c's evaluation file, from its description."""
    body = b""
    longest = 0
    for index, example in enumerate(examples):
        numbers = [index, example.label, 4, len(example.context), *example.context]
        for ending in example.endings:
            numbers += [len(ending), *ending]
        nbytes = 2 * (len(numbers) + 2)
        body += struct.pack(f"<{len(numbers) + 2}H", 65535, nbytes, *numbers)
        longest = max(longest, nbytes)
    header = struct.pack("<4i", 20240522, 1, len(examples), longest)
    return header.ljust(1024, b"\0") + body


def test_the_file_byte_for_byte(tmp_path):
    path = str(tmp_path / "hellaswag_val.bin")
    examples = made_up_examples(40, 50257, 64)
    prepro.write_hellaswag(path, examples)
    with open(path, "rb") as file:
        assert file.read() == file_by_hand(examples)
    assert prepro.read_hellaswag(path) == examples


def test_questions_in_gpt2s_tokens(tmp_path, monkeypatch, capsys):
    """From a .jsonl in data/: the context as it is, each ending after a space."""
    need_gpt2_vocabulary()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    items = [
        {"ind": 4, "ctx": "A dog runs", "endings": ["home.", "a", "üb", "b c d"], "label": 2},
        {"ind": 9, "ctx": "She", "endings": ["w", "x", "y", "z"], "label": 0},
    ]
    text = "".join(json.dumps(item) + "\n" for item in items)
    (tmp_path / "data" / "hellaswag_val.jsonl").write_text(text)
    assert prepro.main(["--hellaswag"]) == 0
    assert "2 examples" in capsys.readouterr().out

    encode = prepro.get_encoding().encode_ordinary
    expected = []
    for item in items:
        endings = [encode(" " + ending) for ending in item["endings"]]
        expected.append(prepro.Example(encode(item["ctx"]), endings, item["label"]))
    assert prepro.read_hellaswag("data/hellaswag_val.bin") == expected


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[1]",
        '{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}',
        '{"ctx": "a", "endings": ["b", "c", "d", 4], "label": 0}',
        '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}',
        '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": "1"}',
        '{"ctx": 7, "endings": ["b", "c", "d", "e"], "label": 1}',
    ],
)
def test_a_question_that_is_none(line, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n' + line + "\n")
    encoding = SimpleNamespace(encode_ordinary=lambda text: [1])
    with pytest.raises(InputError, match="line 2"):
        prepro.parse_hellaswag(str(path), encoding)


@pytest.mark.parametrize(
    "example",
    [
        prepro.Example([], [[1]] * 4, 0),
        prepro.Example([1], [[1], [1], [], [1]], 0),
        prepro.Example([1], [[1]] * 3, 0),
        prepro.Example([1], [[1]] * 4, 4),
        prepro.Example([65535], [[1]] * 4, 0),
        prepro.Example([1], [[65535]] * 4, 0),
        prepro.Example([1] * 33_000, [[1]] * 4, 0),
    ],
    ids=["no context", "no ending", "three", "label", "token", "token of an ending", "too long"],
)
def test_an_example_that_does_not_fit_the_file(example, tmp_path):
    path = tmp_path / "new.bin"
    with pytest.raises(InputError):
        prepro.write_hellaswag(str(path), [example])
    assert not path.exists()


def test_fuzzed_evaluation_files(tmp_path):
    """What is read is what the file says, or an error of one line."""
    examples = made_up_examples(8, 300, 20)
    (tmp_path / "questions.bin").write_bytes(file_by_hand(examples))

    def check(found):
        assert file_by_hand(found)[1024:] == (tmp_path / "questions.bin").read_bytes()[1024:]

    path = str(tmp_path / "questions.bin")
    fuzz(tmp_path, ["questions.bin"], lambda: prepro.read_hellaswag(path), check)


# --------------------------------------------------------------------------------------------------
# The evaluation


def as_transformers(model, folder):
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    model.save_pretrained(str(folder))
    return transformers.GPT2LMHeadModel.from_pretrained(str(folder)).eval()


def plain_losses(theirs, example):
    """The losses of each ending's tokens, from four whole sequences, padded to one length."""
    sequences = [example.context + ending for ending in example.endings]
    longest = max(map(len, sequences))
    padded = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    with torch.no_grad():
        logp = theirs(padded).logits.log_softmax(-1)
    n = len(example.context)
    losses = []
    for ending, of_sequence in zip(example.endings, logp, strict=True):
        rows = of_sequence[n - 1 : n - 1 + len(ending)]
        losses.append(-rows[range(len(ending)), ending].numpy())
    return losses


@pytest.mark.parametrize(
    "sizes",
    [
        {"V": 61, "L": 3, "NH": 3, "C": 24, "max_seq_len": 40},
        {"V": 300, "L": 1, "NH": 1, "C": 9, "max_seq_len": 25},
        {"V": 97, "L": 2, "NH": 5, "C": 35, "max_seq_len": 64},
    ],
    ids=["40", "25", "64"],
)
def test_every_ending_as_transformers_has_it(sizes, tmp_path, monkeypatch):
    """Sums and means of 100 examples each, and the answers. Logits come in several pieces."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", 7)
    model = random_model(1, 4, np.float32, training=False, **sizes)
    model.flat *= 2  # so that the endings differ clearly
    theirs = as_transformers(model, tmp_path)
    T = sizes["max_seq_len"]
    examples = made_up_examples(100, sizes["V"], T)
    acts = gpt2.evaluation_acts(model.config, 5 * T)

    cut = 0
    for example in examples:
        fitted = gpt2.fitting(example, T)
        cut += len(fitted.context) < len(example.context)
        ours = gpt2.ending_losses(model, acts, fitted.context, fitted.endings)
        truth = plain_losses(theirs, fitted)
        for mine, other in zip(ours, truth, strict=True):
            assert abs(mine.sum() - other.sum()) < 1e-5 * other.sum()
            assert abs(mine.mean() - other.mean()) < 1e-5 * other.mean()
            assert relative_error(mine, other) < 1e-5
        for score in (np.sum, np.mean):
            answers = [np.argmin([score(loss) for loss in losses]) for losses in (ours, truth)]
            assert answers[0] == answers[1]
    assert cut > 0


def test_an_ending_longer_than_the_model_reads():
    example = prepro.Example([1, 2], [[1] * 9, [2], [3], [4]], 0)
    with pytest.raises(InputError, match="an ending has 9 tokens, the model reads 9"):
        gpt2.fitting(example, 9)


def taught_examples(n, seed):
    """After context token 10 + k always comes 20 + k; the other endings do not follow it."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        k = int(rng.integers(8))
        endings = [[20 + (k + shift) % 8, 30] for shift in range(4)]
        order = rng.permutation(4)
        context = [*rng.integers(0, 8, 3).tolist(), 10 + k]
        label = order.tolist().index(0)
        examples.append(prepro.Example(context, [endings[i] for i in order], label))
    return examples


def test_a_model_that_was_taught_the_answers(capsys):
    """The accuracy rises from chance to above 0.95."""
    config = gpt2.GPT2Config(16, 40, 2, 2, 32)
    model = gpt2.GPT2(config, 16, 5)
    args = gpt2.settings({"output_dir": ""})
    run = gpt2.Run(args, model, gpt2.ALONE, [], examples=taught_examples(200, 1), log=[])

    before = gpt2.hellaswag(run)
    rng = np.random.default_rng(2)
    for _ in range(60):
        text = rng.integers(0, 8, (16, 6))
        k = rng.integers(0, 8, 16)
        text[:, 3], text[:, 4], text[:, 5] = 10 + k, 20 + k, 30
        model.forward(text[:, :5], text[:, 1:])
        model.backward()
        model.update(1e-2)
    after = gpt2.hellaswag(run)
    assert before < 0.6 and after > 0.95
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"hellaswag {round(after * 200)}/200 acc_norm {after:.4f} acc ")


def test_a_signal_prints_what_there_is(capsys):
    model = random_model(1, 8, np.float32, V=40, max_seq_len=16)
    examples = taught_examples(10, 1)
    run = gpt2.Run(gpt2.settings({}), model, gpt2.ALONE, [], examples=examples, log=[])
    before = gpt2.ending_losses

    def signal_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            run.stopped.append(2)
        return before(*arguments)

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "ending_losses", signal_at_the_fourth)
        assert gpt2.hellaswag(run) is None
    assert "/4 acc_norm " in (line := capsys.readouterr().out) and "(stopped after 4 of 10)" in line


@pytest.fixture
def questions(small_folder):
    """An evaluation file in data/ of the small run's folder, for its vocabulary of bytes."""
    path = small_folder / "data" / "hellaswag_val.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(file_by_hand(made_up_examples(12, 250, 14)))
    yield path
    path.unlink()


def test_from_the_command_line(call_main, questions, tmp_path):
    """After each validation, in main.log, and alone."""
    flags = (*SMALL_RUN, "--num_iterations", 4, "--val_loss_every", 2, "--hellaswag_eval", 1)
    stdout = succeeded(call_main(*flags, "--output_dir", tmp_path / "run"))
    lines = [line for line in stdout.splitlines() if line.startswith("hellaswag ")]
    assert len(lines) == 3
    scores = [float(line.split()[3]) for line in lines]
    log = (tmp_path / "run" / "main.log").read_text().splitlines()
    found = [line for line in log if " eval:" in line]
    pairs = zip((0, 2, 4), scores, strict=True)
    assert found == [f"s:{step} eval:{score:.4f}" for step, score in pairs]

    alone = ("--inference_only", 1, "--hellaswag_eval", 1)
    again = succeeded(call_main(*alone, "--model", tmp_path / "run"))
    assert lines[-1] in again.splitlines() and "step" not in again
    few = succeeded(call_main(*alone, "--model", tmp_path / "run", "--hellaswag_limit", 5))
    assert "/5 acc_norm " in few


def test_questions_in_tokens_that_the_model_has_not(call_main, questions):
    questions.write_bytes(file_by_hand(made_up_examples(12, 50257, 14)))
    result = call_main(*SMALL_RUN, "--num_iterations", 1, "--hellaswag_eval", 1)
    assert "the model's vocabulary ends at 255" in failed_in_one_line(result)
