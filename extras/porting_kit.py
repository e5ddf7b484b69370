"""
The porting kit: every number of a tiny GPT-2, for those who write it in another language.

    python -m extras.porting_kit
        writes data/kit.safetensors. figures/FORMATS.md lists its tensors, and says how such a file
        is read and written

    python -m extras.porting_kit --compare mine.safetensors
        compares a port's tensors with it. It names the first that differs, in the order in which
        they are computed, and the function of train_gpt2.py that computes it

The kit has the parameters and a batch, each function's arguments before and after a call (begin
with these), all that is computed in a forward and a backward pass, and three updates by AdamW. It
is in float64; parameters and inputs are numbers that float32 holds exactly. What a function
computes is said in section 2 of train_gpt2.py, and for forward functions in extras/mine.py.

A file to compare may hold some of the tensors only. One agrees if |mine - kit| / |kit| is at most
1e-5 in F32 and 1e-10 in F64, where |x| is the Euclidean norm; each layer counts by itself. I32 must
be equal. The exit code is 0 if all that is there agrees, and 1 if something differs or is unknown.
"""

import inspect
import json
import os
import sys
from dataclasses import asdict
from unittest.mock import patch

import numpy as np

import train_gpt2 as gpt2
from extras import command_line, exit_code_of
from train_gpt2 import require

# No two sizes are equal, so that a port which takes one for another is found. hs is 3.
CONFIG = gpt2.GPT2Config(max_seq_len=16, vocab_size=53, num_layers=2, num_heads=4, channels=12)
B, T = 5, 7

# float32 holds these exactly. (Of 1 - 0.999 it would lose 1e-5.) eps is larger than usual. So it
# matters where a port adds it, and parameters hardly move if their gradient is nothing but rounding
# errors, as that of the keys' biases is.
ADAMW = {
    "learning_rate": 2**-8,
    "beta1": 1 - 2**-3,
    "beta2": 1 - 2**-5,
    "eps": 2**-12,
    "weight_decay": 2**-3,
}
GRAD_CLIP = 0.5

CODES = {"<f4": "F32", "<f8": "F64", "<i4": "I32"}
TOLERANCE = {"<f4": 1e-5, "<f8": 1e-10, "<i4": 0}

# A tensor of a pass is called as its place in the blob is. Some places are used twice, and what a
# function writes there has another name, {(function, place): name}:
OTHER_NAMES = {
    ("matmul_forward", "grads/wpe"): "logits",  # see Model.room_for_logits
    ("crossentropy_softmax_forward", "grads/wpe"): "probs",
    ("crossentropy_softmax_backward", "grads/wpe"): "dlogits",
    ("matmul_backward", "grads/wte"): "dwte_classifier",  # encoder_backward adds to it
    ("matmul_backward", "dfch"): "dfch_gelu",  # gelu_backward turns it into dfch
}

# --------------------------------------------------------------------------------------------------
# Making the kit


class Kit:
    """tensors {name: array}, of float64 or int32, and the order in which they are computed.

    order   a list of [name, l, writer]: layer l of a tensor (L, ...), or with l = None all of one,
            and the function that writes it, or None if it is given
    """

    def __init__(self):
        self.tensors = {}
        self.order = []

    def put(self, name, value, writer=None, l=None):
        """Add a copy of an array or of a number."""
        array = np.array(value, ndmin=1)
        array = array.astype("<f8" if array.dtype.kind == "f" else "<i4")
        if l is None:
            self.tensors[name] = array
        else:
            layers = np.empty((CONFIG.num_layers, *array.shape))
            self.tensors.setdefault(name, layers)[l] = array
        self.order.append([name, l, writer])


def put_given(kit, model, inputs, targets):
    """What a port begins with."""
    kit.put("inputs", inputs)
    kit.put("targets", targets)
    settings = asdict(CONFIG) | {"batch_size": B, "sequence_length": T, "grad_clip": GRAD_CLIP}
    settings |= {f"adamw_{name}": value for name, value in ADAMW.items()}
    for name, value in (settings | {"layernorm_eps": gpt2.LN_EPS}).items():
        kit.put(f"settings/{name}", value)
    for name, view in model.params.items():
        kit.put(f"params/{name}", view)


