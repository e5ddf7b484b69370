"""The programs in extras/ but for the tutor and the processes, and the picture of a run."""

import inspect
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import NOBODY, failed_in_one_line, run_trainer

import train_gpt2 as gpt2
from extras import exit_code_of, hellaswag, llmc, look_inside, porting_kit
from test_gpt2 import (
    TorchGPT2,
    assert_all_close,
    assert_same_bits,
    one_thread_for_pytorch,  # noqa: F401, a fixture that every test here uses
    random_model,
    random_tokens,
    torch_grads,
    torch_heads,
    torch_run,
    watch,
)

TOP = os.path.dirname(os.path.abspath(gpt2.__file__))
SIZES = {"V": 61, "L": 2, "NH": 3, "C": 24, "max_seq_len": 11}
letters = lambda text: [ord(c) for c in text]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(main, *flags): (exit code, stdout, stderr) of a program, in a folder with only data/."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)

    def run(main, *flags):
        capsys.readouterr()
        code = main(list(map(str, flags)))
        return (code, *capsys.readouterr())

    return run


def test_how_a_program_ends(capsys):
    def work(outcome):
        raise outcome

    assert exit_code_of(work, gpt2.InputError("what to do")) == 1
    assert capsys.readouterr().err == "error: what to do\n"
    assert exit_code_of(work, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped: run it again\n"
    assert exit_code_of(print) == 0 and exit_code_of(lambda: 1) == 1
    pytest.raises(ZeroDivisionError, exit_code_of, work, ZeroDivisionError())  # a fault is shown

    code = "import sys, extras; sys.exit(extras.exit_code_of(print, 'x'))"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=TOP, stdout=pipe, stderr=pipe) as it:
        it.stdout.close()  # its reader leaves, as in `| head`
        assert it.stderr.read() == b""
    assert it.returncode == 0


@pytest.mark.parametrize(
    "program, flags, expected",
    [
        (llmc, "--model nowhere", "'nowhere': no such model"),
        (llmc, "--model nowhere.bin", "No such file or directory: 'nowhere.bin'"),
        (llmc, "--model own", "own: its 300 tokens are not GPT-2's, which llm.c's files hold"),
        (hellaswag, "--model own", "own: its 300 tokens are not GPT-2's, which HellaSwag is"),
        (hellaswag, "--limit -1", "a limit of -1 questions: expected 0, for all, or more"),
        (look_inside, "--model bytes --prompt aaaaaaaaaaaa", "12 tokens: write one of 1 to 11 "),
        (look_inside, "--model bytes --prompt=", "the prompt has 0 tokens: write one of 1 to 11 "),
        (look_inside, "--model bytes --layer 3 --head 0", "layer 3: expected 0 to 2"),
        (look_inside, "--model bytes --layer 0 --head -1", "head -1: expected 0 to 2"),
        (porting_kit, "--compare nowhere", "No such file or directory: 'nowhere'"),
        (porting_kit, "--compare own/model.safetensors", "data/kit.safetensors: no kit: run "),
        (porting_kit, "--kit K --compare K", "K: not a kit: run python -m extras"),
    ],
)
def test_what_can_not_be_is_one_line(program, flags, expected, call):
    for name, V, T in (("own", 300, 64), ("bytes", 256, 11)):
        random_model(1, 8, np.float32, V=V, max_seq_len=T).save_pretrained(name)
    shutil.copy("own/model.safetensors", "K")
    assert expected in failed_in_one_line(call(program.main, *flags.split()))


# --------------------------------------------------------------------------------------------------
# llm.c's files, by hand from their description

ORDER = "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb"


def file_of(numbers, views, version=3, between=b""):
    """A header, what stands between, and the 16 tensors, wte with rows of zeros at its end."""
    kind = torch.bfloat16 if version == 5 else torch.float32
    padding = 0 if version == 1 else -len(views["wte"]) % 128
    views = views | {"wte": np.pad(views["wte"], ((0, padding), (0, 0)))}
    tensors = [torch.tensor(views[name]).to(kind).view(torch.uint8) for name in ORDER.split()]
    header = struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))
    return header + between + b"".join(tensor.numpy().tobytes() for tensor in tensors)


