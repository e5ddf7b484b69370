"""Weights, tokens and vocabularies: each file is read as it says, written whole, or refused."""

import base64
import json
import math
import os
import random
import re
import struct
import sys
import tracemalloc
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2
from train_gpt2 import GPT2, DataLoader, GPT2Config, InputError, TokenFile

# --------------------------------------------------------------------------------------------------
# Files are made here by writers of our own, from the formats' descriptions: so the trainer never
# reads only what it wrote itself

CONFIG = GPT2Config(max_seq_len=11, vocab_size=61, num_layers=2, num_heads=3, channels=24)
TOLD = {"model_type": "gpt2", "n_head": 3, "n_layer": 2, "n_inner": None, "vocab_size": 61}
QKV = "h.1.attn.c_attn.weight"
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH |= {"U8": torch.uint8, "I32": torch.int32, "F64": torch.float64}


def random_model(**sizes):
    """A small model, every parameter random."""
    model = GPT2(GPT2Config(**vars(CONFIG) | sizes), 2, 8, None)
    model.flat[0] = 0.1 * np.random.default_rng(1).standard_normal(model.flat.shape[1])
    return model


def as_hugging_face(params, prefix=""):
    """{name: array}, in Hugging Face's layout: a matrix of a layer is (C_in, C_out)."""
    parts = {"ln_1": "ln1", "attn.c_attn": "qkv", "attn.c_proj": "attproj", "ln_2": "ln2"}
    parts |= {"mlp.c_fc": "fc", "mlp.c_proj": "fcproj"}
    tensors = {"wte.weight": params["wte"], "wpe.weight": params["wpe"]}
    tensors |= {"ln_f.weight": params["lnfw"], "ln_f.bias": params["lnfb"]}
    for l in range(len(params["qkvw"])):
        for theirs, ours in parts.items():
            tensors[f"h.{l}.{theirs}.weight"] = params[ours + "w"][l].T
            tensors[f"h.{l}.{theirs}.bias"] = params[ours + "b"][l]
    return {prefix + name: tensor for name, tensor in tensors.items()}


