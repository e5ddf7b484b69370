"""
Exercises with a tutor: write the layers of GPT-2 yourself, and their wiring.

    python -m extras.exercises
        writes mine.py, the work sheet, into this folder, and says how to begin

    python -m extras.exercises mine.py
        says of each function that you have filled in that it is right, or what
        is wrong with it

Your function and the trainer's get the same random numbers, in float64, in
several shapes. A hint is given only if it holds, to rounding, in every plain
case in which yours is wrong with the same `add`. If the tutor knows none, it
says only where the two differ. When all is right, a small model trains with it.
"""

import argparse
import ast
import contextlib
import copy
import inspect
import itertools
import math
import os
import re
import runpy
import sys
import textwrap
import traceback
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

import train_gpt2 as gpt2
from extras import mine
from train_gpt2 import InputError, require

# What each function writes, in the order in which it is computed, and what it reads. The sign:
# = overwritten, + added to, ? one of these as `add` says, ~ changed, : only read. The letters: the
# axes. Q is 3, for query, key and value; NH are the two axes of C channels; R is 3C, and F is 4C.
LAYERS = {
    "residual_forward": "out=BTC inp1:BTC inp2:BTC",
    "gelu_forward": "out=BTC inp:BTC",
    "gelu_backward": "dinp=BTC dout:BTC inp:BTC",
    "matmul_forward": "out=BTO inp:BTC weight:OC bias:O",
    "matmul_backward": "dinp=BTC dweight?OC dbias?O dout:BTO inp:BTC weight:OC",
    "encoder_forward": "out=BTC inp:BT wte:VC wpe:TC",
    "encoder_backward": "dwte+VC dwpe?MC dout:BTC inp:BT",
    "layernorm_forward": "mean=BT rstd=BT out=BTC inp:BTC weight:C bias:C",
    "layernorm_backward": "dinp+BTC dweight?C dbias?C dout:BTC inp:BTC mean:BT rstd:BT weight:C",
    "crossentropy_softmax_forward": "logits~BTV losses=BT targets:BT",
    "crossentropy_softmax_backward": "probs~BTV targets:BT",
    "adamw": "g~P m~P v~P p+P",
    "attention_forward": "out=BTNH lse=BTN qkv:BTQNH",
    "attention_backward": "dqkv=BTQNH dout:BTNH out:BTNH lse:BTN qkv:BTQNH",
}
# The same of the wiring, where a.ln1 is the attribute ln1 of the argument a.
ACTS = (
    "a.ln1_mean=BT a.ln1_rstd=BT a.ln1=BTC a.qkv=BTR a.att_lse=BTN a.atty=BTC a.attproj=BTC "
    "a.residual2=BTC a.ln2_mean=BT a.ln2_rstd=BT a.ln2=BTC a.fch=BTF a.fch_gelu=BTF a.fcproj=BTC "
    "a.residual3=BTC "
)
PARAMS = (
    "p.ln1w:C p.ln1b:C p.qkvw:RC p.qkvb:R p.attprojw:CC p.attprojb:C "
    "p.ln2w:C p.ln2b:C p.fcw:FC p.fcb:F p.fcprojw:CF p.fcprojb:C residual:BTC"
)
WIRING = {
    "forward_layer": ACTS + PARAMS,
    "backward_layer": "w.dfch=BTF g.fcprojw?CF g.fcprojb?C w.dln2=BTC g.fcw?FC g.fcb?F g.ln2w?C "
    "g.ln2b?C w.datty=BTC g.attprojw?CC g.attprojb?C w.dqkv=BTR w.dln1=BTC g.qkvw?RC g.qkvb?R "
    "w.dresidual~BTC g.ln1w?C g.ln1b?C " + ACTS.replace("=", ":") + PARAMS,
}
# {function: {argument: its sign and its axes}}, and what the lengths of the axes are called.
ARGUMENTS = {x: dict(re.findall(r"([\w.]+)(\W\w+)", y)) for x, y in (LAYERS | WIRING).items()}
AXES = dict(zip("BTMVONHCPRF", "B T max_seq_len V OC NH hs C n 3C 4C".split(), strict=True))
TOLERANCE = 1e-9
SEED = 1

