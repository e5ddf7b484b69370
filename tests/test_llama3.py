"""The proofs of extras/llama3.py: beside a Llama in PyTorch, and beside that of transformers."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import failed_in_one_line

import test_gpt2
import train_gpt2 as gpt2
from extras import llama3
from extras.llama3 import Llama, LlamaConfig, LlamaModel
from test_gpt2 import BOTH_FLOATS, assert_all_close, assert_same_bits, random_tokens
from train_gpt2 import InputError, Model

SHAPES = {
    "two share a key": {},
    "all share a key": {"num_kv_heads": 1},
    "none share a key": {"num_kv_heads": 4, "num_layers": 1},
    "in blocks": {"channels": 512, "ffn_channels": 700, "num_layers": 1},  # if T is 131
    "scaled": {"rope_factor": 8.0, "original_max_seq_len": 40},  # all, some, no pairs are slowed
}


def random_llama(B, T, dtype=np.float64, recompute=1, training=True, **changed):
    """A small Llama. Its parameters are random, all else is NaN until it is written."""
    config = replace(LlamaConfig(T + 2, 53, 3, 4, 2, 24, 20, 1e-3, 100.0), **changed)
    model = Llama(config, B, T, None, recompute, training, dtype)
    model.blob[...] = np.nan
    rng = np.random.default_rng(1)
    for name, view in model.params.items():
        view[...] = rng.normal(name.startswith("ln"), 1 / config.channels**0.5, view.shape)
    return model


# --------------------------------------------------------------------------------------------------
# Every tensor beside PyTorch, which finds the gradients by itself


def torch_rotated(x, config):
    """(B, T, heads, hs), turned as complex numbers x[i] + j * x[i + hs/2]."""
    freq = config.rope_theta ** (-torch.arange(0, x.shape[3], 2).double() / x.shape[3])
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_max_seq_len / (2 * math.pi / freq)
    slowed = freq / config.rope_factor  # that this is Llama's rule, transformers shows below
    freq = slowed + (freq - slowed) * ((turns - low) / (high - low)).clamp(0, 1)
    angles = torch.outer(torch.arange(x.shape[1]).double(), freq)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def torch_llama(config, params, inputs, targets):
    """The mean loss, and all that was computed on the way: {name: [tensor of each layer]}."""
    NH, NKV = config.num_heads, config.num_kv_heads
    kept = {}

    def keep(name, x):
        x.retain_grad()
        kept.setdefault(name, []).append(x)
        return x

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
        keep("att_lse", test_gpt2.torch_lse(qkv, NH))
        atty = keep("atty", test_gpt2.torch_attention(qkv, NH))
        residual = keep("residual2", residual + keep("attproj", F.linear(atty, p.attprojw)))
        gate, up = keep("fch", F.linear(norm(residual, "ln2", p.ln2w), p.fcw)).chunk(2, -1)
        fcproj = keep("fcproj", F.linear(keep("fch_swiglu", F.silu(gate) * up), p.fcprojw))
        residual = keep("residual3", residual + fcproj)
    logits = F.linear(norm(residual, "lnf", params["lnfw"]), params["lmhead"])
    return keep("losses", test_gpt2.torch_losses(logits, torch.tensor(targets))).mean(), kept


@BOTH_FLOATS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("B, T, rows", [(2, 9, 256), (1, 131, 50)], ids=["short", "long, pieces"])
def test_every_tensor_equals_pytorch(B, T, rows, shape, dtype, monkeypatch):
    """All that stands in the tables, of two micro-batches."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", rows)
    model = random_llama(B, T, dtype, recompute=0, **SHAPES[shape])
    params = {n: torch.tensor(x).double().requires_grad_() for n, x in model.params.items()}
    ours, truth = {}, {}
    for part, (inputs, targets) in enumerate(random_tokens(2, B=B, T=T)):
        true_loss, kept = torch_llama(model.config, params, inputs, targets)
        (true_loss * 0.75).backward()
        assert model.forward(inputs, targets, grad_scale=0.75) == pytest.approx(true_loss.item())
        model.backward()

        grads = {"d" + name: [x.grad for x in tensors] for name, tensors in kept.items()}
        grads["dgrouped"] = grads["draw"]  # after rope_backward
        grads["dresidual"] = grads["dencoded"]
        for name in model.acts.keys() - {"logits"}:
            of_layers = kept[name] if name in kept else grads[name][:1]  # all write to one place
            ours[part, name] = model.acts[name].copy()
            values = torch.stack(of_layers).detach().numpy()
            truth[part, name] = values.reshape(ours[part, name].shape)
    truth |= {name: x.grad.numpy() for name, x in params.items()}
    assert_all_close(ours | dict(model.grads), truth)


@pytest.mark.parametrize("recompute", [1, 2])
def test_recompute_changes_no_bit(recompute):
    models = [random_llama(2, 9, recompute=level) for level in (0, recompute)]
    for model in models:
        for inputs, targets in random_tokens(2, B=2, T=9):
            model.forward(inputs, targets)
            model.backward()
    assert_same_bits(models[0].grads, models[1].grads)
    assert [len(model.acts["grouped"]) for model in models] == [3, 1]


