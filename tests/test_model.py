"""What can go wrong between a model and its user: wrong batches, copies, types.

The calls in their order, and interrupted ones, are proved in test_gpt2.py.
"""

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

import train_gpt2 as gpt2
from test_gpt2 import (
    BATCHES,
    BOTH_FLOATS,
    EVERY_LAYOUT,
    LAYOUTS,
    assert_same_bits,
    random_model,
    random_tokens,
    told,
    train_steps,
)
from train_gpt2 import InputError


@pytest.mark.parametrize("bad", [-1, 53, 1 << 40])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_an_id_outside_the_vocabulary_is_an_input_error(which, bad):
    batch = {"inputs": BATCHES[0][0].copy(), "targets": BATCHES[0][1].copy()}
    batch[which][1, 3] = bad
    with pytest.raises(InputError, match=f"{which}.*{bad}.* 52"):
        random_model(2, 9).forward(**batch)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (BATCHES[0][0][:, :8], r"\(2, 8\).*\(2, 9\)"),
        (BATCHES[0][0].ravel(), r"inputs.* in 2 dimensions, found \(18,\)"),
        (BATCHES[0][0] * 1.0, "inputs.* integers.* float64"),
        (BATCHES[0][0][:0], "inputs.* integers"),
    ],
)
def test_inputs_that_are_no_batch_are_an_input_error(inputs, message):
    with pytest.raises(InputError, match=message):
        random_model(2, 9).forward(inputs, BATCHES[0][1])


def test_another_batch_size_afterwards_is_an_input_error():
    """The memory is laid out before."""
    model = random_model(2, 9)
    model.batch_size = 4
    with pytest.raises(InputError, match=r"inputs \(4, 9\)"):
        model.forward(*random_tokens(B=4, T=9))


def test_inputs_may_be_changed_before_backward():
    """As a loader does which fills the same array again and again."""
    model = random_model(2, 9)
    inputs, targets = BATCHES[0].copy()
    model.forward(inputs, targets, grad_scale=0.5)
    inputs[...] = targets[...] = 0
    model.backward()
    assert_same_bits(model.grads, told("forward1 backward").grads)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint16, np.int8])
def test_a_batch_may_be_a_view_of_any_integer_type(dtype):
    """text[:, :-1] and text[:, 1:], as one writes it in a notebook, are not contiguous."""
    text = np.random.default_rng(3).integers(0, 53, (2, 9)).astype(dtype)
    found = []
    for inputs, targets in ((text[:, :-1], text[:, 1:]), (text[:, :-1] + 0, text[:, 1:] + 0)):
        model = random_model(2, 8)
        loss = model.forward(inputs, targets)
        model.backward()
        scored = model.token_losses(inputs[0, :3], targets)
        found.append((loss, model.flat[1].tobytes(), [losses.tobytes() for losses in scored]))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)  # fmt: skip
@BOTH_FLOATS
@EVERY_LAYOUT
def test_a_copy_goes_on_as_the_model_would(copied, layout, dtype):
    """Its views are its own blob's. Here it is made between a forward pass and its backward."""
    expected, model = (random_model(2, 9, dtype, **LAYOUTS[layout]) for _ in range(2))
    train = model.training
    steps = "forward1 backward update forward1 backward forward2" if train else "validate"
    twin = copied(told(steps, model))
    told(steps, expected)
    before = model.blob.tobytes()
    for goes_on in (expected, twin):
        if train:
            told("backward", goes_on)
            goes_on.update(1e-2)
        list(goes_on.generate([1, 2, 3], 12, rng=0))
    assert twin.blob.tobytes() == expected.blob.tobytes() != before
    assert model.blob.tobytes() == before
    assert_same_bits(twin.params, expected.params)
    assert vars(twin).keys() == vars(expected).keys()
    assert twin.config == model.config


# ---- In a notebook


@EVERY_LAYOUT
def test_a_view_refuses_another_array_in_its_place(layout):
    """It would be used, and never trained. Its numbers may be changed in every way."""
    model = random_model(2, 9, np.float32, **LAYOUTS[layout])
    before = model.blob.tobytes()
    for views in (model.params, model.grads, model.m, model.v, model.acts):
        for name in list(views)[:3]:
            ones = np.ones(views[name].shape, np.float32)
            for assign, *values in ((views.__setitem__, name, ones), (views.update, {name: ones})):
                with pytest.raises(InputError) as caught:
                    assign(*values)
                line = str(caught.value)
                assert f"[{name!r}][...] = " in line and line.isprintable()
    with pytest.raises(InputError, match="no_such"):
        model.params["no_such"] = np.ones(3)
    assert model.blob.tobytes() == before

    views = model.params
    expected = views["wpe"] * 3 + 1
    views["wpe"] *= 3
    views["wpe"] += 1
    begin = views["wte"].size
    in_the_blob = model.flat[0, begin : begin + expected.size]
    assert views["wpe"].tobytes() == expected.tobytes() == in_the_blob.tobytes()
    views["wpe"][...] = 7
    views["wte"][0] = 7
    assert (model.flat[0] == 7).sum() >= views["wpe"].size + views["wte"][0].size


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda model: model.generate([[1, 2]], 1), r"prompt: .* 1 dimension.*\(1, 2\)"),
        (lambda model: model.generate(3, 1), "prompt: "),
        (lambda model: model.generate([1], 1, temperature=float("nan")), "temperature is nan"),
        (lambda model: model.generate([1], 1, temperature=-1), "temperature is -1"),
        (lambda model: model.token_losses([[1]], [[2]]), "context: .* 1 dimension"),
        (lambda model: model.token_losses([1], [2]), "continuation: .* 1 dimension"),
        (lambda model: model.token_losses([1], [[2.5]]), "continuation: .* integers"),
        (lambda model: gpt2.GPT2.from_pretrained("outt"), "^'outt': no such model"),
        (lambda model: gpt2.GPT2(model.config, 0, 4), "batch size 0"),
        (lambda model: gpt2.GPT2(model.config, 1, 4000), "sequence length 4000"),
        (lambda model: gpt2.GPT2(model.config, 1, 4, recompute=3), "recompute is 3"),
        (lambda model: gpt2.GPT2(model.config, 1, 4, dtype=np.float16), "float16"),
    ],
)
def test_a_slip_in_a_notebook_is_one_line(wrong, message):
    """At once, in the words of Python and not of the command line."""
    with pytest.raises(InputError, match=message) as caught:
        wrong(random_model(2, 9))
    assert str(caught.value).isprintable() and "--" not in str(caught.value)


