"""
Exercises with a tutor: write a layer yourself, and ask whether it is right.

    cp extras/mine.py mine.py
        the work sheet: fill in one of its functions, or several

    python -m extras.exercises mine.py
        says of each of them that it is right, or what is wrong with it

What is not filled in is the trainer's own, also when you call it. If all that
you wrote is right, it trains a small model for 20 updates, with the trainer
beside it.

Your function and the trainer's get the same random numbers, in float64, in
several shapes. Hints come from comparing the two results: one is given only
if it holds, to rounding, in every plain case in which yours is wrong.
"""

import argparse
import ast
import copy
import difflib
import functools
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
from typing import NamedTuple

import numpy as np

import train_gpt2 as gpt2
from train_gpt2 import InputError, require

TRUTH = {
    name: function
    for name, function in vars(gpt2).items()
    if name.endswith(("_forward", "_backward")) or name == "adamw"
}
PARAMETERS = {name: list(inspect.signature(TRUTH[name]).parameters) for name in TRUTH}

# The axes of each layer's arrays, a letter each; those of dx are those of x. What is not here is a
# number. In attention, Q is 3, for query, key and value, and NH are the two axes of C channels.
AXES = {
    "encoder": {"out": "BTC", "inp": "BT", "wte": "VC", "wpe": "TC", "dwpe": "MC"},
    "layernorm": {
        "out": "BTC", "inp": "BTC", "mean": "BT", "rstd": "BT", "weight": "C", "bias": "C",
    },
    "matmul": {"out": "BTO", "inp": "BTC", "weight": "OC", "bias": "O"},
    "attention": {"out": "BTNH", "lse": "BTN", "qkv": "BTQNH"},
    "gelu": {"out": "BTC", "inp": "BTC"},
    "residual": {"out": "BTC", "inp1": "BTC", "inp2": "BTC"},
    "crossentropy_softmax": {"losses": "BT", "logits": "BTV", "probs": "BTV", "targets": "BT"},
    "adamw": {"p": "P", "g": "P", "m": "P", "v": "P"},
}  # fmt: skip
LETTERS = "BTMVONHCP"  # in the order in which they stand in every array
SIZES = {  # what the length of an axis is called
    "B": "B", "T": "T", "M": "max_seq_len", "V": "V", "O": "OC", "N": "NH", "H": "hs", "C": "C",
    "P": "n",
}  # fmt: skip
PLACES = {  # what there is at an index of an axis
    "B": "sequence", "T": "position", "M": "position", "V": "token", "O": "output channel",
    "N": "head", "H": "channel", "C": "channel", "P": "parameter",
}  # fmt: skip

# Results that are computed before the others of their function.
EARLY = ("mean", "rstd", "logits", "g", "m", "v")

SEED = 1
TOLERANCE = 1e-9


# --------------------------------------------------------------------------------------------------
# Cases: the arguments of a call


class Case(NamedTuple):
    """One call: the sizes by letter, `add`, and what else is special about it, in words."""

    sizes: dict
    add: bool = False
    special: str = ""


def sizes_of(B, T, N, H, V, O):
    """The lengths of all axes, by letter."""
    others = {"C": N * H, "M": T + 2, "P": B * T * H, "Q": 3}
    return {"B": B, "T": T, "N": N, "H": H, "V": V, "O": O} | others


# In the first, many lengths are equal. So what has a wrong shape in the others has only wrong
# numbers there, and these can be compared.
SHAPES = [sizes_of(2, 2, 2, 2, 4, 4), sizes_of(2, 5, 3, 4, 11, 7), sizes_of(3, 4, 2, 5, 13, 9)]

GARBAGE = "what is to be overwritten is NaN before"
LARGE = "all numbers are 400 times as large"
TRANSPOSED = "what is only read is a transposed view"
NO_BIAS = "there is no bias"
IN_PLACE = "dinp and dout are one array"


def cases(name):
    """Two lists: plain cases, the simplest first, and special ones."""
    adds = [False, True] if "add" in PARAMETERS[name] else [False]
    special = [GARBAGE, LARGE, TRANSPOSED]
    if name.startswith("matmul"):
        special.append(NO_BIAS)
    if name == "gelu_backward":
        special.append(IN_PLACE)
    plain = [Case(sizes, add) for sizes in SHAPES for add in adds]
    return plain, [Case(SHAPES[1], False, words) for words in special]


