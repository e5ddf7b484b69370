"""
llm.c's files, in both directions (github.com/karpathy/llm.c).

    python -m extras.llmc
        writes what a port of GPT-2 124M to another language begins with and checks itself against:

        gpt2_124M.bin                       a model: its 124 million parameters
        gpt2_124M_debug_state.bin           one batch: inputs, targets, logits, loss, gradients
        gpt2_tokenizer.bin                  the bytes of every token
        tiny_shakespeare_{train,val}.bin    the tokens, in data/, if they are not there yet

    python -m extras.llmc --model data/d6 --output_dir data/port
        the same of another model

    python train_gpt2.py --model data/port/gpt2_30M.bin
        the other direction: the trainer reads such a model

A file begins with 256 int32, of which the first few say what follows, and the others are 0. All
numbers are little-endian.

    model       20240326, version, max_seq_len, vocab_size, num_layers, num_heads, channels,
                    padded_vocab_size
                the 16 parameters, in order, as bfloat16 in version 5, else as float32. wte is
                    followed by rows of zeros up to padded_vocab_size, a multiple of 128. (These
                    are not there in version 1.)

    state       20240327, version 2, B, T
                inputs, targets (B, T) int32, logits (B, T, V) float32, the loss, and the 16
                    gradients as the parameters are in version 3, wte's with rows of zeros

    tokenizer   20240328, version 2, number of tokens, the id of <|endoftext|>
                for each token, one byte with its length, then its bytes

The trainer imports this file when it is given a .bin. Only main() here imports the trainer.
"""

import argparse
import contextlib
import math
import os
import stat
import sys
from dataclasses import asdict

import numpy as np

MODEL = 20240326
STATE = 20240327
TOKENIZER = 20240328

SIZES = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels")
HEADER_BYTES = 1024
ITEM_BYTES = {"F32": 4, "BF16": 2}
B, T = 4, 64  # of the batch in a state, as in llm.c


def require(condition, message):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


# --------------------------------------------------------------------------------------------------
# Reading


def read_header(path):
    """The 256 numbers that a file begins with: a list; as many zeros more as the file is short."""
    mode = os.stat(path).st_mode  # opening a pipe could wait for ever
    require(stat.S_ISREG(mode), f"{path}: expected a file, found a folder, a pipe or a device")
    header = np.fromfile(path, "<i4", 256).tolist()
    return header + [0] * (256 - len(header))


def open_model(path, param_shapes):
    """What a model file holds, and where: (sizes, tensors). Nothing but its header is read.

    param_shapes   a function that takes sizes and returns the table of parameters, in llm.c's
                   names and order: {"wte": (V, C), ..., "ln1w": (L, C), ...}
    sizes          a dict of five numbers, under the names in SIZES
    tensors        {name: (offset, dtype, shape)}: bytes from the beginning of the file, "F32" or
                   "BF16", and the table's shape. wte is there without its padding

    ValueError unless the file's length is exactly what its header describes.
    """
    magic, version, *numbers, padded_vocab_size = read_header(path)[:8]
    require(
        magic == MODEL,
        f"{path}: no llm.c model: it begins with {magic}, expected {MODEL}: write one with "
        "python -m extras.llmc",
    )
    require(
        version in (1, 3, 5),
        f"{path}: version {version}, expected 1 or 3 (float32) or 5 (bfloat16)",
    )
    sizes = dict(zip(SIZES, numbers, strict=True))
    for name, value in sizes.items():
        require(value > 0, f"{path}: {name} is {value}, expected a positive integer")

    V, NH, C = sizes["vocab_size"], sizes["num_heads"], sizes["channels"]
    require(C % NH == 0, f"{path}: {C} channels can't be shared by {NH} heads")
    padding = 0 if version == 1 else padded_vocab_size - V  # rows of zeros behind wte
    require(
        padding >= 0,
        f"{path}: a padded vocabulary of {padded_vocab_size} for {V} tokens, expected {V} or more",
    )

    dtype = "BF16" if version == 5 else "F32"
    tensors = {}
    end = HEADER_BYTES
    for name, shape in param_shapes(sizes).items():
        tensors[name] = (end, dtype, shape)
        skipped = padding * C if name == "wte" else 0
        end += (math.prod(shape) + skipped) * ITEM_BYTES[dtype]

    have = os.path.getsize(path)
    require(have == end, f"{path}: has {have} bytes, its header describes {end}: copy it again")
    return sizes, tensors


