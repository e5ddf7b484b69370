"""
The proofs of train_gpt2.py.

    python test_gpt2.py                the table of agreement, tensor by tensor
    python -m pytest test_gpt2.py      what this file proves
    python -m pytest                   this and everything in tests/

The trainer is compared with a second GPT-2, written as usual: PyTorch modules, whose gradients come
from autograd, so that nobody derived them by hand. It takes its weights from the trainer and must
then agree with it, number for number. The order of this file:

    reference     GPT-2 in PyTorch
    one step      every tensor of a step, and ten updates, beside the reference: comparisons that
                  make the table of agreement, and that pytest goes through
    layers        each forward and backward pass, plain and in blocks
    memory        where the tensors lie in the blob, and which of them the layers share
    protocol      forward, backward and update, and which gradients they add up
    AdamW         ten steps beside torch.optim.AdamW, with all that a real run has
    a run         the data, one training step, and what a model writes
    promises      micro-batches, the same bits each time, no memory beyond the blob

An error is relative and by norm, for a whole tensor: |ours - truth| / |truth|. Where PyTorch is not
needed, a case is worked out by hand or compared with differences. All parameters are random: with
the fresh ones, a bias of 0 that is left out would change nothing.
"""

import argparse
import inspect
import math
import os
import platform
import re
import sys
import tracemalloc
import types
from typing import Callable, NamedTuple

try:
    import numpy as np
    import pytest
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    packages = {"numpy": "NumPy", "torch": "PyTorch", "pytest": "pytest"}
    sys.exit(
        f"error: test_gpt2.py needs {packages.get(error.name, error.name)}: "
        "pip install -r requirements.txt"
    )

import train_gpt2 as gpt2
from train_gpt2 import InputError


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_pytorch():
    """Everything is small here, and PyTorch's idle threads would keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------
# The reference: GPT-2 in PyTorch


def torch_name(name):
    """What TorchGPT2, or each of its TorchBlocks, calls one of the trainer's parameters."""
    if name in ("wte", "wpe"):
        return f"{name}.weight"
    return name[:-1] + (".weight" if name.endswith("w") else ".bias")


class TorchBlock(nn.Module):
    """One layer. keep(name, tensor) sees every intermediate, under the trainer's name."""

    def __init__(self, C, NH):
        super().__init__()
        self.NH = NH
        self.ln1 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.attproj = nn.Linear(C, C)
        self.ln2 = nn.LayerNorm(C)
        self.fc = nn.Linear(C, 4 * C)
        self.fcproj = nn.Linear(4 * C, C)

    def forward(self, residual, keep):
        ln1 = keep("ln1", self.ln1(residual))
        qkv = keep("qkv", self.qkv(ln1))
        atty = keep("atty", torch_attention(qkv, self.NH))
        attproj = keep("attproj", self.attproj(atty))
        residual2 = keep("residual2", residual + attproj)

        ln2 = keep("ln2", self.ln2(residual2))
        fch = keep("fch", self.fc(ln2))
        fch_gelu = keep("fch_gelu", F.gelu(fch, approximate="tanh"))
        fcproj = keep("fcproj", self.fcproj(fch_gelu))
        return keep("residual3", residual2 + fcproj)


class TorchGPT2(nn.Module):
    """A GPT-2 with a copy of a trainer's parameters, in their dtype."""

    def __init__(self, config, params):
        super().__init__()
        C = config.channels
        self.of_layers = gpt2.Model.layer_params(config).keys()
        with torch.device("meta"):  # which has no memory and draws no random numbers
            self.wte = nn.Embedding(config.vocab_size, C)
            self.wpe = nn.Embedding(config.max_seq_len, C)
            self.blocks = nn.ModuleList(
                TorchBlock(C, config.num_heads) for _ in range(config.num_layers)
            )
            self.lnf = nn.LayerNorm(C)
        self.to(torch.from_numpy(params["wte"]).dtype)
        self.to_empty(device="cpu")

        with torch.no_grad():
            for name, view in params.items():
                values = view if name in self.of_layers else [view]
                for parameter, value in zip(self.named(name), values, strict=True):
                    parameter.copy_(torch.from_numpy(value))

    def named(self, name):
        """What the trainer has as params[name]: a list, of one parameter or of one per layer."""
        owners = self.blocks if name in self.of_layers else [self]
        return [owner.get_parameter(torch_name(name)) for owner in owners]

    def logits(self, inputs, keep=lambda name, x: x):
        T = inputs.shape[1]
        residual = keep("encoded", self.wte(inputs) + self.wpe.weight[:T])
        for block in self.blocks:
            residual = block(residual, keep)
        lnf = keep("lnf", self.lnf(residual))
        return keep("logits", F.linear(lnf, self.wte.weight))

    def forward(self, inputs, targets, keep=lambda name, x: x):
        """The mean cross-entropy."""
        return keep("losses", torch_losses(self.logits(inputs, keep), targets)).mean()


def torch_losses(logits, targets):
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def torch_heads(qkv, NH):
    """(B, T, 3C) as queries, keys and values, each (B, NH, T, hs)."""
    return [x.unflatten(-1, (NH, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)]


def torch_attention(qkv, NH):
    q, k, v = torch_heads(qkv, NH)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def torch_lse(qkv, NH):
    """(B, T, NH), by the full matrix of scores: PyTorch does not return its own."""
    q, k, _ = torch_heads(qkv, NH)
    T, hs = q.shape[2:]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    att = q @ k.transpose(-1, -2) / math.sqrt(hs)
    return att.masked_fill(future, -math.inf).logsumexp(-1).transpose(1, 2)


def torch_mean_rstd(x):
    return x.mean(-1), 1 / torch.sqrt(x.var(-1, correction=0) + 1e-5)


def torch_run(reference, inputs, targets, grad_scale=1.0):
    """One forward and one backward pass: (loss, {name: [array of each layer]}).

    The names are those of Model.act_shapes. Gradients have a "d" before the name. The gradients of
    the parameters are added up in the reference: see torch_grads.
    """
    kept = {}

    def keep(name, x):
        x.retain_grad()
        kept.setdefault(name, []).append(x)
        return x

    loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets), keep)
    (loss * grad_scale).backward()
    truth = {}
    for name, layers in kept.items():
        truth[name] = [x.detach() for x in layers]
        truth["d" + name] = [x.grad for x in layers]
    truth["dresidual"] = truth["dencoded"]  # where the gradient of the residual stream ends
    truth["probs"] = [truth["logits"][0].softmax(-1)]
    truth["att_lse"] = [torch_lse(qkv, reference.blocks[0].NH) for qkv in truth["qkv"]]

    stream = truth["encoded"] + truth["residual3"]
    layernorm_inputs = {"ln1": stream[:-1], "ln2": truth["residual2"], "lnf": stream[-1:]}
    for name, layers in layernorm_inputs.items():
        truth[name + "_mean"] = [torch_mean_rstd(x)[0] for x in layers]
        truth[name + "_rstd"] = [torch_mean_rstd(x)[1] for x in layers]
    return loss.item(), {name: [x.numpy() for x in layers] for name, layers in truth.items()}


def like_params(params, name, tensors):
    """A reference's tensors, one per layer or just one, as an array like params[name]."""
    return np.stack([x.numpy() for x in tensors]).reshape(params[name].shape)


def torch_params(reference, params):
    """{name: value} of the reference, in the trainer's shapes."""
    values = {}
    for name in params:
        values[name] = like_params(params, name, [p.detach() for p in reference.named(name)])
    return values


def torch_grads(reference, params):
    """{name: gradient} of the reference, in the trainer's shapes."""
    grads = {}
    for name in params:
        grads[name] = like_params(params, name, [p.grad for p in reference.named(name)])
    return grads


# --------------------------------------------------------------------------------------------------
# One step beside the reference: every tensor of the two tables


class Comparison(NamedTuple):
    """A tensor, or a number, of the trainer and what it should be."""

    part: str  # "forward", "backward" or UPDATES
    place: str  # "layer 3", or ""
    name: str
    ours: np.ndarray
    truth: np.ndarray


UPDATES = "ten updates: the loss before, the parameters after"

# What the calls of backward_layer write first, in their order. After them comes the gradient of the
# layer's input, which is the residual3 of the layer before, or encoded.
GRADIENTS_OF_A_LAYER = ("dfch_gelu", "dfch", "dln2", "dresidual2", "datty", "dqkv", "dln1")


def watch(patch, owner, name, before=None, after=None):
    """Have before(*args) called before each call of owner.name, and after(*args) after it."""
    original = getattr(owner, name)

    def watched(*args):
        if before:
            before(*args)
        original(*args)
        if after:
            after(*args)

    patch.setattr(owner, name, watched)


