"""The porting kit: its tensors beside PyTorch's, its three forms, and what --compare finds."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
from common import header_of, pack_safetensors, posix_only, written

import train_gpt2 as gpt2
from extras import porting_kit
from test_gpt2 import (
    LAYERS,
    TorchGPT2,
    assert_all_close,
    assert_same_bits,
    like_params,
    one_thread_for_pytorch,  # noqa: F401, a fixture that every test here uses
    torch_grads,
    torch_params,
    torch_run,
)

KITS = {code: porting_kit.make_kit(code) for code in ("F32", "F64")}
BOTH_KITS = pytest.mark.parametrize("code", KITS)
CASES = {name.split("/")[1] for name in KITS["F64"][0] if name.startswith("case/")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a kit."""
    path = str(tmp_path_factory.mktemp("kit") / "new")
    assert porting_kit.main(["--output_dir", path]) == 0
    return path


def is_given(name):
    return name.startswith(("settings/", "params/")) or name in ("inputs", "targets")


# --------------------------------------------------------------------------------------------------
# The tensors


def torch_steps(reference, inputs, targets, params):
    """{name: array} of three updates by torch.optim.AdamW, as the kit names them."""
    c = porting_kit.ADAMW
    groups = []
    for name in params:
        decay = 0.0 if name.startswith("ln") or name.endswith("b") else c["weight_decay"]
        groups.append({"params": reference.named(name), "weight_decay": decay})
    betas = c["beta1"], c["beta2"]
    optimizer = torch.optim.AdamW(groups, c["learning_rate"], betas, c["eps"])

    truth = {}
    for step in ("step1", "step2", "step3"):
        optimizer.zero_grad()
        loss = reference(inputs, targets)
        loss.backward()
        if step != "step1":
            truth[f"{step}/loss"] = np.array([loss.item()])
            grads = torch_grads(reference, params)
            truth |= {f"{step}/grads/{name}": grad for name, grad in grads.items()}

        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm().item()
        truth[f"{step}/grad_norm"] = np.array([norm])
        truth[f"{step}/grad_scale"] = np.array([0.5 / norm])
        for p in reference.parameters():
            p.grad *= 0.5 / norm
        optimizer.step()
        for name, value in torch_params(reference, params).items():
            state = [optimizer.state[p] for p in reference.named(name)]
            m, v = ([s[key] for s in state] for key in ("exp_avg", "exp_avg_sq"))
            truth[f"{step}/m/{name}"] = like_params(params, name, m)
            truth[f"{step}/v/{name}"] = like_params(params, name, v)
            truth[f"{step}/params/{name}"] = value.copy()
    return truth


@BOTH_KITS
def test_every_tensor_equals_pytorch(code):
    """All but the cases and what is given: the names, too, must be the same."""
    kit = KITS[code][0]
    params = {}
    for name in gpt2.param_shapes(porting_kit.CONFIG):
        params[name] = kit[f"params/{name}"].astype(np.float64)
    inputs, targets = kit["inputs"].astype(np.int64), kit["targets"].astype(np.int64)
    reference = TorchGPT2(porting_kit.CONFIG, params)
    loss, tensors = torch_run(reference, inputs, targets)

    truth = {"loss": np.array([loss])}
    without_gradient = {"ddlosses", "dattproj", "dfcproj", "dlosses", "dresidual"}
    for name, layers in tensors.items():
        if name not in without_gradient:
            truth[name] = np.stack(layers) if len(layers) > 1 else layers[0]
    truth["dwte_classifier"] = np.einsum("btv,btc->vc", truth["dlogits"], truth["lnf"])
    grads = torch_grads(reference, params)
    truth |= {f"grads/{name}": grad for name, grad in grads.items()}
    reference = TorchGPT2(porting_kit.CONFIG, params)
    truth |= torch_steps(reference, torch.from_numpy(inputs), torch.from_numpy(targets), params)

    ours = {}
    for name, array in kit.items():
        if not is_given(name) and not name.startswith("case/"):
            ours[name] = array
    assert_all_close(ours, truth)
    forward = gpt2.act_shapes(porting_kit.CONFIG, porting_kit.B, porting_kit.T, training=False)
    assert forward.keys() <= ours.keys()


