"""What the tests share."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt2 as gpt2
from test_gpt2 import random_model

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
        pytest.skip(
            "needs GPT-2's vocabulary in data/tiktoken: run `python prepro_tinyshakespeare.py`, "
            "or set TIKTOKEN_CACHE_DIR"
        )


# --------------------------------------------------------------------------------------------------
# Weights in and out, and hostile files
#
# Files are made here by writers of our own, a dozen lines each, from the formats' descriptions: the
# trainer never reads only what it wrote itself. Then they are damaged, by a table and by chance,
# and what comes back must be what the file says, to the bit, or an InputError of one line that says
# what is wrong.


FILE_SIZES = {
    "V": 61,
    "L": 2,
    "NH": 3,
    "C": 24,
    "max_seq_len": 11,
}  # of the small model in most files here


LAYER_PARTS = {
    "ln1": "ln_1",
    "qkv": "attn.c_attn",
    "attproj": "attn.c_proj",
    "ln2": "ln_2",
    "fc": "mlp.c_fc",
    "fcproj": "mlp.c_proj",
}


def file_model(**sizes):
    return random_model(2, 8, np.float32, **FILE_SIZES | sizes)


def as_hugging_face(views, prefix=""):
    """Params or grads by Hugging Face's names, in its layout: a Conv1D's weight is (C_in,
    C_out)."""
    tensors = {
        "wte.weight": views["wte"],
        "wpe.weight": views["wpe"],
        "ln_f.weight": views["lnfw"],
        "ln_f.bias": views["lnfb"],
    }
    for l in range(len(views["qkvw"])):
        for ours, theirs in LAYER_PARTS.items():
            tensors[f"h.{l}.{theirs}.weight"] = views[ours + "w"][
                l
            ].T  # a layernorm's has one axis: as it is
            tensors[f"h.{l}.{theirs}.bias"] = views[ours + "b"][l]
    return {prefix + name: tensor for name, tensor in tensors.items()}


TORCH_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I32": torch.int32,
}


def encoded_as(dtype, array):
    return (
        torch.tensor(array).to(TORCH_TYPES[dtype]).reshape(-1).view(torch.uint8).numpy().tobytes()
    )


def safetensors_parts(tensors, dtype="F32"):
    """(header, body) of {name: array}, or of {name: (dtype, array)} where one differs from the
    rest."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        kind, array = tensor if isinstance(tensor, tuple) else (dtype, tensor)
        data = encoded_as(kind, array)
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    return header, body


def pack_safetensors(header, body=b""):
    """The file. header: a dict, or the bytes that stand in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def weights_folder(folder, tensors, dtype="F32", **told):
    """What Hugging Face's hub holds of a model: config.json and model.safetensors. Returns the
    path."""
    os.makedirs(folder, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 3} | told))
    (folder / "model.safetensors").write_bytes(pack_safetensors(*safetensors_parts(tensors, dtype)))
    return str(folder)


SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded_folder(folder, *shards, **told):
    """The same with the tensors in two files, and an index that says where."""
    path = weights_folder(folder, {}, **told)
    (folder / "model.safetensors").unlink()
    for name, tensors in zip(SHARDS, shards, strict=True):
        (folder / name).write_bytes(pack_safetensors(*safetensors_parts(tensors)))
    weight_map = {
        tensor: name for name, tensors in zip(SHARDS, shards, strict=False) for tensor in tensors
    }
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def halves(tensors):
    """A model's tensors in two parts, every other one."""
    items = list(tensors.items())
    return dict(items[::2]), dict(items[1::2])


LLMC_ORDER = (
    "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb"
).split()


def llmc_bytes(numbers, views, dtype="F32", padded_vocab_size=None, between=b""):
    """A header of 256 int32, what stands `between`, and the 16 tensors, wte with rows of zeros at
    its end."""
    padding = (padded_vocab_size or len(views["wte"])) - len(views["wte"])
    tensors = views | {"wte": np.pad(views["wte"], ((0, padding), (0, 0)))}
    header = struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))
    return header + between + b"".join(encoded_as(dtype, tensors[name]) for name in LLMC_ORDER)