def safetensors(tensors, dtype="F32"):
    """(header, body) of {name: array}, or of {name: (dtype, array)} where one is of another."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        kind, array = tensor if isinstance(tensor, tuple) else (dtype, tensor)
        data = torch.tensor(array).to(TORCH[kind]).reshape(-1).view(torch.uint8).numpy().tobytes()
        place = [len(body), len(body) + len(data)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": place}
        body += data
    return header, body


def packed(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def weights_folder(folder, tensors, dtype="F32", told=TOLD):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "model.safetensors").write_bytes(packed(*safetensors(tensors, dtype)))
    return folder


def token_file(path, tokens, vocab_size=0, crc32=0, magic=20240520, version=1, count=None):
    count = len(tokens) if count is None else count
    header = struct.pack("<5I", magic, version, count % 2**32, vocab_size, crc32)
    path.write_bytes(header.ljust(1024, b"\0") + np.array(tokens, "<u2").tobytes())
    return str(path)


def loaded(source):
    return GPT2.from_pretrained(source, 2, 8)


def same_bits(ours, theirs):
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    return ours.keys() == theirs.keys() and not different


def refusal(call, *arguments, error=InputError):
    """The line with which a call refuses."""
    with pytest.raises(error) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
# Malformed weights


def header(text):
    return lambda h, b: packed(text, b)


def entry(**fields):
    """A tensor that is described otherwise."""
    return lambda h, b: packed(h | {QKV: h[QKV] | fields}, b)


def tensors(change, dtype="F32"):
    """A sound file of other tensors. change({name: array}) says which differ or are missing."""

    def build(h, b):
        sound = as_hugging_face(random_model().params)
        changed = sound | change(sound)
        there = {name: tensor for name, tensor in changed.items() if tensor is not None}
        return packed(*safetensors(there, dtype))

    return build


def value(number, dtype):
    """An odd number at the end of a matrix."""

    def change(sound):
        sound[QKV] = sound[QKV].copy()
        sound[QKV][-1, -1] = number
        return {}

    return tensors(change, dtype)


NOT_DESCRIBED = "its header does not describe its"
WRONG = {  # what is wrong: (the file, what the line says)
    "empty": (lambda h, b: b"", "not a .safetensors file: 0 bytes"),
    "a header beyond the end": (lambda h, b: struct.pack("<Q", 3) + b"{}", "a header of 3"),
    "no JSON": (lambda h, b: packed(json.dumps(h).encode()[:-1], b), NOT_DESCRIBED),
    "nested": (header(b'{"a":' * 100_000), NOT_DESCRIBED),
    "a list": (header(b"[]"), NOT_DESCRIBED),
    "metadata a list": (lambda h, b: packed({"__metadata__": [1]} | h, b), NOT_DESCRIBED),
    "a hole": (lambda h, b: packed(h, b"\0" * 4 + b), NOT_DESCRIBED),
    "an overlap": (entry(data_offsets=[0, 6912]), NOT_DESCRIBED),
    "a negative shape": (entry(shape=[-24, -72]), NOT_DESCRIBED),
    "a huge shape": (entry(shape=[1 << 40, 1 << 40]), NOT_DESCRIBED),
    "an unknown type": (entry(dtype="F8_E4M3"), NOT_DESCRIBED),
    "cut": (lambda h, b: packed(h, b[:-1]), NOT_DESCRIBED),
    "too long": (lambda h, b: packed(h, b + b"\0"), NOT_DESCRIBED),
    "integers": (tensors(lambda t: {QKV: ("I32", t[QKV])}), f"{QKV!r}: found (24, 72) of I32"),
    "one missing": (tensors(lambda t: {QKV: None}), f"{QKV!r}: found (0,) of none"),
    "transposed": (tensors(lambda t: {QKV: t[QKV].T}), f"{QKV!r}: found (72, 24)"),
    "twice": (tensors(lambda t: {"transformer." + QKV: t[QKV]}), f"{QKV!r} is there twice"),
    "one more": (tensors(lambda t: {"two\nlines": t[QKV]}), r"['two\nlines'] is not part"),
    "moments": (tensors(lambda t: {"m": t[QKV]}), "['m'] is not part"),
    "no wte": (tensors(lambda t: {"wte.weight": None}), "expected matrices wte.weight"),
    "one layer more": (tensors(lambda t: {"h.2.ln_1.weight": t["ln_f.bias"]}), "n_layer = 2"),
    "another classifier": (tensors(lambda t: {"lm_head.weight": t["wte.weight"] + 1}), "differs"),
    "NaN": (value(math.nan, "F32"), f"{QKV!r} holds a value that is not finite"),
    "infinite in F16": (value(-math.inf, "F16"), "not finite"),
    "NaN in BF16": (value(math.nan, "BF16"), "not finite"),
}


@pytest.mark.parametrize("what", WRONG)
def test_malformed_weights_are_refused(what, tmp_path):
    build, phrase = WRONG[what]
    sound = safetensors(as_hugging_face(random_model().params))
    folder = weights_folder(tmp_path, {})
    (folder / "model.safetensors").write_bytes(packed(*sound))
    assert same_bits(loaded(folder).params, random_model().params)
    (folder / "model.safetensors").write_bytes(build(*sound))
    assert phrase in refusal(loaded, folder)


CONFIGS = [  # what config.json says, what the refusal says, and whether it is one
    ({"activation_function": "gelu_pytorch_tanh"}, ""),
    ({"n_head": 3.0, "layer_norm_epsilon": 1e-5, "anything": "else"}, ""),
    ({"model_type": "llama"}, "model_type = 'llama', expected 'gpt2'"),
    ({"n_positions": 12}, "n_positions = 12, expected 11"),
    ({"activation_function": "gelu"}, "'gelu', expected 'gelu_new'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "layer_idx = True"),
    ({"n_head": 5}, "24 channels can't be shared by 5 heads"),
    ({"n_head": None}, "how many heads"),
    ({"n_head": "many"}, "how many heads"),
    (b"[]", "expected a JSON object, found []"),
    (b"\xff", "expected JSON"),
]


@pytest.mark.parametrize("told, phrase", CONFIGS, ids=str)
def test_config_must_agree(told, phrase, tmp_path):
    folder = weights_folder(tmp_path, as_hugging_face(random_model().params))
    text = told if isinstance(told, bytes) else json.dumps(TOLD | told).encode()
    (folder / "config.json").write_bytes(text)
    if phrase:  # before there is a model
        assert phrase in refusal(gpt2.open_weights, str(folder))
    else:
        assert loaded(folder).config == CONFIG


def test_heads_are_never_guessed(tmp_path):
    """With a wrong number a model computes nonsense without an error."""
    model = random_model(channels=128, num_heads=4)
    path = weights_folder(tmp_path, as_hugging_face(model.params)) / "model.safetensors"
    os.remove(tmp_path / "config.json")
    text = re.search("{.*}", refusal(loaded, path))[0]  # the line says what to write
    (tmp_path / "config.json").write_text(text.replace("NUMBER", "4"))
    assert loaded(path).config == model.config

    model.save_pretrained(tmp_path / "ours")  # our own file says it, alone
    os.remove(tmp_path / "ours" / "config.json")
    assert loaded(tmp_path / "ours").config == model.config
    (tmp_path / "ours" / "config.json").write_text('{"n_head": 2}')
    assert "n_head = 2, expected 4" in refusal(loaded, tmp_path / "ours")

    for size, heads in {(12, 768): 12, (48, 1600): 25, (12, 704): 0, (13, 768): 0}.items():
        shapes = GPT2.param_shapes(GPT2Config(1024, 50257, size[0], 1, size[1]))
        none = {name: np.broadcast_to(0, shape) for name, shape in shapes.items()}
        views = gpt2.huggingface_views(none)
        stored = {name: gpt2.Stored(view, "F32") for name, view in views.items()}
        if heads:  # a size of OpenAI's is known
            assert gpt2.find_config("nowhere/x", stored, {}).num_heads == heads
        else:
            assert "how many heads" in refusal(gpt2.find_config, "nowhere/x", stored, {})


# --------------------------------------------------------------------------------------------------
# Weights of several files, and of other names

PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index_of(folder):
    return folder / "model.safetensors.index.json"


def index_to(*parts):
    """Write an index that leads to these files."""
    text = json.dumps({"weight_map": dict(enumerate(parts))})
    return lambda folder: index_of(folder).write_text(text)


SPOILT = [
    (lambda folder: os.remove(folder / PARTS[1]), PARTS[1]),
    (lambda folder: (folder / PARTS[1]).write_bytes((folder / PARTS[0]).read_bytes()), "twice"),
    (index_to(PARTS[1]), "expected matrices wte.weight"),
    (index_to(), "expected matrices wte.weight"),
    (index_to(5), "expected a weight_map to files beside it"),
    (index_to("a/.."), "directory"),
    (lambda folder: index_of(folder).write_text("[]"), "expected a JSON object"),
]


@pytest.mark.parametrize("spoil, phrase", SPOILT)
def test_weights_in_two_files(spoil, phrase, tmp_path):
    """All files lie beside the index, whatever it says."""
    model = random_model()
    items = list(as_hugging_face(model.params, "transformer.").items())
    folder = weights_folder(tmp_path, {})
    os.remove(folder / "model.safetensors")
    for name, part in zip(PARTS, (items[::2], items[1::2]), strict=True):
        (folder / name).write_bytes(packed(*safetensors(dict(part))))
    index_to(*[f"../elsewhere/{name}" for name in PARTS])(folder)
    for source in (folder, index_of(folder)):
        assert same_bits(loaded(source).params, model.params)
    spoil(folder)
    assert phrase in refusal(loaded, folder, error=(InputError, OSError))


def masks(params):
    """Older files have the causal mask, and the number for what it hides."""
    found = {}
    for l in range(2):
        found[f"transformer.h.{l}.attn.bias"] = "U8", np.tril(np.ones((1, 1, 11, 11)))
        found[f"transformer.h.{l}.attn.masked_bias"] = "F32", np.array(-1e4)
    return found


NAMINGS = {
    "OpenAI": lambda p: as_hugging_face(p),
    "old": lambda p: masks(p) | as_hugging_face(p, "transformer.") | {"lm_head.weight": p["wte"]},
    "head only": lambda p: {
        "lm_head.weight" if "wte" in name else name: tensor
        for name, tensor in as_hugging_face(p).items()
    },
    "another order": lambda p: dict(sorted(as_hugging_face(p).items(), reverse=True)),
}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_and_type_is_read(naming, dtype, tmp_path):
    """... bit by bit, with zero's sign, and the smallest and largest numbers."""
    model = random_model()
    info = torch.finfo(TORCH[dtype])
    model.params["wte"][0, :4] = -0.0, info.smallest_normal / 4, info.max, info.eps
    tensors = NAMINGS[naming](model.params)
    folder = weights_folder(tmp_path, tensors, dtype)
    if naming == "another order":  # and null for metadata, as safetensors itself takes it
        h, b = safetensors(tensors, dtype)
        (folder / "model.safetensors").write_bytes(packed({"__metadata__": None} | h, b))
    expected = {}
    for name, view in model.params.items():
        expected[name] = torch.tensor(view).to(TORCH[dtype]).float().numpy()
    assert same_bits(loaded(folder).params, expected)


