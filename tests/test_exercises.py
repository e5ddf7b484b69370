"""The exercises: the work sheet, the tutor's verdicts and hints, and the training that follows."""

import ast
import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import train_gpt2 as gpt2
from extras import exercises, mine

TOP = Path(__file__).parent.parent
SHEET = TOP / "extras" / "mine.py"


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """ask(text): (exit code, stdout, stderr) of the tutor on a file mine.py with this text."""
    monkeypatch.chdir(tmp_path)

    def run(text):
        Path("mine.py").write_text(text, encoding="utf-8")
        code = exercises.main(["mine.py"])
        out, err = capsys.readouterr()
        assert out.isascii() and all(len(line) <= 80 for line in out.splitlines())
        return code, out, err

    return run


def sentences(out):
    """What was printed, without the breaks of its lines."""
    return re.sub(r"\n {8}", " ", out)


# --------------------------------------------------------------------------------------------------
# Solutions, written as a student would write them, from the work sheet

SOLUTIONS = """
import numpy as np


def encoder_forward(out, inp, wte, wpe):
    for b, t in np.ndindex(*inp.shape):
        out[b, t] = wte[inp[b, t]] + wpe[t]


def encoder_backward(dwte, dwpe, dout, inp, add):
    T = inp.shape[1]
    np.add.at(dwte, inp, dout)
    if not add:
        dwpe[...] = 0
    dwpe[:T] += dout.sum(axis=0)


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    mean[...] = inp.mean(axis=-1)
    var = ((inp - mean[..., None]) ** 2).mean(axis=-1)
    rstd[...] = 1 / np.sqrt(var + 1e-5)
    norm = (inp - mean[..., None]) * rstd[..., None]
    out[...] = norm * weight + bias


def layernorm_backward(dinp, dweight, dbias, dout, inp, mean, rstd, weight, add):
    if not add:
        dweight[...] = 0
        dbias[...] = 0
    norm = (inp - mean[..., None]) * rstd[..., None]
    dweight += (dout * norm).sum(axis=(0, 1))
    dbias += dout.sum(axis=(0, 1))
    dnorm = dout * weight
    first = dnorm.mean(axis=-1, keepdims=True)
    second = norm * (dnorm * norm).mean(axis=-1, keepdims=True)
    dinp += (dnorm - first - second) * rstd[..., None]


def matmul_forward(out, inp, weight, bias=None):
    out[...] = inp @ weight.T
    if bias is not None:
        out += bias


def matmul_backward(dinp, dweight, dbias, dout, inp, weight, add):
    dinp[...] = dout @ weight
    rows = dout.reshape(-1, dout.shape[-1])
    if not add:
        dweight[...] = 0
    dweight += rows.T @ inp.reshape(-1, inp.shape[-1])
    if dbias is not None:
        if not add:
            dbias[...] = 0
        dbias += rows.sum(axis=0)


def attention_forward(out, lse, qkv, NH):
    B, T, C = out.shape
    hs = C // NH
    for b, h in np.ndindex(B, NH):
        own = [slice(i * C + h * hs, i * C + h * hs + hs) for i in range(3)]
        q, k, v = [qkv[b, :, part] for part in own]
        preatt = q @ k.T / np.sqrt(hs)
        preatt[np.triu_indices(T, 1)] = -np.inf
        peak = preatt.max(axis=1, keepdims=True)
        att = np.exp(preatt - peak)
        total = att.sum(axis=1, keepdims=True)
        out[b, :, own[0]] = att / total @ v
        lse[b, :, h] = (np.log(total) + peak)[:, 0]


def attention_backward(dqkv, dout, out, lse, qkv, NH):
    B, T, C = out.shape
    hs = C // NH
    scale = 1 / np.sqrt(hs)
    for b, h in np.ndindex(B, NH):
        own = [slice(i * C + h * hs, i * C + h * hs + hs) for i in range(3)]
        q, k, v = [qkv[b, :, part] for part in own]
        preatt = q @ k.T * scale
        preatt[np.triu_indices(T, 1)] = -np.inf
        att = np.exp(preatt - lse[b, :, h, None])
        datt = dout[b, :, own[0]] @ v.T
        dpreatt = att * (datt - (att * datt).sum(axis=1, keepdims=True))
        dqkv[b, :, own[0]] = dpreatt @ k * scale
        dqkv[b, :, own[1]] = dpreatt.T @ q * scale
        dqkv[b, :, own[2]] = att.T @ dout[b, :, own[0]]


def gelu_forward(out, inp):
    u = np.sqrt(2 / np.pi) * (inp + 0.044715 * inp**3)
    out[...] = 0.5 * inp * (1 + np.tanh(u))


def gelu_backward(dinp, dout, inp):
    s = np.sqrt(2 / np.pi)
    tanh = np.tanh(s * (inp + 0.044715 * inp**3))
    slope = s * (1 + 3 * 0.044715 * inp**2)
    dinp[...] = dout * (0.5 * (1 + tanh) + 0.5 * inp * (1 - tanh**2) * slope)


def residual_forward(out, inp1, inp2):
    out[...] = inp1 + inp2


def crossentropy_softmax_forward(losses, logits, targets):
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logits[...] = np.exp(logits)
    total = logits.sum(axis=-1)
    losses[...] = np.log(total) - chosen
    logits /= total[..., None]


def crossentropy_softmax_backward(probs, targets, dloss):
    for b, t in np.ndindex(*targets.shape):
        probs[b, t, targets[b, t]] -= 1
    probs *= dloss


def adamw(p, g, m, v, decay, learning_rate, beta1, beta2, eps, step, grad_scale):
    g *= grad_scale
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g**2
    c1 = 1 - beta1**step
    c2 = 1 - beta2**step
    p[...] = p - decay * p - learning_rate * (m / c1) / (np.sqrt(v / c2) + eps)
"""
SOLUTION = {  # {name: the text of this function}
    text.partition("(")[0].removeprefix("def "): text.strip() + "\n"
    for text in SOLUTIONS.split("\n\n\n")[1:]
}


