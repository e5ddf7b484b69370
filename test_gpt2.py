"""
The proofs of train_gpt2.py.

    python test_gpt2.py                the table of agreement, tensor by tensor
    python -m pytest test_gpt2.py      what this file proves
    python -m pytest                   this and everything in tests/

The trainer is compared with a second GPT-2, written as usual: PyTorch modules, whose gradients come
from autograd, so that nobody derived them by hand. It takes its weights from the trainer and must
then agree with it, number for number. The order is that of the trainer's sections:

    layers        each forward and backward pass, in float64 to 1e-10 and in float32 to 1e-5
    memory        where the tensors lie in the blob, and which of them the layers share
    whole model   every tensor of the two tables; one that no test compares is a failure
    protocol      forward, backward and update in order, in a wrong order, and interrupted
    AdamW         ten steps beside torch.optim.AdamW, with all that a real run has
    promises      micro-batches, the same bits for any number of threads, no memory beyond the blob

What else there is to a model, such as batches and generation, is in tests/.

Where PyTorch is not needed, a case is worked out by hand or compared with differences. An error is
relative and by norm, for a whole tensor: |ours - truth| / |truth|. All parameters are random: with
the fresh ones, a bias of 0 that is left out would change nothing.
"""

import argparse
import contextlib
import itertools
import math
import os
import platform
import shutil
import sys
import tracemalloc
from typing import Callable, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


TORCH_NAMES = {  # of the trainer's parameters, in TorchGPT2 or in each of its TorchBlocks
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "ln1w": "ln1.weight",
    "ln1b": "ln1.bias",
    "qkvw": "qkv.weight",
    "qkvb": "qkv.bias",
    "attprojw": "attproj.weight",
    "attprojb": "attproj.bias",
    "ln2w": "ln2.weight",
    "ln2b": "ln2.bias",
    "fcw": "fc.weight",
    "fcb": "fc.bias",
    "fcprojw": "fcproj.weight",
    "fcprojb": "fcproj.bias",
    "lnfw": "lnf.weight",
    "lnfb": "lnf.bias",
}


def keep_nothing(name, x):
    """What the reference does with an intermediate tensor unless a test wants it: pass it on."""
    return x


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
                values = [view] if name in gpt2.NOT_PER_LAYER else view
                for parameter, value in zip(self.named(name), values, strict=True):
                    parameter.copy_(torch.from_numpy(value))

    def named(self, name):
        """What the trainer has as params[name]: a list, of one parameter or of one per layer."""
        owners = [self] if name in gpt2.NOT_PER_LAYER else self.blocks
        return [owner.get_parameter(TORCH_NAMES[name]) for owner in owners]

    def logits(self, inputs, keep=keep_nothing):
        T = inputs.shape[1]
        residual = keep("encoded", self.wte(inputs) + self.wpe.weight[:T])
        for block in self.blocks:
            residual = block(residual, keep)
        lnf = keep("lnf", self.lnf(residual))
        return keep("logits", F.linear(lnf, self.wte.weight))

    def forward(self, inputs, targets, keep=keep_nothing):
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

    The names are those of gpt2.act_shapes. Gradients have a "d" before the name. The gradients of
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
# Tools of the proofs


TOLERANCE = {np.dtype("float64"): 1e-10, np.dtype("float32"): 1e-5}
BOTH_FLOATS = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])


def relative_error(ours, truth):
    assert ours.shape == truth.shape
    difference = np.linalg.norm(ours.astype(np.float64) - truth)
    length = np.linalg.norm(truth)
    return difference / length if length else difference


def disagreement(name, ours, truth, tolerance):
    """What is wrong with an array, in a line; None if it agrees with the truth."""
    if ours.shape != truth.shape:
        return f"{name}: its shape is {ours.shape}, expected {truth.shape}"
    error = relative_error(ours, truth)
    if error <= tolerance:
        return None
    if np.isnan(ours).any():
        return f"{name}: {np.isnan(ours).sum()} of {ours.size} numbers are NaN, or were not written"
    gap = np.abs(ours - truth)
    worst = np.unravel_index(gap.argmax(), gap.shape)
    index = ", ".join(map(str, worst))
    return (
        f"{name}: its relative error is {error:.1e}, expected at most {tolerance:g}; "
        f"{name}[{index}] is {ours[worst]:.6g}, expected {truth[worst]:.6g}"
    )


def assert_all_close(ours, truth, tolerance=None):
    """Two dicts of arrays hold the same names and, to the tolerance of their type, numbers.

    A failure shows what is wrong and nothing else.
    """
    assert ours.keys() == truth.keys()
    wrong = []
    for name in ours:
        limit = tolerance or TOLERANCE[ours[name].dtype]
        wrong.append(disagreement(name, ours[name], truth[name], limit))
    wrong = [line for line in wrong if line]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


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
    B, T, dtype=np.float64, recompute=1, training=True, V=53, L=3, NH=3, C=24, max_seq_len=None
):
    """A small GPT-2. Its parameters are random, all else is NaN until it is written."""
    config = gpt2.GPT2Config(max_seq_len or T + 2, V, L, NH, C)
    model = gpt2.GPT2(config, B, T, seed=None, recompute=recompute, training=training, dtype=dtype)
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


# --------------------------------------------------------------------------------------------------
# Layers: how a test calls them
#
# A layer's test calls its forward and its backward function on random inputs, as the functions
# named run_... below do. They return the outputs, by name, and the gradient of sum(out * dout) with
# respect to each input. Integers are called tokens or targets.
#
# What a function overwrites is NaN before, so that a number which it leaves out, or reads, shows.
# What it adds to is 1 before.


def unset(*shape, like):
    return np.full(shape, np.nan, like.dtype)


def gradient_of(x, added_to):
    return np.ones_like(x) if added_to else np.full_like(x, np.nan)


def run_encoder(dout, NH, add, tokens, wte, wpe):
    T = tokens.shape[1]
    out = unset(*dout.shape, like=wte)
    dwte = gradient_of(wte, added_to=True)
    dwpe = gradient_of(wpe, add)
    gpt2.encoder_forward(out, tokens, wte, wpe[:T])
    gpt2.encoder_backward(dwte, dwpe, dout, tokens, add)
    return {"out": out, "dwte": dwte, "dwpe": dwpe}


def torch_encoder(NH, tokens, wte, wpe):
    return {"out": F.embedding(tokens, wte) + wpe[: tokens.shape[1]]}


def run_layernorm(dout, NH, add, inp, weight, bias):
    out = unset(*inp.shape, like=inp)
    mean = unset(*inp.shape[:-1], like=inp)
    rstd = unset(*inp.shape[:-1], like=inp)
    dinp = gradient_of(inp, added_to=True)
    dweight = gradient_of(weight, add)
    dbias = gradient_of(bias, add)
    gpt2.layernorm_forward(out, mean, rstd, inp, weight, bias)
    gpt2.layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, add)
    return {
        "out": out, "mean": mean, "rstd": rstd, "dinp": dinp, "dweight": dweight, "dbias": dbias,
    }  # fmt: skip


def torch_layernorm(NH, inp, weight, bias):
    mean, rstd = torch_mean_rstd(inp)
    return {"out": F.layer_norm(inp, weight.shape, weight, bias), "mean": mean, "rstd": rstd}


def run_matmul(dout, NH, add, inp, weight, bias=None):
    out = unset(*dout.shape, like=inp)
    grads = {"dinp": gradient_of(inp, False), "dweight": gradient_of(weight, add)}
    if bias is not None:
        grads["dbias"] = gradient_of(bias, add)
    gpt2.matmul_forward(out, inp, weight, bias)
    gpt2.matmul_backward(
        grads["dinp"], grads["dweight"], grads.get("dbias"), dout, inp, weight, add
    )
    return {"out": out} | grads


def torch_matmul(NH, inp, weight, bias=None):
    return {"out": F.linear(inp, weight, bias)}