# --------------------------------------------------------------------------------------------------
# transformers, both ways


@pytest.mark.parametrize("dtype, size", [("F32", "1GB"), ("F16", "20KB"), ("BF16", "1GB")])
def test_what_transformers_saves_is_the_same_model(dtype, size, tmp_path):
    """In one file and in parts. Their logits and ours agree."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {"vocab_size": 61, "n_positions": 11, "n_embd": 24, "n_layer": 2, "n_head": 3}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).eval().to(TORCH[dtype])
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("model-*"))) == (2 if size == "20KB" else 0)
    ours = loaded(tmp_path)
    assert ours.config == CONFIG
    theirs = theirs.float()
    expected = {name: parameter.detach().numpy() for name, parameter in theirs.named_parameters()}
    assert same_bits(as_hugging_face(ours.params, "transformer."), expected)
    ids = np.random.default_rng(1).integers(0, 61, (2, 8))
    logits = ours.forward_tokens(ids) @ ours.params["wte"].T
    np.testing.assert_allclose(logits, theirs(torch.tensor(ids)).logits.detach(), atol=1e-5)


@pytest.mark.parametrize("V, kind", [(256, "bytes"), (61, "61 tokens of its own")])
def test_what_we_save_opens_in_transformers(V, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_model(vocab_size=V)
    (tmp_path / "README.md").write_text("My model, my words.")
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My model, my words."
    os.remove(tmp_path / "README.md")
    ours.save_pretrained(tmp_path)
    assert f"which reads and writes {kind}." in (tmp_path / "README.md").read_text()

    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert [what for what, found in info.items() if found] == []
    found = {name: parameter.detach().numpy() for name, parameter in theirs.named_parameters()}
    assert same_bits(found, as_hugging_face(ours.params, "transformer."))
    again = loaded(tmp_path)
    assert again.config == ours.config and same_bits(again.params, ours.params)
    generated = theirs.generate(torch.tensor([[1, 2, 3]]), do_sample=False, pad_token_id=0)
    assert generated.tolist()[0] == [1, 2, 3, *ours.generate([1, 2, 3], 8, temperature=0)]


# --------------------------------------------------------------------------------------------------
# Writing, and memory


def peak_of(call):
    """The most memory that Python and NumPy held at once while it ran, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_no_second_copy_of_a_model(dtype, tmp_path):
    """A model of 12 MB is read and written in pieces of its memory, or a tensor at a time."""
    model = random_model(vocab_size=125_000)
    wte = model.params["wte"]
    tensors = {"lm_head.weight": wte} | as_hugging_face(model.params)
    weights_folder(tmp_path, tensors, dtype, told={"n_head": 3})
    model.flat[...] = np.nan
    config, found = gpt2.open_weights(str(tmp_path))
    assert config == model.config
    assert peak_of(lambda: gpt2.read_weights(model.params, found)) < 0.1 * wte.nbytes
    assert np.isfinite(model.flat[0]).all() and found == {}  # so the file is not mapped any more
    assert peak_of(lambda: model.save_pretrained(tmp_path)) < 0.1 * wte.nbytes


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "x.safetensors")
    gpt2.write_safetensors(path, {"a": np.ones((2, 3))}, {}, checksum=True)
    before = (tmp_path / "x.safetensors").read_bytes()

    def pieces():
        yield np.zeros(3)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        gpt2.write_safetensors(path, {"a": ((2, 3), pieces())}, {})
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_what_is_written_in_pieces_and_its_checksum(tmp_path):
    path = str(tmp_path / "x.safetensors")
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    whole = {"a": array.T, "b": np.float64(7) * np.ones(1)}
    in_pieces = {"a": ((3, 4), iter([array.T[:2], array.T[2:]])), "b": whole["b"]}
    for tensors in (whole, in_pieces):
        gpt2.write_safetensors(path, tensors, {"state": "{}"}, checksum=True)
        data = (tmp_path / "x.safetensors").read_bytes()
        assert data[-4:] == zlib.crc32(data[:-4]).to_bytes(4, "little")
        found, metadata = gpt2.read_safetensors(path)
        assert found["a"].array.tolist() == array.T.tolist() and metadata == {"state": "{}"}
        assert found["b"].array.tolist() == [7] and [*found] == ["a", "b", "crc32"]
    gpt2.check_crc32(path)
    for at in range(len(data)):
        (tmp_path / "x.safetensors").write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
        assert "do not match the checksum" in refusal(gpt2.check_crc32, path)
    (tmp_path / "x.safetensors").write_bytes(b"")
    refusal(gpt2.check_crc32, path)