def test_what_is_given_hides_no_fault():
    """It is the same in both kits, random, and without two axes of the same length."""
    single, double = KITS["F32"][0], KITS["F64"][0]
    assert list(single) == list(double)
    given = [name for name in single if is_given(name)]
    for name in given:
        assert np.array_equal(single[name], double[name].astype(single[name].dtype)), name
        if name.startswith("params/"):
            assert np.unique(single[name]).size > 0.9 * single[name].size
    c = porting_kit.CONFIG
    sizes = [c.max_seq_len, c.vocab_size, c.num_layers, c.num_heads, c.channels, 5, 7]
    assert [int(single[name][0]) for name in given[:7]] == sizes
    assert len({*sizes, 5 * 7, c.channels // c.num_heads, 36, 48}) == 11
    assert double[given[7]] == gpt2.LN_EPS and given[7] == "settings/layernorm_eps"
    numbers = {name.split("/")[1]: float(single[name][0]) for name in given[8:14]}
    adamw = {f"adamw_{name}": value for name, value in porting_kit.ADAMW.items()}
    assert numbers == adamw | {"grad_clip": 0.5}
    for step in (1, 2, 3):
        assert single[f"step{step}/grad_norm"] > 1.2 * numbers["grad_clip"]
    assert all(np.isfinite(array).all() for array in single.values())


def case_of(kit, case, when):
    prefix = f"case/{case}/{when}/"
    return {name[len(prefix) :]: x for name, x in kit.items() if name.startswith(prefix)}


def function_of(case):
    return case.removesuffix("_add").removesuffix("_no_bias")


def torch_case(case, before):
    """The arguments after a layer's call, by PyTorch in float64."""
    layer_name, _, direction = function_of(case).rpartition("_")
    layer = LAYERS[layer_name]
    before = {key: torch.tensor(x) for key, x in before.items()}
    before = {key: x.double() if x.is_floating_point() else x.long() for key, x in before.items()}
    before["tokens"] = before.get("inp")
    if case == "crossentropy_softmax_backward":
        before["logits"] = before["probs"].log()
        before["dout"] = before["dloss"].expand(before["targets"].shape)

    leaves = {}
    for key in layer.shapes(1, 1, 1, 1, 1):
        if key in before or "d" + key in before:  # a bias is not an argument of backward
            leaf = before[key] if key in before else torch.zeros_like(before["d" + key])
            leaves[key] = leaf.requires_grad_(leaf.is_floating_point())
    after = layer.torch(int(before.get("NH", 0)), **leaves)
    if direction == "backward":
        after["out"].backward(before["dout"])
        add = layer.added + (layer.by_add if case.endswith("_add") else ())
        after = {}
        for key, leaf in leaves.items():
            if leaf.requires_grad:
                after["d" + key] = leaf.grad + (before["d" + key] if "d" + key in add else 0)

    renamed = {"out": "losses", "probs": "logits", "dlogits": "probs"}  # as the arguments are
    if layer_name == "crossentropy_softmax":
        after = {renamed[key]: x for key, x in after.items()}
    return {key: x.detach().numpy() for key, x in after.items()}


@BOTH_KITS
@pytest.mark.parametrize("case", sorted(CASES - {"adamw"}))
def test_a_case_equals_pytorch_and_the_trainers_function(case, code):
    kit = KITS[code][0]
    before, after = case_of(kit, case, "before"), case_of(kit, case, "after")
    assert_all_close(after, torch_case(case, before))

    run = getattr(gpt2, function_of(case))
    names = list(inspect.signature(run).parameters)
    args = [before[name].copy() if name in before else None for name in names]
    args = [int(x[0]) if name in ("NH", "add") else x for name, x in zip(names, args, strict=True)]
    run(*args)
    changed = {name: x for name, x in zip(names, args, strict=True) if name in after}
    assert_same_bits(changed, after)
    for name in before.keys() - after.keys() - {"NH", "add"}:
        assert np.array_equal(args[names.index(name)], before[name])


@BOTH_KITS
def test_the_case_of_adamw_equals_pytorch(code):
    before, after = (case_of(KITS[code][0], "adamw", when) for when in ("before", "after"))
    arrays = {key: torch.tensor(before[key]).double() for key in "pgmv"}
    number = {key: x.item() for key, x in before.items() if x.size == 1}
    p = arrays["p"].clone().requires_grad_()
    p.grad = arrays["g"] * number["grad_scale"]
    rate, betas = number["learning_rate"], (number["beta1"], number["beta2"])
    optimizer = torch.optim.AdamW([p], rate, betas, number["eps"], number["decay"] / rate)
    step = torch.tensor(number["step"] - 1.0)
    state = {"step": step, "exp_avg": arrays["m"], "exp_avg_sq": arrays["v"]}
    optimizer.state[p] = state
    optimizer.step()
    truth = {"p": p.detach(), "m": state["exp_avg"], "v": state["exp_avg_sq"]}
    assert_all_close(after, {key: x.numpy() for key, x in truth.items()})


def test_a_kit_that_clips_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(porting_kit, "GRAD_CLIP", 4.0)
    with pytest.raises(gpt2.InputError, match="step1 has a norm of .*, which is not clipped"):
        porting_kit.make_kit("F32")


def test_every_function_has_its_cases():
    functions = {name for name in vars(gpt2) if name.endswith(("_forward", "_backward"))}
    assert {function_of(case) for case in CASES} == functions | {"adamw"}
    with_add = {
        name for name in functions if "add" in inspect.signature(getattr(gpt2, name)).parameters
    }
    assert {case for case in CASES if case.endswith("_add")} == {
        "matmul_backward_no_bias_add", *(f"{name}_add" for name in with_add),
    }  # fmt: skip
    tokens = KITS["F32"][0]["case/encoder_backward/before/inp"]
    assert np.unique(tokens).size < tokens.size  # a token that occurs twice


@pytest.mark.parametrize("function", ["gelu_forward", "gelu_backward"])
def test_the_trainer_is_left_as_it_was(function, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    before = dict(vars(gpt2))
    porting_kit.make_kit("F32")
    assert dict(vars(gpt2)) == before
    monkeypatch.setattr(porting_kit, "put_cases", lambda *args: None)
    monkeypatch.setattr(gpt2, function, stop)
    before = dict(vars(gpt2))
    with pytest.raises(KeyboardInterrupt):
        porting_kit.make_kit("F32")
    assert dict(vars(gpt2)) == before


# --------------------------------------------------------------------------------------------------
# The files


def test_three_forms_hold_the_same(folder):
    for code, name in porting_kit.FILES.items():
        path = os.path.join(folder, name)
        assert_same_bits(safetensors.numpy.load_file(path), KITS[code][0])
        with open(path, "rb") as file:
            header, start = header_of(file.read())
        assert list(header) == list(KITS[code][0])  # in the order of computation
        for entry in header.values():
            begin = start + entry["data_offsets"][0]
            assert entry["dtype"] in (code, "I32")
            assert begin % (8 if entry["dtype"] == "F64" else 4) == 0

    for kit_code, kit_name in (("F32", "float32"), ("F64", "float64")):
        plain = {}
        with open(os.path.join(folder, kit_name, "index.txt")) as file:
            for line in file:
                name, code, shape, file_name = line.split()
                dtype = {"F32": "<f4", "F64": "<f8", "I32": "<i4"}[code]
                numbers = np.fromfile(os.path.join(folder, kit_name, file_name), dtype)
                plain[name] = numbers.reshape([int(n) for n in shape.split(",")])
        assert list(plain) == list(KITS[kit_code][0])
        assert_same_bits(plain, KITS[kit_code][0])
        assert {array.dtype for array in plain.values()} == {np.dtype(kit_name), np.dtype("<i4")}
        assert len(os.listdir(os.path.join(folder, kit_name))) == 1 + len(plain)
    assert sorted(os.listdir(folder)) == ["float32", "float64", *sorted(porting_kit.FILES.values())]


def test_what_can_not_be_written_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    def no_room(handle):
        raise OSError(28, "No space left on device")

    path = tmp_path / "kit_float32.safetensors"
    path.write_bytes(b"what was there")
    monkeypatch.setattr(os, "fsync", no_room)
    assert porting_kit.main(["--output_dir", str(tmp_path)]) == 1
    assert capsys.readouterr() == ("", "error: [Errno 28] No space left on device\n")
    assert path.read_bytes() == b"what was there" and os.listdir(tmp_path) == [path.name]


# --------------------------------------------------------------------------------------------------
# Comparing


@pytest.fixture
def compared(folder, capsys):
    """A function that compares tensors, or a file, with the kit: (exit code, lines)."""

    def compare(mine, kit=folder, code="F32"):
        if isinstance(mine, dict):
            exit_code = 0 if porting_kit.compare(mine, *KITS[code]) else 1
        else:
            exit_code = porting_kit.main(["--output_dir", str(kit), "--compare", str(mine)])
        stdout, stderr = capsys.readouterr()
        assert stderr == ""
        return exit_code, stdout.splitlines()

    return compare


def copy_of(*names, code="F32"):
    """The kit, or some of its tensors, to be changed."""
    kit = KITS[code][0]
    return {name: kit[name].copy() for name in names or kit}


PARTS = len(KITS["F32"][1])
COMPUTED = sum(writer != "given" for writer in KITS["F32"][1].values())


@pytest.mark.parametrize("kit", ["", "nowhere"], ids=["a kit on the disk", "a new kit"])
def test_a_copy_agrees_in_every_form(kit, folder, compared, tmp_path):
    all_agree = 0, [f"{PARTS} agree, 0 differ, 0 missing"]
    kit = os.path.join(folder, kit)
    for name in (*porting_kit.FILES.values(), "float32", "float32/index.txt"):
        assert compared(os.path.join(folder, name), kit) == all_agree
    for code in KITS:
        np.savez(tmp_path / "mine.npz", **copy_of(code=code))
        assert compared(tmp_path / "mine.npz", kit) == all_agree
    assert not os.path.exists(os.path.join(folder, "nowhere"))

    np.savez(tmp_path / "mixed.npz", lnf=KITS["F32"][0]["lnf"], encoded=KITS["F64"][0]["encoded"])
    exit_code, lines = compared(tmp_path / "mixed.npz", kit)
    assert exit_code == 1 and lines[:2] == [
        "the first to differ is encoded",
        "its dtype is float64, expected float32",
    ]


def test_a_part_of_the_kit_is_compared_alone(compared):
    mine = copy_of("lnf", "ln1", "inputs")
    first = "the first that is missing is case/encoder_forward/after/out"
    assert compared(mine) == (0, [f"4 agree, 0 differ, {COMPUTED - 3} missing", first])


@pytest.mark.parametrize(
    "function, call, argument, found",
    [
        ("encoder_forward", 0, 0, "encoded"),
        ("layernorm_forward", 0, 0, "ln1 of layer 0"),
        ("layernorm_forward", 2, 1, "ln1_mean of layer 1"),
        ("layernorm_forward", 3, 2, "ln2_rstd of layer 1"),
        ("layernorm_forward", 4, 0, "lnf"),
        ("matmul_forward", 0, 0, "qkv of layer 0"),
        ("matmul_forward", 3, 0, "fcproj of layer 0"),
        ("matmul_forward", 5, 0, "attproj of layer 1"),
        ("matmul_forward", 8, 0, "logits"),
        ("attention_forward", 1, 0, "atty of layer 1"),
        ("attention_forward", 0, 1, "att_lse of layer 0"),
        ("gelu_forward", 0, 0, "fch_gelu of layer 0"),
        ("residual_forward", 0, 0, "residual2 of layer 0"),
        ("residual_forward", 1, 0, "residual3 of layer 0"),
        ("crossentropy_softmax_forward", 0, 0, "losses"),
        ("crossentropy_softmax_forward", 0, 1, "probs"),
        ("crossentropy_softmax_backward", 0, 0, "dlogits"),
        ("matmul_backward", 0, 0, "dlnf"),
        ("matmul_backward", 0, 1, "dwte_classifier"),
        ("layernorm_backward", 0, 0, "dresidual3 of layer 1"),
        ("layernorm_backward", 0, 2, "grads/lnfb"),
        ("matmul_backward", 1, 0, "dfch_gelu of layer 1"),
        ("gelu_backward", 0, 0, "dfch of layer 1"),
        ("matmul_backward", 2, 1, "grads/fcw of layer 1"),
        ("layernorm_backward", 1, 0, "dresidual2 of layer 1"),
        ("matmul_backward", 3, 0, "datty of layer 1"),
        ("attention_backward", 0, 0, "dqkv of layer 1"),
        ("matmul_backward", 4, 2, "grads/qkvb of layer 1"),
        ("layernorm_backward", 2, 0, "dresidual3 of layer 0"),
        ("layernorm_backward", 4, 0, "dencoded"),
        ("encoder_backward", 0, 0, "grads/wte"),
        ("encoder_backward", 0, 1, "grads/wpe"),
        ("layernorm_forward", 5, 0, "step2/loss"),
        ("layernorm_backward", 5, 1, "step2/grads/lnfw"),
        ("adamw", 0, 0, "step1/params/wte"),
        ("adamw", 16, 2, "step2/m/wte"),
    ],
)
def test_a_planted_fault_is_found_where_it_was_made(
    function, call, argument, found, compared, monkeypatch
):
    """One call of one function writes numbers that are 0.1 % too large. All that follows differs,
    but what is found is what this call has written.
    """
    calls = []
    original = getattr(gpt2, function)

    def faulty(*args):
        original(*args)
        if len(calls) == call:
            args[argument][...] *= 1.001
        calls.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(porting_kit, "put_cases", lambda *args: None)
        patch.setattr(gpt2, function, faulty)
        patch.setattr(gpt2, "THREADS", 1)  # so that AdamW takes one tensor after the other
        mine = porting_kit.make_kit("F32")[0]
    exit_code, lines = compared(mine)
    assert exit_code == 1 and lines[0] == f"the first to differ is {found}"
    writer = f"{function}, section {7 if function == 'adamw' else 2}"
    if found == "step2/loss":
        writer = "GPT2.forward, section 5"
    elif found.startswith("step2/grads"):
        writer = "GPT2.backward, section 6"
    assert lines[3] == f"it is written by {writer} of train_gpt2.py"
    assert lines[4].startswith("before it: ") and " 0 differ, " in lines[4]


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_fault_in_a_case_comes_first(case, compared):
    mine = copy_of()
    name = next(name for name in mine if name.startswith(f"case/{case}/after/"))
    mine[name] *= 1.001
    mine["encoded"] *= 2
    exit_code, lines = compared(mine)
    assert exit_code == 1 and lines[0] == f"the first to differ is {name}"
    section = 7 if case == "adamw" else 2
    assert lines[3] == f"it is written by {function_of(case)}, section {section} of train_gpt2.py"


def test_what_is_said_of_the_first_that_differs(compared):
    mine = copy_of()
    mine["fcproj"][0, 3, 2, 1] = 100
    mine["ln1"][1] += 1  # layer 1 comes after all of layer 0
    mine["grads/wpe"] += 1
    del mine["inputs"], mine["ln2"], mine["dqkv"]
    expected = KITS["F32"][0]["fcproj"]
    error = (100 - expected[0, 3, 2, 1]) / np.linalg.norm(expected[0])
    before = list(KITS["F32"][1]).index(("fcproj", 0))
    assert compared(mine) == (
        1,
        [
            "the first to differ is fcproj of layer 0",
            f"its relative error is {error:.1e}, expected at most 1e-05; its shape is "
            "(2, 5, 7, 12)",
            f"the greatest difference is {100 - expected[0, 3, 2, 1]:.3g}: fcproj[0, 3, 2, 1] is "
            f"100.0, expected {expected[0, 3, 2, 1]}",
            "it is written by matmul_forward, section 2 of train_gpt2.py",
            f"before it: {before - 2} agree, 0 differ, 1 missing",
            f"after it: {PARTS - before - 6} agree, 2 differ, 3 missing",
            "the first that is missing is ln2",
        ],
    )


@pytest.mark.parametrize("code, tolerance", [("F32", 1e-5), ("F64", 1e-10)])
def test_the_tolerance_is_relative_and_by_norm_of_each_layer(code, tolerance, compared):
    for factor, exit_code in ((0.9, 0), (1.1, 1)):
        mine = copy_of("residual3", "ln2", code=code)
        layer = mine["residual3"][1]
        worst = np.abs(layer).argmax()
        layer.reshape(-1)[worst] += factor * tolerance * np.linalg.norm(layer.astype(float))
        assert compared(mine, code=code)[0] == exit_code
    mine = copy_of("inputs", "targets", "loss")
    mine["targets"][4, 6] += 1
    exit_code, lines = compared(mine)
    assert exit_code == 1 and lines[0] == "the first to differ is targets"
    assert "targets[4, 6] is" in lines[2] and lines[3] == "it is an input"


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda x: x[:, :, :6], "its shape is (2, 5, 6, 12), expected (2, 5, 7, 12)"),
        (lambda x: x[0], "its shape is (5, 7, 12), expected (2, 5, 7, 12)"),
        (lambda x: x.astype(np.float16), "its dtype is float16, expected float32"),
        (lambda x: x.astype(np.float64), "its dtype is float64, expected float32"),
        (lambda x: x.astype(np.int32), "its dtype is int32, expected float32"),
        (lambda x: x.astype(str), "its dtype is <U32, expected float32"),
        (lambda x: np.where(x == x[0, 1, 2, 3], np.nan, x), "it holds numbers that are not finite"),
        (
            lambda x: np.where(x == x[0, 1, 2, 3], -np.inf, x),
            "it holds numbers that are not finite",
        ),
    ],
)
def test_a_tensor_of_another_kind(change, expected, compared):
    mine = copy_of("qkv", "ln1", "ln2")
    mine["ln2"] = change(mine["ln2"])
    exit_code, lines = compared(mine)
    assert exit_code == 1 and lines[0] == "the first to differ is ln2 of layer 0"
    assert lines[1].split(";")[0] == expected
    if "finite" in expected:
        assert f"ln2[0, 1, 2, 3] is {mine['ln2'][0, 1, 2, 3]}, expected" in lines[2]


