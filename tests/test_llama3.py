"""The proofs of extras/llama3.py: beside a Llama in PyTorch, and beside that of transformers."""

import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt2 as gpt2
from extras import llama3
from extras.llama3 import Llama, LlamaConfig, LlamaModel
from test_gpt2 import BOTH_FLOATS, assert_all_close, assert_same_bits, random_tokens
from train_gpt2 import InputError, Model

SCALED = {"rope_factor": 8.0, "original_max_seq_len": 16}
SHAPES = {
    "two share a key": {},
    "all share a key": {"num_kv_heads": 1},
    "none share a key": {"num_kv_heads": 4, "num_layers": 1},
    "scaled": SCALED,
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)


def random_llama(B, T, dtype=np.float64, recompute=1, training=True, **changed):
    """A small Llama. Its parameters are random, all else is NaN until it is written."""
    sizes = {"max_seq_len": T + 2, "vocab_size": 53, "num_layers": 3, "num_heads": 4,
             "num_kv_heads": 2, "channels": 24, "ffn_channels": 20,
             "norm_eps": 1e-3, "rope_theta": 100.0}  # fmt: skip
    model = Llama(LlamaConfig(**sizes | changed), B, T, None, recompute, training, dtype)
    model.blob[...] = np.nan
    model.flat[2:] = 0  # AdamW's m and v
    rng = np.random.default_rng(1)
    for name, view in model.params.items():
        view[...] = 0.3 * rng.standard_normal(view.shape, np.float32) + name.startswith("ln")
    return model


# --------------------------------------------------------------------------------------------------
# Every tensor beside PyTorch, which finds the gradients by itself