def watched_forward(model, inputs, targets, train, grad_scale):
    """model.forward(), and copies of what it computes, because memory is used again.

    Returns (loss, [{name: activation} of each layer], {name: what the classifier had of it}).
    """
    layers = []
    pieces = {"logits": [], "probs": [], "dlogits": []}

    def keep_layer(model, p, a, residual):
        layers.append(copies(vars(a)))

    def keep(name, logits):
        pieces[name].append(logits.copy())

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, gpt2.Model, "forward_layer", after=keep_layer)
        watch(
            patch, gpt2, "crossentropy_softmax_forward",
            before=lambda losses, logits, targets: keep("logits", logits),
            after=lambda losses, probs, targets: keep("probs", probs),
        )  # fmt: skip
        watch(
            patch, gpt2, "crossentropy_softmax_backward",
            after=lambda dlogits, targets, dloss: keep("dlogits", dlogits),
        )  # fmt: skip
        loss = model.forward(inputs, targets, train, grad_scale)

    classified = {}
    for name in pieces:
        if pieces[name]:
            classified[name] = np.concatenate(pieces[name], axis=1).reshape(*targets.shape, -1)
    return loss, layers, classified


def watched_backward(model):
    """model.backward(), and copies of what each backward function writes first, in their order."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        for layer in ("layernorm", "matmul", "attention", "gelu", "encoder"):
            after = lambda first, *others: written.append(first.copy())
            watch(patch, gpt2, f"{layer}_backward", after=after)
        model.backward()
    return written


def compared_step(model, reference, inputs, targets, train=True, grad_scale=1.0):
    """A forward and a backward pass beside PyTorch: Comparisons, in the order of computation.

    Use each as it comes: some are views of memory that is overwritten later.
    """

    def line(part, name, ours, true, l=None):
        return Comparison(part, "" if l is None else f"layer {l}", name, ours, true)

    acts, grads = model.acts, model.grads
    last = model.config.num_layers - 1
    true_loss, truth = torch_run(reference, inputs, targets, grad_scale)
    loss, layers, classified = watched_forward(model, inputs, targets, train, grad_scale)

    yield line("forward", "encoded", acts["encoded"], truth["encoded"][0])
    for l, of_layer in enumerate(layers):
        for name, computed in of_layer.items():
            ours = acts[name][l] if len(acts[name]) > last else computed  # shared by the layers
            yield line("forward", name, ours, truth[name][l], l)
    for name in ("lnf", "lnf_mean", "lnf_rstd"):
        yield line("forward", name, acts[name], truth[name][0])
    for name in ("logits", "probs"):
        yield line("forward", name, classified[name], truth[name][0])
    yield line("forward", "losses", acts["losses"], truth["losses"][0])
    yield line("forward", "loss", np.array(loss), np.array(true_loss))
    if not train:
        return

    written = iter(watched_backward(model))
    true_grads = torch_grads(reference, model.params)
    yield line("backward", "dlogits", classified["dlogits"], truth["dlogits"][0])
    yield line("backward", "dlnf", acts["dlnf"], truth["dlnf"][0])
    for name in ("lnfb", "lnfw"):
        yield line("backward", f"d{name}", grads[name], true_grads[name])
    yield line("backward", "dresidual3", next(written), truth["dresidual3"][last], last)

    for l in reversed(range(last + 1)):
        for name in GRADIENTS_OF_A_LAYER:
            yield line("backward", name, next(written), truth[name][l], l)
        for name in reversed(model.layer_params(model.config)):
            yield line("backward", f"d{name}", grads[name][l], true_grads[name][l], l)
        if l > 0:
            yield line("backward", "dresidual3", next(written), truth["dresidual3"][l - 1], l - 1)

    yield line("backward", "dencoded", next(written), truth["dencoded"][0])
    for name in ("wpe", "wte"):
        yield line("backward", f"d{name}", grads[name], true_grads[name])


def compared_updates(model, reference, batches, learning_rate, betas=(0.9, 0.999), eps=1e-3):
    """Updates by AdamW beside PyTorch's: Comparisons of the losses before and the parameters after.

    With warm-up, cosine, weight decay and clipping, as in a real run. batches are integers
    (steps, micro-batches, 2, B, T). eps is large, because the gradient of the keys' biases is 0 but
    for rounding. In float32, AdamW would make steps of full size of this noise.
    """
    decayed = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}  # no biases, no layernorms
    groups = []
    for name in model.params:
        decay = 0.1 if name in decayed else 0.0
        groups.append({"params": reference.named(name), "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)

    steps, micro_batches = batches.shape[:2]
    for step in range(steps):
        optimizer.zero_grad()
        losses, true_losses = [], []
        for inputs, targets in batches[step]:
            true_loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets))
            (true_loss / micro_batches).backward()
            true_losses.append(true_loss.item())
            losses.append(model.forward(inputs, targets, grad_scale=1 / micro_batches))
            model.backward()
        true = np.array(true_losses)
        yield Comparison(UPDATES, "", f"loss {step + 1}", np.array(losses), true)

        rate = gpt2.learning_rate_at(step, steps, learning_rate, warmup_iters=3, final_frac=0.1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        clip = min(1.0, 0.5 / (model.grad_norm() + 1e-6))
        model.update(rate, *betas, eps, weight_decay=0.1, grad_scale=clip)
        truth = torch_params(reference, model.params)
        true = np.concatenate([truth[name].ravel() for name in model.params])
        yield Comparison(UPDATES, "", f"params {step + 1}", model.flat[0], true)


def small_comparisons(dtype):
    """All comparisons of a small GPT-2 of two layers."""
    model = random_model(2, 9, dtype, recompute=0, L=2)
    reference = TorchGPT2(model.config, model.params).double()
    inputs, targets = random_tokens(B=2, T=9)
    yield from compared_step(model, reference, inputs, targets)
    model.zero_grad()
    batches = np.tile(random_tokens(B=2, T=9), (10, 1, 1, 1, 1))
    yield from compared_updates(model, reference, batches, learning_rate=1e-2)


TOLERANCE = {np.dtype("float64"): 1e-10, np.dtype("float32"): 1e-5}


def relative_error(ours, truth):
    assert ours.shape == truth.shape
    difference = np.linalg.norm(ours.astype(np.float64) - truth)
    length = np.linalg.norm(truth)
    return difference / length if length else difference


def measured(comparisons, by_layer=True):
    """{(part, place, name): (shape, relative error, greatest difference)}.

    by_layer   False: of each tensor the greatest errors of all layers
    """
    lines = {}
    for part, place, name, ours, truth in comparisons:
        key = part, place if by_layer or not place else "all layers", name
        _, relative, greatest = lines.get(key, (None, 0.0, 0.0))
        relative = np.maximum(relative, relative_error(ours, truth))  # NaN stays NaN
        greatest = np.maximum(greatest, np.max(np.abs(ours - truth)))
        lines[key] = ours.shape, relative, greatest
    return lines


def print_table(columns):
    """Print {type: measured(...)}, a column for each type. Returns the keys that do not agree."""
    print(" " * 34, *[f"{dtype:^19}" for dtype in columns])
    print(f"{'shape':>34}" + "  relative  greatest" * len(columns))

    wrong = []
    heading = None
    for key in next(iter(columns.values())):
        part, place, name = key
        if (part, place) != heading:
            heading = part, place
            print(", ".join(filter(None, heading)))

        text = ""
        agrees = True
        for dtype, lines in columns.items():
            shape, relative, greatest = lines[key]
            text += f"  {relative:8.1e}  {greatest:8.1e}"
            agrees = agrees and relative <= TOLERANCE[np.dtype(dtype)]
        if not agrees:
            wrong.append(key)
        shape = " x ".join(map(str, shape))
        print(f"    {name:12}{shape:>18}{text}  {'OK' if agrees else 'NOT OK'}")
    return wrong


# --------------------------------------------------------------------------------------------------
# Tools of the proofs


BOTH_FLOATS = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])


def disagreement(name, ours, truth, tolerance):
    """What is wrong with an array, in a line; None if it agrees with the truth."""
    if ours.shape != truth.shape:
        return f"{name}: its shape is {ours.shape}, expected {truth.shape}"
    error = relative_error(ours, truth)
    if error <= tolerance:
        return None
    gap = np.abs(ours - truth)
    worst = np.unravel_index(gap.argmax(), gap.shape)
    index = ", ".join(map(str, worst))
    return (
        f"{name}: its relative error is {error:.1e}, expected at most {tolerance:g}; "
        f"{name}[{index}] is {ours[worst]:.6g}, expected {truth[worst]:.6g}"
    )


def fail_if_any(wrong):
    """A failure shows the lines that say what is wrong, and nothing else."""
    wrong = [line for line in wrong if line]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def assert_all_close(ours, truth, tolerance=None):
    """Two dicts of arrays hold the same names and, to the tolerance of their type, numbers."""
    assert ours.keys() == truth.keys()
    wrong = []
    for name in ours:
        limit = tolerance or TOLERANCE[ours[name].dtype]
        wrong.append(disagreement(name, ours[name], truth[name], limit))
    fail_if_any(wrong)


def assert_by_hand(ours, truth):
    """Those arrays of a dict whose values are given, as lists, have these values."""
    truth = {name: np.array(values, dtype=np.float64).ravel() for name, values in truth.items()}
    assert_all_close({name: ours[name].ravel() for name in truth}, truth, 1e-12)


def assert_same_bits(ours, theirs):
    """Two dicts of arrays are equal, bit by bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def copies(views):
    return {name: view.copy() for name, view in views.items()}