TRUTH = {name: inspect.unwrap(getattr(gpt2, name)) for name in LAYERS}
TRUTH |= {name: getattr(gpt2.Model, name) for name in WIRING}  # of the model they read NH only
PARAMETERS = {name: list(inspect.signature(getattr(mine, name)).parameters) for name in TRUTH}

# --------------------------------------------------------------------------------------------------
# Cases. A case is a dict: the lengths of the axes by letter, `add`, and what is special, in words

# B, T, NH, hs, V and OC. In the first, many lengths are equal. So what has a wrong shape in the
# others has only wrong numbers there, and these can be compared.
SIZES = [(2, 2, 2, 2, 4, 4), (2, 5, 3, 4, 11, 7), (3, 4, 2, 5, 13, 9)]
GARBAGE = "what is to be overwritten is NaN before"
LARGE = "all numbers are 400 times as large"
NO_BIAS = "there is no bias"
IN_PLACE = "dinp and dout are one array"


def cases(name):
    """Two lists: plain cases, the simplest first, and special ones."""
    adds = [False, True] if "add" in PARAMETERS[name] else [False]
    special = [GARBAGE] + [LARGE] * (name in LAYERS) + [NO_BIAS] * name.startswith("matmul")
    special += [IN_PLACE] * (name == "gelu_backward")
    shapes = [
        {"B": B, "T": T, "N": N, "H": H, "C": N * H, "R": 3 * N * H, "F": 4 * N * H, "V": V, "O": O}
        | {"M": T + 2, "P": B * T * H, "Q": 3, "add": False, "special": ""}
        for B, T, N, H, V, O in SIZES
    ]
    plain = [sizes | {"add": add} for sizes in shapes for add in adds]
    return plain, [shapes[1] | {"special": words} for words in special]


def case_words(name, case):
    """The sizes of a case, and what else there is to it."""
    used = "".join(ARGUMENTS[name].values()) + "N" * ("NH" in PARAMETERS[name])
    words = [f"{AXES[letter]}={case[letter]}" for letter in "BTMVONHCP" if letter in used]
    words += [f"add={case['add']}"] if "add" in PARAMETERS[name] else []
    return ", ".join(words + [case["special"]] * bool(case["special"]))


def arguments(name, case):
    """The arguments of a call, {name: value}: new arrays, with the same random numbers each time.

    A backward function gets what the trainer's forward function gives.
    """
    rng = np.random.default_rng(SEED)
    values = {"add": case["add"], "NH": case["N"]}
    forward = name.replace("backward", "forward")
    for function in dict.fromkeys([forward, name]):
        for key in [*ARGUMENTS[function], *PARAMETERS[function]]:
            if key not in values:
                values[key] = draw(key, ARGUMENTS[function].get(key, ":")[1:], case, rng)
        if function != name:
            run(TRUTH[forward], forward, values)
            values["probs"] = values.get("logits")

    if name == "backward_layer":  # all layers share these two, so backward can't use them
        values["a.attproj"][...] = values["a.fcproj"][...] = np.nan
    if case["special"] == NO_BIAS:
        values["dbias"] = None
        del values["bias"]
    return values


def draw(key, axes, case, rng):
    """A random number, or a random array with these axes."""
    if not axes:
        return int(rng.integers(2, 9)) if key == "step" else float(rng.uniform(0.5, 0.9))
    lengths = [case[letter] for letter in axes]
    if axes == "BT" and key in ("inp", "targets"):
        return rng.integers(0, case["V"], lengths)
    value = rng.standard_normal(lengths) * (400 if case["special"] == LARGE else 1)
    value = abs(value) if key == "v" else value
    return value.reshape(*lengths[:2], -1) if "H" in axes else value


# --------------------------------------------------------------------------------------------------
# Results: what the student's function wrote, and what the trainer's wrote


