"""
The porting kit: every number of a tiny GPT-2, for those who write it in another language.

    python -m extras.porting_kit
        writes the kit into data/kit/

    python -m extras.porting_kit --compare mine.safetensors
    python -m extras.porting_kit --compare mine.npz
    python -m extras.porting_kit --compare mine/index.txt
        compares a port's tensors with it. It names the first that differs, in the order in which
        they are computed, and the function of train_gpt2.py that computes it

The kit is there in float32 and in float64: kit_float32.safetensors, kit_float64.safetensors, and,
for programs that read no JSON, float32/index.txt and float64/index.txt. A line of an index is NAME
DTYPE SHAPE FILE, such as "ln1 F32 2,5,7,12 ln1.bin". DTYPE is F32, F64 or I32, and the file, which
lies beside the index, holds the bare numbers, little-endian. A single number has the shape 1. The
tensors stand in the order in which they are computed:

    settings/...             sizes of the model and the batch, layernorm's eps, AdamW's numbers
    inputs, targets          the batch (B, T)
    params/wte, ...          the parameters, in llm.c's names and layouts. All are random
    case/FUNCTION/before/X   for each function of the algorithm, its argument X before a call
    case/FUNCTION/after/X    what has become of X, if the function writes to it. Where it overwrites
                             X, random numbers stood there before. A name that ends in _add is that
                             of a call with add=True, _no_bias of one without a bias
    encoded, ln1, ... loss   activations, from the bottom up. Those of all layers are (L, ...)
    dlogits, ... dencoded    their gradients, from the top down. Those of attproj and fcproj are
                             dresidual2 and dresidual3, because a sum passes its gradient on
    dwte_classifier          what grads/wte holds before encoder_backward adds to it
    grads/wte, ...           the gradients of the parameters
    step1/m/wte, ...         AdamW's m, v and params after its first update, and before them the
                             norm of the gradients, and grad_scale, which clips them
    step2/..., step3/...     the next two, with the same batch, and with their loss and gradients

AdamW's numbers are such that float32 holds them exactly. (With beta2 = 0.999, 1 - beta2 would be
wrong by 1e-5 there.)

What a function computes is said in section 2 of train_gpt2.py, and for forward functions in
extras/mine.py; begin with the cases, which show more than a whole pass.

A file to compare may hold some of the tensors only. If its numbers are F64, they are compared with
those of the kit in float64. A tensor agrees if |mine - kit| / |kit| is at most 1e-5 in float32 and
1e-10 in float64, where |x| is the Euclidean norm; each layer of a tensor counts by itself, and an
input only if the file has it. Integers must be equal. The exit code is 0 if all that is there
agrees, and 1 if something differs or has a name that is unknown.
"""

import argparse
import contextlib
import difflib
import inspect
import json
import math
import os
import re
import sys
from dataclasses import asdict

import numpy as np

import train_gpt2 as gpt2
from train_gpt2 import require

# No two sizes are equal, so that a port which takes one for another is found. hs is 3.
CONFIG = gpt2.GPT2Config(max_seq_len=16, vocab_size=53, num_layers=2, num_heads=4, channels=12)
B, T = 5, 7

# eps is larger than usual. So it matters where a port adds it. And parameters hardly move if their
# gradient is nothing but rounding errors, as that of the keys' biases is.
ADAMW = {
    "learning_rate": 2**-8,
    "beta1": 1 - 2**-3,
    "beta2": 1 - 2**-5,
    "eps": 2**-12,
    "weight_decay": 2**-3,
}
GRAD_CLIP = 0.5

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I32": np.dtype("<i4")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
TOLERANCE = {"F32": 1e-5, "F64": 1e-10, "I32": 0}
FILES = {"F32": "kit_float32.safetensors", "F64": "kit_float64.safetensors"}

# What a layer calls, in order, and what these calls write. The last one is in calls_of_a_pass.
LAYER_FORWARD = [
    ("layernorm_forward", ["ln1", "ln1_mean", "ln1_rstd"]),
    ("matmul_forward", ["qkv"]),
    ("attention_forward", ["atty", "att_lse"]),
    ("matmul_forward", ["attproj"]),
    ("residual_forward", ["residual2"]),
    ("layernorm_forward", ["ln2", "ln2_mean", "ln2_rstd"]),
    ("matmul_forward", ["fch"]),
    ("gelu_forward", ["fch_gelu"]),
    ("matmul_forward", ["fcproj"]),
    ("residual_forward", ["residual3"]),
]
LAYER_BACKWARD = [
    ("matmul_backward", ["dfch_gelu", "grads/fcprojw", "grads/fcprojb"]),
    ("gelu_backward", ["dfch"]),
    ("matmul_backward", ["dln2", "grads/fcw", "grads/fcb"]),
    ("layernorm_backward", ["dresidual2", "grads/ln2w", "grads/ln2b"]),
    ("matmul_backward", ["datty", "grads/attprojw", "grads/attprojb"]),
    ("attention_backward", ["dqkv"]),
    ("matmul_backward", ["dln1", "grads/qkvw", "grads/qkvb"]),
]