def random_model(
    B, T, dtype=np.float64, recompute=1, training=True, V=53, L=3, NH=3, C=24, max_seq_len=None,
    make=gpt2.GPT2,
):  # fmt: skip
    """A small GPT-2. Its parameters are random, all else is NaN until it is written."""
    config = gpt2.GPT2Config(max_seq_len or T + 2, V, L, NH, C)
    model = make(config, B, T, seed=None, recompute=recompute, training=training, dtype=dtype)
    model.blob[...] = np.nan
    model.flat[2:] = 0  # AdamW's m and v

    rng = np.random.default_rng(1)
    for name, view in model.params.items():
        view[...] = 0.1 * rng.standard_normal(view.shape, np.float32)
        if name in ("ln1w", "ln2w", "lnfw"):
            view += 1
    return model


def random_tokens(*many, B, T, V=53, seed=2):
    """inputs and targets, (2, B, T), or as many such pairs as asked for, (*many, 2, B, T)."""
    return np.random.default_rng(seed).integers(0, V, (*many, 2, B, T))


def train_steps(model, steps, batches, learning_rate=1e-2):
    """The losses of some steps, each over all of batches (k, 2, B, T), its micro-batches."""
    losses = []
    for step in range(1, steps + 1):
        for inputs, targets in batches:
            losses.append(model.forward(inputs, targets, grad_scale=1 / len(batches)))
            model.backward()
        clip = min(1.0, 0.5 / model.grad_norm())
        model.update(learning_rate, weight_decay=0.1, step=step, grad_scale=clip)
    return losses


LAYOUTS = {  # the ways in which activations are laid out
    "recompute 0": {"recompute": 0},
    "recompute 1": {"recompute": 1},
    "recompute 2": {"recompute": 2},
    "without training": {"training": False},
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)

# Three versions of the trainer. The chapter, which is the text up to the line, has every layer
# plain; behind the line the layers are wrapped, and work in blocks. A second copy of the whole has
# blocks so small that the tensors of these tests are cut into many.

TEXT = inspect.getsource(gpt2)


def trainer_of(text):
    """A module with this text in place of the trainer's."""
    module = types.ModuleType("train_gpt2")
    module.__file__ = gpt2.__file__
    exec(compile(text, gpt2.__file__, "exec"), vars(module))
    return module


def trainer_with_blocks(nbytes):
    text, found = re.subn(r"(?m)^BLOCK_BYTES = .*", f"BLOCK_BYTES = {nbytes}", TEXT)
    assert found == 1
    return trainer_of(text)


CHAPTER = trainer_of(TEXT[: TEXT.index("\n# Here the algorithm ends")])
IN_SMALL_BLOCKS = trainer_with_blocks(4096)
VERSIONS = {"plain": CHAPTER, "in blocks": gpt2, "in small blocks": IN_SMALL_BLOCKS}
EVERY_VERSION = pytest.mark.parametrize("version", VERSIONS)


# --------------------------------------------------------------------------------------------------
# Every tensor of one step


@BOTH_FLOATS
@EVERY_LAYOUT
@pytest.mark.parametrize(
    "B, T, logits_rows, sizes",
    [
        (2, 8, 256, {}),
        (2, 8, 5, {}),  # the classifier takes 5, 5, 5 and 1 tokens
        (3, 1, 256, {"V": 2, "L": 1, "NH": 1, "C": 5}),
        (1, 131, 50, {"V": 101, "L": 2, "NH": 4, "C": 20, "max_seq_len": 131}),
        (2, 8, 5, {"V": 2000, "L": 1, "NH": 1, "C": 4}),
    ],
    ids=["one piece", "pieces", "least", "long", "large vocabulary"],
)
def test_every_tensor_equals_pytorch(B, T, logits_rows, sizes, layout, dtype, monkeypatch):
    """Of two micro-batches: the gradients of the second are added to those of the first."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", logits_rows)
    model = random_model(B, T, dtype, **LAYOUTS[layout], **sizes)
    reference = TorchGPT2(model.config, model.params).double()
    batches = random_tokens(2, B=B, T=T, V=model.config.vocab_size)
    wrong = []
    for (inputs, targets), grad_scale in zip(batches, (0.75, 0.5), strict=True):
        step = compared_step(model, reference, inputs, targets, model.training, grad_scale)
        for _, place, name, ours, truth in step:
            wrong.append(disagreement(f"{name} {place}", ours, truth, TOLERANCE[np.dtype(dtype)]))
    fail_if_any(wrong)


def test_no_tensor_escapes():
    """Those that are compared are taken from the two tables, once for each layer that has them."""
    model = random_model(2, 9, recompute=0, L=2)
    compared = [line.name for line in small_comparisons(np.float64)]
    acts = dict.fromkeys(model.layer_acts(model.config, 2, 9), 2)
    acts |= dict.fromkeys(GRADIENTS_OF_A_LAYER, 2)
    for name in model.acts.keys() - {"dresidual"}:  # which is dresidual3, dresidual2 or dencoded
        assert compared.count(name) == acts.get(name, 1), name
    for name in model.grads:
        of_layers = name in model.layer_params(model.config)
        assert compared.count(f"d{name}") == (2 if of_layers else 1), name

    for name, number in (("dresidual3", 2), ("dresidual2", 2), ("dencoded", 1), ("loss", 1)):
        assert compared.count(name) == number, name
    assert [name for name in compared if " " in name][-2:] == ["loss 10", "params 10"]


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_backward_changes_no_activation_that_is_kept(recompute):
    """So all can be read after it, as a port does which is compared with them."""
    model = random_model(2, 9, np.float32, recompute)
    model.forward(*random_tokens(B=2, T=9))
    work_space = model.work_shapes(model.config, 2, 9)
    kept = [name for name, view in model.acts.items() if len(view) > 1 and name not in work_space]
    before = {name: model.acts[name].copy() for name in kept}
    model.backward()
    assert_same_bits({name: model.acts[name] for name in kept}, before)


@pytest.mark.parametrize(
    "V, pieces, in_gradients",
    [
        (53, 1, 1),  # there is room for all 16 tokens
        (2000, 2, 2),  # for 10
        (20_000, 4, 0),  # for 1, which is less than acts["logits"] has
    ],
)
def test_logits_lie_in_the_gradients_while_these_are_unused(V, pieces, in_gradients, monkeypatch):
    """In the first training forward pass of a step. In others they must not touch a gradient."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", 4)
    model = random_model(2, 8, np.float32, V=V, max_seq_len=8)
    rooms = []
    see = lambda losses, logits, targets: rooms.append(logits)
    watch(monkeypatch, gpt2, "crossentropy_softmax_forward", before=see)
    for train, expected in ((False, (4, 0)), (True, (pieces, in_gradients)), (True, (4, 0))):
        rooms.clear()
        model.forward(*random_tokens(B=2, T=8, V=V), train)
        assert sum(room.shape[1] for room in rooms) == 16
        assert not any(np.shares_memory(room, model.grads["wte"]) for room in rooms)
        in_flat = [np.shares_memory(room, model.flat[1]) for room in rooms]
        assert (len(rooms), sum(in_flat)) == expected
        if train:
            model.backward()


@pytest.mark.parametrize("recompute, again", [(0, (0, 0, 0)), (1, (4, 2, 0)), (2, (4, 2, 6))])
def test_only_what_is_not_kept_is_computed_again(recompute, again, monkeypatch):
    """Of two layers of three: what forward has computed of the last one is still there."""
    calls = []
    watch(monkeypatch, gpt2, "layernorm_forward", after=lambda *args: calls.append("layernorm"))
    watch(monkeypatch, gpt2, "gelu_forward", after=lambda *args: calls.append("gelu"))
    watch(monkeypatch, gpt2, "matmul_forward", after=lambda *args: calls.append("matmul"))
    model = random_model(2, 9, recompute=recompute)
    model.forward(*random_tokens(B=2, T=9))
    assert (calls.count("layernorm"), calls.count("gelu"), calls.count("matmul")) == (7, 3, 13)
    calls.clear()
    model.backward()
    assert (calls.count("layernorm"), calls.count("gelu"), calls.count("matmul")) == again


