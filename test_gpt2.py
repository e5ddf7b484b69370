"""
The proofs of train_gpt2.py.

    python -m pytest                         # everything that is claimed, checked
    python test_gpt2.py --benchmark          # speed and memory beside PyTorch

The judge is a second GPT-2, the usual one: PyTorch modules whose gradients come from autograd, so nobody
derived them by hand. It takes its weights from the trainer and must then agree with it, number for number:

    layers        each forward and backward: float64 to 1e-10, float32 to 1e-5 of the float64 truth
    whole model   every tensor of the two tables in train_gpt2.py's section 3; one that nothing here
                  compares is a failure
    training      ten steps beside torch.optim.AdamW, with everything on that a real run has on
    promises      the same bits for any number of threads, no float64 in a float32 run, no memory beyond
                  the blob, micro-batches that equal the batch they came from

What PyTorch is not needed for is worked by hand (tiny cases, the answers in the text) or by differences.
Errors are relative and by norm, per tensor: |ours - truth| / |truth|. Parameters are all random, as fresh
ones would hide much: a bias of 0 or a layernorm weight of 1 that is left out changes nothing.
"""
import argparse, contextlib, hashlib, importlib.util, inspect, io, itertools, json, math, os, platform, random, re
import shlex, shutil, signal, socket, struct, subprocess, sys, tempfile, threading, time, timeit, tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import train_gpt2 as gpt2  # before numpy: it tells BLAS's threads how to wait
import numpy as np
import prepro_tinyshakespeare as prepro
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from train_gpt2 import InputError

# ---- The reference: GPT-2 in PyTorch -----------------------------------------------------------------------

class TorchBlock(nn.Module):
    def __init__(self, C, NH):
        super().__init__()
        self.NH = NH
        self.ln1, self.qkv, self.attproj = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ln2, self.fc, self.fcproj = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, residual, keep):
        qkv = keep("qkv", self.qkv(keep("ln1", self.ln1(residual))))
        atty = keep("atty", torch_attention(qkv, self.NH))
        residual = keep("residual2", residual + keep("attproj", self.attproj(atty)))
        fch = keep("fch", self.fc(keep("ln2", self.ln2(residual))))
        fch_gelu = keep("fch_gelu", F.gelu(fch, approximate="tanh"))
        return keep("residual3", residual + keep("fcproj", self.fcproj(fch_gelu)))

class TorchGPT2(nn.Module):
    """The GPT-2 of gpt2.GPT2Config config with a copy of a trainer's params, in their dtype."""

    def __init__(self, config, params):
        super().__init__()
        C, params = config.channels, {name: torch.from_numpy(view) for name, view in params.items()}
        with torch.device("meta"):  # no memory and no random numbers yet
            self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.max_seq_len, C)
            self.blocks = nn.ModuleList(TorchBlock(C, config.num_heads) for _ in range(config.num_layers))
            self.lnf = nn.LayerNorm(C)
        self.to(params["wte"].dtype).to_empty(device="cpu")
        with torch.no_grad():
            for name, values in params.items():
                own = self.named(name)
                for parameter, value in zip(own, values if len(own) > 1 else [values], strict=True):
                    parameter.copy_(value.reshape(parameter.shape))  # (1, C) to (C,) if there is one layer

    def forward(self, inputs, targets, keep=lambda name, x: x):
        """The mean cross-entropy. keep(name, tensor) is shown every intermediate, by the trainer's names."""
        residual = keep("encoded", self.wte(inputs) + self.wpe.weight[:inputs.shape[1]])
        for block in self.blocks:
            residual = block(residual, keep)
        logits = keep("logits", F.linear(keep("lnf", self.lnf(residual)), self.wte.weight))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return keep("losses", losses).mean()

    def named(self, name):
        """What the trainer keeps as params[name]: a list of parameters, one per layer or just one."""
        module, kind = (name, "") if name in ("wte", "wpe") else (name[:-1], name[-1])
        owners = [self] if hasattr(self, module) else self.blocks
        return [getattr(getattr(owner, module), {"b": "bias"}.get(kind, "weight")) for owner in owners]

def torch_heads(qkv, NH):
    """(B, T, 3C) as queries, keys and values, each (B, NH, T, hs)."""
    return [x.unflatten(-1, (NH, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)]

def torch_attention(qkv, NH):
    q, k, v = torch_heads(qkv, NH)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

def torch_lse(qkv, NH):
    """The attention's log(sum(exp)), (B, T, NH), by the full matrix: PyTorch keeps its own to itself."""
    q, k, _ = torch_heads(qkv, NH)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    att = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
    return att.logsumexp(-1).transpose(1, 2)

def torch_mean_rstd(x):
    return x.mean(-1), 1 / torch.sqrt(x.var(-1, correction=0) + 1e-5)

def torch_intermediates(reference, inputs, targets):
    """(loss, {name: [tensor of each layer]}): every activation under its name in gpt2.act_shapes. Those
    that take part in the loss have a .grad after loss.backward()."""
    kept = {}

    def keep(name, x):
        x.retain_grad()
        kept.setdefault(name, []).append(x)
        return x

    loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets), keep)
    stream = kept["encoded"] + kept["residual3"]
    for name, residuals in {"ln1": stream[:-1], "ln2": kept["residual2"], "lnf": stream[-1:]}.items():
        kept[name + "_mean"], kept[name + "_rstd"] = zip(*map(torch_mean_rstd, residuals))
    kept["att_lse"] = [torch_lse(qkv, reference.blocks[0].NH) for qkv in kept["qkv"]]
    return loss, kept

def torch_grads(reference, params):
    """{name: gradient} for every name in params, in the trainer's shapes."""
    return {name: np.stack([p.grad.numpy() for p in reference.named(name)]).reshape(view.shape)
            for name, view in params.items()}

# ---- Tools of the proofs -----------------------------------------------------------------------------------

TOLERANCE = {np.dtype("float64"): 1e-10, np.dtype("float32"): 1e-5}
BOTH_FLOATS = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])

def relative_error(ours, truth):
    assert ours.shape == truth.shape
    difference, length = np.linalg.norm(ours.astype(np.float64) - truth), np.linalg.norm(truth)
    return difference / length if length else difference

def assert_all_close(ours, truth, tolerance=None):
    """Two dicts of arrays must hold the same names and, to the tolerance of their type, the same numbers."""
    assert ours.keys() == truth.keys()
    errors = {name: relative_error(ours[name], truth[name]) for name in ours}
    wrong = {name: error for name, error in errors.items()
             if not error <= (tolerance or TOLERANCE[ours[name].dtype])}  # NaN is wrong too
    assert not wrong

def assert_same_bits(ours, theirs):
    """Two dicts of arrays must be equal, bit by bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []

def copies(views):
    return {name: view.copy() for name, view in views.items()}

def random_model(B, T, dtype=np.float64, recompute=1, V=53, L=3, NH=3, C=24, max_seq_len=None):
    """A small GPT-2, every parameter random, all else NaN: what is read must have been written before."""
    config = gpt2.GPT2Config(max_seq_len or T + 2, V, L, NH, C)
    model = gpt2.GPT2(config, B, T, seed=None, recompute=recompute, dtype=dtype)
    model.blob[...] = np.nan
    model.flat[2:] = 0
    rng = np.random.default_rng(1)
    for name, view in model.params.items():
        view[...] = 0.1 * rng.standard_normal(view.shape, np.float32) + (name in ("ln1w", "ln2w", "lnfw"))
    return model

def random_tokens(*many, B, T, V=53, seed=2):
    """inputs and targets, (2, B, T), or as many of these pairs as asked for: (*many, 2, B, T)."""
    return np.random.default_rng(seed).integers(0, V, (*many, 2, B, T))

def train_steps(model, steps, batches, learning_rate=1e-2):
    """The losses of some steps, each over all of batches (k, 2, B, T), its micro-batches."""
    losses = []
    for step in range(1, steps + 1):
        for inputs, targets in batches:
            losses.append(model.forward(inputs, targets, grad_scale=1 / len(batches)))
            model.backward()
        scale = min(1.0, 0.5 / model.grad_norm())
        model.update(learning_rate, weight_decay=0.1, step=step, grad_scale=scale)
    return losses

# ---- Memory ------------------------------------------------------------------------------------------------

def test_parameters_stand_as_in_llm_c():
    """The names and their order are those of its files, so that one can be read straight into the blob; the
    counts are those of OpenAI's four models."""
    assert list(gpt2.param_shapes(gpt2.GPT2Config())) == [
        "wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
        "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb"]
    assert [gpt2.size(gpt2.param_shapes(gpt2.GPT2Config(num_layers=L, num_heads=NH, channels=C)))
            for L, NH, C in [(12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)]
            ] == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]

@pytest.mark.parametrize("recompute", [0, 1, 2, 3, 4])
def test_views_lie_in_the_blob_side_by_side(recompute):
    """In the tables' order, without holes, from the start of a cache line to the end of the blob."""
    model = gpt2.GPT2(gpt2.GPT2Config(12, 53, 3, 3, 24), 2, 9, recompute=recompute)
    address = model.blob.ctypes.data
    assert address % 64 == 0
    for views in (model.params, model.grads, model.m, model.v, model.acts):
        for name, view in views.items():
            assert view.flags.c_contiguous and view.ctypes.data == address, name
            address += view.nbytes
    assert address == model.blob.ctypes.data + model.blob.nbytes

# ---- Layers: each against PyTorch, and against differences -------------------------------------------------
#
# A layer is run here by a function (dout, NH, **inputs) -> {"out": ..., "dinp": ..., ...}: its outputs and
# the gradient of sum(out * dout) with respect to each input, "d" before the input's name. Beside it stands
# what PyTorch makes of the inputs, outputs only. Integers are called tokens or targets.

def blank(*shape, like):
    return np.full(shape, np.nan, like.dtype)

def our_encoder(dout, NH, tokens, wte, wpe):
    out, dwte, dwpe = blank(*dout.shape, like=wte), np.ones_like(wte), blank(*wpe.shape, like=wpe)
    gpt2.encoder_forward(out, tokens, wte, wpe[:tokens.shape[1]])
    gpt2.encoder_backward(dwte, dwpe, dout, tokens, add=False)
    return {"out": out, "dwte": dwte - 1, "dwpe": dwpe}  # dwte is added to what the classifier wrote

def torch_encoder(NH, tokens, wte, wpe):
    return {"out": F.embedding(tokens, wte) + wpe[:tokens.shape[1]]}

def our_layernorm(dout, NH, inp, weight, bias):
    out, (mean, rstd) = blank(*inp.shape, like=inp), blank(2, *inp.shape[:-1], like=inp)
    gpt2.layernorm_forward(out, mean, rstd, inp, weight, bias)
    dinp = np.ones_like(inp)
    dweight, dbias = gpt2.layernorm_backward(dinp, dout, inp, mean, rstd, weight)
    return {"out": out, "mean": mean, "rstd": rstd,
            "dinp": dinp - 1, "dweight": dweight, "dbias": dbias}  # dinp is added to the residual stream's

def torch_layernorm(NH, inp, weight, bias):
    mean, rstd = torch_mean_rstd(inp)
    return {"out": F.layer_norm(inp, weight.shape, weight, bias), "mean": mean, "rstd": rstd}

def our_matmul(dout, NH, inp, weight, bias=None):
    out, dinp, dweight = (blank(*x.shape, like=inp) for x in (dout, inp, weight))
    dbias = None if bias is None else blank(*bias.shape, like=inp)
    gpt2.matmul_forward(out, inp, weight, bias)
    gpt2.matmul_backward(dinp, dweight, dbias, dout, inp, weight, add=False)
    return {"out": out, "dinp": dinp, "dweight": dweight} | ({} if bias is None else {"dbias": dbias})

def torch_matmul(NH, inp, weight, bias=None):
    return {"out": F.linear(inp, weight, bias)}

def our_attention(dout, NH, qkv):
    out, lse, dqkv = (blank(*qkv.shape[:2], n, like=qkv) for n in (dout.shape[-1], NH, qkv.shape[-1]))
    gpt2.attention_forward(out, lse, qkv, NH)
    gpt2.attention_backward(dqkv, dout, out, lse, qkv, NH)
    return {"out": out, "lse": lse, "dqkv": dqkv}

def torch_attention_and_lse(NH, qkv):
    return {"out": torch_attention(qkv, NH), "lse": torch_lse(qkv, NH)}

def our_gelu(dout, NH, inp):
    out, dinp = blank(*inp.shape, like=inp), dout.copy()
    gpt2.gelu_forward(out, inp)
    gpt2.gelu_backward(dinp, inp)
    return {"out": out, "dinp": dinp}

def torch_gelu(NH, inp):
    return {"out": F.gelu(inp, approximate="tanh")}

def our_residual(dout, NH, inp1, inp2):
    out = blank(*dout.shape, like=inp1)
    gpt2.residual_forward(out, inp1, inp2)
    return {"out": out, "dinp1": dout, "dinp2": dout}

def torch_residual(NH, inp1, inp2):
    return {"out": inp1 + inp2}

def our_crossentropy(dout, NH, logits, targets):
    losses, probs = blank(*targets.shape, like=logits), logits.copy()
    gpt2.crossentropy_softmax_forward(losses, probs, targets)
    dlogits = probs.copy()
    gpt2.crossentropy_softmax_backward(dlogits, targets, float(dout[0, 0]))  # all of dout is one number
    return {"out": losses, "probs": probs, "dlogits": dlogits}

def torch_crossentropy(NH, logits, targets):
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return {"out": losses.view(targets.shape), "probs": logits.softmax(-1)}

LAYERS = {  # name: ours, PyTorch's, and the shapes of the inputs
    "encoder": (our_encoder, torch_encoder,
                lambda B, T, C, NH, V: {"tokens": (B, T), "wte": (V, C), "wpe": (T + 3, C)}),
    "layernorm": (our_layernorm, torch_layernorm,
                  lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (C,), "bias": (C,)}),
    "matmul": (our_matmul, torch_matmul,
               lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (3 * C, C), "bias": (3 * C,)}),
    "matmul without bias": (our_matmul, torch_matmul,
                            lambda B, T, C, NH, V: {"inp": (B, T, C), "weight": (V, C)}),
    "attention": (our_attention, torch_attention_and_lse,
                  lambda B, T, C, NH, V: {"qkv": (B, T, 3 * C)}),
    "gelu": (our_gelu, torch_gelu,
             lambda B, T, C, NH, V: {"inp": (B, T, 4 * C)}),
    "residual": (our_residual, torch_residual,
                 lambda B, T, C, NH, V: {"inp1": (B, T, C), "inp2": (B, T, C)}),
    "crossentropy_softmax": (our_crossentropy, torch_crossentropy,
                             lambda B, T, C, NH, V: {"logits": (B, T, V), "targets": (B, T)}),
}
SHAPES = [  # B, T, C, NH, V
    (2, 7, 12, 3, 31),
    (1, 1, 5, 1, 2),      # one position: there is nothing to attend to but itself
    (3, 1, 8, 8, 257),    # heads of one channel
    (2, 129, 16, 4, 50),  # attention's blocks have 128 positions: the second has one
    (1, 300, 10, 5, 33),  # three of them
    (4, 64, 48, 2, 997),
]
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
BLOCK_SIZES = pytest.mark.parametrize("block_bytes", [gpt2.BLOCK_BYTES, 4096], ids=["large", "small"])

def layer_inputs(name, shape, dtype):
    """(inputs, dout) of a layer, random, and such that float32 holds them exactly."""
    rng, (B, T, C, NH, V) = np.random.default_rng(3), shape
    inputs = {key: rng.integers(0, V, dims) if key in ("tokens", "targets")
              else (2 * rng.standard_normal(dims, np.float32) + (key == "weight")).astype(dtype)
              for key, dims in LAYERS[name][2](*shape).items()}
    out = LAYERS[name][1](NH, **{key: torch.from_numpy(x) for key, x in inputs.items()})["out"]
    dout = rng.standard_normal(out.shape, np.float32).astype(dtype)
    return inputs, np.full_like(dout, 0.37) if name == "crossentropy_softmax" else dout

def layer_truth(name, shape, inputs, dout):
    """What LAYERS[name] should return, by PyTorch in float64."""
    leaves = {key: torch.from_numpy(x) if x.dtype.kind == "i" else torch.tensor(x, dtype=torch.float64)
              for key, x in inputs.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.is_floating_point())
    outs = LAYERS[name][1](shape[3], **leaves)
    outs["out"].backward(torch.from_numpy(dout).double())
    grads = {"d" + key: leaf.grad for key, leaf in leaves.items() if leaf.requires_grad}
    return {key: x.detach().numpy() for key, x in (outs | grads).items()}

def test_no_layer_escapes():
    assert {name.rpartition("_")[0] for name in vars(gpt2) if name.endswith(("_forward", "_backward"))} == \
           {name.partition(" ")[0] for name in LAYERS}

@BOTH_FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EVERY_LAYER
@BLOCK_SIZES
def test_layer_equals_pytorch(name, shape, dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", block_bytes)
    inputs, dout = layer_inputs(name, shape, dtype)
    given = copies(inputs | {"dout": dout})
    ours = LAYERS[name][0](NH=shape[3], **given)
    assert_all_close(ours, layer_truth(name, shape, inputs, dout))
    assert_same_bits(given, inputs | {"dout": dout})  # no layer writes into what it reads

@EVERY_LAYER
def test_layer_gradient_equals_differences(name):
    """(f(x + h) - f(x - h)) / 2 with f = sum(out * dout), for a few random small h: dx . h, no PyTorch."""
    shape = (2, 5, 6, 2, 11)
    layer, (inputs, dout) = LAYERS[name][0], layer_inputs(name, shape, np.float64)
    rng = np.random.default_rng(4)

    def f(step):
        moved = {key: x + step * h[key] if key in h else x for key, x in inputs.items()}
        return np.sum(layer(dout, shape[3], **moved)["out"] * dout)

    gradient = layer(dout, shape[3], **inputs)
    differentiable = [key for key, x in inputs.items() if x.dtype.kind == "f"]
    assert differentiable
    for only in differentiable:
        for _ in range(3):
            h = {only: rng.standard_normal(inputs[only].shape)}
            expected = np.sum(gradient["d" + only] * h[only])
            assert (f(1e-5) - f(-1e-5)) / 2e-5 == pytest.approx(expected, rel=1e-6)

@BOTH_FLOATS
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 512, 1, 2)], ids=str)
@BLOCK_SIZES
def test_gradients_of_parameters_are_added_to(shape, dtype, block_bytes, monkeypatch):
    """With add=True a backward pass adds to the parameters' gradients and writes the activations' anew."""
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", block_bytes)
    B, T, C, NH, V = shape
    inputs, dout = layer_inputs("matmul", shape, dtype)
    truth = layer_truth("matmul", shape, inputs, dout)
    dinp, dweight, dbias = (np.ones(truth[key].shape, dtype) for key in ("dinp", "dweight", "dbias"))
    gpt2.matmul_backward(dinp, dweight, dbias, dout, inputs["inp"], inputs["weight"], add=True)
    assert_all_close({"dinp": dinp, "dweight": dweight, "dbias": dbias},
                     {"dinp": truth["dinp"], "dweight": 1 + truth["dweight"], "dbias": 1 + truth["dbias"]})

    inputs, dout = layer_inputs("encoder", shape, dtype)
    truth = layer_truth("encoder", shape, inputs, dout)
    dwte, dwpe = np.ones((V, C), dtype), np.ones((T + 3, C), dtype)
    gpt2.encoder_backward(dwte, dwpe, dout, inputs["tokens"], add=True)
    assert_all_close({"dwte": dwte, "dwpe": dwpe}, {"dwte": 1 + truth["dwte"], "dwpe": 1 + truth["dwpe"]})

@BOTH_FLOATS
@pytest.mark.parametrize("n", [1, 2, 130, 299])
def test_attention_of_the_last_positions(n, dtype):
    """In generation only the last n of T positions are asked for: the same as the last n of all."""
    shape = B, T, C, NH, V = 2, 300, 12, 3, 2
    inputs, dout = layer_inputs("attention", shape, dtype)
    truth = layer_truth("attention", shape, inputs, dout)
    out, lse = blank(B, n, C, like=dout), blank(B, n, NH, like=dout)
    gpt2.attention_forward(out, lse, inputs["qkv"], NH)
    assert_all_close({"out": out, "lse": lse}, {name: truth[name][:, T - n:] for name in ("out", "lse")})

# ---- Layers: tiny cases, worked by hand --------------------------------------------------------------------

def test_layernorm_by_hand(monkeypatch):
    """[1, 1, 3, 3] has mean 2 and variance 1: norm is [-1, -1, 1, 1]. For dout [1, 0, 0, 0] and weight 1,
    average(dnorm) = 1/4 and average(dnorm * norm) = -1/4, so dinp = dout - 1/4 + norm / 4."""
    monkeypatch.setattr(gpt2, "LN_EPS", 0.0)
    inp, dout = np.array([[[1.0, 1, 3, 3]]]), np.array([[[1.0, 0, 0, 0]]])
    got = our_layernorm(dout, None, inp, weight=np.ones(4), bias=np.zeros(4))
    expected = {"out": [-1, -1, 1, 1], "mean": 2, "rstd": 1, "dinp": [0.5, -0.5, 0, 0],
                "dweight": [-1, 0, 0, 0], "dbias": [1, 0, 0, 0]}
    assert {name: x.squeeze().tolist() for name, x in got.items()} == expected

def test_layernorm_of_equal_channels_is_its_bias():
    """The variance is 0, and eps = 1e-5 keeps the division finite: rstd = 1 / sqrt(1e-5)."""
    got = our_layernorm(np.ones((1, 1, 4)), None, np.full((1, 1, 4), 7.0), np.ones(4), np.arange(4.0))
    assert got["out"].tolist() == [[[0, 1, 2, 3]]]
    assert got["rstd"].item() == pytest.approx(100 * math.sqrt(10), rel=1e-15)

@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_softmax_crossentropy_by_hand(shift):
    """Logits [0, ln 3] have probabilities [1/4, 3/4], whatever is added to both. Target 0 costs ln 4; half
    of its gradient is [-3/8, 3/8]. Target 1 costs ln 4/3."""
    logits = np.array([[[0, math.log(3)]] * 2]) + shift
    got = our_crossentropy(np.full((1, 2), 0.5), None, logits, np.array([[0, 1]]))
    np.testing.assert_allclose(got["probs"], [[[0.25, 0.75]] * 2], rtol=1e-12)
    np.testing.assert_allclose(got["out"], [[math.log(4), math.log(4 / 3)]], rtol=1e-12)
    np.testing.assert_allclose(got["dlogits"], [[[-0.375, 0.375], [0.125, -0.125]]], rtol=1e-12)

def test_attention_by_hand():
    """Queries of 0 like all keys alike: position t gets the average of the values 0 to t, and its log of
    the sum is ln(t + 1). A last key and value of 1e30 must not reach the positions before it."""
    qkv = np.zeros((1, 4, 3))
    qkv[0, :, 2] = 6, 2, 1, 1e30
    qkv[0, 3, 1] = 1e30
    got = our_attention(np.ones((1, 4, 1)), 1, qkv)
    np.testing.assert_allclose(got["out"].ravel(), [6, 4, 3, 2.5e29], rtol=1e-12)
    np.testing.assert_allclose(got["lse"].ravel(), np.log([1, 2, 3, 4]), atol=1e-15)

def test_gelu_by_hand():
    """0 stays 0, far to the right nothing changes, far to the left nothing passes; the slopes: 1/2, 1, 0."""
    got = our_gelu(np.ones((1, 1, 3)), None, np.array([[[0.0, 20.0, -20.0]]]))
    assert got["out"].ravel().tolist() == [0, 20, 0]
    assert got["dinp"].ravel().tolist() == [0.5, 1, 0]

# ---- Rows and threads --------------------------------------------------------------------------------------

