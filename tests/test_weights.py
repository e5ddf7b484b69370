"""Weights in and out: Hugging Face's files, those of other programs, and what transformers says."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    FILE_SIZES,
    NO_NETWORK,
    REAL_CONFIG,
    SMALL_DATA,
    TORCH_TYPES,
    as_hugging_face,
    checkpoints,
    file_model,
    halves,
    loaded,
    odd_at_the_end,
    pack_safetensors,
    peak_of,
    read_plainly,
    refused_file,
    run_state,
    safetensors_parts,
    sharded_folder,
    succeeded,
    weights_folder,
    written,
)

import train_gpt2 as gpt2
from test_gpt2 import (
    TorchGPT2,
    assert_all_close,
    assert_same_bits,
    copies,
    random_tokens,
    torch_grads,
)

CONVERTS = "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"


def rounded_to(dtype, array):
    """What is left of a float32 array that was stored in another type."""
    return torch.tensor(array).to(TORCH_TYPES[dtype]).float().numpy()


def all_rounded_to(dtype, views):
    return {name: rounded_to(dtype, view) for name, view in views.items()}


def logits_of(model, inputs):
    return model.forward_tokens(inputs) @ model.params["wte"].T


def weights_file(path, tensors, metadata=None, dtype="F32"):
    """A .safetensors file that lies alone, as another program writes it."""
    header, body = safetensors_parts(tensors, dtype)
    head = {} if metadata is None else {"__metadata__": metadata}
    return written(path, pack_safetensors(head | header, body))


# --------------------------------------------------------------------------------------------------
# What transformers writes, and what it reads


def need_transformers():
    return pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )


def hugging_face_model(B, T, V, L, NH, C, max_seq_len, spread):
    """transformers' own GPT-2, every parameter random, and what it makes of a batch.

    (model, inputs, targets, logits, loss); its gradients are filled.
    """
    transformers = need_transformers()
    config = transformers.GPT2Config(
        vocab_size=V,
        n_positions=max_seq_len,
        n_embd=C,
        n_layer=L,
        n_head=NH,
        bos_token_id=None,
        eos_token_id=None,
    )
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
    assert ours.keys() == truth.keys()
    errors = {}
    for name in ours:
        assert ours[name].shape == truth[name].shape, name
        error = np.linalg.norm((ours[name] - truth[name]).ravel())
        errors[name] = error / np.linalg.norm(truth[name].ravel())
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


SMALL_SIZES = dict(B=2, T=8, **FILE_SIZES)
# some ten seconds, 2.7 GB
GPT2_SIZES = dict(B=1, T=8, V=50257, L=12, NH=12, C=768, max_seq_len=1024)


@pytest.mark.parametrize(
    "sizes, spread", [(SMALL_SIZES, 0.1), (GPT2_SIZES, 0.04)], ids=["small", "gpt2_124M"]
)
def test_what_transformers_saved_is_the_same_model(sizes, spread, tmp_path):
    theirs, inputs, targets, logits, loss = hugging_face_model(**sizes, spread=spread)
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path, *inputs.shape)
    os.remove(tmp_path / "model.safetensors")
    assert asdict(ours.config) == {
        "max_seq_len": sizes["max_seq_len"],
        "vocab_size": sizes["V"],
        "num_layers": sizes["L"],
        "num_heads": sizes["NH"],
        "channels": sizes["C"],
    }
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
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        found = as_hugging_face(loaded(source).params, "transformer.")
        assert_same_bits(found, parameters_of(theirs))


def test_what_safetensors_itself_saved(tmp_path):
    """Its save_model() writes tensors that share memory once: here under lm_head.weight."""
    save_model = pytest.importorskip("safetensors.torch", reason="needs safetensors").save_model
    theirs, *_ = hugging_face_model(B=1, T=8, **FILE_SIZES, spread=0.1)
    save_model(theirs, str(tmp_path / "weights.safetensors"))
    names = read_plainly((tmp_path / "weights.safetensors").read_bytes()).keys()
    assert "lm_head.weight" in names and "transformer.wte.weight" not in names
    written(tmp_path / "config.json", b'{"n_head": 3}')
    found = loaded(tmp_path / "weights.safetensors")
    assert_same_bits(as_hugging_face(found.params, "transformer."), parameters_of(theirs))


def test_what_we_saved_opens_in_transformers(tmp_path):
    transformers = need_transformers()
    ours = file_model()
    inputs, _targets = random_tokens(B=2, T=8, V=61)
    ours.save_pretrained(tmp_path)
    expected = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == expected

    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == set()
    assert [what for what, found in info.items() if found] == []  # nor any error
    assert_same_bits(parameters_of(theirs), as_hugging_face(ours.params, "transformer."))
    on_disk = read_plainly((tmp_path / "model.safetensors").read_bytes())
    assert_same_bits(on_disk, parameters_of(theirs))
    logits = theirs.eval()(torch.from_numpy(inputs)).logits.detach().numpy()
    assert_all_close({"logits": logits_of(ours, inputs)}, {"logits": logits})

    told = transformers.GPT2Config.from_pretrained(tmp_path).to_dict()
    expected = {
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_head": 3,
        "n_positions": 11,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "dtype": "float32",
        "eos_token_id": None,
    }
    assert {key: told[key] for key in expected} == expected


def test_what_a_run_leaves_opens_in_transformers(call_main, small_folder, tmp_path):
    """And continues a text greedily as the trainer does."""
    transformers = need_transformers()
    out = tmp_path / "out"
    flags = ["--model", "model", *SMALL_DATA, "--batch_size", 2, "--sequence_length", 8]
    succeeded(call_main(*flags, "--num_iterations", 3, "--sample_every", 0, "--output_dir", out))
    ours = loaded(out)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(out).eval()
    assert_same_bits(as_hugging_face(ours.params, "transformer."), parameters_of(theirs))
    inputs, _ = random_tokens(B=2, T=8, V=256)
    logits = theirs(torch.from_numpy(inputs)).logits.detach().numpy()
    assert_all_close({"logits": logits_of(ours, inputs)}, {"logits": logits})
    newest = loaded(checkpoints(out)[-1])  # the checkpoint has the same weights
    assert_same_bits(newest.params, ours.params)

    prompt = torch.tensor([[84, 111, 32]])
    theirs = theirs.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert list(ours.generate([84, 111, 32], 5, temperature=0)) == theirs[0, 3:].tolist()


# --------------------------------------------------------------------------------------------------
# Names and types


def masks(dtype, prefix=""):
    """What older files carry besides: the causal mask, and what masked scores are replaced with."""
    tensors = {}
    for l in range(FILE_SIZES["L"]):
        tensors[f"{prefix}h.{l}.attn.bias"] = dtype, np.tril(np.ones((1, 1, 11, 11), np.uint8))
        tensors[f"{prefix}h.{l}.attn.masked_bias"] = "F32", np.array(-1e4)
    return tensors


def named_as_openai(p):
    return as_hugging_face(p) | masks("F32")


def named_with_masks_of_bool(p):
    return masks("BOOL") | as_hugging_face(p)


def named_as_transformers(p):
    return as_hugging_face(p, "transformer.")


def named_as_older_transformers(p):
    tensors = masks("U8", "transformer.") | as_hugging_face(p, "transformer.")
    return tensors | {"lm_head.weight": p["wte"]}


def tied(p):
    return {"lm_head.weight": p["wte"]} | as_hugging_face(p)


def named_by_its_head(p):
    tensors = as_hugging_face(p, "transformer.")
    return {"lm_head.weight": tensors.pop("transformer.wte.weight")} | tensors


def in_another_order(p):
    return dict(sorted(as_hugging_face(p).items(), reverse=True))


NAMINGS = [
    named_as_openai,
    named_with_masks_of_bool,
    named_as_transformers,
    named_as_older_transformers,
    tied,
    named_by_its_head,
    in_another_order,
]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_and_every_type_is_read(naming, dtype, tmp_path):
    model = file_model()
    read = loaded(weights_folder(tmp_path, naming(model.params), dtype))
    assert read.config == model.config
    assert_same_bits(read.params, all_rounded_to(dtype, model.params))


def test_types_may_be_mixed(tmp_path):
    """There are files that keep layernorms in float32 beside matrices in 16 bits."""
    tensors = as_hugging_face(file_model().params)
    mixed = {}
    expected = {}
    for name, tensor in tensors.items():
        kind = "F32" if tensor.ndim == 1 else "BF16" if "mlp" in name else "F16"
        mixed[name] = kind, tensor
        expected[name] = rounded_to(kind, tensor)
    assert_same_bits(as_hugging_face(loaded(weights_folder(tmp_path, mixed)).params), expected)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_at_its_edges(dtype, tmp_path):
    """Zero's sign, the smallest numbers and the largest."""
    model = file_model()
    info = torch.finfo(TORCH_TYPES[dtype])
    odd = [-0.0, info.tiny, info.smallest_normal / 4, info.max, info.min, info.eps]
    odd = np.array(odd, np.float32)
    model.params["wte"][0, :6] = odd
    read = loaded(weights_folder(tmp_path, as_hugging_face(model.params), dtype))
    assert read.params["wte"][0, :6].tobytes() == odd.tobytes()
    assert_same_bits(read.params, all_rounded_to(dtype, model.params))