@pytest.mark.parametrize("parts", [[9], [4, 1, 1, 3], [1] * 9], ids=str)
@pytest.mark.parametrize("layout", ["recompute 0", "recompute 1", "without training"])
def test_forward_tokens_piece_by_piece_equals_the_whole(layout, parts):
    """Generation may compute new positions only: the earlier ones left their keys and values."""
    model = random_model(2, 9, make=gpt2.Model, **LAYOUTS[layout])
    tokens = random_tokens(B=2, T=9)[0]
    whole = model.forward_tokens(tokens)[:1].copy()
    for name in ("encoded", "lnf", "qkv"):
        model.acts[name][...] = np.nan
    first = 0
    for n in parts:
        lnf = model.forward_tokens(tokens[:1, first : first + n], first)
        assert relative_error(lnf, whole[:, first : first + n]) < 1e-13
        first += n


# --------------------------------------------------------------------------------------------------
# Layers: how a test calls them


class Layer(NamedTuple):
    """What a test needs to know of a layer. `added` and `by_add` are columns of the table in the
    trainer's section 2: gradients that are always added to, and those that follow `add`.
    """

    torch: Callable  # (NH, **inputs) -> {name: tensor}, outputs only; the first is called out
    shapes: Callable  # (B, T, C, NH, V) -> {input: shape}
    added: tuple = ()
    by_add: tuple = ()


LAYERS = {
    "encoder": Layer(
        lambda NH, tokens, wte, wpe: {"out": F.embedding(tokens, wte) + wpe[: tokens.shape[1]]},
        lambda B, T, C, NH, V: {"tokens": (B, T), "wte": (V, C), "wpe": (T + 3, C)},
        added=("dwte",),
        by_add=("dwpe",),
    ),
    "layernorm": Layer(
        lambda NH, inp, weight, bias: {
            "out": F.layer_norm(inp, weight.shape, weight, bias),
            "mean": torch_mean_rstd(inp)[0],
            "rstd": torch_mean_rstd(inp)[1],
        },
        lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (C,), "bias": (C,)},
        added=("dinp",),
        by_add=("dweight", "dbias"),
    ),
    "matmul": Layer(
        lambda NH, inp, weight, bias: {"out": F.linear(inp, weight, bias)},
        lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (3 * C, C), "bias": (3 * C,)},
        by_add=("dweight", "dbias"),
    ),
    "matmul without bias": Layer(
        lambda NH, inp, weight: {"out": F.linear(inp, weight)},
        lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (V, C)},
        by_add=("dweight",),
    ),
    "attention": Layer(
        lambda NH, qkv: {"out": torch_attention(qkv, NH), "lse": torch_lse(qkv, NH)},
        lambda B, T, C, NH, V: {"qkv": (B, T, 3 * C)},
    ),
    "gelu": Layer(
        lambda NH, inp: {"out": F.gelu(inp, approximate="tanh")},
        lambda B, T, C, NH, V: {"inp": (B, T, 4 * C)},
    ),
    "residual": Layer(
        lambda NH, inp1, inp2: {"out": inp1 + inp2},
        lambda B, T, C, NH, V: {"inp1": (B, T, C), "inp2": (B, T, C)},
    ),
    "crossentropy_softmax": Layer(
        lambda NH, logits, targets: {
            "out": torch_losses(logits, targets),
            "probs": logits.softmax(-1),
        },
        lambda B, T, C, NH, V: {"logits": (B, T, V), "targets": (B, T)},
    ),
}


def run_layer(name, inputs, dout, NH=1, add=False, trainer=gpt2):
    """Call a layer's forward and its backward function: {name: array} of all that they write.

    Gradients are those of sum(out * dout). What a function overwrites is NaN before, so that a
    number which it leaves out, or reads, shows. What it adds to is 1 before.
    """
    layer = LAYERS[name]
    name = name.partition(" ")[0]
    given = {"dout": dout, "NH": NH, "add": add}
    for key, x in inputs.items():
        given[key] = x
        if x.dtype.kind == "f":
            is_one = "d" + key in layer.added + (layer.by_add if add else ())
            given["d" + key] = np.full_like(x, 1 if is_one else np.nan)

    tensors = {key: torch.from_numpy(x) for key, x in inputs.items()}
    outputs = layer.torch(NH, **tensors)
    outputs = {key: np.full(x.shape, np.nan, dout.dtype) for key, x in outputs.items()}
    given |= outputs
    if name == "encoder":
        given |= {"inp": inputs["tokens"], "wpe": inputs["wpe"][: dout.shape[1]]}
    if name == "crossentropy_softmax":  # works in place, and all losses count the same
        outputs["probs"] = given["logits"] = inputs["logits"].copy()
        given |= {"losses": outputs["out"], "dloss": float(dout.flat[0])}
    call_with(getattr(trainer, f"{name}_forward"), given)

    if name == "crossentropy_softmax":
        given["probs"] = given["dlogits"] = outputs["probs"].copy()
    if name == "residual":  # which has no backward function
        given |= {"dinp1": dout, "dinp2": dout}
    else:
        call_with(getattr(trainer, f"{name}_backward"), given)
    if name == "gelu":  # dinp may be dout
        in_place = dout.copy()
        trainer.gelu_backward(in_place, in_place, inputs["inp"])
        assert in_place.tobytes() == given["dinp"].tobytes()
    return outputs | {"d" + key: given["d" + key] for key in inputs if "d" + key in given}


def call_with(function, values):
    """Call a function with the arguments of these names, and None for the others."""
    function(*[values.get(name) for name in inspect.signature(function).parameters])


# --------------------------------------------------------------------------------------------------
# Layers: tiny cases, worked out by hand


def test_layernorm_by_hand(monkeypatch):
    """[1, 1, 3, 3] has mean 2 and variance 1: norm is [-1, -1, 1, 1].

    For dout [1, 0, 0, 0] and weight 1, average(dnorm) = 1/4 and average(dnorm * norm) = -1/4, so
    dinp = dout - 1/4 + norm / 4; dinp is added to 1.
    """
    monkeypatch.setattr(gpt2, "LN_EPS", 0.0)
    inp = np.array([[[1.0, 1, 3, 3]]])
    dout = np.array([[[1.0, 0, 0, 0]]])
    results = run_layer("layernorm", {"inp": inp, "weight": np.ones(4), "bias": np.zeros(4)}, dout)
    expected = {
        "out": [-1, -1, 1, 1],
        "mean": [2],
        "rstd": [1],
        "dinp": [1.5, 0.5, 1, 1],
        "dweight": [-1, 0, 0, 0],
        "dbias": [1, 0, 0, 0],
    }
    assert_by_hand(results, expected)


def test_layernorm_of_equal_channels_is_its_bias():
    """The variance is 0, and eps = 1e-5 keeps rstd finite: it is 1 / sqrt(1e-5)."""
    inp = np.full((1, 1, 4), 7.0)
    given = {"inp": inp, "weight": np.ones(4), "bias": np.arange(4.0)}
    results = run_layer("layernorm", given, inp)
    assert results["out"].tolist() == [[[0, 1, 2, 3]]]
    assert results["rstd"].item() == pytest.approx(100 * math.sqrt(10), rel=1e-15)


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_softmax_crossentropy_by_hand(shift):
    """Logits [0, ln 3] have probabilities [1/4, 3/4], whatever is added to both.

    Target 0 costs ln 4; half of its gradient is [-3/8, 3/8]. Target 1 costs ln 4/3.
    """
    logits = np.array([[[0, math.log(3)], [0, math.log(3)]]]) + shift
    dout = np.full((1, 2), 0.5)
    inputs = {"logits": logits, "targets": np.array([[0, 1]])}
    results = run_layer("crossentropy_softmax", inputs, dout)
    expected = {
        "probs": [[[0.25, 0.75], [0.25, 0.75]]],
        "out": [[math.log(4), math.log(4 / 3)]],
        "dlogits": [[[-0.375, 0.375], [0.125, -0.125]]],
    }
    assert_by_hand(results, expected)


def test_attention_by_hand():
    """If all scores are 0, position t gets the average of the values 0 to t, and lse is ln(t + 1).

    A last key and value of 1e30 must not reach the positions before it.
    """
    qkv = np.zeros((1, 4, 3))
    qkv[0, :, 2] = 6, 2, 1, 1e30
    qkv[0, 3, 1] = 1e30
    results = run_layer("attention", {"qkv": qkv}, np.ones((1, 4, 1)))
    assert_by_hand({"out": results["out"][:, 3:]}, {"out": [2.5e29]})
    results["out"] = results["out"][:, :3]
    assert_by_hand(results, {"out": [6, 4, 3], "lse": np.log([1, 2, 3, 4])})


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_attention_of_large_scores_stays_finite(scale):
    """Two equal keys, scores of 1e8: exp would overflow, or everything vanish."""
    qkv = np.full((1, 2, 3), 1e4)
    qkv[0, :, 1] = scale
    qkv[0, :, 2] = 1, 3
    results = run_layer("attention", {"qkv": qkv}, np.ones((1, 2, 1)))
    assert_by_hand(results, {"out": [1, 2]})
    assert np.isfinite(results["dqkv"]).all()