def llmc_model(model, version):
    """llm.c's model file: version 1 without padding, 3 in float32, 5 in bfloat16."""
    c = model.config
    padded = -(-c.vocab_size // 128) * 128
    numbers = [
        20240326,
        version,
        c.max_seq_len,
        c.vocab_size,
        c.num_layers,
        c.num_heads,
        c.channels,
        padded,
    ]
    if version == 1:
        return llmc_bytes(numbers[:7], model.params)
    return llmc_bytes(numbers, model.params, "BF16" if version == 5 else "F32", padded)


def written(path, data):
    path.write_bytes(data)
    return str(path)


def loaded(source, B=2, T=8):
    return gpt2.GPT2.from_pretrained(str(source), B, T)


def refused_file(source, *parts, error=gpt2.InputError):
    """from_pretrained must raise the error, in one line that says all of these. Returns the
    line."""
    with pytest.raises(error) as caught:
        loaded(source)
    line = str(caught.value)
    assert line.isprintable() and [part for part in parts if str(part) not in line] == [], line
    return line


def odd_at_the_end(array, value):
    """A copy with another value in the last place."""
    array = array.copy()
    array[(-1,) * array.ndim] = value
    return array


REAL_CONFIG = {  # that of OpenAI's upload, but for the sizes
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 11,
    "n_embd": 24,
    "n_head": 3,
    "n_layer": 2,
    "n_positions": 11,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 61,
}


def run_state(model, folder, **settings):
    """A Run that has made 7 updates and can be saved in that folder."""
    args = gpt2.settings({"output_dir": str(folder)})
    args.batch_size, args.sequence_length = model.batch_size, model.sequence_length
    args.total_batch_size = model.batch_size * model.sequence_length
    vars(args).update(settings)
    return gpt2.Run(
        args=args,
        world=gpt2.one_process(),
        model=model,
        loader=SimpleNamespace(position=(0, 112, 0)),
        val_loader=None,
        data={"training": [[1000, 123456789]], "validation": [[70, 987654321]]},
        tokenizer=None,
        examples=None,
        log=gpt2.Log(None),
        step=7,
    )


def peak_of(call):
    """(what call returns, the most memory that Python and NumPy held at once while it ran, in
    bytes)."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header_of(data):
    """(header, where the tensors begin) of a sound .safetensors file."""
    end = 8 + struct.unpack_from("<Q", data)[0]
    return json.loads(data[8:end]), end


def read_plainly(data):
    """{name: float32 array} of a sound .safetensors file."""
    header, end = header_of(data)
    header.pop("__metadata__", None)
    tensors = {}
    for name, t in header.items():
        part = bytearray(data[end:][slice(*t["data_offsets"])])
        part = torch.frombuffer(part, dtype=TORCH_TYPES[t["dtype"]])
        tensors[name] = part.reshape(t["shape"]).float().numpy()
    return tensors


# --------------------------------------------------------------------------------------------------
# Data, generation, the command line and checkpoints, as a user meets them
#
# A model so small that a run takes a moment learns random letters. Where the command line is the
# point it is run as its user runs it; the rest goes through main() in this process, which saves the
# start-up. What a run must end with is compared bit for bit: tensors of its newest checkpoint,
# weights, log, and printed words.


TRAINER = os.path.abspath(gpt2.__file__)


NOBODY = "http://127.0.0.1:9"  # no server listens there


NO_NETWORK = dict.fromkeys(
    ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "HF_ENDPOINT"), NOBODY
)
NO_NETWORK |= {"NO_PROXY": "", "no_proxy": ""}


SMALL = gpt2.GPT2Config(max_seq_len=16, vocab_size=256, num_layers=3, num_heads=2, channels=16)


# What save_pretrained writes.
FINISHED = ("config.json", "generation_config.json", "README.md", "model.safetensors")

SMALL_DATA = "--input_bin train_*.bin --input_val_bin val.bin".split()


SMALL_RUN = (
    ["--model", "model", *SMALL_DATA]
    + """--batch_size 2 --sequence_length 8 --num_iterations 12
    --learning_rate 1e-2 --warmup_iters 3 --learning_rate_decay_frac 0.1
    --weight_decay 0.1 --grad_clip 1
    --val_loss_every 4 --val_max_steps 2 --sample_every 4 --max_new_tokens 12
    --log_every 1""".split()
)


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
STOP_SIGNALS += [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)]


KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows knows only one way


posix_only = pytest.mark.skipif(
    os.name == "nt",
    reason="Windows has no such signals and limits: run python -m pytest on Linux or macOS",
)


def write_token_file(path, tokens, magic=20240520, version=1, count=None, vocab_size=0):
    """A token file by hand, with a wrong header if asked for. llm.c's say nothing of a size."""
    header = struct.pack("<4i", magic, version, len(tokens) if count is None else count, vocab_size)
    path.write_bytes(header.ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}H", *tokens))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """A folder with what SMALL_RUN needs. Its shards hold 6 and 3 batches: 12 updates see some
    twice."""
    folder, rng = tmp_path_factory.mktemp("small"), random.Random(0)
    gpt2.GPT2(SMALL, 2, 8, seed=1).save_pretrained(folder / "model")
    for name, count in (("train_0.bin", 100), ("train_1.bin", 61), ("val.bin", 70)):
        write_token_file(folder / name, rng.choices(range(97, 123), k=count))
    return folder


def run_command(folder, *flags, program=(TRAINER,), env=None, **options):
    """The trainer as a user runs it, in that folder and without a network: (exit code, stdout,
    stderr)."""
    if env is None:
        env = {}
    done = subprocess.run(
        [sys.executable, *program, *map(str, flags)],
        cwd=folder,
        capture_output=True,
        env={**os.environ, **NO_NETWORK, "PYTHONPATH": os.path.dirname(TRAINER), **env},
        encoding="utf-8",
        errors="replace",
        timeout=60,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def running_command(folder, *flags, stderr=subprocess.STDOUT):
    """The trainer, started and left running; its words come line by line from .stdout."""
    process = subprocess.Popen(
        [sys.executable, TRAINER, *map(str, flags)],
        cwd=folder,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


def read_up_to(process, beginning):
    """Read what a running trainer says up to the first line with that beginning."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line began with {beginning!r}: {''.join(lines)}")


