"""What the tool makes of a model: checked calls, copies, kept keys, threads and blocks.

That its numbers are right is proved in test_gpt2.py. There are its promises, too.
"""

import concurrent.futures
import copy
import ctypes
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading

import numpy as np
import pytest
from common import BATCHES, CALLS, NEEDS_LINUX, sharp_model, told

import test_gpt2
import train_gpt2 as gpt2
from test_gpt2 import BOTH_FLOATS, EVERY_LAYOUT, LAYOUTS, assert_same_bits, random_model, watch
from train_gpt2 import InputError

# --------------------------------------------------------------------------------------------------
# The order of calls


def assert_refused(model, call, expected):
    """The call ends in one line that says `expected`, in words of Python, and changes nothing."""
    before, stage = model.blob.tobytes(), model.stage
    with pytest.raises(InputError, match=expected) as refusal:
        call(model)
    assert str(refusal.value).isprintable() and "--" not in str(refusal.value)
    assert model.stage == stage and model.blob.tobytes() == before


@pytest.mark.parametrize(
    "story, refused, stage",
    [
        ("", "backward norm update", "no gradients"),
        ("zero", "backward update", "no gradients"),
        ("validate", "backward", "no gradients"),
        ("forward1", "update norm", "first forward"),
        ("forward1 backward", "backward", "gradients"),
        ("forward1 backward zero", "backward update", "no gradients"),
        ("forward1 backward update", "update norm", "no gradients"),
        # By now the activations are those of another pass.
        ("forward1 validate", "backward", "no gradients"),
        ("forward1 generate", "backward", "no gradients"),
        # Its part of dwte was added to that of an earlier micro-batch, which is forgotten.
        ("forward1 backward forward2 zero", "backward", "no gradients"),
        # A later forward has added to dwte. Another one would add twice, and not all is there.
        ("forward1 backward forward2", "forward2 validate generate update norm", "later forward"),
        ("forward1 backward forward2 backward norm score", "backward", "gradients"),
    ],
)
def test_a_call_out_of_order_is_refused(story, refused, stage):
    model = told(story)
    for word in refused.split():
        expected = f"can't follow here: the stage is '{stage}', expected '"
        assert_refused(model, CALLS[word], expected)


@pytest.mark.parametrize(
    "story, same_as",
    [
        # The first forward may be repeated, or forgotten.
        ("forward1 forward2 backward", "forward2 backward"),
        ("forward1 validate forward2 backward", "forward2 backward"),
        # Gradients begin anew after an update, and after zero_grad.
        ("forward1 backward update forward2 backward", "forward2 backward"),
        ("forward1 backward zero forward2 backward", "forward2 backward"),
        ("forward1 backward forward1 zero forward2 backward", "forward2 backward"),
        # Validation, generation and scores change no gradient.
        ("score forward1 score backward validate generate norm score", "forward1 backward"),
        (
            "validate forward1 backward validate generate forward2 score backward",
            "forward1 backward forward2 backward",
        ),
    ],
)
def test_two_stories_end_with_the_same_gradients(story, same_as):
    assert_same_bits(told(story).grads, told(same_as).grads)


@pytest.mark.parametrize(
    "story, call, function, number, spoilt",
    [
        ("forward1", "backward", "layernorm_backward", 1, True),
        ("forward1 backward forward2", "backward", "gelu_backward", 1, True),
        ("", "forward1", "crossentropy_softmax_backward", 1, True),
        ("forward1 backward", "forward2", "gelu_forward", 2, True),
        ("forward1 backward", "update", "adamw", 3, True),
        ("", "validate", "gelu_forward", 1, False),
        ("forward1 backward", "validate", "crossentropy_softmax_forward", 1, False),
        ("forward1 backward", "generate", "gelu_forward", 2, False),
    ],
)
def test_what_an_interrupted_call_left_is_not_used(
    story, call, function, number, spoilt, monkeypatch
):
    """Ctrl-C comes in the call of this number of a function. If gradients or parameters may be
    incomplete, everything is refused until zero_grad().
    """
    model = told(story)
    with monkeypatch.context() as patch:
        calls = itertools.count(1)
        stop = lambda *args: next(calls) == number and signal.raise_signal(signal.SIGINT)
        watch(patch, gpt2, function, before=stop)
        with pytest.raises(KeyboardInterrupt):
            CALLS[call](model)
    if spoilt:
        for word in ("backward", "update", "norm", "forward2", "validate", "generate"):
            assert_refused(model, CALLS[word], rf"^{call.rstrip('12')}\(\) was interrupted")
        story = "zero"
    told(f"{'zero' if spoilt else ''} forward2 backward", model)
    assert_same_bits(model.grads, told(f"{story} forward2 backward").grads)


