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
# The order of calls, and what they are given


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
        ("forward1", "update norm", "first forward"),
        ("forward1 backward zero", "backward update", "no gradients"),
        ("forward1 backward update", "update norm", "no gradients"),
        # By now the activations are those of another pass.
        ("forward1 validate", "backward", "no gradients"),
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
        ("forward1 validate forward1 score forward2 backward", "forward2 backward"),
        # Gradients begin anew after an update, and after zero_grad.
        ("forward1 backward update forward2 backward", "forward2 backward"),
        ("forward1 backward zero forward2 backward", "forward2 backward"),
        ("forward1 backward forward1 zero forward2 backward", "forward2 backward"),
        # Validation, generation and scores change no gradient.
        ("score forward1 backward validate generate norm score", "forward1 backward"),
        ("forward1 backward generate forward2 backward", "forward1 backward forward2 backward"),
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
        ("forward1 backward", "validate", "crossentropy_softmax_forward", 1, False),
        ("forward1 backward", "generate", "gelu_forward", 2, False),
    ],
)
def test_what_is_half_done_is_not_used(story, call, function, number, spoilt, monkeypatch):
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


GOOD = BATCHES[0][1]
TOO_HIGH, TOO_LOW = GOOD + 53 - GOOD.max(), GOOD - GOOD.min() - 1  # one of its ids is


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda model: model.forward(TOO_HIGH, GOOD), "^inputs: ids .* to 53, expected 0 to 52"),
        (lambda model: model.forward(GOOD, TOO_LOW), "^targets: ids -1 to"),
        (lambda model: model.forward(GOOD, GOOD[:, :8]), r"^targets: .*\(2, 9\), found \(2, 8\)"),
        (lambda model: model.forward(GOOD * 1.0, GOOD), "^inputs: .* integers.* float64"),
        (lambda model: model.update(0.1, step=0), r"step=0.* from 1"),
        (lambda model: model.generate([[1, 2]], 1), r"^prompt: .*\(2,\), found \(1, 2\)"),
        (lambda model: model.generate([], 1), "^prompt: "),
        (lambda model: model.generate("ab", 1), "^prompt: found a text"),
        (lambda model: model.generate([1], 1, temperature=float("nan")), "^temperature is nan"),
        (lambda model: model.token_losses([53], [[1]]), "^context: .* 53"),
        (lambda model: model.token_losses([1], [[1], []]), "^continuation: "),
        (lambda model: model.token_losses([1], [[1], [2] * 10]), "have 11 tokens, at most 10"),
        (lambda model: random_model(0, 9), "batch size 0"),
        (lambda model: random_model(1, -1), "length -1"),
        (lambda model: random_model(1, 9, max_seq_len=8), "length 9.* 8"),
        (lambda model: random_model(1, 9, recompute=5), "recompute is 5"),
        (lambda model: random_model(1, 9, dtype=np.float16), "float16"),
        (lambda model: random_model(1, 9, C=23), "23 channels.* 3 heads"),
        (lambda model: random_model(1, 9, L=True), "num_layers is True"),
        (lambda model: random_model(1, 9, V=0), "vocab_size is 0"),
        (lambda _: told("forward1 backward", random_model(2, 9, training=False)), "no gradients"),
        (lambda model: model.params.update({"wte": GOOD}), r"^\['wte'\] is a part of the blob"),
        (lambda model: model.grads.__setitem__("wte", GOOD), r"write \['wte'\]\[...\] = value"),
        (lambda model: model.params.__setitem__("no_such", GOOD), "^'no_such' is none of wte"),
    ],
)
def test_a_slip_is_one_line_and_changes_nothing(call, expected):
    assert_refused(told("forward1 backward"), call, expected)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint16, np.int8])
