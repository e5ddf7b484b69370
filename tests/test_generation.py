"""Generation and the likelihood of texts beside the PyTorch reference, and sampling."""

import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt2 as gpt2
from test_gpt2 import (  # noqa: F401  the fixture works wherever it is imported
    BOTH_FLOATS,
    EVERY_LAYOUT,
    LAYOUTS,
    TOLERANCE,
    TorchGPT2,
    one_thread_for_pytorch,
    torch_losses,
)
from train_gpt2 import InputError


def sharp_model(B, T, dtype=np.float64, **layout):
    """A model whose predictions differ from place to place."""
    config = gpt2.GPT2Config(16, 256, 3, 2, 16)
    model = gpt2.GPT2(config, B, T, seed=5, dtype=dtype, **layout)
    for name in ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"):
        model.params[name] *= 15
    model.params["lnfw"][::2] = -1  # or else wte, being the classifier too, repeats each token
    return model


def generate_by_torch(model, tokens, number, temperature, top_k, rng):
    """The reference sees the whole window for each token, and nothing is kept."""
    reference = TorchGPT2(model.config, model.params).double()
    T = model.sequence_length
    window = list(tokens)[-T:]
    new = []
    for _ in range(number):
        if len(window) > T:
            window = window[-max(1, T // 2) :]
        with torch.no_grad():
            logits = reference.logits(torch.tensor([window]))[0, -1].numpy()
        if temperature == 0:
            window.append(int(np.argmax(logits)))
        else:
            if 0 < top_k < len(logits):
                logits[np.argsort(logits)[:-top_k]] = -np.inf
            probs = np.exp((logits - logits.max()) / temperature)
            drawn = float(rng.random(dtype=np.float32)) * probs.sum()
            window.append(next(i for i, sum in enumerate(probs.cumsum()) if sum > drawn))
        new.append(window[-1])
    return new


@pytest.mark.parametrize("T", [16, 7, 2, 1])
@pytest.mark.parametrize("prompt", [1, 5, 40])
@pytest.mark.parametrize(
    "temperature, top_k", [(0, 0), (1.0, 0), (0.7, 3), (1.5, 1), (0.3, 500), (0, 4)]
)
def test_generation_equals_pytorch(T, prompt, temperature, top_k):
    """With kept keys and values, far past the context's end, from a prompt longer than it."""
    prompt = [(7 * i) % 256 for i in range(prompt)]
    model = sharp_model(2, T)
    settings = 25, temperature, top_k
    expected = generate_by_torch(model, prompt, *settings, np.random.default_rng(3))
    assert list(model.generate(prompt, *settings, rng=np.random.default_rng(3))) == expected
    assert list(model.generate(prompt, *settings, rng=3)) == expected
    assert len(set(expected)) > 1

    greedy = temperature == 0 or top_k == 1
    assert greedy == (list(model.generate(prompt, *settings, rng=4)) == expected)
    assert greedy == (list(model.generate(prompt, 25, temperature=0)) == expected)


@EVERY_LAYOUT
def test_generation_is_the_same_whatever_is_kept(layout):
    expected = list(sharp_model(1, 9).generate([1, 2, 3], 20, temperature=0))
    model = sharp_model(1, 9, **LAYOUTS[layout])
    assert list(model.generate([1, 2, 3], 20, temperature=0)) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize(
    "layout, positions",
    [
        ("recompute 1", [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]),
        ("recompute 2", [3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4]),  # nothing is kept
    ],
)
def test_each_generated_token_costs_one_position(layout, positions, monkeypatch):
    """By hand, with T = 8 and a prompt of 3 tokens: one position at a time, until there are 8.

    When there are 9, the newer 4 begin again.
    """
    model = sharp_model(1, 8, **LAYOUTS[layout])
    calls = []
    matmul_forward = gpt2.matmul_forward

    def counting(out, inp, weight, bias=None):
        calls.append((weight.shape, math.prod(inp.shape[:-1])))
        matmul_forward(out, inp, weight, bias)

    monkeypatch.setattr(gpt2, "matmul_forward", counting)
    list(model.generate([1, 2, 3], 12))
    for name in ("qkvw", "attprojw", "fcw", "fcprojw"):
        seen = [n for shape, n in calls if shape == model.params[name].shape[1:]]
        assert seen == np.repeat(positions, 3).tolist()  # in three layers
    assert [n for shape, n in calls if shape == model.params["wte"].shape] == [1] * 12


def test_generation_may_be_interrupted_by_anything():
    """By another generation, a validation or a training step: kept keys are not mixed up."""
    model = sharp_model(1, 8)
    expected = [list(sharp_model(1, 8).generate([token], 20, rng=token)) for token in (1, 2)]
    one, two = (model.generate([token], 20, rng=token) for token in (1, 2))
    found = [], []
    for i in range(20):
        found[0].append(next(one))
        if i % 3 == 0:
            model.forward(np.full((1, 8), i), np.full((1, 8), i), train=i % 2 == 0)
        found[1].append(next(two))
    assert list(found) == expected


@pytest.mark.parametrize("train", [False, True])
def test_generation_goes_on_after_a_forward_pass(train):
    """Which has overwritten its keys and values."""
    expected = list(sharp_model(1, 8).generate([1], 6, rng=1))
    model = sharp_model(1, 8)
    tokens = model.generate([1], 6, rng=1)
    found = [next(tokens), next(tokens)]
    model.forward(np.full((1, 8), 9), np.full((1, 8), 9), train=train)
    assert found + list(tokens) == expected


def test_generation_goes_on_with_the_parameters_of_an_update():
    """A generator that has run between backward() and update() must not keep its old keys."""
    batch = np.full((1, 16), 9), np.full((1, 16), 3)
    prompt = list(range(40, 50))
    model = sharp_model(1, 16)
    tokens = model.generate(prompt, 6, temperature=0)
    model.forward(*batch)
    model.backward()
    first = next(tokens)
    model.update(0.1)
    expected = list(model.generate([*prompt, first], 5, temperature=0))

    model = sharp_model(1, 16)
    tokens = model.generate(prompt, 6, temperature=0)
    model.forward(*batch)
    model.backward()
    next(tokens)
    model.update(0.1)
    assert list(tokens) == expected
    assert expected != list(sharp_model(1, 16).generate([*prompt, first], 5, temperature=0))


def test_tokens_come_one_by_one():
    endless = sharp_model(1, 4).generate([1], 10**9, rng=0)
    assert [next(endless) for _ in range(3)] == list(sharp_model(1, 4).generate([1], 3, rng=0))


def test_without_rng_each_call_draws_anew():
    model = sharp_model(1, 4)
    texts = {tuple(model.generate([1], 30)) for _ in range(5)}
    assert len(texts) == 5
    assert list(model.generate([1], 30, rng=0)) == list(model.generate([1], 30, rng=0))


def test_a_text_of_bytes_is_a_prompt():
    expected = list(sharp_model(1, 4).generate([107, 105], 9, rng=0))
    for prompt in (b"ki", bytearray(b"ki"), (107, 105), np.array([107, 105], np.uint8)):
        assert list(sharp_model(1, 4).generate(prompt, 9, rng=0)) == expected


@pytest.mark.parametrize("prompt", [[], [1, 256], [-1], [1.5], ["a"]])
def test_a_prompt_that_is_no_text_is_an_input_error_at_once(prompt):
    with pytest.raises(InputError, match="prompt: "):
        sharp_model(1, 4).generate(prompt, 1)


# ---- The likelihood of a text


def text(start, n):
    return [(start + 11 * i * i) % 256 for i in range(n)]


def whole_losses(model, context, continuation):
    """The losses of a continuation's tokens by forward() on the joined sequence, nothing kept."""
    tokens = np.array([[*context, *continuation]])
    n = tokens.size - 1
    other = gpt2.GPT2(model.config, 1, n, None, dtype=model.blob.dtype)
    other.flat[0] = model.flat[0]
    mean = other.forward(tokens[:, :-1], tokens[:, 1:], train=False)
    losses = other.acts["losses"][0]
    assert losses.mean() == pytest.approx(mean, rel=1e-12)
    return losses[len(context) - 1 :]


@pytest.mark.parametrize("logits_rows", [gpt2.LOGITS_ROWS, 4])
@pytest.mark.parametrize("context", [1, 2, 7])
@pytest.mark.parametrize("lengths", [[1], [10], [3, 1, 10, 4, 4]])
@BOTH_FLOATS
def test_token_losses_equal_those_of_the_whole_text(
    context, lengths, logits_rows, dtype, monkeypatch
):
    """Of a forward pass on context and continuation, and of the reference."""
    monkeypatch.setattr(gpt2, "LOGITS_ROWS", logits_rows)
    model = sharp_model(1, 3, dtype)
    context = text(5, context)
    continuations = [text(40 * i, n) for i, n in enumerate(lengths)]
    found = model.token_losses(context, continuations)
    assert [losses.shape for losses in found] == [(n,) for n in lengths]

    reference = TorchGPT2(model.config, model.params).double()
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    for losses, tokens in zip(found, continuations, strict=True):
        np.testing.assert_allclose(losses, whole_losses(model, context, tokens), tolerance)
        inputs = torch.tensor([[*context, *tokens]])
        with torch.no_grad():
            truth = torch_losses(reference.logits(inputs[:, :-1]), inputs[:, 1:])
        truth = truth.reshape(-1).numpy()[len(context) - 1 :]
        np.testing.assert_allclose(losses, truth, 10 * TOLERANCE[np.dtype(dtype)])
    assert lengths == [1] or np.ptp(np.concatenate(found)) > 1


def test_token_losses_of_more_tokens_than_the_logits_have_rows():
    config = gpt2.GPT2Config(700, 256, 2, 2, 16)
    model = gpt2.GPT2(config, 1, 8, dtype=np.float64)
    model.params["wte"] *= 30
    for context, length in ((1, 700), (300, 401), (650, 3)):
        context, tokens = text(5, context), text(9, length)
        [losses] = model.token_losses(context, [tokens])
        np.testing.assert_allclose(losses, whole_losses(model, context, tokens), 1e-12)
    assert model.reader.acts["logits"].shape == (1, gpt2.LOGITS_ROWS, 256)


def test_each_continuation_stands_alone():
    """Neither its neighbours nor earlier texts change it, but for the classifier's last bits."""
    model = sharp_model(1, 16)
    parts = text(1, 9), text(2, 1), text(3, 5)
    alone = [sharp_model(1, 16).token_losses([7, 8, 9], [tokens])[0] for tokens in parts]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0], [2]):
        model.token_losses([1, 2], [[3]])
        found = model.token_losses(np.array([7, 8, 9], np.uint16), [parts[i] for i in order])
        for x, i in zip(found, order, strict=True):
            np.testing.assert_allclose(x, alone[i], 1e-13)
    assert model.token_losses([1, 2], []) == []


