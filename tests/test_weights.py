"""Weights in and out: Hugging Face's files, llm.c's, and what a port checks itself against."""

import math
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    FILE_SIZES,
    REAL_CONFIG,
    TORCH_TYPES,
    as_hugging_face,
    encoded_as,
    file_model,
    halves,
    llmc_bytes,
    llmc_model,
    loaded,
    odd_at_the_end,
    pack_safetensors,
    peak_of,
    read_plainly,
    refused_file,
    run_state,
    sharded_folder,
    weights_folder,
    written,
)

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2
from test_gpt2 import (
    TorchGPT2,
    assert_all_close,
    assert_same_bits,
    copies,
    random_model,
    random_tokens,
    torch_grads,
)


def rounded_to(dtype, array):
    """What is left of a float32 array that was stored in another type."""
    return torch.tensor(array).to(TORCH_TYPES[dtype]).float().numpy()


def all_rounded_to(dtype, views):
    return {name: rounded_to(dtype, view) for name, view in views.items()}


def logits_of(model, inputs):
    return model.forward_rows(inputs) @ model.params["wte"].T


# --------------------------------------------------------------------------------------------------
# Hugging Face


def need_transformers():
    return pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )


def hugging_face_model(B, T, V, L, NH, C, max_seq_len, spread):
    """transformers' own GPT-2, every parameter random, and what it makes of a batch: (model,
    inputs, targets, logits, loss), its gradients filled."""
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
    assert ours.keys() == truth.keys() and all(
        ours[name].shape == truth[name].shape for name in ours
    )
    errors = {
        name: np.linalg.norm((ours[name] - truth[name]).ravel())
        / np.linalg.norm(truth[name].ravel())
        for name in ours
    }
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize(
    "sizes, spread",
    [
        (dict(B=2, T=8, **FILE_SIZES), 0.1),
        (
            dict(B=1, T=8, V=50257, L=12, NH=12, C=768, max_seq_len=1024),
            0.04,
        ),  # some ten seconds, 2.7 GB
    ],
    ids=["small", "gpt2_124M"],
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
    assert_same_bits(
        as_hugging_face(loaded(tmp_path).params, "transformer."), parameters_of(theirs)
    )


def test_what_we_saved_opens_in_transformers(tmp_path):
    transformers = need_transformers()
    ours, (inputs, _targets) = file_model(), random_tokens(B=2, T=8, V=61)
    ours.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == set()
    assert [what for what, found in info.items() if found] == []  # nor any error
    assert_same_bits(parameters_of(theirs), as_hugging_face(ours.params, "transformer."))
    assert_same_bits(
        read_plainly((tmp_path / "model.safetensors").read_bytes()), parameters_of(theirs)
    )
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


def masks(dtype, prefix=""):
    """The buffers that older checkpoints carry: the causal mask, and what masked scores are
    replaced with."""
    tensors = {}
    for l in range(FILE_SIZES["L"]):
        tensors[f"{prefix}h.{l}.attn.bias"] = dtype, np.tril(np.ones((1, 1, 11, 11), np.uint8))
        tensors[f"{prefix}h.{l}.attn.masked_bias"] = "F32", np.array(-1e4)
    return tensors


NAMINGS = {
    "openai": lambda p: as_hugging_face(p) | masks("F32"),
    "openai_bool": lambda p: masks("BOOL") | as_hugging_face(p),
    "transformers": lambda p: as_hugging_face(p, "transformer."),
    "transformers_old": lambda p: (
        masks("U8", "transformer.")
        | as_hugging_face(p, "transformer.")
        | {"lm_head.weight": p["wte"]}
    ),
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
    kinds = {
        n: "F32" if t.ndim == 1 else "BF16" if "mlp" in n else "F16" for n, t in tensors.items()
    }
    read = loaded(weights_folder(tmp_path, {n: (kinds[n], t) for n, t in tensors.items()}))
    assert_same_bits(
        as_hugging_face(read.params), {n: rounded_to(kinds[n], t) for n, t in tensors.items()}
    )


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_at_its_edges(dtype, tmp_path):
    """Zero's sign, the smallest numbers and the largest."""
    model, info = file_model(), torch.finfo(TORCH_TYPES[dtype])
    odd = np.array(
        [-0.0, info.tiny, info.smallest_normal / 4, info.max, info.min, info.eps], np.float32
    )
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
    refused_file(
        weights_folder(tmp_path, tensors), tmp_path, "lm_head.weight differs from wte.weight"
    )


def test_weights_in_several_files(tmp_path):
    model = file_model()
    folder = sharded_folder(tmp_path, *halves(as_hugging_face(model.params, "transformer.")))
    assert_same_bits(loaded(folder).params, model.params)


@pytest.mark.parametrize("bare", ["model.safetensors", "model.safetensors.index.json"])
def test_without_a_config_heads_have_64_channels(bare, tmp_path):
    model = file_model(C=128, NH=2)
    tensors = as_hugging_face(model.params)
    weights_folder(tmp_path, tensors) if bare.endswith("s") else sharded_folder(
        tmp_path, *halves(tensors)
    )
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
    weights_folder(tmp_path, tensors, n_head=4) if bare.endswith("s") else sharded_folder(
        tmp_path, *halves(tensors), n_head=4
    )
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


@pytest.mark.parametrize(
    "sizes",
    [
        {"V": 2, "max_seq_len": 8},
        {"V": 1000, "max_seq_len": 2048},
        {"L": 11},
        {"C": 5, "NH": 1},
        {"L": 1, "C": 8, "NH": 8},
    ],
    ids=str,
)
def test_any_shape_of_gpt2_is_read(sizes, tmp_path):
    model = file_model(**sizes)
    read = loaded(
        weights_folder(tmp_path, as_hugging_face(model.params), n_head=model.config.num_heads)
    )
    assert read.config == model.config
    assert_same_bits(read.params, model.params)


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
    refused_file(
        weights_folder(tmp_path, tensors, **REAL_CONFIG | {field: found}),
        tmp_path,
        f"{field} = {found!r}",
        f"expected {expected!r}",
    )


# --------------------------------------------------------------------------------------------------
# llm.c


@pytest.mark.parametrize("version, dtype", [(1, "F32"), (3, "F32"), (5, "BF16")])
def test_every_version_of_llm_c_s_model_is_read(version, dtype, tmp_path):
    model = file_model()
    read = loaded(written(tmp_path / "gpt2.bin", llmc_model(model, version)))
    assert read.config == model.config
    assert_same_bits(read.params, all_rounded_to(dtype, model.params))


@pytest.mark.parametrize(
    "V, L, stem", [(61, 2, "gpt2_0M"), (128, 1, "gpt2_0M"), (50257, 2, "gpt2_1M")]
)
def test_write_tensors_byte_for_byte(V, L, stem, tmp_path):
    model, (inputs, targets) = file_model(V=V, L=L), random_tokens(B=2, T=8, V=V)
    model.forward(*random_tokens(B=2, T=8, V=V, seed=3))
    model.backward()  # and the gradients of this other batch must not remain
    paths = gpt2.write_tensors(model, inputs, targets, str(tmp_path / "new"))
    assert list(paths) == [
        str(tmp_path / "new" / stem) + end for end in (".bin", "_debug_state.bin")
    ]
    weights, state = (open(path, "rb").read() for path in paths)
    assert weights == llmc_model(model, 3)

    start = 1024 + 2 * 4 * inputs.size
    end = start + 4 * inputs.size * V
    logits, loss = state[start:end], state[end : end + 4]  # these are judged below
    between = encoded_as("I32", inputs) + encoded_as("I32", targets) + logits + loss
    padded = -(-V // 128) * 128
    assert state == llmc_bytes([20240327, 2, 2, 8], model.grads, "F32", padded, between)

    reference, seen = TorchGPT2(model.config, model.params).double(), {}
    true_loss = reference(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        lambda name, x: seen.update({name: x}) or x,
    )
    true_loss.backward()
    assert_all_close(
        {"logits": np.frombuffer(logits, "<f4").reshape(2, 8, V)},
        {"logits": seen["logits"].detach().numpy()},
    )
    assert np.frombuffer(loss, "<f4")[0] == pytest.approx(true_loss.item(), rel=1e-6)
    assert_all_close(model.grads, torch_grads(reference, model.params))


# --------------------------------------------------------------------------------------------------
# Every format: round trips, memory


def through_write_tensors(model, folder):
    inputs, targets = random_tokens(B=2, T=8, V=model.config.vocab_size)
    return loaded(gpt2.write_tensors(model, inputs, targets, str(folder))[0])


def through_save_pretrained(model, folder):
    model.save_pretrained(str(folder))
    return loaded(folder)


def through_a_checkpoint(model, folder):
    gpt2.save_checkpoint(model, str(folder), run_state(model))
    return gpt2.load_checkpoint(gpt2.list_checkpoints(str(folder))[0], {})[1]


@pytest.mark.parametrize("sizes", [{}, {"V": 128, "L": 1, "NH": 1, "C": 64}], ids=str)
@pytest.mark.parametrize(
    "through", [through_save_pretrained, through_write_tensors, through_a_checkpoint]
)
def test_round_trips_keep_every_bit(through, sizes, tmp_path):
    model = file_model(**sizes)
    model.params["wpe"][-1, :4] = (
        -0.0,
        1e-45,
        -1e-39,
        np.finfo(np.float32).max,
    )  # a position not used here
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
        assert_same_bits(
            read.params, {name: view.astype(np.float32) for name, view in model.params.items()}
        )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "llmc_1", "llmc_3", "llmc_5"])
def test_loading_never_holds_a_second_copy(dtype, tmp_path):
    """While weights are read there is the blob, and beside it pieces: of a tensor of 48 MB, a
    fraction."""
    model, path = (
        file_model(V=500_000),
        tmp_path / ("big.bin" if "llmc" in dtype else "model.safetensors"),
    )
    if "llmc" in dtype:
        written(path, llmc_model(model, int(dtype[-1])))
    else:
        tied = {"lm_head.weight": model.params["wte"]}
        weights_folder(tmp_path, tied | as_hugging_face(model.params), dtype)
    source = str(path if "llmc" in dtype else tmp_path)
    assert prepro.read_sizes(source) == asdict(model.config)
    tensors = prepro.find_tensors(source, gpt2.param_shapes(model.config))
    model.flat[...] = np.nan
    _, peak = peak_of(lambda: prepro.read_tensors(tensors, model.params))
    path.unlink()
    assert np.isfinite(model.flat[0]).all() and peak < 0.4 * model.params["wte"].nbytes


def test_saving_copies_one_tensor_at_a_time(tmp_path):
    model = file_model(L=6, C=192, NH=3)
    _, peak = peak_of(lambda: model.save_pretrained(str(tmp_path)))
    assert peak < 1.2 * model.params["fcw"][0].nbytes


def test_the_state_for_porters_never_holds_all_logits(tmp_path):
    """They are the largest array of all: 823 MB at B=4, T=1024."""
    model, (inputs, targets) = (
        random_model(8, 192, np.float32, V=4096),
        random_tokens(B=8, T=192, V=4096),
    )
    model.forward(inputs, targets)
    _, peak = peak_of(lambda: gpt2.write_tensors(model, inputs, targets, str(tmp_path)))
    assert (
        peak < 0.5 * 4 * inputs.size * 4096
    )  # in six pieces: one is written while the next is computed


MEASURED = """
import resource, subprocess, sys
print(subprocess.check_output([sys.executable, "-c", sys.argv[1], sys.argv[2]], text=True))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


GENERATED = """
import sys, train_gpt2  # what the command line does, but for the tokenizer
named = {"model": sys.argv[1], "inference_only": 1}
model = train_gpt2.begin(named, []).model
print(model.sequence_length, *model.generate([464, 3290], 3, temperature=0))
"""


def test_a_gpt2_that_speaks_takes_less_than_700_megabytes(tmp_path):
    """The weights are 498 of them; lm_head.weight, which is compared with wte, comes and goes
    before. A small process starts the one that is measured, since a child of this one would begin
    with our own peak."""
    pytest.importorskip(
        "resource", reason="measures another process's memory: run it on Linux or macOS"
    )
    path, rng = tmp_path / "gpt2.safetensors", np.random.default_rng(1)
    block = 0.1 * rng.standard_normal(999_983, np.float32)
    shapes = gpt2.param_shapes(gpt2.GPT2Config())
    tensors = as_hugging_face(
        {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    )
    tensors |= {
        "h.0.attn.bias": np.zeros((1, 1, 1024, 1024)),
        "lm_head.weight": tensors["wte.weight"],
    }
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    with open(path, "wb") as f:
        f.write(pack_safetensors(header))
        for tensor in tensors.values():
            f.write(np.resize(block, tensor.shape))
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(os.path.abspath(gpt2.__file__)))
    output = subprocess.check_output(
        [sys.executable, "-c", MEASURED, GENERATED, str(path)], env=environment
    )
    path.unlink()
    T, *tokens, peak = map(int, output.split()[-5:])
    assert T == 1024 and 0 <= min(tokens) <= max(tokens) < 50257
    assert 498e6 < peak * (1 if sys.platform == "darwin" else 1024) < 700e6
