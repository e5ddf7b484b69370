"""
llm.c's files, in both directions (github.com/karpathy/llm.c).

    python -m extras.llmc
        writes what a port of GPT-2 124M to another language begins with and checks itself against:

        gpt2_124M.bin, gpt2_124M_bf16.bin   the model in float32 and in bfloat16
        gpt2_124M_debug_state.bin           one batch: inputs, targets, logits, loss, gradients
        gpt2_tokenizer.bin                  the bytes of every token
        tiny_shakespeare_{train,val}.bin    the tokens, in data/, if they are not there yet

    python -m extras.llmc --model data/d6 --output_dir data/port
        the same of another model

    python -m extras.llmc --model data/port/gpt2_30M.bin --output_dir data/back
        the other direction: a folder for train_gpt2.py --model, and for Hugging Face's transformers

A file begins with 256 int32, of which the first few say what follows, and the others are 0. All
numbers are little-endian.

    model       20240326, version, max_seq_len, vocab_size, num_layers, num_heads, channels,
                    padded_vocab_size
                the 16 parameters, in order, as bfloat16 in version 5, as float32 in version 3. wte
                    is followed by rows of zeros up to padded_vocab_size, a multiple of 128.
                    Version 1, which is read too, is version 3 without these rows.

    state       20240327, version 2, B, T
                inputs, targets (B, T) int32, logits (B, T, V) float32, the loss, and the 16
                    gradients as the parameters are in version 3, wte's with rows of zeros

    tokenizer   20240328, version 2, number of tokens, the id of <|endoftext|>
                for each token, one byte with its length, then its bytes
"""

import contextlib
import os
import sys
from dataclasses import astuple

import numpy as np

import train_gpt2 as gpt2
from extras import command_line, exit_code_of
from train_gpt2 import GPT2, GPT2Config, require

MODEL = 20240326
STATE = 20240327
TOKENIZER = 20240328

HEADER_BYTES = 1024
DTYPES = {1: "<f4", 3: "<f4", 5: "<u2"}  # of a model, by its version
PIECE = 1 << 20  # numbers that are converted at a time
B, T = 4, 64  # of the batch in a state, as in llm.c


# --------------------------------------------------------------------------------------------------
# bfloat16 is the upper half of a float32


def to_bfloat16(x):
    """float32 to the nearest bfloat16, as uint16; to the even one, if two are equally near."""
    bits = x.view("<u4")
    is_odd = bits >> 16 & 1
    return ((bits + 0x7FFF + is_odd) >> 16).astype("<u2")


def from_bfloat16(x):
    """uint16 to float32."""
    return (x.astype("<u4") << 16).view("<f4")


# --------------------------------------------------------------------------------------------------
# Reading


def read_model(path):
    """A model file: (GPT2Config, params {name: float32 array}).

    Of float32, params are views of the file, which is mapped into memory. InputError unless the
    file's length is what its header describes and all numbers are finite; OSError.
    """
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4).tolist()
    magic, version, *sizes, padded_vocab_size = (header + [0] * 8)[:8]
    require(
        magic == MODEL,
        f"{path}: not llm.c's model: it begins with {magic}, expected {MODEL}: write one with "
        "python -m extras.llmc",
    )
    require(
        version in DTYPES,
        f"{path}: version {version}, expected 1 or 3 (float32) or 5 (bfloat16)",
    )
    config = GPT2Config(*sizes)
    V, NH, C = config.vocab_size, config.num_heads, config.channels
    padded = V if version == 1 else padded_vocab_size
    require(
        min(sizes) > 0 and C % NH == 0 and padded >= V,
        f"{path}: describes {config} with a padded vocabulary of {padded}: expected positive "
        "sizes, channels that the heads can share, and no fewer rows than tokens",
    )

    shapes = GPT2.param_shapes(config) | {"wte": (padded, C)}
    dtype = np.dtype(DTYPES[version])
    described = HEADER_BYTES + dtype.itemsize * gpt2.count(shapes)
    have = os.path.getsize(path)
    require(
        have == described,
        f"{path}: has {have} bytes, its header describes {described}: copy it again",
    )
    params = gpt2.carve(np.memmap(path, dtype, "r", HEADER_BYTES), shapes)
    params["wte"] = params["wte"][:V]
    for name, x in params.items():
        if version == 5:
            params[name] = x = from_bfloat16(x)
        require(np.isfinite(x).all(), f"{path}: {name} holds a number that is not finite")
    return config, params


