"""Weights, tokens and vocabularies: each file is read as it says, written whole, or refused."""

import itertools
import json
import math
import os
import random
import re
import struct
import tracemalloc
import zlib
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from common import need_gpt2_vocabulary

import prepro_tinyshakespeare as prepro
import test_gpt2
import train_gpt2 as gpt2
from test_gpt2 import assert_same_bits
from train_gpt2 import GPT2, GPT2Config, InputError, open_tokens

CONFIG = GPT2Config(max_seq_len=11, vocab_size=61, num_layers=2, num_heads=3, channels=24)
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def random_model(V=61):
    return test_gpt2.random_model(2, 8, np.float32, V=V, L=2, C=24, max_seq_len=11)


def packed(header, body=b""):
    """A .safetensors file of a header, as JSON or as bytes, and a body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def unpacked(data):
    n = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:n]), data[n:]


def saved(folder):
    """A model that is saved in a folder, and the header and the body of its model.safetensors."""
    model = random_model()
    model.save_pretrained(folder)
    return model, *unpacked((folder / "model.safetensors").read_bytes())


def loaded(source):
    return GPT2.from_pretrained(source, 2, 8)


def refusal(call, *arguments):
    """The line with which a call refuses."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
# Weights that are not as we write them. h and b are the header and the body of those that are

QKV = "transformer.h.1.attn.c_attn.weight"  # (24, 72)


def entry(**fields):
    """A tensor is described otherwise."""
    return lambda h, b: packed(h | {QKV: h[QKV] | fields}, b)


def renamed(old, new):
    return lambda h, b: packed({name.replace(old, new): x for name, x in h.items()}, b)