def run(function, name, values):
    """Call it with arguments out of a dict: what it returns, and the layers that wiring calls."""
    calls, args = [], []  # a call: the layer's name, {argument: name of the array, or the number}
    for key in PARAMETERS[name]:
        inside = {x.removeprefix(f"{key}."): values[x] for x in values if x.startswith(f"{key}.")}
        if inside or key in values:  # a bias may be missing
            args.append(SimpleNamespace(**inside) if inside else values[key])
    if name in LAYERS:
        return function(*args), calls

    known = {x.ctypes.data: key for key, x in values.items() if isinstance(x, np.ndarray)}

    def watched(layer):
        def call(*args, **options):
            TRUTH[layer](*args, **options)
            given = inspect.signature(TRUTH[layer]).bind(*args, **options).arguments
            arrays = {key: x.ctypes.data for key, x in given.items() if np.ndim(x)}
            names = {key: known.get(place, "another array") for key, place in arrays.items()}
            calls.append((layer, {key: names.get(key, str(x)) for key, x in given.items()}))

        return call

    layers, own = {layer: watched(layer) for layer in LAYERS}, getattr(function, "__globals__", {})
    if function is TRUTH[name]:
        model = SimpleNamespace(config=gpt2.GPT2Config(num_heads=args[-1]))
        args, own = [model, *args[:-1]], {}
    with patch.multiple(gpt2, **layers), patch.dict(own, layers):
        return function(*args), calls


def results(function, name, case, changed=None):
    """Call both functions: a list with a result for each array that they write to.

    `changed` has arguments that are set to a number, {name: number}. A result has

    key, sign, axes         the argument's name, its sign (= or + in place of ?), and its letters
    part                    its name, too, but dqkv has three parts: dq, dk and dv
    yours, right, before    what stands in it afterwards, and before; what was added, if that is +
    values, calls           what is read, or computed before; the calls of layers, of both
    """
    before = arguments(name, case)
    before |= {key: before[key] * 0 + x for key, x in (changed or {}).items()}
    signs = {key: sign[0] for key, sign in ARGUMENTS[name].items() if before.get(key) is not None}
    signs = {key: x.replace("?", "+" if case["add"] else "=") for key, x in signs.items()}

    right, given = copy.deepcopy(before), copy.deepcopy(before)
    for key in [key for key in signs if case["special"] == GARBAGE and signs[key] == "="]:
        given[key].fill(np.nan)
    if case["special"] == IN_PLACE:
        given["dinp"] = given["dout"]
    right_calls = run(TRUTH[name], name, right)[1]
    returned, calls = run(function, name, given)

    found = []
    shared_by_all = {
        "name": name, "function": function, "case": case, "returned": returned, "all": found,
        "values": before if "backward" in name else right | {"p": before.get("p")},
        "calls": (calls, right_calls),
    }  # fmt: skip
    for key, sign in signs.items():
        if sign == ":":
            now, then = np.nan_to_num(given[key]), np.nan_to_num(before[key])
            same = np.array_equal(now, then) or case["special"] == IN_PLACE
            require(same, f"it writes into {key}, which is only read")
            continue
        names = ["dq", "dk", "dv"] if key == "dqkv" else [key]
        axes = ARGUMENTS[name][key][1:].replace("Q", "")
        views = [np.split(x[key], len(names), axis=-1) for x in (given, right, before)]
        for part, *arrays in zip(names, *views, strict=True):
            yours, truth, start = [x.reshape([case[letter] for letter in axes]) for x in arrays]
            added = start if sign == "+" else 0
            own = {"key": key, "part": part, "sign": sign, "axes": axes, "before": start}
            own |= {"yours": yours - added, "right": truth - added}
            found.append(SimpleNamespace(**own, **shared_by_all))
    return found


def near(a, b):
    """Whether two arrays are finite, and equal to rounding."""
    size = max(np.vdot(a, a), np.vdot(b, b))
    return bool(np.vdot(a - b, a - b) <= TOLERANCE**2 * size < np.inf)


# --------------------------------------------------------------------------------------------------
# Hints. A kind of hint is a function that gives what is true of one result, a sentence each


