"""Files that are damaged, malformed or forged: each is read as it says, or refused in one line."""

import json
import math
import os
import re
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from common import (
    NO_NETWORK,
    REAL_CONFIG,
    SHARDS,
    as_hugging_face,
    checkpoints,
    file_model,
    halves,
    header_of,
    loaded,
    odd_at_the_end,
    pack_safetensors,
    peak_of,
    posix_only,
    read_plainly,
    refused_file,
    run_state,
    safetensors_parts,
    sharded_folder,
    weights_folder,
    with_right_checksum,
    written,
)
from fuzzing import HUGE, fuzz

import train_gpt2 as gpt2
from test_gpt2 import assert_same_bits

# --------------------------------------------------------------------------------------------------
# Malformed weights: what is wrong with the file, and what the refusal must say

QKV = "h.1.attn.c_attn.weight"  # F32 [24, 72]
LAST = "h.1.mlp.c_proj.bias"  # the last tensor in the file
EXPECTED_FIELDS = "expected dtype, shape and data_offsets"
DESCRIBES = "bytes, its header describes"
FLOATS = "['F32', 'F16', 'BF16']"


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
    """A sound file of other tensors. change({name: array}) says which differ, or are missing."""

    def build(h, b):
        tensors = as_hugging_face(file_model().params)
        tensors |= change(tensors)
        there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return pack_safetensors(*safetensors_parts(there))

    return build


def with_value(value, dtype="F32", name=QKV):
    """A sound file with an odd number in the last place of a tensor."""
    return with_tensors(lambda tensors: {name: (dtype, odd_at_the_end(tensors[name], value))})


def of_type(dtype):
    return with_tensors(lambda t: {QKV: (dtype, t[QKV])})


def long_header(h, b):
    return pack_safetensors(json.dumps(h).encode() + b" " * 2**20, b)