def test_gelu_by_hand():
    """0 stays 0, far to the right nothing changes, far to the left nothing passes.

    There exp overflows, which is not an error.
    """
    inp = np.array([[[0.0, 20.0, -100.0]]])
    with np.errstate(over="raise"):
        results = run_layer("gelu", {"inp": inp}, np.ones_like(inp))
    assert_by_hand(results, {"out": [0, 20, 0], "dinp": [0.5, 1, 0]})


# --------------------------------------------------------------------------------------------------
# Layers: each against PyTorch, and against differences, for many shapes


SHAPES = [  # B, T, C, NH, V
    (2, 7, 12, 3, 31),
    (1, 1, 5, 1, 2),  # one position: there is nothing to attend to but itself
    (3, 1, 8, 8, 257),  # heads of one channel
    (2, 129, 16, 4, 50),  # attention takes 128 positions at a time: the second block has one
    (1, 300, 10, 5, 33),  # three of them
    (4, 64, 48, 2, 997),
    (1, 3, 512, 1, 2),  # rows so wide that a small block has two
]
WITHOUT_ADD = [(name, False) for name in LAYERS]
WITH_ADD = [(name, True) for name in LAYERS if LAYERS[name].by_add]


def layer_inputs(name, shape, dtype):
    """(inputs, dout) of a layer: random, and such that float32 holds them exactly."""
    V, NH = shape[4], shape[3]
    rng = np.random.default_rng(3)
    inputs = {}
    for key, dims in LAYERS[name].shapes(*shape).items():
        if key in ("tokens", "targets"):
            inputs[key] = rng.integers(0, V, dims)
        else:
            inputs[key] = (2 * rng.standard_normal(dims, np.float32)).astype(dtype)
        if key == "weight":
            inputs[key] += 1

    tensors = {key: torch.from_numpy(x) for key, x in inputs.items()}
    out = LAYERS[name].torch(NH, **tensors)["out"]
    dout = rng.standard_normal(out.shape, np.float32).astype(dtype)
    if name == "crossentropy_softmax":
        dout[...] = 0.37  # in the trainer every token's loss counts the same
    return inputs, dout


def layer_truth(name, shape, inputs, dout, add=False):
    """What the layer's run should return, by PyTorch in float64."""
    layer, NH = LAYERS[name], shape[3]
    leaves = {}
    for key, x in inputs.items():
        leaves[key] = torch.from_numpy(x)
        if x.dtype.kind == "f":
            leaves[key] = leaves[key].double().detach().clone().requires_grad_()

    truth = layer.torch(NH, **leaves)
    truth["out"].backward(torch.from_numpy(dout).double())
    truth |= {"d" + key: leaf.grad for key, leaf in leaves.items() if leaf.requires_grad}
    truth = {key: x.detach().numpy() for key, x in truth.items()}
    for key in layer.added + (layer.by_add if add else ()):
        truth[key] = truth[key] + 1
    return truth


def test_no_layer_escapes():
    functions = [name for name in vars(gpt2) if name.endswith(("_forward", "_backward"))]
    layers = {name.rpartition("_")[0] for name in functions}
    assert layers == LAYERS.keys() - {"matmul without bias"}


@BOTH_FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, add", WITHOUT_ADD + WITH_ADD)
@EVERY_VERSION
def test_layer_equals_pytorch(name, add, shape, dtype, version):
    inputs, dout = layer_inputs(name, shape, dtype)
    before = copies(inputs | {"dout": dout})
    ours = run_layer(name, inputs, dout, shape[3], add, VERSIONS[version])
    assert_all_close(ours, layer_truth(name, shape, inputs, dout, add))
    assert_same_bits(inputs | {"dout": dout}, before)  # no layer writes into what it reads


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradient_equals_differences(name):
    """(f(x + h) - f(x - h)) / 2 is dx . h, for small random h and f = sum(out * dout)."""
    shape = (2, 5, 6, 2, 11)
    inputs, dout = layer_inputs(name, shape, np.float64)
    rng = np.random.default_rng(4)

    def f(key, h):
        moved = inputs | {key: inputs[key] + h}
        return np.sum(run_layer(name, moved, dout, shape[3])["out"] * dout)

    results = run_layer(name, inputs, dout, shape[3])
    differentiable = [key for key, x in inputs.items() if x.dtype.kind == "f"]
    assert differentiable
    for key in differentiable:
        gradient = results["d" + key] - (1 if "d" + key in LAYERS[name].added else 0)
        for _ in range(3):
            h = 1e-5 * rng.standard_normal(inputs[key].shape)
            difference = (f(key, h) - f(key, -h)) / 2
            along_h = f"d{key} along a small step"
            assert_all_close({along_h: np.sum(gradient * h)}, {along_h: np.array(difference)}, 1e-6)


@EVERY_VERSION
@BOTH_FLOATS
@pytest.mark.parametrize("n", [1, 2, 130, 299])
def test_attention_of_the_last_positions(n, dtype, version):
    """Generation only asks for the last n of T positions: the same as the last n of all."""
    B, T, C, NH, V = shape = (2, 300, 12, 3, 2)
    inputs, dout = layer_inputs("attention", shape, dtype)
    truth = layer_truth("attention", shape, inputs, dout)
    out, lse = np.full((B, n, C), np.nan, dtype), np.full((B, n, NH), np.nan, dtype)
    VERSIONS[version].attention_forward(out, lse, inputs["qkv"], NH)
    last = np.s_[:, T - n :]
    assert_all_close({"out": out, "lse": lse}, {key: truth[key][last] for key in ("out", "lse")})