def run_attention(dout, NH, add, qkv):
    B, T, C = dout.shape
    out = unset(B, T, C, like=qkv)
    lse = unset(B, T, NH, like=qkv)
    dqkv = gradient_of(qkv, False)
    gpt2.attention_forward(out, lse, qkv, NH)
    gpt2.attention_backward(dqkv, dout, out, lse, qkv, NH)
    return {"out": out, "lse": lse, "dqkv": dqkv}


def torch_attention_and_lse(NH, qkv):
    return {"out": torch_attention(qkv, NH), "lse": torch_lse(qkv, NH)}


def run_gelu(dout, NH, add, inp):
    out = unset(*inp.shape, like=inp)
    dinp = gradient_of(inp, False)
    in_place = dout.copy()
    gpt2.gelu_forward(out, inp)
    gpt2.gelu_backward(dinp, dout, inp)
    gpt2.gelu_backward(in_place, in_place, inp)
    assert in_place.tobytes() == dinp.tobytes()
    return {"out": out, "dinp": dinp}


def torch_gelu(NH, inp):
    return {"out": F.gelu(inp, approximate="tanh")}


def run_residual(dout, NH, add, inp1, inp2):
    out = unset(*dout.shape, like=inp1)
    gpt2.residual_forward(out, inp1, inp2)
    return {"out": out, "dinp1": dout, "dinp2": dout}


def torch_residual(NH, inp1, inp2):
    return {"out": inp1 + inp2}


def run_crossentropy(dout, NH, add, logits, targets):
    losses = unset(*targets.shape, like=logits)
    probs = logits.copy()
    gpt2.crossentropy_softmax_forward(losses, probs, targets)
    dlogits = probs.copy()
    dloss = float(dout[0, 0])  # all of dout is one number
    gpt2.crossentropy_softmax_backward(dlogits, targets, dloss)
    return {"out": losses, "probs": probs, "dlogits": dlogits}


def torch_crossentropy(NH, logits, targets):
    return {"out": torch_losses(logits, targets), "probs": logits.softmax(-1)}


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
    results = run_layernorm(dout, None, False, inp, weight=np.ones(4), bias=np.zeros(4))
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
    results = run_layernorm(inp, None, False, inp, weight=np.ones(4), bias=np.arange(4.0))
    assert results["out"].tolist() == [[[0, 1, 2, 3]]]
    assert results["rstd"].item() == pytest.approx(100 * math.sqrt(10), rel=1e-15)


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_softmax_crossentropy_by_hand(shift):
    """Logits [0, ln 3] have probabilities [1/4, 3/4], whatever is added to both.

    Target 0 costs ln 4; half of its gradient is [-3/8, 3/8]. Target 1 costs ln 4/3.
    """
    logits = np.array([[[0, math.log(3)], [0, math.log(3)]]]) + shift
    dout = np.full((1, 2), 0.5)
    results = run_crossentropy(dout, None, False, logits, np.array([[0, 1]]))
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
    results = run_attention(np.ones((1, 4, 1)), 1, False, qkv)
    assert_by_hand({"out": results["out"][:, 3:]}, {"out": [2.5e29]})
    results["out"] = results["out"][:, :3]
    assert_by_hand(results, {"out": [6, 4, 3], "lse": np.log([1, 2, 3, 4])})


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_attention_of_large_scores_stays_finite(scale):
    """Two equal keys, scores of 1e8: exp would overflow, or everything vanish."""
    qkv = np.full((1, 2, 3), 1e4)
    qkv[0, :, 1] = scale
    qkv[0, :, 2] = 1, 3
    results = run_attention(np.ones((1, 2, 1)), 1, False, qkv)
    assert_by_hand(results, {"out": [1, 2]})
    assert np.isfinite(results["dqkv"]).all()


def test_gelu_by_hand():
    """0 stays 0, far to the right nothing changes, far to the left nothing passes.

    There exp overflows, which is not an error.
    """
    inp = np.array([[[0.0, 20.0, -100.0]]])
    with np.errstate(over="raise"):
        results = run_gelu(np.ones_like(inp), None, False, inp)
    assert_by_hand(results, {"out": [0, 20, 0], "dinp": [0.5, 1, 0]})


# --------------------------------------------------------------------------------------------------
# Layers: each against PyTorch, and against differences, for many shapes


class Layer(NamedTuple):
    """What a test needs to know of a layer. `added` and `by_add` are columns of the table in
    the trainer's section 2: gradients that are always added to, and those that follow `add`."""

    run: Callable  # (dout, NH, add, **inputs) -> {name: array}
    torch: Callable  # (NH, **inputs) -> {name: tensor}, outputs only
    shapes: Callable  # (B, T, C, NH, V) -> {input: shape}
    added: tuple = ()
    by_add: tuple = ()


LAYERS = {
    "encoder": Layer(
        run_encoder,
        torch_encoder,
        lambda B, T, C, NH, V: {"tokens": (B, T), "wte": (V, C), "wpe": (T + 3, C)},
        added=("dwte",),
        by_add=("dwpe",),
    ),
    "layernorm": Layer(
        run_layernorm,
        torch_layernorm,
        lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (C,), "bias": (C,)},
        added=("dinp",),
        by_add=("dweight", "dbias"),
    ),
    "matmul": Layer(
        run_matmul,
        torch_matmul,
        lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (3 * C, C), "bias": (3 * C,)},
        by_add=("dweight", "dbias"),
    ),
    "matmul without bias": Layer(
        run_matmul,
        torch_matmul,
        lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (V, C)},
        by_add=("dweight",),
    ),
    "attention": Layer(
        run_attention,
        torch_attention_and_lse,
        lambda B, T, C, NH, V: {"qkv": (B, T, 3 * C)},
    ),
    "gelu": Layer(
        run_gelu,
        torch_gelu,
        lambda B, T, C, NH, V: {"inp": (B, T, 4 * C)},
    ),
    "residual": Layer(
        run_residual,
        torch_residual,
        lambda B, T, C, NH, V: {"inp1": (B, T, C), "inp2": (B, T, C)},
    ),
    "crossentropy_softmax": Layer(
        run_crossentropy,
        torch_crossentropy,
        lambda B, T, C, NH, V: {"logits": (B, T, V), "targets": (B, T)},
    ),
}
SHAPES = [  # B, T, C, NH, V
    (2, 7, 12, 3, 31),
    (1, 1, 5, 1, 2),  # one position: there is nothing to attend to but itself
    (3, 1, 8, 8, 257),  # heads of one channel
    (2, 129, 16, 4, 50),  # attention takes 128 positions at a time: the second block has one
    (1, 300, 10, 5, 33),  # three of them
    (4, 64, 48, 2, 997),
    (1, 3, 512, 1, 2),  # rows so wide that a small block has two
]
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
WITHOUT_ADD = [(name, False) for name in LAYERS]
WITH_ADD = [(name, True) for name in LAYERS if LAYERS[name].by_add]
BLOCK_SIZES = pytest.mark.parametrize("block_bytes", [gpt2.BLOCK_BYTES, 4096])


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
    assert {name.rpartition("_")[0] for name in functions} == {
        name.partition(" ")[0] for name in LAYERS
    }