# --------------------------------------------------------------------------------------------------
# Writing


def write_file(path, numbers, parts):
    """Write a header that begins with these numbers, then the parts. A whole file, or none.

    parts: an iterable of bytes and contiguous arrays. Each is written before the next is asked for.
    PATH.tmp gets the name PATH when all of it is on the disk. So if anything fails, what was at
    PATH is still there.
    """
    header = np.zeros(256, "<i4")
    header[: len(numbers)] = numbers
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)

    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def padded(tensors):
    """A table's arrays in order, as float32, wte with rows of zeros up to a multiple of 128."""
    for name, view in tensors.items():
        yield np.ascontiguousarray(view, "<f4")
        if name == "wte":
            V, C = view.shape
            yield np.zeros((-V % 128, C), "<f4")


def write_model(path, sizes, params):
    """A model file of version 3. sizes: a dict as open_model returns it; params {name: array}."""
    V = sizes["vocab_size"]
    numbers = [sizes[name] for name in SIZES]
    write_file(path, [MODEL, 3, *numbers, V + -V % 128], padded(params))


def write_state(path, inputs, targets, logits_pieces, loss, grads):
    """A state file: one batch, with all that a port should find for it.

    inputs, targets (B, T) integers; loss: a number; grads {name: array}
    logits_pieces: an iterable of arrays (rows, V), so that all logits, which together are the
    largest array of all, are never there at once
    """

    def parts():
        yield inputs.astype("<i4")
        yield targets.astype("<i4")
        for piece in logits_pieces:
            yield np.ascontiguousarray(piece, "<f4")
        yield np.array(loss, "<f4")
        yield from padded(grads)

    write_file(path, [STATE, 2, *inputs.shape], parts())


def write_tokenizer(path, encoding):
    """A tokenizer file, with which a program that has no tiktoken can print what it samples.

    encoding: any tiktoken.Encoding with an eot_token.
    """
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    longest = max(map(len, tokens))
    require(longest < 256, f"{path}: a token has {longest} bytes, at most 255 bytes fit")
    numbers = (TOKENIZER, 2, len(tokens), encoding.eot_token)
    write_file(path, numbers, [bytes([len(token)]) + token for token in tokens])


# --------------------------------------------------------------------------------------------------
# The program


def write_tensors(model, inputs, targets, folder):
    """Write a model, and its state for one batch (B, T). Returns the two paths."""
    model.zero_grad()
    loss = model.forward(inputs, targets)
    model.backward()

    def logits_pieces():
        C = model.config.channels
        lnf = model.acts["lnf"].reshape(-1, C)
        rows = model.acts["logits"].shape[1]
        for start in range(0, len(lnf), rows):
            yield lnf[start : start + rows] @ model.params["wte"].T

    millions = round(model.flat.shape[1] / 1e6)
    model_path = os.path.join(folder, f"gpt2_{millions}M.bin")
    state_path = os.path.join(folder, f"gpt2_{millions}M_debug_state.bin")
    write_model(model_path, asdict(model.config), model.params)
    write_state(state_path, inputs, targets, logits_pieces(), loss, model.grads)
    return [model_path, state_path]


def main(argv=None):
    """The command line. Returns the exit code: 0, 1 after what its user can mend, 130 at Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.llmc",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="gpt2", metavar="X", help="as of the trainer (default: gpt2)")
    add("--output_dir", metavar="DIR", help="where the files go (default: data)")
    args = parser.parse_args(argv)

    try:
        import prepro_tinyshakespeare as prepro
        import train_gpt2 as gpt2

        model = gpt2.GPT2.from_pretrained(args.model, batch_size=B, sequence_length=T)
        token_paths = prepro.provide("tiny_shakespeare")
        tokens = gpt2.TokenFile(token_paths[1])[: B * T + 1]  # llm.c's test expects its losses
        inputs, targets = tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T)

        tokenizer_path = gpt2.in_data("gpt2_tokenizer.bin")
        if args.output_dir:
            tokenizer_path = os.path.join(args.output_dir, "gpt2_tokenizer.bin")
        paths = write_tensors(model, inputs, targets, os.path.dirname(tokenizer_path))
        write_tokenizer(tokenizer_path, prepro.get_encoding())
        print(*paths, tokenizer_path, *token_paths, sep="\n")
    except KeyboardInterrupt:
        print("stopped: run it again", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