@pytest.fixture
def call_main(small_folder, monkeypatch, capsys):
    """call(*flags): main() in this process, in small_folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(small_folder)
    monkeypatch.setattr(
        os, "fsync", lambda handle: None
    )  # what it protects from does not happen here
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)

    def call(*flags):
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGPIPE")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        handlers = [signal.getsignal(number) for number in numbers]
        capsys.readouterr()
        try:
            with np.errstate(all="ignore"):
                code = gpt2.main([str(flag) for flag in flags])
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
        return (code, *capsys.readouterr())

    return call


def succeeded(result):
    """stdout of a run that ended well."""
    assert result[0] == 0 and not result[2], result
    return result[1]


def failed_in_one_line(result):
    """The one line with which a run ended, with exit code 1 and no traceback."""
    code, _, error = result
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, result
    return error


def events(stdout):
    """What a run printed, but for headings, durations and farewells: a continuation has others."""
    stdout = re.sub(
        r"\nfinishing this step[^\n]*\n", "", re.sub(r", \d+ ms, [\d:]+ left\)", ")", stdout)
    )
    heading = r"model: |memory|training data: |validation data: |nothing of this run will be kept"
    heading += r"|resuming from |.* holds NO RUN TO RESUME|(stopped: )?\d+ updates, "
    heading += r"|.* is damaged: |run: |a model that knows nothing |it may learn so small a text "
    heading += r"|so small a model |a validation reads |.* updates, and the logs go on "
    heading += r"|(train|val  ) loss [ \d]\d\.\d{4} |best val loss "
    return re.sub(rf"(?m)^({heading}).*\n", "", stdout)


def joined(first, second):
    """The events of a run that was stopped, and of the one that went on from where it stopped.

    The second evaluates once more what the first evaluated last, and must find the same. If the
    signal came in the midst of it, the first has a part.
    """
    first, second = events(first), events(second)
    updates = list(re.finditer(r"(?m)^step \d+/\d+: .*\n", first))
    seam = updates[-1].end() if updates else 0
    part = first[seam:]
    # A sample that was broken off ends its line, and perhaps a character, where the whole goes on.
    assert second.startswith((part, part.removesuffix("\n").removesuffix("\ufffd"))), part
    return first[:seam] + second


def all_joined(*sessions):
    """The events of all sessions of a run."""
    return functools.reduce(joined, sessions, "")


def as_read(text):
    """What reading a pipe as text makes of line ends: a model of bytes comes up with all of
    them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def stopped_where(stdout):
    """What the last line of a stopped run says: (updates made, the flags that go on)."""
    last = re.fullmatch(r"stopped: (\d+) updates, .*, go on with (.*)", stdout.splitlines()[-1])
    return int(last[1]), last[2]


def train_losses(stdout):
    return [float(loss) for loss in re.findall(r"(?m)^step \d+/\d+: train loss (\S+)", stdout)]


def checkpoints(folder):
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("checkpoint_" + 8 * "[0-9]" + ".safetensors"))


def step_of(checkpoint):
    return int(re.fullmatch(r"checkpoint_(\d{8})\.safetensors", checkpoint.name)[1])


def tensor_bytes(file):
    """{tensor's name: its bytes} of a .safetensors file."""
    data = file.read_bytes()
    header, end = header_of(data)
    header.pop("__metadata__", None)
    return {name: data[end:][slice(*entry["data_offsets"])] for name, entry in header.items()}


