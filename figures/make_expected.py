"""
Makes EXPECTED.md, what a run on Tiny Shakespeare should look like, from real runs.

    python figures/make_expected.py data/tiny_shakespeare.txt

trains three models, and one of two layers with each of five vocabularies, which takes some 25
minutes on two cores. The losses come from main.jsonl.
"""

import argparse
import gzip
import json
import lzma
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import date

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)

COMMON = "--warmup_iters 20 --learning_rate_decay_frac 0.1 --weight_decay 0.1 --grad_clip 1 "
COMMON += "--val_loss_every 10 --sample_every 1000 --temperature 0.8 --seed 1337 --max_new_tokens "
BYTES = "--input_bin data/tiny_shakespeare_bytes_train.bin "
BYTES += "--input_val_bin data/tiny_shakespeare_bytes_val.bin"
RUNS = {  # name: flags
    "bytes": f"--model bytes --num_iterations 1000 {BYTES} {COMMON} 200",
    "d6": f"--model d6 --num_iterations 1000 --batch_size 8 --learning_rate 1e-3 {COMMON} 60",
    "d12": f"--model d12 --num_iterations 200 --learning_rate 6e-4 {COMMON} 60",
}
VOCABULARIES = {  # name: flags of prepro_tinyshakespeare.py, the files' prefix
    "bytes": ("--bytes 1", "tiny_shakespeare_bytes"),
    "512": ("--vocab_size 512", "tiny_shakespeare_512"),
    "1,024": ("--vocab_size 1024", "tiny_shakespeare_1024"),
    "2,048": ("--vocab_size 2048", "tiny_shakespeare_2048"),
    "GPT-2's": ("", "tiny_shakespeare"),
}
SECONDS = 60  # of updates for each of them
EQUAL_TIME = f"""\
The model of the first run (2 layers, 128 channels, 16 passages of 64 tokens a batch), by the
settings of `--model d2` or `bytes`, after {SECONDS} seconds of updates. Losses in nats a token
can't be compared between vocabularies; those a byte can. The validation text, the first 106,657
bytes, is read whole. 512, 1,024 and 2,048 tokens are learned from what follows it. GPT-2's have
an <|endoftext|> at each blank line, whose loss counts, and which is no byte. The number of
updates follows from how long the first 60 took; the time of one varies on a busy machine."""
STEPS = (0, 10, 40, 100, 200, 1000)
PRIOR = 20  # how many tokens of the unigram distribution the bigram's counts begin with


def cross_entropies(train, val, V):
    """In nats a token of val: of a uniform guess, of train's unigrams, and of its bigrams."""
    counts = np.bincount(train, minlength=V) + 1.0
    unigram = counts / counts.sum()
    pairs = np.bincount(train[:-1], minlength=V)
    seen, numbers = np.unique(train[:-1] * V + train[1:], return_counts=True)

    before, after = val[:-1], val[1:]
    asked = before * V + after
    place = np.minimum(np.searchsorted(seen, asked), len(seen) - 1)
    together = np.where(seen[place] == asked, numbers[place], 0)
    bigram = (together + PRIOR * unigram[after]) / (pairs[before] + PRIOR)
    return math.log(V), -np.log(unigram[val]).mean(), -np.log(bigram).mean()


def read_tokens(path):
    return np.fromfile(path, "<u2", offset=1024).astype(np.int64)


