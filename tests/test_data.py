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
    succeeded,
    write_token_file,
)

import train_gpt2 as gpt2
from train_gpt2 import InputError


@pytest.mark.parametrize("sizes", [[7], [13], [25], [24], [26], [7, 12, 13, 30], [40, 7]])
@pytest.mark.parametrize("in_files", [True, False], ids=["files", "arrays"])
def test_batches_come_in_llmc_order(tmp_path, sizes, in_files):
    """7 tokens are one batch of 2 * 3 and the last target; of 12, five are never seen; 13 are two
    batches."""
    numbers = itertools.count(1000)
    texts = [list(itertools.islice(numbers, size)) for size in sizes]
    shards = [np.array(text, np.uint16) for text in texts]
    if in_files:
        for i, text in enumerate(texts):
            write_token_file(tmp_path / f"shard_{i}.bin", text)
        write_token_file(tmp_path / "other.bin", [9] * 50)
        shards = gpt2.open_shards(str(tmp_path / "shard_*.bin"))

    expected = list(itertools.islice(batches_by_hand(texts, 2, 3), 35))
    loader, positions = gpt2.DataLoader(shards, 2, 3), []
    for inputs, targets in expected:
        positions.append(list(loader.position))
        found = loader.next_batch()
        assert found[0].dtype == found[1].dtype == np.int64
        np.testing.assert_array_equal(found, (inputs, targets))
        np.testing.assert_array_equal(inputs.flat[1:], targets.flat[:-1])
    for start in (3, 0, 11, 24):  # any position can be gone back to, in another loader too
        other = gpt2.DataLoader(shards, 2, 3)
        other.seek(positions[start])
        for batch in expected[start : start + 9]:
            np.testing.assert_array_equal(other.next_batch(), batch)


def test_batches_follow_one_another_shard_after_shard():
    """By hand: of 13 tokens, 12 are inputs; of 8, 6 are; then the first shard begins again."""
    shards = [np.arange(13), np.arange(20, 28)]
    loader = gpt2.DataLoader(shards, 2, 3)
    first_epoch = [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]], [[20, 21, 22], [23, 24, 25]]]
    positions = []
    for expected in first_epoch + first_epoch + first_epoch[:1]:
        positions.append(list(loader.position))
        inputs, targets = loader.next_batch()
        assert inputs.tolist() == expected
        assert np.array_equal(targets, inputs + 1)
    assert [position[:2] for position in positions] == 2 * [[0, 0], [0, 6], [1, 0]] + [[0, 0]]
    assert [position[2] for position in positions] == [0, 0, 0, 1, 1, 1, 2]

    for position, expected in zip(positions[3:], first_epoch, strict=False):
        loader.seek(position)
        assert loader.next_batch()[0].tolist() == expected


def test_a_position_is_not_tied_to_the_loader_it_came_from():
    """Who keeps one, as a checkpoint does, must not see it change."""
    loader = gpt2.DataLoader([np.arange(40)], 2, 3)
    kept = loader.position
    loader.next_batch()
    assert list(kept) == [0, 0, 0]
    loader.seek(kept)
    loader.next_batch()
    assert list(kept) == [0, 0, 0]


@pytest.mark.parametrize("size", [33, 34, 40, 45])
def test_shuffled_batches_see_each_window_once_an_epoch(size):
    B, T = 3, 4
    tokens = np.arange(size)
    loader = gpt2.DataLoader([tokens], B, T, shuffle_seed=7)
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

    other = gpt2.DataLoader([tokens], B, T, shuffle_seed=7)
    for i in (17, 3, 0, 21):
        other.seek(positions[i])
        assert np.array_equal(other.next_batch(), batches[i])
        assert np.array_equal(other.next_batch(), batches[i + 1])


@pytest.mark.parametrize("seed", [7, 8])
def test_each_shard_and_each_seed_has_an_order_of_its_own(seed):
    """Shards of the same length are not cut and shuffled alike, and a seed alone decides."""

    def starts(shuffle_seed):
        loader = gpt2.DataLoader([np.arange(200), np.arange(200)], 2, 3, shuffle_seed)
        found = [], []
        while loader.position[2] == 0:
            shard = loader.position[0]
            found[shard].append(loader.next_batch()[0][:, 0].tolist())
        return found

    one, two = starts(seed)
    assert one != two and len(one) >= 32
    assert starts(seed) == (one, two) and starts(seed + 2) != (one, two)


