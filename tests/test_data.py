"""The order of batches, and data that can not be used."""

import itertools
import json
import shutil
import struct

import numpy as np
import pytest
from common import (
    SMALL,
    SMALL_RUN,
    batches_by_hand,
    failed_in_one_line,
    folder_content,
    need_gpt2_vocabulary,
    run_command,
    write_token_file,
)

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2


@pytest.mark.parametrize("sizes", [[7], [13], [25], [24], [26], [7, 12, 13, 30], [40, 7]])
def test_batches_come_in_llmc_order(tmp_path, sizes):
    """7 tokens are one batch of 2 * 3 and the last target; of 12, five are never seen; 13 are two
    batches."""
    numbers = itertools.count(1000)
    shards = [list(itertools.islice(numbers, size)) for size in sizes]
    for i, shard in enumerate(shards):
        write_token_file(tmp_path / f"shard_{i}.bin", shard)
    write_token_file(tmp_path / "other.bin", [9] * 50)
    expected = list(itertools.islice(batches_by_hand(shards, 2, 3), 35))
    for source in [str(tmp_path / "shard_*.bin")] + [np.array(shards[0], np.uint16)] * (
        len(shards) == 1
    ):
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
            for batch in expected[start : start + 9]:
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
    "half a header": (
        "--input_bin bad.bin",
        "no token file",
        put_bad_bytes(struct.pack("<2i", 20240520, 1)),
    ),
    "empty file": ("--input_bin bad.bin", "no token file", put_bad_bytes(b"")),
    "less than a batch": ("--input_bin bad.bin", "B*T + 1 = 17", put_bad_file([97] * 16)),
    "short validation": ("--input_val_bin bad.bin", "B*T + 1 = 17", put_bad_file([97] * 16)),
    "one bad shard of four": ("--input_bin *.bin", "bad.bin", put_bad_file([97] * 16)),
    "strange token": (
        "--input_bin bad.bin",
        "bad.bin: holds token 256",
        put_bad_file([97] * 40 + [256]),
    ),
    "strange token in a later shard": (
        "--input_bin *.bin",
        "zz.bin: holds token 999",
        lambda f: write_token_file(f / "zz.bin", [97] * 20 + [999]),
    ),
    "folder for tokens": ("--input_bin model", "model", None),
    "glob without a match": ("--input_bin nothing_*.bin", "nothing_*.bin", None),
    "no validation tokens": ("--input_val_bin nothing.bin", "nothing.bin", None),
    "model that is not there": ("--model nothing", "'nothing': no such file", None),
    "folder without a model": ("--model empty", "config.json", lambda f: (f / "empty").mkdir()),
    "file of another kind": ("--model val.bin", "20240520, expected 20240326", None),
    "beyond the context": (
        "--sequence_length 17 --batch_size 1",
        "context is 16: use --sequence_length 16",
        None,
    ),
    "heads that don't divide the channels": (
        "",
        "16 channels can't be shared by 3 heads",
        put_bad_heads,
    ),
    "empty prompt": ("--inference_only 1 --prompt=", "--prompt is empty", None),
    "total batch no multiple of the batch": ("--total_batch_size 40", "B*T = 16: try 32", None),
    "total batch below the batch": ("--total_batch_size 8", "B*T = 16: try 16", None),
    "strange recompute": ("--recompute 5", "expected one of [0, 1, 2]", None),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_exit_code_1(
    case, call_main, small_folder, tmp_path, monkeypatch
):
    flags, phrase, spoil = BAD_INPUTS[case]
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(tmp_path)
    before = folder_content(tmp_path)
    assert phrase in failed_in_one_line(
        call_main(*SMALL_RUN, "--num_iterations", 40, *flags.split())
    )
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


def test_ids_beyond_the_vocabulary_are_no_words():
    """Models padded to 50,304 ids, as many are, may choose one that means nothing."""
    need_gpt2_vocabulary()
    encode, decode, start = prepro.tokenizer(50304)
    assert (
        decode(50256) == b"<|endoftext|>"
        and decode(50257) == decode(50303) == b""
        and start == 50256
    )
