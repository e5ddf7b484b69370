"""
HellaSwag: the beginning of a story and four endings. Which is the right one? (Zellers et al., 2019)

    python -m extras.hellaswag
        GPT-2 124M answers all 10,042 questions

    python -m extras.hellaswag --model data/d6 --limit 1000
        another model, and the first thousand

A model's answer is the ending that it finds likeliest: the one with the least sum of its tokens'
losses, for the score "acc", or with the least mean, for "acc_norm". Chance has 0.25.

The questions are fetched once, to data/hellaswag_val.jsonl, and stand in data/hellaswag_val.bin in
GPT-2's tokens, as in llm.c:

    256 int32: 20240522, version 1, number of examples, bytes of the longest example, zeros
    for each example, as uint16: 65535, its bytes, its index, label, number of endings (4), number
        of context tokens, these tokens, and for each ending its number of tokens and these tokens

The trainer imports this file for --hellaswag_eval 1. Only main() here imports the trainer.
"""

import argparse
import json
import os
import signal
import sys
from itertools import islice
from typing import NamedTuple

import numpy as np

from extras.llmc import read_header, require, write_file

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
EVALUATION = 20240522
MARK = 65535  # begins an example, and so is no token
ENDINGS = 4


class Example(NamedTuple):
    """A question: which of the endings continues the context?"""

    context: list  # token ids
    endings: list  # four lists of token ids
    label: int  # the number of the right one
    cut: bool = False  # whether the context was too long for the model, and lost its beginning


# --------------------------------------------------------------------------------------------------
# The questions


def load(limit, vocab_size, max_seq_len):
    """The examples as a model of these sizes can read them: a list of Example.

    limit: the first so many; 0: all. They are fetched and tokenised if they are not in data/ yet.
    """
    import prepro_tinyshakespeare as prepro

    require(limit >= 0, f"a limit of {limit} examples: expected 0, for all, or more")
    path = prepro.in_data("hellaswag_val.bin")
    if not os.path.exists(path):
        text = prepro.download(URL, prepro.in_data("hellaswag_val.jsonl"))
        with prepro.alone(path, "tokenising HellaSwag"):
            if not os.path.exists(path):
                write(path, parse(text, prepro.get_encoding()))
    return [fitted(example, vocab_size, max_seq_len) for example in read(path)[: limit or None]]


def fitted(example, vocab_size, max_seq_len):
    """An example whose context has lost its beginning, if it is too long for the model."""
    highest = max(map(max, [example.context, *example.endings]))
    require(
        highest < vocab_size,
        f"HellaSwag: holds token {highest}, the model's vocabulary ends at {vocab_size - 1}",
    )
    longest = max(map(len, example.endings))
    room = max_seq_len - longest
    require(room > 0, f"HellaSwag: an ending has {longest} tokens, the model reads {max_seq_len}")
    return example._replace(context=example.context[-room:], cut=len(example.context) > room)


def parse(path, encoding):
    """The examples in a .jsonl file, which has a JSON object on each line, in GPT-2's tokens."""
    encode = encoding.encode_ordinary
    examples = []
    with open(path, "rb") as file:  # of bytes, so that a line ends with "\n" and nothing else
        for number, line in enumerate(file, 1):
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: expected JSON: {error}") from None
            right = isinstance(item, dict) and is_question(item)
            require(
                right,
                f"{path}, line {number}: expected ctx, {ENDINGS} endings and a label from 0 to "
                f"{ENDINGS - 1}: delete the file to fetch it again",
            )
            endings = [encode(" " + ending) for ending in item["endings"]]
            examples.append(Example(encode(item["ctx"]), endings, item["label"]))
    return examples


def is_question(item):
    """Whether a dict has a context, four endings, and the number of one of them."""
    context, endings, label = item.get("ctx"), item.get("endings"), item.get("label")
    if not isinstance(endings, list) or len(endings) != ENDINGS:
        return False
    texts = all(isinstance(text, str) for text in [context, *endings])
    return texts and type(label) is int and 0 <= label < ENDINGS


# --------------------------------------------------------------------------------------------------
# Their file