# --------------------------------------------------------------------------------------------------
# Names of models, and what is fetched


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(gpt2, "provide", lambda what: asked.append(what) or "fetched")
    (tmp_path / "gpt2").mkdir()  # without weights it is no model
    assert gpt2.find_weights("gpt2") == "fetched" and asked == ["gpt2"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gpt2.safetensors").touch()
    assert gpt2.find_weights("gpt2") == "data/gpt2.safetensors"
    assert gpt2.find_weights("./gpt2") == "./gpt2"
    assert "nor gpt2, gpt2-medium" in refusal(gpt2.find_weights, "gpt3")
    assert "bytes, d2, d6, d12, d24, d36, d48" in refusal(gpt2.find_weights, "gpt3")
    for place in ("gpt2/model.safetensors", "gpt2/best/model.safetensors"):
        os.makedirs(os.path.dirname(place), exist_ok=True)
        (tmp_path / place).touch()
        assert "write ./gpt2 for the folder" in refusal(gpt2.find_weights, "gpt2")
        os.remove(tmp_path / place)


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "folder", "folder/none.safetensors"])
def test_what_is_no_safetensors_is_told_how_to_become_one(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "m.bin").touch()
    (tmp_path / "m.pt").touch()
    line = refusal(gpt2.open_weights, str(tmp_path / name))
    assert "python -m extras.llmc" in line and ".save_pretrained(NEW_FOLDER)" in line


def test_a_folder_of_checkpoints_names_the_newest(tmp_path):
    for step in (3, 12):
        (tmp_path / f"checkpoint_{step:08d}.safetensors").touch()
    assert refusal(loaded, tmp_path).endswith(f"use {tmp_path / 'checkpoint_00000012.safetensors'}")


def test_only_what_can_t_be_fetched_is_a_fetch_error(monkeypatch):
    class TheirError(ValueError):
        cause = "no network"

    class TheirFetchError(TheirError):
        pass

    def raising(error):
        fake = SimpleNamespace(InputError=TheirError, FetchError=TheirFetchError)
        fake.provide = lambda what: (_ for _ in ()).throw(error(f"{what}: no network: plug it in"))
        monkeypatch.setitem(sys.modules, "prepro_tinyshakespeare", fake)

    raising(TheirFetchError)
    with pytest.raises(gpt2.FetchError) as caught:
        gpt2.provide("gpt2")
    assert (str(caught.value), caught.value.cause) == ("gpt2: no network: plug it in", "no network")
    raising(TheirError)
    with pytest.raises(InputError) as caught:
        gpt2.provide("gpt2")
    assert not isinstance(caught.value, gpt2.FetchError)
    monkeypatch.setitem(sys.modules, "prepro_tinyshakespeare", None)  # as beside a copied file
    line = refusal(gpt2.provide, "gpt2", error=gpt2.FetchError)
    assert "does not lie beside" in line and line.endswith("get it from where this file comes from")


