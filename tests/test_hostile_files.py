"""Files that are damaged, malformed or forged: each is read as it says, or refused in one line."""

import json
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
import torch
from common import (
    REAL_CONFIG,
    SHARDS,
    TORCH_TYPES,
    as_hugging_face,
    file_model,
    halves,
    llmc_model,
    loaded,
    odd_at_the_end,
    pack_safetensors,
    peak_of,
    read_plainly,
    refused_file,
    run_state,
    safetensors_parts,
    sharded_folder,
    weights_folder,
    written,
)
from fuzzing import HUGE, fuzz

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2
from test_gpt2 import assert_same_bits

# --------------------------------------------------------------------------------------------------
# Malformed files: what is wrong with it, and what the refusal must say

QKV, LAST = (
    "h.1.attn.c_attn.weight",
    "h.1.mlp.c_proj.bias",
)  # F32 [24, 72], and the last tensor in the file


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
    """A sound file of tensors that are not the right ones. change({name: array}) says what
    differs."""

    def build(h, b):
        tensors = as_hugging_face(file_model().params)
        tensors |= change(tensors)
        return pack_safetensors(
            *safetensors_parts({n: t for n, t in tensors.items() if t is not None})
        )

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
    "header_endless": (lambda h, b: b"\xff" * 8 + pack_safetensors(h, b)[8:], 2**64 - 1),
    "header_over_a_megabyte": (
        lambda h, b: pack_safetensors(json.dumps(h).encode() + b" " * 2**20, b),
        "a header of 10",
    ),
    "header_empty": (with_header(b""), "expected JSON"),
    "header_no_json": (
        lambda h, b: pack_safetensors(json.dumps(h).encode()[:-1], b),
        "expected JSON",
    ),
    "header_no_utf8": (with_header(b'{"\xff": 1}'), "expected JSON", "0xff"),
    "header_a_list": (with_header(b"[]"), "expected a JSON object, found list"),
    "header_a_string": (with_header(b'"wte"'), "expected a JSON object, found str"),
    "header_a_number": (with_header(b"1"), "expected a JSON object, found int"),
    "header_nested": (with_header(b'{"a":' * 100_000), "expected JSON"),
    "header_of_brackets": (with_header(b"[" * 1_000_000), "expected JSON"),
    "header_of_digits": (with_header(b'{"a": ' + b"9" * 5000 + b"}"), "expected JSON", "digits"),
    "metadata_no_object": (
        lambda h, b: pack_safetensors({"__metadata__": [1]} | h, b),
        "__metadata__",
    ),
    "tensor_no_object": (lambda h, b: pack_safetensors(h | {QKV: 5}, b), QKV, "found 5"),
    "tensor_of_two_lines": (
        lambda h, b: pack_safetensors(h | {QKV: "two\nlines"}, b),
        QKV,
        r"two\nlines",
    ),
    "name_of_two_lines": (
        with_tensors(lambda t: {"two\nlines": t["ln_f.bias"]}),
        r"two\nlines",
        "no part",
    ),
    "offsets_overlap": (with_place(lambda o: [o[0] - 4, o[1] - 4]), QKV, "lies at"),
    "offsets_leave_a_hole": (with_place(lambda o: [o[0] + 4, o[1] + 4]), QKV, "lies at"),
    "offsets_out_of_range": (
        with_place(lambda o: [o[0] + 4000, o[1] + 4000], LAST),
        LAST,
        "lies at",
    ),
    "offsets_far_away": (with_place(lambda o: [1 << 30, 2 << 30]), "expected"),
    "offsets_shared": (
        with_entry("wpe.weight", data_offsets=[0, 5856]),
        "wpe.weight",
        "lies at [0, 5856]",
    ),
    "offsets_reversed": (with_place(lambda o: o[::-1]), QKV, "lies at"),
    "offsets_begin_too_early": (with_place(lambda o: [o[0] - 4, o[1]]), QKV, "lies at"),
    "offsets_negative": (with_entry(data_offsets=[-6912, 0]), QKV, "[-6912, 0]"),
    "offsets_fractions": (with_entry(data_offsets=[0.0, 6912.0]), QKV, "[0.0, 6912.0]"),
    "offsets_text": (with_entry(data_offsets=["0", "6912"]), QKV, "'6912'"),
    "offsets_false_for_zero": (
        with_entry("wte.weight", data_offsets=[False, 5856]),
        "[False, 5856]",
    ),
    "offsets_null": (with_entry(data_offsets=None), QKV, "None"),
    "offsets_missing": (with_entry(data_offsets=...), QKV, "data_offsets"),
    "offsets_huge": (with_entry(data_offsets=[0, 10**30]), QKV, 10**30),
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
    "weight_of_integers": (
        with_tensors(lambda t: {QKV: ("I32", t[QKV])}),
        QKV,
        "is I32",
        "F32, F16, BF16",
    ),
    "weight_in_float64": (
        with_tensors(lambda t: {QKV: ("F64", t[QKV])}),
        QKV,
        "is F64",
        "F32, F16, BF16",
    ),
    "weight_missing": (with_tensors(lambda t: {QKV: None}), QKV, "(24, 72)", "found none"),
    "weight_transposed": (
        with_tensors(lambda t: {QKV: t[QKV].T}),
        QKV,
        "shape (24, 72)",
        "(72, 24)",
    ),
    "weight_flat": (
        with_tensors(lambda t: {QKV: t[QKV].ravel()}),
        QKV,
        "shape (24, 72)",
        "(1728,)",
    ),
    "weight_there_twice": (with_tensors(lambda t: {"transformer." + QKV: t[QKV]}), QKV, "twice"),
    "bias_missing": (
        with_tensors(lambda t: {"ln_f.bias": None}),
        "ln_f.bias",
        "(24,)",
        "found none",
    ),
    "wte_missing": (
        with_tensors(lambda t: {"wte.weight": None}),
        "wte.weight",
        "shapes () and (11, 24)",
    ),
    "wte_of_three_axes": (
        with_tensors(lambda t: {"wte.weight": t["wte.weight"][None]}),
        "(1, 61, 24)",
    ),
    "wpe_without_rows": (
        with_tensors(lambda t: {"wpe.weight": t["wpe.weight"][:0]}),
        "n_positions = 11",
    ),
    "one_tensor_more": (
        with_tensors(lambda t: {"h.1.surprise": t["ln_f.bias"]}),
        "h.1.surprise",
        "no part",
    ),
    "one_layer_more": (
        with_tensors(lambda t: {"h.2.ln_1.weight": t["ln_f.bias"]}),
        "n_layer = 2",
        "3",
    ),
    "no_layers": (
        with_tensors(lambda t: {n: None for n in t if "h." in n}),
        "n_layer = 2, expected 0",
    ),
    "nan": (with_value(math.nan), "qkvw of layer 1", "not finite"),
    "inf": (with_value(math.inf), "qkvw of layer 1", "not finite"),
    "minus_inf_in_float16": (with_value(-math.inf, "F16"), "qkvw of layer 1", "not finite"),
    "nan_in_bfloat16": (with_value(math.nan, "BF16"), "qkvw of layer 1", "not finite"),
    "nan_in_a_bias": (with_value(math.nan, name="ln_f.bias"), "lnfb", "not finite"),
    "nan_in_wte": (with_value(math.nan, name="wte.weight"), "wte", "not finite"),
}