def test_by_rows_cuts_blocks_and_adds_their_sums_in_order(monkeypatch):
    """21 rows of 5 float32 are 20 bytes each. Blocks of 100 bytes: 5, 5, 5, 5, 1. A row wider than a block
    is a block of its own."""
    def body(a, b, whole):
        blocks.append((len(a), b.shape, whole))
        return a.sum(axis=0), b.sum(axis=0)

    a, b = np.arange(105, dtype=np.float32).reshape(3, 7, 5), np.arange(21, dtype=np.float32).reshape(3, 7)
    for block_bytes, sizes in {100: [5, 5, 5, 5, 1], 399: [19, 2], 420: [21], 7: [1] * 21}.items():
        monkeypatch.setattr(gpt2, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(gpt2, "ROW_THREADS", 1)
        blocks = []
        sums = gpt2.by_rows(2)(body)(a, b, "whole")
        assert blocks == [(n, (n,), "whole") for n in sizes]
        assert sums[0].tolist() == a.sum(axis=(0, 1)).tolist() and sums[1] == b.sum()

@BOTH_FLOATS
@pytest.mark.parametrize("name", ["layernorm", "gelu", "crossentropy_softmax"])
def test_blocks_equal_the_plain_body(name, dtype, monkeypatch):
    """The undecorated body on all rows at once is the reference: what is computed for a row has the same
    bits in a block, and the sums over the rows (of layernorm's parameters) differ by rounding only."""
    shape = 2, 129, 16, 4, 50
    inputs, dout = layer_inputs(name, shape, dtype)
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    blocked = LAYERS[name][0](dout, shape[3], **inputs)
    for function in (name + "_forward", name + "_backward"):
        def plain(*args, body=getattr(gpt2, function).__wrapped__):
            return body(*(a.reshape(-1, *a.shape[2:]) if np.shape(a)[:2] == shape[:2] else a for a in args))
        monkeypatch.setattr(gpt2, function, plain)
    whole = LAYERS[name][0](dout, shape[3], **inputs)
    assert_all_close({key: blocked.pop(key) for key in ("dweight", "dbias") if key in blocked},
                     {key: whole.pop(key) for key in ("dweight", "dbias") if key in whole})
    assert_same_bits(blocked, whole)

def test_parallel_runs_side_by_side_in_order_with_one_blas_thread(monkeypatch):
    calls, barrier = [], threading.Barrier(3)
    monkeypatch.setattr(gpt2, "ROW_THREADS", 3)
    monkeypatch.setattr(gpt2, "set_blas_threads", calls.append)

    def task(i):
        barrier.wait(timeout=30)  # which only three threads at once can pass
        calls.append("task")
        return i * i

    assert gpt2.parallel(task, 6) == [0, 1, 4, 9, 16, 25]
    assert calls == [1] + ["task"] * 6 + [gpt2.BLAS_THREADS]

@pytest.mark.parametrize("bad", range(4))
def test_parallel_passes_an_error_on(bad, monkeypatch):
    """Whichever thread has met it."""
    barrier = threading.Barrier(4)
    monkeypatch.setattr(gpt2, "ROW_THREADS", 4)

    def task(i):
        barrier.wait(timeout=30)  # one task per thread
        return 1 / (i - bad)

    with pytest.raises(ZeroDivisionError):
        gpt2.parallel(task, 4)

def test_blas_really_has_a_setter():
    """Without it two kinds of threads would run on top of each other, and no result would show it."""
    if np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"] != "scipy-openblas":
        pytest.skip("this NumPy has another BLAS; one with OpenBLAS: pip install --force-reinstall numpy")
    assert gpt2.set_blas_threads.__name__ == "scipy_openblas_set_num_threads64_"

# ---- The whole model: every tensor of the two tables -------------------------------------------------------

def torch_run(model, inputs, targets, grad_scale=1.0):
    """(loss, {name: array}, {name: gradient}): what the tensors of a trainer should hold after forward and
    backward, by PyTorch in float64. The names and shapes are those of act_shapes; added are probs, dlogits
    and dlnf, which lie in logits and dln for a while."""
    B, T = inputs.shape
    reference = TorchGPT2(model.config, model.params).double()
    loss, kept = torch_intermediates(reference, inputs, targets)
    (loss * grad_scale).backward()
    kept["probs"] = [kept["logits"][0].softmax(-1)]
    kept["dlogits"], kept["dlnf"], kept["dresidual"], kept["dln"] = (
        [kept[name][0].grad] for name in ("logits", "lnf", "encoded", "ln1"))
    # of the last layer that backward works on, layer 0: dqkv has overwritten the first 3/4 of dfch
    dqkv, dfch = kept["qkv"][0].grad.flatten(), kept["fch"][0].grad.flatten()
    kept["dfch"] = [torch.cat([dqkv, dfch[dqkv.numel():]])]
    shapes = gpt2.act_shapes(model.config, B, T, recompute=0)
    shapes |= {name: (B, T, model.config.vocab_size) for name in ("logits", "probs", "dlogits")}
    acts = {name: np.stack([x.detach().numpy() for x in layers]).reshape(shapes.get(name, (B, T, -1)))
            for name, layers in kept.items()}
    return loss.item(), acts, torch_grads(reference, model.params)

def trainer_run(model, inputs, targets, monkeypatch, grad_scale=1.0):
    """The same by the trainer, each tensor copied while it is there to be seen, the logits and what becomes
    of them piece by piece on their way through the classifier. Also returns the number of pieces."""
    pieces = {"logits": [], "probs": [], "dlogits": []}
    forward, backward = gpt2.crossentropy_softmax_forward, gpt2.crossentropy_softmax_backward

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
        loss = model.forward(inputs, targets, grad_scale=grad_scale)
    after_forward = copies(model.acts)
    last = pieces["dlogits"][-1]
    assert np.array_equal(model.acts["logits"][:, :last.shape[1]], last)  # a training forward leaves dlogits
    model.backward()
    work_space = ("dresidual", "dln", "dfch", "logits")
    acts = after_forward | {name: model.acts[name].copy() for name in work_space[:3]}
    acts |= {name: np.concatenate(parts, axis=1).reshape(*inputs.shape, -1) for name, parts in pieces.items()}
    kept = model.acts.keys() - set(work_space)
    assert_same_bits({name: model.acts[name] for name in kept}, {name: after_forward[name] for name in kept})
    return loss, acts | {"dlnf": after_forward["dln"]}, copies(model.grads), len(pieces["logits"])

@BOTH_FLOATS
@pytest.mark.parametrize("B, T, logits_rows, pieces, sizes", [
    (2, 8, 256, 1, {}),
    (2, 8, 5, 4, {}),                                   # logits in pieces of 5, 5, 5 and 1
    (3, 1, 256, 1, {"V": 2, "L": 1, "NH": 1, "C": 5}),  # the least there is
    (1, 131, 50, 3, {"V": 101, "L": 2, "NH": 4, "C": 20, "max_seq_len": 131}),
], ids=["one_piece", "pieces", "least", "long"])
def test_every_tensor_equals_pytorch(B, T, logits_rows, pieces, sizes, dtype, monkeypatch):
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    model = random_model(B, T, dtype, recompute=0, **sizes)
    model.rooms = tuple(room[:, :logits_rows] for room in model.rooms)
    inputs, targets = random_tokens(B=B, T=T, V=model.config.vocab_size)
    loss, acts, grads, n = trainer_run(model, inputs, targets, monkeypatch, grad_scale=0.75)
    true_loss, true_acts, true_grads = torch_run(model, inputs, targets, grad_scale=0.75)
    assert n == pieces
    assert loss == pytest.approx(true_loss, rel=TOLERANCE[np.dtype(dtype)])
    assert acts.keys() >= model.acts.keys() and grads.keys() == model.params.keys()  # no tensor is left out
    assert_all_close(acts, true_acts)
    assert_all_close(grads, true_grads)

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reference_takes_every_parameter_in_its_type(dtype):
    """The judge, judged: one that forgot a parameter would hide the same slip in the trainer."""
    model = random_model(2, 5, np.float64 if dtype is torch.float64 else np.float32)
    reference = TorchGPT2(model.config, model.params)
    assert {p.dtype for p in reference.parameters()} == {dtype}
    own = [p for name in model.params for p in reference.named(name)]
    assert {id(p) for p in own} == {id(p) for p in reference.parameters()} and len(own) == len(set(own))
    for name, view in model.params.items():
        assert np.array_equal(np.stack([p.detach() for p in reference.named(name)]).reshape(view.shape), view)

def test_recompute_changes_no_bit(monkeypatch):
    """recompute buys memory with time: 1, 2, 3 store less; losses, gradients and weights are the same."""
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    batches = random_tokens(1, B=2, T=9)
    models = [random_model(2, 9, np.float32, recompute) for recompute in (0, 1, 2, 3)]
    losses = [train_steps(model, 3, batches) for model in models]
    for before, model in zip(models, models[1:]):
        assert before.acts.keys() == model.acts.keys() and before.blob.size > model.blob.size
        assert before.flat.tobytes() == model.flat.tobytes()
    assert losses == losses[:1] * 4

def test_whole_layers_are_computed_again_but_for_the_last(monkeypatch):
    """With recompute = 3 all layers share their activations; after forward those of the last are still there."""
    model, calls = random_model(2, 9, recompute=3), []
    forward_layer = gpt2.GPT2.forward_layer
    monkeypatch.setattr(gpt2.GPT2, "forward_layer", lambda self, l, *args: calls.append(l) or forward_layer(self, l, *args))
    model.forward(*random_tokens(B=2, T=9))
    model.backward()
    assert calls == [0, 1, 2, 1, 0]
    assert {name for name, view in model.acts.items() if len(view) == 3} == {"residual3"}

def in_gradients_but_wte(model, view):
    spare = model.flat[1, model.params["wte"].size:]
    return np.shares_memory(view, spare) and spare.ctypes.data <= view.ctypes.data \
        and view.ctypes.data + view.nbytes <= spare.ctypes.data + spare.nbytes

@pytest.mark.parametrize("train", [True, False])
def test_logits_take_the_gradients_memory_until_there_are_gradients(train):
    """The largest array of all costs nothing; a step's later micro-batches find gradients there."""
    model, batches = random_model(2, 9, np.float32), random_tokens(2, B=2, T=9)
    model.forward(*batches[0], train=train)
    assert in_gradients_but_wte(model, model.acts["logits"]) and model.acts["logits"].shape == (1, 18, 53)
    model.zero_grad()
    step_gradients(model, *batches)
    assert not np.shares_memory(model.acts["logits"], model.flat)
    model.forward(*batches[0])
    assert not np.shares_memory(model.acts["logits"], model.flat)
    model.backward()
    model.update(0.0)
    model.forward(*batches[0])
    assert in_gradients_but_wte(model, model.acts["logits"])

def test_logits_take_the_larger_room():
    """Of a wide vocabulary, the gradients of a small model hold few rows, or none."""
    for C, rows in ((1, 0), (24, 4)):
        model = random_model(2, 9, V=5000, C=C, NH=1)
        inputs, targets = random_tokens(B=2, T=9, V=5000)
        model.forward(inputs, targets)
        assert model.rooms[0].shape == (1, rows, 5000) and model.acts["logits"].shape == (1, 18, 5000)
        assert not np.shares_memory(model.acts["logits"], model.flat)

def test_generation_must_not_come_between_a_later_forward_and_its_backward():
    """Like validation, whose test says why; and before, it makes the forward pass forgotten."""
    model, batch = random_model(2, 9, np.float32), random_tokens(B=2, T=9)
    model.forward(*batch)
    list(model.generate([1], 1))
    with pytest.raises(gpt2.InputError, match="forward"):
        model.backward()
    before = step_gradients(model, batch)
    model.forward(*batch)
    for intruder in (lambda: list(model.generate([1], 1)), lambda: model.forward_rows(batch[0])):
        with pytest.raises(gpt2.InputError, match="backward"):
            intruder()
    model.backward()  # nothing has been lost
    assert_all_close(model.grads, {name: 2 * grad for name, grad in before.items()})

def test_update_needs_gradients():
    """What lies in their place otherwise is logits."""
    model, batch = random_model(2, 9, np.float32), random_tokens(B=2, T=9)
    before = copies(model.params)
    for prepare in (lambda: None, lambda: model.forward(*batch), model.zero_grad):
        prepare()
        with pytest.raises(gpt2.InputError, match="backward"):
            model.update(0.1)
    step_gradients(model, batch)
    model.update(0.0)
    with pytest.raises(gpt2.InputError, match="backward"):
        model.update(0.1)
    assert_same_bits(model.params, before)

def test_generation_between_micro_batches_changes_no_gradient():
    model, batch = random_model(2, 9, np.float32), random_tokens(B=2, T=9)
    before = step_gradients(model, batch)
    list(model.generate([1, 2, 3], 12))
    assert_same_bits(model.grads, before)

@pytest.mark.parametrize("parts", [[9], [4, 1, 1, 3], [1] * 9], ids=str)
def test_forward_rows_piece_by_piece_equals_the_whole(parts):
    """Generation computes only the new positions: earlier ones have left their keys and values in qkv."""
    model, tokens = random_model(2, 9), random_tokens(B=2, T=9)[0]
    whole = model.forward_rows(tokens)[:1].copy()
    model.acts["encoded"][...] = model.acts["lnf"][...] = np.nan
    model.acts["qkv"][...] = np.nan
    ends = np.cumsum(parts)
    for first, end in zip(ends - parts, ends):
        lnf = model.forward_rows(tokens[:1, first:end], first)
        assert relative_error(lnf, whole[:, first:end]) < 1e-13

def test_uniform_logits_cost_ln_of_the_vocabulary():
    """Weights of zero give every token the probability 1/V: the loss of a model that knows nothing."""
    model = gpt2.GPT2(gpt2.GPT2Config(8, 53, 2, 2, 8), 2, 8, seed=None)
    assert not model.blob.any()
    assert model.forward(*random_tokens(B=2, T=8), train=False) == pytest.approx(math.log(53), rel=1e-6)

# ---- Training: ten steps beside PyTorch's AdamW ------------------------------------------------------------

def scheduled_rate(step):
    """Three steps of warm-up to 1e-2, then half a cosine down to a tenth of it at step 10."""
    return 1e-2 * (step / 3 if step <= 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / 7)))

@pytest.mark.parametrize("beta1, beta2, eps", [(0.9, 0.999, 1e-8), (0.8, 0.95, 1e-3)])
def test_ten_steps_equal_pytorch_adamw(beta1, beta2, eps, monkeypatch):
    """With warm-up, cosine, weight decay, clipping and two micro-batches, as in a real run."""
    monkeypatch.setattr(gpt2, "ADAMW_CHUNK", 1000)  # so that most tensors are many chunks
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    clip, decay = 0.5, 0.1
    model, batches = random_model(2, 9, recompute=2), random_tokens(10, 2, B=2, T=9)
    reference = TorchGPT2(model.config, model.params)
    matrices = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}  # no biases, no layernorms
    groups = [{"params": reference.named(name), "weight_decay": decay if name in matrices else 0.0}
              for name in model.params]
    optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps)
    for step, micro_batches in enumerate(batches, start=1):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step)
        for inputs, targets in micro_batches:
            true_loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets))
            (true_loss / 2).backward()
            loss = model.forward(inputs, targets, grad_scale=1 / 2)
            model.backward()
            assert loss == pytest.approx(true_loss.item(), rel=1e-9)
        true_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip).item()
        norm = model.grad_norm()
        assert norm == pytest.approx(true_norm, rel=1e-9) and norm > 1.2 * clip  # it bites
        optimizer.step()
        model.update(scheduled_rate(step), beta1, beta2, eps, decay, step, grad_scale=clip / (norm + 1e-6))
    truth = {name: np.stack([p.detach().numpy() for p in reference.named(name)]).reshape(view.shape)
             for name, view in model.params.items()}
    assert_all_close(model.params, truth, 1e-9)

def test_adamw_by_hand():
    """The very first step: m = (1 - beta1) g and v = (1 - beta2) g^2, corrected to g and g^2, so whatever
    the gradient's size, a parameter moves by the learning rate against its sign, after its decay."""
    p, g, m, v = np.array([[1.0, 1.0, 1.0, 0.0], [5.0, -3e-4, 0.0, 1.0], [0] * 4, [0] * 4])
    gpt2.adamw(p, g, m, v, decay=0.25, learning_rate=0.1, beta1=0.9, beta2=0.999, eps=1e-16, step=1,
               grad_scale=2)
    np.testing.assert_allclose(p, [0.65, 0.85, 0.75, -0.1], rtol=1e-11)
    np.testing.assert_allclose(m, 0.1 * 2 * np.array([5, -3e-4, 0, 1]), rtol=1e-12)
    np.testing.assert_allclose(v, 0.001 * 4 * np.array([25, 9e-8, 0, 1]), rtol=1e-12)

# ---- Promises: micro-batches, threads, float32, memory -----------------------------------------------------

@BOTH_FLOATS
def test_micro_batches_equal_the_batch_they_came_from(dtype):
    k, b, T = 3, 2, 9
    inputs, targets = random_tokens(B=k * b, T=T)
    large, small = random_model(k * b, T, dtype), random_model(b, T, dtype)
    loss = large.forward(inputs, targets)
    large.backward()
    losses = []
    for i in range(0, k * b, b):
        losses.append(small.forward(inputs[i:i + b], targets[i:i + b], grad_scale=1 / k))
        small.backward()
    assert np.mean(losses) == pytest.approx(loss, rel=TOLERANCE[np.dtype(dtype)])
    assert_all_close(small.grads, large.grads)

def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    """Three steps of two micro-batches: losses, activations, gradients, moments and parameters."""
    monkeypatch.setattr(gpt2, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(gpt2, "ADAMW_CHUNK", 1000)
    batches = random_tokens(2, B=2, T=33)
    runs = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(gpt2, "ROW_THREADS", threads)
        model = random_model(2, 33, np.float32)
        runs.append((train_steps(model, 3, batches), model.blob.tobytes()))
    assert runs[0] == runs[1] == runs[2]
    assert np.isfinite(model.flat).all()

class Traced(np.ndarray):
    """An array that watches what is done with it: every operand and result, named or not, passes here."""
    float64, callers = [], set()

    @classmethod
    def watch(cls, what, *values):
        frame, lines = sys._getframe(2), []
        while frame:  # up through NumPy's own Python to the trainer
            if frame.f_globals is vars(gpt2):
                lines.append(f"line {frame.f_lineno} of {frame.f_code.co_name}")
                cls.callers.add(frame.f_code.co_name)
            frame = frame.f_back
        if any(isinstance(x, (np.ndarray, np.generic)) and x.dtype == np.float64 for x in values):
            cls.float64.append(f"{what} in {lines[0]}")

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        plain = [x.view(np.ndarray) if isinstance(x, Traced) else x for x in (*inputs, *out)]
        if out:
            kwargs["out"] = tuple(plain[len(inputs):])
        result = getattr(ufunc, method)(*plain[:len(inputs)], **kwargs)
        Traced.watch(ufunc.__name__, result, *plain)
        return out[0] if out else result.view(Traced) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function, types, args, kwargs):
        result = super().__array_function__(function, types, args, kwargs)
        Traced.watch(function.__name__, *(result if isinstance(result, list) else [result]), *args)
        return result.view(Traced) if type(result) is np.ndarray else result

@pytest.mark.parametrize("constant, value", [
    (None, None),
    ("GELU_SCALE", np.float64(gpt2.GELU_SCALE)),  # and these show that the trace would have seen one
    ("GELU_CUBE", np.full(96, gpt2.GELU_CUBE)),
    ("LN_EPS", np.float64(gpt2.LN_EPS)),
    ("FUTURE", gpt2.FUTURE.astype(np.float64)),
], ids=["as_it_is", "GELU_SCALE", "GELU_CUBE", "LN_EPS", "FUTURE"])
def test_no_float64_in_a_float32_run(constant, value, monkeypatch):
    """One np.float64, and NumPy computes in float64 from there on, at half the speed; nobody would notice."""
    model = random_model(2, 9, np.float32, recompute=2)
    for views in (model.params, model.grads, model.m, model.v, model.acts):
        assert {name: view.dtype for name, view in views.items() if view.dtype != np.float32} == {}
        views.update({name: view.view(Traced) for name, view in views.items()})
    model.flat, model.rooms = model.flat.view(Traced), [room.view(Traced) for room in model.rooms]
    monkeypatch.setattr(Traced, "float64", [])
    monkeypatch.setattr(Traced, "callers", set())
    monkeypatch.setattr(gpt2, "ROW_THREADS", 1)  # all in this thread, whose stack tells who called
    monkeypatch.setattr(np, "ascontiguousarray", lambda a: a.copy())  # which, unlike NumPy's, stays Traced
    if constant:
        monkeypatch.setattr(gpt2, constant, value)
    train_steps(model, 2, random_tokens(2, B=2, T=9))
    model.forward_rows(np.array([[1, 2]]), first=3)
    assert bool(Traced.float64) == bool(constant), Traced.float64
    layers = {name for name in vars(gpt2) if name.endswith(("_forward", "_backward"))}
    assert layers | {"adamw", "grad_norm"} <= Traced.callers