# --------------------------------------------------------------------------------------------------
# Token files

SOUND = [(i * i) % 61 for i in range(50)]
BAD_TOKENS = {
    "empty": lambda path: path.write_bytes(b""),
    "nothing but its beginning": lambda path: path.write_bytes(path.read_bytes()[:8]),
    "another magic number": lambda path: token_file(path, SOUND, magic=20240326),
    "another version": lambda path: token_file(path, SOUND, version=2),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "too many said": lambda path: token_file(path, SOUND, count=51),
    "a negative number said": lambda path: token_file(path, SOUND, count=-50),
}


@pytest.mark.parametrize("what", BAD_TOKENS)
def test_a_malformed_token_file_is_refused(what, tmp_path):
    path = tmp_path / "t.bin"
    assert TokenFile(token_file(path, SOUND))[:].tolist() == SOUND
    BAD_TOKENS[what](path)
    assert f"{path}: no whole token file: " in refusal(TokenFile, str(path))


def test_a_token_file_stays_what_it_was(tmp_path):
    """... when another takes its name, until it is closed."""
    path = token_file(tmp_path / "t.bin", SOUND, vocab_size=300, crc32=2**32 - 1)
    file = TokenFile(path)
    assert (len(file), file.vocab_size, file.vocabulary_crc) == (50, 300, 2**32 - 1)
    with gpt2.atomic_write(path) as other:
        other.write(open(token_file(tmp_path / "other.bin", [7] * 50), "rb").read())
    for piece in (np.s_[:], np.s_[3:17], np.s_[40:90], np.s_[:0], np.s_[-5:]):
        assert file[piece].tolist() == SOUND[piece] and file[piece].dtype == np.uint16
    assert TokenFile(path)[:].tolist() == [7] * 50
    file.close()
    file.close()
    assert len(file) == 0


def test_shards_by_name_by_pattern_and_by_list(tmp_path):
    names = [token_file(tmp_path / f"{name}.bin", [1] * 9) for name in ("b", "a", "c[1]")]
    b, a, odd = names
    found = lambda paths: [shard.path for shard in gpt2.open_shards(paths)]
    assert found(str(tmp_path / "*.bin")) == [a, b, odd]
    assert found([odd, b, a, str(tmp_path / "[ab].bin")]) == [a, b, odd]
    assert found(odd) == [odd] and found(tmp_path / "b.bin") == [b]
    for paths in (str(tmp_path / "d*.bin"), [a, str(tmp_path / "d.bin")]):
        assert "no such token file: write one with python prepro" in refusal(found, paths)
    assert "no token file" in refusal(found, [])


@pytest.mark.parametrize("sizes", [[7], [13], [25], [24], [7, 12, 13, 30], [40, 7]])
def test_batches_come_in_the_order_of_the_text(sizes, tmp_path):
    """Of each shard as many whole batches of 2 * 3 as fit with their last target."""
    expected = []
    for i, size in enumerate(sizes):
        text = np.arange(100 * i, 100 * i + size)
        token_file(tmp_path / f"{i}.bin", text)
        for start in range(0, size - 6, 6):
            inputs, targets = text[start : start + 6], text[start + 1 : start + 7]
            expected.append([inputs.reshape(2, 3), targets.reshape(2, 3)])
    expected *= 3  # epochs
    loader = DataLoader(gpt2.open_shards(str(tmp_path / "*.bin")), 2, 3)
    positions = []
    for batch in expected:
        positions.append(loader.position)
        assert np.array_equal(loader.next_batch(), batch)
    for i in (1, 0, len(expected) - 1):
        loader.seek(positions[i])
        assert np.array_equal(loader.next_batch(), expected[i])


@pytest.mark.parametrize("size", [33, 34, 40, 45])
def test_shuffled_batches_have_each_window_once_an_epoch(size):
    B, T = 3, 4

    def windows(seed):
        """{(epoch, shard): where its windows begin, in order}"""
        loader = DataLoader([np.arange(size)] * 2, B, T, seed)
        found = {}
        while loader.position[2] < 12:
            key = loader.position[2], loader.position[0]
            inputs, targets = loader.next_batch()
            assert np.array_equal(targets, inputs + 1) and (np.diff(inputs) == 1).all()
            found.setdefault(key, []).extend(inputs[:, 0].tolist())
        return found

    found = windows(7)
    for starts in found.values():
        first = min(starts) % T
        assert len(starts) == (size - 1 - first) // T // B * B == len(set(starts))
        assert {start % T for start in starts} == {first} and max(starts) + T < size
    assert len(set(map(tuple, found.values()))) > 20  # of 24: each shard and epoch has its own
    assert {starts[0] % T for starts in found.values()} == set(range(min(T, size - B * T)))
    assert windows(7) == found != windows(8)