@pytest.mark.parametrize(
    "head",
    [
        lambda wte: odd_at_the_end(wte, 0),
        lambda wte: wte[:-1],
        lambda wte: ("F16", wte),
        lambda wte: wte[:0],
    ],
    ids=["other_number", "shorter", "other_type", "empty"],
)
def test_a_classifier_of_its_own_is_refused(head, tmp_path):
    params = file_model().params
    tensors = as_hugging_face(params) | {"lm_head.weight": head(params["wte"])}
    source = weights_folder(tmp_path, tensors)
    refused_file(source, tmp_path, "lm_head.weight differs from wte.weight")


def test_weights_in_several_files(tmp_path):
    model = file_model()
    folder = sharded_folder(tmp_path, *halves(as_hugging_face(model.params, "transformer.")))
    assert_same_bits(loaded(folder).params, model.params)


def test_a_classifier_in_another_file_than_the_embeddings(tmp_path):
    params = file_model().params
    first, second = halves(as_hugging_face(params))
    assert "wte.weight" in first
    folder = sharded_folder(tmp_path / "tied", first, second | {"lm_head.weight": params["wte"]})
    assert_same_bits(loaded(folder).params, params)
    other = odd_at_the_end(params["wte"], 0)
    folder = sharded_folder(tmp_path / "other", first, second | {"lm_head.weight": other})
    refused_file(folder, "lm_head.weight differs from wte.weight")