@BOTH_FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, add", WITHOUT_ADD + WITH_ADD)
@BLOCK_SIZES
def test_layer_equals_pytorch(name, add, shape, dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", block_bytes)
    inputs, dout = layer_inputs(name, shape, dtype)
    given = copies(inputs | {"dout": dout})
    ours = LAYERS[name].run(NH=shape[3], add=add, **given)
    assert_all_close(ours, layer_truth(name, shape, inputs, dout, add))
    assert_same_bits(given, inputs | {"dout": dout})  # no layer writes into what it reads


@EVERY_LAYER
def test_layer_gradient_equals_differences(name):
    """(f(x + h) - f(x - h)) / 2 is dx . h, for small random h and f = sum(out * dout)."""
    shape = (2, 5, 6, 2, 11)
    layer = LAYERS[name]
    inputs, dout = layer_inputs(name, shape, np.float64)
    rng = np.random.default_rng(4)

    def f(key, h):
        moved = inputs | {key: inputs[key] + h}
        return np.sum(layer.run(dout, shape[3], False, **moved)["out"] * dout)

    results = layer.run(dout, shape[3], False, **inputs)
    differentiable = [key for key, x in inputs.items() if x.dtype.kind == "f"]
    assert differentiable
    for key in differentiable:
        gradient = results["d" + key] - (1 if "d" + key in layer.added else 0)
        for _ in range(3):
            h = 1e-5 * rng.standard_normal(inputs[key].shape)
            difference = (f(key, h) - f(key, -h)) / 2
            along_h = f"d{key} along a small step"
            assert_all_close({along_h: np.sum(gradient * h)}, {along_h: np.array(difference)}, 1e-6)


@BOTH_FLOATS
@pytest.mark.parametrize("n", [1, 2, 130, 299])
def test_attention_of_the_last_positions(n, dtype):
    """Generation only asks for the last n of T positions: the same as the last n of all."""
    B, T, C, NH, V = shape = (2, 300, 12, 3, 2)
    inputs, dout = layer_inputs("attention", shape, dtype)
    truth = layer_truth("attention", shape, inputs, dout)
    out = unset(B, n, C, like=dout)
    lse = unset(B, n, NH, like=dout)
    gpt2.attention_forward(out, lse, inputs["qkv"], NH)
    last = np.s_[:, T - n :]
    assert_all_close({"out": out, "lse": lse}, {key: truth[key][last] for key in ("out", "lse")})


# --------------------------------------------------------------------------------------------------
# Layers: blocks of rows


def test_by_rows_cuts_blocks_and_adds_their_sums_in_order(monkeypatch):
    """21 rows of 5 float32 have 20 bytes each: 5 blocks of 100 bytes would do, and 6 are even.

    420 bytes are cut in two even if they fit into one block, unless they fit into half of it. A row
    that is wider than a block is a block of its own.
    """
    blocks = []

    def body(a, b, whole):
        blocks.append((len(a), b.shape, whole))
        return a.sum(axis=0), b.sum(axis=0)

    a = np.arange(105, dtype=np.float32).reshape(3, 7, 5)
    b = np.arange(21, dtype=np.float32).reshape(3, 7)
    monkeypatch.setattr(gpt2, "THREADS", 1)
    cases = {100: [3, 4, 3, 4, 3, 4], 399: [10, 11], 839: [10, 11], 840: [21], 7: [1] * 21}
    for block_bytes, sizes in cases.items():
        monkeypatch.setattr(gpt2, "BLOCK_BYTES", block_bytes)
        blocks.clear()
        sums = gpt2.by_rows(2)(body)(a, b, "whole")
        assert blocks == [(n, (n,), "whole") for n in sizes]
        assert sums[0].tolist() == a.sum(axis=(0, 1)).tolist()
        assert sums[1] == b.sum()


@BOTH_FLOATS
@pytest.mark.parametrize("name", ["layernorm", "gelu", "crossentropy_softmax"])
def test_blocks_equal_one_block(name, dtype, monkeypatch):
    """What is computed for a row has the same bits in any block.

    The sums over rows, which are the gradients of layernorm's parameters, differ by rounding only.
    """
    shape = (2, 129, 16, 4, 50)
    inputs, dout = layer_inputs(name, shape, dtype)
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    blocks = LAYERS[name].run(dout, shape[3], False, **inputs)
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 1 << 40)
    whole = LAYERS[name].run(dout, shape[3], False, **inputs)
    sums = [key for key in ("dweight", "dbias") if key in whole]
    assert_all_close({key: blocks.pop(key) for key in sums}, {key: whole.pop(key) for key in sums})
    assert_same_bits(blocks, whole)


@BOTH_FLOATS
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (700, 60, 50), (50, 60, 700), (3, 90_000, 16)])
def test_a_product_in_blocks_equals_one_product(m, k, n, add, dtype, monkeypatch):
    """In float64 to 1e-10, in float32 to 1e-5, by rows or columns, with any number of threads."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    before = rng.standard_normal((m, n))
    truth = a @ b + (before if add else 0)
    outs = []
    for threads in (1, 3):
        monkeypatch.setattr(gpt2, "THREADS", threads)
        outs.append(before.astype(dtype) if add else np.full((m, n), np.nan, dtype))
        gpt2.products((outs[-1], a.astype(dtype), b.astype(dtype), add))
        assert_all_close({"out": outs[-1]}, {"out": truth})
    assert outs[0].tobytes() == outs[1].tobytes()


def test_a_product_is_cut_by_its_shapes_alone(monkeypatch):
    """Into 1, 2 or 4 blocks; or into more, where a block is added from the cache."""
    counts = []
    parallel = gpt2.parallel
    monkeypatch.setattr(gpt2, "parallel", lambda task, n: counts.append(n) or parallel(task, n))
    for threads in (1, 5):
        monkeypatch.setattr(gpt2, "THREADS", threads)
        counts.clear()
        for k, add in ((1, False), (40, False), (2200, False), (2300, False), (1, True)):
            out = np.zeros((300, 200), np.float32)
            a, b = np.ones((300, k), np.float32), np.ones((k, 200), np.float32)
            gpt2.products((out, a, b, add))
        monkeypatch.setattr(gpt2, "BLOCK_BYTES", 24_000)  # the last out has ten times as many
        job = (out, np.ones((300, 1), np.float32), np.ones((1, 200), np.float32), True)
        gpt2.products(job)
        gpt2.products(job, job[:3])  # two jobs are one call of parallel
        assert counts == [1, 2, 2, 4, 1, 10, 11]
        monkeypatch.undo()
        monkeypatch.setattr(gpt2, "parallel", lambda task, n: counts.append(n) or parallel(task, n))


# --------------------------------------------------------------------------------------------------
# Configuration and memory


LAYOUTS = {  # the ways in which activations are laid out
    "recompute 0": {"recompute": 0},
    "recompute 1": {"recompute": 1},
    "recompute 2": {"recompute": 2},
    "without training": {"training": False},
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def test_parameters_stand_as_in_llm_c():
    """Names and order are those of its files; the counts are those of OpenAI's four models."""
    assert list(gpt2.param_shapes(gpt2.GPT2Config())) == [
        "wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
        "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb",
    ]  # fmt: skip

    for L, NH, C, parameters in [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ]:
        config = gpt2.GPT2Config(num_layers=L, num_heads=NH, channels=C)
        assert gpt2.count(gpt2.param_shapes(config)) == parameters


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

    shapes = gpt2.param_shapes(model.config)
    for views in parts[: len(model.flat)]:
        assert {name: view.shape for name, view in views.items()} == shapes
    acts = gpt2.act_shapes(model.config, 2, 9, **LAYOUTS[layout])
    assert {name: view.shape for name, view in model.acts.items()} == acts
    assert len(model.flat) == (1 if layout == "without training" else 4)


@pytest.mark.parametrize(
    "layout, kept",
    [
        ("recompute 1", "ln1_mean ln1_rstd qkv att_lse atty residual2 ln2_mean ln2_rstd fch "
                        "residual3"),
        ("recompute 2", "residual3"),
        ("without training", "qkv"),
    ],
)  # fmt: skip
def test_what_each_layer_keeps_for_itself(layout, kept):
    """All others have one place, which the layers share; and recompute=0 shares nothing."""
    config = gpt2.GPT2Config(num_layers=3, num_heads=1, channels=4)
    everything = gpt2.act_shapes(config, 5, 6, recompute=0)
    shapes = gpt2.act_shapes(config, 5, 6, **LAYOUTS[layout])
    for name, shape in shapes.items():
        if name in gpt2.NOT_PER_LAYER:
            assert shape == everything[name], name
        else:
            assert everything[name][0] == 3, name
            assert shape == (3 if name in kept.split() else 1, *everything[name][1:]), name

    work_space = {"dresidual", "dlnf", "dfch", "dln2", "datty", "dqkv", "dln1"}
    assert everything.keys() - shapes.keys() == (
        work_space if layout == "without training" else set()
    )