def hint(wrong):
    """What is true of all these results of an array, from the first kind that knows something."""
    wrong = [result for result in wrong if result.case["add"] == wrong[0].case["add"]]
    for kind in [unwritten, rewired, explained]:
        found = [list(kind(result)) for result in wrong]
        for words in found[0]:
            if all(words in others for others in found):
                return words
    return ""


def unwritten(result):
    """What still holds what stood there before."""
    start = result.before * (result.sign != "+")
    right = np.abs(result.yours - result.right) <= TOLERANCE * np.abs(result.right).max()
    if np.array_equal(result.yours, start):
        source = ""
        with contextlib.suppress(OSError, TypeError):
            source = inspect.getsource(result.function)
        rebound = re.search(rf"^ *{result.key} *=[^=]", source, re.MULTILINE)
        words = "nothing is written into it: x[...] = y writes, x = y does not"
        words = words if rebound else "it is not written"
        yield words + "; what a function returns is not read" * (result.returned is not None)
    elif np.all((result.yours == start) | right):
        yield "where it is wrong, it still holds what stood there before"


def rewired(result):
    """How the calls of layers that write it differ from the trainer's, or those before them."""

    def writing(key, calls):
        def writes(name, own):
            return any(own.get(x) == key and sign[0] != ":" for x, sign in ARGUMENTS[name].items())

        return [call for call in calls if writes(*call)]

    yours, right = [writing(result.part, calls) for calls in result.calls]
    names = [" and ".join(name for name, _ in calls) for calls in (yours, right)]
    if yours and names[0] != names[1]:
        yield f"it is written by {names[0]}, in the trainer by {names[1]}"
        return
    for (name, own), (_, other) in zip(yours, right, strict=False):
        keys = [key for key in other if own.get(key) != other[key]]
        given = [", ".join(f"{key}={x.get(key)}" for key in keys) for x in (own, other)]
        if keys:
            yield f"your {name} gets {given[0]}, the trainer's gets {given[1]}"
            return
        early = [calls[: calls.index((name, own))] for calls in result.calls]
        for key in own.values():
            last = [["no layer", *[x for x, _ in writing(key, calls)]][-1] for calls in early]
            if last[0] != last[1]:
                yield f"the last to write {key} before your {name} is {last[0]}, not {last[1]}"


def explained(result):
    """What it is in place of the right one, or which of its terms are not the right ones."""
    yours, right = result.yours, result.right
    start, words = {
        "=": (result.before, "it adds to what stood there before, and should overwrite it"),
        "+": (-result.before, "it overwrites what stood there before, and should add to it"),
    }.get(result.sign, (np.nan, ""))

    whole = {"1 / the right one": 1 / right}
    whole |= {f"the right {x.part}": x.right for x in result.all if x.right.shape == right.shape}
    if right.ndim == 2 and len(right) == len(right.T):
        whole["the right one transposed"] = right.T
    for key, sign in ARGUMENTS[result.name].items() if result.name in LAYERS else ():
        for n in (0, 1) if sign[0] == ":" and result.values[key].dtype.kind == "f" else ():
            changed = results(TRUTH[result.name], result.name, result.case, {key: n})
            same_part = [x.right for x in changed if x.part == result.part]
            whole[f"what would be right if {key} were {n}"] = same_part[0]

    terms = terms_of(result.name, SimpleNamespace(**result.values)).get(result.part, {})
    if "H" in result.axes:
        terms = {x: y.swapaxes(1, 2) for x, y in terms.items()}  # of (B, NH, T, hs)
    own = {x: y for x, y in terms.items() if x[0] != "?"}
    others = {x.removeprefix("? "): y for x, y in terms.items() if x[0] == "?"}

    plain = [{"the right one": right}, own, *[{x: y} for x, y in (others | whole).items()]]
    for i, columns in enumerate([*plain, *[own | {x: y} for x, y in others.items()]]):
        for c in solved(result, yours, columns):
            if i < len(plain) or set(c) <= {"0", "1", "-1"}:
                yield in_words(dict(zip(columns, c, strict=True)), own)
        if any(set(c) <= {"0", "1", "-1"} for c in solved(result, yours - start, columns)):
            yield words