def one_more(name):
    """There is one more tensor, without numbers."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return lambda h, b: packed(h | {name: empty}, b)


NOT_WHOLE = "is no whole .safetensors file"
FILES = {  # what is odd: (the file, what the line says, if it is refused)
    "nothing": (packed, ""),
    "OpenAI's names": (renamed("transformer.", ""), ""),
    "only lm_head": (renamed("transformer.wte", "lm_head"), ""),
    "a mask": (one_more("h.0.attn.bias"), ""),
    "its number": (one_more("transformer.h.0.attn.masked_bias"), ""),
    "another order": (lambda h, b: packed(dict(sorted(h.items())), b), ""),
    "empty": (lambda h, b: b"", NOT_WHOLE),
    "nested": (lambda h, b: packed(b'{"a":' * 100_000, b), NOT_WHOLE),
    "a list": (lambda h, b: packed([], b), NOT_WHOLE),
    "a number": (lambda h, b: packed(5, b), NOT_WHOLE),
    "metadata null": (lambda h, b: packed(h | {"__metadata__": None}, b), "how many heads"),
    "metadata a list": (lambda h, b: packed(h | {"__metadata__": [1]}, b), NOT_WHOLE),
    "cut": (lambda h, b: packed(h, b[:-1]), NOT_WHOLE),
    "too long": (lambda h, b: packed(h, b + b"\0"), NOT_WHOLE),
    "one place for two": (lambda h, b: packed(h | {"h.0.attn.bias": h[QKV]}, b), NOT_WHOLE),
    "a gap": (lambda h, b: packed({name: h[name] for name in h if name != QKV}, b), NOT_WHOLE),
    "a huge shape": (entry(shape=[1 << 70]), NOT_WHOLE),
    "an unknown type": (entry(dtype="F8_E4M3"), NOT_WHOLE),
    "integers": (entry(dtype="I32"), "'h.1.attn.c_attn.weight': found (24, 72) of int32"),
    "transposed": (entry(shape=[72, 24]), "'h.1.attn.c_attn.weight': found (72, 24)"),
    "one missing": (renamed("ln_f.bias", "m"), "['ln_f.bias'] is missing"),
    "twice": (one_more("ln_f.bias"), "'ln_f.bias' is there twice"),
    "one more": (one_more("two\nlines"), r"['two\nlines'] is missing, or is not part"),
    "no wte": (renamed("wte", "w"), "expected matrices wte.weight"),
    "one layer more": (one_more("h.2.ln_1.weight"), "['h.2.attn.c_attn.bias'] is missing"),
    "another classifier": (one_more("lm_head.weight"), "lm_head.weight differs"),
}


@pytest.mark.parametrize("what", FILES)
def test_weights_are_read_as_they_are_or_refused(what, tmp_path):
    change, phrase = FILES[what]
    model, *sound = saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(change(*sound))
    os.remove(tmp_path / "config.json")  # our own files say themselves how many heads there are
    if phrase:
        assert phrase in refusal(loaded, tmp_path)
    else:
        assert loaded(tmp_path).config == CONFIG
        assert_same_bits(loaded(tmp_path / "model.safetensors").params, model.params)


CONFIGS = [  # what config.json says, and what the refusal says, if it is one
    ({"layer_norm_epsilon": 1e-5, "n_inner": None, "anything": "else"}, ""),
    ({"model_type": "llama"}, "model_type = 'llama', expected 'gpt2'"),
    ({"n_positions": 12}, "n_positions = 12, expected 11"),
    ({"activation_function": "gelu"}, "'gelu', expected 'gelu_new'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "layer_idx = True"),
    ({"n_head": 5}, "24 channels can't be shared by 5 heads"),
    (b"[]", "expected a JSON object, found []"),
    (b"\xff", "expected JSON"),
]


@pytest.mark.parametrize("told, phrase", CONFIGS, ids=str)
def test_config_must_agree(told, phrase, tmp_path):
    _, h, b = saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(packed(h | {"__metadata__": None}, b))
    config = tmp_path / "config.json"
    before = json.loads(config.read_bytes())
    config.write_bytes(told if isinstance(told, bytes) else json.dumps(before | told).encode())
    if phrase:  # before there is a model
        assert phrase in refusal(gpt2.open_weights, str(tmp_path))
    else:
        assert loaded(tmp_path / "model.safetensors").config == CONFIG


@pytest.mark.parametrize("L, C, heads", [(12, 768, 12), (48, 1600, 25), (12, 704, 0), (13, 768, 0)])
def test_heads_of_openais_sizes_are_known_and_no_others(L, C, heads, monkeypatch):
    shapes = GPT2.param_shapes(GPT2Config(1024, 50257, L, 1, C)).items()
    views = gpt2.huggingface_views({name: np.broadcast_to(0, shape) for name, shape in shapes})
    monkeypatch.setattr(gpt2, "read_parts", lambda path: (dict(views), {}))
    count_heads = lambda: gpt2.open_weights("x/y")[0].num_heads
    assert count_heads() == heads if heads else "how many heads" in refusal(count_heads)


def peak_of(call):
    """The most memory that Python and NumPy held at once while it ran, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", TORCH)
def test_every_type_is_copied_bit_by_bit(dtype):
    """... without a second copy, and only what is finite."""
    info = torch.finfo(TORCH[dtype])
    numbers = [-0.0, info.smallest_normal / 4, -info.max, info.eps] + [0.1] * 100_000
    numbers = torch.tensor(numbers, dtype=TORCH[dtype])
    array = numbers.view(torch.uint8).numpy().view(gpt2.ARRAY_TYPES[dtype])
    out = np.empty(array.shape, np.float32)
    tensors = {"a": array}
    assert peak_of(lambda: gpt2.copy_tensors({"a": out}, tensors)) < 0.1 * out.nbytes
    assert tensors == {}  # so no file is mapped any more
    assert out.tobytes() == numbers.float().numpy().tobytes()
    for number in (math.nan, math.inf, -math.inf):
        numbers[7] = number
        line = refusal(gpt2.copy_tensors, {"a": out}, {"a": array})
        assert line == "tensor 'a' holds a value that is not finite"