def layer_of(name):
    """The layer of a function: layernorm of layernorm_forward."""
    return name.removesuffix("_forward").removesuffix("_backward")


def axes_of(name, key):
    """The letters of an argument's axes; none if it is a number."""
    table = AXES[layer_of(name)]
    return table.get(key) or table.get(key.removeprefix("d"), "")


def letters_of(name):
    """The letters of all axes of a layer, in their order."""
    used = "".join(AXES[layer_of(name)].values())
    return [letter for letter in LETTERS if letter in used]


def arguments(name, case, change=None):
    """The arguments of a call, {name: value}: new arrays, with the same random numbers each time.

    change(key, value) returns what takes the place of a value that was drawn. A backward function
    gets what the trainer's forward function gives.
    """
    rng = np.random.default_rng(SEED)
    values = {"add": case.add, "NH": case.sizes["N"]}

    def draw_for(function):
        for key in PARAMETERS[function]:
            if key not in values:
                value = draw(key, axes_of(name, key), case, rng)
                values[key] = change(key, value) if change else value

    forward = layer_of(name) + "_forward"
    if name != forward and forward in TRUTH:
        draw_for(forward)
        call(TRUTH[forward], forward, values)
        values["probs"] = values.get("logits")
    draw_for(name)
    if case.special == NO_BIAS:
        values["dbias"] = None
        del values["bias"]
    return {key: values[key] for key in PARAMETERS[name] if key in values}


def draw(key, axes, case, rng):
    """A random number, or a random array with these axes."""
    if key == "step":
        return int(rng.integers(2, 9))
    if not axes:
        return float(rng.uniform(0.5, 0.9))

    shape = [case.sizes[letter] for letter in axes]
    if axes == "BT" and key in ("inp", "targets"):
        return rng.integers(0, case.sizes["V"], shape)
    value = rng.standard_normal(shape)
    value = value * 400 if case.special == LARGE else value
    value = abs(value) if key == "v" else value
    return value.reshape(*shape[:2], -1) if "N" in axes else value


def call(function, name, values):
    """Call a function with its arguments out of a dict."""
    with np.errstate(all="ignore"):
        return function(*[values[key] for key in PARAMETERS[name] if key in values])


@functools.cache
def roles(name, add):
    """{argument: "overwritten", "added to" or "updated"}, of those that the function writes to."""

    def after(key, start):
        values = arguments(name, Case(SHAPES[1], add))
        values[key] = start(values[key])
        call(TRUTH[name], name, values)
        return values[key]

    found = {}
    for key, before in arguments(name, Case(SHAPES[1], add)).items():
        plain = after(key, lambda x: x)
        if np.array_equal(plain, before):
            continue
        found[key] = "updated"
        if np.isfinite(after(key, lambda x: x * np.nan)).all():
            found[key] = "overwritten"
        elif near(after(key, lambda x: x + 1), plain + 1):
            found[key] = "added to"
    return found


def make_special(name, case, values):
    """Change the arguments to what is special about a case."""
    for key, value in values.items():
        role = roles(name, case.add).get(key)
        if case.special == GARBAGE and role == "overwritten":
            value.fill(np.nan)
        elif case.special == TRANSPOSED and role is None and np.ndim(value) == 3:
            columns = value.reshape(-1, value.shape[-1]).T.copy()
            values[key] = columns.T.reshape(value.shape)
    if case.special == IN_PLACE:
        values["dinp"] = values["dout"]


# --------------------------------------------------------------------------------------------------
# Results: what the student's function wrote, and what the trainer's wrote