def state_of(checkpoint):
    """The state of the run that stands in a checkpoint."""
    header, _ = header_of(checkpoint.read_bytes())
    return json.loads(header["__metadata__"]["state"])


def with_right_checksum(data):
    """A checkpoint's bytes, with the checksum at their end that belongs to those before it."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def whole_state(folder):
    """All that a run must end with, from the files of its --output_dir."""
    newest = checkpoints(folder)[-1]
    data = newest.read_bytes()
    assert data == with_right_checksum(data)
    tensors, state = tensor_bytes(newest), state_of(newest)
    del tensors["crc32"]  # the state has the folder's name, too
    params = sum(len(part) for name, part in tensors.items() if name.startswith("transformer."))
    assert len(tensors["m"]) == len(tensors["v"]) == params
    return {
        **tensors,
        "step": state["step"],
        "position": state["position"],
        "data": state["data"],
        "log": (folder / "main.log").read_text(),
        "final": tensor_bytes(folder / "model.safetensors"),
        "name": newest.name,
    }


def folder_content(folder):
    """{path: bytes} of all files below a folder, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- Data


def batches_by_hand(shards, B, T):
    """llm.c's order: of each shard in turn as many whole batches as fit with their last target."""
    for shard in itertools.cycle(shards):
        for start in range(0, (len(shard) - 1) // (B * T) * B * T, B * T):
            piece = np.array(shard[start : start + B * T + 1])
            yield piece[:-1].reshape(B, T), piece[1:].reshape(B, T)


def sharp_model(B, T, seed=5, recompute=1):
    """A model whose predictions differ from place to place."""
    model = gpt2.GPT2(SMALL, B, T, seed, recompute)
    for name in ("wte", "wpe", "qkvw", "fcw", "attprojw", "fcprojw"):
        model.params[name] *= 15
    model.params["lnfw"][
        ::2
    ] = -1  # or else, the classifier being the embeddings, a token begets itself
    return model


# ---- Checkpoints and exact resumption

AT_A_MOMENT = """if True:
    import os, sys, train_gpt2
    moment, number, where, begun, seen = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], False, 0
    def trace(frame, event, arg):
        global begun, seen
        if frame.f_code.co_filename != train_gpt2.__file__:
            return None
        begun = begun or frame.f_code.co_name == "train" or not where.startswith("train ")
        if begun and frame.f_code.co_name in where.split():
            seen += event == "line"
            if event == "line" and seen == moment:
                os.kill(os.getpid(), number)
            return trace
    os.fsync = lambda handle: None  # what it protects from is a power cut, no signal
    sys.settrace(trace)
    code = train_gpt2.main(sys.argv[4:])
    sys.settrace(None)
    print(seen, file=sys.stderr)
    sys.exit(code)
"""

# The functions that decide, print and write, from train() on: before it, no signal is noted yet.
IN_THE_LOOP = """train update_until_due validate keep_best sample_aloud print_sample save
    save_checkpoint finish write_safetensors atomic_write save_huggingface add has write append"""


def run_to_a_moment(folder, moment, number, *flags, where=IN_THE_LOOP):
    """The trainer, which sends itself that signal before the moment-th line it executes of certain
    functions: (exit code, stdout, the number of such lines). Moment 0 never comes."""
    code, stdout, error = run_command(
        folder, moment, int(number), where, *flags, program=("-c", AT_A_MOMENT)
    )
    assert error.strip().isdecimal() or number == KILL and error == "", error
    return code, stdout, int(error or 0)


@pytest.fixture(scope="module")
def uninterrupted(small_folder, tmp_path_factory):
    """The run that the interrupted ones must equal. early: a folder that it left when killed
    half-way, after its 6th update and before that was saved."""
    folder, early = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("early")
    flags = (*SMALL_RUN, "--checkpoint_every", 1)
    code, stdout, lines = run_to_a_moment(small_folder, 0, 0, *flags, "--output_dir", folder)
    assert code == 0 and [step_of(path) for path in checkpoints(folder)] == [11, 12]
    # is_due has one line. It is executed once before the first update and four times after each
    # one: for the printed line (but for that of the first), the validation, the sample and the
    # checkpoint.
    killed = (*flags, "--output_dir", early)
    run_to_a_moment(small_folder, 6 * 4, KILL, *killed, where="is_due")
    assert [step_of(path) for path in checkpoints(early)] == [4, 5]
    state, said = whole_state(folder), events(stdout)
    return SimpleNamespace(
        flags=flags, folder=folder, early=early, lines=lines, events=said, state=state
    )
