"""HellaSwag: its questions and their file, and the evaluation beside transformers."""

import json
import os
import signal
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    SMALL_RUN,
    VOCABULARY_FOLDER,
    failed_in_one_line,
    need_gpt2_vocabulary,
    succeeded,
)
from fuzzing import fuzz

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2
from extras import hellaswag
from extras.hellaswag import Example
from test_gpt2 import random_model, relative_error


def made_up_examples(n, V, T, seed=0):
    """Examples of several lengths. Some endings have one token, some contexts are too long."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        longest = T + 5 if i % 10 == 0 else T - 8
        context = rng.integers(0, V, rng.integers(1, longest)).tolist()
        endings = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(4)]
        examples.append(Example(context, endings, int(rng.integers(4))))
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
    path = str(tmp_path / "data" / "hellaswag_val.bin")
    examples = made_up_examples(40, 50257, 64)
    hellaswag.write(path, examples)
    with open(path, "rb") as file:
        assert file.read() == file_by_hand(examples)
    assert hellaswag.read(path) == examples
    assert os.listdir(tmp_path / "data") == ["hellaswag_val.bin"]


ITEMS = [
    {"ind": 4, "ctx": "A dog runs", "endings": ["home.", "a", "üb", "b c d"], "label": 2},
    {"ind": 9, "ctx": "She", "endings": ["w", "x", "y", "z"], "label": 0},
]


def test_questions_in_gpt2s_tokens(tmp_path, monkeypatch):
    """From a .jsonl in data/: the context as it is, each ending after a space."""
    need_gpt2_vocabulary()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY_FOLDER)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    text = "".join(json.dumps(item) + "\n" for item in ITEMS)
    (tmp_path / "data" / "hellaswag_val.jsonl").write_text(text)

    encode = prepro.get_encoding().encode_ordinary
    expected = []
    for item in ITEMS:
        endings = [encode(" " + ending) for ending in item["endings"]]
        expected.append(Example(encode(item["ctx"]), endings, item["label"]))
    assert hellaswag.load(0, 50257, 1024) == expected
    assert hellaswag.read("data/hellaswag_val.bin") == expected
    os.remove("data/hellaswag_val.jsonl")  # the tokens are enough
    assert hellaswag.load(1, 50257, 1024) == expected[:1]


CHARACTERS = SimpleNamespace(encode_ordinary=lambda text: [ord(c) for c in text])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_only_where_json_lines_do(separator, end, tmp_path):
    """Characters that Python's splitlines() takes for the end of a line stay in theirs."""
    path = tmp_path / "questions.jsonl"
    ctx = f"One{separator}two"
    item = {"ctx": ctx, "endings": ["a", separator, "c", "d"], "label": 1}
    line = json.dumps(item, ensure_ascii=False)
    assert separator in line
    path.write_bytes((line + end).encode() * 3)
    examples = hellaswag.parse(str(path), CHARACTERS)
    assert len(examples) == 3
    assert examples[2].context == [ord(c) for c in ctx]
    assert examples[2].endings[1] == [ord(" "), ord(separator)]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[1]",
        '{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}',
        '{"ctx": "a", "endings": ["b", "c", "d", 4], "label": 0}',
        '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}',
        '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": "1"}',
        '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": true}',
        '{"ctx": 7, "endings": ["b", "c", "d", "e"], "label": 1}',
        '{"ctx": "a", "endings": {"b": 1}, "label": 1}',
        "",
        "[" * 100_000,
        '{"ctx": ' + "9" * 5000 + "}",
    ],
    ids=lambda line: line[:60],
)
def test_a_question_that_is_none(line, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match="questions.jsonl, line 2: expected") as caught:
        hellaswag.parse(str(path), CHARACTERS)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "example",
    [
        Example([], [[1]] * 4, 0),
        Example([1], [[1], [1], [], [1]], 0),
        Example([1], [[1]] * 3, 0),
        Example([1], [[1]] * 4, 4),
        Example([65535], [[1]] * 4, 0),
        Example([1], [[65535]] * 4, 0),
        Example([1] * 33_000, [[1]] * 4, 0),
    ],
    ids=["no context", "no ending", "three", "label", "token", "token of an ending", "too long"],
)
def test_an_example_that_does_not_fit_the_file(example, tmp_path):
    path = tmp_path / "new.bin"
    with pytest.raises(ValueError, match="new.bin: example 1") as caught:
        hellaswag.write(str(path), [Example([1], [[1]] * 4, 0), example])
    assert str(caught.value).isprintable() and os.listdir(tmp_path) == []


@pytest.mark.parametrize("count", [0, 65536])
def test_a_number_of_examples_that_does_not_fit_the_file(count, tmp_path):
    with pytest.raises(ValueError, match=f"{count} examples, expected 1 to 65535"):
        hellaswag.write(str(tmp_path / "new.bin"), [Example([1], [[1]] * 4, 0)] * count)


def with_number(at, value):
    """One of a file's int16, counted from the end of the header, changed."""
    at = 1024 + 2 * at
    return lambda data: data[:at] + struct.pack("<H", value) + data[at + 2 :]