# --------------------------------------------------------------------------------------------------
# What it is given


GOOD = BATCHES[0][1]


def with_one(value):
    tokens = GOOD.copy()
    tokens[1, 3] = value
    return tokens


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda model: model.forward(with_one(53), GOOD), "^inputs: ids .* to 53, expected 0 to"),
        (lambda model: model.forward(GOOD, with_one(-1)), "^targets: ids -1 to"),
        (lambda model: model.forward(GOOD, GOOD[:, :8]), r"^targets: .*\(2, 9\), found \(2, 8\)"),
        (lambda model: model.forward(GOOD.ravel(), GOOD), r"^inputs: .*\(2, 9\), found \(18,\)"),
        (lambda model: model.forward(GOOD * 1.0, GOOD), "^inputs: .* integers.* float64"),
        (lambda model: model.forward(GOOD, GOOD[:0]), "^targets: .* integers"),
        (lambda model: model.update(0.1, step=0), r"step=0.* from 1"),
        (lambda model: model.generate([[1, 2]], 1), r"^prompt: .*\(2,\), found \(1, 2\)"),
        (lambda model: model.generate([], 1), "^prompt: "),
        (lambda model: model.generate("ab", 1), "^prompt: found a text"),
        (lambda model: model.generate([1], 1, temperature=float("nan")), "^temperature is nan"),
        (lambda model: model.token_losses([53], [[1]]), "^context: .* 53"),
        (lambda model: model.token_losses([1], [[1], []]), "^continuation: "),
        (lambda model: model.token_losses([1], [[1], [2] * 12]), "have 13 tokens, at most 12"),
        (lambda model: random_model(0, 9), "batch size 0"),
        (lambda model: random_model(1, 0), "length 0"),
        (lambda model: random_model(1, 9, max_seq_len=8), "length 9.* 8"),
        (lambda model: random_model(1, 9, recompute=5), "recompute is 5"),
        (lambda model: random_model(1, 9, dtype=np.float16), "float16"),
        (lambda model: random_model(1, 9, C=23), "23 channels.* 3 heads"),
        (lambda model: random_model(1, 9, L=True), "num_layers is True"),
        (lambda model: random_model(1, 9, V=0), "vocab_size is 0"),
        (lambda model: random_model(2, 9, training=False).forward(GOOD, GOOD), "training=False"),
        (lambda model: gpt2.GPT2.from_pretrained("outt"), "outt"),
        (lambda model: model.params.update({"wte": GOOD}), r"^\['wte'\] is a part of the blob"),
        (lambda model: model.grads.__setitem__("wte", GOOD), r"write \['wte'\]\[...\] = value"),
        (lambda model: model.params.__setitem__("no_such", GOOD), "^'no_such' is none of wte"),
    ],
)
def test_a_slip_is_one_line_and_changes_nothing(call, expected):
    assert_refused(told("forward1 backward"), call, expected)


def test_a_view_may_be_changed_in_place():
    """Assigned to, it would be used and never trained."""
    model = random_model(2, 9)
    expected = model.params["wte"] * 3 + 1
    model.params["wte"] *= 3
    model.params["wte"] += 1
    assert model.flat[0, : expected.size].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint16, np.int8])
