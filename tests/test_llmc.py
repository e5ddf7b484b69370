"""llm.c's files: models in every version, the state for ports, the tokenizer; and damaged ones."""

import math
import os
import re
import struct
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import tiktoken
import torch
from common import (
    TORCH_TYPES,
    VOCABULARY_FOLDER,
    encoded_as,
    file_model,
    loaded,
    need_gpt2_vocabulary,
    peak_of,
    posix_only,
    refused_file,
    write_token_file,
    written,
)
from fuzzing import HUGE, fuzz

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2
from extras import llmc
from test_gpt2 import (
    TorchGPT2,
    assert_all_close,
    assert_same_bits,
    copies,
    random_model,
    random_tokens,
    torch_grads,
)

# --------------------------------------------------------------------------------------------------
# The files by hand, from their description

ORDER = (
    "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb"
).split()


def llmc_bytes(numbers, views, dtype="F32", padded_vocab_size=None, between=b""):
    """A header, what stands `between`, and the 16 tensors, wte with rows of zeros at its end."""
    padding = (padded_vocab_size or len(views["wte"])) - len(views["wte"])
    tensors = views | {"wte": np.pad(views["wte"], ((0, padding), (0, 0)))}
    header = struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))
    return header + between + b"".join(encoded_as(dtype, tensors[name]) for name in ORDER)


def llmc_model(model, version):
    """A model file: version 1 without padding, 3 in float32, 5 in bfloat16."""
    c = model.config
    padded = -(-c.vocab_size // 128) * 128
    sizes = (c.max_seq_len, c.vocab_size, c.num_layers, c.num_heads, c.channels)
    numbers = [20240326, version, *sizes]
    if version == 1:
        return llmc_bytes(numbers, model.params)
    return llmc_bytes([*numbers, padded], model.params, "BF16" if version == 5 else "F32", padded)


def rounded_to(dtype, views):
    """What is left of float32 arrays that were stored in another type."""
    kind = TORCH_TYPES[dtype]
    return {name: torch.tensor(view).to(kind).float().numpy() for name, view in views.items()}


def shapes_of(sizes):
    return gpt2.param_shapes(gpt2.GPT2Config(**sizes))


# --------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("version, dtype", [(1, "F32"), (3, "F32"), (5, "BF16")])
def test_every_version_of_a_model_is_read(version, dtype, tmp_path):
    model = file_model()
    read = loaded(written(tmp_path / "gpt2.bin", llmc_model(model, version)))
    assert read.config == model.config
    assert_same_bits(read.params, rounded_to(dtype, model.params))


@pytest.mark.parametrize("version, dtype", [(1, "F32"), (3, "F32"), (5, "BF16")])
def test_where_the_tensors_lie(version, dtype, tmp_path):
    """The bytes at each offset are the tensor's, and wte comes without its padding."""
    model = file_model()
    data = llmc_model(model, version)
    sizes, tensors = llmc.open_model(written(tmp_path / "gpt2.bin", data), shapes_of)
    assert sizes == asdict(model.config) and list(tensors) == ORDER
    for name, (offset, kind, shape) in tensors.items():
        expected = encoded_as(dtype, model.params[name])
        assert (kind, shape) == (dtype, model.params[name].shape)
        assert data[offset : offset + len(expected)] == expected


@pytest.mark.parametrize("sizes", [{}, {"V": 128, "L": 1, "NH": 1, "C": 64}], ids=str)
def test_a_round_trip_keeps_every_bit(sizes, tmp_path):
    model = file_model(**sizes)
    model.params["wpe"][-1, :4] = (-0.0, 1e-45, -1e-39, np.finfo(np.float32).max)
    before = copies(model.params)
    llmc.write_model(str(tmp_path / "new.bin"), asdict(model.config), model.params)
    read = loaded(tmp_path / "new.bin")
    assert read.config == model.config
    assert_same_bits(read.params, before)
    assert_same_bits(model.params, before)
    assert os.listdir(tmp_path) == ["new.bin"]


def test_a_model_of_float64_is_written_in_float32(tmp_path):
    model = gpt2.GPT2(gpt2.GPT2Config(8, 61, 2, 3, 24), 2, 8, seed=5, dtype=np.float64)
    llmc.write_model(str(tmp_path / "new.bin"), asdict(model.config), model.params)
    expected = {name: view.astype(np.float32) for name, view in model.params.items()}
    assert_same_bits(loaded(tmp_path / "new.bin").params, expected)


@pytest.mark.parametrize("version", [1, 3, 5])
def test_reading_never_holds_a_second_copy(version, tmp_path):
    """While weights are read there is the model, and beside it pieces: of 48 MB, a fraction."""
    model = file_model(V=500_000)
    path = written(tmp_path / "big.bin", llmc_model(model, version))
    size = gpt2.GPT2(model.config, 1, 1, training=False).blob.nbytes
    _, peak = peak_of(lambda: gpt2.GPT2.from_pretrained(path, 1, 1, training=False))
    os.remove(path)
    assert peak < size + 0.4 * model.params["wte"].nbytes


# --------------------------------------------------------------------------------------------------
# What a port checks itself against


@pytest.mark.parametrize(
    "V, L, stem", [(61, 2, "gpt2_0M"), (128, 1, "gpt2_0M"), (50257, 2, "gpt2_1M")]
)
def test_model_and_state_byte_for_byte(V, L, stem, tmp_path):
    model, (inputs, targets) = file_model(V=V, L=L), random_tokens(B=2, T=8, V=V)
    model.forward(*random_tokens(B=2, T=8, V=V, seed=3))
    model.backward()  # and the gradients of this other batch must not remain
    paths = llmc.write_tensors(model, inputs, targets, str(tmp_path / "new"))
    names = [f"{stem}.bin", f"{stem}_debug_state.bin"]
    assert paths == [str(tmp_path / "new" / name) for name in names]
    weights, state = ((tmp_path / "new" / name).read_bytes() for name in names)
    assert weights == llmc_model(model, 3)

    start = 1024 + 2 * 4 * inputs.size
    end = start + 4 * inputs.size * V
    logits, loss = state[start:end], state[end : end + 4]  # these are judged below
    between = encoded_as("I32", inputs) + encoded_as("I32", targets) + logits + loss
    padded = -(-V // 128) * 128
    assert state == llmc_bytes([20240327, 2, 2, 8], model.grads, "F32", padded, between)

    seen = {}

    def watch(name, x):
        seen[name] = x
        return x

    reference = TorchGPT2(model.config, model.params).double()
    true_loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets), watch)
    true_loss.backward()
    ours = {"logits": np.frombuffer(logits, "<f4").reshape(2, 8, V)}
    assert_all_close(ours, {"logits": seen["logits"].detach().numpy()})
    assert np.frombuffer(loss, "<f4")[0] == pytest.approx(true_loss.item(), rel=1e-6)
    assert_all_close(model.grads, torch_grads(reference, model.params))