def packed(path, examples):
    """What the file says of these examples: (the numbers of its header, its body as bytes)."""
    n = len(examples)
    require(0 < n < 1 << 16, f"{path}: {n} examples, expected 1 to 65535")
    rows = []
    for index, example in enumerate(examples):
        parts = [example.context, *example.endings]
        right = len(parts) == 1 + ENDINGS and 0 <= example.label < ENDINGS
        right = right and all(part and 0 <= min(part) and max(part) < MARK for part in parts)
        require(
            right,
            f"{path}: example {index}: expected a context and {ENDINGS} endings of at least one "
            f"token, ids from 0 to {MARK - 1}, and a label from 0 to {ENDINGS - 1}",
        )
        row = [MARK, 0, index, example.label, ENDINGS]
        for part in parts:
            row += [len(part), *part]
        row[1] = 2 * len(row)
        fits = row[1] < 1 << 16
        require(fits, f"{path}: example {index} takes {row[1]} bytes, at most 65535 fit")
        rows.append(np.array(row, "<u2").tobytes())
    return [EVALUATION, 1, n, max(map(len, rows))], b"".join(rows)


def write(path, examples):
    """llm.c's evaluation file from a list of Example."""
    numbers, body = packed(path, examples)
    write_file(path, numbers, [body])


def read(path):
    """The examples of llm.c's evaluation file: a list of Example.

    We take the examples as far as the numbers go, and ask afterwards whether they make this file.
    """
    header = read_header(path)[:4]
    require(
        header[:2] == [EVALUATION, 1],
        f"{path}: no evaluation file: it begins with {header[:2]}, expected {[EVALUATION, 1]}: "
        "delete the file and run again",
    )
    with open(path, "rb") as file:
        body = file.read()[1024:]

    examples = []
    numbers = iter(np.frombuffer(body, "<u2", len(body) // 2).tolist())
    for _mark in numbers:
        _nbytes, _index, label, _endings = (next(numbers, 0) for _ in range(4))
        parts = [list(islice(numbers, next(numbers, 0))) for _ in range(1 + ENDINGS)]
        examples.append(Example(parts[0], parts[1:], label))

    try:
        require(packed(path, examples) == (header, body), f"{path}: its lengths contradict it")
    except ValueError as error:
        raise ValueError(f"{error}: delete the file and run again") from None
    return examples


# --------------------------------------------------------------------------------------------------
# The answers


def score(model, examples, stopped=(), progress=None):
    """Let a model answer: (acc_norm, a line to print). acc_norm is None if it was stopped.

    model      has token_losses(context, continuations): the losses of each continuation's tokens
    stopped    a list that is no longer empty when a signal has come
    progress   its attribute `done` is set to the fraction that is answered
    """
    n = len(examples)
    answered = right = right_norm = 0
    for example in examples:
        losses = model.token_losses(example.context, example.endings)
        right += int(np.argmin([loss.sum() for loss in losses]) == example.label)
        right_norm += int(np.argmin([loss.mean() for loss in losses]) == example.label)
        answered += 1
        if progress is not None:
            progress.done = answered / n
        if stopped:
            break

    acc, acc_norm = right / answered, right_norm / answered
    line = f"hellaswag {right_norm}/{answered} acc_norm {acc_norm:.4f} acc {acc:.4f}"
    cut = sum(example.cut for example in examples)
    if cut:
        line += f" ({cut} contexts were too long and lost their beginning)"
    if answered < n:
        return None, f"{line} (stopped after {answered} of {n})"
    return acc_norm, line


def main(argv=None):
    """The command line. Returns the exit code: 0, 1 after what its user can mend, 130 at Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.hellaswag",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="gpt2", metavar="X", help="as of the trainer (default: gpt2)")
    add("--limit", type=int, default=0, metavar="N", help="the first N; 0: all (default: 0)")
    args = parser.parse_args(argv)

    stopped = []
    try:
        import train_gpt2 as gpt2

        model = gpt2.GPT2.from_pretrained(args.model, 1, 1, training=False)
        examples = load(args.limit, model.config.vocab_size, model.config.max_seq_len)
        signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
        with gpt2.Progress("hellaswag") as progress:
            print(score(model, examples, stopped, progress)[1])
    except KeyboardInterrupt:
        print("stopped: run it again", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