@BOTH_FLOATS
@EVERY_VERSION
@pytest.mark.parametrize("add, bias", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("m, k, n", [(1, 3, 5), (700, 60, 50), (50, 60, 700), (3, 90_000, 16)])
def test_products_equal_numpys(m, k, n, add, bias, version, dtype, monkeypatch):
    """Two at once, cut by rows or by columns, with one thread and with three."""
    rng = np.random.default_rng(3)
    a, b, before, row = (rng.standard_normal(size) for size in ((m, k), (k, n), (m, n), n))
    truth = a @ b + (before if add else 0) + (row if bias else 0)
    for threads in (1, 3):
        monkeypatch.setattr(VERSIONS[version], "THREADS", threads, raising=False)
        outs = [before.astype(dtype) if add else np.full((m, n), np.nan, dtype) for _ in "12"]
        given = a.astype(dtype), b.astype(dtype), add, row.astype(dtype) if bias else None
        VERSIONS[version].products(*[(out, *given) for out in outs])
        for out in outs:
            assert_all_close({"out": out}, {"out": truth})


def test_small_blocks_are_many(monkeypatch):
    """Or else these proofs would show nothing of them. The chapter knows of none."""
    counts = []
    parallel = IN_SMALL_BLOCKS.parallel
    counted = lambda task, pieces: counts.append(len(pieces)) or parallel(task, pieces)
    monkeypatch.setattr(IN_SMALL_BLOCKS, "parallel", counted)
    shape = (4, 64, 48, 2, 997)
    for name in ("layernorm", "attention", "gelu", "crossentropy_softmax"):
        counts.clear()
        inputs, dout = layer_inputs(name, shape, np.float32)
        run_layer(name, inputs, dout, 2, trainer=IN_SMALL_BLOCKS)
        assert len(counts) > 1 and min(counts) > 1, name
    assert not {"parallel", "by_rows", "threading", "GPT2"} & vars(CHAPTER).keys()


# --------------------------------------------------------------------------------------------------
# Memory


def test_parameters_stand_as_in_llm_c():
    """Names and order are those of its files; the counts are those of OpenAI's models."""
    assert list(gpt2.Model.param_shapes(gpt2.GPT2Config())) == [
        "wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
        "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb",
    ]  # fmt: skip

    sizes = {(12, 768): 124_439_808, (24, 1024): 354_823_168, (48, 1600): 1_557_611_200}
    for (L, C), parameters in sizes.items():
        config = gpt2.GPT2Config(num_layers=L, channels=C)
        assert gpt2.count(gpt2.Model.param_shapes(config)) == parameters


@EVERY_LAYOUT
def test_views_lie_in_the_blob_side_by_side(layout):
    """In the order of the tables, without holes, from the beginning of the blob to its end."""
    model = random_model(2, 9, **LAYOUTS[layout])
    address = model.blob.ctypes.data
    parts = [model.params, model.grads, model.m, model.v, model.acts]
    for views in parts:
        for name, view in views.items():
            assert view.flags.c_contiguous and view.ctypes.data == address, name
            address += view.nbytes
    assert address == model.blob.ctypes.data + model.blob.nbytes

    shapes = gpt2.Model.param_shapes(model.config)
    for views in parts[: len(model.flat)]:
        assert {name: view.shape for name, view in views.items()} == shapes
    acts = gpt2.Model.act_shapes(model.config, 2, 9, **LAYOUTS[layout])
    assert {name: view.shape for name, view in model.acts.items()} == acts
    assert len(model.flat) == (1 if layout == "without training" else 4)


@pytest.mark.parametrize(
    "layout, kept",
    [
        ("recompute 0", " ".join(gpt2.Model.layer_acts(gpt2.GPT2Config(), 1, 1))),
        ("recompute 1", "ln1_mean ln1_rstd qkv att_lse atty residual2 ln2_mean ln2_rstd fch "
                        "residual3"),
        ("recompute 2", "residual3"),
        ("without training", "qkv"),
    ],
)  # fmt: skip
def test_what_each_layer_keeps_for_itself(layout, kept):
    """All others have one place, which the layers share. Only training needs a work space."""
    config = gpt2.GPT2Config(num_layers=3, num_heads=1, channels=4)
    shapes = gpt2.Model.act_shapes(config, 5, 6, **LAYOUTS[layout])
    for name, shape in gpt2.Model.layer_acts(config, 5, 6).items():
        assert shapes[name] == (3 if name in kept.split() else 1, *shape), name
    work_space = gpt2.Model.work_shapes(config, 5, 6).keys()
    assert work_space & shapes.keys() == (set() if layout == "without training" else work_space)


def test_fresh_weights_are_gpt2s():
    """Normal with standard deviation 0.02, into the residual stream 0.02 / sqrt(2L).

    Every estimate lies within five of its own standard errors.
    """
    L = 4
    model = gpt2.Model(gpt2.GPT2Config(128, 500, L, 4, 64), 1, 1, seed=8)
    deviation = dict.fromkeys(["wte", "wpe", "qkvw", "fcw"], 0.02)
    deviation |= dict.fromkeys(["attprojw", "fcprojw"], 0.02 / math.sqrt(2 * L))
    for name, view in model.params.items():
        if name not in deviation:
            assert np.all(view == (1 if name in ("ln1w", "ln2w", "lnfw") else 0)), name
            continue
        n = view.size
        z = view.astype(np.float64).ravel() / deviation[name]
        assert abs(z.mean()) < 5 / math.sqrt(n), name
        assert abs(z.std() - 1) < 5 / math.sqrt(2 * n), name
        within_one = np.mean(abs(z) < 1)  # 68 % of a normal distribution
        assert abs(within_one - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n), name
        assert len(np.unique(view)) > 0.9 * n, name  # no layer is another's copy
    assert not model.flat[1:].any()
    assert not any(view.any() for view in model.acts.values())


@pytest.mark.parametrize("make", [gpt2.Model, gpt2.GPT2])
def test_a_new_model_has_these_defaults(make):
    _, *parameters = inspect.signature(make).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert defaults == {
        "batch_size": 4, "sequence_length": 64, "seed": 1337, "recompute": 1,
        "training": True, "dtype": np.float32,
    }  # fmt: skip


def test_a_seed_decides_every_bit():
    def fresh(seed):
        return gpt2.Model(gpt2.GPT2Config(64, 256, 2, 2, 32), 1, 8, seed=seed).params

    assert_same_bits(fresh(1), fresh(1))
    # The weights of a seed stay what they were in earlier versions of this trainer.
    second = [float(fresh(1337)[name].flat[1]) for name in ("wte", "wpe", "qkvw", "fcprojw")]
    assert second == pytest.approx(
        [-0.019249863922595978, 0.0021467171609401703, 0.020022017881274223, 0.003657161258161068],
        rel=1e-6,
    )


# --------------------------------------------------------------------------------------------------
# The protocol: forward, backward, update. Its order is tested in tests/test_model.py


def test_gradients_are_of_the_micro_batches_since_the_update():
    """The first overwrites what was there, the others add to it. A forward pass may be repeated."""
    batches = random_tokens(3, B=2, T=9)
    numbers, grads = [], []
    for story in ([0, 1], [2, 0, 1]):
        model = random_model(2, 9, make=gpt2.Model)
        for number in story:
            model.forward(*batches[2])
            model.forward(*batches[0], train=False)
            model.forward(*batches[number], grad_scale=0.5)
            model.backward()
            numbers.append((model.micro_batch, model.updates))
            if number == 2:
                model.update(0.0)  # which leaves the parameters as they are
        grads.append(model.grads)
    assert numbers == [(1, 0), (2, 0), (1, 0), (1, 1), (2, 1)]
    assert_same_bits(*grads)


# --------------------------------------------------------------------------------------------------
# AdamW


def test_adamw_by_hand():
    """The first step: m = (1 - beta1) g and v = (1 - beta2) g^2, corrected to g and g^2.

    So a parameter decays and then moves by the learning rate against the sign of its gradient,
    whatever the gradient's size.
    """
    p, g, m, v = np.array([[1.0, 1.0, 1.0, 0.0], [5.0, -3e-4, 0.0, 1.0], [0] * 4, [0] * 4])
    decay, learning_rate, beta1, beta2, eps, step, grad_scale = 0.25, 0.1, 0.9, 0.999, 1e-16, 1, 2
    gpt2.adamw(p, g, m, v, decay, learning_rate, beta1, beta2, eps, step, grad_scale)
    np.testing.assert_allclose(p, [0.65, 0.85, 0.75, -0.1], rtol=1e-11)
    np.testing.assert_allclose(m, 0.1 * 2 * np.array([5, -3e-4, 0, 1]), rtol=1e-12)
    np.testing.assert_allclose(v, 0.001 * 4 * np.array([25, 9e-8, 0, 1]), rtol=1e-12)


@EVERY_VERSION
@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-8), ((0.8, 0.95), 1e-3)])
def test_ten_updates_equal_pytorchs(betas, eps, version):
    """With two micro-batches each."""
    trainer = VERSIONS[version]
    model = random_model(2, 9, recompute=2, make=getattr(trainer, "GPT2", trainer.Model))
    reference = TorchGPT2(model.config, model.params)
    batches = random_tokens(10, 2, B=2, T=9)
    updates = compared_updates(model, reference, batches, 1e-2, betas, eps)
    fail_if_any([disagreement(line.name, line.ours, line.truth, 1e-9) for line in updates])


def test_the_model_counts_its_updates():
    """From where a numbered update left off."""
    expected, model = random_model(2, 9), random_model(2, 9)
    batch = random_tokens(B=2, T=9)
    for step in (1, 2, 7, 8):
        for one, number in ((expected, step), (model, step if step == 7 else None)):
            one.forward(*batch)
            one.backward()
            one.update(1e-2, step=number)
    assert_same_bits(model.params, expected.params)


# --------------------------------------------------------------------------------------------------
# A run: data, the schedule, one training step, and what the model writes


def test_batches_follow_one_another_shard_after_shard():
    """By hand: of 13 tokens, 12 are inputs; of 8, 6 are; then the first shard begins again."""
    shards = [np.arange(13, dtype=np.uint16), np.arange(20, 28)]
    loader = gpt2.DataLoader(shards, 2, 3)
    first_epoch = [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]], [[20, 21, 22], [23, 24, 25]]]
    positions, batches = [], []
    for expected in first_epoch + first_epoch + first_epoch[:1]:
        positions.append(loader.position)
        inputs, targets = loader.next_batch()
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.tolist() == expected and np.array_equal(targets, inputs + 1)
        batches.append((inputs, expected))  # arrays which the caller may keep
    assert all(inputs.tolist() == expected for inputs, expected in batches)
    epochs = [[[0, 0, epoch], [0, 6, epoch], [1, 0, epoch]] for epoch in range(3)]
    assert positions == epochs[0] + epochs[1] + epochs[2][:1]

    loader.seek(positions[4])
    assert loader.next_batch()[0].tolist() == first_epoch[1]
    assert positions[3:6] == epochs[1]  # a position that someone keeps does not change


