"""
HellaSwag: the beginning of a story and four endings. Which is the right one? (Zellers et al., 2019)

    python -m extras.hellaswag
        GPT-2 124M answers all 10,042 questions

    python -m extras.hellaswag --model data/d6 --limit 1000
        another model, and the first thousand

A model's answer is the ending that it finds likeliest: the one with the least sum of its tokens'
losses, for the score "acc", or with the least mean, for "acc_norm". Chance has 0.25.

The questions are fetched once, to data/hellaswag_val.jsonl. Each line of it is a JSON object with
the beginning, "ctx", the four "endings", and the number of the right one, "label".
"""

import json
import sys
from itertools import islice
from typing import NamedTuple

import numpy as np

import train_gpt2 as gpt2
from extras import command_line, exit_code_of
from train_gpt2 import GPT2, InputError, require

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
ENDINGS = 4
PRINT_EVERY = 100  # questions


class Question(NamedTuple):
    """Which of the endings continues the context?"""

    context: list  # token ids
    endings: list  # four lists of token ids
    label: int  # the number of the right one


def fetch_questions():
    """The path of the questions."""
    import prepro_tinyshakespeare as prepro

    try:
        return prepro.download(URL, prepro.in_data("hellaswag_val.jsonl"), what="HellaSwag")
    except ValueError as error:
        raise InputError(str(error)) from None


def read_questions(path, encode, limit=0):
    """The first `limit` questions in a file, or all if that is 0: a list of Question.

    encode   a function from a text to a list of token ids
    """
    questions = []
    with open(path, "rb") as file:  # of bytes, so that a line ends with "\n" and nothing else
        for number, line in enumerate(islice(file, limit or None), start=1):
            try:
                item = json.loads(line)
                context, endings, label = item["ctx"], item["endings"], item["label"]
                right = {type(text) for text in [context, *endings]} == {str}
                right = right and len(endings) == ENDINGS and label in range(ENDINGS)
            except (ValueError, KeyError, TypeError, RecursionError):
                right = False
            require(
                right,
                f"{path}, line {number}: expected JSON with ctx, {ENDINGS} endings and a label "
                f"from 0 to {ENDINGS - 1}: delete the file to fetch it again",
            )
            ids = [encode(" " + ending) for ending in endings]
            questions.append(Question(encode(context), ids, label))
    require(questions, f"{path}: holds no question: delete it to fetch it again")
    return questions


def answers(model, questions):
    """For each question whether the model is right, by the sum and by the mean: pairs of bools.

    Of a context that is too long for the model, it reads the last tokens.
    """
    for question in questions:
        longest = max(map(len, question.endings))
        most = model.config.max_seq_len
        room = most - longest
        require(room > 0, f"an ending has {longest} tokens, and the model reads {most}")
        losses = model.token_losses(question.context[-room:], question.endings)
        by_sum = np.argmin([loss.sum() for loss in losses])
        by_mean = np.argmin([loss.mean() for loss in losses])
        yield by_sum == question.label, by_mean == question.label


def line_of(found):
    """What is printed of the answers so far, a list of pairs."""
    acc, acc_norm = np.mean(found, axis=0)
    right = sum(by_mean for _, by_mean in found)
    return f"hellaswag {right}/{len(found)} acc_norm {acc_norm:.4f} acc {acc:.4f}"


def score(source, limit):
    """Let a model, by its name or path, answer: print how it does, and in the end the score."""
    require(limit >= 0, f"a limit of {limit} questions: expected 0, for all, or more")
    model = GPT2.from_pretrained(source, 1, 0, training=False)
    V = model.config.vocab_size
    known = model.vocabulary == "gpt2"
    require(known, f"{source}: its {V} tokens are not GPT-2's, which HellaSwag is asked in")
    questions = read_questions(fetch_questions(), gpt2.tokenizer(model.vocabulary).encode, limit)

    found = []
    try:
        for answer in answers(model, questions):
            found.append(answer)
            if len(found) % PRINT_EVERY == 0 or len(found) == len(questions):
                print(line_of(found), flush=True)
    except KeyboardInterrupt:
        if found:
            print(f"{line_of(found)} (stopped after {len(found)} of {len(questions)})")
        raise


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = command_line("hellaswag", __doc__)
    add = parser.add_argument
    add("--model", default="gpt2", metavar="X", help="as of the trainer (default: gpt2)")
    add("--limit", type=int, default=0, metavar="N", help="the first N; 0: all (default: 0)")
    args = parser.parse_args(argv)
    return exit_code_of(score, args.model, args.limit)


if __name__ == "__main__":
    sys.exit(main())