def test_unknown_names_are_said(compared):
    mine = copy_of("ln1", "ln1_mean")
    mine["ln1_means"] = mine.pop("ln1_mean")
    mine["x\nyz"] = mine["ln1"]
    assert compared(mine) == (
        1,
        [
            "'ln1_means' is not in the kit (did you mean ln1_mean?)",
            "'x\\nyz' is not in the kit",
            f"2 agree, 0 differ, {COMPUTED - 2} missing",
            "the first that is missing is case/encoder_forward/after/out",
        ],
    )


def test_the_kit_on_the_disk_is_the_truth(folder, tmp_path, compared, capsys):
    other = copy_of()
    other["lnf"] += 1
    path = tmp_path / porting_kit.FILES["F32"]
    porting_kit.write_safetensors(path, other)
    assert compared(path, tmp_path)[0] == 0
    mine = os.path.join(folder, path.name)
    exit_code, lines = compared(mine, tmp_path)
    assert exit_code == 1 and lines[0] == "the first to differ is lnf"
    for lnf in (None, np.zeros(12, np.float32)):
        other["lnf"] = lnf
        porting_kit.write_safetensors(path, {k: x for k, x in other.items() if x is not None})
        assert porting_kit.main(["--output_dir", str(tmp_path), "--compare", mine]) == 1
        error = f"error: {path}: written by another version: write it again\n"
        assert capsys.readouterr() == ("", error)