def run_of(folder, name, flags):
    """(entries of main.jsonl, stdout) of a run in data/NAME."""
    words = [sys.executable, os.path.join(TOP, "train_gpt2.py"), *flags.split()]
    words += ["--output_dir", f"data/{name}"]
    print(f"{name}: {flags}", flush=True)
    stdout = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, check=True).stdout.decode()
    with open(os.path.join(folder, "data", name, "main.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file], stdout


def train(folder, name):
    """(entries of main.jsonl, the sample at the end) of one of RUNS."""
    entries, stdout = run_of(folder, name, RUNS[name])
    return entries, stdout.rpartition("--- sample\n")[2].partition("\nbest val loss ")[0]


def median_ms(entries):
    """How long an update took, in milliseconds."""
    return statistics.median(entry["ms"] for entry in entries if "ms" in entry)


def in_equal_time(folder, name):
    """A row of the table of vocabularies: a small model that has learned for SECONDS."""
    _, prefix = VOCABULARIES[name]
    model = "bytes" if name == "bytes" else "d2"
    flags = f"--model {model} --input_bin data/{prefix}_train.bin --sample_every 0 "
    flags += f"--input_val_bin data/{prefix}_val.bin --val_max_steps 9999 --num_iterations"
    entries, _ = run_of(folder, f"{prefix} timed", f"{flags} 60 --val_loss_every 0")
    updates = round(1000 * SECONDS / median_ms(entries))
    flags += f" {updates} --warmup_iters {updates // 14} --val_loss_every 200"
    entries, stdout = run_of(folder, f"{prefix} run", flags)
    parameters = stdout.partition("model: ")[2].partition(" parameters")[0]
    best = min((e for e in entries if "val_loss" in e), key=lambda entry: entry["val_loss"])
    bits = best["bits_per_byte"]
    losses = f"{best['val_loss']:.3f}", f"{bits * math.log(2):.3f}", f"{bits:.2f}"
    return name, parameters, f"{median_ms(entries):.0f}", updates, *losses


def table(rows):
    """Lines of a Markdown table, of which the first row is the heading."""
    first, *others = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [first, "|" + "---|" * len(rows[0]), *others]


def report(runs, tokens, text, equal):
    """The lines of EXPECTED.md."""
    machine = f"two threads, {platform.machine()} ({platform.system()}), Python "
    machine += f"{platform.python_version()}, NumPy {np.__version__}, {date.today()}"
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=TOP, text=True)
    yield "# What to expect on Tiny Shakespeare"
    yield ""
    yield "Made by `python figures/make_expected.py` from runs on"
    yield f"{machine}, commit {commit.strip()}."
    yield "All losses are in nats a token, on the passages that a validation reads. Another machine"
    yield "has other last digits."
    yield ""
    rows = [["updates", *(f"{name}, val" for name in runs), *(f"{name}, train" for name in runs)]]
    for step in STEPS:
        row = [step]
        for key in ("val_loss", "train_loss"):
            for entries, _ in runs.values():
                found = [e[key] for e in entries if e["step"] == step and key in e]
                row.append(f"{found[0]:.3f}" if found else "")
        rows.append(row)
    yield from table(rows)
    yield ""
    for name, (entries, _) in runs.items():
        losses = [(e["val_loss"], e["step"]) for e in entries if "val_loss" in e]
        least, step = min(losses)
        last = entries[-1]["step"]
        turned = "where it turns" if step < last - 50 else "it has not turned yet"
        ms = median_ms(entries)
        yield f"- {name}: {ms:.0f} ms an update. The least validation loss is {least:.3f}, after"
        yield f"  update {step} of {last}; {turned}. `python train_gpt2.py {RUNS[name]}`"
    yield ""
    yield "## Vocabularies, in equal time"
    yield ""
    yield EQUAL_TIME
    yield ""
    rows = ["vocabulary", "parameters", "ms an update", "updates", "nats a token", "nats a byte"]
    yield from table([[*rows, "bits a byte"], *equal])
    yield ""
    yield "## What the text alone gives"
    yield ""
    yield "The cross-entropy of the validation text, by counts of the training text. A unigram has"
    yield f"one added to each count, a bigram {PRIOR} tokens of the unigram distribution."
    yield ""
    rows = [["tokens", "uniform", "unigram", "bigram", "bytes a token"]]
    for name, (V, train_tokens, val_tokens) in tokens.items():
        found = cross_entropies(train_tokens, val_tokens, V)
        per_token = len(text) / (len(train_tokens) + len(val_tokens))
        rows.append([name, *(f"{x:.3f}" for x in found), f"{per_token:.2f}"])
    yield from table(rows)
    yield ""
    packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    sizes = ", ".join(f"{name} {8 * len(data) / len(text):.2f}" for name, data in packed.items())
    yield f"Compressed, in bits a byte: {sizes}. A loss in nats a token is loss / ln(2) / (bytes a"
    yield "token) bits a byte."
    yield ""
    yield "## OpenAI's GPT-2 124M"
    yield ""
    yield "Not measured here: these are llm.c's losses, whose run has the settings that this"
    yield "program has by default. The validation loss is 5.252026 at the start and 4.107781"
    yield "after 40 updates; the first train losses are 5.356189, 4.301069, 4.623322, 4.600470."
    yield ""
    yield "## Samples"
    for name, (_, sample) in runs.items():
        yield ""
        yield f"{name}, at the end of its run:"
        yield ""
        yield from ("    " + line for line in sample.splitlines())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", help="Tiny Shakespeare, as prepro_tinyshakespeare.py fetches it")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(os.path.join(folder, "data"))
        shutil.copy(args.text, os.path.join(folder, "data", "tiny_shakespeare.txt"))
        prepro = [sys.executable, os.path.join(TOP, "prepro_tinyshakespeare.py")]
        for words, _ in VOCABULARIES.values():
            subprocess.run(prepro + words.split(), cwd=folder, check=True)

        tokens = {}
        for name, V in (("bytes", 256), ("GPT-2's", 50257)):
            _, prefix = VOCABULARIES[name]
            paths = [os.path.join(folder, "data", f"{prefix}_{x}.bin") for x in ("train", "val")]
            tokens[name] = V, *map(read_tokens, paths)
        with open(args.text, "rb") as file:
            text = file.read()
        equal = [in_equal_time(folder, name) for name in VOCABULARIES]
        runs = {name: train(folder, name) for name in RUNS}

    path = os.path.join(HERE, "EXPECTED.md")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(report(runs, tokens, text, equal)) + "\n")
    print(path)


if __name__ == "__main__":
    main()