def test_a_training_step_allocates_nothing_that_grows(monkeypatch):
    """What a step allocates beyond the blob is blocks that fit a cache: below 8 MB at its peak, where a
    single (B, T, C) has 8.4 MB, and all activations 250 MB."""
    monkeypatch.setattr(gpt2, "ROW_THREADS", 2)  # each has blocks of its own
    B, T = 32, 256
    model = gpt2.GPT2(gpt2.GPT2Config(T, 512, 2, 4, 256), B, T)
    assert sum(view.nbytes for view in model.acts.values()) > 250e6 and model.acts["dln"].nbytes > 8.3e6
    batches = random_tokens(2, B=B, T=T, V=512)
    train_steps(model, 1, batches)
    tracemalloc.start()
    try:
        train_steps(model, 1, batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6

# ---- Fresh weights, and the protocol of forward and backward -----------------------------------------------

def test_fresh_weights_are_gpt2s():
    """Normal with standard deviation 0.02, the projections into the residual stream 0.02 / sqrt(2L); every
    estimate within five of its own standard errors."""
    L = 4
    model = gpt2.GPT2(gpt2.GPT2Config(128, 500, L, 4, 64), 1, 1, seed=8)
    expected = {"wte": 0.02, "wpe": 0.02, "qkvw": 0.02, "fcw": 0.02,
                "attprojw": 0.02 / math.sqrt(2 * L), "fcprojw": 0.02 / math.sqrt(2 * L)}
    for name, view in model.params.items():
        if name not in expected:
            assert np.all(view == (1 if name in ("ln1w", "ln2w", "lnfw") else 0)), name
            continue
        z, n = view.astype(np.float64).ravel() / expected[name], view.size
        assert abs(z.mean()) < 5 / math.sqrt(n), name
        assert abs(z.std() - 1) < 5 / math.sqrt(2 * n), name
        assert abs(np.mean(abs(z) < 1) - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n), name  # a normal's
        assert len(np.unique(view)) > 0.9 * n, name  # no layer is another's copy
    assert not model.flat[1:].any() and not any(view.any() for view in model.acts.values())

def test_a_seed_decides_every_bit():
    def fresh(seed):
        return gpt2.GPT2(gpt2.GPT2Config(8, 53, 2, 2, 8), 1, 8, seed=seed)
    assert_same_bits(fresh(1).params, fresh(1).params)
    one, two = fresh(1).params, fresh(2).params
    assert all(not np.array_equal(one[name], two[name]) for name in one if one[name].std() > 0)

def step_gradients(model, *batches):
    for inputs, targets in batches:
        model.forward(inputs, targets, grad_scale=1 / len(batches))
        model.backward()
    return copies(model.grads)

def test_validation_between_micro_batches_changes_no_gradient():
    model, batches, other = random_model(2, 9), random_tokens(2, B=2, T=9), random_tokens(B=2, T=9, seed=9)
    expected = step_gradients(random_model(2, 9), *batches)
    model.forward(*other, train=False)
    for inputs, targets in batches:
        training_loss = model.forward(inputs, targets, grad_scale=1 / 2)
        model.backward()
        before = copies(model.grads)
        assert model.forward(inputs, targets, train=False) == training_loss
        assert_same_bits(model.grads, before)
    assert_same_bits(model.grads, expected)

def test_probabilities_stand_in_logits_after_validation():
    model, (inputs, targets) = random_model(2, 9), random_tokens(B=2, T=9)
    model.forward(inputs, targets, train=False)
    probs = torch_run(model, inputs, targets)[1]["probs"]
    assert relative_error(model.acts["logits"][0].reshape(probs.shape), probs) < 1e-10

BOTH_WAYS_TO_FORGET = pytest.mark.parametrize(
    "forget", [lambda model: model.zero_grad(), lambda model: model.update(0.0)], ids=["zero_grad", "update"])

@BOTH_WAYS_TO_FORGET
def test_gradients_start_anew_after(forget):
    one, two = random_tokens(2, B=2, T=9)
    model = random_model(2, 9)
    step_gradients(model, one)
    forget(model)
    assert_same_bits(step_gradients(model, two), step_gradients(random_model(2, 9), two))

def test_backward_needs_a_training_forward():
    model, batch = random_model(2, 9), random_tokens(B=2, T=9)
    with pytest.raises(gpt2.InputError, match="forward"):
        model.backward()
    model.forward(*batch)
    model.backward()
    with pytest.raises(gpt2.InputError, match="forward"):
        model.backward()
    model.zero_grad()
    model.forward(*batch)
    model.forward(*batch, train=False)  # by now the activations are those of another pass
    with pytest.raises(gpt2.InputError, match="forward"):
        model.backward()

def test_training_forward_may_be_repeated_only_before_the_first_backward():
    """The classifier's part of dwte is written by forward: the first micro-batch sets it, so it may be
    done over; a later one adds, and would add twice."""
    one, two = random_tokens(2, B=2, T=9)
    model = random_model(2, 9)
    model.forward(*one)
    assert_same_bits(step_gradients(model, two), step_gradients(random_model(2, 9), two))
    model.forward(*one)
    with pytest.raises(gpt2.InputError, match="backward"):
        model.forward(*one)

def test_validation_must_not_come_between_a_later_forward_and_its_backward():
    """It would forget that dwte has its part already, and the next forward pass would add another."""
    one, two = random_tokens(2, B=2, T=9)
    model, expected = random_model(2, 9), random_model(2, 9)
    for inputs, targets in (one, two):
        expected.forward(inputs, targets)
        expected.backward()
    model.forward(*one)
    model.backward()
    model.forward(*two)
    with pytest.raises(gpt2.InputError, match="backward"):
        model.forward(*one, train=False)
    model.backward()  # nothing has been lost
    assert_same_bits(model.grads, expected.grads)

def test_a_forward_whose_gradients_are_forgotten_has_no_backward():
    """Its part of dwte stands on that of earlier micro-batches, which were to be forgotten too."""
    one, two = random_tokens(2, B=2, T=9)
    model = random_model(2, 9)
    step_gradients(model, one)
    model.forward(*two)
    with pytest.raises(gpt2.InputError, match="backward"):
        model.update(0.1)  # the gradients are half those of one batch, half those of two
    model.zero_grad()
    with pytest.raises(gpt2.InputError, match="forward"):
        model.backward()

@pytest.mark.parametrize("bad", [-1, 53, 10 ** 6])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_an_id_outside_the_vocabulary_is_an_input_error(which, bad):
    batch = dict(zip(["inputs", "targets"], random_tokens(B=2, T=9)))
    batch[which][1, 3] = bad
    with pytest.raises(gpt2.InputError, match=f"{which}.*{bad}.* 52"):
        random_model(2, 9).forward(**batch)

@pytest.mark.parametrize("make, message", [
    (lambda: gpt2.GPT2Config(channels=768, num_heads=11), "768.* 11"),
    (lambda: gpt2.GPT2Config(num_layers=0), "num_layers.* 0"),
    (lambda: gpt2.GPT2Config(vocab_size=50257.0), "vocab_size.* 50257.0"),
    (lambda: random_model(1, 9, max_seq_len=8), "length 9.* 8"),
    (lambda: random_model(0, 9), "batch size 0"),
    (lambda: random_model(1, 9, recompute=5), "recompute.* 5"),
    (lambda: random_model(2, 9).forward(*random_tokens(B=2, T=8)), r"\(2, 8\).*\(2, 9\)"),
    (lambda: random_model(2, 9).forward(*random_tokens(B=2, T=9).reshape(2, 18)), r"\(18,\).*\(2, 9\)"),
    (lambda: random_model(2, 9).forward(*random_tokens(B=2, T=9) * 1.0), "inputs.* integers.* float64"),
])
def test_what_does_not_fit_is_an_input_error(make, message):
    with pytest.raises(gpt2.InputError, match=message):
        make()


# ----------------------------------------------------------------------------------------------------
# Fetching and tokenising: prepro_tinyshakespeare.py
#
# A server on this machine plays the hub: it redirects, names SHA-256 and size in the first response, serves
# parts of the file, and misbehaves in every way that a real one, or the network before it, may.



VOCABULARY_FOLDER = os.path.abspath(os.environ.get("TIKTOKEN_CACHE_DIR") or "data/tiktoken")
SHAKESPEARE_TEXT = os.path.abspath(os.environ.get("TINY_SHAKESPEARE") or "data/tiny_shakespeare.txt")
VOCABULARY_FILES = {  # tiktoken calls them by the SHA-1 of their addresses
    name: os.path.join(VOCABULARY_FOLDER, hashlib.sha1((prepro.VOCABULARY + name).encode()).hexdigest())
    for name in prepro.VOCABULARY_SHA256}
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def need_gpt2_vocabulary():
    if not all(map(os.path.isfile, VOCABULARY_FILES.values())):
        pytest.skip("needs GPT-2's vocabulary in data/tiktoken: run `python prepro_tinyshakespeare.py`, "
                    "or set TIKTOKEN_CACHE_DIR")


def sha256_of(data):
    return hashlib.sha256(data).hexdigest()


def closed_port():
    """The number of a port of this machine where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder, with nobody's caches and proxies, and without waiting between attempts."""
    monkeypatch.chdir(tmp_path)
    for name in ("TIKTOKEN_CACHE_DIR", "HF_ENDPOINT", *PROXIES, *(name.lower() for name in PROXIES)):
        monkeypatch.setenv(name, "")  # so that what a test leaves behind is undone, even where it was not set
        monkeypatch.delenv(name)
    monkeypatch.setattr(prepro, "RETRY_WAIT", 0)
    return tmp_path


def cut_the_network(monkeypatch):
    """No network, wherever the tests run: all of it goes through a proxy that is not there."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")


@pytest.fixture
def hub(empty_folder):
    """A hub with one file, hub.body. Tests set its other attributes to make it misbehave.

    cuts: after how many bytes each connection breaks. linked: headers of the first response. seen: the
    requests, as (path, Range). sent: bytes.
    """
    hub = SimpleNamespace(
        body=random.Random(1).randbytes(700_001), content_type="application/octet-stream", status=200,
        ranges="honoured", tell_length=True, linked={}, cuts=[], seen=[], sent=0)

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, headers, body=b""):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers and hub.tell_length:
                self.send_header("Content-Length", str(len(body)))
            if not hub.tell_length:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            self.wfile.write(body)
            hub.sent += len(body)

        def do_GET(self):
            asked = self.headers.get("Range")
            hub.seen.append((self.path, asked))
            assert self.headers["Accept-Encoding"] == "identity"
            if hub.status != 200:
                return self.answer(hub.status, {"Content-Type": "text/html"}, b"<html>no</html>")
            if not self.path.startswith("/cdn/"):
                return self.answer(302, {"Location": "/cdn" + self.path, **hub.linked})
            start, status, headers = 0, 200, {"Content-Type": hub.content_type}
            if asked and hub.ranges != "ignored":
                start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
                if start >= len(hub.body):
                    return self.answer(416, {"Content-Range": f"bytes */{len(hub.body)}"})
                start -= hub.ranges == "shifted"  # a broken server: one byte too early, and it says so
                headers["Content-Range"] = f"bytes {start}-{len(hub.body) - 1}/{len(hub.body)}"
            rest, cut = hub.body[start:], hub.cuts.pop(0) if hub.cuts else None
            if cut is None:
                return self.answer(status, headers, rest)
            headers["Content-Length"] = str(len(rest))
            self.answer(status, headers, rest[:cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # we hang up on a server that offers the wrong thing
    hub.url = f"http://127.0.0.1:{server.server_port}/model"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def link(hub):
    """Let the hub announce its file in the first response, as Hugging Face does."""
    hub.linked = {"X-Linked-Etag": f'"{sha256_of(hub.body)}"', "X-Linked-Size": str(len(hub.body))}


def content(path):
    with open(path, "rb") as f:
        return f.read()


def put(path, data):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)
    return path


def one_line(message, *parts):
    """The message is one line and says all of these."""
    assert message.strip() and "\n" not in message.strip(), message
    for part in parts:
        assert part in message, f"{part!r} is missing in: {message}"


def refused(call, *parts):
    """The call ends with an InputError of one line that says all of these. Returns the line."""
    with pytest.raises(InputError) as caught:
        call()
    one_line(str(caught.value), *parts)
    return str(caught.value)


def test_download_follows_the_redirect_and_fetches_once(hub, capsys):
    link(hub)
    for _ in range(2):
        assert prepro.download(hub.url, "data/deep/file") == "data/deep/file"
        assert content("data/deep/file") == hub.body
    assert hub.seen == [("/model", None), ("/cdn/model", None)] and hub.sent == len(hub.body)
    assert os.listdir("data/deep") == ["file"]
    assert capsys.readouterr() == ("", ""), "quiet where stderr is no terminal"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("source", ["the caller", "the hub"])
def test_connections_cut_anywhere_are_resumed(hub, seed, source):
    rng = random.Random(seed)
    hub.cuts = [rng.randrange(prepro.CHUNK, 300_000), rng.randrange(300_000), rng.randrange(300_000)]
    known = (sha256_of(hub.body), len(hub.body)) if source == "the caller" else link(hub) or ()
    prepro.download(hub.url, "file", *known)
    assert content("file") == hub.body and os.listdir() == ["file"]
    starts = [int(asked[6:-1]) if asked else 0 for path, asked in hub.seen if path.startswith("/cdn")]
    assert len(starts) == 4 and starts == sorted(starts) and starts[1] > 0, "none begins anew"
    assert hub.sent <= len(hub.body) + 3 * prepro.CHUNK, "and hardly anything comes twice"


def test_a_download_that_breaks_for_good_is_continued_by_the_next_run(hub, monkeypatch):
    digest = sha256_of(hub.body)
    hub.cuts = [150_000] + [0] * 99
    refused(lambda: prepro.download(hub.url, "file", digest),
            hub.url, "broke 8 times", "put it at file", "are kept")
    kept = content("file.part")
    assert 150_000 - prepro.CHUNK <= len(kept) <= 150_000 and hub.body.startswith(kept)
    assert os.listdir() == ["file.part"]
    assert len(hub.seen) == 2 * prepro.ATTEMPTS
    hub.cuts, hub.seen = [], []
    prepro.download(hub.url, "file", digest)
    assert hub.seen[-1] == ("/cdn/model", f"bytes={len(kept)}-") and content("file") == hub.body
    assert os.listdir() == ["file"]


def test_a_connection_that_brings_nothing_is_not_tried_again(hub):
    hub.cuts = [0] * 99
    refused(lambda: prepro.download(hub.url, "file", sha256_of(hub.body)), hub.url, "put it at file")
    assert len(hub.seen) == 2 and not os.path.exists("file")


@pytest.mark.parametrize("ranges", ["honoured", "ignored", "shifted"])
@pytest.mark.parametrize("part", ["beginning", "all", "too long"])
def test_what_an_earlier_run_left_behind_is_continued_or_started_anew(hub, capsys, ranges, part):
    hub.ranges = ranges
    put("file.part", {"beginning": hub.body[:1000], "all": hub.body, "too long": hub.body + b"!"}[part])
    prepro.download(hub.url, "file", sha256_of(hub.body), len(hub.body))
    assert content("file") == hub.body and os.listdir() == ["file"]
    assert capsys.readouterr().err == "", "the answer's headers told; nothing was put together wrongly first"
    if ranges == "honoured":
        assert hub.sent == {"beginning": len(hub.body) - 1000, "all": 0, "too long": len(hub.body)}[part]
    else:
        assert hub.sent >= len(hub.body) - (part == "all" and ranges == "shifted") * len(hub.body)


def test_a_part_of_another_file_is_noticed_and_fetched_from_the_start(hub, capsys):
    put("file.part", b"x" * 1000)
    prepro.download(hub.url, "file", sha256_of(hub.body))
    assert content("file") == hub.body and os.listdir() == ["file"]
    assert [asked for path, asked in hub.seen if path.startswith("/cdn")] == ["bytes=1000-", None]
    one_line(capsys.readouterr().err, "file.part", "from the start")


def test_a_part_is_only_trusted_where_a_hash_will_judge_it(hub):
    put("file.part", b"x" * 1000)
    prepro.download(hub.url, "file", None, len(hub.body))
    assert content("file") == hub.body


def test_a_part_is_not_continued_with_a_file_of_another_size(hub):
    put("file.part", hub.body[:1000])
    refused(lambda: prepro.download(hub.url, "file", sha256_of(hub.body), 700_000),
            "offers 700001 bytes", "expected 700000")
    assert len(content("file.part")) == 1000


def test_a_download_is_on_the_disk_before_it_becomes_real(hub, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: calls.append(name) or call(*args))
    prepro.download(hub.url, "file")
    assert calls[:2] == ["fsync", "replace"]
    assert os.name == "nt" or calls[2:] == ["fsync"], "the folder, which now has it under its new name"


def test_the_hash_in_the_first_response_judges_what_comes(hub):
    link(hub)
    hub.body = hub.body[:-1] + bytes([hub.body[-1] ^ 1])
    refused(lambda: prepro.download(hub.url, "file"),
            hub.url, "SHA-256", hub.linked["X-Linked-Etag"].strip('"'))
    assert os.listdir() == []


REFUSALS = {  # how the hub misbehaves: (its attributes, what the message must name)
    "404": (dict(status=404), ["404 Not Found"]),
    "401": (dict(status=401), ["401 Unauthorized"]),
    "403": (dict(status=403), ["403 Forbidden"]),
    "500": (dict(status=500), ["500"]),
    "a web page": (dict(content_type="text/html; charset=utf-8"), ["web page", "log in"]),
    "another file": (dict(body=bytes(700_001)), ["SHA-256", "expected"]),
    "a short file": (dict(body=bytes(1000)), ["1000 bytes", "expected 700001"]),
    "a long file": (dict(body=bytes(800_000)), ["800000 bytes", "expected 700001"]),
    "a short file of untold length": (dict(body=bytes(1000), tell_length=False), ["ended early"]),
    "a long file of untold length": (dict(body=bytes(800_000), tell_length=False),
                                     ["800000 bytes", "expected 700001"]),
    "another file announced": (dict(linked={"X-Linked-Etag": '"' + "0" * 64 + '"'}),
                               ["offers SHA-256 000", "expected"]),
    "another size announced": (dict(linked={"X-Linked-Size": "7"}), ["offers 7 bytes", "expected 700001"]),
    "a part nobody asked for": (dict(status=206), ["206"]),
    "nothing at all": (dict(body=b""), ["offers 0 bytes"]),
}


@pytest.mark.parametrize("misbehaviour", REFUSALS)
def test_a_file_that_is_not_the_one_expected_never_becomes_real(hub, misbehaviour):
    attributes, named = REFUSALS[misbehaviour]
    good = dict(vars(hub), seen=[], linked={})
    vars(hub).update(attributes)

    def fetch():
        return prepro.download(hub.url, "data/file", sha256_of(good["body"]), len(good["body"]))
    refused(fetch, hub.url, "put it at data/file", *named)
    assert not os.path.exists("data/file")
    vars(hub).update(good)  # and whatever was left behind does no harm
    assert content(fetch()) == good["body"] and os.listdir("data") == ["file"]


def test_an_empty_answer_is_no_file_even_if_nothing_is_known_of_it(hub):
    hub.body = b""
    refused(lambda: prepro.download(hub.url, "file"), hub.url, "0 bytes")
    assert os.listdir() == []


def test_the_size_alone_is_verified_where_no_hash_is_known(hub):
    hub.tell_length = False
    refused(lambda: prepro.download(hub.url, "file", None, 700_000), "700001 bytes", "expected 700000")
    assert os.listdir() == []


def test_no_server_no_name_no_address(empty_folder):
    url = f"http://127.0.0.1:{closed_port()}/model"
    line = refused(lambda: prepro.download(url, "file"), url, "put it at file")
    assert "refused" in line and "HTTPConnectionPool" not in line, "the system's own words, unwrapped"
    refused(lambda: prepro.download("nonsense", "file"), "nonsense", "put it at file")
    assert os.listdir() == []


def test_the_disk_refuses(hub):
    put("data", b"a file where a folder is needed")
    refused(lambda: prepro.download(hub.url, "data/file"), hub.url, "put it at data/file")


@pytest.mark.parametrize("name", ["requests", "tiktoken"])
def test_a_missing_package_is_named_with_its_remedy(empty_folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # which is how Python marks an import that must fail
    call = prepro.get_encoding if name == "tiktoken" else lambda: prepro.download("http://localhost", "x")
    refused(call, f"pip install {name}")


def test_stopping_a_download_keeps_what_has_come(hub, monkeypatch, capsys):
    whole_watch = prepro.watched

    def stopped(pieces, *args):
        for piece in whole_watch(pieces, *args):
            yield piece
            raise KeyboardInterrupt
    monkeypatch.setattr(prepro, "SHAKESPEARE", hub.url)
    monkeypatch.setattr(prepro, "SHAKESPEARE_SHA256", sha256_of(hub.body))
    monkeypatch.setattr(prepro, "SHAKESPEARE_SIZE", len(hub.body))
    monkeypatch.setattr(prepro, "watched", stopped)
    assert prepro.main([]) == 130
    one_line(capsys.readouterr().err, "stopped")
    assert os.listdir("data") == ["tiny_shakespeare.txt.part"]
    assert content("data/tiny_shakespeare.txt.part") == hub.body[:prepro.CHUNK]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress_is_shown_on_a_terminal_only(monkeypatch, stderr):
    clock = iter([0.0, 0.5, 2.0, 2.1, 4.0])  # at the start, and after each of four pieces
    monkeypatch.setattr(prepro, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(prepro.sys, "stderr", stderr)
    pieces = [bytes(1_000_000)] * 4
    assert list(prepro.watched(iter(pieces), "fetching", 1_000_000, 10_000_000)) == pieces
    shown = [line.strip() for line in stderr.getvalue().split("\r")]
    assert shown == (["", "fetching: 3.0 MB, 1.0 MB/s, 30%, 7 s left",
                      "fetching: 5.0 MB, 1.0 MB/s, 50%, 5 s left"] if stderr.isatty() else [""])


# Weights

def test_weights_come_from_the_endpoint_the_user_named(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.removesuffix("/model") + "/mirror/")
    for name, (revision, sha256, size) in dict(prepro.WEIGHTS).items():
        known = sha256 and sha256_of(hub.body), size and len(hub.body)
        monkeypatch.setitem(prepro.WEIGHTS, name, (revision, *known))
        link(hub)
        hub.seen = []
        assert prepro.fetch_weights(name) == f"data/{name}.safetensors"
        assert hub.seen[0] == (f"/mirror/openai-community/{name}/resolve/{revision}/model.safetensors", None)
        assert content(f"data/{name}.safetensors") == hub.body
        hub.status = 500  # from now on they are there
        assert prepro.fetch_weights(name) == f"data/{name}.safetensors"
        hub.status = 200


def test_the_hub_s_wrong_weights_are_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.removesuffix("/model"))
    link(hub)  # 700,001 bytes are not GPT-2
    refused(lambda: prepro.fetch_weights("gpt2"), "put it at data/gpt2.safetensors",
            "expected 248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707")
    assert os.listdir("data") == []


def test_weights_at_hand_are_checked_by_size(empty_folder, monkeypatch):
    put("data/gpt2.safetensors", bytes(1000))
    refused(lambda: prepro.fetch_weights("gpt2"),
            "data/gpt2.safetensors", "1000 bytes", "expected 548105171", "delete")
    assert len(content("data/gpt2.safetensors")) == 1000, "it is the user's to delete"
    refused(lambda: prepro.fetch_weights("gpt3"), "gpt3", "gpt2-medium")


# The vocabulary

def test_no_vocabulary_and_no_network(empty_folder, monkeypatch):
    cut_the_network(monkeypatch)
    refused(prepro.get_encoding, "gpt-2/encodings/main/vocab.bpe", "put it at data/tiktoken/")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "elsewhere")
    refused(prepro.get_encoding, "vocab.bpe", "put it at elsewhere/")


def test_a_damaged_vocabulary_is_never_used(empty_folder, monkeypatch, capsys):
    cut_the_network(monkeypatch)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", "what an earlier test has loaded")
    path = put("data/tiktoken/" + os.path.basename(VOCABULARY_FILES["vocab.bpe"]), b"#version: 0.2\nh e\n")
    refused(prepro.get_encoding, "vocab.bpe", f"put it at {path}")
    one_line(capsys.readouterr().err, path, "damaged")
    assert not os.path.exists(path)


def test_what_tiktoken_can_not_load_is_said_in_one_line(empty_folder, monkeypatch):
    cut_the_network(monkeypatch)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken's way to say: no cache, try the network
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    refused(prepro.get_encoding, "tiktoken", "TIKTOKEN_CACHE_DIR")


def test_the_vocabulary_is_fetched_once_and_stays_in_data(hub, monkeypatch):
    need_gpt2_vocabulary()
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)  # or it would remember
    download, fetched = prepro.download, []

    def from_our_hub(url, path, sha256):
        name = url.removeprefix(prepro.VOCABULARY)
        hub.body = content(VOCABULARY_FILES[name])
        fetched.append(name)
        return download(hub.url, path, sha256)
    monkeypatch.setattr(prepro, "download", from_our_hub)
    assert prepro.get_encoding().n_vocab == 50257
    assert fetched == ["vocab.bpe", "encoder.json"] and len(hub.seen) == 4
    monkeypatch.setattr(prepro, "download", download)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2")
    cut_the_network(monkeypatch)
    assert prepro.get_encoding().encode_ordinary("hello world") == [31373, 995]
    assert os.listdir() == ["data"] and sorted(os.listdir("data/tiktoken")) == sorted(
        os.path.basename(path) for path in VOCABULARY_FILES.values())


# Tokens: a small vocabulary, real in all but its size, needs no network. Ids 0 to 255 are the bytes.

def small_encoding():
    merges = [b"th", b"the", b" t", b" the", b"\n\n", b"or", "é".encode(), b"to", b"be"]
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    return tiktoken.Encoding("small", pat_str=r" ?\p{L}+| ?[^\s\p{L}]+|\s+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 265})


@pytest.fixture
def small_vocabulary(empty_folder, monkeypatch):
    encoding = small_encoding()
    monkeypatch.setattr(prepro, "get_encoding", lambda: encoding)
    return encoding


def test_encode_text_by_hand():
    # the small vocabulary has "to", "be", "or" and " the" in one piece, and so the blank line; " be" not
    tokens = prepro.encode_text("to be\n\nor the", small_encoding())
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [265, 263, ord(" "), 264, 260, 265, 261, 259]


@pytest.mark.parametrize("text", ["", "a", "\n\n", "a\n\n", "a\n\nb", "\n\na\n\n\nb\n\n\n\nc", "é\n\n\n",
                                  "the to be or\n not\n\nthe"])
def test_encode_text_equals_tiktoken_on_the_text_with_the_marks_written_in(text):
    encoding = small_encoding()
    marked = "<|endoftext|>" + text.replace("\n\n", "\n\n<|endoftext|>")
    assert prepro.encode_text(text, encoding).tolist() == encoding.encode(marked, allowed_special="all")


def test_a_text_can_not_forge_the_end_of_text():
    encoding, text = small_encoding(), "a <|endoftext|> b"
    tokens = prepro.encode_text(text, encoding).tolist()
    assert tokens.count(265) == 1 and tokens[0] == 265 and encoding.decode(tokens[1:]) == text


def test_encode_text_refuses_ids_beyond_uint16():
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i, j]): 256 + 256 * i + j for i in range(256) for j in range(256)}
    huge = tiktoken.Encoding("huge", pat_str=".", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 65792})
    refused(lambda: prepro.encode_text("a", huge), "65793", "65536")


def read_token_file(path):
    """llm.c's token file as its description says, with nothing of ours: (version, list of tokens)."""
    data = content(path)
    header = struct.unpack("<256i", data[:1024])
    assert header[0] == 20240520 and header[3:] == (0,) * 253 and len(data) == 1024 + 2 * header[2]
    return header[1], list(struct.unpack(f"<{header[2]}H", data[1024:]))


def test_write_tokens_byte_for_byte(empty_folder):
    tokens = [0, 1, 255, 256, 50256, 65535]
    for kind in (np.uint16, np.int64, ">i4", list):
        prepro.write_tokens("data/x.bin", tokens if kind is list else np.array(tokens, kind))
        assert read_token_file("data/x.bin") == (1, tokens)
        assert content("data/x.bin")[1024:] == bytes.fromhex("0000 0100 ff00 0001 50c4 ffff")
        assert os.listdir("data") == ["x.bin"]


@pytest.mark.parametrize("tokens", [[], np.zeros(0, int), [65536], [-1], [0.5], [[1, 2]]])
def test_write_tokens_refuses_what_does_not_fit(empty_folder, tokens):
    put("x.bin", b"what was there")
    refused(lambda: prepro.write_tokens("x.bin", tokens), "x.bin", "0 to 65535")
    assert content("x.bin") == b"what was there"


def test_files_are_replaced_whole_or_not_at_all(empty_folder, monkeypatch):
    put("x.bin", b"what was there")

    def no_room(handle):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError):
        prepro.write_tokens("x.bin", [1, 2, 3])
    with pytest.raises(OSError):
        prepro.write_tokenizer("x.bin", small_encoding())
    assert content("x.bin") == b"what was there" and os.listdir() == ["x.bin"]


def read_tokenizer_file(path):
    """llm.c's tokenizer file as its description says: (version, end of text's id, the tokens' bytes)."""
    data, tokens, at = content(path), [], 1024
    magic, version, n, eot, *rest = struct.unpack("<256i", data[:1024])
    assert magic == 20240328 and rest == [0] * 252
    for _ in range(n):
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    assert at == len(data)
    return version, eot, tokens


def test_write_tokenizer_byte_for_byte(empty_folder):
    prepro.write_tokenizer("data/t.bin", small_encoding())
    version, eot, tokens = read_tokenizer_file("data/t.bin")
    assert (version, eot, len(tokens), tokens[265]) == (2, 265, 266, b"<|endoftext|>")
    assert tokens[:256] == [bytes([i]) for i in range(256)]
    assert tokens[257] == b"the" and tokens[262] == b"\xc3\xa9"
    ids = prepro.encode_text("to be\n\nor thé", small_encoding())
    assert b"".join(tokens[i] for i in ids).decode() == "<|endoftext|>to be\n\n<|endoftext|>or thé"


def test_write_tokenizer_refuses_a_token_too_long_for_its_length_byte(empty_folder):
    ranks = {bytes([i]): i for i in range(256)} | {b"a" * 256: 256}
    long = tiktoken.Encoding("long", pat_str=".", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 257})
    refused(lambda: prepro.write_tokenizer("t.bin", long), "t.bin", "255 bytes")
    assert os.listdir() == []


# Tiny Shakespeare

FIRST_AND_LAST_TOKENS = {
    "train": (305_260, [9203, 262, 39418, 13, 628, 50256, 22747, 49208, 805, 25],
              [338, 83, 198, 1199, 2915, 14210, 1242, 23137, 13, 198]),
    "val": (32_768, [50256, 5962, 22307, 25, 198, 8421, 356, 5120, 597, 2252],
            [30, 628, 50256, 44879, 40, 3535, 1565, 2937, 25, 198]),
}


