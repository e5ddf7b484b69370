"""What several test files share."""

import hashlib
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

import train_gpt2 as gpt2
from test_gpt2 import random_model, random_tokens

TRAINER = os.path.abspath(gpt2.__file__)
NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: run it on Linux")

# --------------------------------------------------------------------------------------------------
# GPT-2's vocabulary

VOCABULARY_FOLDER = os.path.abspath(os.environ.get("TIKTOKEN_CACHE_DIR") or "data/tiktoken")
VOCABULARY_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
VOCABULARY_FILES = {  # tiktoken calls them by the SHA-1 of their addresses
    name: os.path.join(
        VOCABULARY_FOLDER, hashlib.sha1((VOCABULARY_ADDRESS + name).encode()).hexdigest()
    )
    for name in ("vocab.bpe", "encoder.json")
}


def need_gpt2_vocabulary():
    if not all(map(os.path.isfile, VOCABULARY_FILES.values())):
        pytest.skip("needs GPT-2's vocabulary in data/tiktoken: run prepro_tinyshakespeare.py")


# --------------------------------------------------------------------------------------------------
# Token files, and the trainer as a process


def token_file(path, tokens, vocab_size=0, crc32=0):
    """A path, at which there is a file of tokens now."""
    header = struct.pack("<5I", 20240520, 1, len(tokens), vocab_size, crc32)
    path.write_bytes(header.ljust(1024, b"\0") + np.asarray(tokens, "<u2").tobytes())
    return str(path)


NOBODY = "http://127.0.0.1:9"  # no server listens there
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HF_ENDPOINT"), NOBODY)
NO_NETWORK |= {"NO_PROXY": "", "no_proxy": ""}


def run_trainer(*flags, cwd, env=None, program=(TRAINER,), under=()):
    """The trainer as a user runs it, without a network: (exit code, stdout, stderr).

    program   what Python runs, in place of the trainer: a path, or "-m", "extras.hellaswag"
    under     the command that starts Python: mpiexec, for instance
    """
    done = subprocess.run(
        [str(word) for word in (*under, sys.executable, *program, *flags)],
        cwd=cwd,
        env={**os.environ, **NO_NETWORK, "PYTHONPATH": os.path.dirname(TRAINER), **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def failed_in_one_line(result):
    """The one line with which a program ended, with exit code 1 and no traceback."""
    code, _, error = result
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, result
    return error


# --------------------------------------------------------------------------------------------------
# Models. A story is a sequence of calls, told in words

BATCHES = random_tokens(2, B=2, T=9)
CALLS = {
    "forward1": lambda model: model.forward(*BATCHES[0], grad_scale=0.5),
    "forward2": lambda model: model.forward(*BATCHES[1], grad_scale=0.5),
    "validate": lambda model: model.forward(*BATCHES[0], train=False),
    "generate": lambda model: list(model.generate([1, 2, 3], 12, rng=0)),
    "score": lambda model: model.token_losses([1, 2], [[3], [4, 5]]),
    "backward": lambda model: model.backward(),
    "norm": lambda model: model.grad_norm(),
    "update": lambda model: model.update(0.0),  # which leaves the parameters as they are
    "zero": lambda model: model.zero_grad(),
}


def told(story, model=None):
    """A model that has been through a story."""
    model = model or random_model(2, 9)
    for word in story.split():
        CALLS[word](model)
    return model


def sharp_model(B, T, dtype=np.float64, make=gpt2.GPT2, **layout):
    """A model of bytes whose predictions differ from place to place."""
    model = make(gpt2.GPT2Config(16, 256, 3, 2, 16), B, T, seed=5, dtype=dtype, **layout)
    for name in ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"):
        model.params[name] *= 15
    model.params["lnfw"][::2] = -1  # or else wte, being the classifier too, repeats each token
    return model