def test_a_batch_may_be_a_view_of_any_integer_type(dtype):
    """And it may be changed before backward(), as by a loader that fills the same array again."""
    text = np.random.default_rng(3).integers(0, 53, (2, 10)).astype(dtype)
    expected, model = random_model(2, 9), random_model(2, 9)
    expected.forward(text[:, :-1], text[:, 1:])
    inputs = text[:, :-1].copy()
    model.forward(inputs, text[:, 1:].tolist())
    inputs[...] = 0
    expected.backward()
    model.backward()
    assert_same_bits(model.grads, expected.grads)


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
    """Beside the chapter's own generation: far past the context, from a prompt longer than it. The
    prompt may be any sequence of ids, and tokens come one by one.
    """
    prompt = [(7 * i) % 256 for i in range(length)]
    plain = sharp_model(2, T, make=gpt2.Model)
    expected = list(gpt2.generate(plain, prompt, 25, *settings, np.random.default_rng(3)))
    model = sharp_model(2, T, **LAYOUTS[layout])
    for given, rng in ((np.array(prompt), 3), (bytes(prompt), np.random.default_rng(3))):
        endless = model.generate(given, 10**9, *settings, rng=rng)
        assert list(itertools.islice(endless, 25)) == expected
    by_chance = {tuple(model.generate(prompt, 25, *settings)) for _ in range(2)}  # without rng
    greedy = settings[0] == 0 or settings[1] == 1
    assert by_chance == {tuple(expected)} if greedy else len(by_chance) == 2


def test_each_written_token_costs_one_position(monkeypatch):
    """With T = 8 and a prompt of 3. When there are 9 tokens, the newer 4 begin again."""
    seen = []
    watch(monkeypatch, gpt2, "gelu_forward", before=lambda out, inp: seen.append(inp.shape[1]))
    list(sharp_model(1, 8, recompute=1).generate([1, 2, 3], 12, rng=0))
    positions = [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]
    assert seen == np.repeat(positions, 3).tolist()  # in three layers


def test_changed_parameters_are_used_at_once():
    """By a generator that goes on after an update, and by a new one after a change in place, which
    the model does not see.
    """
    model, prompt = sharp_model(1, 16), list(range(40, 50))
    write = lambda model: list(model.generate(prompt, 5, temperature=0))
    model.forward(np.full((1, 16), 9), np.full((1, 16), 3))
    model.backward()
    tokens = model.generate(prompt, 6, temperature=0)
    prompt.append(next(tokens))
    model.update(0.1)
    before = write(sharp_model(1, 16))
    assert list(tokens) == write(copy.deepcopy(model)) != before

    model = sharp_model(1, 16)
    write(model)
    model.params["wpe"] *= -1
    assert write(model) == write(copy.deepcopy(model)) != before


@EVERY_LAYOUT
@pytest.mark.parametrize("rows", [256, 4])
@pytest.mark.parametrize("context, lengths", [(1, [1]), (7, [3, 1, 10, 4]), (1, [16])])
def test_token_losses_equal_those_of_the_whole_text(layout, rows, context, lengths, monkeypatch):
    """Of any model, whatever its batches, with the parameters as they are."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", rows)
    model = sharp_model(3, 16, **LAYOUTS[layout])
    context = [(5 + 11 * i * i) % 256 for i in range(context)]
    texts = [[(40 * n + 7 * i * i) % 256 for i in range(n)] for n in lengths]
    for _ in range(2):
        found = model.token_losses(np.array(context, np.uint16), texts)
        for losses, text in zip(found, texts, strict=True):
            tokens = np.array([context + text])
            plain = sharp_model(1, tokens.size - 1, make=gpt2.Model)
            plain.flat[0] = model.flat[0]
            plain.forward(tokens[:, :-1], tokens[:, 1:], train=False)
            expected = plain.acts["losses"][0, len(context) - 1 :]
            np.testing.assert_allclose(losses, expected, 1e-12)
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

    found = gpt2.parallel(functools.partial(divide, -1), range(2 * threads))
    assert found == [1 / (i + 1) for i in range(2 * threads)]
    for bad in range(threads):
        with pytest.raises(ZeroDivisionError):
            gpt2.parallel(functools.partial(divide, bad), range(threads))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_process_has_a_lock_and_threads_of_its_own(monkeypatch):
    """os.fork copies no threads, so a child that waited for its parent's would wait for ever."""
    monkeypatch.setattr(gpt2, "THREADS", 3)
    gpt2.parallel(abs, range(3))  # now the threads are there
    with gpt2.blas_held_to(1), multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(gpt2.parallel, [abs, range(4)]).get(timeout=60) == [0, 1, 2, 3]