@pytest.mark.parametrize("recompute, shared", [(0, False), (1, True), (2, True)])
def test_an_activation_that_the_layers_share_shows_it_in_its_shape(recompute, shared):
    model = random_model(2, 9, np.float32, recompute=recompute)
    assert (len(model.acts["ln1"]) == 1) == shared
    assert len(model.acts["residual3"]) == model.config.num_layers > 1
    assert "(1, ...)" in gpt2.GPT2.__doc__ and "recompute=0 shares none" in gpt2.GPT2.__doc__


class Traced(np.ndarray):
    """An array that watches what is done with it. Every operand and result passes through here."""

    float64 = []  # operations in which there was one, and where
    callers = set()  # functions of the trainer that have been watched

    @classmethod
    def watch(cls, operation, *values):
        frame = sys._getframe(2)
        places = []
        while frame:  # up the stack, through NumPy's own Python, to the trainer
            if frame.f_globals is vars(gpt2):
                cls.callers.add(frame.f_code.co_name)
                places.append(f"line {frame.f_lineno} of {frame.f_code.co_name}")
            frame = frame.f_back
        for x in values:
            if isinstance(x, (np.ndarray, np.generic)) and x.dtype == np.float64:
                cls.float64.append(f"{operation} in {places[0]}")

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        plain = [x.view(np.ndarray) if isinstance(x, Traced) else x for x in (*inputs, *out)]
        if out:
            kwargs["out"] = tuple(plain[len(inputs) :])
        result = getattr(ufunc, method)(*plain[: len(inputs)], **kwargs)
        Traced.watch(ufunc.__name__, result, *plain)
        if out:
            return out[0]
        return result.view(Traced) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function, types, args, kwargs):
        result = super().__array_function__(function, types, args, kwargs)
        Traced.watch(function.__name__, result, *args)
        return result.view(Traced) if type(result) is np.ndarray else result


@pytest.mark.parametrize(
    "constant, value",
    [
        (None, None),
        # With these there is one, to show that it would have been seen.
        ("GELU_SCALE", np.float64(gpt2.GELU_SCALE)),
        ("GELU_CUBE", np.full(96, gpt2.GELU_CUBE)),
        ("LN_EPS", np.float64(gpt2.LN_EPS)),
        ("FUTURE", gpt2.FUTURE.astype(np.float64)),
    ],
    ids=["as it is", "GELU_SCALE", "GELU_CUBE", "LN_EPS", "FUTURE"],
)
def test_no_float64_in_a_float32_run(constant, value, monkeypatch):
    """With one np.float64, NumPy goes on in float64, at half the speed. Nobody would notice."""
    model = random_model(2, 9, np.float32)
    for views in (model.params, model.grads, model.m, model.v, model.acts):
        for name, view in views.items():
            assert view.dtype == np.float32, name
            dict.__setitem__(views, name, view.view(Traced))
    model.flat = model.flat.view(Traced)

    monkeypatch.setattr(Traced, "float64", [])
    monkeypatch.setattr(Traced, "callers", set())
    monkeypatch.setattr(gpt2, "THREADS", 1)  # all in this thread, whose stack is watched
    monkeypatch.setattr(np, "ascontiguousarray", lambda a: a.copy())  # which stays Traced
    if constant:
        monkeypatch.setattr(gpt2, constant, value)
    train_steps(model, 2, random_tokens(2, B=2, T=9))
    model.forward_tokens(np.array([[1, 2]]), start=3)

    assert bool(Traced.float64) == bool(constant), Traced.float64
    layers = {name for name in vars(gpt2) if name.endswith(("_forward", "_backward"))}
    assert layers | {"adamw", "grad_norm"} <= Traced.callers


def test_the_example_at_the_end_of_the_algorithm_trains(tmp_path, monkeypatch, capsys):
    """It stands in a comment. Here it is run as it stands, but for the number of its steps."""
    source = Path(gpt2.__file__).read_text(encoding="utf-8")
    start = source.index("# All of it together")
    lines = source[start : source.index("# ----", start)].splitlines()
    program = "\n".join(line.removeprefix("#     ") for line in lines if line.startswith("#     "))
    assert program.count("1000") == 2
    monkeypatch.chdir(Path(gpt2.__file__).parent)
    exec(program.replace("1000", "30"), vars(gpt2).copy())
    printed = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[1]) for line in printed[:30]]
    assert losses[-1] < losses[0] - 1 and len(printed) > 30