def test_the_text_at_hand(tmp_path, monkeypatch):
    """Every tenth passage of this project's files validates; a copied file has its own bytes."""
    names, training, validation = gpt2.text_at_hand()
    assert names == "train_gpt2.py, test_gpt2.py, prepro_tinyshakespeare.py, README.md"
    assert 0.08 < len(validation) / len(training) < 0.12
    text = b"".join(b"line %03d\n" % n for n in range(700))  # passages of 112 lines, 1008 bytes
    (tmp_path / "train_gpt2.py").write_bytes(text)
    monkeypatch.setattr(gpt2, "__file__", str(tmp_path / "train_gpt2.py"))
    names, training, validation = gpt2.text_at_hand()
    assert names == "train_gpt2.py" and bytes(validation) == text[5040:6048]
    assert bytes(training) == text[:5040] + text[6048:]


# --------------------------------------------------------------------------------------------------
# Vocabularies

TEXT = (  # English, accents, Chinese, emoji, runs of spaces and newlines
    "low lower newest widest, the lowest. It's what they'd say: 1234 aaaa aaaaa\n\n\n   the "
    "naïve café — 语言模型 语言 🙂🙂   \r\n\tthe other then there <|endoftext|>\n"
)
WORDS = r" ?[^\W\d_]+| ?\d+|'(?:[sdmt]|ll|ve|re)| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"  # SPLIT for re
MERGES = [b"e s", b"es t", b"l o", b"lo w", b"t h", b"th e", b"a a", b"aa a", b"\n \n"]
MERGES = [line.rsplit(b" ", 1) for line in MERGES]
MERGES += [(b"\xe8", b"\xaf"), (b"\xe8\xaf", b"\xad"), (b" ", b" "), (b" ", b"low"), (b" ", b"the")]
OWN = [*gpt2.BYTES, *map(b"".join, MERGES), b"<|endoftext|>"]
OTHER = [*OWN[:-2], b"at", OWN[-1]]  # of the same size
SIZE = len(OWN)


def test_own_tokens_are_the_merges_applied_in_order():
    pytest.importorskip("tiktoken")
    expected = []
    for word in re.findall(WORDS, TEXT):
        parts = [bytes([i]) for i in word.encode()]
        for left, right in MERGES:
            merged = []
            for part in parts:
                if merged[-1:] == [left] and part == right:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        expected += map(OWN.index, parts)
    tokens = gpt2.tokenizer(SIZE, OWN)
    assert tokens.encode(TEXT) == expected and len(expected) < 0.8 * len(TEXT.encode())
    assert b"".join(map(tokens.decode, expected)) == TEXT.encode()
    assert sum(tokens.lengths[i] for i in expected) == len(TEXT.encode())
    assert (tokens.first, tokens.decode(SIZE - 1), tokens.lengths[-1]) == (10, b"\n", 0)


def test_bytes_and_tokens_that_are_not_known():
    tokens = gpt2.tokenizer(256)
    assert tokens.encode("hé\n") == list("hé\n".encode()) and tokens.first == 10
    assert b"".join(map(tokens.decode, range(256))) == bytes(range(256))
    assert tokens.lengths == [1] * 256
    for vocab_size, vocabulary in [(65, None), (50256, None), (50305, None), (50257, []), (61, [])]:
        line = refusal(gpt2.tokenizer, vocab_size, vocabulary)
        assert f"the model's {vocab_size} tokens are of a vocabulary that is not known" in line


@pytest.fixture
def gpt2_words():
    """GPT-2's tokens, bytes by id."""
    if len(prepro.huggingface_files(50257, None)) < 2:
        pytest.skip("needs GPT-2's vocabulary: run python prepro_tinyshakespeare.py")
    encoding = prepro.get_encoding()
    return [encoding.decode_single_token_bytes(i) for i in range(50257)]


def test_gpt2s_own_vocabulary(gpt2_words, tmp_path):
    """Its ranks, taken for one's own, give its ids, and vocab.bpe's merges."""
    tokens, same = gpt2.tokenizer(50304), gpt2.tokenizer(50257, gpt2_words)
    assert tokens.encode("Hello world") == [15496, 995] and tokens.encode(TEXT) == same.encode(TEXT)
    assert (tokens.first, tokens.decode(50256), tokens.decode(50257)) == (50256, b"\n", b"<50257>")
    assert tokens.lengths[50255:] == [len(gpt2_words[50255])] + [0] * 48
    files = prepro.huggingface_files(50257, None)
    assert files["merges.txt"].decode().split("\n")[1:-1] == prepro.merges_of(gpt2_words[:-1])
    model = random_model(vocab_size=50257, channels=3)
    model.save_pretrained(tmp_path)
    assert loaded(tmp_path).vocabulary is None
    other = [*gpt2_words[:300], *gpt2_words[-2:299:-1], gpt2_words[-1]]  # in another order
    (tmp_path / "vocab.json").write_bytes(vocab_json(other))
    assert loaded(tmp_path).vocabulary == []  # so it is not taken for GPT-2's


def vocab_json(vocabulary):
    return json.dumps({prepro.spelled(token): i for i, token in enumerate(vocabulary)}).encode()