def results(function, name, case, change=None):
    """Call both functions: a list with a result for each array that they write to.

    key, axes, role         the argument's name, its letters, and what `roles` says of it
    part                    its name, too, but dqkv has three parts: dq, dk and dv
    yours, right, before    what stands in it afterwards, and before, with all axes of the layer: of
                            length 1 if it has not got them. If it is added to, yours and right are
                            what was added
    known                   {part: array}: what is read, what the right forward function gives, and
                            what the formulas of the work sheet make of it
    numbers                 {name: number}: the arguments that are numbers
    """
    before = arguments(name, case, change)
    right, given = copy.deepcopy(before), copy.deepcopy(before)
    make_special(name, case, given)
    call(TRUTH[name], name, right)
    returned = call(function, name, given)

    known, found = {}, []
    shared_by_all = {
        "name": name, "function": function, "case": case, "returned": returned, "known": known,
        "numbers": {key: x for key, x in before.items() if isinstance(x, float)}, "all": found,
    }  # fmt: skip
    for key, value in sorted(before.items(), key=lambda pair: pair[0] not in EARLY):
        role = roles(name, case.add).get(key)
        if role is None and case.special != IN_PLACE:
            require(np.array_equal(given[key], value), f"it writes into {key}, which is only read")
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            continue
        if role is None or role == "updated":
            known |= parts(name, key, value, case)
        elif name.endswith("_forward"):
            known |= parts(name, key, right[key], case)
        if role is not None:
            views = [parts(name, key, values[key], case) for values in (given, right, before)]
            for part in views[0]:
                yours, truth, start = [view[part] for view in views]
                if role == "added to":
                    yours, truth = yours - start, truth - start
                own = {"key": key, "part": part, "role": role, "axes": axes_of(name, key)}
                own |= {"yours": yours, "right": truth, "before": start}
                found.append(SimpleNamespace(**own, **shared_by_all))

    if name == "layernorm_backward":
        known["(inp - mean)"] = known["inp"] - known["mean"]
        known["norm"] = known["(inp - mean)"] * known["rstd"]
    if name == "gelu_backward":
        u = gpt2.GELU_SCALE * (known["inp"] + gpt2.GELU_CUBE * known["inp"] ** 3)
        known["0.5 * (1 + tanh(u))"] = 0.5 * (1 + np.tanh(u))
    return found


def parts(name, key, value, case):
    """{part: array with all axes of the layer}: one array, or the three of qkv and dqkv."""
    axes = axes_of(name, key)
    pieces = {key: value}
    if "Q" in axes:
        names = [key.removesuffix("qkv") + letter for letter in "qkv"]
        pieces = dict(zip(names, np.split(value, 3, axis=-1), strict=True))
    shape = [case.sizes[letter] if letter in axes else 1 for letter in letters_of(name)]
    return {part: piece.reshape(shape) for part, piece in pieces.items()}


def near(a, b):
    """Whether two arrays are finite, and equal to rounding."""
    difference = a - b
    size = max(np.vdot(a, a), np.vdot(b, b))
    return bool(np.vdot(difference, difference) <= TOLERANCE**2 * size < np.inf)


def right_at(result):
    """Where it is right: an array of booleans."""
    return np.abs(result.yours - result.right) <= TOLERANCE * np.abs(result.right).max()


def is_wrong(result):
    """Whether it is not the right one. With large numbers rounding shows, and only NaN counts."""
    if result.case.special == LARGE:
        return not np.isfinite(result.yours).all()
    return not near(result.yours, result.right)


# --------------------------------------------------------------------------------------------------
# Hints: from one call of both functions
#
# A kind of statement is a function that gives what is true of one result, a sentence each. What is
# true of all wrong results of an array is a hint.


def hints(wrong):
    """What is true of all these results of an array: the kind of statement that says most."""
    kinds = [unwritten, overwriting, alike, term, influence, two_terms, vanishing_sum, where_right]
    with np.errstate(all="ignore"):
        for kind in kinds:
            found = shared(kind, wrong)
            if found:
                return found[: 2 if kind is where_right else 1]
    return []


def shared(kind, wrong):
    """The statements of this kind that are true of all these results."""
    common = list(kind(wrong[0]))
    for result in wrong[1:]:
        others = set(kind(result)) if common else ()
        common = [words for words in common if words in others]
    return common


def unwritten(result):
    """What still holds what stood there before."""
    start = np.zeros_like(result.before) if result.role == "added to" else result.before
    if np.array_equal(result.yours, start):
        words = "it is not written"
        if rebinds(result.function, result.key):
            words = "nothing is written into it: x[...] = y writes, x = y does not"
        yield words if result.returned is None else f"{words}; what a function returns is not read"
    elif np.all((result.yours == start) | right_at(result)):
        yield "where it is wrong, it still holds what stood there before"


def rebinds(function, name):
    """Whether name = ... is a line of a function, as far as its text can be read."""
    try:
        return re.search(rf"^ *{name} *=[^=]", inspect.getsource(function), re.MULTILINE)
    except (OSError, TypeError):
        return False