MALFORMED_SAFETENSORS = {
    "empty": (lambda h, b: b"", "0 bytes"),
    "seven_bytes": (lambda h, b: b"\x02\0\0\0\0\0\0", "7 bytes"),
    "a_zip": (lambda h, b: b"PK\x03\x04" + bytes(200), "not a .safetensors file"),
    "header_beyond_the_file": (lambda h, b: struct.pack("<Q", 9000) + b"{}", "10 bytes", "9000"),
    "header_one_too_long": (lambda h, b: struct.pack("<Q", 3) + b"{}", "10 bytes", "header of 3"),
    "header_endless": (lambda h, b: b"\xff" * 8 + pack_safetensors(h, b)[8:], 2**64 - 1),
    "header_over_a_megabyte": (long_header, "a header of 10"),
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
        "not part",
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
    "offsets_missing": (with_entry(data_offsets=...), QKV, EXPECTED_FIELDS),
    "offsets_huge": (with_entry(data_offsets=[0, 10**30]), QKV, 10**30),
    "offsets_one": (with_entry(data_offsets=[0]), QKV, "lies at [0]"),
    "offsets_three": (with_entry(data_offsets=[0, 6912, 6912]), QKV, "lies at [0, 6912, 6912]"),
    "shape_too_large": (with_entry(shape=[25, 72]), QKV, "[25, 72]", "lies at"),
    "shape_too_small": (with_entry(shape=[24, 71]), QKV, "[24, 71]", "lies at"),
    "shape_negative": (with_entry(shape=[-24, -72]), QKV, "[-24, -72]"),
    "shape_fractions": (with_entry(shape=[24.0, 72.0]), QKV, "[24.0, 72.0]"),
    "shape_huge": (with_entry(shape=[1 << 40, 1 << 40]), QKV, 1 << 40),
    "shape_of_many_axes": (with_entry(shape=[1] * 2000), QKV, EXPECTED_FIELDS),
    "shape_no_list": (with_entry(shape={"0": 24}), QKV, "{'0': 24}"),
    "shape_missing": (with_entry(shape=...), QKV, EXPECTED_FIELDS),
    "dtype_of_another_size": (with_entry(dtype="F16"), QKV, "F16 [24, 72]", "lies at"),
    "dtype_unknown": (with_entry(dtype="F8_E4M3"), QKV, EXPECTED_FIELDS, "'F8_E4M3'"),
    "dtype_no_text": (with_entry(dtype=["F32"]), QKV, EXPECTED_FIELDS, "['F32']"),
    "dtype_missing": (with_entry(dtype=...), QKV, EXPECTED_FIELDS),
    "truncated": (lambda h, b: pack_safetensors(h, b[:-1]), DESCRIBES),
    "truncated_to_the_header": (lambda h, b: pack_safetensors(h), DESCRIBES),
    "trailing_byte": (lambda h, b: pack_safetensors(h, b + b"\0"), DESCRIBES),
    "weight_of_integers": (of_type("I32"), QKV, "'I32'", FLOATS),
    "weight_in_float64": (of_type("F64"), QKV, "'F64'", FLOATS),
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
        "expected GPT-2's matrices wte.weight",
    ),
    "wte_of_three_axes": (
        with_tensors(lambda t: {"wte.weight": t["wte.weight"][None]}),
        "expected GPT-2's matrices wte.weight",
    ),
    "wte_an_empty_classifier": (
        with_tensors(lambda t: {"wte.weight": None, "lm_head.weight": t["wte.weight"][:0]}),
        "vocab_size = 61",
    ),
    "wpe_without_rows": (
        with_tensors(lambda t: {"wpe.weight": t["wpe.weight"][:0]}),
        "n_positions = 11",
    ),
    "one_tensor_more": (
        with_tensors(lambda t: {"h.1.surprise": t["ln_f.bias"]}),
        "h.1.surprise",
        "not part",
    ),
    "moments_without_a_state": (with_tensors(lambda t: {"m": t["ln_f.bias"]}), "'m'", "not part"),
    "one_layer_more": (
        with_tensors(lambda t: {"h.2.ln_1.weight": t["ln_f.bias"]}),
        "n_layer = 2",
        "3",
    ),
    "no_layers": (
        with_tensors(lambda t: {name: None for name in t if "h." in name}),
        "n_layer = 2, expected 0",
    ),
    "nan": (with_value(math.nan), "qkvw of layer 1", "not finite"),
    "inf": (with_value(math.inf), "qkvw of layer 1", "not finite"),
    "minus_inf_in_float16": (with_value(-math.inf, "F16"), "qkvw of layer 1", "not finite"),
    "nan_in_bfloat16": (with_value(math.nan, "BF16"), "qkvw of layer 1", "not finite"),
    "nan_in_a_bias": (with_value(math.nan, name="ln_f.bias"), "lnfb", "not finite"),
    "nan_in_wte": (with_value(math.nan, name="wte.weight"), "wte", "not finite"),
}


def refused_everywhere(source, capsys, *parts, error=gpt2.InputError):
    """Refused by from_pretrained and, in the same words, by the command line: in one line."""
    line = refused_file(source, *parts, error=error)
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
        (b'{"n_head": [3]}', "how many heads"),
        (b'{"n_head": null}', "how many heads"),
        (b"{}", "how many heads"),
    ],
    ids=lambda x: ascii(x[:20]) if isinstance(x, bytes) else "",
)
def test_a_malformed_config_is_refused(text, part, tmp_path, capsys):
    source = weights_folder(tmp_path, as_hugging_face(file_model().params))
    written(tmp_path / "config.json", text)
    refused_everywhere(source, capsys, part)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_missing_is_named(missing, tmp_path, capsys):
    source = weights_folder(tmp_path, as_hugging_face(file_model().params))
    os.remove(tmp_path / missing)
    error = FileNotFoundError if missing == "config.json" else gpt2.InputError
    refused_everywhere(source, capsys, missing, error=error)
    nowhere = str(tmp_path / "nowhere")
    names = "none of gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    refused_everywhere(nowhere, capsys, "nowhere': no such model: no file", names)


# --------------------------------------------------------------------------------------------------
# An index of several files


def index_to(folder, tensors, part):
    """A folder whose index says of every tensor that it is in that file. Returns the folder."""
    source = weights_folder(folder, {})
    os.remove(folder / "model.safetensors")
    text = json.dumps({"weight_map": dict.fromkeys(tensors, part)})
    (folder / "model.safetensors.index.json").write_text(text)
    return source