def test_a_batch_may_be_a_view_of_any_integer_type(dtype):
    """text[:, :-1] and text[:, 1:], as one writes it in a notebook; and it may be changed before
    backward(), as by a loader which fills the same array again and again.
    """
    text = np.random.default_rng(3).integers(0, 53, (2, 10)).astype(dtype)
    grads = []
    for inputs, targets in ((text[:, :-1], text[:, 1:]), (text[:, :-1] + 0, text[:, 1:] + 0)):
        model = random_model(2, 9)
        model.forward(inputs, targets)
        if inputs.base is None:
            inputs[...] = 0
        model.backward()
        grads.append(model.grads)
    assert_same_bits(*grads)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=str
)
@BOTH_FLOATS
@EVERY_LAYOUT
def test_a_copy_goes_on_as_the_model_would(copied, layout, dtype):
    """Its views are its own blob's. Here it is made between a forward pass and its backward."""
    expected, model = (random_model(2, 9, dtype, **LAYOUTS[layout]) for _ in range(2))
    train = model.training
    story = "score forward1 backward update forward1 backward forward2" if train else "validate"
    twin = copied(told(story, model))
    told(story, expected)
    before = model.blob.tobytes()
    for goes_on in (expected, twin):
        if train:
            told("backward", goes_on).update(1e-2)
        list(goes_on.generate([1, 2, 3], 12, rng=0))
    assert twin.blob.tobytes() == expected.blob.tobytes() != before
    assert model.blob.tobytes() == before
    assert_same_bits(twin.params, expected.params)
    assert_same_bits(*({"": model.token_losses([1], [[2, 3]])[0]} for model in (twin, expected)))
    assert vars(twin).keys() == vars(expected).keys() and twin.config == model.config


# --------------------------------------------------------------------------------------------------
# What it writes, and how likely it finds a text


@pytest.mark.parametrize("layout", ["recompute 1", "recompute 2", "without training"])
@pytest.mark.parametrize("T", [16, 7, 1])
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("settings", [(0, 0), (1.0, 0), (0.7, 3), (1.5, 1)])
def test_kept_keys_change_nothing_of_what_is_written(layout, T, length, settings):
    """Beside the chapter's own generation: far past the context, from a prompt longer than it."""
    prompt = [(7 * i) % 256 for i in range(length)]
    plain = sharp_model(2, T, make=gpt2.Model)
    expected = list(gpt2.generate(plain, prompt, 25, *settings, np.random.default_rng(3)))
    model = sharp_model(2, T, **LAYOUTS[layout])
    for rng in (3, np.random.default_rng(3)):
        assert list(model.generate(prompt, 25, *settings, rng=rng)) == expected
    greedy = settings[0] == 0 or settings[1] == 1
    assert greedy == (list(model.generate(prompt, 25, temperature=0)) == expected)


@pytest.mark.parametrize(
    "layout, positions",
    [
        ("recompute 1", [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]),
        ("recompute 2", [3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4]),  # nothing is kept
    ],
)
def test_each_written_token_costs_one_position(layout, positions, monkeypatch):
    """With T = 8 and a prompt of 3. When there are 9 tokens, the newer 4 begin again."""
    seen = []
    watch(monkeypatch, gpt2, "gelu_forward", before=lambda out, inp: seen.append(inp.shape[1]))
    list(sharp_model(1, 8, **LAYOUTS[layout]).generate([1, 2, 3], 12, rng=0))
    assert seen == np.repeat(positions, 3).tolist()  # in three layers


def test_generators_may_take_turns_with_everything():
    """With each other, with validation, training and scores: kept keys are not mixed up."""
    model = sharp_model(1, 8)
    expected = [list(sharp_model(1, 8).generate([token], 20, rng=token)) for token in (1, 2)]
    generators = [model.generate([token], 20, rng=token) for token in (1, 2)]
    found = [], []
    for i in range(20):
        found[0].append(next(generators[0]))
        if i % 3 == 0:
            model.forward(np.full((1, 8), i), np.full((1, 8), i), train=i % 2 == 0)
        if i % 2 == 0:
            found[1].extend([next(generators[1]), next(generators[1])])
            model.token_losses([i], [[1, 2]])
    assert list(found) == expected