@pytest.mark.parametrize("threads", [1, 2])
def test_blas_has_one_thread_in_a_task_and_afterwards_what_it_had(threads, monkeypatch):
    blas = ctypes.CDLL(np._core._multiarray_umath.__file__)
    if not hasattr(blas, "scipy_openblas_get_num_threads64_"):
        pytest.skip("needs the BLAS of NumPy's wheels: pip install numpy")
    monkeypatch.setattr(gpt2, "THREADS", threads)
    before = blas.scipy_openblas_get_num_threads64_()
    blas.scipy_openblas_set_num_threads64_(3)
    inside = gpt2.parallel(lambda i: blas.scipy_openblas_get_num_threads64_(), range(4))
    after = blas.scipy_openblas_get_num_threads64_()
    blas.scipy_openblas_set_num_threads64_(before)
    assert (inside, after) == ([1, 1, 1, 1], 3)


USES = [  # each gives twenty results
    lambda model: model.generate([1], 20, rng=1),
    lambda model: zip(*[model.generate([2], 40, rng=2)] * 2, strict=True),  # two tokens at a time
    lambda model: (model.token_losses([2, i], [[i, 4]])[0].tolist() for i in range(20)),
    lambda model: (model.token_losses([1], [[i, 2]])[0].tolist() for i in range(20)),
    lambda model: (model.forward([[i] * 8], [[2] * 8], train=i % 2 == 0) for i in range(20)),
]


def test_one_model_may_be_used_in_turns_and_by_several_threads():
    """One passes through the layers at a time, and kept keys are not mixed up."""
    expected = [list(use(sharp_model(1, 8))) for use in USES]
    model = sharp_model(1, 8)
    logits = [model.next_logits([token]) for token in (1, 2)]
    assert not np.array_equal(*logits)  # the first ones are still its own
    rounds = zip(*[use(model) for use in USES], strict=True)
    assert list(map(list, zip(*rounds, strict=True))) == expected

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with concurrent.futures.ThreadPoolExecutor(len(USES)) as pool:
        found = list(pool.map(lambda use: list(use(model)), USES))
    sys.setswitchinterval(interval)
    assert found == expected


# --------------------------------------------------------------------------------------------------
# The limits of the machine, read from files of a made-up one with 8 cores and 32 MiB

MIB = 1 << 20
CORES, MEMORY = "cores_allowed", "available_memory"
CPUS = "../../devices/system/cpu/cpu"
SIBLINGS = {f"{CPUS}{i}/topology/thread_siblings_list": "1-2" for i in (1, 2)}
NESTED = {"a/memory.max": 10, "a/memory.current": 7, "a/b/memory.max": 8, "a/b/memory.current": 1}
FILES = f"anon 9\ninactive_file {3 * MIB}\nactive_file {2 * MIB}\n"


@NEEDS_LINUX
@pytest.mark.parametrize(
    "limit, groups, files, expected",
    [
        (CORES, None, {}, 8),
        (CORES, None, SIBLINGS, 7),
        (CORES, None, {CPUS + "1/cpu_capacity": "400"}, 7),  # the others would wait for it
        (CORES, "0::/", {"cpu.max": "max 100"}, 8),
        (CORES, "0::/", {"cpu.max": "250 100"}, 3),
        (CORES, "0::/", {"cpu.max": "9900 100"}, 8),
        (CORES, "0::/docker/12ab", {"cpu.max": "200 100"}, 2),  # a path of the host, not mounted
        (CORES, "0::/a/b:c", {"a/cpu.max": "200 100", "a/b:c/cpu.max": "400 100"}, 2),
        (CORES, "4:cpu:/b\n0::/a", {"a/cpu.max": "300 100"}, 3),
        (MEMORY, None, {}, 32),
        (MEMORY, "0::/", {"memory.max": "max", "memory.current": 9}, 32),
        (MEMORY, "0::/a/b", NESTED, 3),
        (MEMORY, "0::/", {"memory.max": 1, "memory.current": 2}, 0),
        (MEMORY, "0::/", {"memory.max": 8, "memory.current": 7, "memory.stat": FILES}, 6),
    ],
)
def test_the_least_limit_holds(limit, groups, files, expected, tmp_path, monkeypatch):
    """Of a control group and those around it."""
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
    monkeypatch.setattr(gpt2, "BLAS", None)  # one whose own threads can't be held back
    assert gpt2.threads_wanted(processes) == 1


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