def alike(result):
    """What it is in place of the right one, if that is something simple."""
    yours, right = result.yours, result.right
    letters = letters_of(result.name)
    for c in multiples(yours, right, result):
        yield f"yours is {c} times the right one"

    candidates = {
        "yours is 1 / the right one": 1 / right,
        "yours is the square of the right one": right**2,
    }
    for part, x in result.known.items():
        candidates[f"yours is the right one divided by {part}"] = right / x
        candidates[f"yours is the right one times {part}"] = right * x
        for words, reduced in reductions(part, x, letters).items():
            candidates[f"yours is the {words}"] = reduced
    for other in result.all:
        candidates[f"yours is the right {other.part}"] = other.right
    axes = [axis for axis, n in enumerate(right.shape) if n > 1]
    for i, j in itertools.combinations(axes, 2):
        names = f"{SIZES[letters[i]]} and {SIZES[letters[j]]}"
        words = f"yours is the right one transposed, with {names} exchanged"
        candidates[words] = right.swapaxes(i, j)
    for words, x in candidates.items():
        if x.size == yours.size and near(x.reshape(-1), yours.reshape(-1)):
            yield words

    for axis in axes:
        factor = (yours * right).sum(axis, keepdims=True) / (right**2).sum(axis, keepdims=True)
        if near(yours, factor * right):
            places = f"{PLACES[letters[axis]]}s"
            yield f"yours is the right one times a factor that is the same for all {places}"


def multiples(a, b, result):
    """The names of the number c if a = c * b, the simplest first; none if there is no such number.

    b may have fewer axes than a.
    """
    square = np.vdot(b, b) * (a.size / b.size)
    c = np.sum(a * b) / square if square else 0.0
    if c == 0 or not near(a, c * b):
        return []
    return [*named(c, result), f"{c:.6g}", "a number"]


def named(c, result):
    """Names of a number c: 1, 2, the size of an axis or an argument, or 1/x or sqrt(x) of these."""
    sizes = result.case.sizes
    numbers = {"2": 2} | {SIZES[letter]: sizes[letter] for letter in letters_of(result.name)}
    if "T" in numbers:
        numbers["(B*T)"] = sizes["B"] * sizes["T"]
    if "C" in numbers:
        numbers["(C - 1)"] = sizes["C"] - 1
    forms = {"1": 1.0}
    for words, x in (numbers | result.numbers).items():
        forms |= {words: x, f"1/{words}": 1 / x, f"2*{words}": 2 * x}
        forms |= {f"sqrt({words})": x**0.5, f"1/sqrt({words})": x**-0.5}

    sign = "-" if c < 0 else ""
    return [sign + words for words, x in forms.items() if math.isclose(abs(c), x, rel_tol=1e-9)]


def times(c, words):
    """c * words, of which c is the name of a number."""
    return {"1": words, "-1": f"-{words}"}.get(c, f"{c} * {words}")


def reductions(words, x, letters):
    """{words: array}: the means and sums of x over some of its axes."""
    found = {}
    words = f"({words})" if " * " in words else words
    axes = [axis for axis, n in enumerate(x.shape) if n > 1]
    for k in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, k):
            over = ", ".join(SIZES[letters[axis]] for axis in chosen)
            found[f"mean over {over} of {words}"] = x.mean(chosen, keepdims=True)
            found[f"sum over {over} of {words}"] = x.sum(chosen, keepdims=True)
    return found


def products(arrays):
    """{words: array}: these arrays, and the products of two of them."""
    pairs = itertools.combinations(arrays.items(), 2)
    return arrays | {f"{a} * {b}": x * y for (a, x), (b, y) in pairs}


def fits(x, shape):
    """Whether x can be broadcast to a shape."""
    return np.broadcast_shapes(x.shape, shape) == shape


def gradients(result):
    """{words: array}: products of dout with others, their sums and means, and products of these."""
    known = dict(result.known)
    dout = known.pop("dout", None)
    if dout is None:
        return {}
    others = products(known)
    inner = {"dout": dout} | {f"dout * {words}": dout * x for words, x in others.items()}
    found = dict(inner)
    for words, x in inner.items():
        for short, y in reductions(words, x, letters_of(result.name)).items():
            found[short] = y
            if re.match(r"mean over \w+ of", short):
                found |= {f"{outer} * {short}": z * y for outer, z in others.items()}
    return {words: x for words, x in found.items() if fits(x, result.right.shape)}