def solved(result, yours, columns):
    """The numbers c of yours = sum of c * column, in words: a list of all ways to name them."""
    rows = [np.broadcast_to(x, yours.shape).ravel() for x in columns.values()]
    if not (0 < len(rows) < yours.size and np.isfinite([*rows, yours.ravel()]).all()):
        return []
    c = np.linalg.lstsq(np.transpose(rows), yours.ravel())[0]
    names = [named(result, x) for x in c] if near(c @ rows, yours.ravel()) else [[]]
    return list(itertools.product(*names))


def named(result, c):
    """The names of a number: of 0, 1, 2, sizes and arguments, of 1/x, 2*x and sqrt(x) of these."""
    if abs(c) < TOLERANCE:
        return ["0"]
    used = "".join(ARGUMENTS[result.name].values())
    numbers = {"2": 2, "(B*T)": result.case["B"] * result.case["T"]}
    numbers |= {AXES[x]: result.case[x] for x in AXES if x in used}
    numbers |= {key: x for key, x in result.values.items() if isinstance(x, float)}
    forms = {"1": 1.0}
    for words, x in numbers.items():
        forms |= {words: x, f"1/{words}": 1 / x, f"2*{words}": 2 * x}
        forms |= {f"sqrt({words})": x**0.5, f"1/sqrt({words})": x**-0.5}
    sign = "-" if c < 0 else ""
    names = [sign + words for words, x in forms.items() if math.isclose(abs(c), x, rel_tol=1e-8)]
    return [*names, f"{c:.6g}"]


def in_words(factors, own):
    """That yours is the sum of these terms, times their factors, {term: factor}."""
    if len(factors) == 1:
        ((words, c),) = factors.items()
        return f"yours is {words}" if c == "1" else f"yours is {c} times {words}"
    found = []
    for words, c in factors.items():
        if words in own and c != "1":
            what = {"0": "is missing", "-1": "has the wrong sign"}
            what = what.get(c, f"is {c} times the right one")
            of_sum = c == "C" and "average" in words
            found.append(f"the term {words} {what}{' (a sum, not an average?)' * of_sum}")
        elif words not in own and c != "0":
            found.append(f"there is {'' if c == '1' else f'{c} times '}{words} in its place")
    return ", and ".join(found)


def terms_of(name, x):
    """{result: {words: array}}: its terms, and what one may take for one of them, marked by "?"."""
    if name == "gelu_backward":
        scale, cube = gpt2.GELU_SCALE, gpt2.GELU_CUBE
        tanh = np.tanh(scale * (x.inp + cube * x.inp**3))
        outer = x.dout * 0.5 * x.inp * (1 - tanh**2)
        terms = {
            "dout * 0.5 * (1 + tanh(u))": x.dout * 0.5 * (1 + tanh),
            "dout * 0.5 * inp * (1 - tanh(u)^2) * u'": outer * scale * (1 + 3 * cube * x.inp**2),
            "? dout * 0.5 * inp * (1 - tanh(u)^2)": outer,
        }
        return {"dinp": terms}

    if name == "layernorm_backward":
        rstd = x.rstd[..., np.newaxis]
        norm = (x.inp - x.mean[..., np.newaxis]) * rstd
        dnorm = x.dout * x.weight
        average = lambda y: y.mean(axis=-1, keepdims=True)
        terms = {
            "rstd * dnorm": rstd * dnorm,
            "-rstd * average(dnorm)": -rstd * average(dnorm),
            "-rstd * norm * average(dnorm * norm)": -rstd * norm * average(dnorm * norm),
            "? -rstd * norm * average(dout * norm)": -rstd * norm * average(x.dout * norm),
            "? -rstd * norm * average(dnorm)": -rstd * norm * average(dnorm),
            "? -rstd * average(dnorm * norm)": -rstd * average(dnorm * norm),
            "? -norm * average(dnorm * norm)": -norm * average(dnorm * norm),
        }
        return {"dinp": terms}

    if name == "crossentropy_softmax_backward":
        target = np.eye(x.probs.shape[-1])[x.targets]
        terms = {"dloss * probs": x.dloss * x.probs, "-dloss at the target": -x.dloss * target}
        return {"probs": terms | {"? -1 at the target": -target}}

    if name == "adamw":
        c1, c2 = 1 - x.beta1**x.step, 1 - x.beta2**x.step
        step = -x.learning_rate * x.m
        right = step / c1 / ((x.v / c2) ** 0.5 + x.eps)
        terms = {
            "-decay * p": -x.decay * x.p,
            "-learning_rate * (m / c1) / (sqrt(v / c2) + eps)": right,
            "? -learning_rate * m / (sqrt(v) + eps)": step / (x.v**0.5 + x.eps),
        }
        return {"p": terms}

    return attention_terms(x) if name.startswith("attention") else {}


