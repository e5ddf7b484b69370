"""Numbers that are known from elsewhere: llm.c and OpenAI's weights."""

import os

import pytest
import torch
from common import file_model, loaded

import train_gpt2 as gpt2
from test_gpt2 import GOLDEN_LOSSES, TorchGPT2, overfit, random_tokens

GOLDEN_TOKENS = [
    373, 1043, 287, 257, 2214, 1474, 262, 16246, 286,
    2688, 290, 2688, 27262, 13, 198, 198, 464, 3290,
]  # fmt: skip


def test_overfitting_decays_all_parameters():
    """The golden test's own arithmetic beside PyTorch's AdamW, on a model that needs no network."""
    model = file_model()
    inputs, targets = random_tokens(B=2, T=8, V=61)
    reference = TorchGPT2(model.config, model.params).double()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=5.0)
    losses = []
    for _ in range(10):
        loss = reference(torch.from_numpy(inputs), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    ours = overfit(model, inputs, targets, learning_rate=1e-2, decay=5.0)
    assert ours == pytest.approx(losses, rel=1e-5)


def test_golden_losses_and_greedy_continuation():
    weights = gpt2.in_data("gpt2.safetensors")
    tokens = gpt2.in_data("tiny_shakespeare_val.bin")
    if not (os.path.exists(weights) and os.path.exists(tokens)):
        pytest.skip(
            "needs GPT-2's weights and Tiny Shakespeare's tokens in data/: run "
            "`python train_gpt2.py` once, with a network"
        )
    model = loaded(weights, 4, 64)
    assert list(model.generate([464, 3290], len(GOLDEN_TOKENS), temperature=0)) == GOLDEN_TOKENS
    batch = gpt2.DataLoader([gpt2.TokenFile(tokens)], 4, 64).next_batch()
    losses = overfit(model, *batch, learning_rate=1e-4, decay=0.01)
    assert losses[0] == pytest.approx(GOLDEN_LOSSES[0], abs=1e-4)
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=1e-3)  # each update magnifies rounding