def torch_rotated(x, config):
    """(B, T, heads, hs), turned as complex numbers x[i] + j * x[i + hs/2]."""
    T, hs = x.shape[1], x.shape[3]
    freq = config.rope_theta ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)
    for i, f in enumerate(freq.tolist()):  # by wavelengths, as Meta's own code says it
        wavelength, old = 2 * math.pi / f, config.original_max_seq_len
        low, high = config.low_freq_factor, config.high_freq_factor
        if wavelength > old / low:
            freq[i] = f / config.rope_factor
        elif wavelength > old / high:
            smooth = (old / wavelength - low) / (high - low)
            freq[i] = (1 - smooth) * f / config.rope_factor + smooth * f
    angles = torch.outer(torch.arange(T).double(), freq)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def torch_llama(config, params, inputs, targets, keep):
    """The mean loss. keep(name, tensor) sees every intermediate."""
    NH, NKV = config.num_heads, config.num_kv_heads

    def norm(x, name, weight):
        rstd = keep(f"{name}_rstd", (x.square().mean(-1) + config.norm_eps).rsqrt())
        return keep(name, weight * x * rstd.unsqueeze(-1))

    residual = keep("encoded", F.embedding(torch.tensor(inputs), params["wte"]))
    for l in range(config.num_layers):
        p = SimpleNamespace(**{n: params[n][l] for n in LlamaModel.layer_params(config)})
        raw = keep("raw", F.linear(norm(residual, "ln1", p.ln1w), p.qkvw))
        q, k, v = raw.unflatten(-1, (NH + 2 * NKV, -1)).split([NH, NKV, NKV], 2)
        q, k = torch_rotated(q, config), torch_rotated(k, config)
        keep("grouped", torch.cat([q, k, v], 2).flatten(2))
        k, v = (x.repeat_interleave(NH // NKV, 2) for x in (k, v))
        qkv = keep("qkv", torch.cat([q, k, v], 2).flatten(2))
        q, k, v = (x.transpose(1, 2) for x in qkv.unflatten(-1, (3 * NH, -1)).split(NH, 2))
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        keep("att_lse", scores.logsumexp(-1).transpose(1, 2))
        atty = keep("atty", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        residual = keep("residual2", residual + keep("attproj", F.linear(atty, p.attprojw)))
        gate, up = keep("fch", F.linear(norm(residual, "ln2", p.ln2w), p.fcw)).chunk(2, -1)
        fcproj = keep("fcproj", F.linear(keep("fch_swiglu", F.silu(gate) * up), p.fcprojw))
        residual = keep("residual3", residual + fcproj)
    logits = F.linear(norm(residual, "lnf", params["lnfw"]), params["lmhead"])
    return keep("losses", F.cross_entropy(logits.mT, torch.tensor(targets), reduction="none")).mean()


@BOTH_FLOATS
@EVERY_SHAPE
@pytest.mark.parametrize("B, T, rows", [(2, 9, 256), (1, 131, 50)], ids=["short", "long, pieces"])
def test_every_tensor_equals_pytorch(B, T, rows, shape, dtype, monkeypatch):
    """Of two micro-batches, and of all tables: a tensor that is not compared is a failure."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", rows)
    model = random_llama(B, T, dtype, recompute=0, **SHAPES[shape])
    config, work = model.config, []
    params = {name: torch.tensor(view).double().requires_grad_()
              for name, view in model.params.items()}  # fmt: skip
    backward_layer = LlamaModel.backward_layer

    def watched(self, p, g, a, w, *others):
        backward_layer(self, p, g, a, w, *others)
        work.append({name: view.copy() for name, view in vars(w).items()})

    monkeypatch.setattr(LlamaModel, "backward_layer", watched)
    ours, truth = {}, {}
    for part, (inputs, targets) in enumerate(random_tokens(2, B=B, T=T)):
        kept = {}

        def keep(name, x, kept=kept):
            x.retain_grad()
            kept.setdefault(name, []).append(x)
            return x

        true_loss = torch_llama(config, params, inputs, targets, keep)
        (true_loss * 0.75).backward()
        assert model.forward(inputs, targets, grad_scale=0.75) == pytest.approx(true_loss.item())
        model.backward()

        for name in model.acts.keys() - model.work_shapes(config, B, T) - {"logits"}:
            ours[part, name] = model.acts[name].copy()
            layers = [x.detach().numpy() for x in kept[name]]
            truth[part, name] = np.stack(layers) if len(layers) > 1 else layers[0]
            truth[part, name] = truth[part, name].reshape(ours[part, name].shape)
        grads = {name: [x.grad for x in layers] for name, layers in kept.items()}
        grads["grouped"] = grads["raw"]  # after rope_backward
        grads["residual"] = grads["encoded"] + grads["residual3"]  # of the input of each layer
        grads["lnf"] *= config.num_layers
        for l in range(config.num_layers):
            for name, view in work.pop().items():
                ours[part, name, l], truth[part, name, l] = view, grads[name[1:]][l].numpy()
    truth |= {name: params[name].grad.numpy() for name in model.grads}
    assert_all_close(ours | dict(model.grads), truth)
    assert {key[1] for key in truth if isinstance(key, tuple)} == model.acts.keys() - {"logits"}


@pytest.mark.parametrize("recompute", [1, 2])
def test_recompute_changes_no_bit(recompute):
    found = []
    for model in (random_llama(2, 9, recompute=0), random_llama(2, 9, recompute=recompute)):
        for inputs, targets in random_tokens(2, B=2, T=9):
            model.forward(inputs, targets)
            model.backward()
        found.append(model.grads)
        assert len(model.acts["residual3"]) == 3 and not np.isnan(model.flat[1]).any()
    assert_same_bits(*found)


# --------------------------------------------------------------------------------------------------
# Layers by hand, and in blocks


def test_layers_by_hand():
    out, rstd = np.empty((1, 1, 3)), np.empty((1, 1))
    llama3.rmsnorm_forward(out, rstd, np.array([[[1.0, 2, 6]]]), np.ones(3), 0.0)
    assert np.round(out, 3).tolist() == [[[0.271, 0.541, 1.623]]]

    angles = np.arange(14.0)[:, np.newaxis]
    for t, t2 in ((3, 1), (13, 11)):
        heads = np.array([[[1.0, 0], [1.0, 0]]])  # a query and a key
        llama3.rope_forward(heads, np.array([[t, t2]]), np.cos(angles), np.sin(angles), 1)
        assert heads[0, 0] @ heads[0, 1] == pytest.approx(math.cos(2), abs=1e-12)

    out, dinp, inp = np.empty((1, 1, 1)), np.empty((1, 1, 2)), np.array([[[math.log(3), 2]]])
    llama3.swiglu_forward(out, inp)
    llama3.swiglu_backward(dinp, np.ones((1, 1, 1)), inp)
    assert np.round([*out.flat, *dinp.flat], 3).tolist() == [1.648, 1.912, 0.824]
    llama3.swiglu_forward(out, np.array([[[-1e4, 2]]], np.float32))
    assert out == 0

    qkv, grouped = np.empty((1, 1, 6)), np.array([[[1.0, 2, 3, 4]]])
    llama3.repkv_forward(qkv, grouped, 2, 1)
    assert qkv.tolist() == [[[1, 2, 3, 3, 4, 4]]]
    llama3.repkv_backward(grouped, np.array([[[1.0, 2, 3, 4, 5, 6]]]), 2, 1)
    assert grouped.tolist() == [[[1, 2, 7, 11]]]


def test_blocks_change_no_number():
    """The layers as they are wrapped beside the plain ones, on arrays of several blocks."""
    rng = np.random.default_rng(5)
    wide, half, row = (rng.standard_normal((2, 150, *n)) for n in [(2048,), (1024,), ()])
    positions = np.tile(np.arange(150), (2, 1))
    cos, sin = rng.standard_normal((2, 150, 32))
    calls = {
        "rmsnorm_forward": (half, row, wide[..., :1024], wide[0, 0, :1024], 1e-5),
        "rmsnorm_backward": (half, wide[0, 0, :1024], half + 1, half + 2, row, wide[1, 1, :1024], True),
        "rope_forward": (wide, positions, cos, sin, 20),
        "rope_backward": (wide, positions, cos, sin, 20),
        "repkv_forward": (np.empty((2, 150, 3 * 1024)), wide, 16, 8),
        "repkv_backward": (wide, np.repeat(half, 3, axis=2), 16, 8),
        "swiglu_forward": (half, wide),
        "swiglu_backward": (wide.copy(), half, wide),
    }
    for name, args in calls.items():
        layer, found = getattr(llama3, name), []
        for version in (layer, getattr(layer, "__wrapped__", layer)):
            own = [x.copy() if isinstance(x, np.ndarray) else x for x in args]
            version(*own)
            found.append(dict(enumerate(own[:2])))
        assert_all_close(*found, 1e-13)


# --------------------------------------------------------------------------------------------------
# What is written, and what a person holds


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_keys_equals_generation_without(training, temperature):
    """Also where the window is full and its older half is dropped."""
    model = random_llama(2, 9, training=training)
    model.keys = [1, 2]  # what acts["qkv"] does not hold: generate() must forget it
    written = list(model.generate([1, 2, 3, 4], 30, temperature, rng=3))
    plain = random_llama(2, 9, training=training)
    plain.next_logits = lambda tokens: Model.next_logits(plain, tokens)
    rng = np.random.default_rng(3)
    assert written == list(gpt2.generate(plain, [1, 2, 3, 4], 30, temperature, 0, rng))
    assert len(set(written)) > 3
    assert_all_close({0: model.acts["logits"][0, 0]}, {0: plain.acts["logits"][0, 0]})


def test_the_calls_of_gpt2_are_checked_here_too():
    model = random_llama(2, 9, np.float32)
    inputs, targets = random_tokens(B=2, T=9)
    with pytest.raises(InputError, match="backward.. can't follow"):
        model.backward()
    with pytest.raises(InputError, match="53"):
        model.forward(inputs + 53, targets)
    loss = model.forward(inputs, targets, train=False)
    losses = model.acts["losses"][0].tolist()
    scored = model.token_losses(inputs[0, :3], [targets[0, 2:], targets[0, 2:5]])
    assert scored[0] == pytest.approx(losses[2:], rel=1e-4) and len(scored[1]) == 3
    twin = pickle.loads(pickle.dumps(model))
    loader = SimpleNamespace(next_batch=lambda: (inputs, targets))
    for step in range(20):
        found = {gpt2.train_step(m, loader, 1, 1e-2, 0.1, 1.0) for m in (model, twin)}
    assert len(found) == 1 and found.pop()[0] < loss / 2


# --------------------------------------------------------------------------------------------------
# Hugging Face's files


@pytest.mark.parametrize("shape", ["two share a key", "none share a key", "scaled"])
def test_transformers_finds_the_same_logits_and_gradients(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_llama(2, 40, np.float32, **SHAPES[shape])
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs, targets = random_tokens(B=2, T=40)
    logits = theirs(torch.tensor(inputs)).logits
    F.cross_entropy(logits.mT, torch.tensor(targets)).backward()
    ours.forward(inputs, targets)
    ours.backward()
    found = llama3.huggingface_views(ours.config, ours.grads)
    assert_all_close(found, {n: p.grad.numpy() for n, p in theirs.named_parameters()}, 1e-5)
    for t in (0, 20, 39):
        next_logits = ours.next_logits(inputs[1, : t + 1].tolist())
        assert_all_close({t: next_logits}, {t: logits[1, t].detach().numpy()}, 1e-5)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        theirs.to(dtype).save_pretrained(tmp_path / str(dtype), max_shard_size="5KB")
        again = Llama.from_pretrained(tmp_path / str(dtype), 1, 8)
        assert len(list((tmp_path / str(dtype)).glob("*.safetensors"))) > 2
        assert again.config == ours.config
        truth = {name: p.detach().float().numpy() for name, p in theirs.named_parameters()}
        assert_same_bits(llama3.huggingface_views(again.config, again.params), truth)


def test_a_classifier_that_is_wte_becomes_a_copy(tmp_path):
    model = random_llama(1, 8, np.float32)
    model.save_pretrained(tmp_path)
    tensors = llama3.huggingface_views(model.config, model.params)
    del tensors["lm_head.weight"]
    gpt2.write_safetensors(tmp_path / "model.safetensors", tensors, {})
    with pytest.raises(InputError, match="lm_head.weight"):
        Llama.from_pretrained(tmp_path)
    changed_config(tmp_path, tie_word_embeddings=True)
    model.params["lmhead"][...] = model.params["wte"]
    assert_same_bits(Llama.from_pretrained(tmp_path, 1, 8).params, model.params)


def changed_config(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model_type": "mistral"}, "model_type = 'mistral', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 8}, "head_dim = 8, expected 6"),
        ({"rope_scaling": YARN}, "low_freq_factor is None"),
        ({"rope_scaling": YARN | {"type": "linear"}}, "low_freq_factor is None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta is -1"),
        ({"num_key_value_heads": 3}, "4 heads of queries can't share 3"),
        ({"num_attention_heads": 24}, "24 channels can't be shared by 24"),
        ({"num_hidden_layers": 1 << 40}, "3 layers"),
        ({"hidden_size": 1 << 62}, "config.json: "),
        ({"vocab_size": 54}, "lm_head.weight"),
        ({"rms_norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
        ({"rms_norm_eps": None}, "norm_eps is None"),
    ],
)
def test_another_model_is_one_line(changed, message, tmp_path, capsys):
    random_llama(1, 8, np.float32).save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path, 1, 8).config.channels == 24
    changed_config(tmp_path, **changed)
    assert llama3.main(["--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_program(tmp_path, capsys):
    folder = str(tmp_path / "small")
    assert llama3.main(["--num_iterations", "20", "--output_dir", folder]) == 0
    first, last = [line.split() for line in capsys.readouterr().out.splitlines()[4:6]]
    assert first[0] == "0" and last[0] == "20"
    assert all(float(after) < float(before) - 1 for before, after in zip(first[3:], last[3:]))
    assert llama3.main(["--output_dir", folder]) == 1
    assert "holds a model" in capsys.readouterr().err
    command = ["--model", folder, "--prompt_ids", "10,20", "--max_new_tokens", "3"]
    assert llama3.main([*command, "--temperature", "0"]) == 0
    model = Llama.from_pretrained(folder)
    ids = list(model.generate([10, 20], 3, temperature=0))
    assert capsys.readouterr().out.split() == [str(i) for i in ids]