@pytest.mark.parametrize("shuffle_seed", [None, 7])
@pytest.mark.parametrize("size", [13, 18, 24, 33, 34, 40, 45])
def test_an_epoch_has_each_window_once(size, shuffle_seed):
    """Of each shard, but for those that do not fill a batch. Any position can be gone back to."""
    B, T = 3, 4
    shards = [np.arange(size), np.arange(100, 100 + size)]
    loader = gpt2.DataLoader(shards, B, T, shuffle_seed)
    epochs, batches = {}, []
    while loader.position[2] < 10:
        shard, _, epoch = position = loader.position
        inputs, targets = loader.next_batch()
        assert np.array_equal(targets, inputs + 1)
        assert np.array_equal(np.diff(inputs), np.ones((B, T - 1)))
        epochs.setdefault((shard, epoch), []).extend(inputs[:, 0] - 100 * shard)
        batches.append((position, inputs))

    for starts in epochs.values():
        first = min(starts) % T
        assert len(starts) == (size - 1 - first) // T // B * B
        assert len(set(starts)) == len(starts) and {start % T for start in starts} == {first}
        assert min(starts) >= 0 and max(starts) + T < size
    if shuffle_seed is None:
        assert all(starts == list(range(0, len(starts) * T, T)) for starts in epochs.values())
    else:  # the seed, the shard and the epoch decide where the windows begin, and their order
        assert {min(starts) % T for starts in epochs.values()} == set(range(min(T, size - B * T)))
        assert len({str(starts) for starts in epochs.values()}) > (15 if size > 18 else 4)
        other = gpt2.DataLoader(shards, B, T, shuffle_seed=9)
        assert not np.array_equal(other.next_batch()[0], batches[0][1])

    loader = gpt2.DataLoader(shards, B, T, shuffle_seed)
    for position, inputs in batches[::-7]:
        loader.seek(position)
        assert np.array_equal(loader.next_batch()[0], inputs)


def test_the_learning_rate_by_hand():
    """Warm-up to 8 over four updates, then down to a quarter of it; without either, it stays."""
    rates = [gpt2.learning_rate_at(step, 8, 8.0, 4, final_frac=0.25) for step in range(9)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([2, 4, 6, 8, 8, 5 + 3 * root, 5, 5 - 3 * root, 2])
    assert [gpt2.learning_rate_at(step, 3, 0.7) for step in range(3)] == [0.7] * 3


@pytest.mark.parametrize("grad_clip", [0.0, 0.01, 100.0])
def test_a_training_step_is_the_sum_of_its_parts(grad_clip):
    tokens = random_tokens(B=1, T=100).ravel()
    model, expected = random_model(2, 9), random_model(2, 9)
    loader, batches = (gpt2.DataLoader([tokens], 2, 9) for _ in range(2))
    for _ in range(3):
        losses = []
        for _ in range(3):
            losses.append(expected.forward(*batches.next_batch(), grad_scale=1 / 3))
            expected.backward()
        true_norm = expected.grad_norm()
        clip = 0.01 / true_norm if grad_clip == 0.01 else 1.0
        expected.update(0.1, weight_decay=0.2, grad_scale=clip)

        loss, norm = gpt2.train_step(model, loader, 3, 0.1, weight_decay=0.2, grad_clip=grad_clip)
        assert loss == pytest.approx(np.mean(losses), rel=1e-12)
        assert norm == pytest.approx(true_norm, rel=1e-12)
        assert 0.01 < norm < 100
    assert_all_close(model.params, expected.params)


@pytest.mark.parametrize("name, what", [("lnfb", "loss"), ("qkvw", "gradient norm")])
def test_what_is_not_finite_ends_a_step_and_changes_no_parameter(name, what, monkeypatch):
    model = random_model(2, 9)
    loader = gpt2.DataLoader([random_tokens(B=1, T=100).ravel()], 2, 9)
    if what == "loss":
        model.params[name][...] = np.inf
    else:
        spoil = lambda self: self.grads[name].fill(np.nan)
        watch(monkeypatch, gpt2.Model, "backward", after=spoil)
    before = copies(model.params)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=f"the {what} is nan"):
        gpt2.train_step(model, loader, 1, 0.1)
    assert_same_bits(model.params, before)


def test_the_logits_of_the_next_token_equal_pytorchs():
    model = random_model(3, 9, make=gpt2.Model)
    reference = TorchGPT2(model.config, model.params)
    for length in (1, 2, 9):
        tokens = random_tokens(B=1, T=length)[0, 0].tolist()
        truth = reference.logits(torch.tensor([tokens]))[0, -1].detach().numpy()
        assert_all_close({"logits": model.next_logits(tokens)}, {"logits": truth})


@pytest.mark.parametrize(
    "T, prompt, windows",
    [
        (4, [1, 2], ["12", "123", "1234", "45", "456", "4567", "78"]),  # half of T, and so on
        (4, [7, 8, 1, 2, 3, 4], ["1234", "45", "456"]),
        (1, [1, 2], ["2", "3", "4"]),
    ],
)
def test_what_a_model_sees_while_it_writes(T, prompt, windows):
    """By hand: a model after whose token t always comes t + 1, and T tokens at a time."""
    seen = []

    def next_logits(tokens):
        seen.append("".join(map(str, tokens)))
        return np.eye(10, dtype=np.float32)[tokens[-1] + 1]

    model = types.SimpleNamespace(sequence_length=T, next_logits=next_logits)
    new = list(gpt2.generate(model, prompt, len(windows), 0, 0, None))
    assert seen == windows and new == [prompt[-1] + 1 + i for i in range(len(windows))]


@pytest.mark.parametrize(
    "temperature, top_k, weights",
    [
        (1, 0, [3, 1, 6, 2, 5, 4]),
        (0.5, 0, [9, 1, 36, 4, 25, 16]),
        (2, 6, [3**0.5, 1, 6**0.5, 2**0.5, 5**0.5, 2]),
        (1, 4, [3, 0, 6, 0, 5, 4]),
        (1, 2, [0, 0, 6, 0, 5, 0]),
        (1, 1, [0, 0, 1, 0, 0, 0]),
        (0, 0, [0, 0, 1, 0, 0, 0]),
        (1e-40, 0, [0, 0, 1, 0, 0, 0]),
    ],
)
def test_sampling_follows_the_distribution(temperature, top_k, weights):
    """By hand: logits ln 3, ln 1, ... have the weights 3, 1, ... at temperature 1.

    Of 4000 draws, each id's share is within five standard deviations of its probability.
    """
    logits = np.log(np.array([3, 1, 6, 2, 5, 4], np.float32))
    rng = np.random.default_rng(0)
    draws = [gpt2.sample(logits, temperature, top_k, rng) for _ in range(4000)]
    p = np.array(weights) / sum(weights)
    found = np.bincount(draws, minlength=6)
    assert (abs(found - 4000 * p) <= 5 * np.sqrt(4000 * p * (1 - p))).all()
    assert logits[1] == 0  # they are only read


def test_sampling_from_many_or_extreme_logits():
    """Large ones do not overflow. What is not a number must come to the next check of the loss,
    which ends the run in words; and rounding does not lead beyond the last token.
    """
    rng = np.random.default_rng(0)
    many = rng.standard_normal(5000, np.float32)
    assert {gpt2.sample(many, 1.0, 3, rng) for _ in range(100)} == set(np.argsort(many)[-3:])
    large = np.array([990, 1000, -1000], np.float32)
    assert {gpt2.sample(large, 1.0, 0, rng) for _ in range(100)} == {1}
    for logits in (np.full(5, np.nan, np.float32), np.array([0, np.nan, 1], np.float32)):
        for temperature in (0, 1.0):
            assert 0 <= gpt2.sample(logits, temperature, 0, rng) < len(logits)

    almost_one = types.SimpleNamespace(random=lambda dtype: np.nextafter(dtype(1), dtype(0)))
    for size in (2, 3, 1000, 50257):
        logits = np.linspace(0, 1, size, dtype=np.float32)
        assert gpt2.sample(logits, 1.0, 0, almost_one) == size - 1


# --------------------------------------------------------------------------------------------------
# Promises


@BOTH_FLOATS
def test_micro_batches_equal_the_batch_they_came_from(dtype):
    inputs, targets = random_tokens(B=6, T=9)
    large, small = random_model(6, 9, dtype), random_model(2, 9, dtype)
    loss = large.forward(inputs, targets)
    large.backward()
    losses = []
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        losses.append(small.forward(inputs[rows], targets[rows], grad_scale=1 / 3))
        small.backward()
    assert np.mean(losses) == pytest.approx(loss, rel=TOLERANCE[np.dtype(dtype)])
    assert_all_close(small.grads, large.grads)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_one_number_of_threads_gives_the_same_bits_each_time(threads, monkeypatch):
    """Losses, activations, gradients, moments and parameters of three steps. With another number
    they may differ by rounding.
    """
    monkeypatch.setattr(IN_SMALL_BLOCKS, "THREADS", threads)
    batches = random_tokens(2, B=2, T=33)
    runs = []
    for _ in range(3):
        model = random_model(2, 33, np.float32, make=IN_SMALL_BLOCKS.GPT2)
        runs.append((train_steps(model, 3, batches), model.blob.tobytes()))
    assert np.isfinite(model.flat).all()
    assert runs[0] == runs[1] == runs[2]

    plain = random_model(2, 33, np.float32, make=CHAPTER.Model)
    assert train_steps(plain, 3, batches) == pytest.approx(runs[0][0], rel=1e-5)