def attention_terms(x):
    """The same for attention, with the names of the sheet, in which preatt is a score."""
    q, k, v = gpt2.split_qkv(x.qkv, x.NH)
    dout = gpt2.split_heads(getattr(x, "dout", x.out), x.NH)
    root = q.shape[-1] ** 0.5
    scores = q @ k.mT
    later = np.triu(np.full(scores.shape[-2:], -np.inf), 1)

    def softmax(preatt):
        exp = np.exp(preatt - preatt.max(axis=-1, keepdims=True))
        return exp / exp.sum(axis=-1, keepdims=True)

    att = softmax(scores / root + later)
    wrong = att * (dout @ v.mT)
    return {
        "out": {
            "? what preatt = q . k would give": softmax(scores + later) @ v,
            "? what preatt = q . k / hs would give": softmax(scores / root**2 + later) @ v,
            "? what it would be if t2 > t were not hidden": softmax(scores / root) @ v,
        },
        "dq": {"? what dpreatt = att * datt would give": wrong @ k / root},
        "dk": {"? what dpreatt = att * datt would give": wrong.mT @ q / root},
    }


# --------------------------------------------------------------------------------------------------
# The verdict on a function, and the program


def verdict(function, name, path):
    """Lines that say what is wrong with it: none if it is right."""
    for stage in cases(name):
        wrong, trouble = {}, []
        for case in stage:
            try:
                for result in results(function, name, case):
                    yours, large = result.yours, case["special"] == LARGE
                    # With large numbers rounding shows, and only NaN counts.
                    if not (np.isfinite(yours).all() if large else near(yours, result.right)):
                        wrong.setdefault(result.part, []).append(result)
            except Exception as error:
                trouble = trouble or [f"{said(error, path)} ({case_words(name, case)})"]
        if wrong or trouble:
            return [*(described(wrong) if wrong else []), *trouble]
    return []


def described(wrong):
    """Lines on the first of these results, {its name: it in all cases in which it is wrong}."""
    part, found = next(iter(wrong.items()))
    first = found[0]
    words = "in plain cases it is right" if first.case["special"] else hint(found)

    yours, right = first.yours, first.right
    error = np.linalg.norm(yours - right) / (np.linalg.norm(right) or 1)
    worst = np.argmax(np.nan_to_num(np.abs(yours - right), nan=np.inf))
    index = ", ".join(str(i) for i in np.unravel_index(worst, right.shape))
    adds = " adds" if first.sign == "+" else ""
    return [
        f"{part} is wrong ({case_words(first.name, first.case)})",
        f"relative error {error:.1e}",
        f"worst at [{index}] of ({', '.join(AXES[letter] for letter in first.axes)}): "
        f"yours{adds} {yours.flat[worst]:.8g}, right{adds} {right.flat[worst]:.8g}",
        *([f"hint: {words}"] if words else []),
    ]


def said(error, path):
    """An exception in one line, with the line of the student's file."""
    if isinstance(error, InputError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [x.lineno for x in frames if os.path.abspath(x.filename) == os.path.abspath(path)]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())}".removesuffix(": ")


