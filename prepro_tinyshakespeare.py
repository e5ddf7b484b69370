"""
What must be ready before training: text, tokens, vocabulary, weights, and every file format.

    python prepro_tinyshakespeare.py
        Tiny Shakespeare, in GPT-2's tokens

    python prepro_tinyshakespeare.py --input my.txt --val_fraction 0.05 --output_prefix data/notes
        your own text: data/notes_train.bin and data/notes_val.bin

    python prepro_tinyshakespeare.py --input my.txt --bytes 1
        the same with the text's bytes as tokens, which needs no vocabulary and so no network

    python prepro_tinyshakespeare.py --hellaswag
        the questions of HellaSwag, in GPT-2's tokens

Everything that comes from the network comes through this file. It goes to data/, and is fetched
only once:

    tiny_shakespeare.txt               the text, 1.1 MB
    tiny_shakespeare_{train,val}.bin   its tokens, in llm.c's format
    gpt2_tokenizer.bin                 the bytes of every token, in llm.c's format
    tiktoken/                          GPT-2's vocabulary, as tiktoken keeps it
    gpt2.safetensors, ...              OpenAI's weights
    hellaswag_val.jsonl, .bin          questions and answers; their tokens, in llm.c's format

While a file arrives, its name ends in .part. It gets its real name when it has passed its checks. A
.part that an earlier run left behind is continued where it ends.

The file knows arrays and names, and nothing about layers. train_gpt2.py imports it.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import re
import stat
import sys
import time
from array import array
from typing import NamedTuple

import numpy as np

# --------------------------------------------------------------------------------------------------
# 1. Errors and files


class InputError(ValueError):
    """Something from outside is not as it must be: one line with what was found, and the remedy."""


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def print_status(line):
    """Print to stderr, since a program may be reading stdout."""
    print(line, file=sys.stderr, flush=True)


def in_data(name):
    """data/NAME; if there is no data/ in this folder, the one beside this file, if that exists."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
    if not os.path.isdir("data") and os.path.isdir(beside):
        return f"{beside}/{name}"
    return f"data/{name}"


def regular_file(path):
    """InputError if path is a folder, a pipe or a device. Reading a pipe could wait for ever."""
    mode = os.stat(path).st_mode
    require(stat.S_ISREG(mode), f"{path}: expected a file, found a folder, a pipe or a device")


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to, which takes the place of `path` when it is whole and on the disk.

    It is written to PATH.tmp, flushed, and renamed. So PATH is never half a file, and if writing
    fails, the old PATH is still there.
    """
    temporary = f"{path}.tmp"  # the same name each time: what a killed run left is overwritten
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            whole = os.path.getsize(temporary) == file.tell()
            require(whole, f"{path}: not all of it reached the disk: nothing was replaced")
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def sync_folder(folder):
    """Make a rename in a folder survive a power cut, where the system can. Windows can't."""
    with contextlib.suppress(OSError):
        handle = os.open(folder or ".", os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


MAX_JSON = 1 << 20  # bytes; the header of GPT-2 XL's weights has 70 KB


def read_json(path):
    """The JSON object in a small file: a dict."""
    regular_file(path)
    size = min(os.path.getsize(path), MAX_JSON)
    return parse_json(np.fromfile(path, np.uint8, size).tobytes(), path)


def parse_json(data, path):
    """The JSON object in bytes that were read from path: a dict."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON: {error}") from None
    found = type(value).__name__
    require(isinstance(value, dict), f"{path}: expected a JSON object, found {found}")
    return value


def write_json(path, value):
    """Write a dict as JSON."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2).encode())


# --------------------------------------------------------------------------------------------------
# 2. What there is to fetch

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_SIZE = 1_115_394
VAL_TOKENS = 32_768  # llm.c's split: the first 32 * 1024 tokens validate, the other 305,260 train

HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"

VOCABULARY = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # as in tiktoken
VOCABULARY_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

WEIGHTS = {  # name: (revision, SHA-256, bytes). Where it says None, we take the hub's word for it
    "gpt2": (
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        548_105_171,
    ),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None, None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None, None),
    "gpt2-xl": (
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        None,
    ),
}

OFFLINE = (
    "without a network, train by bytes: python prepro_tinyshakespeare.py --input my.txt --bytes 1, "
    "or python train_gpt2.py --model bytes"
)


def fetch_weights(name):
    """The path of OpenAI's weights of that name, in data/. They are fetched if they are not there.

    They come from the hub, or from HF_ENDPOINT if that is set. InputError if the name is unknown,
    the file there has the wrong size, or it can't be fetched.
    """
    require(name in WEIGHTS, f"no weights are called {name!r}: choose one of {', '.join(WEIGHTS)}")
    revision, sha256, size = WEIGHTS[name]
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    folder = f"{hub.rstrip('/')}/openai-community/{name}/resolve/{revision}"
    return download(f"{folder}/model.safetensors", in_data(f"{name}.safetensors"), sha256, size)


def get_encoding():
    """tiktoken's "gpt2": a tiktoken.Encoding. InputError if tiktoken or the vocabulary is missing.

    By itself tiktoken keeps the vocabulary in a temporary folder, so that it would be fetched anew
    after every reboot, without a timeout. So we fetch it, to data/tiktoken, unless
    TIKTOKEN_CACHE_DIR is set.
    """
    tiktoken = package("tiktoken")
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", in_data("tiktoken"))
    if folder:  # an empty name is tiktoken's way to say: no cache
        for name, sha256 in VOCABULARY_SHA256.items():
            fetch_vocabulary(name, sha256, folder)

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever it is, it comes from tiktoken's files or its network
        raise InputError(
            f"tiktoken can't load GPT-2's vocabulary ({reason(error)}): set TIKTOKEN_CACHE_DIR to "
            f"a folder that has it, or unset it and try again with a network; {OFFLINE}"
        ) from None