def only(name, old="", new=""):
    """A file with one solution, in which `old` was replaced."""
    assert SOLUTION[name].count(old) >= 1
    return "import numpy as np\n\n\n" + SOLUTION[name].replace(old, new)


def check_training(out, names):
    """Everything is said to be right, and 20 pairs of equal losses follow."""
    assert re.findall(r"^(\w+): right$", out, re.MULTILINE) == names
    pairs = re.findall(r"^update +(\d+): yours (\S+), the trainer's (\S+)$", out, re.MULTILINE)
    assert [int(number) for number, _, _ in pairs] == list(range(1, 21))
    losses = np.array([pair[1:] for pair in pairs], float)
    assert abs(losses[:, 0] - losses[:, 1]).max() < 1e-3
    assert losses[-1].max() < losses[0].min() - 1


def test_plain_solutions_are_right_and_train(ask):
    code, out, err = ask(SOLUTIONS)
    assert (code, err) == (0, "")
    check_training(out, list(exercises.TRUTH))


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("layernorm_backward", "norm = (", "mean = inp.mean(axis=-1)\n    norm = ("),
        (
            "attention_backward",
            "lse[b, :, h, None])",
            "preatt.max(axis=1)[:, None])\n        att /= att.sum(axis=1)[:, None]",
        ),
        ("crossentropy_softmax_backward", "for", "probs /= probs.sum(axis=-1)[..., None]\n    for"),
    ],
)
def test_a_backward_function_gets_what_the_forward_function_gave(ask, name, old, new):
    """So it is right if it computes again what it is given."""
    code, out, _ = ask(only(name, old, new))
    assert code == 0 and out.startswith(f"{name}: right\n")


def test_the_trainers_own_functions_are_right_and_train(ask):
    before = dict(vars(gpt2))
    code, out, err = ask(f"from train_gpt2 import {', '.join(exercises.TRUTH)}\n")
    assert (code, err) == (0, "")
    check_training(out, list(exercises.TRUTH))
    assert vars(gpt2) == before