ANY_SIZES = [
    {"V": 2, "max_seq_len": 8},
    {"V": 1000, "max_seq_len": 2048},
    {"L": 11},
    {"C": 5, "NH": 1},
    {"L": 1, "C": 8, "NH": 8},
]


@pytest.mark.parametrize("sizes", ANY_SIZES, ids=str)
def test_any_shape_of_gpt2_is_read(sizes, tmp_path):
    model = file_model(**sizes)
    tensors = as_hugging_face(model.params)
    read = loaded(weights_folder(tmp_path, tensors, n_head=model.config.num_heads))
    assert read.config == model.config
    assert_same_bits(read.params, model.params)


# --------------------------------------------------------------------------------------------------
# How many heads?
#
# The tensors do not show it, and with a wrong number a model computes nonsense without an error.


def test_another_programs_file_alone_does_not_say_how_many(tmp_path):
    """4 heads of 32 channels could be 2 of 64. With the config.json that is asked for, it opens."""
    model = file_model(C=128, NH=4)
    path = weights_file(tmp_path / "weights.safetensors", as_hugging_face(model.params))
    line = refused_file(path, path, "how many heads?", "Put a config.json with", "beside it")
    [text] = re.findall(r"\{.*\}", line)
    written(tmp_path / "config.json", text.replace("NUMBER", "4").encode())
    read = loaded(path)
    assert read.config == model.config
    assert_same_bits(read.params, model.params)