def fetch_vocabulary(name, sha256, folder):
    """Make sure of one of the vocabulary's two files, where tiktoken looks for it."""
    url = VOCABULARY + name
    path = f"{folder}/{hashlib.sha1(url.encode()).hexdigest()}"
    if os.path.exists(path) and digest(path) != sha256:
        print_status(f"{path} is damaged: fetching {name} again")
        os.remove(path)
    download(url, path, sha256)


def package(name):
    """Import a package that is needed only now. InputError with the remedy if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"the package {name} is needed here ({error}): pip install {name}"
        ) from None


# --------------------------------------------------------------------------------------------------
# 3. Downloading
#
# Hugging Face answers with a redirect, and this first response already says what is to come:
# X-Linked-Etag is the file's SHA-256, in quotes, and X-Linked-Size its length. Only a file whose
# SHA-256 is known is ever continued, because nothing else would notice that two halves do not
# belong together.

ATTEMPTS = 8  # connections that one download may take, if the first of them brought anything at all
RETRY_WAIT = 2.0  # seconds between them
TIMEOUT = (10, 30)  # seconds to wait for a connection, and for the next bytes
CHUNK = 1 << 16  # bytes at a time: a connection that breaks loses less than that


def download(url, path, sha256=None, size=None):
    """Fetch url to path, unless it is there, and return path. sha256, size: what is known of it.

    InputError, with the cause and the way to place the file by hand, if there is no network, a
    refusal, a web page instead of the file, another file than expected, no room on the disk, or
    the package requests is missing.
    """
    if os.path.exists(path):
        regular_file(path)
        found = os.path.getsize(path)
        right = size in (None, found)
        require(right, f"{path} has {found} bytes, expected {size}: delete it and run again")
        return path

    try:
        requests = package("requests")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        fetch(requests, url, path, sha256, size)
    except (InputError, OSError) as error:
        raise InputError(
            f"can't fetch {url}: {reason(error)}; try again, or fetch it by hand and put it at "
            f"{path}; {OFFLINE}"
        ) from None
    return path


def fetch(requests, url, path, sha256, size):
    """download, with as many connections as it takes. InputError or OSError if that fails."""
    part = f"{path}.part"
    continued = False  # whether the file was begun by an earlier connection
    progress = False  # whether any connection brought anything

    for _ in range(ATTEMPTS):
        before = length(part)
        continued = continued or before > 0
        try:
            want_sha256, want_size = receive(requests, url, part, sha256, size)
        except requests.RequestException as error:
            cause = reason(error)
            progress = progress or length(part) != before
            require(progress, cause)  # nothing came at all: waiting won't bring a network
            time.sleep(RETRY_WAIT)
            continue

        found, nbytes = digest(part), length(part)
        if want_sha256 in (None, found) and want_size in (None, nbytes) and nbytes > 0:
            os.replace(part, path)
            sync_folder(os.path.dirname(path))
            return

        os.remove(part)
        require(
            continued,
            f"what came has {nbytes} bytes and SHA-256 {found}, expected "
            f"{want_size or 'any number of'} bytes and SHA-256 {want_sha256}",
        )
        print_status(f"{part} is not the expected file: fetching it again, from the start")
        continued = False

    raise InputError(
        f"the connection broke {ATTEMPTS} times, in the end because: {cause} "
        f"({length(part)} bytes are kept, and continued next time)"
    )


def receive(requests, url, part, sha256, size):
    """One connection: append to the file `part` what it lacks. Returns (sha256, size), if known.

    requests.RequestException if the connection breaks; InputError if the answer can't be the file.
    """
    have = length(part)
    headers = {"Accept-Encoding": "identity"}  # so that all lengths count the file's own bytes
    if have:
        headers["Range"] = f"bytes={have}-"

    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        sha256, size = announced(response, sha256, size)

        status = response.status_code
        if have and status == 416 and have == size:
            return sha256, size  # nothing was missing

        content_range = response.headers.get("Content-Range", "")
        spot = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
        begins_here = spot is not None and int(spot[1]) == have
        continues = status == 206 and sha256 is not None and begins_here
        if have and status in (206, 416) and not continues:
            os.remove(part)
            return receive(requests, url, part, sha256, size)

        right = status == 200 or have and continues
        require(right, f"the server answered {status} {response.reason}")
        require(
            "text/html" not in response.headers.get("Content-Type", ""),
            "a web page came instead of the file (does this network want you to log in?)",
        )

        if continues:
            size = agreed(size, spot[2])
        elif "Content-Encoding" not in response.headers:
            size = agreed(size, response.headers.get("Content-Length"))

        mode = "ab" if continues else "wb"  # 200 brings the whole file, whatever we asked for
        with open(part, mode) as file:
            pieces = response.iter_content(CHUNK)
            for chunk in watched(pieces, part, have if continues else 0, size):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    if size is not None and length(part) < size:
        raise requests.ConnectionError("the connection ended early")
    return sha256, size


def announced(response, sha256, size):
    """(sha256, size), now that a response and the redirects before it say what is to come."""
    for answer in (*response.history, response):
        linked = answer.headers.get("X-Linked-Etag", "").strip('"').lower()
        if re.fullmatch("[0-9a-f]{64}", linked):
            right = sha256 in (None, linked)
            require(right, f"the server offers SHA-256 {linked}, expected {sha256}")
            sha256 = linked
        size = agreed(size, answer.headers.get("X-Linked-Size"))
    return sha256, size


def agreed(size, offered):
    """The file's size, now that a header says `offered`. InputError if another one was expected."""
    if not (offered or "").isdecimal():
        return size
    offered = int(offered)
    require(size in (None, offered), f"the server offers {offered} bytes, expected {size}")
    return offered