def test_what_is_trained_is_what_was_written(ask):
    """A function that is right in float64 and wrong in float32 gives other losses."""
    wrong = SOLUTION["gelu_forward"] + "    out *= 1 if inp.dtype == np.float64 else 2\n"
    code, out, err = ask("import numpy as np\n" + wrong)
    assert code == 1 and "gelu_forward: right" in out and "update 20" in out
    assert err == "error: the losses differ, though in float64 all is right\n"

    broken = SOLUTION["gelu_forward"] + "    assert inp.dtype == np.float64\n"
    code, out, err = ask("import numpy as np\n" + broken)
    assert code == 1 and "gelu_forward: right" in out and "update" not in out
    assert err == "error: AssertionError in line 5\n"
    assert gpt2.gelu_forward is exercises.TRUTH["gelu_forward"]


# --------------------------------------------------------------------------------------------------
# The work sheet


def test_the_sheet_as_it_is(ask):
    code, out, err = ask(SHEET.read_text(encoding="utf-8"))
    assert (code, err) == (0, "")
    first, *names = out.splitlines()
    assert first == "Nothing is filled in. Write one of these in mine.py, and run this again:"
    assert names == list(exercises.TRUTH)


def test_the_sheet_has_every_function_of_section_2_and_adamw_with_its_signature():
    text = (TOP / "train_gpt2.py").read_text(encoding="utf-8")
    section = text[text.index("# 2. The layers") : text.index("# 3. The configuration")]
    layers = re.findall(r"^def (\w+_(?:forward|backward))\(", section, re.MULTILINE)
    functions = dict(inspect.getmembers(mine, inspect.isfunction))
    assert set(functions) == {*layers, "adamw"} == set(exercises.TRUTH)
    for name, function in functions.items():
        assert inspect.signature(function) == inspect.signature(getattr(gpt2, name))