def test_changed_parameters_are_used_at_once():
    """Keys of the old ones are not kept: not by a generator that goes on after an update, nor by a
    new one after a change in place, which the model does not see.
    """
    model = sharp_model(1, 16)
    prompt = list(range(40, 50))
    model.forward(np.full((1, 16), 9), np.full((1, 16), 3))
    model.backward()
    tokens = model.generate(prompt, 6, temperature=0)
    prompt.append(next(tokens))
    model.update(0.1)
    found = list(tokens)
    assert found == list(model.generate(prompt, 5, temperature=0))
    assert found != list(sharp_model(1, 16).generate(prompt, 5, temperature=0))

    model = sharp_model(1, 16)
    before = list(model.generate(prompt, 5, temperature=0))
    model.params["wpe"] *= -1
    after = list(model.generate(prompt, 5, temperature=0))
    assert after == list(copy.deepcopy(model).generate(prompt, 5, temperature=0)) != before


def test_a_prompt_may_be_any_sequence_of_ids_and_tokens_come_one_by_one():
    expected = list(sharp_model(1, 4).generate([107, 105], 9, rng=0))
    for prompt in (b"ki", bytearray(b"ki"), (107, 105), np.array([107, 105], np.uint8)):
        endless = sharp_model(1, 4).generate(prompt, 10**9, rng=0)
        assert [next(endless) for _ in expected] == expected
    assert len({tuple(sharp_model(1, 4).generate([1], 30)) for _ in range(3)}) == 3  # without rng


def plain_losses(model, context, text):
    """The losses of a text's tokens, by a forward pass on it and what comes before."""
    tokens = np.array([context + text])
    plain = gpt2.Model(model.config, 1, tokens.size - 1, None, dtype=model.blob.dtype)
    plain.flat[0] = model.flat[0]
    plain.forward(tokens[:, :-1], tokens[:, 1:], train=False)
    return plain.acts["losses"][0, len(context) - 1 :]


@EVERY_LAYOUT
@pytest.mark.parametrize("rows", [256, 4])
@pytest.mark.parametrize("context, lengths", [(1, [1]), (7, [3, 1, 10, 4]), (1, [16])])
def test_token_losses_equal_those_of_the_whole_text(layout, rows, context, lengths, monkeypatch):
    """Of any model, whatever its batches, with the parameters as they are."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", rows)
    model = sharp_model(3, 2, **LAYOUTS[layout])
    context = [(5 + 11 * i * i) % 256 for i in range(context)]
    texts = [[(40 * n + 7 * i * i) % 256 for i in range(n)] for n in lengths]
    for _ in range(2):
        found = model.token_losses(np.array(context, np.uint16), texts)
        for losses, text in zip(found, texts, strict=True):
            np.testing.assert_allclose(losses, plain_losses(model, context, text), 1e-12)
        model.params["wpe"] *= -1


# --------------------------------------------------------------------------------------------------
# Threads and blocks


@pytest.mark.parametrize("threads", [1, 3])
def test_parallel_runs_tasks_side_by_side_and_passes_errors_on(threads, monkeypatch):
    """With results in order. An error of any task, in whichever thread, ends the call."""
    monkeypatch.setattr(gpt2, "THREADS", threads)
    barrier = threading.Barrier(threads)  # which only so many threads at once can pass

    def divide(bad, i):
        barrier.wait(timeout=30)
        return 1 / (i - bad)

    found = gpt2.parallel(functools.partial(divide, -1), 2 * threads)
    assert found == [1 / (i + 1) for i in range(2 * threads)]
    for bad in range(threads):
        with pytest.raises(ZeroDivisionError):
            gpt2.parallel(functools.partial(divide, bad), threads)


def test_threads_that_the_system_refuses_are_not_needed(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    trainer = test_gpt2.trainer_of(test_gpt2.TEXT)  # which has not started any yet
    monkeypatch.setattr(trainer, "THREADS", 4)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert trainer.parallel(lambda i: i * i, 6) == [0, 1, 4, 9, 16, 25]


def squares():
    a = np.ones((300, 300), np.float32)
    return gpt2.parallel(lambda i: i * i * float((a @ a)[0, 0]), 6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_process_has_threads_of_its_own(monkeypatch):
    """os.fork copies no threads, so a child that waited for its parent's would wait for ever."""
    monkeypatch.setattr(gpt2, "THREADS", 3)
    expected = squares()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(squares).get(timeout=60) == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_blas_has_one_thread_in_a_task_and_afterwards_what_it_had(threads, monkeypatch):
    blas = ctypes.CDLL(np._core._multiarray_umath.__file__)
    if not hasattr(blas, "scipy_openblas_get_num_threads64_"):
        pytest.skip("needs the BLAS of NumPy's wheels: pip install numpy")
    monkeypatch.setattr(gpt2, "THREADS", threads)
    before = blas.scipy_openblas_get_num_threads64_()
    blas.scipy_openblas_set_num_threads64_(3)
    inside = gpt2.parallel(lambda i: blas.scipy_openblas_get_num_threads64_(), 4)
    after = blas.scipy_openblas_get_num_threads64_()
    blas.scipy_openblas_set_num_threads64_(before)
    assert (inside, after) == ([1, 1, 1, 1], 3)