def calls_of_a_pass(L):
    """What forward() and backward() call, in order: pairs (function, what it writes).

    The latter is a list of parts. A part (name, l) is layer l of a tensor (L, ...), and (name,
    None) is a tensor that is not divided by layers.
    """

    def whole(*names):
        return [(name, None) for name in names]

    yield "encoder_forward", whole("encoded")
    for l in range(L):
        for function, names in LAYER_FORWARD:
            yield function, [(name, l) for name in names]
    yield "layernorm_forward", whole("lnf", "lnf_mean", "lnf_rstd")

    yield "matmul_forward", whole("logits")
    yield "crossentropy_softmax_forward", whole("losses", "probs")
    yield "crossentropy_softmax_backward", whole("dlogits")
    yield "matmul_backward", whole("dlnf", "dwte_classifier")

    yield "layernorm_backward", [("dresidual3", L - 1), *whole("grads/lnfw", "grads/lnfb")]
    for l in reversed(range(L)):
        for function, names in LAYER_BACKWARD:
            yield function, [(name, l) for name in names]
        dinput = ("dresidual3", l - 1) if l > 0 else ("dencoded", None)
        yield "layernorm_backward", [dinput, ("grads/ln1w", l), ("grads/ln1b", l)]
    yield "encoder_backward", whole("grads/wte", "grads/wpe")


# --------------------------------------------------------------------------------------------------
# Making the kit. Meanwhile it is a dict {part: (array, writer)}, in the order of computation


def put(kit, name, value, writer, l=None):
    """Add a copy of an array, or a number, to the kit."""
    kit[name, l] = np.array(value, ndmin=1), writer


def put_given(kit, model, inputs, targets):
    """What a port begins with."""
    sizes = asdict(CONFIG) | {"batch_size": B, "sequence_length": T}
    adamw = {f"adamw_{name}": value for name, value in ADAMW.items()}
    settings = sizes | {"layernorm_eps": gpt2.LN_EPS} | adamw | {"grad_clip": GRAD_CLIP}
    for name, value in settings.items():
        put(kit, f"settings/{name}", value, "given")
    put(kit, "inputs", inputs, "given")
    put(kit, "targets", targets, "given")
    for name, view in model.params.items():
        put(kit, f"params/{name}", view, "given")


def put_cases(kit, dtype):
    """Each function by itself: its arguments before a call, and those that it changed after it."""
    B, T, C, NH, V, OC = 2, 5, 12, 3, 17, 7
    rng = np.random.default_rng(2)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    def case(function, *args, variant="", section=2):
        run = getattr(gpt2, function)
        before = [np.array(value) for value in args]
        run(*args)
        for argument, old, new in zip(inspect.signature(run).parameters, before, args, strict=True):
            if new is not None:
                put(kit, f"case/{function}{variant}/before/{argument}", old, "given")
            scaled = argument == "g"  # how adamw scales its gradient is its own affair
            if not np.array_equal(old, new) and not scaled:
                writer = f"{function}, section {section}"
                put(kit, f"case/{function}{variant}/after/{argument}", new, writer)

    inp, dout, out = normal(B, T, C), normal(B, T, C), normal(B, T, C)
    tokens = rng.integers(0, V, (B, T))
    tokens[1, 2:4] = tokens[0, 0]  # one that occurs three times
    weight, matrix, dproduct = normal(C), normal(OC, C), normal(B, T, OC)
    mean, rstd, lse, qkv = normal(B, T), normal(B, T), normal(B, T, NH), normal(B, T, 3 * C)
    logits, targets = 2 * normal(B, T, V), rng.integers(0, V, (B, T))
    inp[0, 0] *= 2**-7  # a variance beside which layernorm's eps matters
    logits[0, 0] *= 50  # so large that exp would overflow
    qkv[0, 0] *= 20
    large = 2 * inp
    large[1, 0] *= 40

    case("encoder_forward", normal(B, T, C), tokens, normal(V, C), normal(T, C))
    case("layernorm_forward", normal(B, T, C), mean, rstd, inp, weight, normal(C))
    case("matmul_forward", normal(B, T, OC), inp, matrix, normal(OC))
    case("matmul_forward", normal(B, T, OC), inp, matrix, None, variant="_no_bias")
    case("attention_forward", out, lse, qkv, NH)
    case("attention_backward", normal(B, T, 3 * C), dout, out, lse, qkv, NH)
    case("gelu_forward", normal(B, T, C), large)
    case("gelu_backward", normal(B, T, C), dout, large)
    case("residual_forward", normal(B, T, C), inp, dout)
    case("crossentropy_softmax_forward", normal(B, T), logits, targets)
    case("crossentropy_softmax_backward", logits, targets, 2**-4)  # logits are probs by now

    for add, variant in ((False, ""), (True, "_add")):
        grads = normal(V, C), normal(T + 3, C)
        case("encoder_backward", *grads, dout, tokens, add, variant=variant)
        grads = normal(B, T, C), normal(C), normal(C)
        case("layernorm_backward", *grads, dout, inp, mean, rstd, weight, add, variant=variant)
        for dbias, name in ((normal(OC), variant), (None, f"_no_bias{variant}")):
            grads = normal(B, T, C), normal(OC, C), dbias
            case("matmul_backward", *grads, dproduct, inp, matrix, add, variant=name)

    arrays = normal(C), normal(C), normal(C), normal(C) ** 2  # parameters, gradients, m, v
    learning_rate, beta1, beta2, eps, weight_decay = ADAMW.values()
    numbers = learning_rate * weight_decay, learning_rate, beta1, beta2, eps, 3, 0.5  # step 3
    case("adamw", *arrays, *numbers, section=7)