def test_sizes_become_plain_integers():
    """As they are written to a config.json, which has no place for NumPy's."""
    config = gpt2.GPT2Config(np.int64(8), np.uint16(53), np.int32(2), 1, np.int8(4))
    assert {type(size) for size in vars(config).values()} == {int}


def test_fresh_weights_are_gpt2s():
    """Normal with standard deviation 0.02, into the residual stream 0.02 / sqrt(2L).

    Every estimate lies within five of its own standard errors.
    """
    L = 4
    model = gpt2.GPT2(gpt2.GPT2Config(128, 500, L, 4, 64), 1, 1, seed=8)
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


def test_a_seed_decides_every_bit():
    def fresh(seed):
        return gpt2.GPT2(gpt2.GPT2Config(64, 256, 2, 2, 32), 1, 8, seed=seed).params

    one, two = fresh(1), fresh(2)
    assert_same_bits(one, fresh(1))
    for name in ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"):
        assert not np.array_equal(one[name], two[name]), name

    # The weights of a seed stay what they were in earlier versions of this trainer.
    second = [float(fresh(1337)[name].flat[1]) for name in ("wte", "wpe", "qkvw", "fcprojw")]
    assert second == pytest.approx(
        [-0.019249863922595978, 0.0021467171609401703, 0.020022017881274223, 0.003657161258161068],
        rel=1e-6,
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: gpt2.GPT2Config(channels=768, num_heads=11), "768.* 11"),
        (lambda: gpt2.GPT2Config(num_layers=0), "num_layers.* 0"),
        (lambda: gpt2.GPT2Config(vocab_size=50257.0), "vocab_size.* 50257.0"),
        (lambda: gpt2.GPT2Config(num_layers=True), "num_layers.* True"),
        (lambda: random_model(1, 9, max_seq_len=8), "length 9.* 8"),
        (lambda: random_model(0, 9), "batch size 0"),
        (lambda: random_model(1, 0), "length 0"),
        (lambda: random_model(1, 9, recompute=5), "recompute.* 5"),
    ],
)
def test_a_model_that_can_not_be_is_an_input_error(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --------------------------------------------------------------------------------------------------
# The whole model: every tensor of the two tables


@contextlib.contextmanager
def watched_classifier(monkeypatch):
    """The logits and what becomes of them, copied piece by piece on their way."""
    pieces = {"logits": [], "probs": [], "dlogits": []}
    forward = gpt2.crossentropy_softmax_forward
    backward = gpt2.crossentropy_softmax_backward

    def watched_forward(losses, logits, targets):
        pieces["logits"].append(logits.copy())
        forward(losses, logits, targets)
        pieces["probs"].append(logits.copy())

    def watched_backward(probs, targets, dloss):
        backward(probs, targets, dloss)
        pieces["dlogits"].append(probs.copy())

    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "crossentropy_softmax_forward", watched_forward)
        patch.setattr(gpt2, "crossentropy_softmax_backward", watched_backward)
        yield pieces


def check_classifier(pieces, number, room, truth):
    """Compare all logits, probabilities and dlogits; the last piece must still be in `room`."""
    kinds = [name for name in pieces if pieces[name]]  # no dlogits without training
    for name in kinds:
        assert len(pieces[name]) == number
        whole = np.concatenate(pieces[name], axis=1)
        assert_all_close({name: whole}, {name: truth[name][0].reshape(whole.shape)})
    last = pieces[kinds[-1]][-1]
    assert room[:, : last.shape[1]].tobytes() == last.tobytes()


def check_acts(model, truth, names, l):
    """Compare the activations of these names. Those which layers share must be layer l's."""
    ours, expected = {}, {}
    for name in names:
        ours[name] = model.acts[name]
        if name in gpt2.NOT_PER_LAYER:
            expected[name] = truth[name][0]
        elif len(ours[name]) == model.config.num_layers:
            expected[name] = np.stack(truth[name])
        else:
            expected[name] = truth[name][l][None]
    assert_all_close(ours, expected)


@BOTH_FLOATS
@EVERY_LAYOUT
@pytest.mark.parametrize(
    "B, T, logits_rows, pieces, sizes",
    [
        # pieces: in how many the logits come, first in the memory of the gradients, then in acts
        (2, 8, 256, (1, 1), {}),
        (2, 8, 5, (1, 4), {}),  # 5, 5, 5 and 1 tokens
        (3, 1, 256, (1, 1), {"V": 2, "L": 1, "NH": 1, "C": 5}),
        (1, 131, 50, (2, 3), {"V": 101, "L": 2, "NH": 4, "C": 20, "max_seq_len": 131}),
        (2, 8, 5, (4, 4), {"V": 2000, "L": 1, "NH": 1, "C": 4}),  # acts["logits"] is larger
    ],
    ids=["one piece", "pieces", "least", "long", "large vocabulary"],
)
def test_every_tensor_equals_pytorch(B, T, logits_rows, pieces, sizes, layout, dtype, monkeypatch):
    """Two micro-batches: each activation after forward, each gradient after backward.

    Which tensors there are is taken from the tables, so that none is left out.
    """
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", logits_rows)
    train = layout != "without training"
    model = random_model(B, T, dtype, **LAYOUTS[layout], **sizes)
    reference = TorchGPT2(model.config, model.params).double()
    last = model.config.num_layers - 1

    by_forward = gpt2.act_shapes(model.config, B, T, training=False).keys() - {"logits"}
    by_forward |= {"dlnf"} & model.acts.keys()
    by_backward = model.acts.keys() - by_forward - {"logits"}
    batches = random_tokens(2, B=B, T=T, V=model.config.vocab_size)
    rooms = [model.acts["logits"]] * 2
    if train:
        rooms[0] = model.room_for_logits()
    else:
        pieces = (pieces[1], pieces[1])
    for (inputs, targets), grad_scale, number, room in zip(
        batches, (0.75, 0.5), pieces, rooms, strict=True
    ):
        true_loss, truth = torch_run(reference, inputs, targets, grad_scale)
        with watched_classifier(monkeypatch) as watched:
            loss = model.forward(inputs, targets, train, grad_scale)
        assert loss == pytest.approx(true_loss, rel=TOLERANCE[np.dtype(dtype)])
        check_classifier(watched, number, room, truth)
        check_acts(model, truth, by_forward, last)
        if not train:
            continue

        before = copies(model.acts)
        model.backward()
        check_acts(model, truth, by_backward, 0)  # backward ends at layer 0
        assert_all_close(model.grads, torch_grads(reference, model.params))

        # What backward does not own it leaves alone, unless it has computed a layer again.
        shared = set(gpt2.SHARED_BY_LAYERS[model.recompute])
        kept = model.acts.keys() - by_backward - shared
        now = {name: model.acts[name] for name in kept}
        assert_same_bits(now, {name: before[name] for name in kept})


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_reference_takes_every_parameter_in_its_type(dtype):
    """If the reference forgot a parameter, it would hide the same mistake in the trainer."""
    model = random_model(2, 5, dtype)
    reference = TorchGPT2(model.config, model.params)
    own = []
    for name in model.params:
        own += reference.named(name)
    assert len(own) == len(list(reference.parameters()))
    assert {id(p) for p in own} == {id(p) for p in reference.parameters()}
    assert {p.dtype for p in own} == {torch.from_numpy(model.blob).dtype}
    assert_same_bits(torch_params(reference, model.params), model.params)