def put_cases(kit, dtype):
    """Each function by itself: its arguments before a call, and those that it changed after it."""
    B, T, C, NH, V, OC = 2, 5, 12, 3, 17, 7
    rng = np.random.default_rng(2)

    normal = lambda *shape: rng.standard_normal(shape, np.float32).astype(dtype)

    def case(function, *args, variant=""):
        run = getattr(gpt2, function)
        before = [np.array(value) for value in args]
        run(*args)
        for argument, old, new in zip(inspect.signature(run).parameters, before, args, strict=True):
            if new is not None:
                kit.put(f"case/{function}{variant}/before/{argument}", old)
            scaled = argument == "g"  # how adamw scales its gradient is its own affair
            if not np.array_equal(old, new) and not scaled:
                kit.put(f"case/{function}{variant}/after/{argument}", new, function)

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

    learning_rate, beta1, beta2, eps, weight_decay = ADAMW.values()
    numbers = learning_rate * weight_decay, learning_rate, beta1, beta2, eps, 3, 0.5  # step 3
    case("adamw", normal(C), normal(C), normal(C), normal(C) ** 2, *numbers)  # v is not below 0


def places_of(model):
    """{address: (name, l)} of each layer of the activations and gradients; l is None in others."""
    places = {}
    of_layers = [*model.layer_acts(CONFIG, B, T), *model.layer_params(CONFIG)]
    for prefix, views in (("", model.acts), ("grads/", model.grads)):
        for name, view in views.items():
            for l, part in enumerate(view) if name in of_layers else [(None, view)]:
                places[part.ctypes.data] = prefix + name, l
    return places


def put_pass(kit, model, inputs, targets):
    """All that the layer functions write in one forward and one backward pass.

    Each of them is replaced by one that calls it and looks which of its arrays have changed. What
    an array is called follows from its address, and in backward_layer from the layer's number.
    """
    places = places_of(model)
    stream = [("dresidual3", CONFIG.num_layers - 1)]  # what dresidual holds, one after the other
    for l in reversed(range(CONFIG.num_layers)):
        stream += [("dresidual2", l), ("dresidual3", l - 1) if l > 0 else ("dencoded", None)]

    def recording(function, run):
        def run_and_record(*args):
            arrays = [x for x in args if isinstance(x, np.ndarray) and x.ctypes.data in places]
            found = {places[x.ctypes.data]: (x, x.copy()) for x in arrays}
            run(*args)
            layer = max((l for _, l in found if l is not None), default=None)
            for (name, l), (x, before) in found.items():
                if np.array_equal(x, before):
                    continue
                if name == "dresidual":
                    name, l = stream.pop(0)
                elif name in model.work_shapes(CONFIG, B, T):  # which the layers share
                    l = layer
                if x.shape[:2] == (1, B * T):  # the classifier sees the batch as one sequence
                    x = x.reshape(B, T, *x.shape[2:])
                kit.put(OTHER_NAMES.get((function, name), name), x, function, l)

        return run_and_record

    names = [name for name in vars(gpt2) if name.endswith(("_forward", "_backward"))]
    with patch.multiple(gpt2, **{name: recording(name, getattr(gpt2, name)) for name in names}):
        loss = model.forward(inputs, targets)
        model.backward()
    kit.put("loss", loss, "Model.forward")


def put_steps(kit, model, inputs, targets):
    """Three updates. The gradients of the first are there already."""
    for step in ("step1", "step2", "step3"):
        if step != "step1":
            loss = model.forward(inputs, targets)
            model.backward()
            kit.put(f"{step}/loss", loss, "Model.forward")
            for name, view in model.grads.items():
                kit.put(f"{step}/grads/{name}", view, "Model.backward")

        norm = model.grad_norm()
        grad_scale = GRAD_CLIP / norm
        kit.put(f"{step}/grad_norm", norm, "Model.grad_norm")
        kit.put(f"{step}/grad_scale", grad_scale, "train_step")

        model.update(**ADAMW, grad_scale=grad_scale)
        for name in model.params:
            kit.put(f"{step}/m/{name}", model.m[name], "adamw")
            kit.put(f"{step}/v/{name}", model.v[name], "adamw")
            kit.put(f"{step}/params/{name}", model.params[name], "adamw")