@EVERY_LAYOUT
@pytest.mark.parametrize("B, T", [(1, 1), (3, 2), (2, 16)])
def test_token_losses_need_no_batch_and_no_training(layout, B, T):
    context, tokens = text(5, 4), text(9, 12)
    expected = sharp_model(1, 16).token_losses(context, [tokens])
    model = sharp_model(B, T, **LAYOUTS[layout])
    assert model.token_losses(context, [tokens])[0].tobytes() == expected[0].tobytes()


def test_token_losses_are_those_of_the_parameters_as_they_are():
    """The second model that computes them has the parameters of the first, and no copy."""
    model = sharp_model(1, 16)
    batch = np.array([text(1, 16)]), np.array([text(2, 16)])
    seen = set()
    for _ in range(3):
        [losses] = model.token_losses([1, 2], [[3, 4]])
        np.testing.assert_allclose(losses, whole_losses(model, [1, 2], [3, 4]), 1e-12)
        seen.add(losses.tobytes())
        model.forward(*batch)
        model.backward()
        model.update(0.01)
    model.params["wte"][...] = 0
    [losses] = model.token_losses([1, 2], [[3, 4]])
    np.testing.assert_allclose(losses, np.log(256), 1e-12)
    assert len(seen) == 3


def test_token_losses_leave_the_model_as_it_was():
    """In the midst of a step, and of a text that is being generated."""
    model = sharp_model(1, 8)
    batch = np.array([text(1, 8)]), np.array([text(2, 8)])
    expected = list(sharp_model(1, 8).generate([1], 7, temperature=0))

    def unchanged():
        before, stage = model.blob.tobytes(), model.stage
        model.token_losses([1, 2, 3], [[4, 5], [6]])
        assert model.blob.tobytes() == before and model.stage == stage

    tokens = model.generate([1], 7, temperature=0)
    found = [next(tokens), next(tokens)]
    owner = model.keys_owner
    unchanged()
    assert model.keys_owner is owner  # so the keys and values need not be computed again
    assert found + list(tokens) == expected
    for call in (lambda: model.forward(*batch), model.backward, lambda: model.update(0.1)):
        call()
        unchanged()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)  # fmt: skip