def model_file(model, version=3):
    padded = [] if version == 1 else [-(-model.config.vocab_size // 128) * 128]
    return file_of([20240326, version, *astuple(model.config), *padded], model.params, version)


@pytest.mark.parametrize("version", [1, 3, 5])
@pytest.mark.parametrize("V", [61, 128])
def test_a_model_in_every_version(version, V, call):
    """Read, written byte for byte, and written as a folder that has the same bits."""
    model = random_model(2, 8, np.float32, **SIZES | {"V": V})
    edges = [-0.0, 1e-45, -1e-39, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3e38, -1e-3]
    model.params["wpe"][-1, :8] = edges  # of bfloat16, two are half-way between neighbours
    Path("m.bin").write_bytes(model_file(model, version))
    config, params = llmc.read_model("m.bin")
    kind = torch.bfloat16 if version == 5 else torch.float32
    truth = {name: torch.tensor(x).to(kind).float().numpy() for name, x in model.params.items()}
    assert config == model.config
    assert_same_bits(params, truth)
    if version > 1:
        llmc.write_model("new.bin", model.config, model.params, version)
        assert Path("new.bin").read_bytes() == model_file(model, version)
    assert call(llmc.main, "--model", "m.bin") == (0, "m\n", "")
    assert_same_bits(gpt2.GPT2.from_pretrained("m", 2, 8).params, truth)
    assert "is there already" in failed_in_one_line(call(llmc.main, "--model", "m.bin"))


def with_number(at, value, code="i"):
    return lambda data: data[: 4 * at] + struct.pack(f"<{code}", value) + data[4 * at + 4 :]


LAST_BIAS = -2 * SIZES["C"] - 1  # the last number of fcprojb, counted from the end of the file


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda d: b"", "begins with 0, expected 20240326"),
        (lambda d: d[:-1], "bytes, its header describes"),
        (with_number(1, 2), "version 2, expected 1 or 3 (float32) or 5 (bfloat16)"),
        (with_number(2, 0), "max_seq_len=0"),
        (with_number(5, 5), "num_heads=5"),
        (with_number(4, 2**31 - 1), "bytes, its header describes"),
        (with_number(7, 60), "a padded vocabulary of 60"),
        (with_number(LAST_BIAS, np.nan, "f"), "fcprojb holds a number that is not finite"),
    ],
)
def test_a_malformed_model_is_one_line(change, expected, call):
    Path("m.bin").write_bytes(change(model_file(random_model(2, 8, np.float32, **SIZES))))
    assert expected in failed_in_one_line(call(llmc.main, "--model", "m.bin"))
    assert sorted(os.listdir()) == ["data", "m.bin"]


def test_all_that_a_port_begins_with(call, monkeypatch):
    V = 50257
    model = random_model(4, 64, np.float32, V=V, L=1, NH=1, C=6)
    model.save_pretrained("model")
    tokens = np.random.default_rng(1).integers(0, V, 300)
    Path("val.bin").write_bytes(bytes(1024) + tokens.astype("<u2").tobytes())
    monkeypatch.setattr("prepro_tinyshakespeare.provide", lambda what: ("train.bin", "val.bin"))
    words = SimpleNamespace(decode=lambda i: b"%d" % i, first=50256)
    monkeypatch.setattr(gpt2, "tokenizer", lambda vocabulary: words)

    names = "gpt2_0M", "gpt2_0M_bf16", "gpt2_0M_debug_state", "gpt2_tokenizer"
    paths = [f"a/b/{name}.bin" for name in names]
    expected = "\n".join([*paths, "train.bin", "val.bin", ""])
    assert call(llmc.main, "--model", "model", "--output_dir", "a/b") == (0, expected, "")
    weights, weights16, state, tokenizer = (Path(path).read_bytes() for path in paths)
    assert weights == model_file(model) and weights16 == model_file(model, 5)
    spelled = [b"%d" % i for i in range(50256)] + [b"<|endoftext|>"]
    body = b"".join(bytes([len(word)]) + word for word in spelled)
    assert tokenizer == struct.pack("<4i", 20240328, 2, V, 50256).ljust(1024, b"\0") + body

    inputs, targets = tokens[:256].reshape(4, 64), tokens[1:257].reshape(4, 64)
    loss = model.forward(inputs, targets)
    model.backward()
    batch = inputs.astype("<i4").tobytes() + targets.astype("<i4").tobytes()
    logits = state[1024 + len(batch) :][: 4 * 256 * V]
    between = batch + logits + struct.pack("<f", loss)
    assert state == file_of([20240327, 2, 4, 64], model.grads, between=between)
    truth = model.acts["lnf"].astype(np.float64) @ model.params["wte"].T
    assert_all_close({"logits": np.frombuffer(logits, "<f4").reshape(4, 64, V)}, {"logits": truth})