def length(path):
    """The bytes in a file; 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def digest(path):
    """A file's SHA-256, in hex."""
    regular_file(path)
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        pieces = iter(lambda: file.read(1 << 20), b"")
        for piece in watched(pieces, f"checking {path}", 0, length(path)):
            sha256.update(piece)
    return sha256.hexdigest()


def reason(error):
    """What lies at the bottom of an exception, in one line: requests wraps up to five of them."""
    candidates = (error.__cause__, getattr(error, "reason", None), *error.args)
    for inside in candidates:
        if isinstance(inside, Exception):
            return reason(inside)
    return " ".join(str(error).split()) or type(error).__name__


def watched(pieces, what, done, total):
    """The same pieces, while a line on stderr, if it is a terminal, says how far we are.

    done, total: bytes. Nothing is shown in the first second.
    """
    start, first, shown = time.monotonic(), done, 0.0
    try:
        for piece in pieces:
            yield piece
            done += len(piece)
            now = time.monotonic()
            if now - start > 1 and now - shown > 0.2 and sys.stderr.isatty():
                shown = now
                rate = max(1.0, (done - first) / (now - start))
                line = f"\r{what}: {done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
                if total:
                    line += f", {100 * done / total:.0f}%, {(total - done) / rate:.0f} s left   "
                print(line, end="", file=sys.stderr, flush=True)
    finally:
        if shown:
            print_status("")


# --------------------------------------------------------------------------------------------------
# 4. Weights
#
# safetensors, Hugging Face's format:
#
#     8 bytes: n, little-endian
#     n bytes of JSON: {name: {"dtype": ..., "shape": ..., "data_offsets": [begin, end]}, ...}
#     the tensors, one after the other, without holes
#
# llm.c's model file:
#
#     256 int32: 20240326, version, max_seq_len, vocab_size, num_layers, num_heads, channels,
#         padded_vocab_size, zeros
#     the 16 tensors in order, as bfloat16 in version 5, else as float32; wte is followed by rows of
#         zeros up to padded_vocab_size, a multiple of 128 (not in version 1)


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    path: str
    offset: int  # in bytes, from the beginning of the file
    dtype: str  # "F32", "F16", "BF16", ...
    shape: tuple
    transposed: bool = False  # Hugging Face keeps four of the matrices as (C, OC)


HF_NAMES = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "ln1w": "h.{}.ln_1.weight",
    "ln1b": "h.{}.ln_1.bias",
    "qkvw": "h.{}.attn.c_attn.weight",
    "qkvb": "h.{}.attn.c_attn.bias",
    "attprojw": "h.{}.attn.c_proj.weight",
    "attprojb": "h.{}.attn.c_proj.bias",
    "ln2w": "h.{}.ln_2.weight",
    "ln2b": "h.{}.ln_2.bias",
    "fcw": "h.{}.mlp.c_fc.weight",
    "fcb": "h.{}.mlp.c_fc.bias",
    "fcprojw": "h.{}.mlp.c_proj.weight",
    "fcprojb": "h.{}.mlp.c_proj.bias",
    "lnfw": "ln_f.weight",
    "lnfb": "ln_f.bias",
}
HF_TRANSPOSED = {"qkvw", "attprojw", "fcw", "fcprojw"}
LN_EPS = 1e-5  # the only value that GPT-2 uses

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2,
    "F32": 4, "I32": 4, "F64": 8, "I64": 8,
}  # fmt: skip
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 is the upper half of a float32

LLMC_MODEL = 20240326
LLMC_STATE = 20240327
LLMC_SIZES = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels")


def is_llmc(path):
    """Whether a path names a file in llm.c's format."""
    return path.endswith(".bin")


def read_sizes(path):
    """The five numbers that make a GPT-2, under the names in LLMC_SIZES: a dict.

    path: a folder of Hugging Face's, a .safetensors file, the .index.json of one in several parts,
    or llm.c's .bin. InputError if it is no GPT-2.
    """
    sizes = read_llmc_header(path)[0] if is_llmc(path) else read_huggingface(path)[0]

    for name, value in sizes.items():
        positive = type(value) is int and value > 0
        require(positive, f"{path}: {name} is {value!r}, expected a positive integer")
    C, NH = sizes["channels"], sizes["num_heads"]
    require(C % NH == 0, f"{path}: {C} channels can't be shared by {NH} heads")
    return sizes


def find_tensors(path, shapes):
    """Where all parameters lie in a model's files: {(name, l): StoredTensor}.

    shapes is the table of parameters, {"wte": (V, C), "ln1w": (L, C), ...}, with llm.c's names and
    order. l is a layer's number, or None for wte, wpe, lnfw and lnfb. InputError unless there is
    exactly what the table says.
    """
    if is_llmc(path):
        return find_llmc(path, shapes)
    return find_huggingface(path, shapes)


def tensors_of(shapes):
    """(name, l, shape) of every tensor that a file holds, in order."""
    tensors = []
    for name, shape in shapes.items():
        if "{}" not in HF_NAMES[name]:
            tensors.append((name, None, shape))
            continue
        for l in range(shape[0]):
            tensors.append((name, l, shape[1:]))
    return tensors


def read_tensors(found, params):
    """Read what find_tensors found into params {name: array}."""
    for (name, l), stored in found.items():
        if l is None:
            read_tensor(params[name], stored, name)
        else:
            read_tensor(params[name][l], stored, f"{name} of layer {l}")