def test_the_state_never_holds_all_logits(tmp_path):
    """They are the largest array of all: 823 MB at B=4, T=1024."""
    model = random_model(8, 192, np.float32, V=4096)
    inputs, targets = random_tokens(B=8, T=192, V=4096)
    model.forward(inputs, targets, train=False)
    _, peak = peak_of(lambda: llmc.write_tensors(model, inputs, targets, str(tmp_path)))
    # There are six pieces: one is written while the next is computed.
    assert peak < 0.5 * 4 * inputs.size * 4096


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    path.write_bytes(b"what was there")
    model = file_model()

    def no_room(handle):
        raise OSError(28, "No space left on device")

    def no_more_logits():
        yield np.zeros(3, np.float32)
        raise KeyboardInterrupt

    batch = random_tokens(B=2, T=8, V=61)
    with pytest.raises(KeyboardInterrupt):
        llmc.write_state(str(path), *batch, no_more_logits(), 0.0, model.grads)
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError):
        llmc.write_model(str(path), asdict(model.config), model.params)
    with pytest.raises(OSError):
        llmc.write_tokenizer(str(path), small_encoding())
    assert path.read_bytes() == b"what was there" and os.listdir(tmp_path) == ["x.bin"]


# --------------------------------------------------------------------------------------------------
# The tokenizer


def small_encoding(longest=b"the"):
    merges = [b"th", longest, b" t", b" the", b"\n\n", b"or", "é".encode(), b"to", b"be"]
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    return tiktoken.Encoding(
        "small",
        pat_str=r" ?\p{L}+| ?[^\s\p{L}]+|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 265},
    )