def test_several_threads_may_use_one_model(monkeypatch):
    """One passes through the layers at a time, the others wait."""
    uses = [
        lambda model: list(model.generate([1], 20, rng=1)),
        lambda model: list(model.generate([2], 20, rng=2)),
        lambda model: [model.token_losses([1], [[i, 2]])[0].tolist() for i in range(20)],
        lambda model: [model.token_losses([2, i], [[i, 4]])[0].tolist() for i in range(20)],
        lambda model: [model.forward([[i] * 8], [[2] * 8], train=False) for i in range(20)],
    ]
    expected = [use(sharp_model(1, 8)) for use in uses]
    model = sharp_model(1, 8)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with concurrent.futures.ThreadPoolExecutor(len(uses)) as pool:
        found = list(pool.map(lambda use: use(model), uses))
    sys.setswitchinterval(interval)
    assert found == expected


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_by_rows_adds_the_sums_of_its_blocks_in_their_order(threads, add, monkeypatch):
    """Whichever thread has computed which; and other arguments reach each block as they are."""
    monkeypatch.setattr(gpt2, "THREADS", threads)
    x = np.random.default_rng(0).standard_normal((3, 50, 5), np.float32)
    x[..., 0] = np.arange(150).reshape(3, 50)
    blocks = {}

    def layer(out, total, x, weight, add):
        np.multiply(x, weight, out=out)
        gpt2.accumulate(total, x.sum(axis=(0, 1)), add)
        blocks[x[0, 0, 0]] = x.copy(), total

    out, total = np.full_like(x, np.nan), np.ones(5, np.float32)
    gpt2.by_rows(layer, "out x", "total", 200)(out, total, x, np.float32(2), add)
    assert np.array_equal(out, 2 * x)
    blocks = [blocks[first] for first in sorted(blocks)]
    assert len(blocks) > 10 and all(rows.nbytes <= 200 for rows, _ in blocks)
    assert np.array_equal(np.concatenate([rows for rows, _ in blocks], axis=1)[0], x.reshape(-1, 5))
    expected = functools.reduce(np.add, [own for _, own in blocks])
    assert np.array_equal(total, expected + 1 if add else expected)

    sum_of = gpt2.by_rows(lambda x: float(x.sum(dtype=np.float64)), "x", block_bytes=200)
    assert sum_of(x.reshape(-1)) == pytest.approx(x.sum(dtype=np.float64), rel=1e-12)


# --------------------------------------------------------------------------------------------------
# The limits of the machine, read from files of a made-up one with 8 cores and 32 MiB