OTHER_METADATA = [
    {},
    {"format": "pt"},
    {"n_head": ""},
    {"n_head": "many"},
    {"n_head": "0"},
    {"n_head": "9" * 5000},
    {"n_head": "-4"},
    {"n_head": "4.0"},
    {"n_head": [4]},
]


@pytest.mark.parametrize("metadata", OTHER_METADATA, ids=lambda found: str(found)[:16])
def test_other_metadata_does_not_say_it_either(metadata, tmp_path):
    model = file_model(C=128, NH=4)
    path = weights_file(tmp_path / "x.safetensors", as_hugging_face(model.params), metadata)
    refused_file(path, "how many heads?")


def test_our_own_file_alone_says_it(tmp_path):
    """Copied, and beside the config.json of another model."""
    model = file_model(C=128, NH=4)
    model.save_pretrained(tmp_path / "saved")
    data = (tmp_path / "saved" / "model.safetensors").read_bytes()
    path = written(tmp_path / "copy.safetensors", data)
    for _ in range(2):
        read = loaded(path)
        assert read.config == model.config
        assert_same_bits(read.params, model.params)
        written(tmp_path / "config.json", b'{"n_head": 2, "n_layer": 77}')


def test_our_own_folder_must_not_contradict_itself(tmp_path):
    file_model(C=128, NH=4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    written(path, json.dumps(told | {"n_head": 2}).encode())
    refused_file(tmp_path, "config.json", "n_head = 2", "expected 4")
    del told["n_head"]
    written(path, json.dumps(told).encode())
    assert loaded(tmp_path).config.num_heads == 4


def test_a_checkpoint_alone_says_it(tmp_path):
    model = file_model(C=128, NH=4)
    model.flat[1:] = 0
    gpt2.save_checkpoint(run_state(model, tmp_path / "run"))
    path = tmp_path / "copy.safetensors"
    os.rename(checkpoints(tmp_path / "run")[0], path)
    read = loaded(path)
    assert read.config == model.config
    assert_same_bits(read.params, model.params)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "other.safetensors", "model.safetensors.index.json"]
)
def test_a_file_is_read_with_the_config_beside_it(name, tmp_path, monkeypatch):
    model = file_model(C=128, NH=4)
    tensors = as_hugging_face(model.params)
    if name.endswith(".json"):
        sharded_folder(tmp_path, *halves(tensors), n_head=4)
    else:
        weights_folder(tmp_path, tensors, n_head=4)
        os.rename(tmp_path / "model.safetensors", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / name), name):
        read = loaded(source)
        assert read.config == model.config
        assert_same_bits(read.params, model.params)


def test_a_config_beside_a_file_must_be_of_the_same_model(tmp_path):
    weights_folder(tmp_path, as_hugging_face(file_model().params), n_layer=3)
    refused_file(tmp_path / "model.safetensors", "config.json says n_layer = 3, expected 2")


def tensors_of_sizes(L, C):
    """What find_config looks at: where tensors of these sizes lie, without their data."""
    shapes = gpt2.param_shapes(gpt2.GPT2Config(1024, 50257, L, 1, C))
    return {
        hf_name: gpt2.StoredTensor("x.safetensors", 0, "F32", shape)
        for _, _, shape, hf_name in gpt2.tensors_of(shapes)
    }