def test_layers_by_hand():
    out, rstd = np.empty((1, 1, 3)), np.empty((1, 1))
    llama3.rmsnorm_forward(out, rstd, np.array([[[1.0, 2, 6]]]), np.ones(3), 0.0)
    assert np.round(out, 3).tolist() == [[[0.271, 0.541, 1.623]]]
    for t, t2 in ((3, 1), (13, 11)):
        heads = np.array([[[1.0, 0], [1.0, 0]]])  # a query and a key
        llama3.rope_forward(heads, np.array([[t, t2]]), np.ones(1), 1)
        assert heads[0, 0] @ heads[0, 1] == pytest.approx(math.cos(2), abs=1e-12)
    out, dinp, inp = np.empty((1, 1, 1)), np.empty((1, 1, 2)), np.array([[[math.log(3), 2]]])
    llama3.swiglu_forward(out, inp)
    llama3.swiglu_backward(dinp, np.ones((1, 1, 1)), inp)
    assert np.round([*out.flat, *dinp.flat], 3).tolist() == [1.648, 1.912, 0.824]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_keys_equals_generation_without(training, temperature):
    """Also where the window is full and its older half is dropped."""
    model, plain = (random_llama(2, 9, training=training) for _ in range(2))
    plain.next_logits = lambda tokens: Model.next_logits(plain, tokens)
    written = list(model.generate([1, 2, 3, 4], 30, temperature, rng=3))
    again = gpt2.generate(plain, [1, 2, 3, 4], 30, temperature, 0, np.random.default_rng(3))
    assert written == list(again)
    assert_all_close(*({0: each.acts["logits"][0, 0]} for each in (model, plain)))


def test_it_is_checked_and_scores_as_gpt2_does():
    model = random_llama(1, 9)
    text = np.random.default_rng(4).integers(0, 53, (1, 10))
    assert next(iter(model.params)) == model.CLASSIFIER  # as room_for_logits wants it
    model.forward(text[:, :-1], text[:, 1:], train=False)
    with pytest.raises(InputError, match="can't follow"):
        model.backward()
    scored, _ = model.token_losses(text[0, :3], [text[0, 3:], text[0, 3:5]])
    assert scored == pytest.approx(model.acts["losses"][0, 2:])


# --------------------------------------------------------------------------------------------------
# Hugging Face's files, and the program


@pytest.mark.parametrize("shape", ["two share a key", "none share a key", "scaled"])
def test_transformers_finds_the_same_logits_and_gradients(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_llama(2, 40, np.float32, **SHAPES[shape])
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs, targets = random_tokens(B=2, T=40)
    logits = theirs(torch.tensor(inputs)).logits
    test_gpt2.torch_losses(logits, torch.tensor(targets)).mean().backward()
    ours.forward(inputs, targets)
    ours.backward()
    found = {"logits": ours.acts["lnf"] @ ours.params["lmhead"].T}
    truth = {"logits": logits.detach().numpy()}
    found |= llama3.huggingface_views(ours.config, ours.grads)
    truth |= {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert_all_close(found, truth, 1e-5)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        theirs.to(dtype).save_pretrained(folder, max_shard_size="5KB")
        again = Llama.from_pretrained(folder, 1, 8)
        assert len(list(folder.glob("*.safetensors"))) > 2 and again.config == ours.config
        truth = {name: p.detach().float().numpy() for name, p in theirs.named_parameters()}
        assert_same_bits(llama3.huggingface_views(again.config, again.params), truth)


def changed_config(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_classifier_that_is_wte_becomes_a_copy(tmp_path):
    model = random_llama(1, 8, np.float32)
    model.save_pretrained(tmp_path)
    tensors = llama3.huggingface_views(model.config, model.params)
    del tensors["lm_head.weight"]
    gpt2.write_safetensors(tmp_path / "model.safetensors", tensors, {})
    changed_config(tmp_path, tie_word_embeddings=True)
    expected = model.params | {"lmhead": model.params["wte"]}
    assert_same_bits(Llama.from_pretrained(tmp_path, 1, 8).params, expected)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model_type": "mistral"}, "model_type = 'mistral', expected 'llama'"),
        ({"head_dim": 8}, "head_dim = 8, expected 6"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear', expected"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta is -1"),
        ({"num_key_value_heads": 3}, "4 heads of queries can't share 3"),
        ({"num_key_value_heads": None}, "num_kv_heads is None"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"hidden_size": 1 << 62}, "config.json: "),
        ({"rope_scaling": [1]}, "config.json: "),
        ({"vocab_size": 54}, "lm_head.weight"),
    ],
)  # fmt: skip
def test_another_model_is_one_line(changed, message, tmp_path, capsys):
    random_llama(1, 8, np.float32).save_pretrained(tmp_path)
    changed_config(tmp_path, **changed)
    exit_code = llama3.main(["--model", str(tmp_path)])
    assert message in failed_in_one_line((exit_code, *capsys.readouterr()))


def test_the_program(tmp_path, capsys):
    """It trains a GPT-2 and a Llama, and both learn. What it saves, it continues."""
    folder = str(tmp_path / "small")
    assert llama3.main(["--num_iterations", "5", "--output_dir", folder]) == 0
    *losses, summary = re.findall("val loss .*", capsys.readouterr().out)
    before, after, others_before, others = [float(line.split()[2]) for line in losses]
    assert after < before and others < others_before
    found = [float(number) for number in re.findall(r"\d\.\d{4}", summary)]
    assert found == pytest.approx([after, others], abs=1e-4)
    exit_code = llama3.main(["--num_iterations", "1", "--output_dir", folder])
    assert "holds a model" in failed_in_one_line((exit_code, *capsys.readouterr()))
    flags = "--prompt_ids 10 20 --max_new_tokens 65 --temperature 0".split()
    assert llama3.main(["--model", folder, *flags]) == 0  # its context is 64
    ids = Llama.from_pretrained(folder).generate([10, 20], 65, temperature=0)
    assert capsys.readouterr().out.split() == [str(i) for i in ids]
