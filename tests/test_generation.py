"""Generation beside the PyTorch reference, and sampling."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt2 as gpt2
from test_gpt2 import (  # noqa: F401  the fixture works wherever it is imported
    EVERY_LAYOUT,
    LAYOUTS,
    TorchGPT2,
    one_thread_for_pytorch,
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
    endless = sharp_model(1, 4).generate([1], 10**9)
    assert [next(endless) for _ in range(3)] == list(sharp_model(1, 4).generate([1], 3))


def test_without_rng_the_seed_is_0():
    expected = list(sharp_model(1, 4).generate([1], 30, rng=0))
    assert list(sharp_model(1, 4).generate([1], 30)) == expected
    assert list(sharp_model(1, 4).generate([1], 30, rng=1)) != expected


@pytest.mark.parametrize("prompt", [[], [1, 256], [-1], [1.5], ["a"]])
def test_a_prompt_that_is_no_text_is_an_input_error_at_once(prompt):
    with pytest.raises(InputError, match="prompt: "):
        sharp_model(1, 4).generate(prompt, 1)


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