def test_recompute_changes_no_bit(monkeypatch):
    """It buys memory with time: 1 and 2 store less, and all else is the same."""
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    batches = random_tokens(2, B=2, T=9)
    models = [random_model(2, 9, np.float32, recompute) for recompute in (0, 1, 2)]
    losses = [train_steps(model, 3, batches) for model in models]
    assert losses == [losses[0]] * 3
    for model in models[1:]:
        assert model.flat.tobytes() == models[0].flat.tobytes()
    assert models[0].blob.size > models[1].blob.size > models[2].blob.size


@pytest.mark.parametrize(
    "recompute, layers, gelus",
    [(0, [0, 1, 2], 3), (1, [0, 1, 2], 5), (2, [0, 1, 2, 1, 0], 5)],
)
def test_only_what_is_not_kept_is_computed_again(recompute, layers, gelus, monkeypatch):
    """What forward has computed of the last layer is still there."""
    calls = []
    up_to_gelu, gelu_forward = gpt2.GPT2.forward_up_to_gelu, gpt2.gelu_forward

    def watched_layer(self, l, *args):
        calls.append(l)
        return up_to_gelu(self, l, *args)

    def watched_gelu(out, inp):
        calls.append("gelu")
        gelu_forward(out, inp)

    monkeypatch.setattr(gpt2.GPT2, "forward_up_to_gelu", watched_layer)
    monkeypatch.setattr(gpt2, "gelu_forward", watched_gelu)
    model = random_model(2, 9, recompute=recompute)
    model.forward(*random_tokens(B=2, T=9))
    model.backward()
    assert [call for call in calls if call != "gelu"] == layers
    assert calls.count("gelu") == gelus


def test_uniform_logits_cost_ln_of_the_vocabulary():
    """Weights of zero give every token the probability 1 / V."""
    model = gpt2.GPT2(gpt2.GPT2Config(8, 53, 2, 2, 8), 2, 8, seed=None)
    assert not model.blob.any()
    loss = model.forward(*random_tokens(B=2, T=8), train=False)
    assert loss == pytest.approx(math.log(53), rel=1e-6)


@pytest.mark.parametrize("parts", [[9], [4, 1, 1, 3], [1] * 9], ids=str)
@pytest.mark.parametrize("layout", ["recompute 0", "recompute 1", "without training"])
def test_forward_tokens_piece_by_piece_equals_the_whole(layout, parts):
    """Generation only computes new positions: the earlier ones left their keys and values."""
    model = random_model(2, 9, **LAYOUTS[layout])
    tokens = random_tokens(B=2, T=9)[0]
    whole = model.forward_tokens(tokens)[:1].copy()
    for name in ("encoded", "lnf", "qkv"):
        model.acts[name][...] = np.nan
    first = 0
    for n in parts:
        lnf = model.forward_tokens(tokens[:1, first : first + n], first)
        assert relative_error(lnf, whole[:, first : first + n]) < 1e-13
        first += n


def test_a_model_without_training_does_all_but_train():
    """The same losses and texts, to the bit, in a fraction of the memory."""
    large = random_model(2, 9, np.float32)
    small = random_model(2, 9, np.float32, training=False)
    inputs, targets = random_tokens(B=2, T=9)
    loss = large.forward(inputs, targets, train=False)
    assert small.forward(inputs, targets, train=False) == loss
    texts = [list(model.generate([1, 2, 3], 20, rng=5)) for model in (large, small)]
    assert texts[0] == texts[1]
    assert small.grads == small.m == small.v == {}
    assert small.blob.size < large.blob.size / 3

    with pytest.raises(InputError, match="training=False"):
        small.forward(inputs, targets)
    for call in (small.backward, small.grad_norm, lambda: small.update(0.1)):
        with pytest.raises(InputError, match="the stage is 'no gradients'"):
            call()


# --------------------------------------------------------------------------------------------------
# The protocol: forward, backward, update
#
# A story is a sequence of calls, told in words.


BATCHES = random_tokens(2, B=2, T=9)
CALLS = {
    "forward1": lambda model: model.forward(*BATCHES[0], grad_scale=0.5),
    "forward2": lambda model: model.forward(*BATCHES[1], grad_scale=0.5),
    "validate": lambda model: model.forward(*BATCHES[0], train=False),
    "misspell": lambda model: model.forward(BATCHES[0][0], 53 + BATCHES[0][1]),
    "cut": lambda model: model.forward(BATCHES[0][0], BATCHES[0][1][:, :-1]),
    "generate": lambda model: list(model.generate([1, 2, 3], 12)),
    "rows": lambda model: model.forward_tokens(BATCHES[0][0]),
    "backward": lambda model: model.backward(),
    "norm": lambda model: model.grad_norm(),
    "update": lambda model: model.update(0.0),  # which leaves the parameters as they are
    "zero": lambda model: model.zero_grad(),
}


def told(story, model=None):
    """A model that has been through a story."""
    model = model or random_model(2, 9)
    for word in story.split():
        CALLS[word](model)
    return model


def assert_refused(model, word, expected):
    """The call ends in one line which says `expected`, and changes nothing."""
    before, stage = model.blob.tobytes(), model.stage
    with pytest.raises(InputError, match=expected) as refusal:
        CALLS[word](model)
    assert "\n" not in str(refusal.value)
    assert model.stage == stage
    assert model.blob.tobytes() == before


@pytest.mark.parametrize(
    "story, then, stage",
    [
        ("", "backward", "no gradients"),
        ("zero", "backward", "no gradients"),
        ("validate", "backward", "no gradients"),
        ("forward1 backward", "backward", "gradients"),
        ("forward1 backward zero", "backward", "no gradients"),
        # By now the activations are those of another pass.
        ("forward1 validate", "backward", "no gradients"),
        ("forward1 generate", "backward", "no gradients"),
        ("forward1 rows", "backward", "no gradients"),
        # Its part of dwte was added to that of an earlier micro-batch, which was to be forgotten.
        ("forward1 backward forward2 zero", "backward", "no gradients"),
        # A later forward has added to dwte. Another one would add twice.
        ("forward1 backward forward2", "forward2", "later forward"),
        ("forward1 backward forward2", "validate", "later forward"),
        ("forward1 backward forward2", "generate", "later forward"),
        ("forward1 backward forward2", "rows", "later forward"),
        # There are no gradients, or not all of them.
        ("", "update", "no gradients"),
        ("zero", "update", "no gradients"),
        ("forward1", "update", "first forward"),
        ("forward1 backward update", "update", "no gradients"),
        ("forward1 backward zero", "update", "no gradients"),
        ("forward1 backward forward2", "update", "later forward"),
        ("", "norm", "no gradients"),
        ("forward1", "norm", "first forward"),
        ("forward1 backward update", "norm", "no gradients"),
        ("forward1 backward forward2", "norm", "later forward"),
    ],
)
def test_a_call_out_of_order_is_one_line_and_changes_nothing(story, then, stage):
    assert_refused(told(story), then, f"can't follow here: the stage is '{stage}', expected '")


@pytest.mark.parametrize(
    "story, then, expected",
    [
        ("forward1", "misspell", "targets"),
        ("forward1 backward", "misspell", "targets"),
        ("forward1 backward", "cut", r"targets \(2, 8\): expected \(2, 9\)"),
    ],
)
def test_a_wrong_call_is_one_line_and_changes_nothing(story, then, expected):
    assert_refused(told(story), then, expected)


@pytest.mark.parametrize(
    "story, same_as",
    [
        # The first forward may be repeated, or forgotten.
        ("forward1 forward2 backward", "forward2 backward"),
        ("forward1 validate forward2 backward", "forward2 backward"),
        # Gradients begin anew after an update, and after zero_grad.
        ("forward1 backward update forward2 backward", "forward2 backward"),
        ("forward1 backward zero forward2 backward", "forward2 backward"),
        ("forward1 backward forward1 zero forward2 backward", "forward2 backward"),
        # Validation and generation change no gradient.
        ("forward1 backward validate generate norm rows", "forward1 backward"),
        (
            "validate forward1 backward validate generate forward2 backward",
            "forward1 backward forward2 backward",
        ),
    ],
)
def test_two_stories_end_with_the_same_gradients(story, same_as):
    assert_same_bits(told(story).grads, told(same_as).grads)