LLMC_FIELDS = [
    "magic",
    "version",
    "max_seq_len",
    "vocab_size",
    "num_layers",
    "num_heads",
    "channels",
    "padded_vocab_size",
]


def with_number(field, value):
    """One number of an llm.c header changed."""
    at = 4 * LLMC_FIELDS.index(field)
    return lambda data: data[:at] + struct.pack("<i", value) + data[at + 4 :]


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
    **{
        f"version_{v}": (with_number("version", v), f"version {v},", "1 or 3")
        for v in (0, 2, 4, -3, HUGE)
    },
    **{
        f"{field}_{v}": (with_number(field, v), f"{field} is {v}", "positive")
        for field in LLMC_FIELDS[2:7]
        for v in (0, -1, -(2**31))
    },
    **{
        f"{field}_{v}": (with_number(field, v), "bytes, its header describes")
        for field in ("max_seq_len", "num_layers")
        for v in (129, 65535, HUGE)
    },
    **{
        f"vocab_size_{v}": (with_number("vocab_size", v), f"padded vocabulary of 128 for {v}")
        for v in (129, 65535, HUGE)
    },
    "heads_do_not_divide": (with_number("num_heads", 5), "24 channels", "5 heads"),
    "heads_huge": (with_number("num_heads", HUGE), "24 channels", f"{HUGE} heads"),
    "channels_huge": (with_number("channels", 3 << 29), "bytes, its header describes"),
    "padding_zero": (with_number("padded_vocab_size", 0), "padded vocabulary of 0 for 61"),
    "padding_negative": (
        with_number("padded_vocab_size", -128),
        "padded vocabulary of -128 for 61",
    ),
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
    """Refused by from_pretrained and, in the same words, by the command line: one line, exit code
    1."""
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


