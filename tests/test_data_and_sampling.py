"""The order of batches, and text that a model continues."""

import itertools
import json
import math
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from common import (
    NO_NETWORK,
    SMALL,
    SMALL_RUN,
    batches_by_hand,
    failed_in_one_line,
    folder_content,
    need_gpt2_vocabulary,
    run_command,
    sharp_model,
    write_token_file,
)

import prepro_tinyshakespeare as prepro
import train_gpt2 as gpt2

NO_NETWORK |= {"NO_PROXY": "", "no_proxy": ""}


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


# ---- Generation


def continue_by_hand(model, tokens, count, temperature, top_k, rng):
    """As model.generate, with a whole forward pass for every token, and the distribution in
    float64."""
    T, window, new = model.sequence_length, list(tokens)[-model.sequence_length :], []
    for _ in range(count):
        if len(window) > T:
            window = window[-max(1, T // 2) :]
        padded = np.array(
            [window + [0] * (T - len(window))]
        )  # no position sees what comes after it
        model.forward(padded, padded, train=False)
        logits = model.params["wte"].astype(np.float64) @ model.acts["lnf"][0, len(window) - 1]
        if temperature == 0:
            window.append(int(np.argmax(logits)))
        else:
            logits[np.argsort(logits)[: len(logits) - top_k if top_k else 0]] = -np.inf
            probs = np.exp((logits - logits.max()) / temperature)
            point = float(rng.random(dtype=np.float32)) * probs.sum()
            window.append(next(i for i, up_to in enumerate(probs.cumsum()) if up_to > point))
        new.append(window[-1])
    return new


@pytest.mark.parametrize("T", [16, 7, 2, 1])
@pytest.mark.parametrize("prompt", [1, 5, 40])
@pytest.mark.parametrize(
    "temperature, top_k", [(0, 0), (1.0, 0), (0.7, 3), (1.5, 1), (0.3, 500), (0, 4)]
)
def test_generation_with_the_cache_equals_whole_forward_passes(T, prompt, temperature, top_k):
    """... far past the context's end, and from a prompt longer than it."""
    model, prompt = sharp_model(1, T), [(7 * i) % 256 for i in range(prompt)]
    expected = continue_by_hand(model, prompt, 45, temperature, top_k, np.random.default_rng(3))
    model = sharp_model(2, T)  # a model with room for more sequences has the same to say
    found = list(model.generate(prompt, 45, temperature, top_k, np.random.default_rng(3)))
    assert found == expected and len(set(found)) > 1
    assert found == list(model.generate(prompt, 45, temperature, top_k, np.random.default_rng(3)))
    greedy = temperature == 0 or top_k == 1
    assert greedy == (
        found == list(model.generate(prompt, 45, temperature, top_k, np.random.default_rng(4)))
    )
    assert greedy == (found == list(model.generate(prompt, 45, temperature=0)))


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_generation_is_the_same_whatever_is_kept(recompute):
    """With 2, all layers share the memory where the others leave keys and values."""
    expected = list(sharp_model(1, 9).generate([1, 2, 3], 20, temperature=0))
    assert (
        list(sharp_model(1, 9, recompute=recompute).generate([1, 2, 3], 20, temperature=0))
        == expected
    )
    assert len(set(expected)) > 3


def test_ids_beyond_the_vocabulary_are_no_words():
    """Models padded to 50,304 ids, as many are, may choose one that means nothing."""
    need_gpt2_vocabulary()
    encode, decode, start = prepro.tokenizer(50304)
    assert (
        decode(50256) == b"<|endoftext|>"
        and decode(50257) == decode(50303) == b""
        and start == 50256
    )


def test_each_generated_token_costs_one_position(monkeypatch):
    """By hand, T = 8 and a prompt of 3: these 3, then one at a time until there are 8; when there
    are 9, the newer 4 begin again."""
    model, rows, forward = sharp_model(1, 8), [], gpt2.matmul_forward

    def counting(out, inp, weight, bias=None):
        rows.append((weight.shape, math.prod(inp.shape[:-1])))
        forward(out, inp, weight, bias)

    monkeypatch.setattr(gpt2, "matmul_forward", counting)
    list(model.generate([1, 2, 3], 12))
    for name in ("qkvw", "attprojw", "fcw", "fcprojw"):
        seen = [n for shape, n in rows if shape == model.params[name].shape[1:]]
        assert seen == [n for n in (3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4) for layer in range(3)]
    assert [n for shape, n in rows if shape == model.params["wte"].shape] == [1] * 12  # logits


def test_tokens_come_one_by_one_and_spoil_a_pending_backward():
    model = sharp_model(1, 4)
    model.forward([[1, 2, 3, 4]], [[2, 3, 4, 5]])
    tokens = model.generate([1], 10**9)  # nobody waits for all of them
    assert [next(tokens) for _ in range(3)] == list(sharp_model(1, 4).generate([1], 3))
    with pytest.raises(gpt2.InputError, match="forward"):
        model.backward()


def test_sampling_follows_the_distribution():
    """Of 4000 draws, each id's share is within five standard deviations of its probability, worked
    by hand: logits ln 1 .. ln 4; at temperature 1/2 these weights are squared; of the two
    likeliest, 3 and 4 of 7."""
    logits, rng, n = np.log(np.array([1, 2, 3, 4], np.float32)), np.random.default_rng(0), 4000
    for temperature, top_k, weights in (
        (1, 0, [1, 2, 3, 4]),
        (0.5, 0, [1, 4, 9, 16]),
        (1, 2, [0, 0, 3, 4]),
        (1, 4, [1, 2, 3, 4]),
    ):
        draws = [gpt2.sample(logits.copy(), temperature, top_k, rng) for _ in range(n)]
        p = np.array(weights) / sum(weights)
        assert (abs(np.bincount(draws, minlength=4) - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()


def test_rounding_never_leads_beyond_the_last_token():
    below_one = SimpleNamespace(random=lambda dtype: np.nextafter(dtype(1), dtype(0)))
    for size in (2, 3, 1000, 50257):
        assert gpt2.sample(np.linspace(0, 1, size, dtype=np.float32), 1.0, 0, below_one) == size - 1