def test_a_copy_has_token_losses_of_its_own(copied):
    model = sharp_model(1, 4)
    before = model.token_losses([1], [[2, 3]])[0].tobytes()
    twin = copied(model)
    assert twin.token_losses([1], [[2, 3]])[0].tobytes() == before
    twin.params["wte"][...] = 0
    np.testing.assert_allclose(twin.token_losses([1], [[2, 3]])[0], np.log(256), 1e-12)
    assert model.token_losses([1], [[2, 3]])[0].tobytes() == before


def test_a_text_may_be_as_long_as_the_models_context():
    """Of 16 tokens, and one more: nothing is predicted from the last one."""
    model = sharp_model(1, 4)
    for n in (1, 5, 16):
        model.token_losses(text(1, n), [text(2, 17 - n)])
        with pytest.raises(InputError, match="^context and continuation have 18 .* at most 17$"):
            model.token_losses(text(1, n), [[1], text(2, 18 - n)])


@pytest.mark.parametrize(
    "context, continuations, what",
    [
        ([], [[1]], "context"),
        ([256], [[1]], "context"),
        ([1], [[1], []], "continuation"),
        ([1], [[1], [-1]], "continuation"),
        ([1.0], [[1]], "context"),
    ],
)
def test_what_is_no_text_is_an_input_error(context, continuations, what):
    with pytest.raises(InputError, match=f"^{what}: ") as caught:
        sharp_model(1, 4).token_losses(context, continuations)
    assert str(caught.value).isprintable()