@pytest.mark.parametrize(
    "L, C, heads", [(12, 768, 12), (24, 1024, 16), (36, 1280, 20), (48, 1600, 25)]
)
def test_openai_s_sizes_are_known(L, C, heads, tmp_path):
    source = str(tmp_path / "x.safetensors")
    found = gpt2.find_config(source, tensors_of_sizes(L, C), {})
    assert (found.num_layers, found.num_heads, found.channels) == (L, heads, C)
    for layers, channels in ((L + 1, C), (L, C - 64), (6, 384)):
        with pytest.raises(gpt2.InputError, match="how many heads"):
            gpt2.find_config(source, tensors_of_sizes(layers, channels), {})
    written(tmp_path / "config.json", b'{"n_head": 4}')  # what is told is believed
    assert gpt2.find_config(source, tensors_of_sizes(L, C), {}).num_heads == 4
    metadata = {"n_head": "2"}
    assert gpt2.find_config(source, tensors_of_sizes(L, C), metadata).num_heads == 2


# --------------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize("gelu", ["gelu_new", "gelu_pytorch_tanh"])
def test_both_names_of_our_gelu(gelu, tmp_path):
    """transformers computes the same with both, up to rounding."""
    transformers = need_transformers()
    model = file_model()
    tensors = as_hugging_face(model.params, "transformer.")
    told = REAL_CONFIG | {"activation_function": gelu}
    source = weights_folder(tmp_path, tensors, **told)
    read = loaded(source)
    assert_same_bits(read.params, model.params)
    inputs, _ = random_tokens(B=2, T=8, V=61)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(source).eval()
    logits = theirs(torch.from_numpy(inputs)).logits.detach().numpy()
    assert_all_close({"logits": logits_of(read, inputs)}, {"logits": logits})


@pytest.mark.parametrize(
    "field, found, expected",
    [
        ("model_type", "llama", "gpt2"),
        ("vocab_size", 60, 61),
        ("n_positions", 12, 11),
        ("n_embd", 23, 24),
        ("n_layer", 3, 2),
        ("n_inner", 95, 96),
        ("activation_function", "gelu", "gelu_new"),
        ("layer_norm_epsilon", 1e-6, 1e-5),
        ("layer_norm_epsilon", math.nan, 1e-5),
        ("tie_word_embeddings", False, True),
        ("scale_attn_weights", False, True),
        ("scale_attn_by_inverse_layer_idx", True, False),
        ("vocab_size", "61", 61),
        ("n_layer", [2], 2),
        ("n_layer", "2\n3", 2),
    ],
    ids=repr,
)
def test_a_config_that_contradicts_is_refused(field, found, expected, tmp_path):
    tensors = as_hugging_face(file_model().params)
    assert loaded(weights_folder(tmp_path, tensors, **REAL_CONFIG)).config.num_heads == 3
    source = weights_folder(tmp_path, tensors, **REAL_CONFIG | {field: found})
    refused_file(source, tmp_path, f"{field} = {found!r}", f"expected {expected!r}")


# --------------------------------------------------------------------------------------------------
# What is no file of ours: the line says what to do


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_a_wrapped_model(prefix, tmp_path):
    tensors = as_hugging_face(file_model().params, prefix + "transformer.")
    source = weights_folder(tmp_path, tensors)
    refused_file(source, tmp_path, prefix, "wrapped model", "save the state_dict() of its .module")


def test_weights_of_pytorch(tmp_path):
    """As nanoGPT and the hub keep them. The command that the line names makes a folder of it."""
    transformers = need_transformers()
    theirs, *_ = hugging_face_model(B=1, T=8, **FILE_SIZES, spread=0.1)
    folder = tmp_path / "theirs"
    theirs.config.save_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    torch.save({"model": theirs.state_dict()}, tmp_path / "ckpt.pt")
    refused_file(folder, folder, "holds no model.safetensors", CONVERTS)
    for name in ("ckpt.pt", "model.pth", "model.onnx", "model.gguf"):
        (tmp_path / name).touch()
        refused_file(tmp_path / name, name, "expected a folder, a .safetensors file", CONVERTS)

    names = {"FOLDER": str(folder), "NEW_FOLDER": str(tmp_path / "new")}
    eval(CONVERTS, vars(transformers), names)
    found = as_hugging_face(loaded(tmp_path / "new").params, "transformer.")
    assert_same_bits(found, parameters_of(theirs))