OUTSIDE = ["../there.safetensors", "a/there.safetensors", "{}/there.safetensors"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_leads_to_no_other_folder(name, tmp_path):
    """Wherever it points, a whole model is there. Only what lies beside the index is read."""
    model = file_model()
    tensors = as_hugging_face(model.params)
    folder = tmp_path / "folder"
    source = index_to(folder, tensors, name.format(tmp_path))
    (folder / "a").mkdir()
    data = pack_safetensors(*safetensors_parts(tensors))
    for place in (tmp_path, folder / "a"):
        written(place / "there.safetensors", data)
    refused_file(source, "folder/there.safetensors", error=FileNotFoundError)
    written(folder / "there.safetensors", data)
    assert_same_bits(loaded(source).params, model.params)


NO_NAMES = ["..", "", ".", "a/..", "a", "a\0b.safetensors", "\ud800.safetensors"]


@pytest.mark.parametrize("name", [*NO_NAMES, 5, None, ["there.safetensors"]], ids=ascii)
def test_a_part_must_be_a_file(name, tmp_path, capsys):
    source = index_to(tmp_path, as_hugging_face(file_model().params), name)
    (tmp_path / "a").mkdir()
    refused_everywhere(source, capsys, tmp_path, "expected a")  # file, file's name, weight_map


def test_a_part_of_two_lines(tmp_path, capsys):
    source = index_to(tmp_path, as_hugging_face(file_model().params), "two\nlines.safetensors")
    refused_everywhere(source, capsys, r"two\nlines", error=FileNotFoundError)


NO_INDEX = [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}']


@pytest.mark.parametrize("text", [*NO_INDEX, b'{"weight_map": {}}'], ids=ascii)
def test_a_malformed_index_is_refused(text, tmp_path, capsys):
    source = sharded_folder(tmp_path, *halves(as_hugging_face(file_model().params)))
    written(tmp_path / "model.safetensors.index.json", text)
    refused_everywhere(source, capsys, tmp_path, "expected")


def test_shards_must_fit_together(tmp_path, capsys):
    first, second = halves(as_hugging_face(file_model().params))
    name, *rest = second
    twice = sharded_folder(tmp_path / "twice", first | {name: second[name]}, second)
    refused_everywhere(twice, capsys, name, "twice")
    lost = sharded_folder(tmp_path / "lost", first, {name: second[name] for name in rest})
    refused_everywhere(lost, capsys, name, "expected")
    gone = sharded_folder(tmp_path / "gone", first, second)
    os.remove(tmp_path / "gone" / SHARDS[1])
    refused_everywhere(gone, capsys, SHARDS[1], error=FileNotFoundError)


# --------------------------------------------------------------------------------------------------
# The program itself


def run_program(folder, *flags):
    """(exit code, stdout, stderr), as bytes."""
    ran = subprocess.run(
        [sys.executable, gpt2.__file__, *map(str, flags)],
        cwd=folder, env=os.environ | NO_NETWORK, capture_output=True, timeout=120,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize(
    "name, data",
    [
        ("bad.safetensors", pack_safetensors(b"[" * 1_000_000)),
        ("bad.safetensors", pack_safetensors({"two\nlines \ud800 \u2028": {"dtype": "F32"}})),
    ],
    ids=["brackets", "odd_name"],
)
def test_the_program_itself_refuses_in_one_line(name, data, tmp_path):
    path = written(tmp_path / name, data)
    code, stdout, stderr = run_program(tmp_path, "--model", path, "--inference_only", 1)
    assert (code, stdout) == (1, b"") and re.fullmatch(rb"error: [ -~]*\n", stderr)
    assert os.listdir(tmp_path) == [name]


def test_the_program_itself_lets_a_sound_file_speak(tmp_path):
    """The same command line, so that it isn't the command line that was refused."""
    source = weights_folder(tmp_path, as_hugging_face(file_model(V=256).params))
    flags = ["--model", source, "--inference_only", 1, "--prompt", "x", "--max_new_tokens", 3]
    code, stdout, stderr = run_program(tmp_path, *flags)
    assert (code, stderr) == (0, b"") and b"\nx" in stdout


@posix_only
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "model.safetensors.index.json", "tokens.bin"]
)
def test_a_pipe_is_not_waited_for(name, tmp_path):
    """Nor a folder of that name."""
    source = weights_folder(tmp_path, as_hugging_face(file_model(V=256).params))
    if "index" in name:
        os.remove(tmp_path / "model.safetensors")
    flags = ["--model", source, "--input_bin", "tokens.bin", "--val_loss_every", 0]
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    for _ in range(2):
        code, _, stderr = run_program(tmp_path, *flags, "--sequence_length", 8)
        assert code == 1 and stderr.count(b"\n") == 1
        assert b"expected a file, found a folder, a pipe or a device" in stderr
        if (tmp_path / name).is_dir():
            (tmp_path / name).rmdir()
            os.mkfifo(tmp_path / name)