def test_a_shard_shorter_than_a_batch_is_an_input_error():
    gpt2.DataLoader([np.arange(13)], 3, 4)
    for shards in ([np.arange(12)], [np.arange(50), np.arange(12)]):
        with pytest.raises(InputError, match="12 tokens.* 13"):
            gpt2.DataLoader(shards, 3, 4)


# ---- Token files


def test_a_token_file_is_read_piece_by_piece(tmp_path):
    """... each time anew: one that has become shorter is an error, and no bus error."""
    tokens = [(i * i) % 65536 for i in range(1000)]
    write_token_file(tmp_path / "t.bin", tokens, vocab_size=50257)
    file = gpt2.TokenFile(str(tmp_path / "t.bin"))
    assert len(file) == 1000 and file.vocab_size == 50257
    for piece in (np.s_[:], np.s_[3:17], np.s_[990:2000], np.s_[:0], np.s_[-5:]):
        assert file[piece].tolist() == tokens[piece] and file[piece].dtype == np.uint16
    write_token_file(tmp_path / "t.bin", tokens[:500])
    assert file[400:500].tolist() == tokens[400:500]
    with pytest.raises(InputError, match="t.bin: has become shorter"):
        file[400:501]
    assert gpt2.TokenFile(str(tmp_path / "t.bin")).vocab_size == 0  # llm.c's: unknown


def test_a_training_file_that_is_cut_short_meanwhile_ends_the_run_in_one_line(
    call_main, small_folder, tmp_path, monkeypatch
):
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    update = gpt2.GPT2.update

    def cutting(model, *args, **kwargs):
        update(model, *args, **kwargs)
        (tmp_path / "train_0.bin").write_bytes((tmp_path / "train_0.bin").read_bytes()[:1100])

    monkeypatch.setattr(gpt2.GPT2, "update", cutting)
    result = call_main(*SMALL_RUN)
    assert "train_0.bin: has become shorter" in failed_in_one_line(result)
    assert "\nstep 2/12" in result[1]


def test_a_name_with_the_signs_of_a_pattern_is_a_name(call_main, small_folder, tmp_path):
    """A file of that very name comes before what the pattern would find."""
    folder = tmp_path / "[D]*"
    folder.mkdir()
    write_token_file(folder / "a?[1].bin", [100] * 40)
    write_token_file(folder / "ab1.bin", [101] * 50)
    [shard] = gpt2.open_shards(str(folder / "a?[1].bin"))
    assert len(shard) == 40
    flags = ("--input_bin", folder / "a?[1].bin", "--input_val_bin", folder / "ab1.bin")
    stdout = succeeded(call_main(*SMALL_RUN, *flags, "--output_dir", folder / "run"))
    assert f"training data: {folder / 'a?[1].bin'}, 40 tokens\n" in stdout
    assert f"validation data: {folder / 'ab1.bin'}, 50 tokens\n" in stdout
    more = ("--output_dir", folder / "run", "--resume", 1, "--num_iterations", 14)
    assert "resuming from " in succeeded(call_main(*more))


@pytest.mark.parametrize(
    "theirs, said",
    [
        (50257, "its tokens are GPT-2's, up to 121, and those of the model are bytes"),
        (65, "its tokens are of 65, up to 121, and those of the model are bytes"),
        (0, None),
        (256, None),
    ],
)
def test_tokens_of_another_vocabulary_are_refused(call_main, tmp_path, theirs, said):
    """All ids below 256 prove nothing: the header knows, unless it is llm.c's."""
    file = tmp_path / "tokens.bin"
    write_token_file(file, [97, 121] * 40, vocab_size=theirs)
    for flag in ("--input_bin", "--input_val_bin"):
        result = call_main(*SMALL_RUN, flag, file)
        if said:
            assert said in failed_in_one_line(result) and "--bytes 1" in result[2]
        else:
            succeeded(result)


# ---- Bad input


def put_bad_file(*args, **header):
    return lambda folder: write_token_file(folder / "bad.bin", *args, **header)


def put_bad_heads(folder):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_head": 3}))


def put_bad_bytes(data):
    return lambda folder: (folder / "bad.bin").write_bytes(data)