# --------------------------------------------------------------------------------------------------
# What is written


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """And with a checksum that no change of a bit escapes."""
    path = tmp_path / "x.safetensors"
    array = np.arange(12, dtype=np.float32).reshape(4, 3).T
    gpt2.write_safetensors(path, {"a": array, "b": np.ones(1)}, {"k": "v"}, checksum=True)
    found, metadata = gpt2.read_safetensors(path, checksum=True)
    assert found["a"].tolist() == array.tolist() and metadata == {"k": "v"}
    assert found["b"].tolist() == [1] and [*found] == ["a", "b", "crc32"]
    data = path.read_bytes()
    with pytest.raises(ValueError):
        gpt2.write_safetensors(path, {"a": array, "b": np.array(["no number"])}, {})
    assert os.listdir(tmp_path) == ["x.safetensors"] and path.read_bytes() == data
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
        assert "no whole" in refusal(gpt2.read_safetensors, path, True)


def test_a_model_is_written_without_a_copy(tmp_path):
    model = random_model(V=125_000)  # 12 MB
    assert peak_of(lambda: model.save_pretrained(tmp_path)) < 1.2e6


# --------------------------------------------------------------------------------------------------
# Names of models, and what is fetched


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepro, "provide", lambda what: f"fetched {what}")
    os.makedirs("gpt2/best")  # without weights it is no model
    assert gpt2.find_weights("gpt2") == "fetched gpt2" and gpt2.find_weights("./gpt2") == "./gpt2"
    assert "gpt2, gpt2-medium" in refusal(gpt2.find_weights, "gpt3")
    for name in ("gpt2", "m.bin"):
        assert "extras.llmc" in refusal(gpt2.open_weights, name)
    for name in ("model", "model-00001-of-00002", "checkpoint_00000002", "best/model"):
        (tmp_path / "gpt2" / f"{name}.safetensors").touch()
        assert "write ./gpt2 for it" in refusal(gpt2.find_weights, "gpt2")
        os.remove(f"gpt2/{name}.safetensors")


def test_only_what_can_t_be_fetched_is_a_connection_error(monkeypatch):
    unfetched, wrong = prepro.FetchError("no network", "plug it in"), prepro.InputError("no")
    for error, expected in ((unfetched, ConnectionError), (wrong, InputError)):
        monkeypatch.setattr(prepro, "provide", Mock(side_effect=error))
        with pytest.raises(expected, match="^no network: plug it in$|^no$"):
            gpt2.prepro("provide", "gpt2")


# --------------------------------------------------------------------------------------------------
# Token files, and the text at hand


def token_file(path, tokens, vocab_size=0, crc32=0):
    header = struct.pack("<5I", 20240520, 1, len(tokens), vocab_size, crc32)
    path.write_bytes(header.ljust(1024, b"\0") + np.array(tokens, "<u2").tobytes())
    return str(path)


SOUND = [(i * i) % 61 for i in range(50)]


def test_a_malformed_token_file_is_refused(tmp_path):
    path = tmp_path / "t.bin"
    assert open_tokens(token_file(path, SOUND))[:].tolist() == SOUND
    data = path.read_bytes()
    with_number = lambda i, n: data[: 4 * i] + struct.pack("<I", n) + data[4 * i + 4 :]
    others = with_number(0, 20240326), with_number(1, 2), with_number(2, 0)[:1024]
    for malformed in (b"", data[:-1], data + b"\0", *others):
        path.write_bytes(malformed)
        assert f"{path}: no whole token file: " in refusal(open_tokens, str(path))


def test_a_token_file_stays_what_it_was(tmp_path):
    """... when another takes its name."""
    path = token_file(tmp_path / "t.bin", SOUND, vocab_size=300, crc32=2**32 - 1)
    file = open_tokens(path)
    assert (len(file), file.vocab_size, file.vocabulary_crc) == (50, 300, 2**32 - 1)
    os.replace(token_file(tmp_path / "other.bin", [7] * 50), path)
    assert file[3:17].tolist() == SOUND[3:17] and file[3:17].dtype == np.uint16
    assert file.path == path and open_tokens(path)[:].tolist() == [7] * 50