def test_the_stages_are_those_that_the_class_describes():
    model = random_model(2, 9)
    stages = [model.stage]
    for word in "forward1 backward forward2 backward norm update".split():
        told(word, model)
        stages.append(model.stage)
    assert stages == [
        "no gradients", "first forward", "gradients", "later forward",
        "gradients", "gradients", "no gradients",
    ]  # fmt: skip


def interrupt(patch, function, number):
    """Ctrl-C comes in the call of this number of one of the trainer's functions."""
    original = getattr(gpt2, function)
    calls = iter(range(1, number))

    def interrupted(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(*args)

    patch.setattr(gpt2, function, interrupted)


@pytest.mark.parametrize(
    "story, call, function, number",
    [
        ("forward1", "backward", "layernorm_backward", 1),
        ("forward1", "backward", "attention_backward", 2),
        ("forward1", "backward", "encoder_backward", 1),
        ("forward1 backward forward2", "backward", "gelu_backward", 1),
        ("forward1 backward", "forward2", "matmul_backward", 1),
        ("", "forward1", "matmul_backward", 1),
        ("", "forward1", "crossentropy_softmax_backward", 1),
        ("forward1 backward", "update", "adamw", 1),
        ("forward1 backward", "update", "adamw", 3),
    ],
)
def test_gradients_that_an_interrupted_call_left_are_not_used(
    story, call, function, number, monkeypatch
):
    """They are incomplete. zero_grad() forgets them, and all is well."""
    monkeypatch.setattr(gpt2, "ADAMW_CHUNK", 1000)
    model = told(story)
    with monkeypatch.context() as patch:
        interrupt(patch, function, number)
        with pytest.raises(KeyboardInterrupt):
            CALLS[call](model)
    for word in ("backward", "update", "norm", "forward2", "validate", "generate"):
        assert_refused(model, word, "interrupted")
    told("zero forward2 backward", model)
    assert_same_bits(model.grads, told("forward2 backward").grads)


@pytest.mark.parametrize(
    "story, call, function, number, then, same_as",
    [
        ("", "forward1", "gelu_forward", 1, "forward2 backward", "forward2 backward"),
        ("", "validate", "crossentropy_softmax_forward", 1, "forward2 backward",
         "forward2 backward"),
        ("forward1", "forward2", "gelu_forward", 1, "forward2 backward", "forward2 backward"),
        ("forward1 backward", "validate", "crossentropy_softmax_forward", 1, "",
         "forward1 backward"),
        ("forward1 backward", "forward2", "gelu_forward", 2, "forward2 backward",
         "forward1 backward forward2 backward"),
    ],
)  # fmt: skip
def test_an_interrupted_call_that_has_spoilt_nothing_may_be_repeated(
    story, call, function, number, then, same_as, monkeypatch
):
    model = told(story)
    with monkeypatch.context() as patch:
        interrupt(patch, function, number)
        with pytest.raises(KeyboardInterrupt):
            CALLS[call](model)
    told(then, model)
    assert_same_bits(model.grads, told(same_as).grads)


# --------------------------------------------------------------------------------------------------
# AdamW


def test_adamw_by_hand():
    """The first step: m = (1 - beta1) g and v = (1 - beta2) g^2, corrected to g and g^2.

    So a parameter decays and then moves by the learning rate against the sign of its gradient,
    whatever the gradient's size.
    """
    p, g, m, v = np.array([[1.0, 1.0, 1.0, 0.0], [5.0, -3e-4, 0.0, 1.0], [0] * 4, [0] * 4])
    gpt2.adamw(
        p, g, m, v,
        decay=0.25, learning_rate=0.1, beta1=0.9, beta2=0.999, eps=1e-16, step=1, grad_scale=2,
    )  # fmt: skip
    np.testing.assert_allclose(p, [0.65, 0.85, 0.75, -0.1], rtol=1e-11)
    np.testing.assert_allclose(m, 0.1 * 2 * np.array([5, -3e-4, 0, 1]), rtol=1e-12)
    np.testing.assert_allclose(v, 0.001 * 4 * np.array([25, 9e-8, 0, 1]), rtol=1e-12)


def scheduled_rate(step):
    """Three steps of warm-up to 1e-2, then half a cosine down to a tenth of it at step 10."""
    if step <= 3:
        return 1e-2 * step / 3
    return 1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / 7)))


@pytest.mark.parametrize(
    "beta1, beta2, eps, counted",
    [(0.9, 0.999, 1e-8, False), (0.8, 0.95, 1e-3, True)],
)
def test_ten_steps_equal_pytorch_adamw(beta1, beta2, eps, counted, monkeypatch):
    """With warm-up, cosine, weight decay, clipping and two micro-batches, as in a real run.

    If counted, update() is told the number of the step. Otherwise it counts by itself.
    """
    monkeypatch.setattr(gpt2, "ADAMW_CHUNK", 1000)  # so that most tensors are many chunks
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    clip, decay = 0.5, 0.1
    model = random_model(2, 9, recompute=2)
    reference = TorchGPT2(model.config, model.params)
    decayed = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}  # no biases, no layernorms
    groups = []
    for name in model.params:
        weight_decay = decay if name in decayed else 0.0
        groups.append({"params": reference.named(name), "weight_decay": weight_decay})
    optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps)

    for step, micro_batches in enumerate(random_tokens(10, 2, B=2, T=9), start=1):
        optimizer.zero_grad()
        for inputs, targets in micro_batches:
            true_loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets))
            (true_loss / 2).backward()
            loss = model.forward(inputs, targets, grad_scale=1 / 2)
            model.backward()
            assert loss == pytest.approx(true_loss.item(), rel=1e-9)

        true_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip).item()
        norm = model.grad_norm()
        assert norm == pytest.approx(true_norm, rel=1e-9)
        assert norm > 1.2 * clip  # so clipping changes something

        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step)
        optimizer.step()
        model.update(
            scheduled_rate(step), beta1, beta2, eps, decay,
            step=step if counted else None, grad_scale=clip / (norm + 1e-6),
        )  # fmt: skip
    assert_all_close(model.params, torch_params(reference, model.params), 1e-9)


def test_the_model_counts_its_updates():
    """From where a numbered update left off; and a number that can't be is refused."""
    expected, model = random_model(2, 9), random_model(2, 9)
    for step in (1, 2, 7, 8):
        told("forward1 backward", expected).update(1e-2, step=step)
        told("forward1 backward", model).update(1e-2, step=step if step == 7 else None)
    assert_same_bits(model.params, expected.params)

    told("forward1 backward", model)
    before = model.blob.tobytes()
    with pytest.raises(InputError, match=r"step=0.* from 1"):
        model.update(1e-2, step=0)
    assert model.blob.tobytes() == before
    told("norm update", model)  # the gradients are still there


@pytest.mark.parametrize("cut", [1, 1000, 1234, 20_000])
def test_an_update_in_two_parts_equals_one(cut, monkeypatch):
    """Each of two processes may update its own slice of the vector of all parameters."""
    monkeypatch.setattr(gpt2, "ADAMW_CHUNK", 1000)
    whole, one, two = (told("forward1 backward") for _ in range(3))
    parts = slice(cut), slice(cut, None)
    norms = [one.grad_norm(parts[0]), two.grad_norm(parts[1])]
    assert math.hypot(*norms) == pytest.approx(whole.grad_norm(), rel=1e-12)

    before = whole.flat[0].copy()
    whole.update(1e-2, weight_decay=0.1)
    one.update(1e-2, weight_decay=0.1, part=parts[0])
    two.update(1e-2, weight_decay=0.1, part=parts[1])
    assert np.array_equal(np.hstack([one.flat[:, parts[0]], two.flat[:, parts[1]]]), whole.flat)
    assert np.array_equal(one.flat[0, parts[1]], before[parts[1]])
    assert np.array_equal(two.flat[0, parts[0]], before[parts[0]])