def test_pytorch_s_bin_is_no_bin_of_llm_c(tmp_path):
    torch.save({"x": torch.zeros(9)}, tmp_path / "pytorch_model.bin")
    refused_file(tmp_path / "pytorch_model.bin", "no llm.c model")


def test_a_folder_of_checkpoints_names_the_newest(tmp_path):
    model = file_model()
    model.flat[1:] = 0
    run = run_state(model, tmp_path)
    for run.step in (3, 7):
        gpt2.save_checkpoint(run)
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == "checkpoint_00000007.safetensors"
    refused_file(tmp_path, "holds a run that was stopped", "use --model ", newest)
    assert_same_bits(loaded(newest).params, model.params)


# --------------------------------------------------------------------------------------------------
# What a folder is called, and what it says of itself


def code_of(*flags):
    return gpt2.main([str(flag) for flag in flags])


def test_the_card_says_how_to_use_the_model(tmp_path, capsys, monkeypatch):
    """Its commands, as they stand there, also where the folder's name needs quotes."""
    transformers = need_transformers()
    monkeypatch.chdir(tmp_path)
    folder = "it's my model"
    file_model(V=256).save_pretrained(folder)
    card = (tmp_path / folder / "README.md").read_text()
    assert card.startswith("A GPT-2 of 20,904 parameters. Its vocabulary is the bytes.")

    [command] = re.findall(r"(?m)^ +python train_gpt2\.py (.*)$", card)
    assert code_of(*shlex.split(command), "--max_new_tokens", 3) == 0
    assert "To be, or" in capsys.readouterr().out
    [call] = re.findall(r"GPT2LMHeadModel.from_pretrained\(.*\)\.generate\(ids\)", card)
    ids = torch.tensor([[84, 111]])
    found = eval(call, {"ids": ids, "GPT2LMHeadModel": transformers.GPT2LMHeadModel})
    assert found[0, :2].tolist() == [84, 111]


@pytest.mark.parametrize(
    "V, vocabulary", [(256, "the bytes"), (50257, "GPT-2's"), (50304, "GPT-2's"), (61, "one of 61")]
)
def test_the_card_names_the_vocabulary(V, vocabulary, tmp_path):
    file_model(V=V, C=6).save_pretrained(tmp_path)
    assert f"Its vocabulary is {vocabulary}" in (tmp_path / "README.md").read_text()
    ends = json.loads((tmp_path / "config.json").read_text())["eos_token_id"]
    assert ends == (50256 if V >= 50257 else None)


def test_a_readme_that_is_there_stays(tmp_path, call_main, small_folder):
    text = b"My model, my words.\n"
    written(tmp_path / "README.md", text)
    for _ in range(2):
        file_model().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == text
    out = tmp_path / "run"
    out.mkdir()
    written(out / "README.md", text)
    flags = ["--model", "model", *SMALL_DATA, "--sequence_length", 8, "--output_dir", out]
    succeeded(call_main(*flags, "--num_iterations", 1, "--sample_every", 0))
    assert (out / "README.md").read_bytes() == text
    assert (out / "model.safetensors").exists()


def test_a_folder_may_be_called_run_bin(call_main, small_folder, tmp_path):
    flags = ["--model", "model", *SMALL_DATA, "--sequence_length", 8, "--num_iterations", 1]
    out = tmp_path / "run.bin"
    succeeded(call_main(*flags, "--sample_every", 0, "--output_dir", out))
    speak = ["--inference_only", 1, "--prompt", "To be", "--max_new_tokens", 3]
    assert "To be" in succeeded(call_main("--model", out, *speak))
    assert loaded(out).config == loaded(small_folder / "model").config