def test_shards_by_name_by_pattern_and_by_list(tmp_path):
    b, a, odd = [token_file(tmp_path / f"{name}.bin", [1] * 9) for name in ("b", "a", "c[1]")]
    found = lambda paths: [shard.path for shard in gpt2.open_shards(paths)]
    assert found([str(tmp_path / "*.bin")]) == [a, b, odd] and found([odd]) == [odd]
    assert found([odd, b, a, str(tmp_path / "[ab].bin")]) == [a, b, odd]
    assert "d*.bin: no such token file" in refusal(found, [a, str(tmp_path / "d*.bin")])


def test_the_text_at_hand(tmp_path, monkeypatch, capsys):
    """Tiny Shakespeare or this project's files, of which every tenth passage validates."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    text = b"".join(b"lin\xe9 %04d\n" % n for n in range(2100))  # 21 passages of 1010 bytes
    shakespeare = tmp_path / "data" / "tiny_shakespeare.txt"
    shakespeare.write_bytes(text.replace(b"\n", b"\r\n"))
    training, validation = gpt2.text_at_hand()
    assert validation == text[5050:6060] + text[15150:16160]
    assert training == text[:5050] + text[6060:15150] + text[16160:]
    shakespeare.unlink()
    training, _ = gpt2.text_at_hand()
    assert b"class Llama(GPT2" in training
    said = r"the text is that of tiny_shakespeare.txt\n.* train_gpt2.py and \d+ more files\n"
    assert re.fullmatch(said, capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------
# Vocabularies. tests/test_prepro.py shows that the merges are the right ones

TEXT = "low lower, the lowest aaaa\n\n naïve 语言模型 🙂\r\n <|endoftext|>\n"
MERGES = [b"es", b"est", b"lo", b"low", b"th", b"the", b"aa", "语".encode()[:2], "语".encode()]
OWN = [*(bytes([i]) for i in range(256)), *MERGES, b" the"]
OTHER = [*OWN[:-1], b"at"]  # of the same size
SIZE = len(OWN) + 1  # with <|endoftext|>


def vocab_json(vocabulary):
    names = [*map(prepro.spelled, vocabulary), "<|endoftext|>"]
    return json.dumps({name: i for i, name in enumerate(names)}).encode()


@pytest.mark.parametrize(
    "vocabulary, V, first", [(OWN, SIZE, 10), ("bytes", 256, 10), ("gpt2", 50304, 50256)]
)
def test_tokens_and_text(vocabulary, V, first):
    if vocabulary == "gpt2":
        need_gpt2_vocabulary()
    tokens = gpt2.tokenizer(vocabulary)
    ids = tokens.encode(TEXT)
    assert b"".join(map(tokens.decode, ids)) == TEXT.encode() and tokens.first == first
    assert sum(tokens.lengths[i] for i in ids) == len(TEXT.encode()) and len(tokens.lengths) == V
    if V != 256:
        end = 50256 if vocabulary == "gpt2" else SIZE - 1
        assert tokens.decode(end) == b"\n" and tokens.lengths[end] == 0
        assert V == SIZE or tokens.decode(50303) == b"<50303>"


def test_gpt2s_own_vocabulary_is_known_by_the_order_of_its_merges(tmp_path):
    need_gpt2_vocabulary()
    words = [*map(gpt2.tokenizer("gpt2").decode, range(50256))]
    files = prepro.huggingface_files("gpt2")
    assert files["merges.txt"].decode().split("\n")[1:-1] == prepro.merges_of(words)
    other = [*words[:-2], words[-1], words[-2]]
    for found, expected in ((words, "gpt2"), (other, other)):
        (tmp_path / "vocab.json").write_bytes(vocab_json(found))
        assert gpt2.saved_vocabulary(str(tmp_path), 50257) == expected


def test_tokens_of_an_unknown_vocabulary_have_no_text(tmp_path):
    """Nobody takes them for bytes or GPT-2's."""
    usual = {256: "bytes", 50257: "gpt2", 50304: "gpt2", 50256: None, 50305: None, SIZE: None}
    for V, expected in usual.items():
        assert gpt2.saved_vocabulary(str(tmp_path), V) == expected
    texts = b"{", b"[]", b"{}", vocab_json(OWN)
    for found, V in itertools.product(texts, (256, SIZE + 1, 50257)):
        (tmp_path / "vocab.json").write_bytes(found)
        assert gpt2.saved_vocabulary(str(tmp_path), V) == ("bytes" if V == 256 else None)
    (tmp_path / "vocab.json").write_bytes(vocab_json(prepro.BYTES))
    assert gpt2.saved_vocabulary(str(tmp_path), len("bytes") + 1) is None
    assert "the vocabulary of the model is not known" in refusal(gpt2.tokenizer, None)