def read_tokenizer_file(path):
    """As its description says: (version, end of text's id, the tokens' bytes)."""
    data = path.read_bytes()
    magic, version, n, eot, *rest = struct.unpack("<256i", data[:1024])
    assert magic == 20240328 and rest == [0] * 252
    tokens = []
    at = 1024
    for _ in range(n):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    assert at == len(data)
    return version, eot, tokens


def test_a_tokenizer_byte_for_byte(tmp_path):
    encoding = small_encoding()
    llmc.write_tokenizer(str(tmp_path / "data" / "t.bin"), encoding)
    version, eot, tokens = read_tokenizer_file(tmp_path / "data" / "t.bin")
    assert (version, eot, len(tokens), tokens[265]) == (2, 265, 266, b"<|endoftext|>")
    assert tokens[:256] == [bytes([i]) for i in range(256)]
    assert tokens[257] == b"the" and tokens[262] == b"\xc3\xa9"
    ids = encoding.encode_ordinary("to be\n\nor thé")
    assert b"".join(tokens[i] for i in ids).decode() == "to be\n\nor thé"


def test_a_token_too_long_for_its_length_byte_is_refused(tmp_path):
    llmc.write_tokenizer(str(tmp_path / "t.bin"), small_encoding(b"a" * 255))
    assert read_tokenizer_file(tmp_path / "t.bin")[2][257] == b"a" * 255
    os.remove(tmp_path / "t.bin")
    with pytest.raises(ValueError, match="t.bin: a token has 256 bytes, at most 255 bytes fit"):
        llmc.write_tokenizer(str(tmp_path / "t.bin"), small_encoding(b"a" * 256))
    assert os.listdir(tmp_path) == []


def test_gpt2s_tokenizer_spells_what_gpt2s_tokens_mean(tmp_path, monkeypatch):
    need_gpt2_vocabulary()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY_FOLDER)
    encoding = prepro.get_encoding()
    llmc.write_tokenizer(str(tmp_path / "t.bin"), encoding)
    version, eot, tokens = read_tokenizer_file(tmp_path / "t.bin")
    assert (version, eot, len(tokens)) == (2, 50256, 50257)
    assert (tokens[31373], tokens[995], tokens[eot]) == (b"hello", b" world", b"<|endoftext|>")
    text = "First Citizen:\nBefore we proceed any further, hear me. Ünïcödé \u2028 \U0001f3ad"
    assert b"".join(tokens[i] for i in encoding.encode_ordinary(text)).decode() == text


