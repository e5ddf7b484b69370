"""A look inside a model: its arrays beside transformers', and what the program prints."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import (
    TRAINER,
    failed_in_one_line,
    need_gpt2_vocabulary,
    run_command,
    sharp_model,
    succeeded,
)

import train_gpt2 as gpt2
from extras import look_inside
from extras.look_inside import attention, logit_lens
from test_gpt2 import random_model, random_tokens

PROGRAM = ("-m", "extras.look_inside")
SIZES = {"V": 256, "L": 3, "NH": 2, "C": 16, "max_seq_len": 40}
PROMPT = "a é\n\tone byte too long: it has 34"  # the picture of attention has 33 columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of bytes, of GPT-2's tokens and of others, in "bytes", "gpt2s" and "others"."""
    folder = tmp_path_factory.mktemp("models")
    for name, V in (("bytes", 256), ("gpt2s", 50257), ("others", 61)):
        model = random_model(1, 8, np.float32, **SIZES | {"V": V})
        for weights in ("wte", "wpe", "qkvw"):
            model.params[weights] *= 10  # so that neither attention nor predictions are even
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def look(folder, monkeypatch, capsys):
    """look(*flags): the program in this process, beside the models: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def call(*flags):
        code = look_inside.main(list(map(str, flags)))
        return (code, *capsys.readouterr())

    return call


# --------------------------------------------------------------------------------------------------
# The arrays


@pytest.mark.parametrize("recompute", [0, 1])
def test_arrays_equal_those_of_transformers(recompute, tmp_path):
    """Of more positions than attention takes at a time. In float64, transformers is the truth."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install transformers"
    )
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=150,
        n_embd=24,
        n_layer=3,
        n_head=3,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",  # the others do not give attentions
    )
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)

    inputs, targets = random_tokens(B=2, T=140, V=61)
    model = gpt2.GPT2.from_pretrained(tmp_path, 2, 140, recompute)
    model.forward(inputs, targets, train=False)
    theirs = theirs.double()
    with torch.no_grad():
        truth = theirs(torch.from_numpy(inputs), output_attentions=True, output_hidden_states=True)
        *hidden, last = truth.hidden_states  # the last one has gone through ln_f already
        normal = [theirs.transformer.ln_f(states) for states in hidden] + [last]
        lens = [theirs.lm_head(states).numpy() for states in normal]

    assert len(truth.attentions) == 3
    for l in range(3):
        np.testing.assert_allclose(attention(model, l), truth.attentions[l].numpy(), 0, 1e-5)
    for start in (0, 137):
        for ours, logits in zip(logit_lens(model, start), lens, strict=True):
            np.testing.assert_allclose(ours, logits[:, start:], 1e-5, 1e-5)
    assert np.ptp(truth.attentions[2].numpy()[:, :, -1]) > 0.1
    assert abs(lens[1] - lens[2]).max() > 0.1


def test_attention_is_shared_among_earlier_positions():
    model = sharp_model(2, 9)
    model.forward(*random_tokens(B=2, T=9, V=256))
    for l in range(3):
        att = attention(model, l)
        assert att.shape == (2, 2, 9, 9) and att.dtype == np.float32
        np.testing.assert_allclose(att.sum(axis=-1), 1, 1e-5)
        assert not np.triu(att, 1).any()
    for l in (-1, 3):
        with pytest.raises(gpt2.InputError, match=f"^layer {l}: expected 0 to 2$"):
            attention(model, l)


def test_arrays_need_a_forward_pass():
    """Not that of generate(), which leaves activations of one token or another."""
    batch = random_tokens(B=1, T=8, V=256)
    model = sharp_model(1, 8)
    for _ in range(2):
        for call in (lambda: attention(model, 0), lambda: logit_lens(model)):
            with pytest.raises(gpt2.InputError, match="^there was no forward pass: "):
                call()
        model.forward(*batch)
        assert attention(model, 0).any() and len(list(logit_lens(model))) == 4
        list(model.generate([1, 2], 9, rng=0))


def test_arrays_need_what_layers_share():
    for layout in ({"recompute": 2}, {"training": False}):
        model = gpt2.GPT2(gpt2.GPT2Config(16, 256, 3, 2, 16), 1, 8, **layout)
        model.forward(*random_tokens(B=1, T=8, V=256), train=False)
        with pytest.raises(gpt2.InputError, match=r"^acts\['(qkv|att_lse)'\] is not kept for each"):
            attention(model, 0)
    with pytest.raises(gpt2.InputError, match=r"^acts\['residual3'\] is not kept .* recompute=0"):
        logit_lens(model)


# --------------------------------------------------------------------------------------------------
# What is printed


def table_with(heading, stdout):
    """The lines of the table that follows the paragraph with this heading."""
    paragraphs = stdout.split("\n\n")
    [place] = [i for i, paragraph in enumerate(paragraphs) if paragraph.startswith(heading)]
    return paragraphs[place + 1].rstrip("\n").split("\n")