BELONGS = [  # size and vocabulary in a token file, those of a model, and whether they fit
    (0, "", SIZE, OWN, True), (61, "", 61, None, True), (50257, "", 50304, "gpt2", True),
    (SIZE, OWN, SIZE, OWN, True), (256, "", 256, "bytes", True), (0, "", 61, None, True),
    (256, "", 50257, "gpt2", False), (61, "", 65, None, False), (256, "", 256, None, False),
    (50257, "", 50257, None, False), (SIZE, OWN, SIZE, OTHER, False),
    (SIZE, OWN, SIZE, None, False), (SIZE, "", SIZE, OWN, False),
]  # fmt: skip


@pytest.mark.parametrize("V, theirs, size, vocabulary, fit", BELONGS)
def test_which_tokens_are_a_models(V, theirs, size, vocabulary, fit):
    crc32 = zlib.crc32(prepro.vocabulary_file(theirs))
    shard = SimpleNamespace(vocab_size=V, vocabulary_crc=crc32)
    assert gpt2.belongs(shard, size, vocabulary) == fit


def test_the_vocabulary_of_token_files_lies_beside_them(tmp_path):
    beside = tmp_path / "my.tiktoken"
    data, other = map(prepro.vocabulary_file, (OWN, OTHER))
    beside.write_bytes(data)
    for name in ("my.bin", "my_val.bin", "my_train_001.bin", "my_train.bin"):
        shard = open_tokens(token_file(tmp_path / name, SOUND, SIZE, zlib.crc32(data)))
        assert gpt2.vocabulary_of(shard) == OWN
    padded = open_tokens(token_file(tmp_path / "my.bin", SOUND, SIZE + 9, zlib.crc32(data)))
    assert "my.tiktoken is not the vocabulary of" in refusal(gpt2.vocabulary_of, padded)
    beside.write_bytes(other)
    assert "my.tiktoken is not the vocabulary of" in refusal(gpt2.vocabulary_of, shard)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match="my.tiktoken"):
        gpt2.vocabulary_of(shard)
    assert gpt2.vocabulary_of(open_tokens(token_file(tmp_path / "my.bin", SOUND, SIZE))) is None


# --------------------------------------------------------------------------------------------------
# transformers, both ways

BOTH_WAYS = [  # our vocabulary, its size, the id of its end; what transformers saves it as
    (OWN, SIZE, SIZE - 1, "F16", "20KB"), ("bytes", 256, None, "BF16", "1GB"),
    ("gpt2", 50257, 50256, "F32", "1GB"),
]  # fmt: skip