# --------------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def shakespeare(tmp_path, monkeypatch):
    """A folder of its own, whose tokens are there: (folder, those of the validation data)."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    monkeypatch.chdir(folder)
    tokens = np.random.default_rng(1).integers(0, 50257, 400)
    paths = ("data/tiny_shakespeare_train.bin", "data/tiny_shakespeare_val.bin")
    for path, numbers in zip(paths, (tokens[::-1], tokens), strict=True):
        write_token_file(folder / path, numbers.tolist())
    monkeypatch.setattr(prepro, "provide", lambda name: paths)
    monkeypatch.setattr(prepro, "get_encoding", small_encoding)
    return folder, tokens


@pytest.mark.parametrize("flags, place", [([], "data"), (["--output_dir", "new/port"], "new/port")])
def test_all_that_a_port_begins_with(flags, place, shakespeare, capsys):
    folder, tokens = shakespeare
    model = file_model(V=50257, L=1, NH=1, C=6, max_seq_len=64)
    model.save_pretrained("model")
    assert llmc.main(["--model", "model", *flags]) == 0
    names = ["gpt2_0M.bin", "gpt2_0M_debug_state.bin", "gpt2_tokenizer.bin"]
    paths = [f"{place}/{name}" for name in names]
    token_paths = [f"data/tiny_shakespeare_{part}.bin" for part in ("train", "val")]
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines() == [*paths, *token_paths] and stderr == ""

    weights, state, _ = ((folder / path).read_bytes() for path in paths)
    assert weights == llmc_model(model, 3)
    assert len(read_tokenizer_file(folder / paths[2])[2]) == 266
    assert struct.unpack("<4i", state[:16]) == (20240327, 2, 4, 64)
    batch = np.frombuffer(state[1024 : 1024 + 2 * 4 * 256], "<i4")
    assert np.array_equal(batch, [*tokens[:256], *tokens[1:257]])
    assert_same_bits(loaded(paths[0], 4, 64).params, model.params)


@pytest.mark.parametrize(
    "sizes, parts",
    [
        (None, ["nowhere", "no such"]),
        ({"V": 61, "max_seq_len": 64}, ["inputs", "60"]),
        ({"V": 50257, "C": 6, "max_seq_len": 63}, ["64", "63"]),
    ],
    ids=["missing", "other tokens", "short context"],
)
def test_what_can_not_be_written_is_one_line(sizes, parts, shakespeare, capsys):
    folder, _ = shakespeare
    if sizes:
        file_model(**sizes).save_pretrained("nowhere")
    before = sorted(os.listdir(folder / "data"))
    assert llmc.main(["--model", "nowhere"]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert [part for part in parts if part not in stderr] == []
    assert sorted(os.listdir(folder / "data")) == before


def test_the_program_itself(tmp_path):
    """As a program it imports the trainer; and the trainer imports nothing that imports it."""
    top = os.path.dirname(os.path.abspath(gpt2.__file__))
    command = [sys.executable, "-m", "extras.llmc", "--model", str(tmp_path / "nowhere")]
    ran = subprocess.run(command, capture_output=True, cwd=top, text=True)
    assert ran.returncode == 1 and re.fullmatch("error: .*nowhere.*\n", ran.stderr)
    alone = "import sys; from extras import llmc, hellaswag; sys.exit('train_gpt2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", alone], cwd=top).returncode == 0


# --------------------------------------------------------------------------------------------------
# Malformed models: what is wrong with it, and what the refusal must say

FIELDS = "magic version max_seq_len vocab_size num_layers num_heads channels padded".split()


def with_number(field, value):
    """One number of a header changed."""
    at = 4 * FIELDS.index(field)
    return lambda data: data[:at] + struct.pack("<i", value) + data[at + 4 :]


def with_bias(version, value):
    """An odd number in the last place of a tensor."""

    def build(data):
        model = file_model()
        model.params["fcprojb"][1, -1] = value
        return llmc_model(model, version)

    return build


DESCRIBES = "bytes, its header describes"
MALFORMED = {
    "empty": (lambda d: b"", "begins with 0", "20240326"),
    "three_bytes": (lambda d: d[:3], "begins with 0", "20240326"),
    "wrong_magic": (with_number("magic", 20240520), "begins with 20240520", "20240326"),
    "big_endian": (lambda d: np.frombuffer(d, "<i4").astype(">i4").tobytes(), "20240326"),
    "heads_do_not_divide": (with_number("num_heads", 5), "24 channels", "5 heads"),
    "heads_huge": (with_number("num_heads", HUGE), "24 channels", f"{HUGE} heads"),
    "channels_huge": (with_number("channels", 3 << 29), DESCRIBES),
    "padding_zero": (with_number("padded", 0), "padded vocabulary of 0 for 61"),
    "padding_negative": (with_number("padded", -128), "padded vocabulary of -128 for 61"),
    "padding_too_small": (with_number("padded", 60), "padded vocabulary of 60 for 61"),
    "padding_too_large": (with_number("padded", 129), DESCRIBES),
    "padding_huge": (with_number("padded", HUGE), DESCRIBES),
    "header_alone": (lambda d: d[:1024], f"1024 {DESCRIBES}"),
    "half_a_header": (lambda d: d[:512], f"512 {DESCRIBES}"),
    "truncated": (lambda d: d[:-1], DESCRIBES),
    "trailing": (lambda d: d + bytes(4), DESCRIBES),
    "version_1_with_padding": (with_number("version", 1), DESCRIBES),
    "version_5_in_float32": (with_number("version", 5), DESCRIBES),
    "nan": (with_bias(3, math.nan), "fcprojb", "not finite"),
    "minus_inf": (with_bias(1, -math.inf), "fcprojb", "not finite"),
    "nan_in_bfloat16": (with_bias(5, math.nan), "fcprojb", "not finite"),
}
for number in (0, 2, 4, -3, HUGE):
    MALFORMED[f"version_{number}"] = with_number("version", number), f"version {number},", "1 or 3"
for number in (129, 65535, HUGE):
    for field in ("max_seq_len", "num_layers"):
        MALFORMED[f"{field}_{number}"] = with_number(field, number), DESCRIBES
    said = f"padded vocabulary of 128 for {number}"
    MALFORMED[f"vocab_size_{number}"] = with_number("vocab_size", number), said
for number in (0, -1, -(2**31)):
    for field in FIELDS[2:7]:
        change = with_number(field, number)
        MALFORMED[f"{field}_{number}"] = change, f"{field} is {number}", "positive"


@pytest.mark.parametrize("damage", MALFORMED)
def test_a_malformed_model_is_refused(damage, tmp_path, capsys):
    """By from_pretrained and, in the same words, by the command line."""
    change, *parts = MALFORMED[damage]
    sound = llmc_model(file_model(), 3)
    assert loaded(written(tmp_path / "model.bin", sound)).config.num_layers == 2
    source = written(tmp_path / "model.bin", change(sound))
    line = refused_file(source, source, *parts)
    capsys.readouterr()
    assert gpt2.main(["--model", source, "--inference_only", "1", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def header(*numbers):
    return struct.pack("<256i", 20240326, 3, *numbers, *[0] * (254 - len(numbers)))


CRAFTED = {  # headers that promise more than there is
    "header_alone": header(1024, 50257, 12, 12, 768, 50304),
    "many_layers": header(1024, 50257, 65535, 12, 768, 50304),
    "most_layers": header(1, 1, HUGE, 1, 1, 1),
    "all_huge": header(HUGE, HUGE, HUGE, HUGE, HUGE, HUGE),
    "much_padding": header(1024, 1, 12, 1, 1, HUGE),
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_a_crafted_header_costs_no_more_than_its_file(crafted, tmp_path):
    """A loop that counts to what a header says would take minutes, or for ever."""
    path = written(tmp_path / "model.bin", CRAFTED[crafted])

    def read():
        with pytest.raises(gpt2.InputError) as caught:
            gpt2.GPT2.from_pretrained(path)
        assert str(caught.value).isprintable()

    began = time.process_time()
    _, peak = peak_of(read)
    assert time.process_time() - began < 5 and peak < 4 << 20


def test_the_trainer_itself_refuses_in_one_line(tmp_path):
    path = written(tmp_path / "bad.bin", CRAFTED["header_alone"])
    command = [sys.executable, gpt2.__file__, "--model", path, "--inference_only", "1"]
    ran = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, b"")
    assert re.fullmatch(rb"error: [ -~]*\n", ran.stderr)
    assert os.listdir(tmp_path) == ["bad.bin"]


@posix_only
def test_a_pipe_and_a_folder_are_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "folder.bin").mkdir()
    for name in ("pipe.bin", "folder.bin"):
        with pytest.raises(ValueError, match="found a folder, a pipe or a device"):
            llmc.open_model(str(tmp_path / name), shapes_of)
    with pytest.raises(FileNotFoundError):
        llmc.open_model(str(tmp_path / "nothing.bin"), shapes_of)
    command = [sys.executable, gpt2.__file__, "--model", "pipe.bin", "--inference_only", "1"]
    ran = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=60)
    assert ran.returncode == 1 and b"found a folder, a pipe or a device" in ran.stderr


@pytest.mark.parametrize("version", [1, 3, 5])
def test_fuzzed_models(version, tmp_path):
    """Each is read as it is now, or refused. A reader of our own says what it is now."""
    sound = file_model(V=29, C=12, max_seq_len=9)
    path = written(tmp_path / "model.bin", llmc_model(sound, version))

    def check(model):
        data = (tmp_path / "model.bin").read_bytes()
        _, version, *sizes, padded = struct.unpack("<8i", data[:32])
        assert list(asdict(model.config).values()) == sizes
        kind = TORCH_TYPES["BF16" if version == 5 else "F32"]
        body = torch.frombuffer(bytearray(data[1024:]), dtype=kind).float().numpy()
        n = model.params["wte"].size
        padding = (padded - sizes[1]) * sizes[4] if version > 1 else 0
        truth = np.concatenate([body[:n], body[n + padding :]])
        assert model.flat[0].tobytes() == truth.tobytes() and np.isfinite(truth).all()

    fuzz(tmp_path, ["model.bin"], lambda: loaded(path, 1, 1), check)