# --------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def new_file(path, *numbers):
    """A file to write to, after a header that begins with these numbers. A whole one, or none."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[: len(numbers)] = numbers
    with gpt2.atomic_write(path) as file:
        file.write(header)
        yield file


def write_tensors(file, tensors, version=3):
    """The 16 parameters, or their gradients, in order, wte with rows of zeros at its end."""
    for name, x in tensors.items():
        flat = x.reshape(-1)
        for start in range(0, flat.size, PIECE):
            piece = np.ascontiguousarray(flat[start : start + PIECE], "<f4")
            file.write(to_bfloat16(piece) if version == 5 else piece)
        if name == "wte":
            V, C = x.shape
            file.write(np.zeros((-V % 128, C), DTYPES[version]))


def write_model(path, config, params, version=3):
    """A model file of version 3 or 5."""
    V = config.vocab_size
    with new_file(path, MODEL, version, *astuple(config), V + -V % 128) as file:
        write_tensors(file, params, version)


def write_state(path, model, inputs, targets):
    """A state file: a batch (B, T), and all that a port should find for it."""
    model.zero_grad()
    loss = model.forward(inputs, targets)
    model.backward()

    with new_file(path, STATE, 2, *inputs.shape) as file:
        file.write(inputs.astype("<i4"))
        file.write(targets.astype("<i4"))
        logits = model.acts["lnf"] @ model.params["wte"].T  # forward has kept none of them
        file.write(np.ascontiguousarray(logits, "<f4"))
        file.write(np.array(loss, "<f4"))
        write_tensors(file, model.grads)


def write_tokenizer(path, tokens, end):
    """A tokenizer file, with which a program that has no tiktoken can print what it samples.

    tokens   the bytes of each token, at most 255
    end      the id of the one that ends a text
    """
    with new_file(path, TOKENIZER, 2, len(tokens), end) as file:
        for token in tokens:
            file.write(bytes([len(token)]) + token)


# --------------------------------------------------------------------------------------------------
# The program


def write_pack(source, folder):
    """Write all that a port begins with, of a model by its name or path. Returns the paths."""
    model = GPT2.from_pretrained(source, B, T)
    V = model.config.vocab_size
    known = model.vocabulary == "gpt2"
    require(known, f"{source}: its {V} tokens are not GPT-2's, which llm.c's files hold")
    tokenizer = gpt2.tokenizer(model.vocabulary)
    train_path, val_path = gpt2.prepro("provide", "tiny_shakespeare")
    tokens = np.fromfile(val_path, "<u2", B * T + 1, offset=HEADER_BYTES)
    require(len(tokens) > B * T, f"{val_path}: has {len(tokens)} tokens, expected {B * T + 1}")

    millions = round(model.flat.shape[1] / 1e6)
    names = f"gpt2_{millions}M", f"gpt2_{millions}M_bf16", f"gpt2_{millions}M_debug_state"
    weights, weights16, state = (os.path.join(folder, f"{name}.bin") for name in names)
    write_model(weights, model.config, model.params)
    write_model(weights16, model.config, model.params, version=5)
    write_state(state, model, tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T))
    vocabulary = os.path.join(folder, "gpt2_tokenizer.bin")
    tokens = [*map(tokenizer.decode, range(50256)), b"<|endoftext|>"]
    write_tokenizer(vocabulary, tokens, tokenizer.first)
    return [weights, weights16, state, vocabulary, train_path, val_path]


def write_folder(path, folder):
    """Write a model file as a folder in Hugging Face's format. Returns its path, in a list."""
    config, params = read_model(path)
    taken = os.path.join(folder, "model.safetensors")
    require(not os.path.exists(taken), f"{taken} is there already: choose another --output_dir")
    vocabulary = gpt2.usual_vocabulary(config.vocab_size)
    gpt2.save_huggingface(folder, config, params, vocabulary)
    return [folder]


def convert(source, folder):
    """One direction or the other, as the source's name says. Prints the paths of what is new."""
    if source.endswith(".bin"):
        paths = write_folder(source, folder or source.removesuffix(".bin"))
    else:
        paths = write_pack(source, folder or os.path.dirname(gpt2.in_data("gpt2_tokenizer.bin")))
    print(*paths, sep="\n")


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = command_line("llmc", __doc__)
    about = "as of the trainer, or llm.c's .bin (default: gpt2)"
    parser.add_argument("--model", default="gpt2", metavar="X", help=about)
    about = "where the files go (default: data, or the .bin's name without its ending)"
    parser.add_argument("--output_dir", metavar="DIR", help=about)
    args = parser.parse_args(argv)
    return exit_code_of(convert, args.model, args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