# --------------------------------------------------------------------------------------------------
# One training step


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
        backward = gpt2.GPT2.backward

        def broken(self):
            backward(self)
            self.grads[name][...] = np.nan

        monkeypatch.setattr(gpt2.GPT2, "backward", broken)
    before = copies(model.params)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=f"the {what} is nan"):
        gpt2.train_step(model, loader, 1, 0.1)
    assert_same_bits(model.params, before)


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


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    """Losses, activations, gradients, moments and parameters of three steps."""
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(gpt2, "ADAMW_CHUNK", 1000)
    batches = random_tokens(2, B=2, T=33)
    runs = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(gpt2, "THREADS", threads)
        model = random_model(2, 33, np.float32)
        runs.append((train_steps(model, 3, batches), model.blob.tobytes()))
        assert np.isfinite(model.flat).all()
    assert runs[0] == runs[1] == runs[2]


def test_a_run_has_the_losses_it_had_in_earlier_versions():
    """Recorded from the first version of this trainer, before it was rewritten."""
    model = gpt2.GPT2(gpt2.GPT2Config(64, 256, 2, 2, 32), 2, 32, seed=1337)
    tokens = np.random.default_rng(5).integers(0, 256, 800).astype(np.uint16)
    loader = gpt2.DataLoader([tokens], 2, 32)
    steps = [
        gpt2.train_step(model, loader, 1, 3e-3, weight_decay=0.1, grad_clip=1.0) for _ in range(20)
    ]
    losses = [loss for loss, norm in steps]
    norms = [norm for loss, norm in steps]
    assert losses[:3] == pytest.approx([5.5423088, 5.5649328, 5.5573697], rel=1e-6)
    assert losses[17:] == pytest.approx([5.3341579, 5.3604186, 5.3455601], rel=1e-4)
    assert norms[17:] == pytest.approx([1.0394905, 0.9929439, 0.9981517], rel=1e-3)