# --------------------------------------------------------------------------------------------------
# Malformed token files


def token_file(tokens, *header):
    header = header or (20240520, 1, len(tokens))
    numbers = struct.pack("<256i", *header, *[0] * (256 - len(header)))
    return numbers + np.array(tokens, "<u2").tobytes()


def with_header_of(*header):
    return lambda d: token_file(range(50), *header)


def of_vocabulary(size):
    return with_header_of(20240520, 1, 50, size)


MALFORMED_TOKENS = {
    "empty": (lambda d: b"", "not a token file", "20240520"),
    "short": (lambda d: d[:1023], "not a token file"),
    "magic": (with_header_of(20240326, 1, 50), "begins with [20240326, 1]", "[20240520, 1]"),
    "version": (with_header_of(20240520, 2, 50), "begins with [20240520, 2]", "[20240520, 1]"),
    "count_too_small": (with_header_of(20240520, 1, 49), "1124 bytes", "49 tokens make"),
    "count_negative": (with_header_of(20240520, 1, -50), "1124 bytes", "-50 tokens"),
    "count_huge": (with_header_of(20240520, 1, HUGE), "1124 bytes", f"{HUGE} tokens"),
    "truncated": (lambda d: d[:-1], "1123 bytes", "50 tokens make 1124"),
    "trailing": (lambda d: d + b"\0", "1125 bytes", "50 tokens make 1124"),
    "none": (lambda d: token_file([]), "0 tokens"),
    "no_batch": (lambda d: token_file(range(16)), "16 tokens", "B*T + 1 = 17"),
    "beyond_the_vocabulary": (lambda d: token_file([*range(49), 61]), "up to 61", "of 61"),
    "far_beyond": (lambda d: token_file([65535, *range(49)]), "up to 65535", "of 61"),
    "of_bytes": (of_vocabulary(256), "its tokens are bytes", "those of the model are of 61"),
    "of_gpt2": (of_vocabulary(50257), "its tokens are GPT-2's", "of 61"),
    "of_one_more": (of_vocabulary(62), "its tokens are of 62", "of 61"),
    "of_one_less": (of_vocabulary(60), "its tokens are of 60", "of 61"),
    "of_less_than_none": (of_vocabulary(-1), "its tokens are of -1", "of 61"),
    "of_too_many": (of_vocabulary(HUGE), f"its tokens are of {HUGE}", "of 61"),
    "of_61_and_beyond": (
        lambda d: token_file([*range(49), 61], 20240520, 1, 50, 61),
        "its tokens are of 61, up to 61",
    ),
}


def open_tokens(path, V=61, B=2, T=8):
    """A loader of a token file, checked as a run checks it."""
    args = SimpleNamespace(batch_size=B, sequence_length=T)
    [shard] = gpt2.open_shards(path)
    assert gpt2.check_shard(shard, args, SimpleNamespace(vocab_size=V))[0] == len(shard)
    return gpt2.DataLoader([shard], B, T)