@pytest.mark.parametrize("vocabulary, V, end, dtype, size", BOTH_WAYS)
def test_transformers_and_we_open_what_the_other_saves(vocabulary, V, end, dtype, size, tmp_path):
    """Its ids are ours, its pipeline stops in time. It saves weights in one file or in parts."""
    transformers = pytest.importorskip("transformers")
    if V == 50257:
        need_gpt2_vocabulary()
    ours = random_model(V)
    ours.vocabulary = vocabulary
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert [what for what, found in info.items() if found] == []
    found = {name: x.numpy() for name, x in theirs.transformer.state_dict().items()}
    assert_same_bits(found, gpt2.huggingface_views(ours.params))
    ids = np.random.default_rng(1).integers(0, 61, (2, 8))
    logits = ours.forward_tokens(ids) @ ours.params["wte"].T
    np.testing.assert_allclose(logits, theirs(torch.tensor(ids)).logits.detach(), atol=1e-5)

    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert told == {"bos_token_id": end, "eos_token_id": end, "max_length": 11}
    said = transformers.pipeline("text-generation", str(tmp_path))("the", do_sample=False)
    assert said[0]["generated_text"].startswith("the")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.replace("<|endoftext|>", "")
    assert tokenizer.encode(text) == gpt2.tokenizer(vocabulary).encode(text)

    folder = tmp_path / "theirs"
    tokenizer.save_pretrained(folder)
    theirs.to(TORCH[dtype]).save_pretrained(folder, max_shard_size=size)
    assert any(folder.glob("model-*")) == (size == "20KB")
    for path in (folder, tmp_path / "model.safetensors"):
        assert loaded(path).config == ours.config and loaded(path).vocabulary == vocabulary
    rounded = {k: torch.tensor(x).to(TORCH[dtype]).float().numpy() for k, x in ours.params.items()}
    assert_same_bits(loaded(folder).params, rounded)


# --------------------------------------------------------------------------------------------------
# What chance does to a folder: it is read as it is now, or refused in one line

JSON_WORD = re.compile(rb'"[^"]*"|[-+.\w]+|[][{}:,]')
ODD_WORDS = rb'null true -1 0 2 1.5 1e999 NaN [] {} "" "F16" "I32" "\ud800"'.split()
ODD_WORDS += [b"9" * 20, b"9" * 5000, b"[" * 2000]


def damaged(rng, data, is_json):
    """A file after an accident to some of its bytes, or to a word of its JSON."""
    if rng.random() < 0.4:
        at, n = rng.randrange(len(data)), rng.choice([1, 4, 100, len(data)])
        return data[:at] + rng.choice([rng.randbytes(n % 50), b""]) + data[at + n :]
    header, body = (json.loads(data), b"") if is_json else unpacked(data)
    words = JSON_WORD.findall(json.dumps(header).encode())
    other = rng.choice([rng.choice(ODD_WORDS), rng.choice(words), b"%d" % rng.getrandbits(12)])
    words[rng.randrange(len(words))] = other
    return b"".join(words) if is_json else packed(b"".join(words), body)


@pytest.mark.parametrize("number", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_damage_by_chance(number, tmp_path):
    rng = random.Random(1)
    model = random_model(V=SIZE)
    model.vocabulary = OWN
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"

    def check():
        model = loaded(tmp_path)
        header, _ = unpacked(weights.read_bytes())
        told = header["__metadata__"].get("n_head") or 3  # which is in config.json
        assert model.config.num_heads == int(told)
        assert np.isfinite(model.flat[0]).all() and model.vocabulary in (None, OWN)

    check()
    accepted = []
    for i in range(number):
        path = rng.choice([weights, tmp_path / "config.json", tmp_path / "vocab.json"])
        sound = path.read_bytes()
        path.write_bytes(damaged(rng, sound, path != weights))
        try:
            assert peak_of(check) < 8e6, (i, path)
            accepted.append(path)
        except (InputError, OSError) as error:
            assert str(error).isprintable(), (i, path)
        path.write_bytes(sound)
    assert number / 20 < len(accepted) and len(set(accepted)) == 3