@contextlib.contextmanager
def watched(calls):
    """Within this, each layer function appends (its name, copies of its arrays) to a list."""
    names = [name for name in vars(gpt2) if name.endswith(("_forward", "_backward"))]
    originals = {name: getattr(gpt2, name) for name in names}

    def watch(name, function):
        def run(*args):
            function(*args)
            calls.append((name, [a.copy() for a in args if isinstance(a, np.ndarray)]))

        return run

    try:
        for name, function in originals.items():
            setattr(gpt2, name, watch(name, function))
        yield
    finally:
        for name, function in originals.items():
            setattr(gpt2, name, function)


def put_pass(kit, model, inputs, targets):
    """All that one forward and one backward pass compute."""
    calls = []
    with watched(calls):
        loss = model.forward(inputs, targets)
        model.backward()

    expected_calls = calls_of_a_pass(CONFIG.num_layers)
    for (expected, parts), (function, arrays) in zip(expected_calls, calls, strict=True):
        require(function == expected, f"the trainer called {function}, expected {expected}")
        for (name, l), array in zip(parts, arrays, strict=False):  # what is written stands first
            if array.shape[:2] == (1, B * T):  # the classifier sees the batch as one sequence
                array = array.reshape(B, T, *array.shape[2:])
            put(kit, name, array, f"{function}, section 2", l)
        if ("losses", None) in parts:
            put(kit, "loss", loss, "GPT2.forward, section 5")


def put_steps(kit, model, inputs, targets):
    """Three updates. The gradients of the first are there already."""
    for step in ("step1", "step2", "step3"):
        if step != "step1":
            loss = model.forward(inputs, targets)
            model.backward()
            put(kit, f"{step}/loss", loss, "GPT2.forward, section 5")
            for name, view in model.grads.items():
                put(kit, f"{step}/grads/{name}", view, "GPT2.backward, section 6")

        norm = model.grad_norm()
        require(norm > GRAD_CLIP, f"{step} has a norm of {norm}, which is not clipped")
        grad_scale = GRAD_CLIP / norm
        put(kit, f"{step}/grad_norm", norm, "GPT2.grad_norm, section 7")
        put(kit, f"{step}/grad_scale", grad_scale, "train_step, section 8")

        model.update(**ADAMW, grad_scale=grad_scale)
        for name in model.params:
            put(kit, f"{step}/m/{name}", model.m[name], "adamw, section 7")
            put(kit, f"{step}/v/{name}", model.v[name], "adamw, section 7")
            put(kit, f"{step}/params/{name}", model.params[name], "adamw, section 7")