def term(result):
    """A term of a sum that the right one has, and yours has not, or has with another factor."""
    letters, shape = letters_of(result.name), result.right.shape
    known = dict(result.known)
    if result.role == "overwritten":
        known.pop(result.part, None)
    plain = products(known)
    for (a, x), (b, y) in itertools.combinations(known.items(), 2):
        plain |= {f"({a} - {b})": x - y, f"({a} - {b})^2": (x - y) ** 2}
    terms = {"1": np.ones((1,) * len(shape)), **plain}
    for words, x in plain.items():
        terms |= reductions(words, x, letters)
    for words, x in gradients(result).items():
        terms[words] = x
        if " over " not in words:
            terms[f"(the right one - {words})"] = result.right - x

    compared = [("yours", result.yours, "the right one", result.right)]
    if (result.yours > 0).all() and (result.right > 0).all():
        compared.append(("1/yours^2", result.yours**-2, "1/right^2", result.right**-2))
    found = []
    for words, x in terms.items():
        for ours, yours, theirs, right in compared if fits(x, shape) else ():
            for c in multiples(right - yours, x, result):
                product = c if words == "1" else times(c, words)
                found.append(f"{theirs} minus {ours} is {product}")
            if near(yours, x):
                found.append(f"{ours} is {words}")
    return sorted(found, key=lambda words: ("a number" in words, len(words)))


def two_terms(result):
    """Two terms of a gradient that make the difference, if their factors have names."""
    terms = gradients(result)
    difference = (result.right - result.yours).reshape(-1)
    rows = [np.broadcast_to(x, result.right.shape).reshape(-1) for x in terms.values()]

    # The share of the difference in the plane of two terms, from the cosines between all three.
    unit = [x / np.linalg.norm(x) for x in (*rows, difference)]
    cosines = np.inner(unit, unit)
    a, b = cosines[-1], cosines[:, -1:]
    share = (a**2 + b**2 - 2 * a * b * cosines) / (1 - cosines**2)

    found = []
    for i, j in np.argwhere(np.triu(abs(share - 1) < TOLERANCE, 1)[:-1, :-1]):
        c, d = np.linalg.lstsq(np.transpose([rows[i], rows[j]]), difference)[0]
        if near(c * rows[i] + d * rows[j], difference):
            for x, y in itertools.product(named(c, result), named(d, result)):
                x, y = times(x, list(terms)[i]), times(y, list(terms)[j])
                found.append(f"the right one minus yours is {x} + {y}".replace("+ -", "- "))
    return sorted(found, key=len)


# --------------------------------------------------------------------------------------------------
# Hints: from more calls, with other arguments


def again(result, change, case=None):
    """The same result with other arguments, or None if the call fails or yours is not finite."""
    try:
        found = results(result.function, result.name, case or result.case, change)
    except Exception:
        return None
    for other in found:
        if other.part == result.part and np.isfinite(other.yours).all():
            return other
    return None


def doing(result, where=...):
    """What it does with what stood there before: "adds" to it, or "overwrites" it; or None."""
    other = again(result, changing(result.key, moved))
    if other is None:
        return None
    start = (other.before - result.before)[where]
    end = (other.yours - result.yours)[where] + (start if result.role == "added to" else 0)
    if near(end, start):
        return "adds"
    return "overwrites" if near(end - start, -start) else None


def overwriting(result):
    """= in place of +=, or += in place of =."""
    name, key, case = result.name, result.key, result.case
    other = again(result, None, case._replace(add=not case.add))
    if other and roles(name, True)[key] != roles(name, False)[key]:
        words = doing(result)
        if words and words == doing(other):
            yield f"it {words}, whatever `add` says"

    words = doing(result, ~right_at(result))
    if result.role == "overwritten" and words == "adds":
        yield "it adds to what stood there before, and should overwrite it"
    if result.role == "added to" and words == "overwrites":
        yield "it overwrites what stood there before, and should add to it"


def free_arguments(result):
    """{name: value} of the arguments that are read, and do not follow from others."""
    drawn = {}
    arguments(result.name, result.case, drawn.setdefault)
    written = roles(result.name, result.case.add)
    names = [key for key in PARAMETERS[result.name] if key in drawn]
    return {key: drawn[key] for key in names if written.get(key, "updated") == "updated"}


def changing(chosen, new):
    """The change that gives one argument another value, new(value)."""
    return lambda key, value: new(value) if key == chosen else value


def in_turn(first, then):
    """Two changes, one after the other. The first may be None."""
    return lambda key, value: then(key, first(key, value) if first else value)