FOLDERS = [(OWN, SIZE, SIZE - 1), (None, 256, None), (None, 50257, 50256)]


@pytest.mark.parametrize("vocabulary, V, end", FOLDERS)
def test_transformers_reads_the_vocabulary_of_a_folder(vocabulary, V, end, tmp_path, request):
    """Its ids are ours, and its pipeline stops at the end of the context."""
    transformers = pytest.importorskip("transformers")
    if V == 50257:
        request.getfixturevalue("gpt2_words")
    model = random_model(vocab_size=V, num_heads=1, channels=4)
    model.vocabulary = vocabulary
    model.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert loaded(source).vocabulary == vocabulary
    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert told == {"bos_token_id": end, "eos_token_id": end, "max_length": 11}

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.replace("<|endoftext|>", "")
    assert theirs.encode(text) == gpt2.tokenizer(V, vocabulary).encode(text)
    said = transformers.pipeline("text-generation", str(tmp_path))("the", do_sample=False)
    assert said[0]["generated_text"].startswith("the")
    if vocabulary:  # transformers saves only tokenizer.json
        theirs.save_pretrained(tmp_path / "theirs")
        assert not (tmp_path / "theirs" / "vocab.json").exists()
        assert gpt2.saved_vocabulary(str(tmp_path / "theirs"), V) == vocabulary


NOT_OURS = {
    "no JSON": b"{",
    "empty": b"{}",
    "no numbers": json.dumps(dict.fromkeys("abc", "x")).encode(),
    "other letters": vocab_json(OWN).replace(b'"a"', b'"\\u2581"'),
    "without its end": vocab_json([*OWN[:-1], b"at"]),
    "a byte missing": vocab_json([*OWN[:255], *OWN[256:]]),
    "a hole": vocab_json(OWN).replace(b"}", b"0}"),
    "no merge": vocab_json([*OWN[:-2], b"xyz", OWN[-1]]),
    "another size": vocab_json([*OWN[:-2], OWN[-1]]),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_a_vocabulary_that_is_not_ours_is_none(what, tmp_path):
    """... and not nothing: nobody takes its tokens for bytes or GPT-2's."""
    path = tmp_path / "vocab.json"
    assert gpt2.saved_vocabulary(str(tmp_path), SIZE) is None
    path.write_bytes(vocab_json(OWN))
    assert gpt2.saved_vocabulary(str(tmp_path), SIZE) == OWN
    path.write_bytes(NOT_OURS[what])
    assert gpt2.saved_vocabulary(str(tmp_path), SIZE) == []


def tiktoken_file(path, tokens):
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return zlib.crc32(path.read_bytes())


BAD_VOCABULARIES = {  # what lies beside the tokens, and what the refusal says
    "nothing": (lambda path: os.remove(path), "my.tiktoken is missing, the vocabulary of"),
    "other merges": (lambda path: tiktoken_file(path, OTHER[:-1]), "is not the vocabulary of"),
    "another number": (
        lambda path: path.write_bytes(path.read_bytes().replace(b" 260\n", b" 300\n")),
        "expected the ids from 0 on",
    ),
    "no base64": (lambda path: path.write_bytes(b"?? 0\n"), "is no vocabulary"),
    "no bytes": (lambda path: tiktoken_file(path, OWN[1:-1]), "must be the bytes"),
    "no merge": (lambda path: tiktoken_file(path, [*OWN[:256], b"xyz"]), "does not merge"),
}


@pytest.mark.parametrize("what", BAD_VOCABULARIES)
def test_the_vocabulary_beside_the_tokens(what, tmp_path):
    spoil, phrase = BAD_VOCABULARIES[what]
    path = tmp_path / "my.tiktoken"
    crc32 = tiktoken_file(path, OWN[:-1])
    for name in ("my.bin", "my_val.bin", "my_train_001.bin", "my_train.bin"):
        shard = TokenFile(token_file(tmp_path / name, SOUND, SIZE, crc32))
        assert gpt2.vocabulary_of([shard, shard]) == OWN
    spoil(path)
    assert phrase in refusal(gpt2.vocabulary_of, [shard])


BELONGS = [  # size and vocabulary in a token file, those of a model, and whether they fit
    (0, None, 61, None, True), (0, None, SIZE, OWN, True), (61, None, 61, None, True),
    (50257, None, 50257, None, True), (50257, None, 50304, None, True),
    (SIZE, OWN, SIZE, OWN, True),
    (50257, None, 256, None, False), (256, None, 50257, None, False), (60, None, 61, None, False),
    (50304, None, 50257, None, False), (50257, None, 50257, [], False),
    (SIZE, OWN, SIZE, OTHER, False), (SIZE, OWN, SIZE, None, False), (SIZE, None, SIZE, OWN, False),
]  # fmt: skip


@pytest.mark.parametrize("theirs, theirs_list, V, vocabulary, fit", BELONGS)
def test_which_tokens_are_a_models(theirs, theirs_list, V, vocabulary, fit, tmp_path):
    crc32 = gpt2.vocabulary_crc(theirs_list)
    shard = TokenFile(token_file(tmp_path / "t.bin", SOUND, theirs, crc32))
    assert gpt2.belongs(shard, V, vocabulary) == fit
    if theirs_list is None:
        assert crc32 == 0 and gpt2.vocabulary_of([shard]) is None
    other = TokenFile(token_file(tmp_path / "o.bin", SOUND, theirs, 1))
    assert "of different vocabularies" in refusal(gpt2.vocabulary_of, [shard, other])


# --------------------------------------------------------------------------------------------------
# What chance does to a file: it is read as it is now, or refused in one line

JSON_WORD = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|[][{}:,]|\w+')
ODD_WORDS = rb'null true -1 0 1 2 1.5 1e999 NaN [] {} "" "F16" "I32" "\ud800" "a\u0000b"'.split()
ODD_WORDS += [b"9" * 20, b"9" * 5000, b"[" * 2000, b""]


def damaged(rng, data):
    """A file after an accident or more: to its bits, its length, or the words of its JSON."""
    at, n = rng.randrange(len(data)), rng.choice([1, 2, 4, 100])
    new = {
        "bit": bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 : at + n],
        "bytes": rng.randbytes(n),
        "double": 2 * data[at : at + n],
        "drop": b"",
    }
    how = rng.choice([*new, "cut", "word", "word", "word"])
    begin = 8 if data[8:9] == b"{" else 0  # of JSON, behind the length in .safetensors
    end = 8 + int.from_bytes(data[:8], "little") if begin else len(data)
    words = list(JSON_WORD.finditer(data, begin, end))
    if how == "word" and words:
        word, other = rng.choice(words), rng.choice(words)[0]
        other = rng.choice([rng.choice(ODD_WORDS), other, b"%d" % rng.getrandbits(20)])
        text = data[begin : word.start()] + other + data[word.end() : end]
        data = (struct.pack("<Q", len(text)) if begin else b"") + text + data[end:]
    else:
        data = data[:at] + (new[how] + data[at + n :] if how in new else b"")
    return damaged(rng, data) if rng.random() < 0.2 and len(data) > 1000 else data