def test_a_run_has_the_losses_it_had_in_earlier_versions():
    """Recorded from the first version of this trainer, before it was rewritten."""
    model = gpt2.GPT2(gpt2.GPT2Config(64, 256, 2, 2, 32), 2, 32, seed=1337)
    tokens = np.random.default_rng(5).integers(0, 256, 800).astype(np.uint16)
    loader = gpt2.DataLoader([tokens], 2, 32)
    steps = [gpt2.train_step(model, loader, 1, 3e-3, 0.1, grad_clip=1.0) for _ in range(20)]
    losses, norms = zip(*steps, strict=True)
    assert losses[:3] == pytest.approx([5.5423088, 5.5649328, 5.5573697], rel=1e-6)
    assert losses[17:] == pytest.approx([5.3341579, 5.3604186, 5.3455601], rel=1e-4)
    assert norms[17:] == pytest.approx([1.0394905, 0.9929439, 0.9981517], rel=1e-3)


def test_a_training_step_allocates_nothing_that_grows(monkeypatch):
    """What a step allocates beyond the blob is blocks that fit a cache.

    Here they are small, and the peak is below the smallest of what would grow: a (B, T, C), or a
    matrix of (C, C).
    """
    B, T, C = 8, 64, 256
    trainer = trainer_with_blocks(8192)
    monkeypatch.setattr(trainer, "THREADS", 2)  # each has blocks of its own
    model = trainer.GPT2(gpt2.GPT2Config(T, 512, 2, 16, C), B, T, seed=1)
    batches = random_tokens(2, B=B, T=T, V=512)
    train_steps(model, 1, batches)
    tracemalloc.start()
    try:
        train_steps(model, 1, batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    smallest = min(model.acts["dln1"].nbytes, model.params["attprojw"][0].nbytes)
    assert peak < smallest, "this says nothing about the results: they may be right"


# --------------------------------------------------------------------------------------------------
# The program: the table of agreement


GOLDEN_TOKENS = gpt2.in_data("tiny_shakespeare_val.bin")

# llm.c's test: the losses of OpenAI's 124M on the first batch of the validation tokens.
GOLDEN_LOSSES = [
    5.270007, 4.059707, 3.375123, 2.800783, 2.315382,
    1.849029, 1.394656, 0.999147, 0.624080, 0.376511,
]  # fmt: skip


def overfit(model, inputs, targets, learning_rate, decay):
    """The losses before each of ten updates on one batch."""
    model.is_decayed = lambda name: True  # llm.c's test decays all parameters
    losses = []
    for _ in range(10):
        losses.append(model.forward(inputs, targets))
        model.backward()
        model.update(learning_rate, weight_decay=decay)
    return losses


def whole_model(source):
    """(model, inputs, targets): what from_pretrained knows, and 4 x 64 tokens, real ones if any."""
    model = gpt2.GPT2.from_pretrained(source, 4, 64, recompute=0)
    V = model.config.vocab_size
    if V >= 50257 and os.path.exists(GOLDEN_TOKENS):
        return model, *gpt2.DataLoader([gpt2.open_tokens(GOLDEN_TOKENS)], 4, 64).next_batch()
    return model, *random_tokens(B=4, T=64, V=V)


def compared_model(source):
    """(measured comparisons, golden losses) of a whole model in float32."""
    golden = []
    if source == "gpt2" and os.path.exists(GOLDEN_TOKENS):
        golden = overfit(*whole_model(source), learning_rate=1e-4, decay=0.01)
    model, inputs, targets = whole_model(source)
    reference = TorchGPT2(model.config, model.params)
    measures = measured(compared_step(model, reference, inputs, targets), by_layer=False)
    model.zero_grad()
    batches = np.tile([inputs, targets], (10, 1, 1, 1, 1))
    measures |= measured(compared_updates(model, reference, batches, learning_rate=1e-4))
    return measures, golden


def main(argv=None):
    """Print the table of agreement. Returns the exit code: 0 only if all of it agrees."""
    parser = argparse.ArgumentParser(
        description="Compare the trainer with PyTorch, tensor by tensor. The other proofs: "
        "python -m pytest"
    )
    about = "a whole model in float32: gpt2, a folder or a file (default: a small one)"
    parser.add_argument("--model", metavar="X", help=about)
    source = parser.parse_args(argv).model

    golden = []
    if source is None:
        torch.set_num_threads(1)
        columns = {dtype: measured(small_comparisons(dtype)) for dtype in ("float64", "float32")}
    else:
        torch.set_num_threads(gpt2.THREADS)
        columns = {}
        try:
            columns["float32"], golden = compared_model(source)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    versions = platform.python_version(), np.__version__, torch.__version__
    print("Python {}, NumPy {}, PyTorch {}".format(*versions))
    wrong = print_table(columns)
    for ours, llmc in zip(golden, GOLDEN_LOSSES, strict=False):
        agrees = abs(ours - llmc) < 1e-3  # each update magnifies rounding
        print(f"the loss is {ours:.6f}, in llm.c {llmc:.6f}  {'OK' if agrees else 'NOT OK'}")
        wrong += [] if agrees else [("overfitting", "", "loss")]

    number = len(next(iter(columns.values()))) + len(golden)
    if wrong:
        part, place, name = wrong[0]
        where = f"{part}, {place}" if place else part
        print(f"{len(wrong)} of {number} lines do NOT agree. The first is {name} ({where}).")
        return 1
    limits = " and ".join(f"to {TOLERANCE[np.dtype(dtype)]:g} in {dtype}" for dtype in columns)
    print(f"All {number} lines agree, {limits}.")
    return 0


FAULTS = [  # function, what is replaced in its text, by what, the first tensor that is wrong
    ("encoder_forward", "out += wpe", "pass", "encoded", "forward"),
    ("products", "out += bias", "pass", "qkv", "forward, layer 0"),
    ("gelu_forward", "np.divide(inp,", "np.divide(np.nan,", "fch_gelu", "forward, layer 0"),
    ("crossentropy_softmax_forward", "losses += np.log(total)", "pass", "losses", "forward"),
    ("layernorm_backward", "dnorm -= norm", "dnorm += norm", "dresidual3", "backward, layer 1"),
    ("attention_backward", "dq_sum, scale,", "dq_sum, 1,", "dqkv", "backward, layer 1"),
    ("encoder_backward", "dwte[token] += row", "dwte[token] = row", "dwte", "backward"),
    ("adamw", "p *= 1 - decay", "pass", "params 1", UPDATES),
]


@pytest.mark.parametrize("name, old, new, tensor, where", FAULTS)
def test_the_table_names_the_first_fault(name, old, new, tensor, where, monkeypatch, capsys):
    """And the exit code is 1."""
    text = inspect.getsource(inspect.unwrap(getattr(gpt2, name)))
    assert text.count(old) == 1
    found = {}
    exec(compile(text.replace(old, new), name, "exec"), vars(gpt2), found)
    monkeypatch.setattr(gpt2, name, found[name])
    assert main([]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f" lines do NOT agree. The first is {tensor} ({where}).")


def test_the_table_of_a_sound_trainer(capsys, tmp_path):
    assert main([]) == 0
    first, _, _, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith("Python 3.") and ", NumPy 2." in first and ", PyTorch 2." in first
    tensors = [line for line in lines if line.startswith("    ")]
    assert all(line.endswith("  OK") for line in tensors) and len(tensors) == 105
    assert last == "All 105 lines agree, to 1e-10 in float64 and to 1e-05 in float32."
    assert max(map(len, (first, *lines, last))) <= 100

    random_model(4, 64, np.float32).save_pretrained(str(tmp_path))
    assert main(["--model", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "\nforward, all layers\n" in text and text.endswith(" agree, to 1e-05 in float32.\n")


def test_what_can_not_be_compared_is_one_line(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "nothing" in error and error.count("\n") == 1


@pytest.mark.parametrize("missing, name", [("torch", "PyTorch"), ("pytest", "pytest")])
def test_what_is_not_installed_is_one_line(missing, name, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as caught:
        exec(compile(inspect.getsource(sys.modules[__name__]), "test_gpt2.py", "exec"), {})
    assert caught.value.code == f"error: test_gpt2.py needs {name}: pip install -r requirements.txt"


if __name__ == "__main__":
    sys.exit(main())