def test_tiny_shakespeare_has_the_tokens_every_llm_c_user_knows(empty_folder, monkeypatch, capsys):
    need_gpt2_vocabulary()
    if not os.path.isfile(SHAKESPEARE_TEXT):
        pytest.skip("needs data/tiny_shakespeare.txt: run `python prepro_tinyshakespeare.py`, "
                    "or name the text in TINY_SHAKESPEARE")
    text = content(SHAKESPEARE_TEXT)
    assert (sha256_of(text), len(text)) == (prepro.SHAKESPEARE_SHA256, prepro.SHAKESPEARE_SIZE)
    put("data/tiny_shakespeare.txt", text)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY_FOLDER)
    cut_the_network(monkeypatch)
    assert prepro.main([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "305,260 tokens" in out and "32,768 tokens" in out
    for part, (n, first, last) in FIRST_AND_LAST_TOKENS.items():
        version, tokens = read_token_file(f"data/tiny_shakespeare_{part}.bin")
        assert (version, len(tokens), tokens[:10], tokens[-10:]) == (1, n, first, last)
    version, eot, tokens = read_tokenizer_file("data/gpt2_tokenizer.bin")
    assert (version, eot, len(tokens), tokens[31373], tokens[995]) == (2, 50256, 50257, b"hello", b" world")
    ids = [i for part in ("val", "train") for i in read_token_file(f"data/tiny_shakespeare_{part}.bin")[1]]
    assert b"".join(tokens[i] for i in ids if i != eot) == text, "and they spell the text"


def fake_shakespeare(hub, monkeypatch):
    """Let the hub serve a text of 40,000 bytes as Tiny Shakespeare. Returns the text."""
    hub.body = b"".join(b"%d bottles\n" % i for i in range(2693))[:40_000]
    monkeypatch.setattr(prepro, "SHAKESPEARE", hub.url)
    monkeypatch.setattr(prepro, "SHAKESPEARE_SHA256", sha256_of(hub.body))
    monkeypatch.setattr(prepro, "SHAKESPEARE_SIZE", len(hub.body))
    hub.content_type = "text/plain; charset=utf-8"
    return hub.body


def test_preparing_fetches_what_is_missing_and_only_that(hub, small_vocabulary, monkeypatch):
    text = fake_shakespeare(hub, monkeypatch)
    paths = ("data/tiny_shakespeare_train.bin", "data/tiny_shakespeare_val.bin")
    hub.body = text[::-1]
    refused(prepro.prepare_tinyshakespeare, "SHA-256", "put it at data/tiny_shakespeare.txt")
    hub.body = text
    assert prepro.prepare_tinyshakespeare() == paths and content("data/tiny_shakespeare.txt") == text
    written = [content(path) for path in paths]
    val, train = read_token_file(paths[1])[1], read_token_file(paths[0])[1]
    assert len(val) == 32_768 and val + train == prepro.encode_text(text.decode(), small_vocabulary).tolist()

    hub.status = 500  # from here on there is no help from outside
    before = [os.stat(path).st_mtime_ns for path in paths]
    assert prepro.prepare_tinyshakespeare() == paths
    assert [os.stat(path).st_mtime_ns for path in paths] == before, "whole files are left alone"
    for broken in (written[0][:-2], written[0] + b"xx", written[0][:100], b"", None):
        put(paths[0], broken) if broken is not None else os.remove(paths[0])
        assert prepro.prepare_tinyshakespeare() == paths and [content(path) for path in paths] == written
    os.remove("data/tiny_shakespeare.txt")
    os.rename("data", "moved")
    put(paths[0], written[0])
    put(paths[1], written[1])
    assert prepro.prepare_tinyshakespeare() == paths, "the tokens alone are enough"
    os.remove(paths[1])
    refused(prepro.prepare_tinyshakespeare, hub.url, "500", "put it at data/tiny_shakespeare.txt")


def test_another_text_in_its_place_is_used_and_announced(empty_folder, small_vocabulary, capsys):
    put("data/tiny_shakespeare.txt", b"x" * 33_000)
    prepro.prepare_tinyshakespeare()
    one_line(capsys.readouterr().err, "data/tiny_shakespeare.txt", "not the original")
    assert len(read_token_file("data/tiny_shakespeare_train.bin")[1]) == 33_001 - 32_768
    put("data/tiny_shakespeare.txt", b"too short")
    os.remove("data/tiny_shakespeare_train.bin")
    refused(prepro.prepare_tinyshakespeare, "tokens")


# The command line

@pytest.mark.parametrize("flags, prefix, n_val", [
    ([], "data/my", 3), (["--val_fraction", ".5"], "data/my", 16), (["--output_prefix", "o/x"], "o/x", 3)])
def test_a_text_of_ones_own(empty_folder, small_vocabulary, capsys, flags, prefix, n_val):
    put("my.txt", "\ufeffto be\r\n\r\nor thé, the to be <|endoftext|>.\n".encode())
    assert prepro.main(["--input", "my.txt", *flags]) == 0
    tokens = prepro.encode_text("to be\n\nor thé, the to be <|endoftext|>.\n", small_vocabulary).tolist()
    assert len(tokens) == 32
    assert read_token_file(f"{prefix}_val.bin") == (1, tokens[:n_val])
    assert read_token_file(f"{prefix}_train.bin") == (1, tokens[n_val:])
    out, err = capsys.readouterr()
    assert out == f"{prefix}_train.bin: {32 - n_val} tokens\n{prefix}_val.bin: {n_val} tokens\n" and err == ""


MISTAKES = {  # what a user does: (the bytes of text.txt, flags, what the message must name)
    "not UTF-8": ("na\xefve".encode("latin-1"), [], ["text.txt", "0xef", "position 2", "UTF-8"]),
    "UTF-16": ("to be".encode("utf-16"), [], ["text.txt", "0xff", "position 0", "UTF-8"]),
    "empty": (b"", [], ["text.txt", "empty"]),
    "blank": (b"\xef\xbb\xbf \r\n\n", [], ["text.txt", "empty"]),
    "missing": (None, [], ["text.txt", "no such file"]),
    "fraction 0": (b"to be", ["--val_fraction", "0"], ["--val_fraction", "0.0", "between 0 and 1"]),
    "fraction 1": (b"to be", ["--val_fraction", "1"], ["--val_fraction", "1.0", "between 0 and 1"]),
    "fraction -0.1": (b"to be", ["--val_fraction=-0.1"], ["--val_fraction", "-0.1"]),
    "fraction nan": (b"to be", ["--val_fraction", "nan"], ["--val_fraction", "nan"]),
    "nothing to validate with": (b"to be", ["--val_fraction", "0.1"], ["0 of 4 tokens", "--val_fraction"]),
    "nowhere to write": (b"to be" * 99, ["--output_prefix", "text.txt/x"], ["text.txt"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_exit_code_1(empty_folder, small_vocabulary, capsys, mistake):
    text, flags, named = MISTAKES[mistake]
    before = [os.path.basename(put("text.txt", text))] if text is not None else []
    assert prepro.main(["--input", "text.txt", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ")
    one_line(err, *named)
    assert os.listdir() == before, "and nothing was written"


def run_prepro(*flags):
    environment = dict(os.environ, HTTPS_PROXY=f"http://127.0.0.1:{closed_port()}")
    return subprocess.run([sys.executable, prepro.__file__, *flags], capture_output=True, encoding="utf-8",
                          timeout=60, env=environment)


def test_the_program_itself_without_a_network(empty_folder):
    ran = run_prepro()
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.startswith("error: ")
    one_line(ran.stderr, prepro.SHAKESPEARE, "put it at data/tiny_shakespeare.txt")
    assert os.listdir("data") == []


def test_the_program_itself_on_the_command_line(empty_folder):
    ran = run_prepro("--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "python prepro_tinyshakespeare.py --input my.txt" in ran.stdout


@pytest.mark.parametrize("flags", [["--inptu", "x"], ["--val_fraction", "much", "--input", "x"], ["x"],
                                   ["--val_fraction", "0.2"], ["--output_prefix", "x"], ["--inp", "x"]])
def test_a_command_line_that_makes_no_sense_ends_with_2(empty_folder, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        prepro.main(flags)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err and os.listdir() == []


# ----------------------------------------------------------------------------------------------------
# Weights in and out, and hostile files: sections 9 and 10
#
# Files are made here by writers of our own, a dozen lines each, from the formats' descriptions: the trainer
# never reads only what it wrote itself. Then they are damaged, by a table and by chance, and what comes back
# must be what the file says, to the bit, or an InputError of one line that says what is wrong.



FILE_SIZES = {"V": 61, "L": 2, "NH": 3, "C": 24, "max_seq_len": 11}  # of the small model in most files here
LAYER_PARTS = {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj",
               "ln2": "ln_2", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}


def file_model(**sizes):
    return random_model(2, 8, np.float32, **FILE_SIZES | sizes)


def as_hugging_face(views, prefix=""):
    """Params or grads by Hugging Face's names, in its layout: a Conv1D's weight is (C_in, C_out)."""
    tensors = {"wte.weight": views["wte"], "wpe.weight": views["wpe"],
               "ln_f.weight": views["lnfw"], "ln_f.bias": views["lnfb"]}
    for l in range(len(views["qkvw"])):
        for ours, theirs in LAYER_PARTS.items():
            tensors[f"h.{l}.{theirs}.weight"] = views[ours + "w"][l].T  # a layernorm's has one axis: as it is
            tensors[f"h.{l}.{theirs}.bias"] = views[ours + "b"][l]
    return {prefix + name: tensor for name, tensor in tensors.items()}


TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
               "BOOL": torch.bool, "U8": torch.uint8, "I32": torch.int32}


def encoded_as(dtype, array):
    return torch.tensor(array).to(TORCH_TYPES[dtype]).reshape(-1).view(torch.uint8).numpy().tobytes()


def rounded_to(dtype, array):
    """What is left of a float32 array that was stored in another type."""
    return torch.tensor(array).to(TORCH_TYPES[dtype]).float().numpy()


def all_rounded_to(dtype, views):
    return {name: rounded_to(dtype, view) for name, view in views.items()}


def safetensors_parts(tensors, dtype="F32"):
    """(header, body) of {name: array}, or of {name: (dtype, array)} where one differs from the rest."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        kind, array = tensor if isinstance(tensor, tuple) else (dtype, tensor)
        data = encoded_as(kind, array)
        header[name] = {"dtype": kind, "shape": list(array.shape),
                        "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return header, body


def pack_safetensors(header, body=b""):
    """The file. header: a dict, or the bytes that stand in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def weights_folder(folder, tensors, dtype="F32", **told):
    """What Hugging Face's hub holds of a model: config.json and model.safetensors. Returns the path."""
    os.makedirs(folder, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 3} | told))
    (folder / "model.safetensors").write_bytes(pack_safetensors(*safetensors_parts(tensors, dtype)))
    return str(folder)


SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded_folder(folder, *shards, **told):
    """The same with the tensors in two files, and an index that says where."""
    path = weights_folder(folder, {}, **told)
    (folder / "model.safetensors").unlink()
    for name, tensors in zip(SHARDS, shards, strict=True):
        (folder / name).write_bytes(pack_safetensors(*safetensors_parts(tensors)))
    weight_map = {tensor: name for name, tensors in zip(SHARDS, shards) for tensor in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def halves(tensors):
    """A model's tensors in two parts, every other one."""
    items = list(tensors.items())
    return dict(items[::2]), dict(items[1::2])


LLMC_ORDER = ("wte wpe ln1w ln1b qkvw qkvb attprojw attprojb "
              "ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb").split()


def llmc_bytes(numbers, views, dtype="F32", padded_vocab_size=None, between=b""):
    """A header of 256 int32, what stands `between`, and the 16 tensors, wte with rows of zeros at its end."""
    padding = (padded_vocab_size or len(views["wte"])) - len(views["wte"])
    tensors = views | {"wte": np.pad(views["wte"], ((0, padding), (0, 0)))}
    header = struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))
    return header + between + b"".join(encoded_as(dtype, tensors[name]) for name in LLMC_ORDER)


def llmc_model(model, version):
    """llm.c's model file: version 1 without padding, 3 in float32, 5 in bfloat16."""
    c = model.config
    padded = -(-c.vocab_size // 128) * 128
    numbers = [20240326, version, c.max_seq_len, c.vocab_size, c.num_layers, c.num_heads, c.channels, padded]
    if version == 1:
        return llmc_bytes(numbers[:7], model.params)
    return llmc_bytes(numbers, model.params, "BF16" if version == 5 else "F32", padded)


def written(path, data):
    path.write_bytes(data)
    return str(path)


def loaded(source, B=2, T=8):
    return gpt2.GPT2.from_pretrained(str(source), B, T)


def logits_of(model, inputs):
    return model.forward_rows(inputs) @ model.params["wte"].T


def refused_file(source, *parts, error=gpt2.InputError):
    """from_pretrained must raise the error, in one line that says all of these. Returns the line."""
    with pytest.raises(error) as caught:
        loaded(source)
    line = str(caught.value)
    assert line.isprintable() and [part for part in parts if str(part) not in line] == [], line
    return line


# ----------------------------------------------------------------------------------------------------
# Hugging Face


def need_transformers():
    return pytest.importorskip("transformers", reason="needs transformers: pip install transformers")


def hugging_face_model(B, T, V, L, NH, C, max_seq_len, spread):
    """transformers' own GPT-2, every parameter random, and what it makes of a batch: (model, inputs, targets,
    logits, loss), its gradients filled."""
    transformers = need_transformers()
    config = transformers.GPT2Config(vocab_size=V, n_positions=max_seq_len, n_embd=C, n_layer=L, n_head=NH,
                                     bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):  # it would fill them with numbers that we replace
        model = transformers.GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    rng = np.random.default_rng(1)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()  # the same memory
        rng.standard_normal(out=values, dtype=np.float32)
        values *= spread
        values += ".ln_" in name and name.endswith("weight")
    inputs, targets = random_tokens(B=B, T=T, V=V)
    logits = model(torch.from_numpy(inputs)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    loss.backward()
    return model, inputs, targets, logits.detach().numpy(), loss.item()


def parameters_of(model):
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def assert_close_in_float32(ours, truth):
    """The same as assert_all_close, without float64 copies of the largest tensors."""
    assert ours.keys() == truth.keys() and all(ours[name].shape == truth[name].shape for name in ours)
    errors = {name: np.linalg.norm((ours[name] - truth[name]).ravel()) / np.linalg.norm(truth[name].ravel())
              for name in ours}
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize("sizes, spread", [
    (dict(B=2, T=8, **FILE_SIZES), 0.1),
    (dict(B=1, T=8, V=50257, L=12, NH=12, C=768, max_seq_len=1024), 0.04),  # some ten seconds, 2.7 GB
], ids=["small", "gpt2_124M"])
def test_what_transformers_saved_is_the_same_model(sizes, spread, tmp_path):
    theirs, inputs, targets, logits, loss = hugging_face_model(**sizes, spread=spread)
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path, *inputs.shape)
    os.remove(tmp_path / "model.safetensors")
    assert asdict(ours.config) == {"max_seq_len": sizes["max_seq_len"], "vocab_size": sizes["V"],
                                   "num_layers": sizes["L"], "num_heads": sizes["NH"], "channels": sizes["C"]}
    assert_same_bits(as_hugging_face(ours.params, "transformer."), parameters_of(theirs))
    grads = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    del theirs  # half a gigabyte
    assert_close_in_float32({"logits": logits_of(ours, inputs)}, {"logits": logits})
    assert ours.forward(inputs, targets) == pytest.approx(loss, rel=1e-6)
    ours.backward()
    assert_close_in_float32(as_hugging_face(ours.grads, "transformer."), grads)
    if sizes["L"] == 2:  # and PyTorch's reference, in float64, is of one mind with both
        reference = TorchGPT2(ours.config, ours.params).double()
        true_loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets))
        true_loss.backward()
        assert loss == pytest.approx(true_loss.item(), rel=1e-6)
        assert_all_close(ours.grads, torch_grads(reference, ours.params))


def test_what_transformers_saved_in_parts(tmp_path):
    theirs, *_ = hugging_face_model(B=1, T=8, **FILE_SIZES, spread=0.1)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_bits(as_hugging_face(loaded(tmp_path).params, "transformer."), parameters_of(theirs))


def test_what_we_saved_opens_in_transformers(tmp_path):
    transformers = need_transformers()
    ours, (inputs, targets) = file_model(), random_tokens(B=2, T=8, V=61)
    ours.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == set()
    assert [what for what, found in info.items() if found] == []  # nor any error
    assert_same_bits(parameters_of(theirs), as_hugging_face(ours.params, "transformer."))
    assert_same_bits(read_plainly((tmp_path / "model.safetensors").read_bytes()), parameters_of(theirs))
    logits = theirs.eval()(torch.from_numpy(inputs)).logits.detach().numpy()
    assert_all_close({"logits": logits_of(ours, inputs)}, {"logits": logits})
    told = transformers.GPT2Config.from_pretrained(tmp_path).to_dict()
    expected = {"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_head": 3,
                "n_positions": 11, "tie_word_embeddings": True, "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "dtype": "float32", "eos_token_id": None}
    assert {key: told[key] for key in expected} == expected


def masks(dtype, prefix=""):
    """The buffers that older checkpoints carry: the causal mask, and what masked scores are replaced with."""
    tensors = {}
    for l in range(FILE_SIZES["L"]):
        tensors[f"{prefix}h.{l}.attn.bias"] = dtype, np.tril(np.ones((1, 1, 11, 11), np.uint8))
        tensors[f"{prefix}h.{l}.attn.masked_bias"] = "F32", np.array(-1e4)
    return tensors


NAMINGS = {
    "openai": lambda p: as_hugging_face(p) | masks("F32"),
    "openai_bool": lambda p: masks("BOOL") | as_hugging_face(p),
    "transformers": lambda p: as_hugging_face(p, "transformer."),
    "transformers_old": lambda p: (masks("U8", "transformer.") | as_hugging_face(p, "transformer.")
                                   | {"lm_head.weight": p["wte"]}),
    "tied": lambda p: {"lm_head.weight": p["wte"]} | as_hugging_face(p),
    "another_order": lambda p: dict(sorted(as_hugging_face(p).items(), reverse=True)),
}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_and_every_type_is_read(naming, dtype, tmp_path):
    model = file_model()
    read = loaded(weights_folder(tmp_path, NAMINGS[naming](model.params), dtype))
    assert read.config == model.config
    assert_same_bits(read.params, all_rounded_to(dtype, model.params))


def test_types_may_be_mixed(tmp_path):
    """Community checkpoints keep layernorms in float32 beside matrices in 16 bits."""
    tensors = as_hugging_face(file_model().params)
    kinds = {n: "F32" if t.ndim == 1 else "BF16" if "mlp" in n else "F16" for n, t in tensors.items()}
    read = loaded(weights_folder(tmp_path, {n: (kinds[n], t) for n, t in tensors.items()}))
    assert_same_bits(as_hugging_face(read.params), {n: rounded_to(kinds[n], t) for n, t in tensors.items()})


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_at_its_edges(dtype, tmp_path):
    """Zero's sign, the smallest numbers and the largest."""
    model, info = file_model(), torch.finfo(TORCH_TYPES[dtype])
    odd = np.array([-0.0, info.tiny, info.smallest_normal / 4, info.max, info.min, info.eps], np.float32)
    model.params["wte"][0, :6] = odd
    read = loaded(weights_folder(tmp_path, as_hugging_face(model.params), dtype))
    assert read.params["wte"][0, :6].tobytes() == odd.tobytes()
    assert_same_bits(read.params, all_rounded_to(dtype, model.params))


def odd_at_the_end(array, value):
    """A copy with another value in the last place."""
    array = array.copy()
    array[(-1,) * array.ndim] = value
    return array


@pytest.mark.parametrize("head", [
    lambda wte: odd_at_the_end(wte, 0), lambda wte: wte[:-1], lambda wte: ("F16", wte), lambda wte: wte[:0]],
    ids=["other_number", "shorter", "other_type", "empty"])
def test_a_classifier_of_its_own_is_refused(head, tmp_path):
    params = file_model().params
    tensors = as_hugging_face(params) | {"lm_head.weight": head(params["wte"])}
    refused_file(weights_folder(tmp_path, tensors), tmp_path, "lm_head.weight differs from wte.weight")


def test_weights_in_several_files(tmp_path):
    model = file_model()
    folder = sharded_folder(tmp_path, *halves(as_hugging_face(model.params, "transformer.")))
    assert_same_bits(loaded(folder).params, model.params)


@pytest.mark.parametrize("bare", ["model.safetensors", "model.safetensors.index.json"])
def test_without_a_config_heads_have_64_channels(bare, tmp_path):
    model = file_model(C=128, NH=2)
    tensors = as_hugging_face(model.params)
    weights_folder(tmp_path, tensors) if bare.endswith("s") else sharded_folder(tmp_path, *halves(tensors))
    os.remove(tmp_path / "config.json")
    read = loaded(tmp_path / bare)
    assert read.config == model.config and read.config.num_heads == 2
    assert_same_bits(read.params, model.params)


def test_without_a_config_other_channels_are_refused(tmp_path):
    weights_folder(tmp_path, as_hugging_face(file_model().params))
    os.remove(tmp_path / "config.json")
    refused_file(tmp_path / "model.safetensors", "how many heads? 24 channels", "n_head")


@pytest.mark.parametrize("bare", ["model.safetensors", "model.safetensors.index.json"])
def test_a_bare_file_is_read_with_the_config_beside_it(bare, tmp_path, monkeypatch):
    """128 channels without it would be 2 heads of 64, and silently another model."""
    model = file_model(C=128, NH=4)
    tensors = as_hugging_face(model.params)
    weights_folder(tmp_path, tensors, n_head=4) if bare.endswith("s") else sharded_folder(tmp_path, *halves(tensors), n_head=4)
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / bare), bare):
        read = loaded(source)
        assert read.config == model.config
        assert_same_bits(read.params, model.params)


def test_a_file_of_another_name_is_not_described_by_the_config_beside_it(tmp_path):
    """Downloads stand side by side in data/; whose config.json that is, only its own name tells."""
    model = file_model(C=128, NH=2)
    weights_folder(tmp_path, as_hugging_face(model.params), n_head=4)
    os.rename(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    assert loaded(tmp_path / "other.safetensors").config.num_heads == 2


@pytest.mark.parametrize("sizes", [{"V": 2, "max_seq_len": 8}, {"V": 1000, "max_seq_len": 2048}, {"L": 11},
                                   {"C": 5, "NH": 1}, {"L": 1, "C": 8, "NH": 8}], ids=str)
def test_any_shape_of_gpt2_is_read(sizes, tmp_path):
    model = file_model(**sizes)
    read = loaded(weights_folder(tmp_path, as_hugging_face(model.params), n_head=model.config.num_heads))
    assert read.config == model.config
    assert_same_bits(read.params, model.params)


REAL_CONFIG = {  # that of OpenAI's upload, but for the sizes
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 11, "n_embd": 24, "n_head": 3, "n_layer": 2,
    "n_positions": 11, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 61}


@pytest.mark.parametrize("field, found, expected", [
    ("model_type", "llama", "gpt2"), ("vocab_size", 60, 61), ("n_positions", 12, 11), ("n_embd", 23, 24),
    ("n_layer", 3, 2), ("n_inner", 95, 96), ("activation_function", "gelu", "gelu_new"),
    ("layer_norm_epsilon", 1e-6, 1e-5), ("layer_norm_epsilon", math.nan, 1e-5),
    ("tie_word_embeddings", False, True), ("scale_attn_weights", False, True),
    ("scale_attn_by_inverse_layer_idx", True, False), ("vocab_size", "61", 61), ("n_layer", [2], 2),
    ("n_layer", "2\n3", 2)], ids=repr)
def test_a_config_that_contradicts_is_refused(field, found, expected, tmp_path):
    tensors = as_hugging_face(file_model().params)
    assert loaded(weights_folder(tmp_path, tensors, **REAL_CONFIG)).config.num_heads == 3
    refused_file(weights_folder(tmp_path, tensors, **REAL_CONFIG | {field: found}), tmp_path,
                 f"{field} = {found!r}", f"expected {expected!r}")


# ----------------------------------------------------------------------------------------------------
# llm.c


@pytest.mark.parametrize("version, dtype", [(1, "F32"), (3, "F32"), (5, "BF16")])
def test_every_version_of_llm_c_s_model_is_read(version, dtype, tmp_path):
    model = file_model()
    read = loaded(written(tmp_path / "gpt2.bin", llmc_model(model, version)))
    assert read.config == model.config
    assert_same_bits(read.params, all_rounded_to(dtype, model.params))


@pytest.mark.parametrize("V, L, stem", [(61, 2, "gpt2_0M"), (128, 1, "gpt2_0M"), (50257, 2, "gpt2_1M")])
def test_write_tensors_byte_for_byte(V, L, stem, tmp_path):
    model, (inputs, targets) = file_model(V=V, L=L), random_tokens(B=2, T=8, V=V)
    model.forward(*random_tokens(B=2, T=8, V=V, seed=3))
    model.backward()  # and the gradients of this other batch must not remain
    paths = prepro.write_tensors(model, inputs, targets, str(tmp_path / "new"))
    assert list(paths) == [str(tmp_path / "new" / stem) + end for end in (".bin", "_debug_state.bin")]
    weights, state = (open(path, "rb").read() for path in paths)
    assert weights == llmc_model(model, 3)

    start = 1024 + 2 * 4 * inputs.size
    end = start + 4 * inputs.size * V
    logits, loss = state[start:end], state[end:end + 4]  # these are judged below
    between = encoded_as("I32", inputs) + encoded_as("I32", targets) + logits + loss
    padded = -(-V // 128) * 128
    assert state == llmc_bytes([20240327, 2, 2, 8], model.grads, "F32", padded, between)

    reference, seen = TorchGPT2(model.config, model.params).double(), {}
    true_loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets),
                          lambda name, x: seen.update({name: x}) or x)
    true_loss.backward()
    assert_all_close({"logits": np.frombuffer(logits, "<f4").reshape(2, 8, V)},
                     {"logits": seen["logits"].detach().numpy()})
    assert np.frombuffer(loss, "<f4")[0] == pytest.approx(true_loss.item(), rel=1e-6)
    assert_all_close(model.grads, torch_grads(reference, model.params))


# ----------------------------------------------------------------------------------------------------
# Every format: round trips, memory


def through_write_tensors(model, folder):
    inputs, targets = random_tokens(B=2, T=8, V=model.config.vocab_size)
    return loaded(prepro.write_tensors(model, inputs, targets, str(folder))[0])


def through_save_pretrained(model, folder):
    model.save_pretrained(str(folder))
    return loaded(folder)


def run_state(model, **settings):
    """What train() has at hand when it saves a checkpoint."""
    defaults = {name: value for name, value in gpt2.DEFAULTS.items() if name not in gpt2.MAY_CHANGE}
    defaults |= {"batch_size": model.batch_size, "sequence_length": model.sequence_length}
    return {"step": 7, "position": [0, 112], "evaluated": True, "tokens": 1000,
            "log": ["s:0 tel:4.1589", "s:0 trl:4.1601", "s:7 tel:3.9210"], "settings": defaults | settings}


def through_a_checkpoint(model, folder):
    gpt2.save_checkpoint(model, str(folder), run_state(model))
    return gpt2.load_checkpoint(gpt2.checkpoints(str(folder))[0], {})[1]


@pytest.mark.parametrize("sizes", [{}, {"V": 128, "L": 1, "NH": 1, "C": 64}], ids=str)
@pytest.mark.parametrize("through", [through_save_pretrained, through_write_tensors, through_a_checkpoint])
def test_round_trips_keep_every_bit(through, sizes, tmp_path):
    model = file_model(**sizes)
    model.params["wpe"][-1, :4] = -0.0, 1e-45, -1e-39, np.finfo(np.float32).max  # a position not used here
    before = copies(model.params)
    read = through(model, tmp_path)
    assert read.config == model.config
    assert_same_bits(read.params, before)
    assert_same_bits(model.params, before)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_model_of_float64_is_saved_in_float32(tmp_path):
    model = gpt2.GPT2(gpt2.GPT2Config(8, 61, 2, 3, 24), 2, 8, seed=5, dtype=np.float64)
    for through in (through_save_pretrained, through_write_tensors):
        read = through(model, tmp_path / through.__name__)
        assert_same_bits(read.params, {name: view.astype(np.float32) for name, view in model.params.items()})


def peak_of(call):
    """(what call returns, the most memory that Python and NumPy held at once while it ran, in bytes)."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "llmc_1", "llmc_3", "llmc_5"])
def test_loading_never_holds_a_second_copy(dtype, tmp_path):
    """While weights are read there is the blob, and beside it pieces: of a tensor of 48 MB, a fraction."""
    model, path = file_model(V=500_000), tmp_path / ("big.bin" if "llmc" in dtype else "model.safetensors")
    if "llmc" in dtype:
        written(path, llmc_model(model, int(dtype[-1])))
    else:
        tied = {"lm_head.weight": model.params["wte"]}
        weights_folder(tmp_path, tied | as_hugging_face(model.params), dtype)
    config, tensors = gpt2.open_weights(str(path if "llmc" in dtype else tmp_path))
    assert config == model.config
    model.flat[...] = np.nan
    _, peak = peak_of(lambda: gpt2.load_weights(model, tensors))
    path.unlink()
    assert np.isfinite(model.flat[0]).all() and peak < 0.4 * model.params["wte"].nbytes


def test_saving_copies_one_tensor_at_a_time(tmp_path):
    model = file_model(L=6, C=192, NH=3)
    _, peak = peak_of(lambda: model.save_pretrained(str(tmp_path)))
    assert peak < 1.2 * model.params["fcw"][0].nbytes


def test_the_state_for_porters_never_holds_all_logits(tmp_path):
    """They are the largest array of all: 823 MB at B=4, T=1024."""
    model, (inputs, targets) = random_model(8, 192, np.float32, V=4096), random_tokens(B=8, T=192, V=4096)
    model.forward(inputs, targets)
    _, peak = peak_of(lambda: prepro.write_tensors(model, inputs, targets, str(tmp_path)))
    assert peak < 0.5 * 4 * inputs.size * 4096  # in six pieces: one is written while the next is computed


MEASURED = """
import resource, subprocess, sys
print(subprocess.check_output([sys.executable, "-c", sys.argv[1], sys.argv[2]], text=True))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
GENERATED = """
import sys, train_gpt2  # what the command line does, but for the tokenizer
model = train_gpt2.prepare({"model": sys.argv[1], "inference_only": 1})[1]
print(model.sequence_length, *model.generate([464, 3290], 3, temperature=0))
"""


def test_a_gpt2_that_speaks_takes_less_than_700_megabytes(tmp_path):
    """The weights are 498 of them; lm_head.weight, which is compared with wte, comes and goes before. A small
    process starts the one that is measured, since a child of this one would begin with our own peak."""
    pytest.importorskip("resource", reason="measures another process's memory: run it on Linux or macOS")
    path, rng = tmp_path / "gpt2.safetensors", np.random.default_rng(1)
    block = 0.1 * rng.standard_normal(999_983, np.float32)
    shapes = gpt2.param_shapes(gpt2.GPT2Config())
    tensors = as_hugging_face({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})
    tensors |= {"h.0.attn.bias": np.zeros((1, 1, 1024, 1024)), "lm_head.weight": tensors["wte.weight"]}
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    with open(path, "wb") as f:
        f.write(pack_safetensors(header))
        for tensor in tensors.values():
            f.write(np.resize(block, tensor.shape))
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(os.path.abspath(gpt2.__file__)))
    output = subprocess.check_output([sys.executable, "-c", MEASURED, GENERATED, str(path)], env=environment)
    path.unlink()
    T, *tokens, peak = map(int, output.split()[-5:])
    assert T == 1024 and 0 <= min(tokens) <= max(tokens) < 50257
    assert 498e6 < peak * (1 if sys.platform == "darwin" else 1024) < 700e6


# ----------------------------------------------------------------------------------------------------
# Malformed files: what is wrong with it, and what the refusal must say

QKV, LAST = "h.1.attn.c_attn.weight", "h.1.mlp.c_proj.bias"  # F32 [24, 72], and the last tensor in the file


def with_header(text):
    return lambda h, b: pack_safetensors(text, b)


def with_entry(name=QKV, **fields):
    """A tensor described otherwise; a field that is ... is left out."""
    def build(h, b):
        entry = {key: value for key, value in (h[name] | fields).items() if value is not ...}
        return pack_safetensors(h | {name: entry}, b)
    return build


def with_place(move, name=QKV):
    """A tensor elsewhere: move(its offsets) are its offsets."""
    return lambda h, b: with_entry(name, data_offsets=move(h[name]["data_offsets"]))(h, b)


def with_tensors(change):
    """A sound file of tensors that are not the right ones. change({name: array}) says what differs."""
    def build(h, b):
        tensors = as_hugging_face(file_model().params)
        tensors |= change(tensors)
        return pack_safetensors(*safetensors_parts({n: t for n, t in tensors.items() if t is not None}))
    return build


def with_value(value, dtype="F32", name=QKV):
    """A sound file with an odd number in the last place of a tensor."""
    return with_tensors(lambda tensors: {name: (dtype, odd_at_the_end(tensors[name], value))})


MALFORMED_SAFETENSORS = {
    "empty": (lambda h, b: b"", "0 bytes"),
    "seven_bytes": (lambda h, b: b"\x02\0\0\0\0\0\0", "7 bytes"),
    "a_zip": (lambda h, b: b"PK\x03\x04" + bytes(200), "no .safetensors file"),
    "header_beyond_the_file": (lambda h, b: struct.pack("<Q", 9000) + b"{}", "10 bytes", "9000"),
    "header_one_too_long": (lambda h, b: struct.pack("<Q", 3) + b"{}", "10 bytes", "header of 3"),
    "header_endless": (lambda h, b: b"\xff" * 8 + pack_safetensors(h, b)[8:], 2 ** 64 - 1),
    "header_over_a_megabyte": (lambda h, b: pack_safetensors(json.dumps(h).encode() + b" " * 2 ** 20, b),
                               "a header of 10"),
    "header_empty": (with_header(b""), "expected JSON"),
    "header_no_json": (lambda h, b: pack_safetensors(json.dumps(h).encode()[:-1], b), "expected JSON"),
    "header_no_utf8": (with_header(b'{"\xff": 1}'), "expected JSON", "0xff"),
    "header_a_list": (with_header(b"[]"), "expected a JSON object, found list"),
    "header_a_string": (with_header(b'"wte"'), "expected a JSON object, found str"),
    "header_a_number": (with_header(b"1"), "expected a JSON object, found int"),
    "header_nested": (with_header(b'{"a":' * 100_000), "expected JSON"),
    "header_of_brackets": (with_header(b"[" * 1_000_000), "expected JSON"),
    "header_of_digits": (with_header(b'{"a": ' + b"9" * 5000 + b"}"), "expected JSON", "digits"),
    "metadata_no_object": (lambda h, b: pack_safetensors({"__metadata__": [1]} | h, b), "__metadata__"),
    "tensor_no_object": (lambda h, b: pack_safetensors(h | {QKV: 5}, b), QKV, "found 5"),
    "tensor_of_two_lines": (lambda h, b: pack_safetensors(h | {QKV: "two\nlines"}, b), QKV, r"two\nlines"),
    "name_of_two_lines": (with_tensors(lambda t: {"two\nlines": t["ln_f.bias"]}), r"two\nlines", "no part"),

    "offsets_overlap": (with_place(lambda o: [o[0] - 4, o[1] - 4]), QKV, "lies at"),
    "offsets_leave_a_hole": (with_place(lambda o: [o[0] + 4, o[1] + 4]), QKV, "lies at"),
    "offsets_out_of_range": (with_place(lambda o: [o[0] + 4000, o[1] + 4000], LAST), LAST, "lies at"),
    "offsets_far_away": (with_place(lambda o: [1 << 30, 2 << 30]), "expected"),
    "offsets_shared": (with_entry("wpe.weight", data_offsets=[0, 5856]), "wpe.weight", "lies at [0, 5856]"),
    "offsets_reversed": (with_place(lambda o: o[::-1]), QKV, "lies at"),
    "offsets_begin_too_early": (with_place(lambda o: [o[0] - 4, o[1]]), QKV, "lies at"),
    "offsets_negative": (with_entry(data_offsets=[-6912, 0]), QKV, "[-6912, 0]"),
    "offsets_fractions": (with_entry(data_offsets=[0.0, 6912.0]), QKV, "[0.0, 6912.0]"),
    "offsets_text": (with_entry(data_offsets=["0", "6912"]), QKV, "'6912'"),
    "offsets_false_for_zero": (with_entry("wte.weight", data_offsets=[False, 5856]), "[False, 5856]"),
    "offsets_null": (with_entry(data_offsets=None), QKV, "None"),
    "offsets_missing": (with_entry(data_offsets=...), QKV, "data_offsets"),
    "offsets_huge": (with_entry(data_offsets=[0, 10 ** 30]), QKV, 10 ** 30),
    "offsets_one": (with_entry(data_offsets=[0]), QKV, "lies at [0]"),
    "offsets_three": (with_entry(data_offsets=[0, 6912, 6912]), QKV, "lies at [0, 6912, 6912]"),
    "shape_too_large": (with_entry(shape=[25, 72]), QKV, "[25, 72]", "lies at"),
    "shape_too_small": (with_entry(shape=[24, 71]), QKV, "[24, 71]", "lies at"),
    "shape_negative": (with_entry(shape=[-24, -72]), QKV, "[-24, -72]"),
    "shape_fractions": (with_entry(shape=[24.0, 72.0]), QKV, "[24.0, 72.0]"),
    "shape_huge": (with_entry(shape=[1 << 40, 1 << 40]), QKV, 1 << 40),
    "shape_of_many_axes": (with_entry(shape=[1] * 2000), QKV, "expected dtype, shape"),
    "shape_no_list": (with_entry(shape={"0": 24}), QKV, "{'0': 24}"),
    "shape_missing": (with_entry(shape=...), QKV, "expected dtype, shape"),
    "dtype_of_another_size": (with_entry(dtype="F16"), QKV, "F16 [24, 72]", "lies at"),
    "dtype_unknown": (with_entry(dtype="F8_E4M3"), QKV, "unknown dtype 'F8_E4M3'"),
    "dtype_no_text": (with_entry(dtype=["F32"]), QKV, "unknown dtype ['F32']"),
    "dtype_missing": (with_entry(dtype=...), QKV, "unknown dtype None"),
    "truncated": (lambda h, b: pack_safetensors(h, b[:-1]), "bytes, its header describes"),
    "truncated_to_the_header": (lambda h, b: pack_safetensors(h), "bytes, its header describes"),
    "trailing_byte": (lambda h, b: pack_safetensors(h, b + b"\0"), "bytes, its header describes"),

    "weight_of_integers": (with_tensors(lambda t: {QKV: ("I32", t[QKV])}), QKV, "is I32", "F32, F16, BF16"),
    "weight_in_float64": (with_tensors(lambda t: {QKV: ("F64", t[QKV])}), QKV, "is F64", "F32, F16, BF16"),
    "weight_missing": (with_tensors(lambda t: {QKV: None}), QKV, "(24, 72)", "found none"),
    "weight_transposed": (with_tensors(lambda t: {QKV: t[QKV].T}), QKV, "shape (24, 72)", "(72, 24)"),
    "weight_flat": (with_tensors(lambda t: {QKV: t[QKV].ravel()}), QKV, "shape (24, 72)", "(1728,)"),
    "weight_there_twice": (with_tensors(lambda t: {"transformer." + QKV: t[QKV]}), QKV, "twice"),
    "bias_missing": (with_tensors(lambda t: {"ln_f.bias": None}), "ln_f.bias", "(24,)", "found none"),
    "wte_missing": (with_tensors(lambda t: {"wte.weight": None}), "wte.weight", "shapes () and (11, 24)"),
    "wte_of_three_axes": (with_tensors(lambda t: {"wte.weight": t["wte.weight"][None]}), "(1, 61, 24)"),
    "wpe_without_rows": (with_tensors(lambda t: {"wpe.weight": t["wpe.weight"][:0]}), "n_positions = 11"),
    "one_tensor_more": (with_tensors(lambda t: {"h.1.surprise": t["ln_f.bias"]}), "h.1.surprise", "no part"),
    "one_layer_more": (with_tensors(lambda t: {"h.2.ln_1.weight": t["ln_f.bias"]}), "n_layer = 2", "3"),
    "no_layers": (with_tensors(lambda t: {n: None for n in t if "h." in n}), "n_layer = 2, expected 0"),
    "nan": (with_value(math.nan), "qkvw of layer 1", "not finite"),
    "inf": (with_value(math.inf), "qkvw of layer 1", "not finite"),
    "minus_inf_in_float16": (with_value(-math.inf, "F16"), "qkvw of layer 1", "not finite"),
    "nan_in_bfloat16": (with_value(math.nan, "BF16"), "qkvw of layer 1", "not finite"),
    "nan_in_a_bias": (with_value(math.nan, name="ln_f.bias"), "lnfb", "not finite"),
    "nan_in_wte": (with_value(math.nan, name="wte.weight"), "wte", "not finite"),
}
LLMC_FIELDS = ["magic", "version", "max_seq_len", "vocab_size", "num_layers", "num_heads", "channels",
               "padded_vocab_size"]
HUGE = 2 ** 31 - 1


def with_number(field, value):
    """One number of an llm.c header changed."""
    at = 4 * LLMC_FIELDS.index(field)
    return lambda data: data[:at] + struct.pack("<i", value) + data[at + 4:]


def with_bias(version, value):
    def build(data):
        model = file_model()
        model.params["fcprojb"][1, -1] = value
        return llmc_model(model, version)
    return build


MALFORMED_BIN = {
    "empty": (lambda d: b"", "begins with 0", "20240326"),
    "three_bytes": (lambda d: d[:3], "begins with 0", "20240326"),
    "wrong_magic": (with_number("magic", 20240520), "begins with 20240520", "20240326"),
    "big_endian": (lambda d: np.frombuffer(d, "<i4").astype(">i4").tobytes(), "20240326"),
    **{f"version_{v}": (with_number("version", v), f"version {v},", "1 or 3") for v in (0, 2, 4, -3, HUGE)},
    **{f"{field}_{v}": (with_number(field, v), f"{field} is {v}", "positive")
       for field in LLMC_FIELDS[2:7] for v in (0, -1, -2 ** 31)},
    **{f"{field}_{v}": (with_number(field, v), "bytes, its header describes")
       for field in ("max_seq_len", "num_layers") for v in (129, 65535, HUGE)},
    **{f"vocab_size_{v}": (with_number("vocab_size", v), f"padded vocabulary of 128 for {v}")
       for v in (129, 65535, HUGE)},
    "heads_do_not_divide": (with_number("num_heads", 5), "24 channels", "5 heads"),
    "heads_huge": (with_number("num_heads", HUGE), "24 channels", f"{HUGE} heads"),
    "channels_huge": (with_number("channels", 3 << 29), "bytes, its header describes"),
    "padding_zero": (with_number("padded_vocab_size", 0), "padded vocabulary of 0 for 61"),
    "padding_negative": (with_number("padded_vocab_size", -128), "padded vocabulary of -128 for 61"),
    "padding_too_small": (with_number("padded_vocab_size", 60), "padded vocabulary of 60 for 61"),
    "padding_too_large": (with_number("padded_vocab_size", 129), "bytes, its header describes"),
    "padding_huge": (with_number("padded_vocab_size", HUGE), "bytes, its header describes"),
    "header_alone": (lambda d: d[:1024], "1024 bytes, its header describes"),
    "half_a_header": (lambda d: d[:512], "512 bytes, its header describes"),
    "truncated": (lambda d: d[:-1], "bytes, its header describes"),
    "trailing": (lambda d: d + bytes(4), "bytes, its header describes"),
    "version_1_with_padding": (with_number("version", 1), "bytes, its header describes"),
    "version_5_in_float32": (with_number("version", 5), "bytes, its header describes"),
    "nan": (with_bias(3, math.nan), "fcprojb of layer 1", "not finite"),
    "minus_inf": (with_bias(1, -math.inf), "fcprojb of layer 1", "not finite"),
    "nan_in_bfloat16": (with_bias(5, math.nan), "fcprojb of layer 1", "not finite"),
}


def refused_everywhere(source, capsys, *parts):
    """Refused by from_pretrained and, in the same words, by the command line: one line, exit code 1."""
    line = refused_file(source, *parts)
    capsys.readouterr()
    assert gpt2.main(["--model", source, "--inference_only", "1", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("damage", MALFORMED_SAFETENSORS)
def test_a_malformed_safetensors_file_is_refused(damage, tmp_path, capsys):
    change, *parts = MALFORMED_SAFETENSORS[damage]
    sound = safetensors_parts(as_hugging_face(file_model().params))
    source = weights_folder(tmp_path, {}, **REAL_CONFIG)
    written(tmp_path / "model.safetensors", pack_safetensors(*sound))
    assert loaded(source).config.num_layers == 2
    written(tmp_path / "model.safetensors", change(*sound))
    refused_everywhere(source, capsys, tmp_path, *parts)


@pytest.mark.parametrize("damage", MALFORMED_BIN)
def test_a_malformed_llm_c_file_is_refused(damage, tmp_path, capsys):
    change, *parts = MALFORMED_BIN[damage]
    sound = llmc_model(file_model(), 3)
    assert loaded(written(tmp_path / "model.bin", sound)).config.num_layers == 2
    refused_everywhere(written(tmp_path / "model.bin", change(sound)), capsys, *parts)


@pytest.mark.parametrize("text, part", [
    (b"", "expected JSON"), (b"{", "expected JSON"), (b"\xff{}", "expected JSON"),
    (b'{"n_head": ' + b"3" * 5000 + b"}", "expected JSON"), (b"[]", "JSON object, found list"),
    (b'{"n_head": 5}', "24 channels can't be shared by 5 heads"), (b'{"n_head": 0}', "num_heads is 0"),
    (b'{"n_head": -3}', "num_heads is -3"), (b'{"n_head": 30000000000000000000}', "3" + "0" * 19 + " heads"),
    (b'{"n_head": 3.0}', "how many heads"), (b'{"n_head": true}', "how many heads"),
    (b'{"n_head": "3"}', "how many heads"), (b'{"n_head": null}', "how many heads"), (b"{}", "how many heads")
], ids=lambda x: ascii(x[:20]) if isinstance(x, bytes) else "")
def test_a_malformed_config_is_refused(text, part, tmp_path, capsys):
    source = weights_folder(tmp_path, as_hugging_face(file_model().params))
    written(tmp_path / "config.json", text)
    refused_everywhere(source, capsys, part)


@pytest.mark.parametrize("shard", [
    "../there.safetensors", "/there.safetensors", "a/there.safetensors", "..", "", ".", "a\0b.safetensors",
    "\ud800.safetensors", "there.bin", "two\nlines.safetensors", 5, None, ["there.safetensors"]], ids=ascii)
def test_a_shard_must_be_a_file_beside_its_index(shard, tmp_path, capsys):
    """Wherever it points, a whole model is there: it is the name that is refused."""
    folder, tensors = tmp_path / "folder", as_hugging_face(file_model().params)
    source = sharded_folder(folder, tensors, {})
    (folder / "a").mkdir()
    for place in ("there.safetensors", "there.bin", "a/there.safetensors", "../there.safetensors"):
        written(folder / place, (folder / SHARDS[0]).read_bytes())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "there.safetensors")}))
    assert loaded(source).config.num_layers == 2
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    refused_everywhere(source, capsys, index, "expected a weight_map", "beside it")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}',
                                  b'{"weight_map": {}}'], ids=ascii)
