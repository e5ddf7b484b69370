"""`python test_gpt2.py`: its table, its exit code, and the name that it gives to a fault."""

import inspect
import sys

import pytest
from common import file_model

import test_gpt2
import train_gpt2 as gpt2

# function: what is replaced in its text, by what, and the first tensor that must not agree
FAULTS = [
    ("encoder_forward", "out += wpe", "pass", "encoded", "forward"),
    ("layernorm_forward", "out, out) / C", "out, out) / (C - 1)", "ln1", "forward, layer 0"),
    ("matmul_forward", "out += bias", "pass", "qkv", "forward, layer 0"),
    ("attention_forward_heads", "q = q * hs**-0.5", "pass", "att_lse", "forward, layer 0"),
    ("residual_forward", "inp1, inp2, out", "inp1, inp1, out", "residual2", "forward, layer 0"),
    ("gelu_forward", "* GELU_CUBE", "* 0.05", "fch_gelu", "forward, layer 0"),
    ("crossentropy_softmax_forward", "losses += np.log(total)", "pass", "losses", "forward"),
    ("crossentropy_softmax_backward", "dlogits *= dloss", "pass", "dlogits", "backward"),
    ("layernorm_backward_rows", "dnorm -= norm", "dnorm += norm", "dresidual3", "backward"),
    ("matmul_backward", "ones, dout", "ones, 2 * dout", "dfcprojb", "backward, layer 1"),
    ("gelu_backward", "* 3 * GELU", "* 2 * GELU", "dfch", "backward, layer 1"),
    ("attention_backward_heads", "dq_sum, scale,", "dq_sum, 1,", "dqkv", "backward, layer 1"),
    ("encoder_backward", "dwte[token] += row", "dwte[token] = row", "dwte", "backward"),
    ("adamw", "p *= 1 - decay", "pass", "params 1", test_gpt2.UPDATES),
]  # fmt: skip


def changed(name, old, new):
    """A function of the trainer with another text, in the trainer's own namespace."""
    text = inspect.getsource(getattr(gpt2, name))
    assert text.count(old) == 1, name
    found = {}
    exec(compile(text.replace(old, new), name, "exec"), vars(gpt2), found)
    return found[name]


@pytest.mark.parametrize("name, old, new, tensor, where", FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_has_the_right_name_and_exit_code_1(
    name, old, new, tensor, where, monkeypatch, capsys
):
    monkeypatch.setattr(gpt2, name, changed(name, old, new))
    assert test_gpt2.main([]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f" lines do NOT agree. The first is {tensor} ({where}).")


def test_what_is_not_a_number_is_not_okay(monkeypatch, capsys):
    monkeypatch.setattr(gpt2, "gelu_forward", lambda out, inp: None)
    assert test_gpt2.main([]) == 1
    assert "The first is fch_gelu (forward, layer 0)." in capsys.readouterr().out


def test_all_is_okay_without_colour_in_a_pipe(capsys):
    assert test_gpt2.main([]) == 0
    first, _, _, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith("Python 3.") and ", NumPy 2." in first and ", PyTorch 2." in first
    tensors = [line for line in lines if line.startswith("    ")]
    assert all(line.endswith("  OK") for line in tensors) and len(tensors) == 104
    assert last == "All 104 lines agree, to 1e-10 in float64 and to 1e-05 in float32."
    assert max(map(len, (first, *lines, last))) <= 100 and "\033" not in "".join(lines)


@pytest.mark.parametrize("columns, no_color", [(80, False), (79, False), (80, True)])
def test_colour_and_width_of_a_terminal(columns, no_color, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    test_gpt2.main([])
    text = capsys.readouterr().out
    assert ("\033[32mOK\033[0m" in text) == (not no_color)
    assert (" 2 x 9 x 24 " in text) == (columns == 80)
    plain = text.replace("\033[32m", "").replace("\033[0m", "")
    assert max(map(len, plain.splitlines())) <= max(columns, 90)


def test_a_whole_model(tmp_path, capsys):
    file_model().save_pretrained(tmp_path / "small")
    assert test_gpt2.main(["--model", str(tmp_path / "small")]) == 0
    text = capsys.readouterr().out
    assert "\nforward, all layers\n" in text and "float64" not in text
    assert text.splitlines()[-1] == "All 70 lines agree, to 1e-05 in float32."


def test_what_can_not_be_compared_is_one_line(tmp_path, capsys, monkeypatch):
    assert test_gpt2.main(["--model", str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no such model" in error and error.count("\n") == 1
    monkeypatch.setattr(gpt2, "available_memory", lambda: 4e9)
    assert test_gpt2.main(["--model", "d12"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: this takes 6.") and error.endswith("and 4.0 GB are free\n")