@pytest.mark.parametrize(
    "text, part",
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff{}", "expected JSON"),
        (b'{"n_head": ' + b"3" * 5000 + b"}", "expected JSON"),
        (b"[]", "JSON object, found list"),
        (b'{"n_head": 5}', "24 channels can't be shared by 5 heads"),
        (b'{"n_head": 0}', "num_heads is 0"),
        (b'{"n_head": -3}', "num_heads is -3"),
        (b'{"n_head": 30000000000000000000}', "3" + "0" * 19 + " heads"),
        (b'{"n_head": 3.0}', "how many heads"),
        (b'{"n_head": true}', "how many heads"),
        (b'{"n_head": "3"}', "how many heads"),
        (b'{"n_head": null}', "how many heads"),
        (b"{}", "how many heads"),
    ],
    ids=lambda x: ascii(x[:20]) if isinstance(x, bytes) else "",
)
def test_a_malformed_config_is_refused(text, part, tmp_path, capsys):
    source = weights_folder(tmp_path, as_hugging_face(file_model().params))
    written(tmp_path / "config.json", text)
    refused_everywhere(source, capsys, part)


@pytest.mark.parametrize(
    "shard",
    [
        "../there.safetensors",
        "/there.safetensors",
        "a/there.safetensors",
        "..",
        "",
        ".",
        "a\0b.safetensors",
        "\ud800.safetensors",
        "there.bin",
        "two\nlines.safetensors",
        5,
        None,
        ["there.safetensors"],
    ],
    ids=ascii,
)
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


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b'{"weight_map": {}}',
    ],
    ids=ascii,
)
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
    refused_everywhere(
        str(tmp_path / "nowhere"),
        capsys,
        "nowhere': no such file",
        "gpt2-medium, gpt2-large, gpt2-xl, d6",
    )


@pytest.mark.parametrize(
    "name, data",
    [
        ("bad.safetensors", pack_safetensors(b"[" * 1_000_000)),
        ("bad.safetensors", pack_safetensors({"two\nlines \ud800 \u2028": {"dtype": "F32"}})),
        ("bad.bin", struct.pack("<256i", 20240326, 3, 1024, 50257, 12, 12, 768, 50304, *[0] * 248)),
    ],
    ids=["brackets", "odd_name", "header_alone"],
)
def test_the_program_itself_refuses_in_one_line(name, data, tmp_path):
    flags = ["--model", written(tmp_path / name, data), "--inference_only", "1", "--prompt", "x"]
    ran = subprocess.run([sys.executable, gpt2.__file__, *flags], capture_output=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, b"") and re.fullmatch(
        rb"error: [ -~]*\n", ran.stderr
    )
    assert os.listdir(tmp_path) == [name]


def test_the_program_itself_lets_a_sound_file_speak(tmp_path):
    """The same command line, so that it isn't the command line that was refused. 256 ids are
    bytes."""
    source = weights_folder(tmp_path, as_hugging_face(file_model(V=256).params))
    flags = ["--model", source, "--inference_only", "1", "--prompt", "x", "--max_new_tokens", "3"]
    ran = subprocess.run([sys.executable, gpt2.__file__, *flags], capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, b"") and ran.stdout.splitlines()[-1].startswith(b"x")