def with_field(at, value):
    """One of the header's int32 changed."""
    return lambda data: data[: 4 * at] + struct.pack("<i", value) + data[4 * at + 4 :]


DAMAGED = {  # the first example has 7 + 3 + 4 * 2 numbers
    "empty": lambda d: b"",
    "header alone": lambda d: d[:1024],
    "half a header": lambda d: d[:512],
    "another magic number": with_field(0, 20240520),
    "another version": with_field(1, 2),
    "fewer examples": with_field(2, 1),
    "more examples": with_field(2, 3),
    "another longest": with_field(3, 30),
    "no mark": with_number(0, 65534),
    "too few bytes": with_number(1, 26),
    "no bytes": with_number(1, 0),
    "another index": with_number(2, 1),
    "a label too large": with_number(3, 4),
    "three endings": with_number(4, 3),
    "a context too long": with_number(5, 65535),
    "no context": with_number(5, 0),
    "a context too short": with_number(5, 1),
    "an ending too long": with_number(9, 2),
    "no ending": with_number(9, 0),
    "a token that is none": with_number(6, 65535),
    "truncated": lambda d: d[:-2],
    "half a number less": lambda d: d[:-1],
    "half a number more": lambda d: d + b"\0",
    "a number more": lambda d: d + b"\0\0",
    "a mark more": lambda d: d + b"\xff\xff",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "questions.bin"
    examples = [Example([7, 8, 9], [[1]] * 4, 0), Example([5], [[1], [2], [3], [4, 4, 4, 4]], 3)]
    path.write_bytes(file_by_hand(examples))
    assert hellaswag.read(str(path)) == examples
    path.write_bytes(DAMAGED[damage](file_by_hand(examples)))
    with pytest.raises(ValueError, match="questions.bin: ") as caught:
        hellaswag.read(str(path))
    assert str(caught.value).isprintable()


def test_fuzzed_evaluation_files(tmp_path):
    """What is read is what the file says, or an error of one line."""
    examples = made_up_examples(8, 300, 20)
    (tmp_path / "questions.bin").write_bytes(file_by_hand(examples))

    def check(found):
        assert file_by_hand(found)[1024:] == (tmp_path / "questions.bin").read_bytes()[1024:]

    def read():
        try:
            return hellaswag.read(str(tmp_path / "questions.bin"))
        except ValueError as error:
            raise gpt2.InputError(str(error)) from None

    fuzz(tmp_path, ["questions.bin"], read, check)


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
    fitted = [hellaswag.fitted(example, sizes["V"], T) for example in examples]
    assert sum(example.cut for example in fitted) > 0

    right = right_norm = 0
    for example, whole in zip(fitted, examples, strict=True):
        assert whole.context[-len(example.context) :] == example.context
        assert example.cut == (len(example.context) < len(whole.context))
        ours = model.token_losses(example.context, example.endings)
        truth = plain_losses(theirs, example)
        for mine, other in zip(ours, truth, strict=True):
            assert abs(mine.sum() - other.sum()) < 1e-5 * other.sum()
            assert abs(mine.mean() - other.mean()) < 1e-5 * other.mean()
            assert relative_error(mine, other) < 1e-5
        for score in (np.sum, np.mean):
            answers = [np.argmin([score(loss) for loss in losses]) for losses in (ours, truth)]
            assert answers[0] == answers[1]
        right += int(np.argmin([loss.sum() for loss in truth]) == example.label)
        right_norm += int(np.argmin([loss.mean() for loss in truth]) == example.label)

    acc_norm, line = hellaswag.score(model, fitted)
    assert acc_norm == right_norm / 100
    cut = sum(example.cut for example in fitted)
    expected = f"hellaswag {right_norm}/100 acc_norm {right_norm / 100:.4f} acc {right / 100:.4f}"
    assert line == f"{expected} ({cut} contexts were too long and lost their beginning)"


def test_a_context_keeps_as_much_of_its_end_as_there_is_room_for():
    endings = [[1] * 3, [2], [3], [4]]
    for n, cut in ((6, False), (7, True), (20, True)):
        example = hellaswag.fitted(Example([*range(n)], endings, 0), 50, 9)
        assert example == Example([*range(n)][-6:], endings, 0, cut)


def test_what_the_model_can_not_read_is_one_line():
    example = Example([1, 2], [[1] * 9, [2], [3], [4]], 0)
    with pytest.raises(ValueError, match="an ending has 9 tokens, the model reads 9"):
        hellaswag.fitted(example, 50, 9)
    assert hellaswag.fitted(example, 5, 10).context == [2]
    with pytest.raises(ValueError, match="holds token 4, the model's vocabulary ends at 3"):
        hellaswag.fitted(example, 4, 10)


class Told:
    """A model whose losses are given, one list for each question."""

    def __init__(self, losses, before_each=lambda: None):
        self.losses = iter(losses)
        self.before_each = before_each

    def token_losses(self, context, continuations):
        self.before_each()
        return [np.array(loss, np.float32) for loss in next(self.losses)]


def test_scores_by_hand():
    """The least sum is that of the first ending, the least mean that of the second."""
    losses = [[[3.0], [2.0, 2.0], [9.0], [9.0]]] * 4
    labels = [0, 1, 1, 3]
    examples = [Example([1], [[1], [1, 1], [1], [1]], label) for label in labels]
    progress = SimpleNamespace()
    acc_norm, line = hellaswag.score(Told(losses), examples, (), progress)
    assert acc_norm == 0.5 and line == "hellaswag 2/4 acc_norm 0.5000 acc 0.2500"
    assert progress.done == 1


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
        examples.append(Example(context, [endings[i] for i in order], label))
    return examples


def test_a_model_that_was_taught_the_answers():
    """The accuracy rises from chance to above 0.95, on the parameters as they are by now."""
    model = gpt2.GPT2(gpt2.GPT2Config(16, 40, 2, 2, 32), 16, 5)
    examples = taught_examples(200, 1)
    before, _ = hellaswag.score(model, examples)
    rng = np.random.default_rng(2)
    for _ in range(60):
        text = rng.integers(0, 8, (16, 6))
        k = rng.integers(0, 8, 16)
        text[:, 3], text[:, 4], text[:, 5] = 10 + k, 20 + k, 30
        model.forward(text[:, :5], text[:, 1:])
        model.backward()
        model.update(1e-2)
    after, line = hellaswag.score(model, examples)
    assert before < 0.6 and after > 0.95
    assert line.startswith(f"hellaswag {round(after * 200)}/200 acc_norm {after:.4f} acc ")


def test_a_signal_leaves_what_there_is():
    """It is looked at after each question."""
    stopped = []
    calls = []

    def signal_at_the_fourth():
        calls.append(1)
        if len(calls) == 4:
            stopped.append(2)

    model = Told([[[1.0], [2.0], [3.0], [4.0]]] * 10, signal_at_the_fourth)
    acc_norm, line = hellaswag.score(model, [Example([1], [[1]] * 4, 0)] * 10, stopped)
    assert acc_norm is None and len(calls) == 4
    assert line == "hellaswag 4/4 acc_norm 1.0000 acc 1.0000 (stopped after 4 of 10)"


# --------------------------------------------------------------------------------------------------
# The command lines


@pytest.fixture
def questions(small_folder):
    """An evaluation file in data/ of the small run's folder, for its vocabulary of bytes."""
    path = small_folder / "data" / "hellaswag_val.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(file_by_hand(made_up_examples(12, 250, 14)))
    yield path
    path.unlink()


@pytest.fixture
def ctrl_c_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_from_the_command_line(call_main, questions, ctrl_c_as_it_was, tmp_path, capsys):
    """After each validation, in main.log; and the same line from the program of its own."""
    flags = (*SMALL_RUN, "--num_iterations", 4, "--val_loss_every", 2, "--hellaswag_eval", 1)
    stdout = succeeded(call_main(*flags, "--output_dir", tmp_path / "run"))
    lines = [line for line in stdout.splitlines() if line.startswith("hellaswag ")]
    assert len(lines) == 3
    scores = [float(line.split()[3]) for line in lines]
    log = (tmp_path / "run" / "main.log").read_text().splitlines()
    found = [line for line in log if " eval:" in line]
    pairs = zip((0, 2, 4), scores, strict=True)
    assert found == [f"s:{step} eval:{score:.4f}" for step, score in pairs]

    assert hellaswag.main(["--model", str(tmp_path / "run")]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == lines[-1] + "\n" and stderr == ""


def test_questions_in_tokens_that_the_model_has_not(call_main, questions):
    questions.write_bytes(file_by_hand(made_up_examples(12, 50257, 14)))
    result = call_main(*SMALL_RUN, "--num_iterations", 1, "--hellaswag_eval", 1)
    assert "the model's vocabulary ends at 255" in failed_in_one_line(result)


def test_the_first_so_many(call_main, questions, ctrl_c_as_it_was, capsys):
    assert hellaswag.main(["--model", "model", "--limit", "7"]) == 0
    assert "/7 acc_norm " in capsys.readouterr().out
    flags = ("--num_iterations", 0, "--hellaswag_eval", 1, "--hellaswag_limit", 5)
    assert "/5 acc_norm " in succeeded(call_main(*SMALL_RUN, *flags))


def test_ctrl_c_says_how_far_it_came(call_main, questions, ctrl_c_as_it_was, capsys, monkeypatch):
    calls = []
    before = gpt2.GPT2.token_losses

    def interrupted_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return before(*arguments)

    monkeypatch.setattr(gpt2.GPT2, "token_losses", interrupted_at_the_third)
    assert hellaswag.main(["--model", "model"]) == 130
    assert capsys.readouterr().out.endswith(" (stopped after 3 of 12)\n")


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "model", "--limit", "-1"], "a limit of -1 examples"),
    ],
)
def test_what_can_not_be_is_one_line(flags, part, call_main, questions, ctrl_c_as_it_was, capsys):
    assert hellaswag.main(flags) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert part in stderr


def test_without_a_network_and_questions(call_main, ctrl_c_as_it_was, capsys):
    assert hellaswag.main(["--model", "model"]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert "hellaswag_val.jsonl" in stderr