def read_cells(text):
    """[(percent, token), ...] of a row of cells, which have 12 columns each."""
    text = text.ljust(-(-len(text) // 12) * 12)
    return [(text[i : i + 4], text[i + 5 : i + 12].rstrip()) for i in range(0, len(text), 12)]


def as_shown(byte):
    """A byte, by hand."""
    special = {9: r"\t", 10: r"\n", 13: r"\r", 32: "·"}
    visible = chr(byte) if 32 < byte < 127 else rf"\x{byte:02x}"
    return special.get(byte, visible)


def expected_cells(logits, number):
    """The likeliest tokens after logits (V,), as read_cells returns them."""
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum()
    return [(f"{100 * probs[i]:4.0f}", as_shown(i)) for i in np.argsort(-probs)[:number]]


def test_what_is_printed_is_what_the_model_computes(look, folder):
    """Column by column."""
    tokens = list(PROMPT.encode())
    n = len(tokens)
    model = gpt2.GPT2.from_pretrained(folder / "bytes", 1, n, recompute=0)
    model.forward([tokens], [[*tokens[1:], 0]], train=False)
    logits = [logits[0] for logits in logit_lens(model)]
    code, stdout, error = look("--model", "bytes", "--prompt", PROMPT, "--layer", 1, "--head", 1)
    assert (code, error, n) == (0, "", 34)
    assert max(map(len, stdout.split("\n"))) <= 80

    rows = table_with("Each token", stdout)
    assert [int(row[:4]) for row in rows] == list(range(n))
    assert [row[5:13].rstrip() for row in rows] == list(map(as_shown, tokens))
    losses = [f"{loss:.2f}" for loss in model.acts["losses"][0, :-1]]
    assert [row[13:20].strip() for row in rows] == ["", *losses]
    assert [read_cells(row[20:]) for row in rows] == [expected_cells(x, 5) for x in logits[-1]]

    above, *rows = table_with("The logit lens", stdout)
    assert above.split() == ["after", *map(as_shown, tokens[-6:])]
    assert [row[:8].rstrip() for row in rows] == ["encoded", "layer 0", "layer 1", "layer 2"]
    for row, of_layer in zip(rows, logits, strict=True):
        assert read_cells(row[8:]) == [expected_cells(x, 1)[0] for x in of_layer[-6:]]

    assert "\nThe first 1 tokens are left out" in stdout
    lines = table_with("Attention in layer 1, head 1", stdout)
    above, rows = lines[:-33], lines[-33:]
    texts = list(map(as_shown, tokens[1:]))
    columns = zip(*[line[13:].ljust(66)[::2] for line in above], strict=True)
    assert ["".join(letters) for letters in columns] == [text.rjust(len(above)) for text in texts]
    assert [int(row[:4]) for row in rows] == list(range(1, n))
    assert [row[5:13].rstrip() for row in rows] == texts

    att = attention(model, 1)[0, 1, 1:, 1:]
    shades = np.select([att < 0.02, att < 0.1, att < 0.25, att < 0.5], list(" ░▒▓"), "█")
    drawn = np.array([list(row[13:].ljust(66)) for row in rows])
    assert (drawn == shades.repeat(2, axis=1)).all()
    assert set(shades.flat) == set(" ░▒▓█")


def test_gpt2s_tokens_and_a_terminal_without_unicode(look, folder):
    need_gpt2_vocabulary()
    prompt = " Citizenship of 中é"
    flags = "--model", "gpt2s", "--prompt", prompt, "--layer", 0, "--head", 0
    plain = run_command(folder, *flags, program=PROGRAM, env={"PYTHONIOENCODING": "ascii"})
    for result, tokens, shade in (
        (look(*flags), ["·Citiz~", "·of", "·", r"\u4e2d", "é"], "██"),
        (plain, ["_Citiz~", "_of", "_", r"\u4e2d", "?"], "##"),
    ):
        stdout = succeeded(result)
        assert [row[5:13].rstrip() for row in table_with("Each token", stdout)] == tokens
        assert f"   0 {tokens[0]} {shade}\n" in stdout
        assert max(map(len, stdout.split("\n"))) <= 80
    assert plain[1].isascii()


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", ""),
        (b"\n\x00 ", r"\n\x00·"),
        (b"\xff\xc3\xa9", r"\xffé"),
        ("e\u0301".encode(), r"e\u0301"),
        ("中文".encode(), r"\u4e2d~"),
        (b"seventy", "seventy"),
        (b" seventy", "·seven~"),
    ],
)
def test_a_token_takes_seven_columns(data, text):
    assert look_inside.shown(data) == f"{text:7}"


def test_one_token_is_a_prompt(look):
    code, stdout, error = look("--model", "bytes", "--prompt", "a", "--layer", 2, "--head", 0)
    assert (code, error) == (0, "") and stdout.endswith("\n   0 a       ██\n")


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--model", "nowhere"], "'nowhere': no such model"),
        (["--model", "others"], "61 tokens are neither bytes nor GPT-2's"),
        (["--prompt", "a" * 41], "the prompt has 41 tokens: write one of 1 to 40 "),
        (["--prompt", ""], "the prompt has 0 tokens: write one of 1 to 40 "),
        (["--layer", 3, "--head", 0], "layer 3: expected 0 to 2"),
        (["--layer", -1, "--head", 0], "layer -1: expected 0 to 2"),
        (["--layer", 0, "--head", 2], "head 2: expected 0 to 1"),
        (["--layer", 0, "--head", -1], "head -1: expected 0 to 1"),
    ],
)
def test_what_can_not_be_shown_is_one_line(look, flags, what):
    result = look("--model", "bytes", "--prompt", "a text", *flags)
    assert what in failed_in_one_line(result) and result[1] == ""


@pytest.mark.parametrize("flags", [["--layer", 0], ["--head", 0], ["--layer", "a", "--head", 0]])
def test_wrong_flags_end_with_2(look, flags):
    with pytest.raises(SystemExit) as caught:
        look("--model", "bytes", *flags)
    assert caught.value.code == 2


def test_a_reader_that_has_enough(folder):
    command = [sys.executable, *PROGRAM, "--model", folder / "bytes", "--prompt", PROMPT]
    options = {
        "cwd": os.path.dirname(TRAINER),
        "env": {**os.environ, "PYTHONUNBUFFERED": ""},  # what is left in a buffer must not matter
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    with subprocess.Popen(command, **options) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