def make_kit(code):
    """The kit in "F32" or "F64": (tensors, writers), both in the order of computation.

    tensors   {name: array}, the layers of each side by side
    writers   {part: "FUNCTION, section N", or "given"}
    """
    dtype = DTYPES[code]
    model = gpt2.GPT2(CONFIG, B, T, seed=None, recompute=0, dtype=dtype)
    rng = np.random.default_rng(1)
    for name, view in model.params.items():
        values = np.float32(0.3) * rng.standard_normal(view.shape, np.float32)
        if name in ("ln1w", "ln2w", "lnfw"):
            values += 1
        view[...] = values
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    kit = {}
    put_given(kit, model, inputs, targets)
    put_cases(kit, dtype)
    put_pass(kit, model, inputs, targets)
    put_steps(kit, model, inputs, targets)

    by_name = {}
    for (name, l), (array, _) in kit.items():
        is_float = array.dtype.kind == "f"
        by_name.setdefault(name, {})[l] = array.astype(dtype if is_float else DTYPES["I32"])
    tensors = {}
    for name, parts in by_name.items():
        whole = None in parts
        tensors[name] = parts[None] if whole else np.stack([parts[l] for l in sorted(parts)])
    return tensors, {part: writer for part, (_, writer) in kit.items()}


# --------------------------------------------------------------------------------------------------
# Files


def write_safetensors(path, tensors):
    """A .safetensors file. The trainer, which describes the format, can write float32 only."""
    # Numbers of 8 bytes come first, so that all of them lie at multiples of 8.
    in_file = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header = dict.fromkeys(tensors)
    end = 0
    for name in in_file:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        offsets = [begin, end]
        header[name] = {"dtype": CODES[array.dtype], "shape": array.shape, "data_offsets": offsets}

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with gpt2.atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in in_file:
            file.write(tensors[name].tobytes())


def write_plain(folder, tensors):
    """A file for each tensor, then the index."""
    os.makedirs(folder, exist_ok=True)
    index = ""
    for name, array in tensors.items():
        file_name = f"{name.replace('/', '.')}.bin"
        with gpt2.atomic_write(os.path.join(folder, file_name)) as file:
            file.write(array.tobytes())
        shape = ",".join(map(str, array.shape))
        index += f"{name} {CODES[array.dtype]} {shape} {file_name}\n"
    with gpt2.atomic_write(os.path.join(folder, "index.txt")) as file:
        file.write(index.encode())


def read_tensors(path):
    """{name: array} of a .safetensors file, a .npz, an index, or a folder with an index.txt."""
    path = os.path.join(path, "index.txt") if os.path.isdir(path) else path
    gpt2.regular_file(path)
    if path.endswith(".npz"):
        return read_npz(path)
    if path.endswith(".txt"):
        return read_plain(path)
    known = path.endswith(".safetensors")
    require(known, f"{path}: expected a name that ends in .safetensors, .npz or .txt (an index)")

    tensors = {}
    for name, stored in gpt2.read_safetensors(path)[0].items():
        dtype, shape = DTYPES.get(stored.dtype), stored.shape
        require(dtype, f"{path}: {name!r} is {stored.dtype}, expected F32, F64 or I32")
        numbers = np.fromfile(path, dtype, math.prod(shape), offset=stored.offset)
        tensors[name] = numbers.reshape(shape)
    return tensors


def read_npz(path):
    """{name: array} of what np.savez has written. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        text = " ".join(str(error).split())
        raise gpt2.InputError(f"{path}: expected a .npz of plain arrays: {text}") from None


INDEX_LINE = r"(\S+) (F32|F64|I32) ([0-9]{1,9}(?:,[0-9]{1,9}){0,7}) ([^\s/\\]+)"


def read_plain(path):
    """{name: array} of an index and the files that it names."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()

    tensors = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        words = re.fullmatch(INDEX_LINE, line)
        example = "such as 'ln1 F32 2,5,7,12 ln1.bin', with a file in the same folder"
        require(words, f"{place}: expected four words {example}, found {line!r:.99}")
        name, code, shape, file_name = words.groups()
        require(name not in tensors, f"{place}: {name!r} stands here for the second time")

        shape = tuple(map(int, shape.split(",")))
        expected = math.prod(shape) * DTYPES[code].itemsize
        file_path = os.path.join(os.path.dirname(path), file_name)
        gpt2.regular_file(file_path)
        have = os.path.getsize(file_path)
        require(have == expected, f"{file_path}: has {have} bytes, {place} describes {expected}")
        tensors[name] = np.fromfile(file_path, DTYPES[code]).reshape(shape)
    return tensors


# --------------------------------------------------------------------------------------------------
# Comparing