def test_the_sheet_needs_numpy_alone_and_has_no_bodies():
    statements = ast.parse(SHEET.read_text(encoding="utf-8")).body
    imports = [node for node in statements if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == ["import numpy as np"]
    for node in statements:
        if isinstance(node, ast.FunctionDef):
            assert len(node.body) == 2 and ast.get_docstring(node)
            assert ast.unparse(node.body[1]) == "raise NotImplementedError"
            words = re.findall(r"\w+", ast.get_docstring(node))
            numbers = ["add", "NH"] if node.name != "adamw" else []
            arguments = [argument.arg for argument in node.args.args]
            assert set(arguments) - {*words, *numbers} == set()


def test_what_is_left_as_it_was_is_the_trainers_own(ask):
    text = SHEET.read_text(encoding="utf-8")
    start = text.index("def residual_forward")
    end = text.index("def crossentropy_softmax_forward")
    code, out, err = ask(text[:start] + SOLUTION["residual_forward"] + "\n\n" + text[end:])
    assert (code, err) == (0, "")
    check_training(out, ["residual_forward"])


def sheet_with(*names):
    """The sheet, with these functions filled in."""
    text = SHEET.read_text(encoding="utf-8")
    for name in names:
        start = text.index(f"def {name}(")
        end = text.index("\n\n\n", start)
        text = text[:start] + SOLUTION[name].strip() + text[end:]
    return text


CALLING = """
    half = np.empty_like(inp)
    gelu_forward(half, inp)
    dinp[...] = dout * (half / inp + 0.5 * inp * (1 - (2 * half / inp - 1) ** 2) * slope)
"""


def test_what_is_filled_in_may_call_what_is_not(ask):
    """Whether it stands in the sheet or not, and whether it comes before or after."""
    text = sheet_with("gelu_backward")
    start = text.index("    dinp[...] = dout * (0.5")
    end = text.index("\n", start)
    text = text[:start] + CALLING.strip("\n") + text[end:]
    for sheet in (text, re.sub(r"def gelu_forward\(.*?\n\n\n", "", text, flags=re.S)):
        code, out, err = ask(sheet)
        assert (code, err) == (0, "")
        check_training(out, ["gelu_backward"])


def test_an_empty_function_does_not_hide_a_filled_in_one(ask):
    sheet, written = SHEET.read_text(encoding="utf-8"), only("gelu_forward")
    code, out, err = ask(sheet + "\n\n" + written)
    assert (code, err) == (0, "") and out.startswith("gelu_forward: right\nAll right.")
    code, out, err = ask(written + "\n\n" + sheet)
    assert code == 1 and "NotImplementedError: gelu_forward still raises it in line" in out
    code, out, err = ask(sheet + "\n\nfrom train_gpt2 import gelu_forward\n")
    assert code == 0 and out.startswith("gelu_forward: right\nAll right.")


@pytest.mark.parametrize(
    "name, wrong", [("gelu_backward", "gelu_backwards"), ("layernorm_forward", "layer_norm_foward")]
)
def test_a_misspelt_name(name, wrong, ask):
    for sheet in ("", SHEET.read_text(encoding="utf-8")):
        code, out, err = ask(sheet + only(name, f"def {name}", f"def {wrong}"))
        assert (code, out) == (1, "")
        assert err == f"error: {wrong} is no function of the sheet: did you mean {name}?\n"


def test_a_function_that_is_called_is_not_misspelt(ask):
    text = only("gelu_forward", "def gelu_forward", "def gelu_forwards")
    text += "\n\ndef gelu_forward(out, inp):\n    gelu_forwards(out, inp)\n"
    assert ask(text)[0] == 0
    text = text.replace("def gelu_forward(out, inp)", "def residual_forward(out, inp, _)")
    assert "residual_forward: wrong" in ask(text)[1]


# --------------------------------------------------------------------------------------------------
# Mistakes

TRIU = "np.triu_indices(T, 1)"
MEAN, WITH_NORM = "mean over C of (dout * weight)", "mean over C of (dout * weight * norm)"
GELU = "(the right one - dout * 0.5 * (1 + tanh(u)))"
MISTAKES = {  # what was done: function, the right text, the wrong one, array, hints
    "sign of a term": (
        "layernorm_backward", "dnorm - first", "dnorm + first",
        "dinp", "the right one minus yours is -2 * rstd * mean over C of (dout * weight)",
    ),
    "mean over the wrong axis": (
        "layernorm_backward", "first = dnorm.mean(axis=-1", "first = dnorm.mean(axis=1",
        "dinp", "yours depends on dout at other positions, the right one does not",
    ),
    "term with a mean forgotten": (
        "layernorm_backward", "dnorm - first", "dnorm",
        "dinp", "the right one minus yours is -rstd * mean over C of (dout * weight)",
    ),
    "term with a product forgotten": (
        "layernorm_backward", " - second", "",
        "dinp",
        "the right one minus yours is -rstd * norm * mean over C of (dout * weight * norm)",
    ),
    "= for +=": (
        "layernorm_backward", "dinp +=", "dinp[...] =",
        "dinp", "it overwrites what stood there before, and should add to it",
    ),
    "dweight transposed": (
        "matmul_backward", "rows.T @ inp.reshape(-1, inp.shape[-1])",
        "inp.reshape(-1, inp.shape[-1]).T @ rows",
        "dweight", "yours is the right one transposed, with OC and C exchanged",
    ),
    "dbias over columns": (
        "matmul_backward", "rows.sum(axis=0)", "rows.sum(axis=1)",
        "dbias", "yours is the sum over OC of dout",
    ),
    "scale forgotten": (
        "attention_backward", "dpreatt @ k * scale", "dpreatt @ k",
        "dq", "yours is sqrt(hs) times the right one",
    ),
    "softmax without its sum": (
        "attention_backward", "(datt - (att * datt).sum(axis=1, keepdims=True))", "datt",
        "dq", "yours is right if the sum over hs of dout * out is 0",
    ),
    "no mask": (
        "attention_forward", TRIU, "np.triu_indices(T, T)",
        "out", "yours depends on qkv at later positions, the right one does not",
    ),
    **{
        f"variance term, {old} as {new}": (
            "layernorm_backward", old, new, "dinp", f"the right one minus yours is {hint}",
        )
        for old, new, hint in [
            ("- second", "+ second", f"-2 * rstd * norm * {WITH_NORM}"),
            ("- second", "- 2 * second", f"rstd * norm * {WITH_NORM}"),
            ("* norm).mean", "* norm).sum", f"(C - 1) * rstd * norm * {WITH_NORM}"),
            (
                "(dnorm * norm)", "(dout * norm)",
                f"rstd * norm * mean over C of (dout * norm) - rstd * norm * {WITH_NORM}",
            ),
            ("(dnorm * norm)", "dnorm", f"rstd * norm * {MEAN} - rstd * norm * {WITH_NORM}"),
            ("norm * (dnorm", "(dnorm", f"rstd * {WITH_NORM} - rstd * norm * {WITH_NORM}"),
            (
                "norm * (dnorm", "(inp - mean[..., None]) * (dnorm",
                f"norm * {WITH_NORM} - rstd * norm * {WITH_NORM}",
            ),
            ("- first - second", "+ first", f"-2 * rstd * {MEAN} - rstd * norm * {WITH_NORM}"),
            (
                ".mean(axis=-1, k", ".sum(axis=-1, k",
                "-(C - 1) * (the right one - dout * rstd * weight)",
            ),
        ]
    },
    "both terms forgotten": (
        "layernorm_backward", " - first - second", "",
        "dinp", "yours is dout * rstd * weight",
    ),
    "inp for norm": (
        "layernorm_backward", "dweight += (dout * norm)",
        "dweight += (dout * (inp - mean[..., None]))",
        "dweight", "yours is sum over B, T of (dout * (inp - mean))",
    ),
    "sign of gelu's second term": (
        "gelu_backward", "+ 0.5 * inp", "- 0.5 * inp",
        "dinp", f"the right one minus yours is 2 * {GELU}",
    ),
    "half of gelu's second term": (
        "gelu_backward", "+ 0.5 * inp", "+ inp",
        "dinp", f"the right one minus yours is -{GELU}",
    ),
    "gelu's first term forgotten": (
        "gelu_backward", "0.5 * (1 + tanh) + ", "",
        "dinp", f"yours is {GELU}",
    ),
    "no inner derivative": (
        "gelu_backward", " * slope", "",
        "dinp", "yours is right if inp is 0", "yours is right if inp is a million",
    ),
    "targets not subtracted": (
        "crossentropy_softmax_backward", "-= 1", "-= 0",
        "probs", "yours does not depend on targets, the right one does",
    ),
    "loss scale forgotten": (
        "crossentropy_softmax_backward", "probs *= dloss", "probs *= 1",
        "probs", "yours is 1/dloss times the right one",
    ),
    # From another angle: what else goes wrong.
    "position off by one": (
        "encoder_forward", "wpe[t]", "wpe[t - 1]",
        "out", "yours depends on wpe at other positions, the right one does not",
    ),
    "repeated tokens lost": (
        "encoder_backward", "np.add.at(dwte, inp, dout)", "dwte[inp] += dout",
        "dwte", "yours is right if no token occurs twice",
    ),
    "only the last sequence": (
        "encoder_backward", "dout.sum(axis=0)", "dout[-1]",
        "dwpe", "yours does not depend on dout at the first sequence, the right one does",
    ),
    "rows without tokens kept": (
        "encoder_backward", "dwpe[...] = 0", "dwpe[:T] = 0",
        "dwpe", "where it is wrong, it still holds what stood there before",
    ),
    "variance / (C - 1)": (
        "layernorm_forward", "** 2).mean(axis=-1)", "** 2).sum(axis=-1) / (inp.shape[-1] - 1)",
        "rstd", "1/right^2 minus 1/yours^2 is -1/(C - 1) * mean over C of (mean - inp)^2",
    ),
    "layernorm's eps forgotten": (
        "layernorm_forward", "var + 1e-5", "var",
        "rstd", "1/right^2 minus 1/yours^2 is 1e-05",
    ),
    "rstd forgotten": (
        "layernorm_backward", "(dnorm - first - second) * rstd[..., None]",
        "dnorm - first - second",
        "dinp", "yours is the right one divided by rstd",
    ),
    "bias forgotten": (
        "matmul_forward", "out += bias", "out += 0",
        "out", "the right one minus yours is bias",
    ),
    "dq and dk exchanged": (
        "attention_backward",
        "own[0]] = dpreatt @ k * scale\n        dqkv[b, :, own[1]] = dpreatt.T @ q",
        "own[1]] = dpreatt @ k * scale\n        dqkv[b, :, own[0]] = dpreatt.T @ q",
        "dq", "yours is the right dk",
    ),
    "scale of the wrong size": (
        "attention_forward", "np.sqrt(hs)", "hs",
        "out", "it is right at the first position only", "yours is right if hs is 1",
    ),
    "first head only": (
        "attention_forward", "np.ndindex(B, NH)", "np.ndindex(B, 1)",
        "out", "where it is wrong, it still holds what stood there before",
    ),
    "first sequence only": (
        "crossentropy_softmax_backward", "np.ndindex(*targets.shape)",
        "np.ndindex(1, targets.shape[1])",
        "probs", "it is right at the first sequence only", "yours is right if B is 1",
    ),
    "probs not normalised": (
        "crossentropy_softmax_forward", "logits /= total[..., None]", "logits /= 1",
        "logits", "yours is the right one times a factor that is the same for all tokens",
    ),
    "bias correction forgotten": (
        "adamw", "(m / c1) / (np.sqrt(v / c2) + eps)", "m / (np.sqrt(v) + eps)",
        "p", "yours does not depend on step, the right one does",
    ),
    "eps under the root": (
        "adamw", "np.sqrt(v / c2) + eps", "np.sqrt(v / c2 + eps)",
        "p", "yours is right if eps is 0", "yours is right if learning_rate is 0",
    ),
    "decay in the gradient": (
        "adamw", "g *= grad_scale", "g[...] = g * grad_scale + decay * p",
        "g", "the right one minus yours is -decay * p",
    ),
    "= for += at tokens": (
        "encoder_backward", "np.add.at(dwte, inp, dout)", "dwte[inp] = dout",
        "dwte", "it overwrites what stood there before, and should add to it",
    ),
    "= for +=, and a term forgotten": (
        "layernorm_backward", "dinp += (dnorm", "dinp[...] = (0",
        "dinp", "it overwrites what stood there before, and should add to it",
    ),
    "added twice": (
        "layernorm_backward", "dinp += (", "dinp += dinp + (",
        "dinp",
    ),
    "subtracted from what stood there": (
        "gelu_forward", "out[...] = ", "out[...] = -out + ",
        "out",
    ),
    "1 written, not subtracted": (
        "crossentropy_softmax_backward", "-= 1", "= 1",
        "probs",
    ),
}  # fmt: skip
KINDS = [
    exercises.unwritten, exercises.overwriting, exercises.alike, exercises.influence,
    exercises.where_right, exercises.term, exercises.two_terms, exercises.vanishing_sum,
]  # fmt: skip
OTHER_SHAPES = [exercises.sizes_of(3, 3, 3, 3, 9, 9), exercises.sizes_of(2, 4, 2, 3, 10, 5)]


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_and_its_hints(what, ask, monkeypatch):
    """They are the expected ones, and true of numbers and shapes, too, that were not tried."""
    name, old, new, array, *expected = MISTAKES[what]
    text = only(name, old, new)
    code, out, err = ask(text)
    assert (code, err) == (1, "")
    section = 7 if name == "adamw" else 2
    of_dqkv = "" if array in exercises.PARAMETERS[name] else ", a part of dqkv,"
    assert re.match(rf"{name}: wrong\n    {array}{of_dqkv} is wrong \((B=2, T=2|n=8)", out)
    assert out.endswith(f"    the formula: train_gpt2.py, section {section}, {name}\n")
    hints = re.findall(r"^    hint: (.*)$", sentences(out), re.MULTILINE)
    assert hints == expected

    found = {}
    exec(text, found)
    monkeypatch.setattr(exercises, "SEED", 5)
    monkeypatch.setattr(exercises, "SHAPES", OTHER_SHAPES)
    wrong, _ = exercises.tried(found[name], name, exercises.cases(name)[0], "mine.py")
    with np.errstate(all="ignore"):
        for result, hint in itertools.product(wrong[array], hints):
            assert any(hint in kind(result) for kind in KINDS)


# --------------------------------------------------------------------------------------------------
# What is not a wrong number

FIRST = r" \(B=2, T=2, C=4\)"
TROUBLES = {  # what was done: function, the right text, the wrong one, what is said of it
    "exception": (
        "gelu_forward", "u = ", "1 / 0\n    u = ",
        "ZeroDivisionError in line 5: division by zero" + FIRST,
    ),
    "name": (
        "gelu_forward", "u = ", "v = ",
        "NameError in line 6: name 'u' is not defined" + FIRST,
    ),
    "too few arguments": (
        "gelu_forward", "(out, inp)", "(inp)",
        "TypeError: gelu_forward.* takes 1 positional argument but 2 were given" + FIRST,
    ),
    "bias has to be given": (
        "matmul_forward", "bias=None", "bias",
        r"TypeError: .* missing 1 required .*'bias' \(.*, there is no bias\)",
    ),
    "bias is always there": (
        "matmul_backward", "if dbias is not None", "if True",
        r"TypeError in line 12: .* \(.*, there is no bias\)",
    ),
    "wrong shape": (
        "layernorm_forward", "mean[...] = inp.mean(axis=-1)", "mean[...] = inp.mean(axis=(0, 1))",
        r"ValueError in line 5: could not broadcast .* from shape \(4,\) into .* \(2,2\)" + FIRST,
    ),
    "only read": (
        "layernorm_backward", "dnorm = dout", "dnorm = dout\n    dnorm *= 1.5\n    dnorm = dnorm",
        r"it writes into dout, which is only read \(B=2, T=2, C=4, add=False\)",
    ),
    "another array": (
        "gelu_forward", "out[...] =", "out =",
        r"hint: nothing is written into it: x\[...\] = y writes, x = y does not\n",
    ),
    "returned": (
        "gelu_forward", "out[...] =", "return",
        "hint: it is not written; what a function returns is not read\n",
    ),
    "only computed": (
        "gelu_forward", "out[...] =", "result =",
        "hint: it is not written\n",
    ),
    "raise left below": (
        "residual_forward", "inp1 + inp2\n", "inp1 + inp2\n    raise NotImplementedError\n",
        "NotImplementedError: residual_forward still raises it in line 6" + FIRST,
    ),
    "raise left above": (
        "gelu_forward", "u = ", "raise NotImplementedError\n    u = ",
        "NotImplementedError: gelu_forward still raises it in line 5" + FIRST,
    ),
    "raise left in a branch": (
        "matmul_backward", "if not add:\n        dweight[...] = 0",
        "if add:\n        raise NotImplementedError\n    dweight[...] = 0",
        r"NotImplementedError: matmul_backward still raises it in line 8 \(.*, add=True\)",
    ),
    "first and second moment": (
        "adamw", "g *= grad_scale", "g = g * grad_scale * 3",
        r"g is wrong \(n=8\)(\n .*)*\n    also wrong: m, v, p\n",
    ),
    "moments of the sum": (
        "adamw", "m[...] = beta1 * m + ", "m[...] = m + ",
        r"m is wrong \(n=8\)(\n .*)*\n    also wrong: p\n",
    ),
    "wrong in other cases": (
        "layernorm_backward", "dbias += dout.sum(axis=(0, 1))",
        "dbias += dout.sum(axis=(0, 1)) * (1 + add)\n    dweight += len(dweight) == 12",
        r"dbias is wrong \(.*add=True\)\n .*\n .*\n .*\n    the formula",
    ),
    "NaN": (
        "gelu_forward", "0.5 *", "0.5 * (1 + 0 * inp / (inp > 0)) *",
        r"out is wrong .*\n .*\n .*yours nan.*\n    hint: it is NaN or infinite in places\n",
    ),
    "reads garbage": (
        "gelu_forward", "out[...] =", "out *= 0\n    out +=",
        r"out is wrong \(B=2, T=5, C=12, what is to be overwritten is NaN before\)"
        r"\n .*\n .*yours nan.*\n    hint: in plain cases it is right\n",
    ),
    "overflow": (
        "crossentropy_softmax_forward", "logits -= logits.max", "logits -= 0 * logits.max",
        r"logits is wrong \(B=2, T=5, V=11, all numbers are 400 times as large\)"
        r"\n .*\n .*yours nan.*\n    hint: in plain cases it is right\n    also wrong: losses\n",
    ),
    "order in memory": (
        "matmul_backward", "rows = dout.reshape(-1, dout.shape[-1])",
        "rows = dout.ravel('K').reshape(-1, dout.shape[-1])",
        r"dweight is wrong \(.*, what is only read is a transposed view\)",
    ),
    "two arrays": (
        "gelu_backward", "dinp[...] =", "dinp[...] = 0\n    dinp[...] =",
        r"dinp is wrong \(B=2, T=5, C=12, dinp and dout are one array\)",
    ),
    "added": (
        "layernorm_backward", "if not add", "if False",
        r"dweight is wrong \(.*add=False\)\n .*\n .*\n"
        "    hint: it adds, whatever `add` says\n",
    ),
    "added, and wrong": (
        "encoder_backward", "    if not add:\n        dwpe[...] = 0\n    dwpe[:T] +=",
        "    dwpe[:T] += 1.5 *",
        r"dwpe is wrong \(.*add=False\)\n .*\n .*\n    hint: it adds, whatever `add` says\n",
    ),
    "added where nothing is": (
        "gelu_forward", "out[...] =", "out +=",
        "hint: it adds to what stood there before, and should overwrite it\n",
    ),
    "not added": (
        "layernorm_backward", "if not add", "if True",
        r"dweight is wrong \(.*add=True\)\n .*\n .* yours adds .*, right adds .*\n"
        "    hint: it overwrites, whatever `add` says\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TROUBLES)
def test_a_trouble_and_what_is_said_of_it(what, ask):
    name, old, new, expected = TROUBLES[what]
    code, out, err = ask(only(name, old, new))
    assert (code, err) == (1, "")
    assert out.startswith(f"{name}: wrong\n")
    assert re.search("^    " + expected, sentences(out), re.MULTILINE), out


def test_a_wrong_shape_is_shown_with_the_numbers_that_it_gives_where_it_fits(ask):
    _, out, _ = ask(only(*MISTAKES["dweight transposed"][:3]))
    assert re.search(
        r"\n    ValueError in line 9: .* with shapes? \(7,12\) \(12,7\) .*\(B=2, T=5, OC=7, C=12, ",
        sentences(out),
    )


def test_the_worst_place(ask):
    wrong = "    if out.shape[1] > 2:\n        out[1, 2, 3] += 0.25\n"
    _, out, _ = ask(only("gelu_forward") + wrong)
    error, yours, right = re.findall(
        r"relative error (\S+)\n"
        r"    worst at \[1, 2, 3\] of \(B, T, C\): yours (\S+), right (\S+)\n",
        sentences(out),
    )[0]
    assert float(yours) - float(right) == pytest.approx(0.25, rel=1e-4)
    assert 0 < float(error) < 0.25


def test_right_and_wrong_functions_in_one_file(ask):
    text = only("gelu_forward") + "\n\n" + SOLUTION["residual_forward"].replace("+", "-")
    code, out, err = ask(text)
    assert (code, err) == (1, "")
    assert "gelu_forward: right\nresidual_forward: wrong\n" in out and "update" not in out


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\ndef f(:\n", "mine.py, line 2: invalid syntax"),
        ("def f():\nreturn 1\n", "mine.py, line 2: expected an indented block .*"),
        ("x = 1\ny = x / 0\n", "mine.py: ZeroDivisionError in line 2: division by zero"),
        ("raise OSError('two\\nlines')\n", "mine.py: OSError in line 1: two lines"),
        ("import nowhere\n", "mine.py: ModuleNotFoundError in line 1: No module named 'nowhere'"),
        ("import sys\nsys.exit('no')\n", "mine.py: SystemExit in line 2: no"),
    ],
)
def test_a_file_that_is_no_program(ask, text, message):
    code, out, err = ask(text)
    assert (code, out) == (1, "")
    assert re.fullmatch(f"error: {message}\n", err)


def test_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exercises.main(["mine.py"]) == 1
    assert capsys.readouterr() == (
        "",
        "error: mine.py: no such file: begin with cp extras/mine.py mine.py\n",
    )


def test_ctrl_c(ask):
    """What is checked is named before, so that one sees what takes long, and what was stopped."""
    code, out, err = ask(only("gelu_forward", "u = ", "raise KeyboardInterrupt\n    u = "))
    assert (code, out, err) == (130, "gelu_forward: ", "\nstopped: run it again\n")


@pytest.mark.parametrize("words", [[], ["a.py", "b.py"], ["--fast", "a.py"]])
def test_the_command_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        exercises.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m extras.exercises")


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        exercises.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "    python -m extras.exercises mine.py\n" in out
    assert all(len(line) <= 80 for line in out.splitlines())