@pytest.mark.parametrize("damage", MALFORMED_TOKENS)
def test_a_malformed_token_file_is_refused(damage, tmp_path):
    change, *parts = MALFORMED_TOKENS[damage]
    sound = token_file(range(50))
    inputs, targets = open_tokens(written(tmp_path / "tokens.bin", sound)).next_batch()
    assert np.array_equal(inputs.ravel(), range(16))
    assert np.array_equal(targets.ravel(), range(1, 17))

    path = written(tmp_path / "tokens.bin", change(sound))
    with pytest.raises(gpt2.InputError) as caught:
        open_tokens(path)
    line = str(caught.value)
    assert line.isprintable() and [part for part in [path, *parts] if part not in line] == [], line


@pytest.mark.parametrize(
    "size, V, fits",
    [
        (0, 61, True), (61, 61, True),
        (0, 256, True), (256, 256, True), (50257, 256, False), (61, 256, False),
        (0, 50257, True), (50257, 50257, True), (256, 50257, False),
        (50257, 50304, True), (256, 50304, False), (50304, 50257, False), (50257, 50305, False),
    ],
)  # fmt: skip
def test_the_vocabulary_that_a_token_file_names(size, V, fits, tmp_path):
    """GPT-2's tokens fit every padding of GPT-2's vocabulary. 0 is what llm.c writes: unknown."""
    path = written(tmp_path / "tokens.bin", of_vocabulary(size)(b""))
    if fits:
        assert open_tokens(path, V).next_batch()[0].max() == 15
    else:
        with pytest.raises(gpt2.InputError, match="write its text anew"):
            open_tokens(path, V)


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
EMPTY_LAYERS = {f"h.{l}.ln_1.weight": NOTHING for l in range(10_000)}

# name: (file, what makes its bytes). They promise more than there is, or say little at length
CRAFTED = {
    "length": ("model.safetensors", lambda: b"\xff" * 7 + b"\x7f" + b"{}"),
    "shape": (
        "model.safetensors",
        lambda: pack_safetensors({"wte.weight": A_LOT, "wpe.weight": A_LOT}),
    ),
    "no_columns": ("model.safetensors", lambda: pack_safetensors(NO_COLUMNS)),
    "empty_layers": ("model.safetensors", lambda: pack_safetensors(NO_COLUMNS | EMPTY_LAYERS)),
    "tokens": ("tokens.bin", lambda: struct.pack("<256i", 20240520, 1, HUGE, *[0] * 253)),
}
for name, text in LONG_JSON.items():
    CRAFTED[name] = "model.safetensors", lambda text=text: pack_safetensors(text(1_000_000))
    for kind in ("config", "model.safetensors.index"):
        CRAFTED[f"{kind}_{name}"] = f"{kind}.json", lambda text=text: text(15_000_000)


@pytest.mark.parametrize("crafted", CRAFTED)
def test_a_crafted_header_costs_no_more_than_its_file(crafted, tmp_path):
    """JSON becomes objects of up to 25 times its length, hence the limit of 1 MB for it.

    All else is bounded by the file. And time: a loop that counts to what a header says would take
    minutes, or for ever.
    """
    name, make = CRAFTED[crafted]
    data = make()
    folder = weights_folder(tmp_path, as_hugging_face(file_model().params))
    if "index" in name:
        os.remove(tmp_path / "model.safetensors")
    path = written(tmp_path / name, data)

    def read():
        with pytest.raises(gpt2.InputError) as caught:
            if name == "tokens.bin":
                gpt2.TokenFile(path)
            gpt2.GPT2.from_pretrained(folder)
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