def read_tensor(out, stored, what):
    """Read a StoredTensor into the array out, piece by piece, so that there is no second copy."""
    if stored.transposed:
        out = out.T
    numbers_per_row = max(1, math.prod(out.shape[1:]))
    rows = max(1, (1 << 20) // numbers_per_row)

    start = 0
    for piece in read_pieces(stored, what, rows * numbers_per_row):
        target = out[start : start + rows]
        target[...] = piece.reshape(target.shape)
        start += rows


def read_pieces(stored, what, numbers=1 << 20):
    """The numbers of a StoredTensor in the order of the file, `numbers` at a time: flat arrays."""
    left = math.prod(stored.shape)
    with open(stored.path, "rb") as file:
        file.seek(stored.offset)
        while left > 0:
            expected = min(numbers, left)
            piece = np.fromfile(file, FLOATS[stored.dtype], expected)
            require(piece.size == expected, f"{stored.path}: ends in the middle of {what}")
            if stored.dtype == "BF16":
                piece = (piece.astype("<u4") << 16).view("<f4")
            finite = np.isfinite(piece).all()
            require(finite, f"{stored.path}: {what} holds a value that is not finite")
            yield piece
            left -= expected


def read_safetensors(path):
    """The header of a .safetensors file, checked: ({name: StoredTensor}, metadata)."""
    regular_file(path)
    total = os.path.getsize(path)
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        plausible = 8 <= total >= n + 8 and n <= MAX_JSON
        require(plausible, f"{path}: no .safetensors file: {total} bytes, a header of {n}")
        header = parse_json(file.read(n), path)

    metadata = header.pop("__metadata__", {})
    require(isinstance(metadata, dict), f"{path}: __metadata__ is no JSON object")
    for name, entry in header.items():
        check_entry(path, name, entry)

    tensors = {}
    end = 0
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    for name, entry in in_order:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin = end
        end = begin + math.prod(shape) * ITEM_BYTES[dtype]
        require(
            entry["data_offsets"] == [begin, end],
            f"{path}: tensor {name!r}, {dtype} {list(shape)}, lies at {entry['data_offsets']}, "
            f"expected {[begin, end]}",
        )
        tensors[name] = StoredTensor(path, 8 + n + begin, dtype, shape)

    described = 8 + n + end
    require(
        described == total,
        f"{path}: has {total} bytes, its header describes {described}: fetch it again",
    )
    return tensors, metadata


def check_entry(path, name, entry):
    """InputError unless a tensor's entry in a header has a shape, offsets and a known dtype."""
    right = isinstance(entry, dict)
    right = right and are_sizes(entry.get("shape")) and are_sizes(entry.get("data_offsets"))
    require(
        right,
        f"{path}: tensor {name!r}: expected dtype, shape and data_offsets, found {entry!r:.99}",
    )
    dtype = entry.get("dtype")
    known = isinstance(dtype, str) and dtype in ITEM_BYTES
    require(known, f"{path}: tensor {name!r} has the unknown dtype {dtype!r}")


def are_sizes(value, most=8):
    """Whether value is a list of at most `most` integers that can be sizes."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(i) is int and 0 <= i < 1 << 48 for i in value)


def write_safetensors(path, tensors, metadata, pieces=lambda array_: [array_]):
    """tensors {name: array}, written as float32; metadata {str: str}.

    pieces gives an array's numbers in order, as an iterable of arrays. One that is a transposed
    view is copied, one at a time.
    """
    header = {"__metadata__": metadata}
    end = 0
    for name, array_ in tensors.items():
        begin = end
        end = begin + 4 * array_.size
        header[name] = {"dtype": "F32", "shape": array_.shape, "data_offsets": [begin, end]}

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array_ in tensors.values():
            for piece in pieces(array_):
                file.write(np.ascontiguousarray(piece, "<f4"))


def huggingface_path(source):
    """The file that a model begins with: its tensors, or the index of its parts."""
    if not os.path.isdir(source):
        return source
    path = os.path.join(source, "model.safetensors")
    return path if os.path.exists(path) else path + ".index.json"


def read_huggingface(source):
    """(sizes, {Hugging Face's name: StoredTensor}) of a model in Hugging Face's format."""
    path = huggingface_path(source)

    # config.json alone says how many heads there are. A file of another name may not belong to it.
    description = {}
    config_path = os.path.join(os.path.dirname(path), "config.json")
    own_config = os.path.basename(path).startswith("model.safetensors")
    if os.path.isdir(source) or own_config and os.path.exists(config_path):
        description = read_json(config_path)

    tensors = {}
    for part in parts_of(path):
        for name, stored in read_safetensors(part)[0].items():
            name = name.removeprefix("transformer.")
            require(name not in tensors, f"{path}: tensor {name!r} is there twice")
            is_mask = name.endswith((".attn.bias", ".attn.masked_bias"))
            if not is_mask:  # the causal mask is no parameter
                tensors[name] = stored

    return sizes_of(path, tensors, description), tensors


def parts_of(path):
    """The .safetensors files that a path stands for: itself, or those that an index names."""
    if not path.endswith(".json"):
        return [path]
    weight_map = read_json(path).get("weight_map")
    right = isinstance(weight_map, dict) and all(is_part(name) for name in weight_map.values())
    require(right, f"{path}: expected a weight_map to files beside it")
    beside = os.path.dirname(path)
    return [os.path.join(beside, name) for name in sorted(set(weight_map.values()))]


def is_part(name):
    """Whether an index may name this file: it must lie beside the index."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    return name == os.path.basename(name) and name.endswith(".safetensors")


def sizes_of(path, tensors, description):
    """The five sizes, from the shapes of the tensors and from config.json, which must agree."""
    wte = tensors["wte.weight"].shape if "wte.weight" in tensors else ()
    wpe = tensors["wpe.weight"].shape if "wpe.weight" in tensors else ()
    require(
        len(wte) == len(wpe) == 2,
        f"{path}: expected GPT-2's matrices wte.weight and wpe.weight, found shapes {wte} and "
        f"{wpe}",
    )
    V, C = wte
    max_seq_len = wpe[0]
    L = sum(name.endswith(".ln_1.weight") for name in tensors)

    expected = {
        "model_type": "gpt2",
        "vocab_size": V,
        "n_positions": max_seq_len,
        "n_embd": C,
        "n_layer": L,
        "n_inner": 4 * C,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LN_EPS,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for key, value in expected.items():
        found = description.get(key)
        require(
            found in (None, value),
            f"{path}: its config.json says {key} = {found!r}, expected {value!r}",
        )

    heads = description.get("n_head", C // 64 if C % 64 == 0 else None)
    require(
        type(heads) is int,
        f"{path}: how many heads? {C} channels are no multiple of 64, and no config.json says "
        "n_head",
    )
    return dict(zip(LLMC_SIZES, (max_seq_len, V, L, heads, C), strict=True))


def find_huggingface(source, shapes):
    """find_tensors of a model in Hugging Face's format."""
    path = huggingface_path(source)
    tensors = read_huggingface(source)[1]
    head = tensors.pop("lm_head.weight", None)

    found = {}
    for name, l, shape in tensors_of(shapes):
        hf_name = HF_NAMES[name].format(l)
        transposed = name in HF_TRANSPOSED
        expected = shape[::-1] if transposed else shape

        stored = tensors.pop(hf_name, None)
        have = stored.shape if stored else "none"
        right = stored is not None and stored.shape == expected
        require(
            right, f"{path}: tensor {hf_name!r}: expected shape {expected}, found {have}"
        )
        require(
            stored.dtype in FLOATS,
            f"{path}: tensor {hf_name!r} is {stored.dtype}, expected {', '.join(FLOATS)}",
        )
        found[name, l] = stored._replace(transposed=transposed)

    extra = next(iter(tensors), "")
    require(not tensors, f"{path}: tensor {extra!r} is no part of a GPT-2")
    if head is not None:
        require(
            np.array_equal(raw_bytes(head), raw_bytes(found["wte", None])),
            f"{path}: lm_head.weight differs from wte.weight; in GPT-2 they are the same",
        )
    return found


def raw_bytes(stored):
    """A stored tensor's bytes, mapped into memory."""
    nbytes = math.prod(stored.shape) * ITEM_BYTES[stored.dtype]
    return np.memmap(stored.path, np.uint8, "r", stored.offset, nbytes)


def read_llmc_header(path):
    """(sizes, version, padded_vocab_size) of a model file of llm.c's."""
    regular_file(path)
    header = np.fromfile(path, "<i4", 8).tolist()
    header += [0] * (8 - len(header))
    magic, version, *sizes, padded = header
    require(
        magic == LLMC_MODEL,
        f"{path}: no llm.c model: it begins with {magic}, expected {LLMC_MODEL}",
    )
    require(
        version in (1, 3, 5),
        f"{path}: version {version}, expected 1 or 3 (float32) or 5 (bfloat16)",
    )
    return dict(zip(LLMC_SIZES, sizes, strict=True)), version, padded


def find_llmc(path, shapes):
    """find_tensors of a model file of llm.c's."""
    sizes, version, padded = read_llmc_header(path)
    dtype = "BF16" if version == 5 else "F32"
    V, C = sizes["vocab_size"], sizes["channels"]

    padding = padded - V if version > 1 else 0  # rows of zeros behind wte
    require(
        padding >= 0, f"{path}: padded vocabulary of {padded} for {V} tokens: no model's header"
    )
    numbers = padding * C + sum(math.prod(shape) for shape in shapes.values())
    expected = 1024 + numbers * ITEM_BYTES[dtype]
    have = os.path.getsize(path)
    require(have == expected, f"{path}: has {have} bytes, its header describes {expected}")

    found = {}
    offset = 1024
    for name, l, shape in tensors_of(shapes):
        found[name, l] = StoredTensor(path, offset, dtype, shape)
        numbers = math.prod(shape)
        if name == "wte":
            numbers += padding * C
        offset += numbers * ITEM_BYTES[dtype]
    return found


def save_huggingface(folder, sizes, params):
    """config.json, generation_config.json and model.safetensors, as GPT2LMHeadModel reads them.

    sizes: a dict as read_sizes returns it; params {name: array}.
    """
    end_of_text = 50256 if sizes["vocab_size"] == 50257 else None
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    description = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["max_seq_len"],
        "n_embd": sizes["channels"],
        "n_layer": sizes["num_layers"],
        "n_head": sizes["num_heads"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LN_EPS,
        "tie_word_embeddings": True,
        **ends,
    }

    tensors = {}
    shapes = {name: view.shape for name, view in params.items()}
    for name, l, _ in tensors_of(shapes):
        view = params[name] if l is None else params[name][l]
        hf_name = "transformer." + HF_NAMES[name].format(l)
        tensors[hf_name] = view.T if name in HF_TRANSPOSED else view

    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, "config.json"), description)
    write_json(os.path.join(folder, "generation_config.json"), ends)
    path = os.path.join(folder, "model.safetensors")
    write_safetensors(path, tensors, {"format": "pt"})


def write_with_header(path, numbers, parts):
    """llm.c's files begin with 256 int32, little-endian, of which the first few say what follows.

    parts: an iterable of bytes and arrays; floats are written as float32. Each part is written
    before the next is asked for.
    """
    header = np.zeros(256, "<i4")
    header[: len(numbers)] = numbers
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)

    with atomic_write(path) as file:
        file.write(header)
        for part in parts:
            if isinstance(part, bytes):
                file.write(part)
            else:
                dtype = "<f4" if part.dtype.kind == "f" else None
                file.write(np.ascontiguousarray(part, dtype))


def with_padding(tensors):
    """The arrays of a table in order, wte with rows of zeros up to a multiple of 128."""
    wte = tensors["wte"]
    padding = np.zeros((-len(wte) % 128, wte.shape[1]), "<f4")
    others = [view for name, view in tensors.items() if name != "wte"]
    return [wte, padding, *others]


def write_llmc_model(path, sizes, params):
    """llm.c's model file, version 3. sizes: a dict as of read_sizes; params {name: array}."""
    V = sizes["vocab_size"]
    padded = V + -V % 128
    numbers = [LLMC_MODEL, 3, *(sizes[name] for name in LLMC_SIZES), padded]
    write_with_header(path, numbers, with_padding(params))


def write_llmc_state(path, inputs, targets, logits_pieces, loss, grads):
    """llm.c's debug state, version 2: one batch with its logits, its loss and all gradients.

        256 int32: 20240327, 2, B, T, zeros
        inputs, targets (B, T) int32 | logits (B, T, V) float32 | loss | the 16 gradients

    logits_pieces: an iterable of arrays, so that the logits are never there all at once.
    """

    def parts():
        yield inputs.astype("<i4")
        yield targets.astype("<i4")
        yield from logits_pieces
        yield np.float32(loss)
        yield from with_padding(grads)

    write_with_header(path, [LLMC_STATE, 2, *inputs.shape], parts())


# --------------------------------------------------------------------------------------------------
# 5. Tokens
#
# A language model sees no letters but ids, each of which stands for a few bytes. GPT-2 has the 256
# single bytes, 50,000 frequent strings of them, and <|endoftext|>, which says that something new
# begins.
#
# llm.c's token file:
#
#     256 int32: 20240520, version 1, number of tokens, zeros
#     the tokens, uint16

TOKENS = 20240520
TOKENIZER = 20240328


def open_tokens(path):
    """The tokens of a file, mapped into memory: uint16, at least one."""
    regular_file(path)
    header = np.fromfile(path, "<i4", 256).tolist()
    nbytes = os.path.getsize(path)
    require(
        len(header) == 256 and header[0] == TOKENS,
        f"{path}: no token file: magic number {header[:1]}, expected {TOKENS}: write it with "
        "prepro_tinyshakespeare.py",
    )
    version, count = header[1:3]
    require(version == 1, f"{path}: token file of version {version}, expected 1")
    expected = 1024 + 2 * count
    require(nbytes == expected, f"{path}: has {nbytes} bytes, {count} tokens make {expected}")
    require(count > 0, f"{path}: has 0 tokens, expected at least one")
    return np.memmap(path, "<u2", "r", 1024)


def write_tokens(path, tokens):
    """llm.c's token file. InputError unless tokens are at least one id, from 0 to 65535."""
    tokens = np.asarray(tokens)
    right = tokens.dtype.kind in "iu" and tokens.ndim == 1 and 0 < len(tokens) < 1 << 31
    right = right and 0 <= tokens.min() and tokens.max() < 1 << 16
    require(
        right,
        f"{path}: expected a row of ids from 0 to 65535, found {tokens.dtype} of shape "
        f"{tokens.shape}",
    )
    write_with_header(path, (TOKENS, 1, len(tokens)), [tokens.astype("<u2")])


def write_tokenizer(path, encoding):
    """llm.c's tokenizer file, with which a program without tiktoken can print what it samples.

    256 int32: 20240328, version 2, number of tokens, the id of <|endoftext|>, zeros | for every
    token, one byte with its length, then its bytes
    """
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    short = max(map(len, tokens)) < 256
    require(short, f"{path}: {encoding.name} has a token of more than 255 bytes")
    numbers = (TOKENIZER, 2, len(tokens), encoding.eot_token)
    write_with_header(path, numbers, (bytes([len(token)]) + token for token in tokens))


def encode_text(text, encoding):
    """text as token ids, uint16. Each section, up to a blank line, begins with <|endoftext|>.

        "To be.\\n\\nOr not."  ->  <|endoftext|> To be.\\n\\n <|endoftext|> Or not.

    Only we put that id there. Where the text itself says <|endoftext|>, these are characters like
    any others. encoding: any tiktoken.Encoding with an eot_token and at most 65536 ids.
    """
    V = encoding.n_vocab
    require(V <= 1 << 16, f"{encoding.name} has {V} ids, expected <= 65536")
    *sections, rest = text.split("\n\n")
    sections = [section + "\n\n" for section in sections] + [rest]

    tokens = array("H")
    for section in watched(sections, "tokenising", 0, len(text)):
        tokens.append(encoding.eot_token)
        tokens.extend(encode_section(section, encoding))
    return np.frombuffer(tokens, np.uint16)


def encode_section(section, encoding):
    """The ids of a section. InputError if tiktoken gives up, as it does on a million spaces."""
    try:
        return encoding.encode_ordinary(section)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tiktoken's regular expressions, in Rust
            raise
        longest = max(map(len, re.findall(r"\s+", section)), default=0)
        raise InputError(
            f"tiktoken can't split a text with {longest} spaces in a row: take them out, or use "
            "--bytes 1"
        ) from None


def read_text(path):
    """A UTF-8 text, without Windows's byte order mark and "\\r\\n". InputError if it is none."""
    require(os.path.exists(path), f"{path}: no such file, expected a UTF-8 text")
    regular_file(path)
    with open(path, "rb") as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte 0x{data[error.start]:02x} at position {error.start} is not UTF-8: "
            "save it as UTF-8, for instance with iconv -f LATIN1 -t UTF-8"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    require(text.strip(), f"{path}: is empty, expected a UTF-8 text")
    return text


def write_split(paths, tokens, n):
    """The first n tokens go to paths[1] for validation, as in llm.c, the others to paths[0]."""
    require(
        0 < n < len(tokens),
        f"{n} of {len(tokens)} tokens for validation: expected at least one on both sides: use a "
        "longer text or another --val_fraction",
    )
    write_tokens(paths[0], tokens[n:])
    write_tokens(paths[1], tokens[:n])


def prepare_tinyshakespeare():
    """Make sure of Tiny Shakespeare's tokens in data/: (train_path, val_path).

    Token files that are whole stay as they are, and a text that is there is used as it is, so
    nothing is fetched twice. InputError if something is missing and can't be fetched.
    """
    text = in_data("tiny_shakespeare.txt")
    paths = (in_data("tiny_shakespeare_train.bin"), in_data("tiny_shakespeare_val.bin"))
    with contextlib.suppress(InputError, OSError):  # one of them is missing or broken
        for path in paths:
            open_tokens(path)
        return paths

    if not os.path.exists(text):
        download(SHAKESPEARE, text, SHAKESPEARE_SHA256, SHAKESPEARE_SIZE)
    elif digest(text) != SHAKESPEARE_SHA256:
        print_status(f"{text} is not the original, but is used: delete it to fetch the original")
    write_split(paths, encode_text(read_text(text), get_encoding()), VAL_TOKENS)
    return paths


class Tokenizer(NamedTuple):
    """How a model reads and writes."""

    encode: object  # str -> list of ids
    decode: object  # id -> bytes
    first: int  # the id that begins a new text


def tokenizer(vocab_size):
    """The Tokenizer of a model with that vocabulary. Up to 256 ids are bytes, more are GPT-2's."""
    if vocab_size <= 256:

        def encode(text):
            return list(text.encode(errors="surrogateescape"))

        def decode(i):
            return bytes([i])

        return Tokenizer(encode, decode, ord("\n") % vocab_size)

    encoding = get_encoding()

    def decode_gpt2(i):
        padding = i >= encoding.n_vocab  # a vocabulary may be padded, to 50304, say
        return b"" if padding else encoding.decode_single_token_bytes(i)

    return Tokenizer(encoding.encode_ordinary, decode_gpt2, encoding.eot_token)


PASSAGE = 1000  # bytes


def own_text():
    """(training, validation) text that needs no network: this project's main files, as bytes.

    Every tenth passage validates, so that both sides have some of everything. uint8 arrays.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    names = ["train_gpt2.py", "test_gpt2.py", "prepro_tinyshakespeare.py", "README.md"]
    paths = [os.path.join(here, name) for name in names]

    texts = [np.fromfile(path, np.uint8) for path in paths if os.path.exists(path)]
    text = np.concatenate(texts)
    passages = np.split(text, range(PASSAGE, len(text), PASSAGE))

    validation = passages[5::10]
    del passages[5::10]
    return np.concatenate(passages), np.concatenate(validation)


# --------------------------------------------------------------------------------------------------
# 6. HellaSwag: the beginning of a story and four endings (Zellers et al., 2019)
#
# llm.c's evaluation file:
#
#     256 int32: 20240522, version 1, number of examples, bytes of the longest example, zeros
#     for each example, as uint16: 65535, its bytes, its index, label, number of endings (4), number
#         of context tokens, these tokens, and for each ending its number of tokens and these tokens

EVALUATION = 20240522
MARK = 65535  # begins an example, and so is no token
ENDINGS = 4


class Example(NamedTuple):
    """A question: which of the endings continues the context?"""

    context: list  # token ids
    endings: list  # four lists of token ids
    label: int  # the number of the right one


def prepare_hellaswag():
    """Make sure of HellaSwag's tokens in data/: the path of the evaluation file."""
    path = in_data("hellaswag_val.bin")
    if os.path.exists(path):
        read_hellaswag(path)
        return path
    text = download(HELLASWAG, in_data("hellaswag_val.jsonl"))
    write_hellaswag(path, parse_hellaswag(text, get_encoding()))
    return path


def parse_hellaswag(path, encoding):
    """The examples in a .jsonl file, which has a JSON object on each line, in GPT-2's tokens."""
    examples = []
    lines = read_text(path).splitlines()
    for number, line in enumerate(watched(lines, "tokenising", 0, None), 1):
        where = f"{path}, line {number}"
        item = parse_json(line.encode(), where)
        context, endings, label = item.get("ctx"), item.get("endings"), item.get("label")
        right = isinstance(context, str) and isinstance(endings, list) and len(endings) == ENDINGS
        right = right and all(isinstance(ending, str) for ending in endings)
        right = right and type(label) is int and 0 <= label < ENDINGS
        require(right, f"{where}: expected ctx, {ENDINGS} endings and a label from 0 to 3")

        tokens = [encoding.encode_ordinary(" " + ending) for ending in endings]
        examples.append(Example(encoding.encode_ordinary(context), tokens, label))
    return examples


def write_hellaswag(path, examples):
    """llm.c's evaluation file from a list of Example."""
    require(0 < len(examples) < 1 << 16, f"{path}: {len(examples)} examples, expected 1 to 65535")
    rows = []
    for index, example in enumerate(examples):
        row = [MARK, 0, index, example.label, len(example.endings), len(example.context)]
        row += example.context
        for ending in example.endings:
            row += [len(ending), *ending]

        nbytes = 2 * len(row)
        require(nbytes < 1 << 16, f"{path}: example {index} takes {nbytes} bytes, at most 65535")
        row[1] = nbytes
        check_example(path, index, example)
        rows.append(np.array(row, "<u2"))

    longest = max(row.nbytes for row in rows)
    write_with_header(path, (EVALUATION, 1, len(rows), longest), rows)


def check_example(path, index, example):
    """InputError unless an example has tokens everywhere and a label that names an ending."""
    parts = [example.context, *example.endings]
    right = len(example.endings) == ENDINGS and all(len(part) > 0 for part in parts)
    right = right and 0 <= example.label < ENDINGS
    right = right and all(0 <= min(part) and max(part) < MARK for part in parts)
    require(
        right,
        f"{path}: example {index}: expected a context and {ENDINGS} endings of at least one token, "
        "ids from 0 to 65534, and a label from 0 to 3",
    )


def read_hellaswag(path):
    """The examples of llm.c's evaluation file: a list of Example."""
    regular_file(path)
    header = np.fromfile(path, "<i4", 256).tolist()
    require(
        len(header) == 256 and header[0] == EVALUATION,
        f"{path}: no evaluation file: magic number {header[:1]}, expected {EVALUATION}: write it "
        "with python prepro_tinyshakespeare.py --hellaswag",
    )
    version, count, longest = header[1:4]
    require(version == 1, f"{path}: evaluation file of version {version}, expected 1")
    body = os.path.getsize(path) - 1024
    require(body % 2 == 0, f"{path}: ends in the middle of a number")
    numbers = np.fromfile(path, "<u2", offset=1024).tolist()

    examples = []
    start = 0
    longest_found = 0
    while start < len(numbers):
        nbytes = numbers[start + 1] if start + 1 < len(numbers) else 0
        stop = start + nbytes // 2
        examples.append(parse_example(path, len(examples), numbers[start:stop], nbytes))
        longest_found = max(longest_found, nbytes)
        start = stop

    found = (len(examples), longest_found)
    require(
        found == (count, longest),
        f"{path}: holds (examples, longest) = {found}, its header says {(count, longest)}",
    )
    return examples


def parse_example(path, index, row, nbytes):
    """The Example in a list of numbers, which begins with MARK and fills nbytes."""
    broken = InputError(f"{path}: example {index} is not as its lengths say: fetch it again")
    head = [MARK, nbytes, index]
    if 2 * len(row) != nbytes or len(row) < 6 or row[:3] != head or row[4] != ENDINGS:
        raise broken

    label = row[3]
    position = 5
    parts = []
    for _ in range(1 + ENDINGS):  # the context, then the endings
        if position >= len(row):
            raise broken
        length_of_part = row[position]
        part = row[position + 1 : position + 1 + length_of_part]
        if len(part) != length_of_part:
            raise broken
        parts.append(part)
        position += 1 + length_of_part
    if position != len(row):
        raise broken

    example = Example(parts[0], parts[1:], label)
    check_example(path, index, example)
    return example


# --------------------------------------------------------------------------------------------------
# 7. The command line


def prepare_own_text(args):
    """Write the tokens of the user's own text: (train_path, val_path)."""
    fraction = 0.1 if args.val_fraction is None else args.val_fraction
    require(
        0 < fraction < 1, f"--val_fraction is {fraction}, expected a number between 0 and 1"
    )
    text = read_text(args.input)
    if args.bytes:
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    else:
        tokens = encode_text(text, get_encoding())

    name = os.path.splitext(os.path.basename(args.input))[0]
    prefix = args.output_prefix or in_data(name)
    paths = f"{prefix}_train.bin", f"{prefix}_val.bin"
    n = int(fraction * len(tokens))
    refuse_other_tokens(paths[0], tokens[n:])
    refuse_other_tokens(paths[1], tokens[:n])
    write_split(paths, tokens, n)
    return paths


def refuse_other_tokens(path, tokens):
    """InputError if there is a token file at path which holds anything but these tokens."""
    if not os.path.exists(path):
        return
    try:
        same = np.array_equal(open_tokens(path), tokens)
    except InputError:
        same = False
    require(
        same,
        f"{path} is there and holds something else: choose another --output_prefix, or delete it",
    )


def parse_args(argv):
    """The command line's flags. Leaves with exit code 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", metavar="FILE", help="your own UTF-8 text, instead of Tiny Shakespeare")
    add("--val_fraction", type=float, metavar="X", help="the part that validates (0.1)")
    add(
        "--output_prefix",
        metavar="PREFIX",
        help="write PREFIX_train.bin and PREFIX_val.bin (default data/NAME for NAME.txt)",
    )
    add("--bytes", type=int, choices=(0, 1), metavar="X", help="1: the text's bytes are the tokens")
    add("--hellaswag", action="store_true", help="HellaSwag's questions instead of a text")
    args = parser.parse_args(argv)

    of_input = (args.val_fraction, args.output_prefix, args.bytes)
    if args.input is None and of_input != (None, None, None):
        parser.error(
            "--val_fraction, --output_prefix and --bytes need --input: Tiny Shakespeare is split "
            "as in llm.c"
        )
    if args.hellaswag and args.input is not None:
        parser.error("--hellaswag has questions of its own: leave out --input")
    return args


def main(argv=None):
    """The command line. Returns the exit code: 0, 1 after what its user can mend, 130 at Ctrl-C."""
    args = parse_args(argv)
    try:
        if args.hellaswag:
            path = prepare_hellaswag()
            print(f"{path}: {len(read_hellaswag(path)):,} examples")
            return 0

        if args.input is None:
            paths = prepare_tinyshakespeare()
            tokenizer_path = in_data("gpt2_tokenizer.bin")
            write_tokenizer(tokenizer_path, get_encoding())
            print(f"{tokenizer_path}: the bytes of every token")
        else:
            paths = prepare_own_text(args)

        for path in paths:
            print(f"{path}: {len(open_tokens(path)):,} tokens")
        return 0
    except KeyboardInterrupt:
        print_status("stopped: run it again to go on")
        return 130
    except (InputError, OSError) as error:
        print_status(f"error: {reason(error)}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