# ---- Sampling


@pytest.mark.parametrize(
    "temperature, top_k, weights",
    [
        (1, 0, [1, 2, 3, 4]),
        (0.5, 0, [1, 4, 9, 16]),
        (2, 4, [1, 2**0.5, 3**0.5, 2]),
        (1, 2, [0, 0, 3, 4]),
        (1, 1, [0, 0, 0, 1]),
        (0, 0, [0, 0, 0, 1]),
        (1e-40, 0, [0, 0, 0, 1]),
    ],
)
def test_sampling_follows_the_distribution(temperature, top_k, weights):
    """By hand: logits ln 1, ln 2, ln 3, ln 4 have the weights 1, 2, 3, 4 at temperature 1.

    Of 4000 draws, each id's share is within five standard deviations of its probability.
    """
    logits = np.log(np.array([1, 2, 3, 4], np.float32))
    rng = np.random.default_rng(0)
    draws = [gpt2.sample(logits, temperature, top_k, rng) for _ in range(4000)]
    p = np.array(weights) / sum(weights)
    found = np.bincount(draws, minlength=4)
    assert (abs(found - 4000 * p) <= 5 * np.sqrt(4000 * p * (1 - p))).all()
    assert logits[0] == 0  # they are only read


def test_large_logits_do_not_overflow():
    logits = np.array([990, 1000, -1000], np.float32)
    rng = np.random.default_rng(0)
    assert {gpt2.sample(logits, 1.0, 0, rng) for _ in range(100)} == {1}


def test_sampling_from_nan_gives_some_token():
    """A run that has diverged must come to its next check, which says so, and not end here."""
    for logits in (np.full(5, np.nan, np.float32), np.array([0, np.nan, 1], np.float32)):
        for temperature in (0, 1.0):
            token = gpt2.sample(logits, temperature, 0, np.random.default_rng(0))
            assert 0 <= token < len(logits)


def test_rounding_never_leads_beyond_the_last_token():
    below_one = SimpleNamespace(random=lambda dtype: np.nextafter(dtype(1), dtype(0)))
    for size in (2, 3, 1000, 50257):
        logits = np.linspace(0, 1, size, dtype=np.float32)
        assert gpt2.sample(logits, 1.0, 0, below_one) == size - 1