@pytest.mark.parametrize("name", ["d6", "d12", "bytes", "gpt2", "gpt2-xl"])
def test_a_folder_with_a_model_and_a_known_name(name, call_main, tmp_path, monkeypatch):
    """The command could mean either, so it says both, and each can be had."""
    monkeypatch.chdir(tmp_path)
    file_model(V=256).save_pretrained(name)
    before = sorted(os.listdir(tmp_path / name))
    speak = ["--inference_only", 1, "--prompt", "To be", "--max_new_tokens", 3]
    for flags in ([], speak, ["--output_dir", "out"]):
        code, stdout, stderr = call_main("--model", name, *flags)
        assert code == 1 and stderr.count("\n") == 1 and stdout == ""
        assert f"{name!r} is the name of a model, and here also a folder" in stderr
        assert f"write ./{name} for the folder" in stderr
    assert sorted(os.listdir(tmp_path / name)) == before and os.listdir(tmp_path) == [name]
    assert "max_seq_len 11" in succeeded(call_main("--model", f"./{name}", *speak))


def test_a_folder_gpt2_with_a_model_and_no_flag_at_all(call_main, tmp_path, monkeypatch):
    """What is ambiguous is not replaced by a model of bytes."""
    monkeypatch.chdir(tmp_path)
    file_model(V=256).save_pretrained("gpt2")
    code, stdout, stderr = call_main("--num_iterations", 1)
    assert code == 1 and "./gpt2 for the folder" in stderr and "from scratch" not in stdout


def test_a_run_in_a_folder_called_d6(call_main, tmp_path, monkeypatch):
    """Checkpoints are a model, too."""
    monkeypatch.chdir(tmp_path)
    model = file_model(V=256)
    model.flat[1:] = 0
    gpt2.save_checkpoint(run_state(model, "d6"))
    code, _, stderr = call_main("--model", "d6", "--inference_only", 1)
    assert code == 1 and "is the name of a model, and here also a folder" in stderr