def difference(mine, truth, name, l):
    """What is wrong with a part of the tensor mine: a text, or None if it agrees with truth."""
    if mine.dtype != truth.dtype:
        return f"its dtype is {mine.dtype}, expected {truth.dtype}"
    if mine.shape != truth.shape:
        return f"its shape is {mine.shape}, expected {truth.shape}"

    tolerance = TOLERANCE[CODES[truth.dtype]]
    part = slice(None) if l is None else slice(l, l + 1)
    gap = np.zeros(truth.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # mine may hold anything
        gap[part] = np.abs(mine[part].astype(np.float64) - truth[part])
        error = np.linalg.norm(gap) / (np.linalg.norm(truth[part]) or 1)
    if error <= tolerance:
        return None

    text = f"its relative error is {error:.1e}, expected at most {tolerance:g}"
    if not np.isfinite(mine[part]).all():
        text = "it holds numbers that are not finite"
    worst = np.unravel_index(gap.argmax(), gap.shape)  # the first NaN, if there is one
    index = ", ".join(map(str, worst))
    return (
        f"{text}; its shape is {truth.shape}\nthe greatest difference is {gap[worst]:.3g}: "
        f"{name}[{index}] is {mine[worst]}, expected {truth[worst]}"
    )


def counted(results):
    """How many results there are of each kind, in words. None is a tensor that agrees."""
    agree, missing = results.count(None), results.count("missing")
    differ = len(results) - agree - missing
    return f"{agree} agree, {differ} differ, {missing} missing"


def compare(mine, truth, writers):
    """Print how mine compares with truth, both {name: array}. Returns whether all of it agrees."""
    unknown = [name for name in mine if name not in truth]
    for name in unknown:
        similar = difflib.get_close_matches(name, truth, 1)
        print(f"{name!a} is not in the kit", *[f"(did you mean {s}?)" for s in similar])

    parts, results = [], []
    for (name, l), writer in writers.items():
        if name in mine:
            parts.append((name, l))
            results.append(difference(mine[name], truth[name], name, l))
        elif writer != "given":
            parts.append((name, l))
            results.append("missing")

    wrong = [i for i, result in enumerate(results) if result not in (None, "missing")]
    if wrong:
        first = wrong[0]
        name, l = parts[first]
        writer = writers[name, l]
        print(f"the first to differ is {name}" + ("" if l is None else f" of layer {l}"))
        print(results[first])
        if writer == "given":
            print("it is an input")
        else:
            print(f"it is written by {writer} of train_gpt2.py")
        print(f"before it: {counted(results[:first])}")
        print(f"after it: {counted(results[first + 1 :])}")
    else:
        print(counted(results))
    missing = [
        name for (name, _), result in zip(parts, results, strict=True) if result == "missing"
    ]
    if missing:
        print(f"the first that is missing is {missing[0]}")
    return not wrong and not unknown


def compare_file(path, folder):
    """Compare a port's file with the kit in a folder, or with a new one if there is none."""
    mine = read_tensors(path)
    require(mine, f"{path}: there is no tensor in it")
    dtypes = {array.dtype for array in mine.values()}
    code = "F64" if DTYPES["F64"] in dtypes and DTYPES["F32"] not in dtypes else "F32"

    truth, writers = make_kit(code)
    kit_path = os.path.join(folder, FILES[code])
    if os.path.exists(kit_path):
        kit = read_tensors(kit_path)
        same_names = kit.keys() == truth.keys()
        same = same_names and all(kit[name].shape == truth[name].shape for name in kit)
        require(same, f"{kit_path}: written by another version: write it again")
        truth = kit
    return compare(mine, truth, writers)


def main(argv=None):
    """The command line. Returns the exit code: 0; 1 if a tensor differs, or for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.porting_kit",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    about = "where the kit is written; a comparison reads it there, if it is (default: data/kit)"
    add("--output_dir", metavar="DIR", help=about)
    add("--compare", metavar="MINE", help="compare this file with the kit, and write nothing")
    args = parser.parse_args(argv)

    folder = args.output_dir or gpt2.in_data("kit")
    try:
        if args.compare is not None:
            return 0 if compare_file(args.compare, folder) else 1

        os.makedirs(folder, exist_ok=True)
        for code, name in FILES.items():
            write_safetensors(os.path.join(folder, name), make_kit(code)[0])
        names = [*FILES.values()]
        for code, name in (("F32", "float32"), ("F64", "float64")):
            write_plain(os.path.join(folder, name), make_kit(code)[0])
            names.append(name)
        print(*[os.path.join(folder, name) for name in names], sep="\n")
    except KeyboardInterrupt:
        print("stopped: run it again", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