def moved(value, index=...):
    """Another number; or other numbers, or ids of tokens, at an index of an array."""
    if not isinstance(value, np.ndarray):
        return value + 1 if isinstance(value, int) else value / 2
    factors = np.random.default_rng(2).uniform(1.1, 1.9, value.shape)
    others = value * factors if value.dtype.kind == "f" else np.where(value > 0, value - 1, 1)
    value = value.copy()
    value[index] = others[index]
    return value


def reactions(result, change):
    """(yours, right): where each of the two is another one after a change, not only by rounding."""
    other = again(result, change)
    found = []
    for x in ("yours", "right"):
        before = getattr(result, x)
        after = getattr(other, x, before)
        found.append(np.abs(after - before) > TOLERANCE * np.abs(before).max())
    return found


def influence(result):
    """Arguments, or places in them, that should not matter for it and do, or the reverse."""
    letters = letters_of(result.name)
    for key, value in free_arguments(result).items():
        ours, theirs = reactions(result, changing(key, moved))
        if theirs.any() and not ours.any():
            yield f"yours does not depend on {key}, the right one does"

        for axis, letter in enumerate(axes_of(result.name, key)):
            if letter in "BTC":
                others = tuple(i for i, x in enumerate(letters) if x != letter)
                ours, theirs = set(), set()
                for j in range(value.shape[axis]):
                    change = functools.partial(moved, index=(slice(None),) * axis + (j,))
                    both = reactions(result, changing(key, change))
                    ours |= relations(j, both[0].any(others), value.shape[axis])
                    theirs |= relations(j, both[1].any(others), value.shape[axis])
                for words in in_short(ours - theirs, letter):
                    yield f"yours depends on {key} at {words}, the right one does not"
                for words in in_short(theirs - ours, letter):
                    yield f"yours does not depend on {key} at {words}, the right one does"


def relations(j, reacts, n):
    """Where place j of n is, as seen from the places of the result that react to it: some words."""
    if len(reacts) == 1:  # the result has no such axis
        return {{0: "the first", n - 1: "the last"}.get(j, "other")} if reacts.any() else set()
    seen_from = {-1: "earlier", 0: "the same", 1: "later"}
    return {seen_from[np.sign(j - i)] for i in np.flatnonzero(reacts)}


def in_short(relations, letter):
    """The words of `relations` with what they say it of. Earlier and later ones are other ones."""
    if {"earlier", "later"} <= relations:
        relations = relations - {"earlier", "later"} | {"other"}
    place = PLACES[letter]
    return [f"{x} {place}" if "the" in x.split() else f"{x} {place}s" for x in sorted(relations)]


def where_right(result):
    """Places at which it is right, or not even finite, and what makes all of it right."""
    if not np.isfinite(result.yours).all():
        yield "it is NaN or infinite in places"
    for axis, letter in enumerate(letters_of(result.name)):
        others = tuple(i for i in range(result.right.ndim) if i != axis)
        right = right_at(result).all(others)
        if len(right) > 1:
            for words, i in (("first", 0), ("last", len(right) - 1)):
                alone = np.arange(len(right)) == i
                if np.array_equal(right, alone):
                    yield f"it is right at the {words} {PLACES[letter]} only"
                if np.array_equal(right, ~alone):
                    yield f"it is wrong at the {words} {PLACES[letter]} only"

    found = []
    for words, change, case in simpler(result):
        other = again(result, change, case)
        if is_right_and_not_empty(other):
            changes = [in_turn(change, changing(key, moved)) for key in free_arguments(result)]
            influences = sum(reactions(other, both)[1].any() for both in changes)
            found.append((influences, f"yours is right if {words}"))
    # What leaves most arguments their influence comes first: it says most.
    yield from [words for _, words in sorted(found, key=lambda pair: -pair[0])]


def is_right_and_not_empty(result):
    """Whether the right one is not simply 0, or what stood there before, and yours the same."""
    if result is None or not near(result.yours, result.right):
        return False
    gained = result.right - result.before if result.role == "updated" else result.right
    return min(np.abs(gained).max(), np.abs(result.right).max()) > TOLERANCE