BAD_INPUTS = {  # what is wrong: (flags, what the one line says, what makes it so)
    "wrong magic": ("--input_bin bad.bin", "20240521", put_bad_file([97] * 50, magic=20240521)),
    "wrong version": ("--input_bin bad.bin", "[20240520, 2]", put_bad_file([97] * 50, version=2)),
    "too long": ("--input_bin bad.bin", "1124 bytes, 49", put_bad_file([97] * 50, count=49)),
    "too short": ("--input_bin bad.bin", "1124 bytes, 51", put_bad_file([97] * 50, count=51)),
    "negative length": ("--input_bin bad.bin", "-1 tokens", put_bad_file([], count=-1)),
    "half a header": (
        "--input_bin bad.bin",
        "not a token file",
        put_bad_bytes(struct.pack("<2i", 20240520, 1)),
    ),
    "empty file": ("--input_bin bad.bin", "not a token file", put_bad_bytes(b"")),
    "less than a batch": ("--input_bin bad.bin", "B*T + 1 = 17", put_bad_file([97] * 16)),
    "short validation": ("--input_val_bin bad.bin", "B*T + 1 = 17", put_bad_file([97] * 16)),
    "one bad shard of four": ("--input_bin *.bin", "bad.bin", put_bad_file([97] * 16)),
    "strange token": (
        "--input_bin bad.bin",
        "bad.bin: its tokens are unknown, up to 256, and those of the model are bytes",
        put_bad_file([97] * 40 + [256]),
    ),
    "strange token in a later shard": (
        "--input_bin *.bin",
        "zz.bin: its tokens are unknown, up to 999",
        lambda f: write_token_file(f / "zz.bin", [97] * 20 + [999]),
    ),
    "folder for tokens": ("--input_bin model", "model", None),
    "glob without a match": ("--input_bin nothing_*.bin", "nothing_*.bin", None),
    "no validation tokens": ("--input_val_bin nothing.bin", "nothing.bin", None),
    "model that is not there": ("--model nothing", "'nothing': no such model", None),
    "folder without a model": (
        "--model empty",
        "empty: holds no model.safetensors",
        lambda f: (f / "empty").mkdir(),
    ),
    "file of another kind": ("--model val.bin", "20240520, expected 20240326", None),
    "beyond the context": (
        "--sequence_length 17 --batch_size 1",
        "context is 16: use --sequence_length 16",
        None,
    ),
    "heads of another model": ("", "config.json says n_head = 3, expected 2", put_bad_heads),
    "empty prompt": ("--inference_only 1 --prompt=", "--prompt is empty", None),
    "total batch no multiple of it": ("--total_batch_size 40", "of B*T = 16: try 32", None),
    "total batch below the batch": ("--total_batch_size 8", "of B*T = 16: try 16", None),
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
    tokens = gpt2.tokenizer(50304)
    assert tokens.encode("Hello world") == [15496, 995] and tokens.first == 50256
    assert tokens.decode(50256) == b"<|endoftext|>"
    assert tokens.decode(50257) == tokens.decode(50303) == b""


def test_bytes_are_the_tokens_of_a_vocabulary_of_256():
    tokens = gpt2.tokenizer(256)
    assert tokens.encode("hé\n") == list("hé\n".encode()) and tokens.first == 10
    assert b"".join(map(tokens.decode, range(256))) == bytes(range(256))


@pytest.mark.parametrize("vocab_size", [65, 30_001, 50_256, 50_305, 52_000])
def test_a_vocabulary_that_nobody_told_us_has_ids_and_no_words(vocab_size):
    tokens = gpt2.tokenizer(vocab_size)
    assert b"".join(map(tokens.decode, (7, 12, 0))) == b"7 12 0 "
    with pytest.raises(InputError, match=f"the model's {vocab_size} tokens .* with ids$"):
        tokens.encode("some text")
    assert 0 <= tokens.first < vocab_size


def test_a_model_with_such_a_vocabulary_speaks_in_ids(call_main, tmp_path):
    model = gpt2.GPT2(gpt2.GPT2Config(16, 65, 1, 2, 8), 1, 16)
    model.save_pretrained(tmp_path / "own")
    flags = ("--model", tmp_path / "own", "--inference_only", 1, "--max_new_tokens", 5)
    said = succeeded(call_main(*flags, "--temperature", 0)).splitlines()[-1]
    assert said == " ".join(map(str, model.generate([0], 5, temperature=0))) + " "
    assert "65 tokens" in failed_in_one_line(call_main(*flags, "--prompt", "x"))