MIB = 1 << 20
CORES, MEMORY = "cores_allowed", "available_memory"
V1_CPU = {"cpu/cpu.cfs_quota_us": "300", "cpu/cpu.cfs_period_us": "100"}
V1_CPU_INSIDE = {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100"}
V1_MEMORY = {"memory/memory.limit_in_bytes": 4, "memory/memory.usage_in_bytes": 3}
NESTED = {"a/memory.max": 10, "a/memory.current": 7, "a/b/memory.max": 8, "a/b/memory.current": 1}
V1_FILES = f"inactive_file 9\nactive_file 9\ntotal_inactive_file {MIB}\ntotal_active_file 0\n"
FILES = f"anon 9\ninactive_file {3 * MIB}\nactive_file {2 * MIB}\n"


@NEEDS_LINUX
@pytest.mark.parametrize(
    "limit, groups, files, expected",
    [
        (CORES, None, {}, 8),
        (CORES, "0::/", {"cpu.max": "max 100"}, 8),
        (CORES, "0::/", {"cpu.max": "50 100"}, 1),
        (CORES, "0::/", {"cpu.max": "250 100"}, 3),
        (CORES, "0::/", {"cpu.max": "9900 100"}, 8),
        (CORES, "0::/docker/12ab", {"cpu.max": "200 100"}, 2),  # a path of the host, not mounted
        (CORES, "0::/a/b:c", {"a/cpu.max": "200 100", "a/b:c/cpu.max": "400 100"}, 2),
        (CORES, "0::/a", {"b/cpu.max": "100 100"}, 8),  # another group's
        (CORES, "4:cpu:/a", V1_CPU | V1_CPU_INSIDE, 3),
        (MEMORY, None, {}, 32),
        (MEMORY, "0::/", {"memory.max": "max", "memory.current": 9}, 32),
        (MEMORY, "0::/a/b", NESTED, 3),
        (MEMORY, "0::/", {"memory.max": 1, "memory.current": 2}, 0),
        (MEMORY, "0::/", {"memory.max": 8, "memory.current": 7, "memory.stat": FILES}, 6),
        (MEMORY, "9:memory:/a", V1_MEMORY, 1),
        (MEMORY, "9:memory:/a", V1_MEMORY | {"memory/memory.stat": V1_FILES}, 2),
    ],
)
def test_the_least_limit_of_a_group_and_those_around_it_holds(
    limit, groups, files, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    files = {f"sys/fs/cgroup/{path}": text for path, text in files.items()}
    files["proc/meminfo"] = "MemTotal: 9 kB\nMemAvailable: 32768 kB\nHugePages_Total: 0\n"
    if groups:
        files["proc/self/cgroup"] = groups + "\n"
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(str(text * MIB if isinstance(text, int) else text))
    unit = MIB if limit == MEMORY else 1
    assert getattr(gpt2, limit)(str(tmp_path)) == expected * unit


@pytest.mark.parametrize(
    "openblas, omp, processes, threads",
    [("5", "", 1, 5), ("", "4,2", 1, 4), ("3", "7", 2, 3), ("many", "0", 1, 6), ("", "", 4, 1)],
)
def test_threads_are_what_the_user_names_or_a_share(openblas, omp, processes, threads, monkeypatch):
    """A share of the six cores that the processes of a run may use together."""
    monkeypatch.setattr(gpt2, "cores_allowed", lambda: 6)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", openblas)
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert gpt2.threads_wanted(processes) == threads


# --------------------------------------------------------------------------------------------------
# Numbers that are known from elsewhere: llm.c and OpenAI's weights

GREEDY = "373 1043 287 257 2214 1474 262 16246 286 2688 290 2688 27262 13 198 198 464 3290"


@pytest.mark.slow
def test_gpt2_itself(capsys):
    """The table with the losses of llm.c's test, and a text."""
    files = gpt2.in_data("gpt2.safetensors"), test_gpt2.GOLDEN_TOKENS
    if not all(map(os.path.exists, files)):
        pytest.skip("needs GPT-2's weights and tokens in data/: run `python train_gpt2.py` once")
    model = gpt2.GPT2.from_pretrained("gpt2", 1, 64, training=False)
    assert " ".join(map(str, model.generate([464, 3290], 18, temperature=0))) == GREEDY
    assert test_gpt2.main(["--model", "gpt2"]) == 0, capsys.readouterr().out