def write_sheet(path="mine.py"):
    """Write the work sheet, where there is none, and say how to begin."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(inspect.getsource(mine))
    except FileExistsError:
        raise InputError(f"{path} is there, and stays: python -m extras.exercises {path}") from None
    print(f"{path} is your work sheet. Fill in one of its functions, and ask:\n")
    print(f"    python -m extras.exercises {path}\n")
    print(mine.__doc__[mine.__doc__.index("A course") :].rstrip())
    return True


def load(path):
    """{name: function}: what a student's file fills in. All else is the trainer's in it."""
    require(os.path.isfile(path), f"{path}: no such file; without its name, one is written")
    try:
        content = runpy.run_path(path, dict(TRUTH))
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: {said(error, path)}") from None

    with open(path, "rb") as file:
        names = [getattr(node, "name", "") for node in ast.parse(file.read()).body]
    filled = {}
    for name in TRUTH:
        require(names.count(name) < 2, f"{path} defines {name} twice: take one of them out")
        own = content.get(name, TRUTH[name])
        code, empty = getattr(own, "__code__", None), getattr(mine, name).__code__
        if code and (code.co_code, code.co_names) == (empty.co_code, empty.co_names):
            own.__globals__[name] = TRUTH[name]  # so that what is filled in can call it
        elif inspect.unwrap(own) is not TRUTH[name]:
            filled[name] = own
    return filled


def train(functions):
    """The losses of 20 updates of a small model, trained with these functions."""

    class Student(gpt2.Model):
        def forward_layer(self, p, a, residual, whole=True):
            functions["forward_layer"](p, a, residual, self.config.num_heads)

        def backward_layer(self, p, g, a, w, residual, add):
            functions["backward_layer"](p, g, a, w, residual, add, self.config.num_heads)

    for name in WIRING.keys() - functions.keys():
        delattr(Student, name)  # so it is that of Model
    config = gpt2.GPT2Config(max_seq_len=8, vocab_size=128, num_layers=2, num_heads=2, channels=8)
    model = Student(config, batch_size=2, sequence_length=8)
    tokens = np.fromfile(gpt2.__file__, np.uint8)[:4000] % 128
    loader = gpt2.DataLoader([tokens], 2, 8, shuffle_seed=1)
    with patch.multiple(gpt2, **{name: functions.get(name, TRUTH[name]) for name in LAYERS}):
        return [gpt2.train_step(model, loader, 2, 1e-2)[0] for _ in range(20)]


def answer(path):
    """Print a verdict on each function of a student's file. Returns whether all are right."""
    functions, right = load(path), True
    for name, function in functions.items():
        print(f"{name}: ", end="", flush=True)  # now, to show what takes long, or is stopped
        with np.errstate(all="ignore"):
            lines = verdict(function, name, path)
        right = right and not lines
        print("wrong" if lines else "right")
        for line in lines:
            print(textwrap.fill(line, 80, initial_indent="    ", subsequent_indent=" " * 8))

    if functions and right:
        losses, others = train(functions), train({})
        some = ", ".join(f"{losses[i]:.3f}" for i in (0, 4, 9, 14, 19))
        same = np.allclose(losses, others, rtol=1e-3)
        print(f"All right. A small model trains with it; its loss at updates 1, 5, ..., 20: {some}")
        require(same, f"the trainer's ends at {others[-1]:.3f}, though in float64 all is right")
    missing = [name for name in TRUTH if name not in functions]
    if right:
        nothing = "" if functions else "Nothing is filled in yet. "
        print(f"{nothing}Next: {missing[0]}" if missing else "That is all of GPT-2.")
    return right


def main(argv=None):
    """The command line. Returns the exit code: 0, 1 if something is wrong, 130 at Ctrl-C."""
    parser = argparse.ArgumentParser("python -m extras.exercises", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", nargs="?", metavar="mine.py", help="your work sheet")
    path = parser.parse_args(argv).file

    try:
        right = write_sheet() if path is None else answer(path)
        return 0 if right else 1
    except KeyboardInterrupt:
        print("\nstopped: run it again", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"error: {said(error, path or '')}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
