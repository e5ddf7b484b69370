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
from train_gpt2 import InputError


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


def test_batches_follow_one_another_shard_after_shard(tmp_path):
    """By hand: of 13 tokens, 12 are inputs; of 8, 6 are; then the first shard begins again."""
    prepro.write_tokens(str(tmp_path / "a_0.bin"), list(range(13)))
    prepro.write_tokens(str(tmp_path / "a_1.bin"), list(range(20, 28)))
    loader = gpt2.DataLoader(str(tmp_path / "a_*.bin"), 2, 3, vocab_size=50257)
    assert loader.sizes == [13, 8]

    first_epoch = [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]], [[20, 21, 22], [23, 24, 25]]]
    positions = []
    for expected in first_epoch + first_epoch + first_epoch[:1]:
        positions.append(list(loader.position))
        inputs, targets = loader.next_batch()
        assert inputs.tolist() == expected
        assert np.array_equal(targets, inputs + 1)
        assert inputs.dtype == targets.dtype == np.int64
    assert [position[:2] for position in positions] == 2 * [[0, 0], [0, 6], [1, 0]] + [[0, 0]]
    assert [position[2] for position in positions] == [0, 0, 0, 1, 1, 1, 2]

    for position, expected in zip(positions, first_epoch, strict=False):
        loader.seek(position[:2])  # as older checkpoints have it
        assert loader.next_batch()[0].tolist() == expected


@pytest.mark.parametrize("size", [33, 34, 40, 45])
def test_shuffled_batches_see_each_window_once_an_epoch(size):
    B, T = 3, 4
    tokens = np.arange(size)
    loader = gpt2.DataLoader(tokens, B, T, vocab_size=size, shuffle_seed=7)
    batches, positions = [], []
    while loader.position[2] < 20:
        positions.append(list(loader.position))
        batches.append(loader.next_batch())
        assert np.array_equal(batches[-1][1], batches[-1][0] + 1)
        assert np.array_equal(np.diff(batches[-1][0]), np.ones((B, T - 1)))

    epochs = []
    for epoch in range(20):
        mine = [b for b, position in zip(batches, positions, strict=True) if position[2] == epoch]
        starts = np.concatenate([inputs[:, 0] for inputs, targets in mine])
        first = starts.min() % T
        assert len(mine) == (size - 1 - first) // T // B
        assert len(set(starts)) == len(starts) and set(starts % T) == {first}
        assert starts.max() + T < size
        epochs.append(starts.tolist())
    assert len({str(starts) for starts in epochs}) > 15  # the order differs
    assert {starts[0] % T for starts in epochs} == set(range(min(T, size - B * T)))

    other = gpt2.DataLoader(tokens, B, T, vocab_size=size, shuffle_seed=7)
    for i in (17, 3, 0, 21):
        other.seek(positions[i])
        assert np.array_equal(other.next_batch(), batches[i])
        assert np.array_equal(other.next_batch(), batches[i + 1])


def test_data_that_can_not_be_used_is_an_input_error():
    gpt2.DataLoader(np.arange(13), 3, 4, vocab_size=13)
    with pytest.raises(InputError, match="12 tokens.* 13"):
        gpt2.DataLoader(np.arange(12), 3, 4, vocab_size=13)
    with pytest.raises(InputError, match="token 12.* 11"):
        gpt2.DataLoader(np.arange(13), 3, 4, vocab_size=12)


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