def test_a_malformed_index_is_refused(text, tmp_path, capsys):
    source = sharded_folder(tmp_path, *halves(as_hugging_face(file_model().params)))
    written(tmp_path / "model.safetensors.index.json", text)
    refused_everywhere(source, capsys, "model.safetensors.index.json: expected")


def test_shards_must_fit_together(tmp_path, capsys):
    first, second = halves(as_hugging_face(file_model().params))
    name, *rest = second
    twice = sharded_folder(tmp_path / "twice", first | {name: second[name]}, second)
    refused_everywhere(twice, capsys, name, "twice")
    lost = sharded_folder(tmp_path / "lost", first, {name: second[name] for name in rest})
    refused_everywhere(lost, capsys, name, "found shapes" if name == "wpe.weight" else "found none")
    gone = sharded_folder(tmp_path / "gone", first, second)
    os.remove(tmp_path / "gone" / SHARDS[1])
    refused_file(gone, SHARDS[1], error=FileNotFoundError)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_missing_is_named(missing, tmp_path, capsys):
    source = weights_folder(tmp_path, as_hugging_face(file_model().params))
    os.remove(tmp_path / missing)
    refused_file(source, missing, error=FileNotFoundError)
    assert gpt2.main(["--model", source, "--inference_only", "1"]) == 1
    assert re.fullmatch(f"error: .*{missing}.*\n", capsys.readouterr().err)
    refused_everywhere(str(tmp_path / "nowhere"), capsys, "nowhere': no such file", "gpt2[-medium, -large, -xl], d6")


@pytest.mark.parametrize("name, data", [
    ("bad.safetensors", pack_safetensors(b"[" * 1_000_000)),
    ("bad.safetensors", pack_safetensors({"two\nlines \ud800 \u2028": {"dtype": "F32"}})),
    ("bad.bin", struct.pack("<256i", 20240326, 3, 1024, 50257, 12, 12, 768, 50304, *[0] * 248)),
], ids=["brackets", "odd_name", "header_alone"])
def test_the_program_itself_refuses_in_one_line(name, data, tmp_path):
    flags = ["--model", written(tmp_path / name, data), "--inference_only", "1", "--prompt", "x"]
    ran = subprocess.run([sys.executable, gpt2.__file__, *flags], capture_output=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, b"") and re.fullmatch(rb"error: [ -~]*\n", ran.stderr)
    assert os.listdir(tmp_path) == [name]


def test_the_program_itself_lets_a_sound_file_speak(tmp_path):
    """The same command line, so that it isn't the command line that was refused. 256 ids are bytes."""
    source = weights_folder(tmp_path, as_hugging_face(file_model(V=256).params))
    flags = ["--model", source, "--inference_only", "1", "--prompt", "x", "--max_new_tokens", "3"]
    ran = subprocess.run([sys.executable, gpt2.__file__, *flags], capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, b"") and ran.stdout.splitlines()[-1].startswith(b"x")


# ----------------------------------------------------------------------------------------------------
# Malformed token files


def token_file(tokens, *header):
    header = header or (20240520, 1, len(tokens))
    return struct.pack("<256i", *header, *[0] * (256 - len(header))) + np.array(tokens, "<u2").tobytes()


MALFORMED_TOKENS = {
    "empty": (lambda d: b"", "no token file", "20240520"),
    "short": (lambda d: d[:1023], "no token file"),
    "magic": (lambda d: token_file(range(50), 20240326, 1, 50), "magic number [20240326]", "20240520"),
    "version": (lambda d: token_file(range(50), 20240520, 2, 50), "version 2", "expected 1"),
    "count_too_small": (lambda d: token_file(range(50), 20240520, 1, 49), "1124 bytes", "49 tokens make"),
    "count_negative": (lambda d: token_file(range(50), 20240520, 1, -50), "1124 bytes", "-50 tokens"),
    "count_huge": (lambda d: token_file(range(50), 20240520, 1, HUGE), "1124 bytes", f"{HUGE} tokens"),
    "truncated": (lambda d: d[:-1], "1123 bytes", "50 tokens make 1124"),
    "trailing": (lambda d: d + b"\0", "1125 bytes", "50 tokens make 1124"),
    "none": (lambda d: token_file([]), "0 tokens"),
    "no_batch": (lambda d: token_file(range(16)), "16 tokens", "B*T + 1 = 17"),
    "beyond_the_vocabulary": (lambda d: token_file([*range(49), 61]), "token 61", "ends at 60"),
    "far_beyond": (lambda d: token_file([65535, *range(49)]), "token 65535", "ends at 60"),
}


@pytest.mark.parametrize("damage", MALFORMED_TOKENS)
def test_a_malformed_token_file_is_refused(damage, tmp_path):
    change, *parts = MALFORMED_TOKENS[damage]
    sound = token_file(range(50))
    inputs, targets = gpt2.DataLoader(written(tmp_path / "tokens.bin", sound), 2, 8, 61).next_batch()
    assert np.array_equal(inputs.ravel(), range(16)) and np.array_equal(targets.ravel(), range(1, 17))
    path = written(tmp_path / "tokens.bin", change(sound))
    with pytest.raises(gpt2.InputError) as caught:
        gpt2.DataLoader(path, 2, 8, 61)
    line = str(caught.value)
    assert line.isprintable() and [part for part in [path, *parts] if part not in line] == [], line


# ----------------------------------------------------------------------------------------------------
# Crafted headers: a small file must not cost much

LONG_JSON = {  # texts of some n bytes
    "brackets": lambda n: b"[" * n,
    "closed": lambda n: b'{"a":' + b"[" * (n // 2) + b"]" * (n // 2) + b"}",
    "barely_parsed": lambda n: b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}" + b" " * n,
    "objects": lambda n: b'{"a":' * (n // 5),
    "lists": lambda n: b'{"a": [' + b"[]," * (n // 3) + b"1]}",
    "digits": lambda n: b"9" * n,
    "fraction": lambda n: b'{"a": 0.' + b"9" * n + b"}",
    "text": lambda n: b'{"' + b"a" * n + b'": 1}',
    "escapes": lambda n: b'{"' + b"\\u2028" * (n // 6) + b'": 1}',
}
NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
A_LOT = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}
NO_COLUMNS = {name: NOTHING | {"shape": [1 << 47, 0]} for name in ("wte.weight", "wpe.weight")}


def llmc_header(*numbers):
    return lambda: struct.pack("<256i", 20240326, 3, *numbers, *[0] * (254 - len(numbers)))


CRAFTED = {  # name: (file, what makes its bytes). They promise more than there is, or say little at length
    **{name: ("model.safetensors", lambda text=text: pack_safetensors(text(1_000_000)))
       for name, text in LONG_JSON.items()},
    **{f"{file}_{name}": (file + ".json", lambda text=text: text(15_000_000))
       for file in ("config", "model.safetensors.index") for name, text in LONG_JSON.items()},
    "length": ("model.safetensors", lambda: b"\xff" * 7 + b"\x7f" + b"{}"),
    "shape": ("model.safetensors", lambda: pack_safetensors({"wte.weight": A_LOT, "wpe.weight": A_LOT})),
    "no_columns": ("model.safetensors", lambda: pack_safetensors(NO_COLUMNS)),
    "empty_layers": ("model.safetensors", lambda: pack_safetensors(
        NO_COLUMNS | {f"h.{l}.ln_1.weight": NOTHING for l in range(10_000)})),
    "many_layers": ("model.bin", llmc_header(1024, 50257, 65535, 12, 768, 50304)),
    "most_layers": ("model.bin", llmc_header(1, 1, HUGE, 1, 1, 1)),
    "all_huge": ("model.bin", llmc_header(HUGE, HUGE, HUGE, HUGE, HUGE, HUGE)),
    "much_padding": ("model.bin", llmc_header(1024, 1, 12, 1, 1, HUGE)),
    "tokens": ("tokens.bin", lambda: struct.pack("<256i", 20240520, 1, HUGE, *[0] * 253)),
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_a_crafted_header_costs_no_more_than_its_file(crafted, tmp_path):
    """JSON becomes objects of up to 25 times its length, hence the limit of 1 MB for it; all else is bounded
    by the file. And time: a loop that counts to what a header says would take minutes, or for ever."""
    name, make = CRAFTED[crafted]
    data, folder = make(), weights_folder(tmp_path, as_hugging_face(file_model().params))
    if "index" in name:
        os.remove(tmp_path / "model.safetensors")
    path = written(tmp_path / name, data)

    def read():
        with pytest.raises(gpt2.InputError) as caught:
            if name == "tokens.bin":
                gpt2.open_tokens(path, 2)
            gpt2.open_weights(path if name == "model.bin" else folder)
        return str(caught.value)

    began = time.process_time()
    assert read().isprintable() and time.process_time() - began < 5
    _, peak = peak_of(read)
    assert peak < 2 * len(data) + 32 * min(len(data), 1 << 20) + (4 << 20)


# ----------------------------------------------------------------------------------------------------
# Fuzzing: what chance does to a file
#
# Each damaged file is read as it is now, or refused. A reader of our own says what it is now.

MUTATIONS = 2500 if os.environ.get("LONG_TESTS") == "1" else 200  # per format
JSON_WORD = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|[][{}:,]|\w+')
ODD_WORDS = [b"null", b"true", b"-1", b"0", b"1", b"2", b"1.5", b"1e999", b"NaN", b"[]", b"{}", b'""', b"",
             b'"F16"', b'"BF16"', b'"I32"', b'"\\ud800"', b'"a\\u0000b"', b"9" * 20, b"9" * 5000, b"[" * 2000]
ODD_INTEGERS = [0, 1, -1, 2, 3, 127, 128, 255, 256, 32767, 65535, 65536, HUGE, -2 ** 31, 1 << 24, 20240326]


def with_odd_json(rng, text):
    """One word of a JSON text replaced by an odd one, by a number, or by another of its words."""
    words = list(JSON_WORD.finditer(text))
    word = rng.choice(words)
    new = rng.choice([rng.choice(ODD_WORDS), rng.choice(words)[0], b"%d" % rng.choice(ODD_INTEGERS)])
    return text[:word.start()] + new + text[word.end():]


def with_odd_integer(rng, data):
    """One of the first eight int32 replaced by an odd one, or by a relative of its own."""
    at = 4 * rng.randrange(max(1, min(len(data) // 4, 8)))
    old = int.from_bytes(data[at:at + 4], "little", signed=True)
    new = rng.choice([*ODD_INTEGERS, old + 1, old - 1, -old, 2 * old]) % 2 ** 32
    return data[:at] + struct.pack("<I", new) + data[at + 4:]


def mutated(rng, name, data):
    """A file after an accident or more: to bits, bytes, ranges, a header's integers, the words of JSON."""
    n, at = min(len(data), rng.choice([1, 2, 4, 8, 100, 2000])), rng.randrange(len(data))
    at = rng.choice([at, at % 64])  # half of them at the beginning
    how = rng.choice(["bit", "bytes", "cut", "double", "drop", "integer", "json", "json"])
    if how == "json" and name.endswith(".json"):
        data = with_odd_json(rng, data)
    elif how == "json" and name.endswith(".safetensors"):
        end = 8 + struct.unpack_from("<Q", data)[0]
        data = pack_safetensors(with_odd_json(rng, data[8:end]), data[end:])
    elif how == "integer":
        data = with_odd_integer(rng, data)
    elif how == "cut":
        data = data[:at]
    else:
        bit = bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:at + n]
        middle = {"bytes": rng.randbytes(n), "double": data[at:at + n] * 2, "drop": b""}.get(how, bit)
        data = data[:at] + middle + data[at + n:]
    return mutated(rng, name, data) if rng.random() < 0.2 and len(data) > 1000 else data


def fuzz(folder, names, read, check, harmless=1):
    """Damage the folder's files, one at a time. read() may refuse; if not, check(its result) must hold.
    harmless: how many at least must be read, to prove that check is asked at all."""
    sound, rng, accepted = {name: (folder / name).read_bytes() for name in names}, random.Random(1), 0
    allowed = 8 * sum(map(len, sound.values())) + (4 << 20)  # bytes of memory
    check(read())
    tracemalloc.start()
    try:
        for i in range(MUTATIONS):
            name, result = rng.choice(names), None
            written(folder / name, mutated(rng, name, sound[name]))
            began, before = time.process_time(), tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                result = read()
            except (gpt2.InputError, OSError) as error:
                assert str(error).isprintable(), (i, name)
            except Exception as error:
                raise AssertionError(f"mutation {i}, of {name}, is neither read nor refused") from error
            assert time.process_time() - began < 5, (i, name)
            assert tracemalloc.get_traced_memory()[1] - before < allowed, (i, name)
            if result is not None:
                check(result)
                accepted += 1
            written(folder / name, sound[name])
    finally:
        tracemalloc.stop()
    assert harmless <= accepted < MUTATIONS / 2  # or they were hardly mutations


def fuzz_model():
    model = file_model(V=29, C=12, max_seq_len=9)
    model.flat[1:] = 0
    return model


def test_fuzzed_token_files(tmp_path):
    path = written(tmp_path / "tokens.bin", token_file(np.random.default_rng(1).integers(0, 61, 41)))

    def read():
        loader = gpt2.DataLoader(path, 2, 4, 61)
        return [loader.next_batch() for _ in range(12)]

    def check(batches):
        tokens = np.frombuffer((tmp_path / "tokens.bin").read_bytes()[1024:], "<u2")
        for i, (inputs, targets) in enumerate(batches):
            start = 8 * (i % ((len(tokens) - 1) // 8))
            assert inputs.shape == targets.shape == (2, 4) and max(inputs.max(), targets.max()) < 61
            assert np.array_equal(inputs.ravel(), tokens[start:start + 8])
            assert np.array_equal(targets.ravel(), tokens[start + 1:start + 9])

    fuzz(tmp_path, ["tokens.bin"], read, check)


def read_plainly(data):
    """{name: float32 array} of a sound .safetensors file."""
    n = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:8 + n])
    header.pop("__metadata__", None)
    tensors = {}
    for name, t in header.items():
        part = bytearray(data[8 + n:][slice(*t["data_offsets"])])
        part = torch.frombuffer(part, dtype=TORCH_TYPES[t["dtype"]])
        tensors[name] = part.reshape(t["shape"]).float().numpy()
    return tensors


def test_fuzzed_safetensors(tmp_path):
    tensors = as_hugging_face(fuzz_model().params, "transformer.")
    tensors = {name: (["F32", "F16", "BF16"][i % 3], t) for i, (name, t) in enumerate(tensors.items())}
    told = {"vocab_size": 29, "n_positions": 9, "n_embd": 12, "n_layer": 2, "n_inner": None}
    source = weights_folder(tmp_path, tensors, **told)

    def check(model):
        assert model.config.num_heads == json.loads((tmp_path / "config.json").read_bytes())["n_head"]
        found = read_plainly((tmp_path / "model.safetensors").read_bytes())
        assert_same_bits(as_hugging_face(model.params),
                         {name.removeprefix("transformer."): t for name, t in found.items()})
        assert np.isfinite(model.flat[0]).all()

    fuzz(tmp_path, ["config.json", *["model.safetensors"] * 3], lambda: loaded(source, 1, 1), check)


@pytest.mark.parametrize("version", [1, 3, 5])
def test_fuzzed_llm_c_models(version, tmp_path):
    path = written(tmp_path / "model.bin", llmc_model(fuzz_model(), version))

    def check(model):
        data = (tmp_path / "model.bin").read_bytes()
        _, version, *sizes, padded = struct.unpack("<8i", data[:32])
        assert list(asdict(model.config).values()) == sizes
        body = torch.frombuffer(bytearray(data[1024:]), dtype=TORCH_TYPES["BF16" if version == 5 else "F32"])
        n, padding = model.params["wte"].size, (padded - sizes[1]) * sizes[4] if version > 1 else 0
        truth = torch.cat([body[:n], body[n + padding:]]).float().numpy()
        assert model.flat[0].tobytes() == truth.tobytes() and np.isfinite(truth).all()

    fuzz(tmp_path, ["model.bin"], lambda: loaded(path, 1, 1), check)


def test_fuzzed_checkpoints(tmp_path, capsys):
    """Of a checkpoint every bit counts: shape, settings, log, data position, weights and moments."""
    model = fuzz_model()
    model.flat[2:] = np.random.default_rng(1).random(model.flat[2:].shape, np.float32)
    state = run_state(model, input_bin="données.bin")
    gpt2.save_checkpoint(model, str(tmp_path), state)
    [folder] = tmp_path.iterdir()

    def check(result):
        settings, read, back = result
        assert read.config == model.config and (read.batch_size, read.sequence_length) == (2, 8)
        assert read.flat[[0, 2, 3]].tobytes() == model.flat[[0, 2, 3]].tobytes()
        assert {name: back[name] for name in state} == state
        assert vars(settings) == gpt2.DEFAULTS | state["settings"]
        capsys.readouterr()

    fuzz(folder, ["config.json", "model.safetensors", "optimizer.safetensors", "main.log"],
         lambda: gpt2.load_checkpoint(str(folder), {}), check, harmless=0)


def test_a_state_that_is_no_text_is_refused(tmp_path):
    """JSON can spell half a character, which no encoding can write."""
    gpt2.save_checkpoint(fuzz_model(), str(tmp_path), run_state(fuzz_model()))
    [folder] = tmp_path.iterdir()
    data = (folder / "optimizer.safetensors").read_bytes()
    end = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:end])
    header["__metadata__"]["state"] += "\ud800"
    written(folder / "optimizer.safetensors", pack_safetensors(header, data[end:]))
    with pytest.raises(gpt2.InputError, match="its state does not match its checksum"):
        gpt2.load_checkpoint(str(folder), {})


@pytest.mark.parametrize("moment", ["m", "v"])
@pytest.mark.parametrize("change", [
    lambda h, moment: h.update(other=h.pop(moment)), lambda h, moment: h[moment].update(dtype="I32"),
    lambda h, moment: h[moment]["shape"].append(1)], ids=["missing", "integers", "another_shape"])
def test_moments_must_be_what_they_were(moment, change, tmp_path):
    gpt2.save_checkpoint(fuzz_model(), str(tmp_path), run_state(fuzz_model()))
    [folder] = tmp_path.iterdir()
    data = (folder / "optimizer.safetensors").read_bytes()
    end = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:end])
    change(header, moment)
    written(folder / "optimizer.safetensors", pack_safetensors(header, data[end:]))
    with pytest.raises(gpt2.InputError, match=f"{moment} is not as expected"):
        gpt2.load_checkpoint(str(folder), {})


# ----------------------------------------------------------------------------------------------------
# The golden curve: OpenAI's own weights

DATA_FOLDER = os.path.join(os.path.dirname(os.path.abspath(gpt2.__file__)), "data")
GOLDEN_LOSSES = [5.270007, 4.059707, 3.375123, 2.800783, 2.315382, 1.849029, 1.394656, 0.999147, 0.624080,
                 0.376511]
GOLDEN_TOKENS = [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198,
                 464, 3290]


def overfit(model, inputs, targets, learning_rate, decay):
    """The losses before each of ten updates on one batch. llm.c's test decays all parameters; update() only
    matrices and embeddings, so the others are done here."""
    losses = []
    for step in range(1, 11):
        losses.append(model.forward(inputs, targets))
        model.backward()
        for name in ("ln1w", "ln1b", "qkvb", "attprojb", "ln2w", "ln2b", "fcb", "fcprojb", "lnfw", "lnfb"):
            model.params[name] *= 1 - learning_rate * decay
        model.update(learning_rate, weight_decay=decay, step=step)
    return losses


def test_overfitting_decays_all_parameters():
    """The golden test's own arithmetic, on a model that needs no network, beside PyTorch's AdamW."""
    model, (inputs, targets) = file_model(), random_tokens(B=2, T=8, V=61)
    reference, losses = TorchGPT2(model.config, model.params).double(), []
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=5.0)
    for _ in range(10):
        loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert overfit(model, inputs, targets, learning_rate=1e-2, decay=5.0) == pytest.approx(losses, rel=1e-5)