def one_tensor(dtype, shape, nbytes):
    header = {"lnf": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}
    return pack_safetensors(header, bytes(nbytes))


UNREADABLE = {  # {name: (bytes, what is said)}
    "cut.safetensors": (one_tensor("F32", [3], 12)[:-1], "has 83 bytes"),
    "half.safetensors": (one_tensor("BF16", [3], 6), "'lnf' is BF16, expected F32, F64 or I32"),
    "none.safetensors": (pack_safetensors({}), "there is no tensor in it"),
    "junk.npz": (b"PK\x03\x04junk", "expected a .npz of plain arrays"),
    "shape/index.txt": (b"lnf F32 5,-7,12 lnf.bin\n", "line 1: expected four words such as"),
    "dtype/index.txt": (b"loss F32 1 a.bin\nlnf F16 1 a.bin\n", "line 2: expected four words"),
    "above/index.txt": (b"loss F32 1 ../a.bin\n", "line 1: expected four words such as"),
    "words/index.txt": (b"loss F32 1\n", "line 1: expected four words"),
    "size/index.txt": (b"loss F32 2 a.bin\n", "a.bin: has 4 bytes, "),
    "twice/index.txt": (b"loss F32 1 a.bin\nloss F32 1 a.bin\n", "line 2: 'loss' stands here"),
    "gone/index.txt": (b"loss F32 1 b.bin\n", "No such file"),
    "text/index.txt": (b"\xff\xfe", "can't decode"),
    "folder": (None, "No such file"),
    "nowhere.npz": (None, "No such file"),
}