# --------------------------------------------------------------------------------------------------
# Malformed token files


def token_file(tokens, *header):
    header = header or (20240520, 1, len(tokens))
    return (
        struct.pack("<256i", *header, *[0] * (256 - len(header)))
        + np.array(tokens, "<u2").tobytes()
    )


MALFORMED_TOKENS = {
    "empty": (lambda d: b"", "no token file", "20240520"),
    "short": (lambda d: d[:1023], "no token file"),
    "magic": (
        lambda d: token_file(range(50), 20240326, 1, 50),
        "magic number [20240326]",
        "20240520",
    ),
    "version": (lambda d: token_file(range(50), 20240520, 2, 50), "version 2", "expected 1"),
    "count_too_small": (
        lambda d: token_file(range(50), 20240520, 1, 49),
        "1124 bytes",
        "49 tokens make",
    ),
    "count_negative": (
        lambda d: token_file(range(50), 20240520, 1, -50),
        "1124 bytes",
        "-50 tokens",
    ),
    "count_huge": (
        lambda d: token_file(range(50), 20240520, 1, HUGE),
        "1124 bytes",
        f"{HUGE} tokens",
    ),
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
    inputs, targets = gpt2.DataLoader(
        written(tmp_path / "tokens.bin", sound), 2, 8, 61
    ).next_batch()
    assert np.array_equal(inputs.ravel(), range(16)) and np.array_equal(
        targets.ravel(), range(1, 17)
    )
    path = written(tmp_path / "tokens.bin", change(sound))
    with pytest.raises(gpt2.InputError) as caught:
        gpt2.DataLoader(path, 2, 8, 61)
    line = str(caught.value)
    assert line.isprintable() and [part for part in [path, *parts] if part not in line] == [], line


# --------------------------------------------------------------------------------------------------
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


# name: (file, what makes its bytes). They promise more than there is, or say little at length
CRAFTED = {
    **{
        name: ("model.safetensors", lambda text=text: pack_safetensors(text(1_000_000)))
        for name, text in LONG_JSON.items()
    },
    **{
        f"{file}_{name}": (file + ".json", lambda text=text: text(15_000_000))
        for file in ("config", "model.safetensors.index")
        for name, text in LONG_JSON.items()
    },
    "length": ("model.safetensors", lambda: b"\xff" * 7 + b"\x7f" + b"{}"),
    "shape": (
        "model.safetensors",
        lambda: pack_safetensors({"wte.weight": A_LOT, "wpe.weight": A_LOT}),
    ),
    "no_columns": ("model.safetensors", lambda: pack_safetensors(NO_COLUMNS)),
    "empty_layers": (
        "model.safetensors",
        lambda: pack_safetensors(
            NO_COLUMNS | {f"h.{l}.ln_1.weight": NOTHING for l in range(10_000)}
        ),
    ),
    "many_layers": ("model.bin", llmc_header(1024, 50257, 65535, 12, 768, 50304)),
    "most_layers": ("model.bin", llmc_header(1, 1, HUGE, 1, 1, 1)),
    "all_huge": ("model.bin", llmc_header(HUGE, HUGE, HUGE, HUGE, HUGE, HUGE)),
    "much_padding": ("model.bin", llmc_header(1024, 1, 12, 1, 1, HUGE)),
    "tokens": ("tokens.bin", lambda: struct.pack("<256i", 20240520, 1, HUGE, *[0] * 253)),
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_a_crafted_header_costs_no_more_than_its_file(crafted, tmp_path):
    """JSON becomes objects of up to 25 times its length, hence the limit of 1 MB for it; all else
    is bounded by the file. And time: a loop that counts to what a header says would take minutes,
    or for ever."""
    name, make = CRAFTED[crafted]
    data, folder = make(), weights_folder(tmp_path, as_hugging_face(file_model().params))
    if "index" in name:
        os.remove(tmp_path / "model.safetensors")
    path = written(tmp_path / name, data)

    def read():
        with pytest.raises(gpt2.InputError) as caught:
            if name == "tokens.bin":
                prepro.open_tokens(path)
            gpt2.GPT2.from_pretrained(path if name == "model.bin" else folder)
        return str(caught.value)

    began = time.process_time()
    assert read().isprintable() and time.process_time() - began < 5
    _, peak = peak_of(read)
    assert peak < 2 * len(data) + 32 * min(len(data), 1 << 20) + (4 << 20)


# --------------------------------------------------------------------------------------------------
# Fuzzing: what chance does to a file
#
# Each damaged file is read as it is now, or refused. A reader of our own says what it is now.


def fuzz_model():
    model = file_model(V=29, C=12, max_seq_len=9)
    model.flat[1:] = 0
    return model


def test_fuzzed_token_files(tmp_path):
    path = written(
        tmp_path / "tokens.bin", token_file(np.random.default_rng(1).integers(0, 61, 41))
    )

    def read():
        loader = gpt2.DataLoader(path, 2, 4, 61)
        return [loader.next_batch() for _ in range(12)]

    def check(batches):
        tokens = np.frombuffer((tmp_path / "tokens.bin").read_bytes()[1024:], "<u2")
        for i, (inputs, targets) in enumerate(batches):
            start = 8 * (i % ((len(tokens) - 1) // 8))
            assert inputs.shape == targets.shape == (2, 4) and max(inputs.max(), targets.max()) < 61
            assert np.array_equal(inputs.ravel(), tokens[start : start + 8])
            assert np.array_equal(targets.ravel(), tokens[start + 1 : start + 9])

    fuzz(tmp_path, ["tokens.bin"], read, check)


def test_fuzzed_safetensors(tmp_path):
    tensors = as_hugging_face(fuzz_model().params, "transformer.")
    tensors = {
        name: (["F32", "F16", "BF16"][i % 3], t) for i, (name, t) in enumerate(tensors.items())
    }
    told = {"vocab_size": 29, "n_positions": 9, "n_embd": 12, "n_layer": 2, "n_inner": None}
    source = weights_folder(tmp_path, tensors, **told)

    def check(model):
        assert (
            model.config.num_heads == json.loads((tmp_path / "config.json").read_bytes())["n_head"]
        )
        found = read_plainly((tmp_path / "model.safetensors").read_bytes())
        assert_same_bits(
            as_hugging_face(model.params),
            {name.removeprefix("transformer."): t for name, t in found.items()},
        )
        assert np.isfinite(model.flat[0]).all()

    fuzz(tmp_path, ["config.json", *["model.safetensors"] * 3], lambda: loaded(source, 1, 1), check)


@pytest.mark.parametrize("version", [1, 3, 5])
def test_fuzzed_llm_c_models(version, tmp_path):
    path = written(tmp_path / "model.bin", llmc_model(fuzz_model(), version))

    def check(model):
        data = (tmp_path / "model.bin").read_bytes()
        _, version, *sizes, padded = struct.unpack("<8i", data[:32])
        assert list(asdict(model.config).values()) == sizes
        body = torch.frombuffer(
            bytearray(data[1024:]), dtype=TORCH_TYPES["BF16" if version == 5 else "F32"]
        )
        n, padding = model.params["wte"].size, (padded - sizes[1]) * sizes[4] if version > 1 else 0
        truth = torch.cat([body[:n], body[n + padding :]]).float().numpy()
        assert model.flat[0].tobytes() == truth.tobytes() and np.isfinite(truth).all()

    fuzz(tmp_path, ["model.bin"], lambda: loaded(path, 1, 1), check)


def test_fuzzed_checkpoints(tmp_path, capsys):
    """Of a checkpoint every bit counts: shape, settings, log, data position, weights and
    moments."""
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

    fuzz(
        folder,
        ["config.json", "model.safetensors", "optimizer.safetensors", "main.log"],
        lambda: gpt2.load_checkpoint(str(folder), {}),
        check,
        harmless=0,
    )


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
@pytest.mark.parametrize(
    "change",
    [
        lambda h, moment: h.update(other=h.pop(moment)),
        lambda h, moment: h[moment].update(dtype="I32"),
        lambda h, moment: h[moment]["shape"].append(1),
    ],
    ids=["missing", "integers", "another_shape"],
)
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