@pytest.mark.parametrize("content", [None, "notes.txt", "config.json", "pytorch_model.bin"])
def test_a_folder_without_weights_is_no_model(content, call_main, tmp_path, monkeypatch):
    """Where a folder is called gpt2, the name still means OpenAI's: never another task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("gpt2", "bytes"):
        (tmp_path / name).mkdir()
        if content:
            written(tmp_path / name / content, b"{}")
    model = file_model(V=50257, C=6)
    tensors = as_hugging_face(model.params)
    weights_file(tmp_path / "data" / "gpt2.safetensors", tensors, {"n_head": "3"})
    assert gpt2.find_weights("gpt2") == "data/gpt2.safetensors"
    assert_same_bits(loaded("gpt2").params, model.params)

    for name in ("train", "val"):
        tokens = np.random.default_rng(1).integers(97, 123, 200).astype("<u2").tobytes()
        header = np.array([20240520, 1, 200, 256] + [0] * 252, "<i4").tobytes()
        written(tmp_path / f"{name}.bin", header + tokens)
    flags = ["--input_bin", "train.bin", "--input_val_bin", "val.bin", "--sequence_length", 8]
    once = [*flags, "--num_iterations", 1, "--sample_every", 0]
    assert "max_seq_len 64" in succeeded(call_main("--model", "bytes", *once))


def test_a_name_that_is_nothing(call_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = call_main("--model", "gpt3")
    assert code == 1 and stdout == "" and stderr.count("\n") == 1
    assert "'gpt3': no such model" in stderr and "gpt2-medium" in stderr


# --------------------------------------------------------------------------------------------------
# Round trips and memory


def through_save_pretrained(model, folder):
    model.save_pretrained(str(folder))
    return loaded(folder)


def through_a_checkpoint(model, folder):
    model.flat[1:] = 0
    gpt2.save_checkpoint(run_state(model, folder))
    return gpt2.load_checkpoint(str(checkpoints(folder)[0]), {}, gpt2.one_process())[1]


@pytest.mark.parametrize("sizes", [{}, {"V": 128, "L": 1, "NH": 1, "C": 64}], ids=str)
@pytest.mark.parametrize("through", [through_save_pretrained, through_a_checkpoint])
def test_round_trips_keep_every_bit(through, sizes, tmp_path):
    model = file_model(**sizes)
    odd = (-0.0, 1e-45, -1e-39, np.finfo(np.float32).max)
    model.params["wpe"][-1, :4] = odd
    before = copies(model.params)
    read = through(model, tmp_path)
    assert read.config == model.config
    assert_same_bits(read.params, before)
    assert_same_bits(model.params, before)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_model_of_float64_is_saved_in_float32(tmp_path):
    model = gpt2.GPT2(gpt2.GPT2Config(8, 61, 2, 3, 24), 2, 8, seed=5, dtype=np.float64)
    read = through_save_pretrained(model, tmp_path)
    expected = {name: view.astype(np.float32) for name, view in model.params.items()}
    assert_same_bits(read.params, expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_reading_never_holds_a_second_copy(dtype, tmp_path):
    """While weights are read there is the blob, and beside it pieces: of 48 MB, a fraction."""
    model = file_model(V=500_000)
    tensors = {"lm_head.weight": model.params["wte"]} | as_hugging_face(model.params)
    source = weights_folder(tmp_path, tensors, dtype)
    model.flat[...] = np.nan

    config, found = gpt2.open_weights(source)
    assert config == model.config
    _, peak = peak_of(lambda: gpt2.read_weights(model.params, found))
    os.remove(tmp_path / "model.safetensors")
    assert np.isfinite(model.flat[0]).all() and peak < 0.4 * model.params["wte"].nbytes


def test_saving_copies_one_tensor_at_a_time(tmp_path):
    model = file_model(L=6, C=192, NH=3)
    _, peak = peak_of(lambda: model.save_pretrained(str(tmp_path)))
    assert peak < 1.2 * model.params["fcw"][0].nbytes


MEASURED = """
import resource, subprocess, sys
print(subprocess.check_output([sys.executable, "-c", sys.argv[1], sys.argv[2]], text=True))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

GENERATED = """
import sys, train_gpt2  # what the command line does, but for the tokenizer
named = {"model": sys.argv[1], "inference_only": 1}
model = train_gpt2.begin(named, train_gpt2.one_process())[1]
print(model.sequence_length, *model.generate([464, 3290], 3, temperature=0))
"""


def test_a_gpt2_that_speaks_takes_less_than_700_megabytes(tmp_path):
    """The weights are 498 of them. lm_head.weight, which is compared with wte, comes and goes.

    A small process starts the one that is measured: a child of this one would begin with our peak.
    """
    pytest.importorskip(
        "resource", reason="measures another process's memory: run it on Linux or macOS"
    )
    path = tmp_path / "gpt2.safetensors"
    block = 0.1 * np.random.default_rng(1).standard_normal(999_983, np.float32)
    shapes = gpt2.param_shapes(gpt2.GPT2Config())
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    tensors = as_hugging_face(zeros)
    tensors["h.0.attn.bias"] = np.zeros((1, 1, 1024, 1024))
    tensors["lm_head.weight"] = tensors["wte.weight"]

    header = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    with open(path, "wb") as file:
        file.write(pack_safetensors(header))
        for tensor in tensors.values():
            file.write(np.resize(block, tensor.shape))

    top = os.path.dirname(os.path.abspath(gpt2.__file__))
    environment = {**os.environ, **NO_NETWORK, "PYTHONPATH": top}
    command = [sys.executable, "-c", MEASURED, GENERATED, str(path)]
    output = subprocess.check_output(command, env=environment)
    path.unlink()
    T, *tokens, peak = map(int, output.split()[-5:])
    assert T == 1024 and 0 <= min(tokens) <= max(tokens) < 50257
    assert 498e6 < peak * (1 if sys.platform == "darwin" else 1024) < 700e6