@pytest.mark.parametrize("vocab_size", [0, 61])
def test_fuzzed_token_files(vocab_size, tmp_path):
    tokens = np.random.default_rng(1).integers(0, 61, 41)
    data = token_file(tokens, 20240520, 1, 41, vocab_size)
    path = written(tmp_path / "tokens.bin", data)

    def read():
        loader = open_tokens(path, B=2, T=4)
        return [loader.next_batch() for _ in range(12)]

    def check(batches):
        data = (tmp_path / "tokens.bin").read_bytes()
        assert struct.unpack("<4i", data[:16])[3] in (0, 61)
        tokens = np.frombuffer(data[1024:], "<u2")
        for i, (inputs, targets) in enumerate(batches):
            start = 8 * (i % ((len(tokens) - 1) // 8))
            assert inputs.shape == targets.shape == (2, 4)
            assert max(inputs.max(), targets.max()) < 61
            assert np.array_equal(inputs.ravel(), tokens[start : start + 8])
            assert np.array_equal(targets.ravel(), tokens[start + 1 : start + 9])

    fuzz(tmp_path, ["tokens.bin"], read, check)


def parameters_in(data):
    """{Hugging Face's name: array} of the parameters in a .safetensors file."""
    tensors = {name.removeprefix("transformer."): t for name, t in read_plainly(data).items()}
    return {name: t for name, t in tensors.items() if name not in ("m", "v", "crc32")}


def told_heads(folder):
    return json.loads((folder / "config.json").read_bytes()).get("n_head")


def test_fuzzed_safetensors(tmp_path):
    tensors = as_hugging_face(fuzz_model().params, "transformer.")
    mixed = {name: (["F32", "F16", "BF16"][i % 3], tensors[name]) for i, name in enumerate(tensors)}
    told = {"vocab_size": 29, "n_positions": 9, "n_embd": 12, "n_layer": 2, "n_inner": None}
    source = weights_folder(tmp_path, mixed, **told)

    def check(model):
        assert model.config.num_heads == told_heads(tmp_path)
        found = parameters_in((tmp_path / "model.safetensors").read_bytes())
        assert_same_bits(as_hugging_face(model.params), found)
        assert np.isfinite(model.flat[0]).all()

    names = ["config.json", *["model.safetensors"] * 3]
    fuzz(tmp_path, names, lambda: loaded(source, 1, 1), check)


def test_fuzzed_files_of_our_own(tmp_path):
    """Their metadata say how many heads there are, and config.json says it too."""
    model = fuzz_model()
    model.save_pretrained(tmp_path)

    def check(read):
        header, _ = header_of((tmp_path / "model.safetensors").read_bytes())
        metadata = header.get("__metadata__", {})
        told = told_heads(tmp_path)
        assert read.config.num_heads == int(metadata.get("n_head") or told)
        assert told in (None, read.config.num_heads)

    names = ["config.json", "model.safetensors"]
    fuzz(tmp_path, names, lambda: loaded(str(tmp_path), 1, 1), check)


def test_fuzzed_indices(tmp_path):
    model = fuzz_model()
    first, second = halves(as_hugging_face(model.params))
    source = sharded_folder(tmp_path, first, second)

    def check(read):
        assert_same_bits(read.params, model.params)

    fuzz(tmp_path, ["model.safetensors.index.json"], lambda: loaded(source, 1, 1), check)


# --------------------------------------------------------------------------------------------------
# Checkpoints

FIRST = "checkpoint_00000007.safetensors"


def saved_checkpoint(folder, **settings):
    """A checkpoint with moments that are no zeros: (model, the Run)."""
    model = fuzz_model()
    model.flat[2:] = np.random.default_rng(1).random(model.flat[2:].shape, np.float32)
    run = run_state(model, folder, **settings)
    gpt2.save_checkpoint(run)
    assert [path.name for path in checkpoints(folder)] == [FIRST]
    return model, run


def load_it(folder):
    return gpt2.load_checkpoint(str(folder / FIRST), {}, gpt2.one_process())


def test_fuzzed_checkpoints(tmp_path, capsys):
    """Of a checkpoint every bit counts: weights, moments, settings, position."""
    model, run = saved_checkpoint(tmp_path, input_bin="données.bin")

    def check(result):
        args, read, state = result
        assert read.config == model.config and read.updates == state["step"] == 7
        assert (read.batch_size, read.sequence_length) == (2, 8)
        assert read.flat[[0, 2, 3]].tobytes() == model.flat[[0, 2, 3]].tobytes()
        assert vars(args) == vars(run.args) and state["data"] == run.data
        assert state["position"] == list(run.loader.position)
        capsys.readouterr()

    fuzz(tmp_path, [FIRST], lambda: load_it(tmp_path), check, harmless=0)


def test_fuzzed_checkpoints_with_a_right_checksum(tmp_path, capsys, monkeypatch):
    """What the checksum lets pass is read as it is now, or refused."""
    saved_checkpoint(tmp_path)
    monkeypatch.setattr(gpt2, "available_memory", lambda: 2e6)

    def read():
        try:
            return load_it(tmp_path)
        except MemoryError as error:  # as after --batch_size 65535
            raise gpt2.InputError(str(error)) from error

    def check(result):
        _, model, _ = result
        data = (tmp_path / FIRST).read_bytes()
        assert_same_bits(as_hugging_face(model.params), parameters_in(data))
        tensors = read_plainly(data)
        assert model.flat[2].tobytes() == tensors["m"].tobytes()
        assert model.flat[3].tobytes() == tensors["v"].tobytes()
        assert np.isfinite(model.flat).all()
        capsys.readouterr()

    fuzz(tmp_path, [FIRST], read, check, mend=with_right_checksum)


@pytest.fixture
def stopped_run(tmp_path, monkeypatch, capsys):
    """A folder with data and a run of two updates: resume() goes on with it up to four.

    It returns what is printed. If the run is refused it raises InputError with that, in one line.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(gpt2, "available_memory", lambda: 2e6)
    fuzz_model().save_pretrained("model")
    for name in ("train.bin", "val.bin"):
        written(tmp_path / name, token_file(np.random.default_rng(1).integers(0, 29, 80)))
    files = ["--input_bin", "train.bin", "--input_val_bin", "val.bin"]
    may_change = [*files, "--val_loss_every", "0", "--sample_every", "0", "--output_dir", "run"]

    def call(*flags):
        code = gpt2.main([*may_change, *flags])
        stdout, stderr = capsys.readouterr()
        if code:
            assert code == 1 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
            raise gpt2.InputError((stdout + stderr).rstrip("\n").replace("\n", " | "))
        assert stderr == ""
        return stdout

    sizes = ["--batch_size", "2", "--sequence_length", "8"]
    call("--model", "model", *sizes, "--num_iterations", "2")
    return SimpleNamespace(
        folder=tmp_path / "run", resume=lambda: call("--resume", "1", "--num_iterations", "4")
    )


def after(run, path):
    """What the run prints when it goes on, and the folder as it was before."""
    before = {file.name: file.read_bytes() for file in run.folder.iterdir()}
    try:
        return run.resume()
    finally:
        for file in run.folder.iterdir():
            if file.name in before and file != path:
                written(file, before[file.name])
            elif file.name not in before:
                file.unlink()


def printed_whole(stdout):
    """Whether all that a run printed is what a terminal can show."""
    return all(line.isprintable() for line in stdout.splitlines())


def test_a_forged_checkpoint_goes_on_or_is_refused(stopped_run):
    """The whole program, whose checksum is right: it makes updates, or says one line."""
    path = checkpoints(stopped_run.folder)[-1]

    def check(stdout):
        assert "resuming from" in stdout and printed_whole(stdout)

    fuzz(
        stopped_run.folder,
        [path.name],
        lambda: after(stopped_run, path),
        check,
        mend=with_right_checksum,
    )


def with_state(data, text):
    """A checkpoint's bytes with another text as its state, and the checksum that belongs to it."""
    header, end = header_of(data)
    header["__metadata__"]["state"] = text
    return with_right_checksum(pack_safetensors(header, data[end:]))


def test_a_forged_state_goes_on_or_is_refused(stopped_run, tmp_path):
    """Damage to the JSON in the metadata: step, position, checksums of the data, settings."""
    path = checkpoints(stopped_run.folder)[-1]
    sound = path.read_bytes()
    state = header_of(sound)[0]["__metadata__"]["state"]
    (tmp_path / "forged").mkdir()
    written(tmp_path / "forged" / "state.json", state.encode())

    def read():
        text = (tmp_path / "forged" / "state.json").read_bytes()
        written(path, with_state(sound, text.decode(errors="surrogateescape")))
        return after(stopped_run, path)

    def check(stdout):
        assert "resuming from" in stdout and printed_whole(stdout)

    fuzz(tmp_path / "forged", ["state.json"], read, check)


FORGED_STATES = {
    "no_text": ("\ud800", "expected JSON"),
    "no_json": ("{", "expected JSON"),
    "a_list": ("[]", "expected a JSON object"),
    "empty": ("{}", "its state is not as expected"),
    "step": ({"step": -1}, "its state is not as expected"),
    "step_true": ({"step": True}, "its state is not as expected"),
    "step_huge": ({"step": 1 << 60}, "its state is not as expected"),
    "position": ({"position": [0, 0]}, "its state is not as expected"),
    "position_negative": ({"position": [0, -16, 0]}, "its state is not as expected"),
    "position_behind_the_data": ({"position": [0, 80, 0]}, "not in the training data"),
    "position_in_no_shard": ({"position": [1, 0, 0]}, "not in the training data"),
    "data": ({"data": {"training": 5}}, "the training data has changed"),
    "data_no_object": ({"data": []}, "its state is not as expected"),
    "settings": ({"settings": []}, "its state is not as expected"),
    "unknown_flag": ({"settings": {"colour": "red"}}, "its state is not as expected"),
    "flag_of_two_lines": ({"settings": {"two\nlines": 1}}, "its state is not as expected"),
    "value_of_two_lines": ({"settings": {"seed": "two\nlines"}}, r"two\nlines"),
    "help": ({"settings": {"help": ""}}, "its state is not as expected"),
    "two_dashes": ({"settings": {"prompt": "--"}}, "can't be --"),
    "seed": ({"settings": {"seed": "x"}}, "--seed"),
    "batch_size": ({"settings": {"batch_size": 0}}, "--batch_size"),
    "more_memory": ({"settings": {"batch_size": 10**9}}, "needs"),
    "recompute": ({"settings": {"recompute": 7}}, "expected a whole number from 0 to 2"),
    "inference": ({"settings": {"inference_only": 1}}, "its state is not as expected"),
    "context": ({"settings": {"sequence_length": 10}}, "the model's context is 9"),
    "tokens": ({"settings": {"total_batch_size": 17}}, "not a multiple of"),
    "learning_rate": ({"settings": {"learning_rate": math.nan}}, "--learning_rate"),
}


@pytest.mark.parametrize("forgery", FORGED_STATES)
def test_a_forged_state_is_refused(forgery, stopped_run):
    change, part = FORGED_STATES[forgery]
    path = checkpoints(stopped_run.folder)[-1]
    sound = path.read_bytes()
    state = json.loads(header_of(sound)[0]["__metadata__"]["state"])
    if isinstance(change, dict):
        settings = change.get("settings", {})
        if isinstance(settings, dict):
            change = change | {"settings": state["settings"] | settings}
        change = json.dumps(state | change)
    written(path, with_state(sound, change))
    with pytest.raises(gpt2.InputError) as caught:
        stopped_run.resume()
    assert part in str(caught.value) and str(caught.value).isprintable()


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
    saved_checkpoint(tmp_path)
    data = (tmp_path / FIRST).read_bytes()
    header, end = header_of(data)
    change(header, moment)
    written(tmp_path / FIRST, with_right_checksum(pack_safetensors(header, data[end:])))
    with pytest.raises(gpt2.InputError, match=f"{moment} is not as expected|'other' is not part"):
        load_it(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(other=h.pop("crc32")),
        lambda h: h["crc32"].update(shape=[2, 2]),
        lambda h: h["__metadata__"].pop("state"),
        lambda h: h.pop("__metadata__"),
    ],
    ids=["no_checksum", "another_shape", "no_state", "no_metadata"],
)
def test_no_checkpoint(change, tmp_path):
    saved_checkpoint(tmp_path)
    data = (tmp_path / FIRST).read_bytes()
    header, end = header_of(data)
    change(header)
    written(tmp_path / FIRST, with_right_checksum(pack_safetensors(header, data[end:])))
    with pytest.raises(gpt2.InputError, match="not a checkpoint|expected|not as expected"):
        load_it(tmp_path)