def simpler(result):
    """(words, change, case) of calls in which something is simpler."""
    sizes = result.case.sizes
    for letter in "NHBT":
        if letter in letters_of(result.name):
            smaller = sizes_of(**{x: 1 if x == letter else sizes[x] for x in "BTNHVO"})
            yield f"{SIZES[letter]} is 1", None, result.case._replace(sizes=smaller)

    for key, value in free_arguments(result).items():
        if np.asarray(value).dtype.kind == "f":
            yield f"{key} is 0", changing(key, lambda value: value * 0), None
            if np.ndim(value):
                yield f"{key} is 1", changing(key, lambda value: value * 0 + 1), None
        elif np.ndim(value):
            unique = changing(key, lambda value: np.arange(value.size).reshape(value.shape))
            yield "no token occurs twice", unique, None
        if isinstance(value, int) or key == "inp":
            yield f"{key} is a million", changing(key, lambda value: value * 0 + 10**6), None
        if np.ndim(value) == 2 and len(value) == len(value.T):
            yield f"{key} is symmetric", changing(key, lambda value: value + value.T), None


def vanishing_sum(result):
    """Sums over an axis of dout, or of its product with others: yours is right if one is 0."""
    terms, letters = gradients(result), letters_of(result.name)
    for (words, x), axis in itertools.product(terms.items(), range(len(letters))):
        dout = result.known["dout"]
        if " over " not in words and x.shape == dout.shape and dout.shape[axis] > 1:
            change = functools.partial(without, x / dout, axis)
            if is_right_and_not_empty(again(result, changing("dout", change))):
                yield f"yours is right if the sum over {SIZES[letters[axis]]} of {words} is 0"


def without(y, axis, value):
    """A value less its share of y, so that the sum of their product over an axis is 0."""
    x = value.reshape(y.shape)
    share = (x * y).sum(axis, keepdims=True) / (y * y).sum(axis, keepdims=True)
    return (x - share * y).reshape(value.shape)


# --------------------------------------------------------------------------------------------------
# The verdict on a function


def verdict(function, name, path):
    """Lines that say what is wrong with it: none if it is right."""
    for stage in cases(name):
        wrong, troubles = tried(function, name, stage, path)
        if wrong or troubles:
            return [*described(wrong), *troubles[:1]]
    return []


def tried(function, name, stage, path):
    """(wrong, troubles) in these cases: {part: its wrong results}, and calls that fail, in words.

    If the first thing that is found is a call that fails, no more calls are made.
    """
    wrong, troubles = {}, []
    for case in stage:
        try:
            for result in results(function, name, case):
                if is_wrong(result):
                    wrong.setdefault(result.part, []).append(result)
        except Exception as error:
            troubles.append(f"{said(error, path)} ({case_words(name, case)})")
            if not wrong:
                break
    return wrong, troubles


def described(wrong):
    """Lines on the results that are wrong, {part: results}."""
    if not wrong:
        return []
    part, statements = next(iter(wrong)), ["in plain cases it is right"]
    if not wrong[part][0].case.special:
        statements = hints(wrong[part])

    first = wrong[part][0]
    yours, right = first.yours, first.right
    error = np.linalg.norm(yours - right) / (np.linalg.norm(right) or 1)
    worst = np.argmax(np.nan_to_num(np.abs(yours - right), nan=np.inf))
    index = zip(letters_of(first.name), np.unravel_index(worst, right.shape), strict=True)
    index = {SIZES[letter]: str(i) for letter, i in index if letter in first.axes}

    part_of = "" if part in PARAMETERS[first.name] else ", a part of dqkv,"
    adds = " adds" if first.role == "added to" else ""
    lines = [
        f"{part}{part_of} is wrong ({case_words(first.name, first.case)})",
        f"relative error {error:.1e}",
        f"worst at [{', '.join(index.values())}] of ({', '.join(index)}): "
        f"yours{adds} {yours.flat[worst]:.8g}, right{adds} {right.flat[worst]:.8g}",
        *[f"hint: {words}" for words in statements],
    ]
    others = [x for x in wrong if x != part and wrong[x][0].case == first.case]
    if others:
        lines.append(f"also wrong: {', '.join(others)}")
    return lines


def case_words(name, case):
    """The sizes of a case, and what else there is to it."""
    words = [f"{SIZES[letter]}={case.sizes[letter]}" for letter in letters_of(name)]
    if "add" in PARAMETERS[name]:
        words.append(f"add={case.add}")
    return ", ".join([*words, case.special] if case.special else words)