def make_kit(dtype=np.float64):
    """The Kit, computed in a float dtype."""
    model = gpt2.GPT2(CONFIG, B, T, seed=None, recompute=0, dtype=dtype)
    rng = np.random.default_rng(1)
    for name, view in model.params.items():
        values = np.float32(0.3) * rng.standard_normal(view.shape, np.float32)
        if name in ("ln1w", "ln2w", "lnfw"):
            values += 1
        view[...] = values
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T + 1))
    batch = tokens[:, :-1], tokens[:, 1:]

    kit = Kit()
    put_given(kit, model, *batch)
    put_cases(kit, dtype)
    put_pass(kit, model, *batch)
    put_steps(kit, model, *batch)
    return kit


# --------------------------------------------------------------------------------------------------
# Its file, and a port's


def write_tensors(path, tensors, order):
    """A .safetensors file, with the order in its metadata. (The trainer's own are of float32.)"""
    header = {"__metadata__": {"order": json.dumps(order)}}
    body = b""
    # Numbers of 8 bytes come first, so that all of them lie at multiples of 8.
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        offsets = [len(body), len(body) + array.nbytes]
        dtype = CODES[array.dtype.str]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        body += array.tobytes()

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with gpt2.atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text + body)


def write_kit(path):
    """Make the kit, write it, and print its path."""
    kit = make_kit()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_tensors(path, kit.tensors, kit.order)
    print(path)


def difference(name, l, mine, truth):
    """What is wrong with layer l of a tensor of mine, or all of it: a text, or None."""
    tolerance = TOLERANCE.get(mine.dtype.str)
    if tolerance is None or mine.shape != truth.shape:
        return f"it is {mine.dtype} {mine.shape}, expected float32 or float64, and {truth.shape}"

    part = slice(None) if l is None else slice(l, l + 1)
    gap = np.zeros(truth.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # mine may hold anything
        gap[part] = np.abs(mine[part].astype(np.float64) - truth[part])
        error = np.linalg.norm(gap) / (np.linalg.norm(truth[part]) or 1)
    if error <= tolerance:
        return None

    worst = np.unravel_index(gap.argmax(), gap.shape)  # the first NaN, if there is one
    index = ", ".join(map(str, worst))
    return (
        f"its relative error is {error:.1e}, expected at most {tolerance:g}; most wrong is "
        f"{name}[{index}]: {mine[worst]}, expected {truth[worst]}; its shape is {truth.shape}"
    )


def compare(path, kit_path):
    """Print how a port's tensors compare with the kit's. Returns the exit code."""
    mine, _ = gpt2.read_safetensors(path)
    require(os.path.exists(kit_path), f"{kit_path}: no kit: run python -m extras.porting_kit")
    kit, metadata = gpt2.read_safetensors(kit_path)
    require("order" in metadata, f"{kit_path}: not a kit: run python -m extras.porting_kit")
    unknown = [name for name in mine if name not in kit]
    for name in unknown:
        print(f"{name!a} is not in the kit")

    order = json.loads(metadata["order"])
    missing = [name for name, _, writer in order if writer and name not in mine]
    found = [entry for entry in order if entry[0] in mine]
    said = [difference(name, l, mine[name], kit[name]) for name, l, _ in found]
    wrong = [(*entry, what) for entry, what in zip(found, said, strict=True) if what]
    if wrong:
        name, l, writer, what = wrong[0]
        print(f"the first to differ is {name}" + ("" if l is None else f" of layer {l}"))
        print(what)
        print(f"{writer} of train_gpt2.py computes it" if writer else "it is given")
    first = f", first {missing[0]}" if missing else ""
    agree = len(found) - len(wrong)
    print(f"{agree} agree, {len(wrong)} differ, {len(missing)} are missing{first}")
    return 0 if agree and not wrong and not unknown else 1


def main(argv=None):
    """The command line. Returns the exit code: 0; 1 if a tensor differs, or for an error."""
    parser = command_line("porting_kit", __doc__)
    add = parser.add_argument
    path = gpt2.in_data("kit.safetensors")
    add("--kit", default=path, metavar="FILE", help="the kit's path (default: %(default)s)")
    add("--compare", metavar="MINE", help="compare this file with the kit, and write nothing")
    args = parser.parse_args(argv)
    if args.compare is None:
        return exit_code_of(write_kit, args.kit)
    return exit_code_of(compare, args.compare, args.kit)


if __name__ == "__main__":
    sys.exit(main())