def test_golden_losses_and_greedy_continuation():
    weights, tokens = (os.path.join(DATA_FOLDER, n) for n in ("gpt2.safetensors", "tiny_shakespeare_val.bin"))
    if not (os.path.exists(weights) and os.path.exists(tokens)):
        pytest.skip("needs GPT-2's weights and Tiny Shakespeare's tokens in data/: run "
                    "`python train_gpt2.py` once, with a network")
    model = loaded(weights, 4, 64)
    assert list(model.generate([464, 3290], len(GOLDEN_TOKENS), temperature=0)) == GOLDEN_TOKENS
    batch = gpt2.DataLoader(tokens, 4, 64, 50257).next_batch()
    losses = overfit(model, *batch, learning_rate=1e-4, decay=0.01)
    assert losses[0] == pytest.approx(GOLDEN_LOSSES[0], abs=1e-4)
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=1e-3)  # each update magnifies what rounding began


# ---- Data, generation, the command line, checkpoints: sections 10 to 12, as a user meets them --------------
#
# A model so small that a run takes a moment learns random letters. Where the command line is the point it is
# run as its user runs it; the rest goes through main() in this process, which saves the start-up. What a run
# must end with is compared bit for bit: tensors of its newest checkpoint, weights, log, and printed words.



TRAINER = os.path.abspath(gpt2.__file__)
NOBODY = "http://127.0.0.1:9"  # no server listens there
NO_NETWORK = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "HF_ENDPOINT"), NOBODY)
NO_NETWORK |= {"NO_PROXY": "", "no_proxy": ""}
SMALL = gpt2.GPT2Config(max_seq_len=16, vocab_size=256, num_layers=3, num_heads=2, channels=16)
SMALL_DATA = "--input_bin train_*.bin --input_val_bin val.bin".split()
SMALL_RUN = ["--model", "model", *SMALL_DATA] + """--batch_size 2 --sequence_length 8 --num_iterations 12
    --learning_rate 1e-2 --warmup_iters 3 --learning_rate_decay_frac 0.1 --weight_decay 0.1 --grad_clip 1
    --val_loss_every 4 --val_max_steps 2 --sample_every 4 --max_new_tokens 12""".split()
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows knows only one way
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and limits: run "
                                "python -m pytest on Linux or macOS")


def write_token_file(path, tokens, magic=20240520, version=1, count=None):
    """llm.c's token file by hand, with a wrong header if asked for."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    path.write_bytes(header.ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}H", *tokens))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """A folder with what SMALL_RUN needs. Its shards hold 6 and 3 batches: 12 updates see some twice."""
    folder, rng = tmp_path_factory.mktemp("small"), random.Random(0)
    gpt2.GPT2(SMALL, 2, 8, seed=1).save_pretrained(folder / "model")
    for name, count in (("train_0.bin", 100), ("train_1.bin", 61), ("val.bin", 70)):
        write_token_file(folder / name, rng.choices(range(97, 123), k=count))
    return folder


def run_command(folder, *flags, program=(TRAINER,), env={}, **options):
    """The trainer as a user runs it, in that folder and without a network: (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, *program, *map(str, flags)], cwd=folder, capture_output=True,
                          env={**os.environ, **NO_NETWORK, "PYTHONPATH": os.path.dirname(TRAINER), **env},
                          encoding="utf-8", errors="replace", timeout=60, **options)
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def running_command(folder, *flags, stderr=subprocess.STDOUT):
    """The trainer, started and left running; its words come line by line from .stdout."""
    process = subprocess.Popen([sys.executable, TRAINER, *map(str, flags)], cwd=folder, encoding="utf-8",
                               errors="replace", stdout=subprocess.PIPE, stderr=stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


def read_up_to(process, beginning):
    """Read what a running trainer says up to the first line with that beginning."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line began with {beginning!r}: {''.join(lines)}")


@pytest.fixture
def call_main(small_folder, monkeypatch, capsys):
    """call(*flags): main() in this process, in small_folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(small_folder)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what it protects from does not happen here
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)

    def call(*flags):
        numbers = [*STOP_SIGNALS, getattr(signal, "SIGPIPE", signal.SIGINT)]
        handlers = [signal.getsignal(number) for number in numbers]
        capsys.readouterr()
        try:
            with np.errstate(all="ignore"):
                code = gpt2.main([str(flag) for flag in flags])
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)
        return (code, *capsys.readouterr())
    return call


def succeeded(result):
    """stdout of a run that ended well."""
    assert result[0] == 0 and not result[2], result
    return result[1]


def failed_in_one_line(result):
    """The one line with which a run ended, with exit code 1 and no traceback."""
    code, _, error = result
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, result
    return error


def events(stdout):
    """What a run printed, but for headings, durations and farewells: a continuation has others."""
    stdout = re.sub(r"\nfinishing this step[^\n]*\n", "", re.sub(r", \d+ ms, \d+ tok/s\)", ")", stdout))
    heading = r"model: |memory|resuming from |no checkpoint to resume|(stopped: )?\d+ updates, |.* is damaged: "
    return re.sub(rf"(?m)^({heading}).*\n", "", stdout)