def said(error, path):
    """An exception in one line, with the line of the student's file."""
    if isinstance(error, InputError):
        return str(error)
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if os.path.abspath(frame.filename) == os.path.abspath(path):
            where = f" in line {frame.lineno}"
            if isinstance(error, NotImplementedError):
                where = f": {frame.name} still raises it{where}"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}{where}{': ' if words else ''}{words}"


# --------------------------------------------------------------------------------------------------
# The program


def is_empty(node):
    """Whether a function has no body but raise NotImplementedError, as in the work sheet."""
    *doc, last = map(ast.unparse, node.body)
    return last == "raise NotImplementedError" and len(doc) == (ast.get_docstring(node) is not None)


def load(path):
    """{name: function}: what a student's file fills in. All else is the trainer's in it."""
    require(os.path.isfile(path), f"{path}: no such file: begin with cp extras/mine.py {path}")
    given = {name: functools.partial(function) for name, function in TRUTH.items()}
    try:
        content = runpy.run_path(path, given)
    except SyntaxError as error:
        raise InputError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: {said(error, path)}") from None

    with open(path, "rb") as file:
        nodes = [node for node in ast.parse(file.read()).body if isinstance(node, ast.FunctionDef)]
    names = [node.name for node in nodes]
    for node in nodes:
        code = getattr(content.get(node.name), "__code__", None)
        alone = names.count(node.name) == 1 and code and code.co_firstlineno == node.lineno
        if alone and node.name in TRUTH and is_empty(node):
            content[node.name].__globals__[node.name] = content[node.name] = given[node.name]

    filled = {x: content[x] for x in TRUTH if content.get(x, given[x]) is not given[x]}
    inside = itertools.chain(*map(ast.walk, nodes))
    used = {node.id for node in inside if isinstance(node, ast.Name)}
    for name in set(names) - used - TRUTH.keys():
        for meant in difflib.get_close_matches(name, TRUTH.keys() - filled, 1, 0.8):
            raise InputError(f"{name} is no function of the sheet: did you mean {meant}?")
    return filled


def check(functions, path):
    """Print a verdict on each of these functions: {name: whether it is right}."""
    found = {}
    for name, function in functions.items():
        print(f"{name}: ", end="", flush=True)  # now, to show what takes long, or is stopped
        lines = verdict(function, name, path)
        found[name] = not lines
        print("wrong" if lines else "right")
        if lines:
            section = 7 if name == "adamw" else 2
            lines.append(f"the formula: train_gpt2.py, section {section}, {name}")
        for line in lines:
            print(textwrap.fill(line, 80, initial_indent="    ", subsequent_indent=" " * 8))
    return found


def train(functions):
    """20 updates of a small model with these functions, and of another one with the trainer's.

    Prints their losses. Returns whether these are the same, as far as float32 goes.
    """
    config = gpt2.GPT2Config(max_seq_len=8, vocab_size=128, num_layers=2, num_heads=2, channels=8)
    tokens = np.fromfile(gpt2.__file__, np.uint8)[:4000] % 128
    runs = []
    for own in (functions, {}):
        model = gpt2.GPT2(config, batch_size=2, sequence_length=8)
        runs.append((own, model, gpt2.DataLoader([tokens], 2, 8, shuffle_seed=1)))

    same = True
    for update in range(1, 21):
        losses = []
        for own, model, loader in runs:
            vars(gpt2).update(own)
            try:
                losses.append(gpt2.train_step(model, loader, 1, 1e-2)[0])
            finally:
                vars(gpt2).update(TRUTH)
        print(f"update {update:2}: yours {losses[0]:.4f}, the trainer's {losses[1]:.4f}")
        same = same and math.isclose(*losses, rel_tol=1e-3)
    return same


def main(argv=None):
    """The command line. Returns the exit code: 0, 1 if something is wrong, 130 at Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.exercises",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="mine.py", help="your copy of extras/mine.py")
    path = parser.parse_args(argv).file

    try:
        functions = load(path)
        found = check(functions, path)
        if not found:
            print(f"Nothing is filled in. Write one of these in {path}, and run this again:")
            print(*TRUTH, sep="\n")
        elif all(found.values()):
            print("All right. A small model learns with what you wrote, and one without:")
            same = train({name: functions[name] for name in found})
            require(same, "the losses differ, though in float64 all is right")
        return 0 if all(found.values()) else 1
    except KeyboardInterrupt:
        print("\nstopped: run it again", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"error: {said(error, path)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