def test_a_training_step_allocates_nothing_that_grows(monkeypatch):
    """What a step allocates beyond the blob is blocks that fit a cache.

    Here they are small, and the peak is below the smallest of what would grow: a (B, T, C), or a
    matrix of (C, C).
    """
    B, T, C = 8, 64, 256
    monkeypatch.setattr(gpt2, "THREADS", 2)  # each has blocks of its own
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(gpt2, "ADAMW_CHUNK", 2048)
    model = gpt2.GPT2(gpt2.GPT2Config(T, 512, 2, 16, C), B, T, seed=1)
    batches = random_tokens(2, B=B, T=T, V=512)
    train_steps(model, 1, batches)
    tracemalloc.start()
    try:
        train_steps(model, 1, batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    smallest = min(model.acts["dln1"].nbytes, model.params["attprojw"][0].nbytes)
    if peak >= smallest:
        pytest.fail(
            f"a step allocates {peak:,} bytes at once, expected less than {smallest:,}. This says "
            "nothing about its results: they may be right",
            pytrace=False,
        )


def test_what_is_saved_is_what_is_read(tmp_path):
    """The formats have tests of their own. Here every argument reaches its place."""
    model = random_model(2, 9, np.float32)
    model.save_pretrained(str(tmp_path))
    found = gpt2.GPT2.from_pretrained(str(tmp_path), 3, 5, recompute=2)
    assert_same_bits(found.params, model.params)
    assert found.config == model.config
    assert (found.batch_size, found.sequence_length, found.recompute) == (3, 5, 2)
    assert found.training
    assert not gpt2.GPT2.from_pretrained(str(tmp_path), 1, 5, training=False).training


# --------------------------------------------------------------------------------------------------
# The table of agreement: one step of a whole model, and ten updates, number by number


UPDATES = "ten updates: the loss before, the parameters after"


class Comparison(NamedTuple):
    """A tensor, or a number, of the trainer and what it should be."""

    part: str  # "forward", "backward" or UPDATES
    place: str  # "layer 3", or ""
    name: str
    ours: np.ndarray
    truth: np.ndarray


@contextlib.contextmanager
def kept_gradients(kept):
    """Within this, keep copies of what each backward function writes first, in order of calls."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("layernorm", "matmul", "attention", "gelu", "encoder"):
            original = getattr(gpt2, f"{name}_backward")

            def run(out, *args, original=original):
                original(out, *args)
                kept.append(out.copy())

            patch.setattr(gpt2, f"{name}_backward", run)
        yield


# What the calls that backward() makes for a layer write first. After them comes the gradient of the
# layer's input, which is the residual3 of the layer before, or encoded.
GRADIENTS_OF_A_LAYER = ("dfch_gelu", "dfch", "dln2", "dresidual2", "datty", "dqkv", "dln1")


def compared_step(model, reference, inputs, targets):
    """A forward and a backward pass beside PyTorch: Comparisons, in the order of computation.

    The names are those of the two tables, so none is left out. The model has recompute=0, and its
    logits fit into one piece.
    """
    _, truth = torch_run(reference, inputs, targets)
    with pytest.MonkeyPatch.context() as patch, watched_classifier(patch) as pieces:
        model.forward(inputs, targets)
    kept = []
    with kept_gradients(kept):
        model.backward()

    def classified(name):
        [piece] = pieces[name]
        return piece.reshape(*targets.shape, -1)

    B, T = targets.shape
    L = model.config.num_layers
    names = [*gpt2.act_shapes(model.config, B, T, training=False)]
    of_layers = [name for name in names if name not in gpt2.NOT_PER_LAYER]
    last = names.index(of_layers[-1])
    for name in names[: names.index(of_layers[0])]:
        yield Comparison("forward", "", name, model.acts[name], truth[name][0])
    for l in range(L):
        for name in of_layers:
            yield Comparison("forward", f"layer {l}", name, model.acts[name][l], truth[name][l])
    for name in names[last + 1 :]:
        if name != "logits":
            yield Comparison("forward", "", name, model.acts[name], truth[name][0])
            continue
        for name in ("logits", "probs"):
            yield Comparison("forward", "", name, classified(name), truth[name][0])

    grads = torch_grads(reference, model.params)
    kept = iter(kept)
    parameters = [name for name in reversed(model.grads) if name not in gpt2.NOT_PER_LAYER]
    yield Comparison("backward", "", "dlogits", classified("dlogits"), truth["dlogits"][0])
    yield Comparison("backward", "", "dlnf", model.acts["dlnf"], truth["dlnf"][0])
    for name in ("lnfb", "lnfw"):
        yield Comparison("backward", "", f"d{name}", model.grads[name], grads[name])
    yield Comparison("backward", "", "dresidual3", next(kept), truth["dresidual3"][L - 1])
    for l in reversed(range(L)):
        place = f"layer {l}"
        for name in GRADIENTS_OF_A_LAYER:
            yield Comparison("backward", place, name, next(kept), truth[name][l])
        for name in parameters:
            yield Comparison("backward", place, f"d{name}", model.grads[name][l], grads[name][l])
        if l > 0:
            true = truth["dresidual3"][l - 1]
            yield Comparison("backward", f"layer {l - 1}", "dresidual3", next(kept), true)
    yield Comparison("backward", "", "dencoded", next(kept), truth["dencoded"][0])
    for name in ("wpe", "wte"):
        yield Comparison("backward", "", f"d{name}", model.grads[name], grads[name])


def compared_updates(model, reference, inputs, targets, learning_rate):
    """Ten updates by AdamW beside PyTorch's, with decay: the loss before and the parameters after.

    eps is large, because the gradient of the keys' biases is 0 but for rounding. AdamW would make
    steps of full size of this noise.
    """
    groups = []
    for name in model.params:
        decay = 0.1 if gpt2.is_decayed(name) else 0.0
        groups.append({"params": reference.named(name), "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, learning_rate, eps=1e-3)

    for step in range(1, 11):
        optimizer.zero_grad()
        true_loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets))
        true_loss.backward()
        optimizer.step()
        if step > 1:  # compared_step has left the gradients of the first
            model.forward(inputs, targets)
            model.backward()
        loss = model.acts["losses"].mean(dtype=np.float64)
        model.update(learning_rate, eps=1e-3, weight_decay=0.1)

        yield Comparison(UPDATES, "", f"loss {step}", np.array(loss), np.array(true_loss.item()))
        truth = torch_params(reference, model.params)
        true = np.concatenate([truth[name].ravel() for name in model.params])
        yield Comparison(UPDATES, "", f"params {step}", model.flat[0], true)


def small_comparisons(dtype):
    """All comparisons of a small GPT-2 of two layers."""
    model = random_model(2, 9, dtype, recompute=0, L=2)
    reference = TorchGPT2(model.config, model.params).double()
    inputs, targets = random_tokens(B=2, T=9)
    yield from compared_step(model, reference, inputs, targets)
    yield from compared_updates(model, reference, inputs, targets, learning_rate=1e-2)


@BOTH_FLOATS
def test_every_line_of_the_table_agrees(dtype):
    for line in small_comparisons(dtype):
        name = f"{line.name} {line.place}"
        ours, tolerance = np.asarray(line.ours), TOLERANCE[np.dtype(dtype)]
        assert_all_close({name: ours}, {name: line.truth}, tolerance)


def test_the_table_shows_every_tensor_of_every_layer():
    model = random_model(2, 9, recompute=0, L=2)
    shown = [line.name for line in small_comparisons(np.float64)]
    for name in model.acts.keys() - {"dresidual"}:  # which is dresidual3, dresidual2 or dencoded
        of_layers = name in GRADIENTS_OF_A_LAYER or name not in gpt2.NOT_PER_LAYER
        assert shown.count(name) == (2 if of_layers else 1), name
    for name in model.grads:
        assert shown.count(f"d{name}") == (1 if name in gpt2.NOT_PER_LAYER else 2), name
    for name, number in (("dresidual3", 2), ("dresidual2", 2), ("dencoded", 1)):
        assert shown.count(name) == number, name
    for step in range(1, 11):
        assert shown.count(f"loss {step}") == shown.count(f"params {step}") == 1


def measured(comparisons, by_layer=True):
    """{(part, place, name): (shape, relative error, greatest difference)}.

    by_layer   False: of each tensor the greatest errors of all layers
    """
    lines = {}
    for part, place, name, ours, truth in comparisons:
        key = part, place if by_layer or not place else "all layers", name
        _, relative, greatest = lines.get(key, (None, 0.0, 0.0))
        relative = np.maximum(relative, relative_error(np.asarray(ours), truth))  # NaN stays NaN
        greatest = np.maximum(greatest, np.max(np.abs(ours - truth)))
        lines[key] = np.shape(ours), relative, greatest
    return lines


def print_table(columns):
    """Print {type: measured(...)}, a column for each type. Returns the keys that do not agree."""
    terminal = sys.stdout.isatty()
    coloured = terminal and "NO_COLOR" not in os.environ
    shape_width = 18 if not terminal or shutil.get_terminal_size().columns >= 80 else 0
    print(" " * (16 + shape_width), *[f"{dtype:^19}" for dtype in columns])
    print(" " * 16 + "shape"[:shape_width].rjust(shape_width), end="")
    print("  relative  greatest" * len(columns))

    wrong, heading = [], None
    for key in next(iter(columns.values())):
        part, place, name = key
        if (part, place) != heading:
            heading = part, place
            print(", ".join(filter(None, heading)))

        text, agrees = "", True
        for dtype, lines in columns.items():
            shape, relative, greatest = lines[key]
            text += f"  {relative:8.1e}  {greatest:8.1e}"
            agrees = agrees and relative <= TOLERANCE[np.dtype(dtype)]
        if not agrees:
            wrong.append(key)
        word = "OK" if agrees else "NOT OK"
        if coloured:
            word = f"\033[{32 if agrees else 31}m{word}\033[0m"
        shape = " x ".join(map(str, shape))[:shape_width].rjust(shape_width)
        print(f"    {name:12}{shape}{text}  {word}")
    return wrong


GOLDEN_TOKENS = gpt2.in_data("tiny_shakespeare_val.bin")


def has_golden_tokens():
    return os.path.exists(GOLDEN_TOKENS)


# llm.c's test: the losses of OpenAI's 124M on the first batch of the validation tokens.
GOLDEN_LOSSES = [
    5.270007, 4.059707, 3.375123, 2.800783, 2.315382,
    1.849029, 1.394656, 0.999147, 0.624080, 0.376511,
]  # fmt: skip


def overfit(model, inputs, targets, learning_rate, decay):
    """The losses before each of ten updates on one batch.

    llm.c's test decays all parameters; update() only matrices and embeddings, so the others are
    done here.
    """
    losses = []
    for step in range(1, 11):
        losses.append(model.forward(inputs, targets))
        model.backward()
        for name, view in model.params.items():
            if not gpt2.is_decayed(name):
                view *= 1 - learning_rate * decay
        model.update(learning_rate, weight_decay=decay, step=step)
    return losses


def whole_model(source):
    """(model, inputs, targets): a whole GPT-2, and 4 x 64 tokens, of the validation data if any."""
    tensors = None
    if source in gpt2.FRESH:
        L, C = gpt2.FRESH[source]
        config = gpt2.GPT2Config(num_layers=L, num_heads=C // 64, channels=C)
    else:
        config, tensors = gpt2.open_weights(gpt2.find_weights(source))
    B, T = 4, min(64, config.max_seq_len)

    params = gpt2.count(gpt2.param_shapes(config))
    acts = gpt2.count(gpt2.act_shapes(config, B, T, recompute=0))
    need, free = 4 * (10 * params + 6 * acts), gpt2.available_memory()  # the trainer and PyTorch
    if need > free:
        raise MemoryError(f"this takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")

    model = gpt2.GPT2(config, B, T, None if tensors else 1337, recompute=0)
    if tensors:
        gpt2.read_weights(model.params, tensors)
    if has_golden_tokens() and gpt2.is_gpt2s(config.vocab_size):
        tokens = gpt2.TokenFile(GOLDEN_TOKENS)[: B * T + 1].astype(np.int64)
        return model, tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T)
    return model, *random_tokens(B=B, T=T, V=config.vocab_size)


def main(argv=None):
    """Print the table of agreement. Returns the exit code: 0 only if all of it agrees."""
    parser = argparse.ArgumentParser(
        description="Compare the trainer with PyTorch, tensor by tensor. The other proofs: "
        "python -m pytest"
    )
    about = "a whole model in float32: gpt2, d12, a folder or a file (default: a small one)"
    parser.add_argument("--model", metavar="X", help=about)
    source = parser.parse_args(argv).model

    golden = []
    if source is None:
        torch.set_num_threads(1)
        columns = {dtype: measured(small_comparisons(dtype)) for dtype in ("float64", "float32")}
    else:
        torch.set_num_threads(gpt2.THREADS)
        try:
            model, *batch = whole_model(source)
            if source == "gpt2" and has_golden_tokens():
                golden = overfit(whole_model(source)[0], *batch, learning_rate=1e-4, decay=0.01)
        except (InputError, OSError, MemoryError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        reference = TorchGPT2(model.config, model.params)
        step = compared_step(model, reference, *batch)
        updates = compared_updates(model, reference, *batch, learning_rate=1e-4)
        with gpt2.Progress("comparing"):
            columns = {"float32": measured(itertools.chain(step, updates), by_layer=False)}

    python = platform.python_version()
    print(f"Python {python}, NumPy {np.__version__}, PyTorch {torch.__version__}")
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


if __name__ == "__main__":
    sys.exit(main())