@pytest.mark.parametrize("name", [*UNREADABLE, "pickled.npz"])
def test_what_can_not_be_read_is_one_line(name, tmp_path, capsys):
    data, expected = UNREADABLE.get(name, (None, "allow_pickle=False"))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "a.bin").write_bytes(bytes(4))
    if data is not None:
        written(path, data)
    elif name == "folder":
        path.mkdir()
    elif name == "pickled.npz":
        np.savez(path, lnf=np.array([{"code": "that could run"}]))
    place = str(path.parent if name.endswith("index.txt") else path)
    assert porting_kit.main(["--output_dir", str(tmp_path), "--compare", place]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert expected in stderr


@posix_only
def test_a_pipe_is_refused_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "index.txt").write_text("loss F32 0 pipe.npz\n")
    for name in ("pipe.npz", "index.txt"):
        assert porting_kit.main(["--compare", str(tmp_path / name)]) == 1
        assert "pipe.npz: expected a file, found a folder, a pipe" in capsys.readouterr().err


def test_the_program_itself(folder, capsys):
    top = os.path.dirname(os.path.abspath(gpt2.__file__))
    command = [sys.executable, "-m", "extras.porting_kit", "--output_dir", folder]
    command += ["--compare", os.path.join(folder, "float32")]
    ran = subprocess.run(command, capture_output=True, cwd=top, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")

    for flags, exit_code in ((["--help"], 0), (["--compar", "x"], 2)):
        with pytest.raises(SystemExit) as ended:
            porting_kit.main(flags)
        assert ended.value.code == exit_code
    text = capsys.readouterr().out
    assert "python -m extras.porting_kit --compare mine.safetensors\n" in text
    assert "1e-5 in float32 and\n1e-10 in float64" in text