def plainly_read(data):
    """The parameters in a .safetensors file, by a reader of our own."""
    n = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            part = bytearray(data[8 + n + begin : 8 + n + end])
            array = torch.frombuffer(part, dtype=TORCH[entry["dtype"]]).float().numpy()
            found[name.removeprefix("transformer.")] = array.reshape(entry["shape"])
    return found


@pytest.mark.parametrize("number", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_damage_by_chance(number, tmp_path):
    rng = random.Random(1)
    model = random_model(vocab_size=SIZE, channels=12, max_seq_len=9)
    mixed = {}
    for i, (name, tensor) in enumerate(as_hugging_face(model.params).items()):
        mixed[name] = ["F32", "F16", "BF16"][i % 3], tensor
    folder = weights_folder(tmp_path, mixed, told={"n_head": 3, "n_layer": 2, "vocab_size": SIZE})
    (folder / "vocab.json").write_bytes(vocab_json(OWN))
    crc32 = tiktoken_file(folder / "t.tiktoken", OWN[:-1])
    token_file(folder / "t.bin", SOUND, SIZE, crc32)
    gpt2.write_safetensors(str(folder / "c"), {"a": np.ones(40)}, {"state": "{}"}, checksum=True)

    def check_weights():
        found = loaded(folder)
        assert found.config.num_heads == json.loads((folder / "config.json").read_bytes())["n_head"]
        now = (folder / "model.safetensors").read_bytes()
        assert same_bits(as_hugging_face(found.params), plainly_read(now))
        assert np.isfinite(found.flat[0]).all()
        ids = {prepro.spelled(token): i for i, token in enumerate(found.vocabulary)}
        assert ids == {} or ids == json.loads((folder / "vocab.json").read_bytes())

    def check_tokens():
        [shard] = gpt2.open_shards(str(folder / "t.bin"))
        data = (folder / "t.bin").read_bytes()
        assert shard[:].tobytes() == data[1024:] and data[12:20] == struct.pack(
            "<2I", shard.vocab_size, shard.vocabulary_crc
        )
        assert gpt2.vocabulary_of([shard]) in (OWN, None)

    def check_checksum():
        gpt2.check_crc32(str(folder / "c"))
        assert (folder / "c").read_bytes() == sound["c"]

    checks = {"model.safetensors": check_weights, "config.json": check_weights, "c": check_checksum}
    checks |= {"vocab.json": check_weights, "t.bin": check_tokens, "t.tiktoken": check_tokens}
    sound = {name: (folder / name).read_bytes() for name in checks}
    accepted = Counter()
    for name in checks:
        checks[name]()
    for i in range(number):
        name = rng.choice(list(checks))
        (folder / name).write_bytes(damaged(rng, sound[name]))
        try:
            assert peak_of(checks[name]) < 8e6
            accepted[name] += 1
        except (InputError, OSError) as error:
            assert str(error).isprintable(), (i, name)
        except Exception as error:
            raise AssertionError(f"damage {i}, of {name}, is neither read nor refused") from error
        (folder / name).write_bytes(sound[name])
    assert number / 20 < accepted.total() < number / 2 and len(accepted) >= 4, accepted
