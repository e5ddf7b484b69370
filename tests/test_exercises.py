"""The exercises: the work sheet, the tutor's verdicts and hints, and the training that follows."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

import train_gpt2 as gpt2
from extras import exercises, mine

SHEET = Path(mine.__file__).read_text(encoding="utf-8")
HEAD = "import numpy as np\nfrom train_gpt2 import *\n\n\n"  # what the trainer's functions use


def solution(name):
    """The trainer's own function, as a student would have written it: {name: text}."""
    if name in exercises.LAYERS:
        return inspect.getsource(inspect.unwrap(getattr(gpt2, name)))
    text = textwrap.dedent(inspect.getsource(getattr(gpt2.Model, name)))
    text = text.replace("(self, ", "(").replace(", whole=True):", ", NH):")
    text = text.replace("add):", "add, NH):", 1)
    return re.sub(r" +NH = self.*\n", "", text).replace("if whole:", "if True:")


SOLUTION = {name: solution(name) for name in exercises.TRUTH}


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """ask(text): (exit code, stdout, stderr) of the tutor on a file mine.py with this text."""
    monkeypatch.chdir(tmp_path)

    def run(text=None):
        if text is not None:
            Path("mine.py").write_text(text, encoding="utf-8")
        code = exercises.main([] if text is None else ["mine.py"])
        out, err = capsys.readouterr()
        return code, re.sub(r"\n {8}", " ", out), err  # without the breaks of lines

    return run


def changed(name, changes):
    """The text of a file with one solution, with changes {old: new}."""
    text = SOLUTION[name]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return HEAD + text


# --------------------------------------------------------------------------------------------------
# The sheet, and the order of things


def test_the_sheet_has_every_function_with_its_signature_and_without_a_body(ask):
    names = [name for name, _ in inspect.getmembers(gpt2, inspect.isfunction)]
    layers = {name for name in names if name.endswith(("_forward", "_backward"))} | {"adamw"}
    functions = dict(inspect.getmembers(mine, inspect.isfunction))
    assert functions.keys() == exercises.TRUTH.keys() == layers | exercises.WIRING.keys()
    for name, function in functions.items():
        parameters = list(inspect.signature(function).parameters)
        if name in layers:
            assert inspect.signature(function) == inspect.signature(getattr(gpt2, name))
        numbers = parameters if name == "adamw" else ["add", "NH"]
        assert set(parameters) <= {*re.findall(r"\w+", function.__doc__), *numbers}
        assert inspect.getsource(function).endswith('"""\n    raise NotImplementedError\n')
    assert re.findall(r"^def (\w+)", SHEET, re.MULTILINE) == list(exercises.TRUTH)


def test_without_a_file_it_writes_the_sheet_and_says_how_to_begin(ask):
    code, out, err = ask()
    assert (code, err) == (0, "") and Path("mine.py").read_text(encoding="utf-8") == SHEET
    assert "    python -m extras.exercises mine.py\n" in out and "A course of three evenings" in out
    assert ask(SHEET) == (0, "Nothing is filled in yet. Next: residual_forward\n", "")
    Path("mine.py").write_text("my work", encoding="utf-8")
    there = "error: mine.py is there, and stays: python -m extras.exercises mine.py\n"
    assert ask() == (1, "", there) and Path("mine.py").read_text(encoding="utf-8") == "my work"