# --------------------------------------------------------------------------------------------------
# HellaSwag

ITEM = {"ctx": "ab", "endings": ["c", "de", "f", "g"], "label": 2}
LINES = ["no JSON", "[1]", "", "[" * 99999, '{"ctx": "a", "label": 1}']
LINES += [json.dumps(ITEM | {"label": label}) for label in (4, -1, "1", None)]
LINES += [json.dumps(ITEM | {"endings": x}) for x in (["b"] * 3, ["b", "c", "d", 4], 4)]


def test_a_question_that_is_none_is_one_line(tmp_path):
    path = tmp_path / "q.jsonl"
    for line in LINES:
        path.write_text(json.dumps(ITEM) + "\n" + line + "\n")
        with pytest.raises(gpt2.InputError, match="q.jsonl, line 2: expected JSON"):
            hellaswag.read_questions(path, letters)


def test_a_score_from_the_command_line(call, monkeypatch):
    """The least sum is that of the first ending, the least mean that of the second."""
    random_model(1, 8, np.float32, V=50257, L=1, NH=1, C=6).save_pretrained("model")
    monkeypatch.setattr(gpt2, "tokenizer", lambda vocabulary: SimpleNamespace(encode=letters))
    monkeypatch.setattr(hellaswag, "PRINT_EVERY", 3)
    lines = [ITEM | {"ctx": "a\u2028 long context", "label": label} for label in (0, 1, 1, 3)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = Path("data/hellaswag_val.jsonl")
    path.write_text(text, encoding="utf-8")
    asked = []

    def told(self, context, endings):
        assert context == letters("context") and endings[1] == letters(" de")  # 10 tokens in all
        asked.append(context)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return [np.array(loss) for loss in ([3.0], [2.0, 2.0], [9.0], [9.0])]

    monkeypatch.setattr(gpt2.GPT2, "token_losses", told)
    score = lambda *flags: call(hellaswag.main, "--model", "model", *flags)
    so_far = "hellaswag 2/3 acc_norm 0.6667 acc 0.3333\n"
    assert score() == (0, so_far + "hellaswag 2/4 acc_norm 0.5000 acc 0.2500\n", "")
    stopped = f"{so_far}{so_far.strip()} (stopped after 3 of 4)\n"
    assert score() == (130, stopped, "stopped: run it again\n")
    assert score("--limit", 1) == (0, "hellaswag 0/1 acc_norm 0.0000 acc 1.0000\n", "")
    path.write_text(json.dumps(ITEM | {"endings": ["c", "a" * 10, "f", "g"]}))
    assert "has 11 tokens, and the model reads 10" in failed_in_one_line(score())
    path.unlink()
    monkeypatch.setenv("HTTPS_PROXY", NOBODY)
    assert "can't fetch HellaSwag" in failed_in_one_line(score())


# --------------------------------------------------------------------------------------------------
# A look inside


def sharp_model(B, T, V=256):
    """One whose attention and predictions are not even."""
    model = random_model(B, T, np.float32, recompute=0, V=V)
    for name in ("wte", "wpe", "qkvw"):
        model.params[name] *= 5
    return model


def test_arrays_equal_pytorchs():
    """Of more positions than attention takes at a time."""
    model = sharp_model(2, 140)
    batch = random_tokens(B=2, T=140, V=256)
    model.forward(*batch, train=False)
    future = torch.ones(140, 140, dtype=torch.bool).triu(1)
    for l in range(3):
        q, k, _ = torch_heads(torch.tensor(model.acts["qkv"][l]).double(), 3)
        truth = (q @ k.mT / 8**0.5).masked_fill(future, -torch.inf).softmax(-1).numpy()
        np.testing.assert_allclose(look_inside.attention(model, l), truth, 0, 1e-5)
    reference = TorchGPT2(model.config, model.params)
    stream = [model.acts["encoded"], *model.acts["residual3"]]
    for start in (0, 137):
        for x, ours in zip(stream, look_inside.logit_lens(model, start), strict=True):
            truth = reference.lnf(torch.tensor(x[:, start:])) @ reference.wte.weight.T
            np.testing.assert_allclose(ours, truth.detach().numpy(), 1e-4, 1e-4)

    list(model.generate([1, 2], 3))  # whose activations are not all of one text
    shared = gpt2.GPT2(model.config, 2, 140, recompute=2)
    for one in (model, shared):
        with pytest.raises(gpt2.InputError, match="there was no forward pass"):
            look_inside.attention(one, 0)
    shared.forward(*batch, train=False)
    with pytest.raises(gpt2.InputError, match="'qkv'. is not kept for each layer"):
        look_inside.attention(shared, 0)


WORDS = [*(bytes([i]) for i in range(256)), b"th", b"the", b"<|endoftext|>"]


def follow(logits, number):
    """So many of the likeliest tokens after logits (V,), as they are printed."""
    probs = np.exp(logits - np.logaddexp.reduce(logits))
    likeliest = np.argsort(probs)[: -number - 1 : -1]
    return "".join(f"{100 * probs[i]:4.0f} {look_inside.shown(WORDS[i])}" for i in likeliest)


def test_what_is_printed_is_what_the_model_computes(call):
    """The picture of attention has 33 rows and columns, the text a token more."""
    first, last = "a é\n\t", " tokens too many: it has 34"
    tokens = [*first.encode(), 257, *last.encode()]
    texts = ["a", "·", r"\xc3", r"\xa9", r"\n", r"\t", "the", *last.replace(" ", "·")]
    model = sharp_model(1, 34, V=259)
    model.vocabulary = WORDS[:-1]
    model.params["wte"][258] *= 2  # so that it is likely somewhere
    model.save_pretrained("m")
    flags = "--model", "m", "--prompt", f"{first}the{last}", "--layer", 1, "--head", 2
    code, stdout, stderr = call(look_inside.main, *flags)
    assert (code, stderr) == (0, "") and max(map(len, stdout.splitlines())) <= 80
    _, rows, _, lens, _, picture = (part.splitlines() for part in stdout.split("\n\n"))

    model.forward([tokens], [[*tokens[1:], 0]], train=False)
    losses = ["", *(f"{loss:.2f}" for loss in model.acts["losses"][0])]
    logits = [x[0] for x in look_inside.logit_lens(model)]
    begin = [f"{t:4} {text:7}" for t, text in enumerate(texts)]
    for t, row in enumerate(rows):
        assert row == f"{begin[t]} {losses[t]:>7}{follow(logits[-1][t], 5)}".rstrip()
    assert lens[0].split() == ["after", *texts[-6:]] and len(rows) == 34 and "<|endo~" in stdout
    lines = zip(("encoded", "layer 0", "layer 1", "layer 2"), lens[1:], logits, strict=True)
    for name, row, x in lines:
        assert row == f"{name:8}{''.join(follow(logits, 1) for logits in x[-6:])}".rstrip()

    att = look_inside.attention(model, 1)[0, 2, 1:, 1:].repeat(2, axis=1)
    shades = np.select([att < 0.02, att < 0.1, att < 0.25, att < 0.5], list(" ░▒▓"), "█")
    drawn = [f"{begin[t + 1]} {''.join(row)}".rstrip() for t, row in enumerate(shades)]
    assert picture[-33:] == drawn and set(shades.flat) == set(" ░▒▓█")
    above = zip(*[row[13:].ljust(66)[::2] for row in picture[:-33]], strict=True)
    assert ["".join(column).strip() for column in above] == texts[1:]


@pytest.mark.parametrize(
    "data, text",
    [(b"\n\x00 ", r"\n\x00·"), (b"\xff\xc3\xa9", r"\xffé"), ("e\u0301".encode(), r"e\u0301"),
     ("中文".encode(), r"\u4e2d~"), (b"seventy", "seventy"), (b" seventy", "·seven~")],
)  # fmt: skip
def test_a_token_takes_seven_columns(data, text):
    assert look_inside.shown(data) == f"{text:7}"


# --------------------------------------------------------------------------------------------------
# The porting kit

KIT = porting_kit.make_kit()
CONFIG = porting_kit.CONFIG


def test_every_tensor_of_a_pass_equals_pytorch_and_of_a_step_the_trainer():
    """The names, too, must be the same."""
    tensors = KIT.tensors
    params = {name: tensors[f"params/{name}"] for name in gpt2.GPT2.param_shapes(CONFIG)}
    batch = tensors["inputs"].astype(int), tensors["targets"].astype(int)
    reference = TorchGPT2(CONFIG, params)
    loss, seen = torch_run(reference, *batch)
    truth = {"loss": np.array([loss])}
    without_gradient = {"ddlosses", "dattproj", "dfcproj", "dlosses", "dresidual"}
    for name in seen.keys() - without_gradient:
        truth[name] = np.stack(seen[name]) if len(seen[name]) > 1 else seen[name][0]
    truth["dwte_classifier"] = np.einsum("btv,btc->vc", truth["dlogits"], truth["lnf"])
    truth |= {f"grads/{name}": grad for name, grad in torch_grads(reference, params).items()}

    model = gpt2.GPT2(CONFIG, porting_kit.B, porting_kit.T, seed=None, dtype=np.float64)
    for name, x in params.items():
        model.params[name][...] = x
    for step in ("step1", "step2", "step3"):
        found = {f"{step}/loss": model.forward(*batch)}
        model.backward()
        found |= {f"{step}/grads/{name}": x.copy() for name, x in model.grads.items()}
        truth |= found if step != "step1" else {}  # those of the first are those of the pass
        norm = model.grad_norm()
        truth |= {f"{step}/grad_norm": norm, f"{step}/grad_scale": 0.5 / norm}
        assert norm > 0.6  # so it is clipped
        model.update(2**-8, 1 - 2**-3, 1 - 2**-5, 2**-12, 2**-3, grad_scale=0.5 / norm)
        for part in ("m", "v", "params"):
            views = getattr(model, part).items()
            truth |= {f"{step}/{part}/{name}": x.copy() for name, x in views}
    names = [name for name, _, writer in KIT.order if writer and not name.startswith("case/")]
    assert_all_close({n: tensors[n] for n in names}, {n: np.atleast_1d(truth[n]) for n in truth})


def test_a_case_is_what_the_plain_function_does():
    """And each function has its cases. That it does the right thing is proven in test_gpt2.py."""
    cases = {name.split("/")[1] for name in KIT.tensors if name.startswith("case/")}
    plain = {case: case.removesuffix("_add").removesuffix("_no_bias") for case in cases}
    functions = {name for name in vars(gpt2) if name.endswith(("_forward", "_backward"))}
    assert set(plain.values()) == functions | {"adamw"}
    assert sum(case.endswith("_add") for case in cases) == 4
    for case, function in plain.items():
        run = inspect.unwrap(getattr(gpt2, function))
        args = {}
        for name in inspect.signature(run).parameters:
            x = KIT.tensors.get(f"case/{case}/before/{name}")  # of a bias that is None there is no
            args[name] = x if x is None else x.copy() if x.size > 1 else x.item()
        run(*args.values())
        assert args.get("add", False) == case.endswith("_add")
        after = {name: KIT.tensors.get(f"case/{case}/after/{name}") for name in args}
        after = {name: x for name, x in after.items() if x is not None}
        assert after and all(np.isfinite(x).all() for x in after.values())
        assert_all_close({name: args[name] for name in after}, after)


@pytest.fixture
def compared(call):
    """compared(tensors): what the program says of a port's file: (exit code, its lines)."""
    call(porting_kit.main)

    def compare(tensors):
        porting_kit.write_tensors("mine.safetensors", tensors, [])
        code, stdout, stderr = call(porting_kit.main, "--compare", "mine.safetensors")
        assert stderr == ""
        return code, stdout.splitlines()

    return compare


def test_the_kit_itself_and_one_of_float32_agree(compared):
    stored, _ = gpt2.read_safetensors("data/kit.safetensors")
    assert_same_bits(stored, KIT.tensors)
    assert all(x.ctypes.data % x.itemsize == 0 for x in stored.values())
    with open(os.path.join(TOP, "figures", "FORMATS.md"), encoding="utf-8") as file:
        assert f"The kit holds {len(KIT.tensors)} tensors" in " ".join(file.read().split())
    single = porting_kit.make_kit(np.float32).tensors
    single = {k: x.astype("<f4") if x.dtype.kind == "f" else x for k, x in single.items()}
    for tensors in (KIT.tensors, single):
        assert compared(tensors) == (0, [f"{len(KIT.order)} agree, 0 differ, 0 are missing"])
    code, lines = compared({name: KIT.tensors[name] for name in ("lnf", "ln1", "inputs")})
    assert code == 0 and lines[0].startswith("4 agree, 0 differ, ")
    assert lines[0].endswith(" are missing, first case/encoder_forward/after/out")
    assert compared({})[0] == 1


FAULTS = {  # the first to differ: the function that is at fault, in which call, which argument
    "logits": ("matmul_forward", 8, 0),
    "dresidual3 of layer 1": ("layernorm_backward", 0, 0),
    "dencoded": ("layernorm_backward", 4, 0),
    "step2/m/wte": ("adamw", 16, 2),
}


@pytest.mark.parametrize("found", FAULTS)
def test_a_fault_is_found_where_it_is_made(found, compared, monkeypatch):
    """One call writes numbers that are 0.1 % too large. All that follows differs."""
    function, number, argument = FAULTS[found]
    calls = itertools.count()

    def spoil(*args):
        if next(calls) == number:
            args[argument][...] *= 1.001

    monkeypatch.setattr(porting_kit, "put_cases", lambda *args: None)
    watch(monkeypatch, gpt2, function, after=spoil)
    code, lines = compared(porting_kit.make_kit().tensors)
    assert code == 1 and lines[0] == f"the first to differ is {found}"
    assert lines[2] == f"{function} of train_gpt2.py computes it"


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("case/gelu_forward/after/out", lambda x: 2 * x, "gelu_forward of train_gpt2.py computes"),
        ("qkv", lambda x: x[0], "it is float64 (5, 7, 36), expected float32 or"),
        ("ln2", lambda x: np.where(x == x[0, 1, 2, 3], np.nan, x), "wrong is ln2[0, 1, 2, 3]: nan"),
        ("ln2", lambda x: np.where(x == x[1, 1, 2, 3], np.inf, x), "differ is ln2 of layer 1"),
        ("targets", lambda x: np.maximum(x, 2), "most wrong is targets["),
        ("inputs", lambda x: x + 1, "it is given"),
        ("lnf", lambda x: x * (1 + 2e-10), "2.0e-10, expected at most 1e-10"),
        ("lnf", lambda x: (x * (1 + 2e-5)).astype("<f4"), "2.0e-05, expected at most 1e-05"),
        ("ln1_means", lambda x: x, "'ln1_means' is not in the kit"),
    ],
)  # fmt: skip
def test_what_differs_is_said(name, change, expected, compared):
    x = KIT.tensors.get(name, np.zeros(3))
    code, lines = compared({"ln1": KIT.tensors["ln1"], name: change(x.copy())})
    assert code == 1 and expected in "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The picture of a run


def test_a_picture_of_runs(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    plot = lambda *words: run_trainer(*words, cwd=tmp_path, program=(f"{TOP}/figures/plot_run.py",))
    lines = '{"step": 0, "val_loss": 5}\n{"step": 1, "train_loss": 4, "lr": 0.1}\n{"half a li'
    runs = tmp_path / "_one", tmp_path / r"$\frac$"
    for folder in runs:
        folder.mkdir()
        (folder / "main.jsonl").write_text(lines)
    both = tmp_path / "both.svg"
    assert plot(*runs, "--output", both) == (0, f"{both}\n", "")
    assert "_one, training" in both.read_text() and "$" in both.read_text()
    for text, what in (("", " is empty"), ('{"step": 1}\n[]\n', ", line 2"), ("{}\n", ", line 1")):
        (runs[0] / "main.jsonl").write_text(text)
        assert f"main.jsonl{what}" in failed_in_one_line(plot(runs[0]))