def as_read(text):
    """What reading a pipe as text makes of line ends: a model of bytes comes up with all of them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def stopped_where(stdout):
    """What the last line of a stopped run says: (updates made, the flags that go on)."""
    last = re.fullmatch(r"stopped: (\d+) updates, .*, go on with (.*)", stdout.splitlines()[-1])
    return int(last[1]), last[2]


def train_losses(stdout):
    return [float(loss) for loss in re.findall(r"(?m)^step \d+/\d+: train loss (\S+)", stdout)]


def checkpoint_folders(folder):
    return sorted(folder.glob("checkpoint_" + 8 * "[0-9]"))


def tensor_bytes(file):
    """{tensor's name: its bytes} of a .safetensors file."""
    found, data = {}, file.read_bytes()
    for name, (_, offset, dtype, shape) in gpt2.read_safetensors(str(file))[0].items():
        assert dtype == "F32"
        found[name] = data[offset:offset + 4 * math.prod(shape)]
    return found


def whole_state(folder):
    """All that a run must end with, from the files of its --output_dir."""
    newest = checkpoint_folders(folder)[-1]
    params, moments = (tensor_bytes(newest / f"{name}.safetensors") for name in ("model", "optimizer"))
    state = json.loads(gpt2.read_safetensors(str(newest / "optimizer.safetensors"))[1]["state"])
    assert set(moments) == {"m", "v"} and len(moments["m"]) == sum(map(len, params.values()))
    return {**params, **moments, **{key: state[key] for key in ("step", "position", "evaluated")},
            "log": (folder / "main.log").read_text(), "its log": (newest / "main.log").read_text(),
            "final": tensor_bytes(folder / "model.safetensors"), "name": newest.name}


def folder_content(folder):
    """{path: bytes} of all files below a folder, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- Data: section 10


def batches_by_hand(shards, B, T):
    """llm.c's order: of each shard in turn as many whole batches as fit with their last target."""
    for shard in itertools.cycle(shards):
        for start in range(0, (len(shard) - 1) // (B * T) * B * T, B * T):
            piece = np.array(shard[start:start + B * T + 1])
            yield piece[:-1].reshape(B, T), piece[1:].reshape(B, T)


@pytest.mark.parametrize("sizes", [[7], [13], [25], [24], [26], [7, 12, 13, 30], [40, 7]])
def test_batches_come_in_llmc_order(tmp_path, sizes):
    """7 tokens are one batch of 2 * 3 and the last target; of 12, five are never seen; 13 are two batches."""
    numbers = itertools.count(1000)
    shards = [list(itertools.islice(numbers, size)) for size in sizes]
    for i, shard in enumerate(shards):
        write_token_file(tmp_path / f"shard_{i}.bin", shard)
    write_token_file(tmp_path / "other.bin", [9] * 50)
    expected = list(itertools.islice(batches_by_hand(shards, 2, 3), 35))
    for source in [str(tmp_path / "shard_*.bin")] + [np.array(shards[0], np.uint16)] * (len(shards) == 1):
        loader, positions = gpt2.DataLoader(source, 2, 3, 50257), []
        for inputs, targets in expected:
            positions.append(list(loader.position))
            found = loader.next_batch()
            assert found[0].dtype == found[1].dtype == np.int64
            np.testing.assert_array_equal(found, (inputs, targets))
            np.testing.assert_array_equal(inputs.flat[1:], targets.flat[:-1])
        for start in (3, 0, 11, 24):  # any position can be gone back to, in another loader too
            other = gpt2.DataLoader(source, 2, 3, 50257)
            other.seek(positions[start])
            for batch in expected[start:start + 9]:
                np.testing.assert_array_equal(other.next_batch(), batch)


def put_bad_file(*args, **header):
    return lambda folder: write_token_file(folder / "bad.bin", *args, **header)


def put_bad_heads(folder):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_head": 3}))


def put_bad_bytes(data):
    return lambda folder: (folder / "bad.bin").write_bytes(data)


BAD_INPUTS = {  # what is wrong: (flags, what the one line says, what makes it so)
    "wrong magic": ("--input_bin bad.bin", "20240521", put_bad_file([97] * 50, magic=20240521)),
    "wrong version": ("--input_bin bad.bin", "version 2", put_bad_file([97] * 50, version=2)),
    "too long": ("--input_bin bad.bin", "1124 bytes, 49", put_bad_file([97] * 50, count=49)),
    "too short": ("--input_bin bad.bin", "1124 bytes, 51", put_bad_file([97] * 50, count=51)),
    "negative length": ("--input_bin bad.bin", "-1 tokens", put_bad_file([], count=-1)),
    "half a header": ("--input_bin bad.bin", "no token file", put_bad_bytes(struct.pack("<2i", 20240520, 1))),
    "empty file": ("--input_bin bad.bin", "no token file", put_bad_bytes(b"")),
    "less than a batch": ("--input_bin bad.bin", "B*T + 1 = 17", put_bad_file([97] * 16)),
    "short validation": ("--input_val_bin bad.bin", "B*T + 1 = 17", put_bad_file([97] * 16)),
    "one bad shard of four": ("--input_bin *.bin", "bad.bin", put_bad_file([97] * 16)),
    "strange token": ("--input_bin bad.bin", "bad.bin: holds token 256", put_bad_file([97] * 40 + [256])),
    "strange token in a later shard": ("--input_bin *.bin", "zz.bin: holds token 999",
                                       lambda f: write_token_file(f / "zz.bin", [97] * 20 + [999])),
    "folder for tokens": ("--input_bin model", "model", None),
    "glob without a match": ("--input_bin nothing_*.bin", "nothing_*.bin", None),
    "no validation tokens": ("--input_val_bin nothing.bin", "nothing.bin", None),
    "model that is not there": ("--model nothing", "'nothing': no such file", None),
    "folder without a model": ("--model empty", "config.json", lambda f: (f / "empty").mkdir()),
    "file of another kind": ("--model val.bin", "20240520, expected 20240326", None),
    "beyond the context": ("--sequence_length 17 --batch_size 1", "context is 16: use --sequence_length 16", None),
    "heads that don't divide the channels": ("", "16 channels can't be shared by 3 heads", put_bad_heads),
    "empty prompt": ("--inference_only 1 --prompt=", "--prompt is empty", None),
    "total batch no multiple of the batch": ("--total_batch_size 40", "B*T = 16: try 32", None),
    "total batch below the batch": ("--total_batch_size 8", "B*T = 16: try 16", None),
    "strange recompute": ("--recompute 5", "expected 0 to 3", None),
    "recompute that can't train": ("--recompute 4", "use 0, 1, 2 or 3", None),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_exit_code_1(case, call_main, small_folder, tmp_path, monkeypatch):
    flags, phrase, spoil = BAD_INPUTS[case]
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(tmp_path)
    before = folder_content(tmp_path)
    assert phrase in failed_in_one_line(call_main(*SMALL_RUN, "--num_iterations", 40, *flags.split()))
    assert folder_content(tmp_path) == before


def test_bad_input_in_the_shell(small_folder):
    result = run_command(small_folder, *SMALL_RUN, "--input_bin", "nothing_*.bin")
    assert "nothing_*.bin" in failed_in_one_line(result)


@pytest.mark.parametrize("bad", [-1, 256, 1 << 40])
def test_ids_beyond_the_vocabulary_are_refused_by_the_api(bad):
    model, good, ids = gpt2.GPT2(SMALL, 1, 4), np.array([[1, 2, 3, 4]]), np.array([[1, 2, 3, bad]])
    for inputs, targets, what in ((good, ids, "targets"), (ids, good, "inputs")):
        with pytest.raises(gpt2.InputError, match=f"{what}: .*{bad}"):
            model.forward(inputs, targets)
    for prompt in ([1, bad], []):
        with pytest.raises(gpt2.InputError, match="prompt: "):
            list(model.generate(prompt, 1))


# ---- Generation: section 11


def continue_by_hand(model, tokens, count, temperature, top_k, rng):
    """As model.generate, with a whole forward pass for every token, and the distribution in float64."""
    T, window, new = model.sequence_length, list(tokens)[-model.sequence_length:], []
    for _ in range(count):
        if len(window) > T:
            window = window[-max(1, T // 2):]
        padded = np.array([window + [0] * (T - len(window))])  # no position sees what comes after it
        model.forward(padded, padded, train=False)
        logits = model.params["wte"].astype(np.float64) @ model.acts["lnf"][0, len(window) - 1]
        if temperature == 0:
            window.append(int(np.argmax(logits)))
        else:
            logits[np.argsort(logits)[:len(logits) - top_k if top_k else 0]] = -np.inf
            probs = np.exp((logits - logits.max()) / temperature)
            point = float(rng.random(dtype=np.float32)) * probs.sum()
            window.append(next(i for i, up_to in enumerate(probs.cumsum()) if up_to > point))
        new.append(window[-1])
    return new


def sharp_model(B, T, seed=5, recompute=1):
    """A model whose predictions differ from place to place."""
    model = gpt2.GPT2(SMALL, B, T, seed, recompute)
    for name in ("wte", "wpe", "qkvw", "fcw", "attprojw", "fcprojw"):
        model.params[name] *= 15
    model.params["lnfw"][::2] = -1  # or else, the classifier being the embeddings, a token begets itself
    return model


@pytest.mark.parametrize("T", [16, 7, 2, 1])
@pytest.mark.parametrize("prompt", [1, 5, 40])
@pytest.mark.parametrize("temperature, top_k", [(0, 0), (1.0, 0), (0.7, 3), (1.5, 1), (0.3, 500), (0, 4)])
def test_generation_with_the_cache_equals_whole_forward_passes(T, prompt, temperature, top_k):
    """... far past the context's end, and from a prompt longer than it."""
    model, prompt = sharp_model(1, T), [(7 * i) % 256 for i in range(prompt)]
    expected = continue_by_hand(model, prompt, 45, temperature, top_k, np.random.default_rng(3))
    model = sharp_model(2, T)  # a model with room for more sequences has the same to say
    found = list(model.generate(prompt, 45, temperature, top_k, np.random.default_rng(3)))
    assert found == expected and len(set(found)) > 1
    assert found == list(model.generate(prompt, 45, temperature, top_k, np.random.default_rng(3)))
    greedy = temperature == 0 or top_k == 1
    assert greedy == (found == list(model.generate(prompt, 45, temperature, top_k, np.random.default_rng(4))))
    assert greedy == (found == list(model.generate(prompt, 45, temperature=0)))


@pytest.mark.parametrize("recompute", [0, 1, 2, 3, 4])
def test_generation_is_the_same_whatever_is_kept(recompute):
    """With 3, all layers share the memory where the others leave keys and values."""
    expected = list(sharp_model(1, 9).generate([1, 2, 3], 20, temperature=0))
    assert list(sharp_model(1, 9, recompute=recompute).generate([1, 2, 3], 20, temperature=0)) == expected
    assert len(set(expected)) > 3


def test_ids_beyond_the_vocabulary_are_no_words():
    """Models padded to 50,304 ids, as many are, may choose one that means nothing."""
    need_gpt2_vocabulary()
    encode, decode, start = prepro.tokenizer(50304)
    assert decode(50256) == b"<|endoftext|>" and decode(50257) == decode(50303) == b"" and start == 50256


def test_each_generated_token_costs_one_position(monkeypatch):
    """By hand, T = 8 and a prompt of 3: these 3, then one at a time until there are 8; when there are 9, the
    newer 4 begin again."""
    model, rows, forward = sharp_model(1, 8), [], gpt2.matmul_forward

    def counting(out, inp, weight, bias=None):
        rows.append((weight.shape, math.prod(inp.shape[:-1])))
        forward(out, inp, weight, bias)
    monkeypatch.setattr(gpt2, "matmul_forward", counting)
    list(model.generate([1, 2, 3], 12))
    for name in ("qkvw", "attprojw", "fcw", "fcprojw"):
        seen = [n for shape, n in rows if shape == model.params[name].shape[1:]]
        assert seen == [n for n in (3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4) for layer in range(3)]
    assert [n for shape, n in rows if shape == model.params["wte"].shape] == [1] * 12  # logits


def test_tokens_come_one_by_one_and_spoil_a_pending_backward():
    model = sharp_model(1, 4)
    model.forward([[1, 2, 3, 4]], [[2, 3, 4, 5]])
    tokens = model.generate([1], 10 ** 9)  # nobody waits for all of them
    assert [next(tokens) for _ in range(3)] == list(sharp_model(1, 4).generate([1], 3))
    with pytest.raises(gpt2.InputError, match="forward"):
        model.backward()


def test_sampling_follows_the_distribution():
    """Of 4000 draws, each id's share is within five standard deviations of its probability, worked by hand:
    logits ln 1 .. ln 4; at temperature 1/2 these weights are squared; of the two likeliest, 3 and 4 of 7."""
    logits, rng, n = np.log(np.array([1, 2, 3, 4], np.float32)), np.random.default_rng(0), 4000
    for temperature, top_k, weights in ((1, 0, [1, 2, 3, 4]), (0.5, 0, [1, 4, 9, 16]), (1, 2, [0, 0, 3, 4]),
                                        (1, 4, [1, 2, 3, 4])):
        draws = [gpt2.sample(logits.copy(), temperature, top_k, rng) for _ in range(n)]
        p = np.array(weights) / sum(weights)
        assert (abs(np.bincount(draws, minlength=4) - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()


def test_rounding_never_leads_beyond_the_last_token():
    below_one = SimpleNamespace(random=lambda dtype: np.nextafter(dtype(1), dtype(0)))
    for size in (2, 3, 1000, 50257):
        assert gpt2.sample(np.linspace(0, 1, size, dtype=np.float32), 1.0, 0, below_one) == size - 1


# ---- The command line: section 12

DESIGNED_FLAGS = """--model --input_bin --input_val_bin --output_dir --batch_size --sequence_length
    --total_batch_size --num_iterations --learning_rate --warmup_iters --learning_rate_decay_frac
    --weight_decay --grad_clip --val_loss_every --val_max_steps --sample_every --overfit_single_batch
    --inference_only --write_tensors --recompute --checkpoint_every --resume --seed --prompt --max_new_tokens
    --temperature --top_k""".split()
LLMC_DEFAULTS = {"model": "gpt2", "batch_size": 4, "sequence_length": 64, "num_iterations": 40,
                 "learning_rate": 1e-4, "weight_decay": 0.0, "val_loss_every": 10, "val_max_steps": 5,
                 "sample_every": 20}


def test_help_opens_with_three_examples_and_names_every_flag(tmp_path):
    text = succeeded(run_command(tmp_path, "--help", env={"COLUMNS": "300"}))
    opening, rest = text.split("options:")
    examples = re.findall(r'python train_gpt2.py((?: --\S+ (?:".*?"|\S+))*)', opening)
    assert len(examples) == 3 and re.match(r"usage:\s+python train_gpt2\.py ", opening)
    bare, training, speaking = [gpt2.parse(shlex.split(example)) for example in examples]
    assert bare == {} and training["model"] in gpt2.FRESH and speaking["model"] == training["output_dir"]
    assert speaking["inference_only"] == 1 and speaking["prompt"] == "To be, or"
    for name, (default, meaning) in gpt2.FLAGS.items():
        assert f" --{name} X {meaning} (default: {default!r})" in " ".join(rest.split())


def test_flags_and_defaults_are_those_of_the_design():
    assert {f"--{name}" for name in gpt2.FLAGS} == set(DESIGNED_FLAGS)
    assert {name: gpt2.DEFAULTS[name] for name in LLMC_DEFAULTS} == LLMC_DEFAULTS and gpt2.parse([]) == {}
    for name, default in gpt2.DEFAULTS.items():
        value = gpt2.parse([f"--{name}", str(default)])[name]
        assert value == default and type(value) is type(default)
    assert gpt2.MAY_CHANGE <= gpt2.FLAGS.keys() and gpt2.EMBEDDED.keys() <= gpt2.FLAGS.keys()


@pytest.mark.parametrize("flags", [
    "--batchsize 4", "--batch 4", "--batch_size", "--batch_size four", "--batch_size 1.5", "--batch_size 0",
    "4", "--sequence_length 0", "--val_max_steps 0", "--seed -1", "--learning_rate fast",
    "--learning_rate nan", "--learning_rate -1", "--temperature inf"])
def test_a_command_line_without_sense_is_exit_code_2(flags, capsys, monkeypatch):
    monkeypatch.setattr(gpt2, "prepare", lambda given: pytest.fail(f"accepted: {given}"))
    with pytest.raises(SystemExit) as stop:
        gpt2.main(flags.split())
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_flag_in_the_shell(tmp_path):
    code, _, error = run_command(tmp_path, "--batchsize", "4")
    assert code == 2 and "--batchsize" in error.splitlines()[-1] and "Traceback" not in error


def test_learning_rate_worked_by_hand():
    """Warm-up over 4 of 12 updates to 8, then down to a quarter of it, 2. Half way that is 5, the middle; a
    quarter of the way 5 + 3 * sqrt(1/2)."""
    s = SimpleNamespace(learning_rate=8.0, warmup_iters=4, num_iterations=12, learning_rate_decay_frac=0.25)
    root = math.sqrt(0.5)
    by_hand = {0: 2, 1: 4, 2: 6, 3: 8, 4: 8, 6: 5 + 3 * root, 8: 5, 10: 5 - 3 * root, 12: 2}
    for step, lr in by_hand.items():
        assert gpt2.learning_rate(step, s) == pytest.approx(lr, rel=1e-12)
    s.learning_rate_decay_frac = 1.0  # no decay
    assert [gpt2.learning_rate(step, s) for step in (3, 4, 7, 11)] == [8] * 4
    s.warmup_iters, s.learning_rate_decay_frac = 0, 0.0  # at once at the peak, and down to nothing
    assert [gpt2.learning_rate(step, s) for step in (0, 6, 12)] == pytest.approx([8, 4, 0])
    s.warmup_iters = s.num_iterations  # nothing but warm-up
    assert gpt2.learning_rate(11, s) == 8


def picture_by_hand(losses, blocks):
    """For at most 60 losses: the lowest is blocks[0], the highest blocks[7]."""
    low, high = min(losses), max(losses)
    return "".join(blocks[round((x - low) / max(high - low, 1e-9) * 7)] for x in losses)


def test_the_picture_of_the_losses(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert gpt2.picture([7, 6, 5, 4, 3, 2, 1, 0]) == "█▇▆▅▄▃▂▁" and gpt2.picture([3.0]) == "▁"
    assert gpt2.picture([i // 10 for i in range(600)]) == gpt2.picture(range(60)) == picture_by_hand(
        range(60), "▁▂▃▄▅▆▇█")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert gpt2.picture([0, 1, 2, 3, 4, 5, 6, 7]) == "_.-=+*#@"


def test_all_that_a_run_prints_and_logs_is_what_the_api_computes(small_folder, tmp_path):
    """A run, rebuilt from the public functions: batches, micro-batches, schedule, clipping, decay, validation
    and samples; and the form of its lines, which scripts may parse."""
    flags = """--total_batch_size 32 --temperature 0.8 --top_k 5 --seed 3 --prompt ab --val_loss_every 5
        --sample_every 6 --recompute 2""".split()
    stdout = succeeded(run_command(small_folder, *SMALL_RUN, *flags, "--output_dir", tmp_path))

    files = [small_folder / name for name in ("train_0.bin", "train_1.bin", "val.bin")]
    *shards, val = (np.fromfile(file, "<u2")[512:] for file in files)
    model = gpt2.GPT2.from_pretrained(str(small_folder / "model"), 2, 8)
    batches, printed, log, norms = batches_by_hand(shards, 2, 8), "", [], []
    for step in range(13):
        if step in (0, 5, 10, 12):
            val_batches = itertools.islice(batches_by_hand([val], 2, 8), 2)
            loss = sum(model.forward(*batch, train=False) for batch in val_batches) / 2
            printed += f"val loss {loss:.6f}\n"
            log.append((step, "tel", f"{loss:.4f}"))
        if step in (6, 12):
            tokens = model.generate(list(b"ab"), 12, 0.8, 5, np.random.default_rng([3, step]))
            printed += "--- sample\nab" + bytes(tokens).decode(errors="replace") + "\n"
        if step == 12:
            break
        loss = 0
        for _ in range(2):
            loss += model.forward(*next(batches), grad_scale=0.5) / 2
            model.backward()
        norms.append(model.grad_norm())
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
        lr = 1e-2 * (step + 1) / 3 if step < 3 else 1e-3 + 9e-3 * cosine
        model.update(lr, weight_decay=0.1, step=step + 1, grad_scale=min(1, 1 / norms[-1]))
        printed += f"step {step + 1}/12: train loss {loss:.6f} (norm {norms[-1]:.4f}, lr {lr:.2e})\n"
        log.append((step + 1, "trl", f"{loss:.4f}"))
    assert min(norms) < 1 < max(norms)  # some gradients were clipped, some not
    assert events(stdout) == as_read(printed)
    assert (tmp_path / "main.log").read_text() == "".join(f"s:{step} {kind}:{x}\n" for step, kind, x in log)
    form = r"step \d+/12: train loss \d+\.\d{6} \(norm \d+\.\d{4}, lr \d\.\d\de-\d\d, \d+ ms, \d+ tok/s\)"
    assert len(re.findall(f"(?m)^{form}$", stdout)) == 12

    farewell = "12 updates, "
    for kind, name in (("trl", "train"), ("tel", "val")):
        losses = [loss for _, k, loss in log if k == kind]
        drawn = picture_by_hand([float(loss) for loss in losses], "▁▂▃▄▅▆▇█")
        farewell += f"{name} loss {losses[0]} -> {losses[-1]} {drawn}, "
    pattern = rf"{farewell}\d+\.\d s, \d+ tok/s, saved in {re.escape(str(tmp_path))}"
    assert re.fullmatch(pattern, stdout.splitlines()[-1])
    assert folder_content(tmp_path).keys() == {"config.json", "generation_config.json", "main.log",
                                               "model.safetensors"}
    np.testing.assert_array_equal(gpt2.GPT2.from_pretrained(str(tmp_path), 2, 8).flat[0], model.flat[0])


def test_a_terminal_that_knows_only_ascii(small_folder):
    """The picture falls back to seven-bit characters, and no byte that a model comes up with ends the run."""
    flags = (*SMALL_RUN, "--val_loss_every", 0, "--max_new_tokens", 60, "--prompt", "hé")
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    stdout = succeeded(run_command(small_folder, *flags, env=env))
    losses = train_losses(stdout)
    drawn = picture_by_hand([round(loss, 4) for loss in losses], "_.-=+*#@")
    assert stdout.isascii() and len(losses) == 12
    assert f" -> {losses[-1]:.4f} {drawn}, " in stdout.splitlines()[-1]


@posix_only
def test_a_prompt_that_is_no_utf8_reaches_a_model_of_bytes_as_it_is(tmp_path):
    """Elsewhere than on Windows a command line is bytes, and byte 0xff is as good as any other."""
    model = sharp_model(1, 16)  # which tells one context from another
    model.save_pretrained(tmp_path)
    flags = ("--model", tmp_path, "--inference_only", 1, "--max_new_tokens", 60, "--temperature", 0)
    stdout = succeeded(run_command(tmp_path, *flags, "--prompt", os.fsdecode(b"\xffab")))
    assert stdout.endswith(as_read(bytes(model.generate(b"\xffab", 60, 0)).decode(errors="replace")) + "\n")


def test_without_an_output_dir_nothing_is_written(small_folder, call_main):
    before = folder_content(small_folder)
    assert "saved" not in succeeded(call_main(*SMALL_RUN, "--checkpoint_every", 1))
    assert folder_content(small_folder) == before


WITH_THREADS = """if True:
    import sys, train_gpt2
    train_gpt2.ROW_THREADS, train_gpt2.BLOCK_BYTES, train_gpt2.ADAMW_CHUNK = int(sys.argv[1]), 512, 300
    sys.exit(train_gpt2.main(sys.argv[2:]))
"""


def test_same_bits_in_two_processes_and_for_any_number_of_threads(small_folder, tmp_path):
    """Blocks are made so small here that even this model's rows fill many."""
    found = []
    for i, threads in enumerate((1, 1, 2, 3)):
        flags = (*SMALL_RUN, "--checkpoint_every", 12, "--output_dir", tmp_path / str(i))
        stdout = succeeded(run_command(small_folder, threads, *flags, program=("-c", WITH_THREADS)))
        found.append((events(stdout), whole_state(tmp_path / str(i))))
    assert found[0] == found[1] == found[2] == found[3] and "--- sample" in found[0][0]


def test_micro_batches_give_the_losses_of_the_batch_they_make(call_main, small_folder, tmp_path):
    write_token_file(tmp_path / "long.bin", random.Random(1).choices(range(97, 123), k=900))
    losses = []
    for B in (8, 4, 2):
        flags = ("--input_bin", tmp_path / "long.bin", "--batch_size", B, "--total_batch_size", 64)
        losses.append(train_losses(succeeded(call_main(*SMALL_RUN, *flags))))
    assert len(losses[0]) == 12 and losses[0][0] - losses[0][-1] > 0.1
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=0, atol=1e-5)


def test_overfitting_sees_the_same_batch_always(call_main, small_folder, tmp_path, monkeypatch):
    """... also in every micro-batch, and after a resumption."""
    seen, forward = [], gpt2.GPT2.forward

    def watching(model, inputs, targets, train=True, grad_scale=1.0):
        if train:
            seen.append(np.array([inputs.ravel(), targets.ravel()]))
        return forward(model, inputs, targets, train, grad_scale)
    monkeypatch.setattr(gpt2.GPT2, "forward", watching)
    flags = (*SMALL_RUN, "--overfit_single_batch", 1, "--total_batch_size", 32, "--output_dir", tmp_path)
    succeeded(call_main(*flags, "--checkpoint_every", 1, "--num_iterations", 4))
    succeeded(call_main(*flags, "--resume", 1, "--num_iterations", 7))
    tokens = np.fromfile(small_folder / "train_0.bin", "<u2")[512:]
    np.testing.assert_array_equal(seen, [(tokens[:16], tokens[1:17])] * 14)


def test_inference_from_a_runs_output_dir(small_folder, tmp_path):
    succeeded(run_command(small_folder, *SMALL_RUN, "--output_dir", tmp_path))
    before, model = folder_content(tmp_path), gpt2.GPT2.from_pretrained(str(tmp_path), 1, 16)
    for flags, settings in ((["--temperature", 0], [0]),
                            (["--seed", 8, "--top_k", 9], [1.0, 9, np.random.default_rng([8, 0])])):
        flags += ["--model", tmp_path, "--inference_only", 1, "--prompt", "hé", "--max_new_tokens", 30]
        stdout = succeeded(run_command(tmp_path, *flags))
        words = "hé" + bytes(model.generate("hé".encode(), 30, *settings)).decode(errors="replace")
        assert stdout.endswith("MB\n" + as_read(words) + "\n")
    assert folder_content(tmp_path) == before


@pytest.mark.parametrize("named", ["--model gpt2", "--input_bin train_0.bin", "--input_val_bin val.bin",
                                   "--inference_only 1", "--write_tensors 1"])
def test_what_was_asked_for_by_name_is_not_replaced(named, call_main, tmp_path, small_folder, monkeypatch):
    for name in ("train_0.bin", "val.bin"):
        shutil.copy(small_folder / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    result = call_main(*named.split(), "--num_iterations", 1)
    assert failed_in_one_line(result) and "from scratch" not in result[1] and "step " not in result[1]


def test_with_nothing_at_all_it_learns_from_its_own_files(tmp_path):
    """No data, no weights, no network: that is announced, and a small GPT learns by bytes."""
    code, stdout, error = run_command(tmp_path, "--num_iterations", 5, "--max_new_tokens", 20)
    assert code == 0 and "can't fetch" in stdout and "from scratch, by bytes" in stdout, error
    val = [float(loss) for loss in re.findall(r"(?m)^val loss (\S+)", stdout)]
    assert len(val) == 2 and abs(val[0] - math.log(256)) < 0.2 and val[1] < val[0] - 0.1
    farewell = stdout.splitlines()[-1]
    assert farewell.startswith("5 updates, train loss ") and "saved" not in farewell


# ---- Memory that is not there, numbers that are none, disks that are full


def small_model_bytes(B):
    """What a run of SMALL with batches of (B, 8) allocates."""
    return 4 * (4 * gpt2.size(gpt2.param_shapes(SMALL)) + gpt2.size(gpt2.act_shapes(SMALL, B, 8, 1)))


def test_a_plan_beyond_the_machine_is_refused_before_anything_is_allocated(call_main, monkeypatch):
    available = small_model_bytes(3)
    assert available == gpt2.GPT2(SMALL, 3, 8, None).blob.nbytes
    monkeypatch.setattr(gpt2, "available_memory", lambda: available)
    succeeded(call_main(*SMALL_RUN, "--batch_size", 3, "--num_iterations", 1))

    def allocate(*args):
        raise AssertionError("allocated")
    monkeypatch.setattr(gpt2, "GPT2", allocate)
    for batch_size in (4, 5, 1000):
        result = call_main(*SMALL_RUN, "--batch_size", batch_size)
        assert failed_in_one_line(result).endswith(": use --batch_size 3\n") and "\nmemory: " in result[1]
    available -= 1
    assert failed_in_one_line(call_main(*SMALL_RUN, "--batch_size", 3)).endswith(": use --batch_size 2\n")
    available = small_model_bytes(1) - 1
    assert "use a smaller --model or --sequence_length\n" in failed_in_one_line(call_main(*SMALL_RUN))


def test_the_plan_of_gpt2_124m(call_main, monkeypatch):
    """124,439,808 parameters of 4 bytes are 498 MB; as much for gradients, twice as much for moments."""
    def allocate(*args):
        raise MemoryError("not here")
    monkeypatch.setattr(gpt2, "GPT2", allocate)
    monkeypatch.setattr(gpt2, "available_memory", lambda: math.inf)
    code, stdout, error = call_main("--model", "d12", *SMALL_DATA, "--batch_size", 2, "--sequence_length", 8)
    assert (code, error) == (1, "error: not here\n") and "model: 124,439,808 parameters: " in stdout
    activations = 4 * gpt2.size(gpt2.act_shapes(gpt2.GPT2Config(), 2, 8, 1))
    assert (f"\nmemory: parameters 498, gradients 498, moments 996, activations {activations / 1e6:.0f}, "
            f"in all {(16 * 124_439_808 + activations) / 1e6:.0f} MB\n") in stdout


@posix_only
def test_the_limit_of_this_process_counts_and_a_huge_batch_is_refused_at_once(small_folder):
    import resource
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    result = run_command(small_folder, *SMALL_RUN, "--batch_size", 10 ** 12,
                         env={"OPENBLAS_NUM_THREADS": "1"}, preexec_fn=limit)
    message = re.search(r"the machine has (\d+): use --batch_size (\d+)\n", failed_in_one_line(result))
    megabytes, fits = map(int, message.groups())
    assert megabytes <= 2147
    assert small_model_bytes(fits) <= (megabytes + 0.5) * 1e6 <= small_model_bytes(fits + 999)


def spoil_after_update(monkeypatch, number, spoil):
    """Let spoil(model) happen right after that update."""
    update = gpt2.GPT2.update

    def updating(model, *args, step, **settings):
        update(model, *args, step=step, **settings)
        if step == number:
            spoil(model)
    monkeypatch.setattr(gpt2.GPT2, "update", updating)


def put_value(name, l, value):
    return lambda model: model.params[name].__setitem__(... if l is None else l, value)


@pytest.mark.parametrize("recompute", [0, 1, 2, 3])
@pytest.mark.parametrize("name, l, value, began", [
    ("wte", None, math.nan, "wte"), ("wpe", None, math.inf, "wpe"), ("lnfb", None, math.nan, "lnfb"),
    ("ln1b", 0, math.nan, "ln1b of layer 0"), ("qkvw", 1, math.nan, "qkvw of layer 1"),
    ("fcprojw", 2, math.nan, "fcprojw of layer 2"), ("qkvw", 1, 1e30, "att_lse of layer 1")])
def test_a_loss_that_is_no_number_stops_the_run_and_names_where_it_began(
        call_main, tmp_path, monkeypatch, recompute, name, l, value, began):
    flags = (*SMALL_RUN, "--checkpoint_every", 3, "--output_dir", tmp_path, "--recompute", recompute,
             "--grad_clip", recompute, "--val_loss_every", 0, "--sample_every", 0)
    succeeded(call_main(*flags, "--num_iterations", 3))
    (checkpoint,) = checkpoint_folders(tmp_path)
    before = folder_content(checkpoint)
    spoil_after_update(monkeypatch, 4, put_value(name, l, value))
    error = failed_in_one_line(call_main(*flags, "--resume", 1))
    if recompute == 3:  # of what the layers share, only the last layer's is left
        began = began.replace("att_lse", "residual3")
    assert error.startswith(f"error: update 5: the loss is nan; it began in {began}. ")
    assert checkpoint_folders(tmp_path) == [checkpoint] and folder_content(checkpoint) == before


@pytest.mark.parametrize("l", [0, 1, 2])
def test_an_infinite_gradient_stops_the_run_and_names_where_it_began(call_main, tmp_path, monkeypatch, l):
    flags = (*SMALL_RUN, "--checkpoint_every", 3, "--output_dir", tmp_path)
    succeeded(call_main(*flags, "--num_iterations", 3))
    (checkpoint,) = checkpoint_folders(tmp_path)
    before, calls, backward = folder_content(checkpoint), itertools.count(1), gpt2.gelu_backward

    def overflowing(dout, inp):
        backward(dout, inp)
        if next(calls) == 3 + 3 - l:  # in the second update; backward comes to the last of three layers first
            dout[...] = np.inf
    monkeypatch.setattr(gpt2, "gelu_backward", overflowing)
    error = failed_in_one_line(call_main(*flags, "--resume", 1))
    assert re.match(rf"error: update 5: the gradient norm is \w+; it began in fc[wb] of layer {l}\. ", error)
    assert checkpoint_folders(tmp_path) == [checkpoint] and folder_content(checkpoint) == before


def test_a_norm_that_overflows_stops_the_run_though_every_gradient_is_finite(call_main, monkeypatch):
    backward = gpt2.gelu_backward

    def enlarging(dout, inp):
        backward(dout, inp)
        dout[...] = 1e25
    monkeypatch.setattr(gpt2, "gelu_backward", enlarging)
    error = failed_in_one_line(call_main(*SMALL_RUN))
    assert error.startswith("error: update 1: the gradient norm is inf; it began in the last sum. ")


def test_validation_that_is_no_number_stops_the_run_too(call_main, tmp_path, monkeypatch):
    """... so a last update that ruins the weights does not pass for success."""
    spoil_after_update(monkeypatch, 12, put_value("fcw", 1, math.nan))
    error = failed_in_one_line(call_main(*SMALL_RUN, "--output_dir", tmp_path))
    assert "the loss is nan; it began in fcw of layer 1. " in error
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("clip", [0, 1])
def test_a_learning_rate_far_too_high_ends_in_one_line(small_folder, clip):
    flags = ("--learning_rate", "1e18", "--grad_clip", clip, "--val_loss_every", 0, "--sample_every", 0)
    error = failed_in_one_line(run_command(small_folder, *SMALL_RUN, *flags))
    assert re.match(r"error: update [2-9]: the (loss|gradient norm) is (nan|inf); it began in \w+", error)


@posix_only
@pytest.mark.parametrize("limit", [100, 20_000, 80_000])
def test_a_disk_that_fills_costs_nothing_that_was_saved(small_folder, uninterrupted, tmp_path, limit):
    """No file may grow beyond the limit: a log takes 200 bytes, weights 59 KB, moments 114 KB."""
    import resource
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    flags = (*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1)
    before = [folder_content(folder) for folder in checkpoint_folders(tmp_path)]
    error = failed_in_one_line(run_command(small_folder, *flags, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit))))
    assert "File too large" in error
    assert [folder_content(folder) for folder in checkpoint_folders(tmp_path)] == before
    succeeded(run_command(small_folder, *flags))
    assert whole_state(tmp_path) == uninterrupted.state


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_one_line(call_main, tmp_path, place):
    """Below a regular file nobody can write, not even root, whom permissions don't stop."""
    (tmp_path / "file").write_text("here")
    result = call_main(*SMALL_RUN, "--output_dir", tmp_path / place)
    assert str(tmp_path / place) in failed_in_one_line(result) and "step" not in result[1]


def test_a_folder_that_vanishes_is_one_line(call_main, tmp_path, monkeypatch):
    spoil_after_update(monkeypatch, 2, lambda model: shutil.rmtree(tmp_path / "run"))
    assert "main.log" in failed_in_one_line(call_main(*SMALL_RUN, "--output_dir", tmp_path / "run"))


# ---- Checkpoints and exact resumption: section 12

AT_A_MOMENT = """if True:
    import os, sys, train_gpt2
    moment, number, seen = int(sys.argv[1]), int(sys.argv[2]), 0
    where = "train log speak save_checkpoint save_pretrained write_safetensors atomic_write".split()
    def trace(frame, event, arg):
        global seen
        if frame.f_code.co_name in where and frame.f_code.co_filename == train_gpt2.__file__:
            seen += event == "line"
            if event == "line" and seen == moment:
                os.kill(os.getpid(), number)
            return trace
    os.fsync = lambda handle: None  # what it protects from is a power cut, no signal
    sys.settrace(trace)
    code = train_gpt2.main(sys.argv[3:])
    sys.settrace(None)
    print(seen, file=sys.stderr)
    sys.exit(code)
"""


def run_to_a_moment(folder, moment, number, *flags):
    """The trainer, which sends itself that signal before the moment-th line it executes of those that decide,
    print and write: (exit code, stdout, the number of such lines). Moment 0 never comes."""
    code, stdout, error = run_command(folder, moment, int(number), *flags, program=("-c", AT_A_MOMENT))
    assert error.strip().isdecimal() or number == KILL and error == "", error
    return code, stdout, int(error or 0)


def random_moments(lines, n, seed):
    """One in every n-th of a run's lines."""
    rng = random.Random(seed)
    return [rng.randrange(lines * i // n, lines * (i + 1) // n) + 1 for i in range(n)]


@pytest.fixture(scope="module")
def uninterrupted(small_folder, tmp_path_factory):
    """The run that the interrupted ones must equal. early: a folder that it left when killed half-way."""
    folder, early = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("early")
    flags = (*SMALL_RUN, "--checkpoint_every", 1)
    code, stdout, lines = run_to_a_moment(small_folder, 0, 0, *flags, "--output_dir", folder)
    run_to_a_moment(small_folder, lines // 2, KILL, *flags, "--output_dir", early)
    assert code == 0 and len(checkpoint_folders(folder)) == len(checkpoint_folders(early)) == 2
    state, said = whole_state(folder), events(stdout)
    return SimpleNamespace(flags=flags, early=early, lines=lines, events=said, state=state)


def test_a_run_that_ended_and_goes_on_equals_one_run(call_main, tmp_path):
    """8 updates, then up to 12. The learning rate stays at its peak: a decay is another one in 8 updates."""
    flags, found = (*SMALL_RUN, "--checkpoint_every", 5, "--learning_rate_decay_frac", 1), []
    for i, ends in enumerate(([12], [8, 12], [4, 4, 8, 12])):
        folder, stdout = tmp_path / str(i), ""
        for end in ends:
            more = ("--output_dir", folder, "--num_iterations", end, "--resume", int(stdout != ""))
            stdout += succeeded(call_main(*flags, *more))
        found.append((whole_state(folder), re.sub(r"(?m)^(step \d+)/\d+:", r"\1:", events(stdout))))
    assert found[0] == found[1] == found[2] and found[0][0]["step"] == 12


@posix_only
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_run_stopped_at_any_moment_goes_on_to_the_same_bits(small_folder, uninterrupted, tmp_path, number):
    """Nothing is printed or logged twice, nothing is missing, and what the last line says is what to type."""
    def stop_and_go_on(moment):
        folder = tmp_path / str(moment)
        flags = (*uninterrupted.flags, "--output_dir", folder)
        code, first, _ = run_to_a_moment(small_folder, moment, number, *flags)
        assert code == 128 + number and "\nfinishing this step" in first, moment
        step, hint = stopped_where(first)
        assert shlex.split(hint) == ["--output_dir", str(folder), "--resume", "1"]
        assert checkpoint_folders(folder)[-1].name == f"checkpoint_{step:08d}"
        second = succeeded(run_command(small_folder, *flags, "--resume", 1))
        assert whole_state(folder) == uninterrupted.state, moment
        assert events(first) + events(second) == uninterrupted.events, moment
    with ThreadPoolExecutor(2) as pool:  # in the last fifth there may be nothing left to stop
        list(pool.map(stop_and_go_on, random_moments(uninterrupted.lines, 5, number)[:4]))


@posix_only
def test_a_stop_at_each_line_of_the_loop_loses_nothing(call_main, uninterrupted, tmp_path):
    """... where only the stop itself makes a checkpoint. For each line of train(), the signal comes just
    before it is executed for the sixth time, or for the last."""
    codes = [gpt2.train.__code__, *(c for c in gpt2.train.__code__.co_consts if hasattr(c, "co_code"))]
    counts, target = {}, None

    def trace(frame, event, arg):
        if frame.f_code in codes:
            if event == "line":
                counts[frame.f_lineno] = counts.get(frame.f_lineno, 0) + 1
                if target == (frame.f_lineno, counts[frame.f_lineno]):
                    signal.raise_signal(signal.SIGINT)
            return trace

    def call_traced(*flags):
        before = sys.gettrace()
        counts.clear()
        sys.settrace(trace)
        try:
            return call_main(*flags)
        finally:
            sys.settrace(before)
    succeeded(call_traced(*SMALL_RUN, "--output_dir", tmp_path / "all"))
    targets = [(line, min(6, count)) for line, count in counts.items()]
    assert len(targets) > 30
    for target in targets:
        folder = tmp_path / str(target[0])
        code, first, error = call_traced(*SMALL_RUN, "--output_dir", folder)
        assert code == 130 and not error
        second = ""
        if first.splitlines()[-1].startswith("stopped: "):
            assert checkpoint_folders(folder), target
            second = succeeded(call_main(*SMALL_RUN, "--output_dir", folder, "--resume", 1))
        assert events(first) + events(second) == uninterrupted.events, target
        assert (folder / "main.log").read_text() == uninterrupted.state["log"], target
        assert tensor_bytes(folder / "model.safetensors") == uninterrupted.state["final"], target


@posix_only
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(small_folder, uninterrupted, tmp_path):
    """Ten moments, one in every tenth of the run, most in the making of a checkpoint; a hundred with
    LONG_TESTS=1."""
    def kill_and_go_on(moment):
        flags = (*uninterrupted.flags, "--output_dir", tmp_path / str(moment))
        code, first, _ = run_to_a_moment(small_folder, moment, KILL, *flags)
        assert code == -KILL and uninterrupted.events.startswith(events(first)), moment
        code, second, _ = run_to_a_moment(small_folder, 0, 0, *flags, "--resume", 1)
        assert code == 0 and uninterrupted.events.endswith(events(second)), moment
        assert whole_state(tmp_path / str(moment)) == uninterrupted.state and "damaged" not in second, moment
        assert len(checkpoint_folders(tmp_path / str(moment))) == 2, moment
        assert not list((tmp_path / str(moment)).rglob("*tmp*")), moment
    n = 100 if os.environ.get("LONG_TESTS") == "1" else 10
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill_and_go_on, random_moments(uninterrupted.lines, n, 0)))


@posix_only
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_from_outside_and_the_words_that_go_on(small_folder, tmp_path, number):
    """A run without an end is stopped; told to go on, and when to end, it equals one that knew its end."""
    flags = (*SMALL_RUN, "--learning_rate_decay_frac", 1, "--val_loss_every", 7, "--sample_every", 0)
    endless = (*flags, "--num_iterations", 10 ** 9, "--output_dir", tmp_path / "stopped")
    with running_command(small_folder, *endless) as process:
        read_up_to(process, "step 3/")
        process.send_signal(number)
        words = process.stdout.read()
        assert process.wait() == 128 + number and "\nfinishing this step" in words
    step, hint = stopped_where(words)
    stdout = succeeded(run_command(small_folder, *shlex.split(hint), "--num_iterations", step + 40))
    assert f"\nresuming from {tmp_path}" in stdout and f"\nstep {step + 1}/{step + 40}: " in stdout
    whole = (*flags, "--num_iterations", step + 40, "--output_dir", tmp_path / "whole")
    assert events(succeeded(run_command(small_folder, *whole))).endswith(events(stdout))
    for name in ("main.log", "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_going_on_with_no_other_flags_finishes_the_run_as_it_was_ordered(call_main, uninterrupted, tmp_path):
    """As many updates, validations and samples, as long and as bold: the checkpoint knows what was set."""
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    stdout = succeeded(call_main("--output_dir", tmp_path, "--resume", 1))
    assert whole_state(tmp_path) == uninterrupted.state and uninterrupted.events.endswith(events(stdout))


@posix_only
def test_the_second_signal_stops_at_once(small_folder):
    """An update that would take hours is under way."""
    with running_command(small_folder, *SMALL_RUN, "--total_batch_size", 16 * 10 ** 7) as process:
        read_up_to(process, "val loss ")
        process.send_signal(signal.SIGINT)
        read_up_to(process, "finishing this step; once more, and it stops at once")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130 and process.stdout.read() == ""


@posix_only
@pytest.mark.parametrize("interrupted", [True, False], ids=["with_it_ctrl_c", "by_itself"])
def test_a_reader_that_goes_away_stops_the_run_and_loses_nothing(small_folder, tmp_path, interrupted):
    """Ctrl-C on `python train_gpt2.py | tee log` ends tee as well; `| head` has enough after ten lines."""
    flags = (*SMALL_RUN, "--learning_rate_decay_frac", 1, "--val_loss_every", 0, "--sample_every", 0)
    endless = (*flags, "--num_iterations", 10 ** 9, "--output_dir", tmp_path / "stopped")
    with running_command(small_folder, *endless, stderr=subprocess.PIPE) as process:
        read_up_to(process, "step 3/")
        process.stdout.close()
        if interrupted:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in ((130, 141) if interrupted else (141,))  # 128 + SIGPIPE
        assert process.stderr.read() == ""
    [folder] = checkpoint_folders(tmp_path / "stopped")
    step = int(folder.name[-8:])
    succeeded(run_command(small_folder, "--output_dir", tmp_path / "stopped", "--resume", 1, "--num_iterations", step + 5))
    succeeded(run_command(small_folder, *flags, "--num_iterations", step + 5, "--output_dir", tmp_path / "whole"))
    for name in ("main.log", "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_while_a_line_is_being_printed_loses_nothing(call_main, tmp_path, monkeypatch):
    """As when the terminal is slow: print() is waiting for it, and Python allows no second one in its midst."""
    words = []

    class SlowTerminal(io.RawIOBase):
        writable = lambda self: True

        def write(self, data):
            words.append(bytes(data))
            if b"step 2/" in words[-1]:
                signal.raise_signal(signal.SIGINT)
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(SlowTerminal()), encoding="utf-8"))
    assert call_main(*SMALL_RUN, "--output_dir", tmp_path)[0] == 130
    assert len(checkpoint_folders(tmp_path)) == 1 and b"go on with" in words[-1]


@posix_only
def test_a_closed_stdout_is_no_error(small_folder, tmp_path):
    """A file that is opened then may get its number, 1; nothing must be written there by mistake."""
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--sample_every", 0)
    command = shlex.join([sys.executable, TRAINER, *map(str, flags)]) + " >&-"
    done = subprocess.run(command, shell=True, cwd=small_folder, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "main.log").read_text().startswith("s:0 tel:")


@posix_only
def test_a_reader_that_goes_away_while_a_model_speaks_is_no_error(small_folder):
    gpt2.GPT2(SMALL, 1, 8, seed=1).save_pretrained(small_folder / "speaker")
    with running_command(small_folder, "--model", "speaker", "--inference_only", 1, "--max_new_tokens", 3000,
                         stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=30) == 0 and process.stderr.read() == ""


@posix_only
def test_a_stopped_run_without_an_output_dir_promises_nothing(small_folder):
    with running_command(small_folder, *SMALL_RUN, "--num_iterations", 10 ** 9) as process:
        read_up_to(process, "step 2/")
        process.send_signal(signal.SIGTERM)
        words = process.stdout.read()
        assert process.wait() == 143 and "go on" not in words
        assert re.match(r"stopped: \d+ updates, train loss ", words.splitlines()[-1])


def flipped(data, at, bit):
    data = bytearray(data)
    data[at] ^= bit
    return bytes(data)


DAMAGES = {
    "bit": lambda file, data: file.write_bytes(flipped(data, len(data) // 2, 1)),
    "high bit": lambda file, data: file.write_bytes(flipped(data, 9, 128)),
    "last byte": lambda file, data: file.write_bytes(flipped(data, -1, 4)),
    "cut": lambda file, data: file.write_bytes(data[:-1]),
    "empty": lambda file, data: file.write_bytes(b""),
    "missing": lambda file, data: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "main.log", "model.safetensors",
                                  "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_announced_and_the_one_before_taken(
        call_main, uninterrupted, tmp_path, name, damage):
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    before, newest = checkpoint_folders(tmp_path)
    assert {path.name for path in newest.iterdir()} == {path.name for path in before.iterdir()} >= {name}
    DAMAGES[damage](newest / name, (newest / name).read_bytes())
    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1))
    assert re.search(rf"(?m)^{re.escape(str(newest))} is damaged: .*: taking the one before it$", stdout)
    assert f"resuming from {before}\n" in stdout and uninterrupted.events.endswith(events(stdout))
    assert whole_state(tmp_path) == uninterrupted.state


@pytest.mark.parametrize("name, before_digit", [("config.json", rb'"n_head": '), ("main.log", b"s:1 trl:"),
                                                ("optimizer.safetensors", rb'step\\": ')])
def test_a_wrong_digit_in_a_checkpoint_is_damage(call_main, uninterrupted, tmp_path, name, before_digit):
    """4 heads need the same tensors as 2; 4 is also neither the first loss nor the number of updates."""
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    file = checkpoint_folders(tmp_path)[-1] / name
    before = file.read_bytes()
    file.write_bytes(re.sub(rb"(%b)\d" % before_digit, rb"\g<1>4", before))
    assert len(before) == len(file.read_bytes()) and before != file.read_bytes()
    stdout = succeeded(call_main(*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1))
    assert " is damaged: " in stdout and whole_state(tmp_path) == uninterrupted.state


def test_a_damaged_checkpoint_is_replaced_when_its_update_comes_again(call_main, uninterrupted, tmp_path):
    """Or else the run would end with a broken newest checkpoint, and the next find it."""
    flags = (*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1)
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    succeeded(call_main(*flags))
    newest = checkpoint_folders(tmp_path)[-1]
    for round in range(2):
        (newest / "model.safetensors").write_bytes(b"damaged")
        assert f"{newest} is damaged: " in succeeded(call_main(*flags))
        assert whole_state(tmp_path) == uninterrupted.state
        stdout = succeeded(call_main(*flags))
        assert "is damaged" not in stdout and f"resuming from {newest}\n" in stdout


def test_if_all_checkpoints_are_damaged_nothing_is_overwritten(call_main, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    for folder, name in zip(checkpoint_folders(tmp_path), ("model.safetensors", "optimizer.safetensors")):
        DAMAGES["last byte"](folder / name, (folder / name).read_bytes())
    before = folder_content(tmp_path)
    result = call_main(*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1)
    assert f"no checkpoint in {tmp_path} is whole" in failed_in_one_line(result)
    assert result[1].count(" is damaged: ") == 2 and "step " not in result[1]
    assert folder_content(tmp_path) == before


def test_the_last_two_checkpoints_are_kept(call_main, tmp_path):
    """Every third update makes one, and the end of each run."""
    kept = []
    for end in (2, 3, 6, 8, 12):
        flags = ("--checkpoint_every", 3, "--num_iterations", end, "--resume", int(end > 2))
        succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path, *flags))
        kept.append([int(folder.name.removeprefix("checkpoint_")) for folder in checkpoint_folders(tmp_path)])
    assert kept == [[2], [2, 3], [3, 6], [6, 8], [9, 12]]


def test_a_folder_with_checkpoints_is_not_begun_anew(call_main, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    before = folder_content(tmp_path)
    error = failed_in_one_line(call_main(*uninterrupted.flags, "--output_dir", tmp_path))
    assert f"{tmp_path} holds a run's checkpoints" in error and "--resume 1" in error
    assert folder_content(tmp_path) == before


def test_settings_that_contradict_the_run_are_refused_by_name(call_main, uninterrupted, tmp_path):
    """Each alone; two at once; and values for which no model could be laid out."""
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    before, was = folder_content(tmp_path), {**gpt2.DEFAULTS, **gpt2.parse(SMALL_RUN)}
    fixed = [name for name in gpt2.FLAGS if name not in gpt2.MAY_CHANGE]
    changes = [{name: was[name] + {int: 1, float: 0.5, str: "x"}[type(was[name])]} for name in fixed]
    changes += [{"learning_rate": 3.0, "seed": 7}]
    changes += [{"sequence_length": 17}, {"recompute": 9}, {"batch_size": 10 ** 6}]
    for change in changes:
        flags = [word for name, value in change.items() for word in (f"--{name}", value)]
        result = call_main(*SMALL_RUN, "--output_dir", tmp_path, "--resume", 1, *flags)
        named = ", ".join(f"--{name} {value!r} (it was {was[name]!r})" for name, value in change.items())
        assert f"can't go on with {named}: " in failed_in_one_line(result) and "damaged" not in result[1]
    assert len(fixed) > 14 and folder_content(tmp_path) == before


def test_a_machine_too_small_to_go_on_is_not_called_damage(call_main, uninterrupted, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted.early, tmp_path, dirs_exist_ok=True)
    before = folder_content(tmp_path)
    monkeypatch.setattr(gpt2, "available_memory", lambda: 1000)
    result = call_main(*uninterrupted.flags, "--output_dir", tmp_path, "--resume", 1)
    assert "the machine has 0: use" in failed_in_one_line(result) and "damaged" not in result[1]
    assert folder_content(tmp_path) == before


def test_what_may_change_may_change(call_main, uninterrupted, tmp_path):
    flags = """--num_iterations 9 --val_loss_every 1 --val_max_steps 1 --sample_every 9 --checkpoint_every 2
        --max_new_tokens 3 --temperature 0 --top_k 2 --prompt a""".split()
    assert {flag[2:] for flag in flags[::2]} | {"output_dir", "resume"} == gpt2.MAY_CHANGE
    shutil.copytree(uninterrupted.early, tmp_path / "here")
    stdout = succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "here", "--resume", 1, *flags))
    start = int(re.search(r"resuming from .*_(\d+)\n", stdout)[1])
    assert len(re.findall("(?m)^val loss ", stdout)) == 9 - start
    assert re.search(r"(?s)--- sample\na.{3}\n", stdout)
    os.rename(tmp_path / "here", tmp_path / "there")  # a folder may change its name
    stdout = succeeded(call_main(*SMALL_RUN, "--output_dir", tmp_path / "there", "--resume", 1))
    assert "step 10/12: " in stdout and f"saved in {tmp_path / 'there'}" in stdout


@pytest.mark.parametrize("counts", [(100, 60), (61, 100), (161,)])
def test_other_training_data_than_the_run_began_with_is_refused(
        call_main, uninterrupted, small_folder, tmp_path, monkeypatch, counts):
    """... also as many tokens, cut into other shards: a position in them means something else."""
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("train_*"))
    shutil.copytree(uninterrupted.early, tmp_path / "run")
    for i, count in enumerate(counts):
        write_token_file(tmp_path / f"train_{i}.bin", [97] * count)
    monkeypatch.chdir(tmp_path)
    error = failed_in_one_line(call_main(*uninterrupted.flags, "--output_dir", "run", "--resume", 1))
    assert "tokens of training data" in error


@posix_only
def test_two_runs_do_not_share_a_folder(small_folder, tmp_path):
    flags = (*SMALL_RUN, "--output_dir", tmp_path, "--sample_every", 0, "--val_loss_every", 0)
    with running_command(small_folder, *flags, "--num_iterations", 10 ** 9) as first:
        read_up_to(first, "step 2/")
        for more in ((), ("--resume", 1), ("--write_tensors", 1)):
            error = failed_in_one_line(run_command(small_folder, *flags, *more))
            assert f"{tmp_path}: another run is writing there" in error
        assert folder_content(tmp_path).keys() == {"main.log"}
        first.send_signal(signal.SIGINT)
        words = first.stdout.read()
        assert first.wait() == 130
    step = stopped_where(words)[0]
    lines = (tmp_path / "main.log").read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == [f"s:{i + 1}" for i in range(step)]
    stdout = succeeded(run_command(small_folder, *flags, "--num_iterations", step + 1, "--resume", 1))
    assert f"\nresuming from {tmp_path}" in stdout


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """After a power cut, a name must not stand for data that never arrived: each file is synced before it is
    renamed, the folder after that and before its own renaming, and last the folder around it."""
    done, fsync, replace = [], os.fsync, os.replace

    def syncing(handle):
        paths = [tmp_path, *tmp_path.rglob("*")]
        (path,) = [path for path in paths if os.path.samestat(os.stat(path), os.fstat(handle))]
        done.append(("sync", str(path.relative_to(tmp_path))))
        fsync(handle)

    def renaming(old, new):
        done.append(("rename", os.path.relpath(old, tmp_path)))
        replace(old, new)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    gpt2.save_checkpoint(gpt2.GPT2(SMALL, 1, 4), str(tmp_path), {"step": 7, "log": ["s:1 trl:5.0000"]})
    files = [path for kind, path in done if kind == "rename"][:-1]
    assert len(files) == 5
    assert all(done.index(("sync", path)) < done.index(("rename", path)) for path in files)
    assert done[-3:] == [("sync", "checkpoint.tmp"), ("rename", "checkpoint.tmp"), ("sync", ".")]


def test_a_run_outlives_the_want_of_a_vocabulary(small_folder, tmp_path, monkeypatch, capsys):
    """Where a sample can't be put into words, the run says why, goes on, and keeps what it learned."""
    def no_words(vocab_size):
        raise InputError("no vocabulary here")
    monkeypatch.chdir(small_folder)
    monkeypatch.setattr(prepro, "tokenizer", no_words)
    assert gpt2.main([*SMALL_RUN, "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("none: no vocabulary here") == 3
    assert (tmp_path / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------
# The benchmark: python test_gpt2.py --benchmark
#
# Whatever is compared runs in a process of its own, which prints one line of JSON, and the candidates take
# turns, round after round, so that what else the machine is doing strikes all alike. The reference is the
# PyTorch model above, at its best: scaled_dot_product_attention, fused AdamW, eager and compiled.

def steps_for(tokens):
    """(to warm up, timed): how many steps of that many tokens a process makes."""
    return (2, 8) if tokens < 1024 else (1, 4) if tokens < 4096 else (1, 2)


def random_batch(config, B, T):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, B, T))
    return tokens[0], tokens[1]


def fresh_config(name):
    C = gpt2.FRESH[name]
    return gpt2.GPT2Config(num_layers=int(name[1:]), num_heads=C // 64, channels=C)


def peak_mb():
    """The most memory that this process ever had in RAM."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1024)


def timed_steps(passes, steps, started):
    """steps: how many to warm up, how many to time, each of them forward, backward, update. What a child reports;
    with `started`, the time when the process was started, only the first step."""
    times = []
    for _ in range(1 if started else sum(steps)):
        marks = [time.perf_counter()]
        for one in passes:
            one()
            marks.append(time.perf_counter())
        times.append([b - a for a, b in zip(marks, marks[1:])])
    return {"times": times if started else times[steps[0]:], "peak": peak_mb(), "since_start": started and time.time() - started}


def child_train(model, B, T, steps, recompute=1, weights=None, started=None):
    config, step = fresh_config(model), itertools.count(1)
    inputs, targets = random_batch(config, B, T)
    ours = (gpt2.GPT2.from_pretrained(weights, B, T, recompute) if weights
            else gpt2.GPT2(config, B, T, recompute=recompute))
    return timed_steps([lambda: ours.forward(inputs, targets), ours.backward,
                        lambda: ours.update(1e-4, step=next(step))], steps, started)


def child_train_torch(model, B, T, steps, compiled=False, weights=None, started=None):
    config, loss = fresh_config(model), [None]
    x, y = map(torch.from_numpy, random_batch(config, B, T))
    params = {name: np.zeros(shape, np.float32) for name, shape in gpt2.param_shapes(config).items()}
    if not weights:
        gpt2.init_weights(params, 1337)
    theirs = TorchGPT2(config, params)
    del params
    if weights:
        theirs.load_state_dict(torch.load(os.path.join(weights, "model.pt"), weights_only=True, mmap=True))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    compute = torch.compile(theirs) if compiled else theirs

    def forward():
        optimizer.zero_grad(set_to_none=True)
        loss[0] = compute(x, y)
    return timed_steps([forward, lambda: loss[0].backward(), optimizer.step], steps, started)


@torch.no_grad()
def torch_generate(theirs, tokens, n):
    """Greedy continuation with a key/value cache, so that PyTorch too computes one position per token."""
    caches, position, new = [None] * len(theirs.blocks), 0, torch.tensor([tokens])
    for _ in range(n):
        x = theirs.wte(new) + theirs.wpe.weight[position:position + new.shape[1]]
        for i, block in enumerate(theirs.blocks):
            q, k, v = torch_heads(block.qkv(block.ln1(x)), block.NH)
            if caches[i]:
                k, v = torch.cat([caches[i][0], k], 2), torch.cat([caches[i][1], v], 2)
            caches[i] = (k, v)
            att = F.scaled_dot_product_attention(q, k, v, is_causal=new.shape[1] > 1)
            x = x + block.attproj(att.transpose(1, 2).flatten(2))
            x = x + block.fcproj(F.gelu(block.fc(block.ln2(x)), approximate="tanh"))
        position += new.shape[1]
        new = F.linear(theirs.lnf(x[:, -1:]), theirs.wte.weight).argmax(-1)
        yield int(new)


def timed_tokens(run, tokens):
    """Seconds for that many new tokens, after eight to warm up."""
    run(8)
    began = time.perf_counter()
    run(tokens)
    return {"seconds": time.perf_counter() - began, "peak": peak_mb()}


def child_generate(tokens):
    ours = gpt2.GPT2(gpt2.GPT2Config(), 1, 1024, recompute=4)
    return timed_tokens(lambda n: list(ours.generate([50256], n, temperature=0)), tokens)


def child_generate_torch(tokens):
    config = gpt2.GPT2Config()
    params = {name: np.zeros(shape, np.float32) for name, shape in gpt2.param_shapes(config).items()}
    gpt2.init_weights(params, 1337)
    theirs = TorchGPT2(config, params)
    return timed_tokens(lambda n: list(torch_generate(theirs, [50256], n)), tokens)


def child_generate_transformers(tokens):
    import transformers
    theirs, prompt = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval(), torch.tensor([[50256]])
    return timed_tokens(lambda n: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                                  min_new_tokens=n, max_new_tokens=n, pad_token_id=0), tokens)


def child_limits():
    """What this machine can do: the best rate of sgemm, in FLOP/s, and of streaming through memory, in B/s."""
    rng, rates = np.random.default_rng(0), []
    for M, K, N in ((256, 768, 3072), (1024, 768, 3072), (2048, 2048, 2048)):
        a, b, out = rng.random((M, K), np.float32), rng.random((K, N), np.float32), np.empty((M, N), np.float32)
        rates += [2 * M * K * N / min(timeit.repeat(lambda: np.matmul(a, b, out=out), number=4, repeat=12)) * 4]
    x, y = torch.ones(1 << 27), torch.ones(1 << 27)  # 512 MB each: far beyond any cache
    seconds = min(timeit.repeat(lambda: torch.add(x, y, alpha=0.5, out=y), number=1, repeat=6))
    return {"flops": max(rates), "bandwidth": 3 * x.nbytes / seconds}


def in_a_process(threads, function, **arguments):
    """Call one of the child_ functions above in a process of its own. Ours see nothing of this file but what they
    need, so that they don't pay for importing PyTorch."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads),
                   "MKL_NUM_THREADS": str(threads), "PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}
    program = "import test_gpt2\nfrom test_gpt2 import *\n"
    if function in (child_train, child_generate):
        needed = (fresh_config, random_batch, peak_mb, timed_steps, timed_tokens, function)
        program = ("import itertools, sys, time\nimport train_gpt2 as gpt2\nimport numpy as np\n"
                   + "\n".join(map(inspect.getsource, needed)))
    program += f"\nimport json\nprint(json.dumps({function.__name__}(**json.loads({json.dumps(arguments)!r}))))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def matmul_flops(config, B, T):
    """Of one training step: two per weight and token forward, twice that backward; attention's causal half."""
    weights = config.num_layers * 12 * config.channels ** 2 + config.vocab_size * config.channels
    return 6 * B * T * (weights + config.num_layers * config.channels * T)


def machine(threads):
    """One paragraph on what all this was measured on."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    try:
        import threadpoolctl
        blas = "; ".join(f"{b['internal_api']} {b['version']} {b.get('architecture', '')}"
                         for b in threadpoolctl.threadpool_info() if b["user_api"] == "blas")
    except ImportError:
        blas = "{name} {version}".format(**np.show_config("dicts")["Build Dependencies"]["blas"])
    return (f"{cpu}, {gpt2.CPUS} cores, {threads} threads; Python {platform.python_version()}, NumPy {np.__version__} "
            f"({blas}), PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}); "
            f"{time.strftime('%Y-%m-%d')}")


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def median_step(runs):
    """The median over all timed steps of several processes: (total, forward, backward, update), and the least total."""
    times = sorted([sum(t), *t] for run in runs for t in run["times"])
    return times[len(times) // 2], times[0][0]


def run_training(shape, rounds, threads, kinds, model="d12"):
    """{label: what its processes report} for one shape (B, T); each kind is (label, arguments of child_train)."""
    (B, T), runs = shape, {label: [] for label, _ in kinds}
    for i in range(rounds):
        for label, arguments in kinds:
            say(f"  {model}, B={B}, T={T}, {threads} threads, round {i + 1} of {rounds}: {label}")
            child = child_train_torch if label.startswith("PyTorch") else child_train
            runs[label].append(in_a_process(threads, child, B=B, T=T, model=model, steps=steps_for(B * T), **arguments))
    return runs


def limit_of(config, B, T, limits):
    """Seconds that a step would take at the machine's limits."""
    n = 4 * gpt2.size(gpt2.param_shapes(config))
    return matmul_flops(config, B, T) / limits["flops"] + 7 * n / limits["bandwidth"]


def compare_training(shape, rounds, threads, limits, kinds):
    """Print the rows of the table for one shape."""
    (B, T), runs = shape, run_training(shape, rounds, threads, kinds)
    theirs = [label for label in runs if label.startswith("PyTorch")]
    fastest = min(median_step(runs[label])[0][0] for label in theirs)
    leanest = min(min(run["peak"] for run in runs[label]) for label in theirs)
    for label in runs:
        (total, forward, backward, update), least = median_step(runs[label])
        peak = min(run["peak"] for run in runs[label])
        print(f"| {B}, {T} | {label} | {total * 1e3:.0f} ({least * 1e3:.0f}) | {forward * 1e3:.0f} / {backward * 1e3:.0f} / "
              f"{update * 1e3:.0f} | {B * T / total:.0f} | {peak:.0f} | {fastest / total:.2f} | {peak / leanest:.2f} | "
              f"{limit_of(fresh_config('d12'), B, T, limits) / total:.0%} |", flush=True)


def how_cost_grows(threads, limits, ours):
    """Print what a token costs as sequences get longer, and as the model gets larger."""
    print("\n| train_gpt2.py | B, T | ms per step, median | ms per token | GFLOP per token | of the limit |\n"
          "|---|---|---|---|---|---|")
    for model, B, T in [("d12", 1024 // T, T) for T in (64, 128, 256, 512, 1024)] + [(m, 4, 64) for m in ("d6", "d12", "d24")]:
        [runs] = run_training((B, T), 1, threads, [ours], model).values()
        config, total = fresh_config(model), median_step(runs)[0][0]
        print(f"| {model} | {B}, {T} | {total * 1e3:.0f} | {total / B / T * 1e3:.2f} | "
              f"{matmul_flops(config, B, T) / B / T / 1e9:.2f} | {limit_of(config, B, T, limits) / total:.0%} |", flush=True)


def compare_generation(rounds, threads, limits):
    weights, found = 4 * gpt2.size(gpt2.param_shapes(gpt2.GPT2Config())), {}
    kinds = {"train_gpt2.py": child_generate, "PyTorch with a cache": child_generate_torch}
    if importlib.util.find_spec("transformers"):
        kinds["Hugging Face generate"] = child_generate_transformers
    for i in range(rounds):
        for kind, child in kinds.items():
            say(f"  generation, round {i + 1} of {rounds}: {kind}")
            found.setdefault(kind, []).append(in_a_process(threads, child, tokens=256))
    print("\n| generation, 256 tokens | tokens/s | of the bandwidth limit | peak MB |\n|---|---|---|---|")
    for kind, runs in found.items():
        rate = 256 / sorted(run["seconds"] for run in runs)[len(runs) // 2]
        print(f"| {kind} | {rate:.1f} | {rate * weights / limits['bandwidth']:.0%} | {runs[0]['peak']:.0f} |", flush=True)


def compare_start(threads):
    """From the start of the process to the end of its first step at B=4, T=64, with weights from disk."""
    seconds = {child_train: [], child_train_torch: []}
    with tempfile.TemporaryDirectory() as folder:
        model = gpt2.GPT2(gpt2.GPT2Config(), 1, 1)
        model.save_pretrained(folder)
        torch.save(TorchGPT2(model.config, model.params).state_dict(), os.path.join(folder, "model.pt"))
        del model
        for i in range(3):
            for child in seconds:
                say(f"  from the start of the process to the end of the first step, round {i + 1} of 3: {child.__name__}")
                seconds[child].append(in_a_process(threads, child, model="d12", B=4, T=64, steps=None, weights=folder,
                                                   started=time.time())["since_start"])
    ours, theirs = (sorted(times)[1] for times in seconds.values())
    print(f"\nFrom the start of the process to the end of the first step, B=4, T=64, weights from disk (median of 3): "
          f"train_gpt2.py {ours:.1f} s, PyTorch eager {theirs:.1f} s")


TABLE = """
| B, T | who | ms per step, median (least) | forward / backward / update | tokens/s | peak MB | speed | memory | of the limit |
|---|---|---|---|---|---|---|---|---|"""


def benchmark(arguments):
    """Speed: times PyTorch's fastest mode. Memory: times PyTorch's leanest. The limit: see the last line."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    began, threads = time.time(), arguments.threads
    limits = in_a_process(threads, child_limits)
    print(machine(threads) + "\n" + TABLE, flush=True)
    ours = [(f"train_gpt2.py --recompute {r}", {"recompute": r}) for r in arguments.recompute]
    eager, compiled = ("PyTorch eager", {}), ("PyTorch compiled", {"compiled": True})
    for shape in shapes:
        long = shape[0] * shape[1] >= 1024  # seconds per step: one round must do
        compare_training(shape, 1 if long else arguments.rounds, threads, limits, [*ours, eager, compiled])
    if arguments.full:
        print("\nOne thread" + TABLE)
        compare_training((4, 64), 1, 1, in_a_process(1, child_limits), [ours[0], eager])
        how_cost_grows(threads, limits, ours[0])
    if arguments.full or arguments.generation:
        compare_generation(arguments.rounds, threads, limits)
    if arguments.full:
        compare_start(threads)
    print(f"\nThe limit: all matrix products at {limits['flops'] / 1e9:.0f} GFLOP/s, the best that NumPy's matmul showed here, "
          f"and then AdamW's seven passes over the parameters at {limits['bandwidth'] / 1e9:.1f} GB/s.")
    say(f"done in {time.time() - began:.0f} s")


def main():
    parser = argparse.ArgumentParser(description="The proofs run with python -m pytest; this measures.")
    parser.add_argument("--benchmark", action="store_true", help="measure speed and memory beside PyTorch")
    parser.add_argument("--shapes", default="", help="B x T, separated by commas (default: 4x64,1x1024; with --full also 4x1024)")
    parser.add_argument("--rounds", type=int, default=2, help="how often the candidates take turns (default: 2)")
    parser.add_argument("--threads", type=int, default=gpt2.CPUS, help="for everybody (default: all cores)")
    parser.add_argument("--recompute", type=int, nargs="+", default=[1, 3], help="our modes (default: 1 3)")
    parser.add_argument("--generation", action="store_true", help="also measure generation")
    parser.add_argument("--full", action="store_true", help="everything: under 15 minutes on two cores")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or "4x64,1x1024" + (",4x1024" if arguments.full else "")
    if arguments.benchmark:
        benchmark(arguments)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