def test_all_of_it_is_right_and_trains(ask):
    before = dict(vars(gpt2))
    code, out, err = ask(HEAD + "\n\n".join(SOLUTION.values()))
    assert (code, err) == (0, "")
    assert re.findall(r"^(\w+): right$", out, re.MULTILINE) == list(exercises.TRUTH)
    assert out.endswith("That is all of GPT-2.\n") and vars(gpt2) == before
    losses = [float(x) for x in re.findall(r"\d\.\d{3}", out)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name, what", [("gelu_forward", "out"), ("backward_layer", "w.dresidual")])
def test_what_is_trained_is_what_was_written(name, what, ask):
    """A function that is right in float64 and wrong in float32 gives other losses."""
    wrong = f"    {what}[...] *= 1 if {what}.dtype == np.float64 else 2\n"
    code, out, err = ask(HEAD + SOLUTION[name] + wrong)
    assert code == 1 and f"{name}: right\n" in out
    assert re.fullmatch(r"error: the trainer's ends at \S+, though in float64 all is right\n", err)


def test_what_is_not_filled_in_is_the_trainers_own(ask):
    """Whether it stands in the sheet or not. The wiring is judged with the trainer's layers."""
    text = "    gelu_forward(out, inp1)\n    out[...] = 0 * out + inp1 + inp2\n"
    text = "def residual_forward(out, inp1, inp2):\n" + text
    for rest in ("", SHEET.replace("def residual_forward(", "def another(")):
        code, out, err = ask(rest + "\n\n" + text)
        assert (code, err) == (0, "") and out.endswith("\nNext: gelu_forward\n")
    wrong = changed("gelu_forward", {"out += 1": "out += 2"}) + "\n\n" + SOLUTION["forward_layer"]
    assert "gelu_forward: wrong" in ask(wrong)[1] and "forward_layer: right" in ask(wrong)[1]


# --------------------------------------------------------------------------------------------------
# Mistakes: a function, what is replaced in it, what is wrong then, and the hint, if there is one

ADDS, OVERWRITES = "it adds to what stood there before", "it overwrites what stood there before"
WRITES = "nothing is written into it: x[...] = y writes, x = y does not"
IF, PLAIN = "yours is what would be right if", "in plain cases it is right"
AVERAGE, WITH_NORM = "-rstd * average(dnorm)", "-rstd * norm * average(dnorm * norm)"
ADD = "np.add(inp1, inp2, out=out)"
MASK = "preatt[..., past + start :] += HIDE_FUTURE[:rows, :rows]"
RESIDUAL = "residual_forward(a.residual2, residual, a.attproj)"
LN2 = "    layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b)\n"
GELU = "    gelu_backward(w.dfch, w.dfch, a.fch)  # from dfch_gelu to dfch, in place\n"
SOFTMAX, FORWARD, BACKWARD = "crossentropy_softmax", "forward_layer", "backward_layer"
MISTAKES = [
    ("residual_forward", {ADD: "out = inp1 + inp2"}, "out", WRITES),
    ("residual_forward", {ADD: "return inp1 + inp2"}, "out", "what a function returns is not read"),
    ("residual_forward", {ADD: "1 / 0"}, "ZeroDivisionError in line 7: division by zero (B=2, T=2"),
    ("residual_forward", {"out=out": "out=inp2"}, "it writes into inp2, which is only read (B=2"),
    ("gelu_forward", {"inp, inp, out": "inp, inp + 0 * out, out"}, "out is wrong (B=2, T=5", PLAIN),
    ("gelu_backward", {"slope += 1  #": "0  #"}, "dinp", "dout * 0.5 * (1 + tanh(u)) is missing"),
    ("gelu_backward", {"3 * GELU_CUBE": "GELU_CUBE"}, "dinp"),
    ("gelu_backward", {"slope = x": "dinp[...] = 0; slope = x"}, "dinp is wrong (B=2, T=5,", PLAIN),
    ("matmul_forward", {"False, bias": "False, None"}, "out", f"{IF} bias were 0"),
    ("matmul_backward", {"dout.T, inp": "inp.T, dout"}, "dweight", "the right one transposed"),
    ("matmul_backward", {"inp, add": "inp, not add"}, "dweight", ADDS),
    ("encoder_backward", {"dwpe[T:] = 0": "0"}, "dwpe", "still holds what stood there before"),
    ("layernorm_backward", {"dinp += dnorm": "dinp[...] = dnorm"}, "dinp", OVERWRITES),
    ("layernorm_backward", {"dnorm -= av": "dnorm += av"}, "dinp", f"{AVERAGE} has the wrong sign"),
    ("layernorm_backward", {"dnorm) / C": "dnorm)"}, "dinp", f"{AVERAGE} is C times the right one"),
    ("layernorm_backward", {"dnorm, norm)": "dout, norm)"}, "dinp", f"{WITH_NORM} is missing, and"),
    (f"{SOFTMAX}_forward", {"logits -= ": ""}, "logits is wrong (B=2, T=5, V=11, all nu", PLAIN),
    (f"{SOFTMAX}_backward", {"-= 1": "-= 0"}, "probs", "the term -dloss at the target is missing"),
    ("adamw", {"1 - decay": "1 - learning_rate * decay"}, "p", "-decay * p is learning_rate times"),
    ("attention_forward", {MASK: ""}, "out", "what it would be if t2 > t were not hidden"),
    ("attention_forward", {" * hs**-0.5": ""}, "out", "yours is what preatt = q . k would give"),
    ("attention_backward", {"dq_sum, scale": "dq_sum, 1"}, "dq", "yours is sqrt(hs) times the"),
    ("attention_backward", {"datt -= dout": "0 * dout"}, "dq", "what dpreatt = att * datt would"),
    ("attention_backward", {"dq, dk, dv =": "dk, dq, dv ="}, "dq", "yours is the right dk"),
    # The wiring.
    (FORWARD, {"ln2_rstd, a.residual2": "ln2_rstd, residual"}, "a.ln2_mean", "gets inp=residual, "),
    (FORWARD, {RESIDUAL: "a.residual2 = residual + a.attproj"}, "a.residual2", WRITES),
    (FORWARD, {LN2: "", "    gelu_forward": LN2 + "    gelu_forward"}, "a.fch",
     "the last to write a.ln2 before your matmul_forward is no layer, not layernorm_forward"),
    (BACKWARD, {GELU: ""}, "w.dfch", "it is written by matmul_backward, in the trainer by mat"),
    (BACKWARD, {"p.fcw, add": "p.fcw, False"}, "g.fcw", "your matmul_backward gets add=False, "),
    (BACKWARD, {"dln2, a.residual2": "dln2, residual + a.attproj"}, "g.ln2w", "inp=another array"),
    (BACKWARD, {"g.ln2w, g.ln2b": "g.ln1w, g.ln1b"}, "g.ln2w", "it is not written"),
]  # fmt: skip


@pytest.mark.parametrize("name, changes, wrong, hint", [(*row, "")[:4] for row in MISTAKES])
def test_a_mistake_and_what_is_said_of_it(name, changes, wrong, hint, ask, monkeypatch):
    """A hint is true, too, of numbers and shapes that were not tried."""
    for _ in range(2):
        code, out, err = ask(changed(name, changes))
        assert (code, err) == (1, "") and out.startswith(f"{name}: wrong\n    {wrong}")
        found = re.findall(r"^    hint: (.*)$", out, re.MULTILINE)
        assert len(found) == (hint != "") and all(hint in words for words in found)
        if " " in wrong:  # a case that is only tried with one shape
            return
        assert re.search(r"worst at \[[\d, ]+\] of \([\w, ]+\): yours( adds)? \S+, right", out)
        monkeypatch.setattr(exercises, "SEED", 5)
        monkeypatch.setattr(exercises, "SIZES", [(3, 3, 3, 3, 9, 9), (2, 4, 2, 3, 10, 5)])


FILES = {  # that are no sheets
    "x = 1\ndef f(:\n": "mine.py: SyntaxError: invalid syntax (mine.py, line 2)",
    "import sys\nsys.exit('a\\nb')\n": "mine.py: SystemExit in line 2: a b",
    SHEET + SHEET: "mine.py defines residual_forward twice: take one of them out",
}


def test_files_that_are_no_sheets_and_ctrl_c(ask, capsys):
    assert exercises.main(["mine.py"]) == 1 and "mine.py: no such file" in capsys.readouterr().err
    for text, said in FILES.items():
        assert ask(text) == (1, "", f"error: {said}\n")
    stopped = (130, "residual_forward: ", "\nstopped: run it again\n")
    assert ask(changed("residual_forward", {ADD: "raise KeyboardInterrupt"})) == stopped
