"""
What must be ready before training. It lies in data/, and what is missing there is fetched, once:

    tiny_shakespeare.txt               the text, 1.1 MB
    tiny_shakespeare_{train,val}.bin   its tokens, in llm.c's format
    tiktoken/                          GPT-2's vocabulary, as tiktoken keeps it
    gpt2.safetensors, ...              OpenAI's weights, unless Hugging Face's cache has them

train_gpt2.py calls provide() where something is missing. The files are all that the two share.

    python prepro_tinyshakespeare.py                            Tiny Shakespeare in GPT-2's tokens
    python prepro_tinyshakespeare.py --input my.txt             data/my_train.bin, data/my_val.bin
    python prepro_tinyshakespeare.py --input my.txt --bytes 1   its bytes as tokens
    python prepro_tinyshakespeare.py --input my.txt --vocab_size 1024
                                       a vocabulary learned from it, data/my.tiktoken
"""

import argparse
import contextlib
import hashlib
import heapq
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from base64 import b64decode, b64encode
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

if sys.version_info < (3, 10):
    sys.exit(f"error: Python {sys.version.split()[0]} is too old: install Python 3.10 or newer")
if tuple(map(int, np.__version__.split(".")[:2])) < (2, 1):
    sys.exit(f'error: NumPy {np.__version__} is too old: pip install -U "numpy>=2.1"')

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
VAL_BYTES = 106_657  # llm.c's split: these are its 32,768 tokens for validation, 305,260 train

VOCABULARY = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # as in tiktoken
REVISIONS = {  # of openai-community/NAME on Hugging Face's hub
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SHA256 = {  # that of medium and large is in the hub's answer
    "input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
}

# --------------------------------------------------------------------------------------------------
# 1. What training needs


class InputError(ValueError):
    """One line that says what was found and the remedy. .cause: what was found, alone."""

    def __init__(self, message, cause=None):
        super().__init__(message)
        self.cause = cause or message


class FetchError(InputError):
    """Something can't be fetched: there is no network, the server refuses, or another file came."""


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def provide(what):
    """The path of something that training needs. It is fetched if it is not there.

        "tiny_shakespeare"           (train_path, val_path), two token files
        "vocabulary"                 the folder in which tiktoken finds GPT-2's vocabulary
        "gpt2", "gpt2-medium", ...   OpenAI's weights, a .safetensors file
        "embedded"                   (train_path, val_path, vocabulary_path): needs no network

    FetchError if it can't be fetched. InputError if it is none of these, if a package is missing, a
    file that is there is damaged, or the disk refuses.
    """
    try:
        if what == "tiny_shakespeare":
            return provide_tinyshakespeare()
        if what == "vocabulary":
            return provide_vocabulary()
        if what == "embedded":
            return provide_embedded()
        return provide_weights(what)
    except OSError as error:
        raise InputError(reason(error)) from None


def provide_tinyshakespeare():
    """Token files that are there stay as they are."""
    prefix = in_data("tiny_shakespeare")
    paths = f"{prefix}_train.bin", f"{prefix}_val.bin"
    if not all(map(os.path.exists, paths)):
        write_files(token_files(prefix, *cut(tiny_shakespeare(), VAL_BYTES), "gpt2"))
    return paths


def tiny_shakespeare():
    """The text. One that is there is used as it is."""
    path = in_data("tiny_shakespeare.txt")
    download(f"{SHAKESPEARE}input.txt", path, SHA256["input.txt"], "Tiny Shakespeare")
    if digest(path) != SHA256["input.txt"]:
        say(f"{path} is not the original, but is used: delete it to fetch the original")
    return read_text(path)


def provide_vocabulary():
    """A folder with two files, called by the SHA-1 of their addresses, as tiktoken looks for them.

    It is TIKTOKEN_CACHE_DIR or data/tiktoken, or else tiktoken's own cache, if they are there.
    """
    addresses = {name: VOCABULARY + name for name in ("vocab.bpe", "encoder.json")}
    files = {name: hashlib.sha1(url.encode()).hexdigest() for name, url in addresses.items()}
    ours = os.environ.get("TIKTOKEN_CACHE_DIR") or in_data("tiktoken")
    temporary = f"{tempfile.gettempdir()}/data-gym-cache"
    for folder in (ours, os.environ.get("DATA_GYM_CACHE_DIR") or temporary):
        if all(os.path.exists(f"{folder}/{file}") for file in files.values()):
            return folder
    for name, file in files.items():
        download(addresses[name], f"{ours}/{file}", SHA256[name], "GPT-2's vocabulary")
    return ours


def provide_weights(name):
    """data/NAME.safetensors, or Hugging Face's cache, or else fetched (from HF_ENDPOINT if set)."""
    require(name in REVISIONS, f"no weights are called {name!r}: choose one of {[*REVISIONS]}")
    path = in_data(f"{name}.safetensors")
    cached = None if os.path.exists(path) else in_hub_cache(name)
    if cached:
        say(f"{name}: using {cached}")
        return cached
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{hub}/openai-community/{name}/resolve/{REVISIONS[name]}/model.safetensors"
    return download(url, path, SHA256.get(name), f"the weights of {name}")


def in_hub_cache(name):
    """The path of these weights in the cache of Hugging Face's own programs; None if not there.

    snapshots/REVISION/model.safetensors is a link to ../../blobs/SHA256, or, on Windows and in
    copies, the file itself. Where we know no SHA-256, the revision must be ours.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    sha256 = SHA256.get(name)
    revision = "*" if sha256 else REVISIONS[name]
    for owner in ("openai-community--", ""):
        for path in hub.glob(f"models--{owner}{name}/snapshots/{revision}/model.safetensors"):
            blob = os.path.basename(os.path.realpath(path))
            if path.exists() and (sha256 in (None, blob) or digest(path) == sha256):
                return str(path)
    return None


def provide_embedded():
    """Tokens of a text that is at hand, in a vocabulary of 1,024 ids learned from it, in a second.

    It is Tiny Shakespeare, if that lies in data/, or else this project's main files. Of passages of
    1,000 bytes, and the rest of their last line, every tenth validates: so all kinds of them do.
    """
    here = Path(__file__).absolute().parent
    names = "train_gpt2.py", "test_gpt2.py", "prepro_tinyshakespeare.py", "README.md"
    paths = [here / name for name in names if (here / name).exists()]
    shakespeare = in_data("tiny_shakespeare.txt")
    if os.path.exists(shakespeare) and os.path.getsize(shakespeare) > 20_000:
        paths = [shakespeare]
    text = "".join(map(read_text, paths)).encode()
    passages = re.findall(rb"(?s:.{1000})[^\n]*\n?|(?s:.+)", text)
    validation = b"".join(passages[5::10]).decode()
    del passages[5::10]
    training = b"".join(passages)
    vocabulary = learn_vocabulary(training, 1024)
    files = token_files(in_data("first"), training.decode(), validation, vocabulary)
    write_files(files)
    return tuple(files)


def get_encoding():
    """tiktoken's "gpt2". InputError if tiktoken or the vocabulary is missing."""
    tiktoken = package("tiktoken")
    folder = os.environ["TIKTOKEN_CACHE_DIR"] = provide("vocabulary")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken has found another SHA-256, and could not fetch them anew
        message = f"{folder}: GPT-2's vocabulary is damaged ({reason(error)}): delete this folder"
        raise InputError(message) from None


def package(name):
    """Import a package that is needed only now. InputError with the remedy if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"the package {name} is missing: pip install {name}") from None


# --------------------------------------------------------------------------------------------------
# 2. Fetching, and what it needs
#
# While a file arrives it is called PATH.part and eight random letters: two runs at once do not
# write to the same file. A run that ends gives what came the name PATH.part, and the next one that
# needs the file renames that to a name of its own and goes on there.

ATTEMPTS = 8  # connections that one download may take, if the first of them brought anything at all
RETRY_WAIT = 2.0  # seconds between them
TIMEOUT = (10, 30)  # seconds to wait for a connection, and for the next bytes
CHUNK = 1 << 16  # bytes at a time: a connection that breaks loses less than that
WITHOUT_A_NETWORK = (
    "without a network, train by bytes: python prepro_tinyshakespeare.py --input my.txt --bytes 1, "
    "or python train_gpt2.py --model bytes"
)


def download(url, path, sha256=None, what=None):
    """Fetch url to path, unless it is there, and return path. what: its name in messages.

    FetchError if there is no network, the server refuses, or something else came. InputError if
    requests is missing. OSError if the disk refuses.
    """
    if os.path.exists(path):
        return path
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    what = what or os.path.basename(path)
    part = f"{path}.part"
    mine = f"{part}.{os.urandom(4).hex()}"
    with contextlib.suppress(OSError):  # there is none, or another run was faster
        os.rename(part, mine)
    try:
        with open(mine, "ab") as file:
            sha256 = fetch(url, file, sha256, what)
        found = digest(mine)
        if sha256 not in (None, found):
            os.remove(mine)
            raise FetchError(f"another file came, of SHA-256 {found:.12}, not {sha256:.12}")
        os.replace(mine, path)
        return path
    except FetchError as error:
        cause = f"can't fetch {what}: {error}"
        remedy = f"try again, or fetch {url} by hand and put it at {path}; {WITHOUT_A_NETWORK}"
        raise FetchError(f"{cause}: {remedy}", cause) from None
    finally:
        if os.path.exists(mine):
            os.replace(mine, part) if os.path.getsize(mine) else os.remove(mine)


def fetch(url, file, sha256, what):
    """Append to an open file what it lacks, with as many connections as that takes.

    Returns the SHA-256 that the whole should have, if it is known. FetchError if it can't be had.
    """
    requests = package("requests")
    begun = file.tell()  # by an earlier run
    for left in reversed(range(ATTEMPTS)):
        have = file.tell()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                for redirect in response.history:  # in which Hugging Face says what is to come
                    sha256 = sha256 or redirect.headers.get("X-Linked-Etag", "").strip('"') or None
                status = response.status_code
                if have and status == 416:  # nothing was missing
                    return sha256
                if status not in (200, 206):
                    raise FetchError(f"the server answered {status} {response.reason}")
                if "text/html" in response.headers.get("Content-Type", ""):
                    raise FetchError("a web page came (must you log in to this network?)")
                if status == 200:  # the whole file, whatever we asked for
                    file.seek(0)
                    file.truncate()
                size = file.tell() + int(response.headers.get("Content-Length", 0))
                chunks = response.iter_content(CHUNK)
                for chunk in counted(chunks, f"fetching {what}", file.tell(), size):
                    file.write(chunk)
            if file.tell() < size:
                raise requests.ConnectionError("it ended early")
            file.flush()
            os.fsync(file.fileno())
            return sha256
        except requests.RequestException as error:
            hopeless = file.tell() <= begun  # nothing came, so waiting won't bring a network
            trouble = "no network" if hopeless else "the connection broke"
            trouble += f" ({reason(error)})"
            if isinstance(error, requests.exceptions.SSLError):
                trouble += "; name the certificate of a proxy in REQUESTS_CA_BUNDLE"
            if isinstance(error, requests.exceptions.InvalidSchema):
                trouble += '; a socks proxy needs pip install "requests[socks]"'
            if hopeless or left == 0:
                raise FetchError(trouble) from None
            time.sleep(RETRY_WAIT)


def in_data(name):
    """data/NAME; if there is no data/ in this folder, the one beside this file, if that exists."""
    beside = Path(__file__).absolute().parent / "data"
    folder = beside if beside.is_dir() and not os.path.isdir("data") else "data"
    return f"{folder}/{name}"


def write_files(files):
    """Write {path: bytes}, but for those that are the same already. No file is ever half a file."""
    for path, data in files.items():
        if os.path.exists(path) and Path(path).read_bytes() == data:
            continue
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        beside = f"{path}.{os.urandom(4).hex()}.tmp"
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            if os.path.exists(beside):
                os.remove(beside)


def digest(path):
    """A file's SHA-256, in hex."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            sha256.update(piece)
    return sha256.hexdigest()


def reason(error):
    """What lies at the bottom of an exception, in one line: requests wraps up to five of them."""
    for inside in (error.__cause__, getattr(error, "reason", None), *error.args):
        if isinstance(inside, Exception):
            return reason(inside)
    if isinstance(error, FileExistsError):
        return f"{error.filename} is a file, or a link to something that is gone: move it away"
    return re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())) or type(error).__name__


def say(line, end="\n"):
    """Print to stderr, since a program may be reading stdout. If nobody listens, go on."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(line, end=end, file=sys.stderr, flush=True)


def counted(pieces, doing, done, total):
    """The same pieces, while a line of stderr, if that is a terminal, counts from done to total.

    A piece counts as its length, or as one if it has none. total: 0 if it is not known.
    """
    shown = start = time.monotonic()
    terminal = sys.stderr is not None and sys.stderr.isatty()
    try:
        for piece in pieces:
            yield piece
            done += len(piece) if hasattr(piece, "__len__") else 1
            now = time.monotonic()
            if terminal and now > shown + 0.5:
                shown = now
                say(f"\r{doing}: {done:,} of {total:,}", end="")
    finally:
        if shown > start:
            say("")


# --------------------------------------------------------------------------------------------------
# 3. Tokens
#
# A language model sees no letters but ids, each of which stands for a few bytes. GPT-2 has the 256
# single bytes, 50,000 frequent strings of them, and <|endoftext|>, with which a text begins.
#
# Several texts are one string here, with "\0" between them, which no text contains.

END_OF_TEXT = "<|endoftext|>"


def read_text(path, encoding="utf-8"):
    """A text, without a byte order mark and Windows's "\\r\\n". InputError if it is none.

    encoding: the name that Python has for its encoding.
    """
    require(not os.path.isdir(path), f"{path} is a folder: name the files in it")
    advice = "you must know its encoding, and name it: --encoding utf-16, or cp1252, gbk, shift_jis"
    try:
        text = Path(path).read_bytes().decode(encoding)
        text.encode()  # some decoders give surrogates
    except (LookupError, UnicodeError) as error:  # which tells the byte and its position
        raise InputError(f"{path} is not {encoding}: {error}: {advice}") from None
    place = text.find("\0")
    require(place < 0, f"{path}: there is a NUL at position {place}: is it a text? If so, {advice}")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    require(text.strip(), f"{path} is empty, expected a text")
    return text


def cut(text, n):
    """(training, validation): the first n bytes validate, or fewer: no character is cut in two.

    A cut by bytes is the same for every vocabulary.
    """
    head = text.encode()[:n].decode(errors="ignore")
    return text[len(head) :].strip("\0"), head.strip("\0")


def encode(text, encoding):
    """Ids, uint16: <|endoftext|> and then the first text, <|endoftext|> and the second, and so on.

    Where a text itself says <|endoftext|>, these are characters like any others.
    """
    tokens = array("H")
    for part in counted(text.split("\0"), "tokenising", 0, len(text)):
        tokens.append(encoding.eot_token)
        tokens.extend(encoding.encode_ordinary(part))
    return np.frombuffer(tokens, np.uint16)


def token_files(prefix, training, validation, vocabulary):
    """{path: bytes} of PREFIX_train.bin, PREFIX_val.bin and, if it is learned, PREFIX.tiktoken.

    vocabulary: "bytes", "gpt2", or a list of bytes by id. For GPT-2, as in llm.c, a text begins
    anew after each blank line. In a learned one <|endoftext|> stands between texts only.

        "To be.\\n\\nOr not."  ->  <|endoftext|> To be.\\n\\n <|endoftext|> Or not.

    A token file is llm.c's, which leaves vocab_size and crc32, that of PREFIX.tiktoken, at 0:

        256 int32: 20240520, version 1, number of tokens, vocab_size, crc32, zeros
        the tokens, uint16
    """
    texts = training, validation
    crc32, more = 0, {}
    if vocabulary == "bytes":
        vocab_size = 256
        ids = [np.frombuffer(text.replace("\0", "\n").encode(), np.uint8) for text in texts]
    elif vocabulary == "gpt2":
        vocab_size = 50257
        encoding = get_encoding()
        ids = [encode(text.replace("\n\n", "\n\n\0"), encoding) for text in texts]
        ids[0] = ids[0][1:]  # the training text goes on where that for validation was cut off
    else:
        vocab_size = len(vocabulary) + 1
        more = {f"{prefix}.tiktoken": vocabulary_file(vocabulary)}
        crc32 = zlib.crc32(vocabulary_file(vocabulary))
        ids = [encode(text, encoding_of(vocabulary))[1:] for text in texts]

    files = {}
    for part, tokens in zip(("train", "val"), ids, strict=True):
        header = np.array([20240520, 1, len(tokens), vocab_size, crc32, *[0] * 251], "<u4")
        files[f"{prefix}_{part}.bin"] = header.tobytes() + tokens.astype("<u2").tobytes()
    return files | more


# --------------------------------------------------------------------------------------------------
# 4. A vocabulary of one's own
#
# Byte pair encoding (Sennrich, Haddow and Birch, 2016, https://arxiv.org/abs/1508.07909) begins
# with the 256 bytes and makes the most frequent pair of neighbours a new token, again and again.
# Their example has the words low, lower, newest, widest, which occur 5, 2, 6, 3 times:
#
#     l o w, l o w e r, n e w e s t, w i d e s t
#         e s 9, s t 9, w e 8, l o 7, o w 7, ...: e is before s, so    256 = e s
#     l o w, l o w e r, n e w es t, w i d es t
#         es t 9, l o 7, o w 7, n e 6, ...:                            257 = es t
#     l o w, l o w e r, n e w est, w i d est
#         l o 7, o w 7, n e 6, e w 6, w est 6, ...: l is before o, so  258 = l o
#
# In a text the words are what GPT-2's pattern cuts out of it, so no token spans two words. A model
# with such a vocabulary has few rows in wte, and need not learn to spell.

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def learn_vocabulary(text, vocab_size):
    """The bytes of each token, a list by id, learned from a text, which is UTF-8 bytes.

    Ids 0 to 255 are the bytes, id 256 is the first merge, and <|endoftext|>, which is not in the
    list, will be the last of the vocab_size ids; there are fewer if the text has no more pairs. Of
    equally frequent pairs that with the smallest (left id, right id) is merged; "aaa" has two of
    them, and becomes aa a.
    """
    # A word's ids are kept as the characters of these numbers, so str.replace merges a pair.
    times = Counter(m.group() for m in package("regex").finditer(PATTERN, text.decode()))
    ids = {word: "".join(map(chr, word.encode())) for word in times}
    frequency = Counter()  # of a pair, a str of two such characters
    change = Counter()  # of these frequencies, by the last merge
    where = defaultdict(set)  # the words in which a pair occurs, or did
    heap = []  # of (-frequency, pair), the greatest frequency first; some are out of date

    def count(word, sign):
        """Add sign * the frequency of a word to that of each of its pairs."""
        for pair in map("".join, itertools.pairwise(ids[word])):
            change[pair] += sign * times[word]
            where[pair].add(word)

    for word in ids:
        count(word, 1)
    vocabulary = list(BYTES)
    for new in counted(range(256, vocab_size - 1), "learning tokens", 256, vocab_size - 1):
        for pair, difference in change.items():
            if difference:
                frequency[pair] += difference
                heapq.heappush(heap, (-frequency[pair], pair))
        change.clear()
        while heap and heap[0][0] != -frequency[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or heap[0][0] == 0:
            break

        pair = heap[0][1]
        left, right = map(ord, pair)
        vocabulary.append(vocabulary[left] + vocabulary[right])
        for word in where.pop(pair):
            count(word, -1)
            ids[word] = ids[word].replace(pair, chr(new))
            count(word, 1)
    return vocabulary


def encoding_of(vocabulary):
    """The tiktoken.Encoding of a vocabulary, bytes by id, with <|endoftext|> as its last id."""
    return package("tiktoken").Encoding(
        "own",
        pat_str=PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(vocabulary)},
        special_tokens={END_OF_TEXT: len(vocabulary)},
    )


def vocabulary_file(vocabulary):
    """The bytes of tiktoken's file of a vocabulary: a line for each id, base64 and the id."""
    return b"".join(b"%s %d\n" % (b64encode(token), i) for i, token in enumerate(vocabulary))


def read_vocabulary(path):
    """The bytes of each token, a list by id, from a .tiktoken file or the folder of a saved model.

    InputError unless they are the 256 bytes and, in their order, merges of two earlier tokens.
    """
    try:
        if os.path.isdir(path):
            other = Path(path, "tokenizer.json")
            found = json.loads((other if other.exists() else Path(path, "vocab.json")).read_bytes())
            found = found["model"]["vocab"] if other.exists() else found
            unspelled = {letter: i for i, letter in LETTERS.items()}
            ids = {name.translate(unspelled).encode("latin1"): i for name, i in found.items()}
            require(ids.pop(END_OF_TEXT.encode()) == len(ids), f"{END_OF_TEXT} is not the last")
        else:
            lines = Path(path).read_bytes().splitlines()
            ids = {b64decode(token, validate=True): int(i) for token, i in map(bytes.split, lines)}
            require(len(ids) == len(lines), "a token is there twice")
        vocabulary = sorted(ids, key=ids.get)
        in_order = [ids[token] for token in vocabulary] == list(range(len(ids)))
        require(in_order and len(ids) < 65536, "expected the ids from 0 on, up to 65535")
        merges_of(vocabulary)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no vocabulary: {error}") from None
    return vocabulary


# Hugging Face keeps a vocabulary in two files: vocab.json has the ids, merges.txt the merges in
# their order. They spell a byte as the character of its number, or, if that can't be seen, as one
# of the characters from 256 on. Of GPT-2 they are the files that tiktoken keeps.

UNSEEN = [i for i in range(256) if not chr(i).isprintable() or chr(i) == " "]
LETTERS = {i: 256 + n for n, i in enumerate(UNSEEN)}
BYTES = [bytes([i]) for i in range(256)]


def spelled(token):
    """A token's bytes as Hugging Face's files spell them, a str."""
    return token.decode("latin1").translate(LETTERS)


def merges_of(tokens):
    """The lines of merges.txt for a vocabulary without its <|endoftext|>: a list of str.

    A token merges the two parts that all earlier merges, made in their order, leave of it.
    InputError if that is not so, or if the first 256 tokens are not the bytes.
    """
    require(sorted(tokens[:256]) == BYTES, "a vocabulary's first 256 tokens must be the bytes")
    ranks = {token: i for i, token in enumerate(tokens[:256])}
    lines = []
    for token in tokens[256:]:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = enumerate(map(b"".join, itertools.pairwise(parts)))
            rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in pairs)
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        right = len(parts) == 2 and token not in ranks
        require(right, f"a vocabulary's token {token} does not merge two others")
        lines.append(f"{spelled(parts[0])} {spelled(parts[1])}")
        ranks[token] = len(ranks)
    return lines


def huggingface_files(vocab_size, vocabulary):
    """Hugging Face's two files: {name: bytes}. Nothing if the vocabulary is not at hand.

    vocabulary: bytes by id, with <|endoftext|> as the last; None is that of bytes, or GPT-2's
    """
    if vocab_size == 256:
        vocabulary = [*BYTES, END_OF_TEXT.encode()]  # transformers needs one, and no text has it
    if vocabulary:
        ids = {spelled(token): i for i, token in enumerate(vocabulary)}
        lines = ["#version: 0.2", *merges_of(vocabulary[:-1]), ""]
        return {"vocab.json": json.dumps(ids).encode(), "merges.txt": "\n".join(lines).encode()}
    files = {}
    if vocabulary is None and 50257 <= vocab_size <= 50304:
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or in_data("tiktoken")
        for name, source in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
            cached = hashlib.sha1((VOCABULARY + source).encode()).hexdigest()
            with contextlib.suppress(OSError):
                files[name] = Path(folder, cached).read_bytes()
    return files


# --------------------------------------------------------------------------------------------------
# 5. The command line


def parse_args(argv):
    """The command line's flags. Leaves with exit code 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    switch = {"type": int, "choices": (0, 1), "metavar": "X", "default": 0}
    add("--input", nargs="+", metavar="FILE", help="your own texts, instead of Tiny Shakespeare")
    add("--encoding", default="utf-8", metavar="NAME", help="their encoding (utf-8): gbk, cp1252")
    add("--val_fraction", type=float, default=0.1, metavar="X", help="this part validates (0.1)")
    add("--output_prefix", metavar="PREFIX", help="write PREFIX_train.bin and PREFIX_val.bin")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--bytes", **switch, help="1: the text's bytes are the tokens")
    which.add_argument("--vocab_size", type=int, metavar="V", help="learn V tokens from the text")
    which.add_argument("--vocabulary", metavar="PATH", help="take a .tiktoken file's or a model's")
    add("--endoftext", **switch, help=f"1: {END_OF_TEXT} in the text is that token")
    add("--replace", **switch, help="1: replace token files that hold something else")
    args = parser.parse_args(argv)

    own = args.bytes or args.vocab_size or args.vocabulary
    if argv and not (args.input or own) or not args.input and args.val_fraction != 0.1:
        parser.error("this flag needs --input: Tiny Shakespeare is prepared as in llm.c")
    if args.bytes and args.endoftext:
        parser.error(f"--endoftext 1 needs a vocabulary: bytes have no {END_OF_TEXT}")
    if args.vocab_size is not None and not 258 <= args.vocab_size <= 50256:
        parser.error(f"--vocab_size {args.vocab_size} is not between 258 and 50256")
    if not 0 < args.val_fraction < 1:
        parser.error(f"--val_fraction {args.val_fraction} is not between 0 and 1")
    return args


def own_files(args):
    """{path: bytes}, as of token_files, of what the flags ask for."""
    paths = list(map(os.path.expanduser, args.input or []))
    texts = [read_text(path, args.encoding) for path in paths] or [tiny_shakespeare()]
    text = "\0".join(texts)
    if args.endoftext:
        text = text.replace(END_OF_TEXT, "\0")
    elif END_OF_TEXT in text and not args.bytes:
        say(f"{END_OF_TEXT} in the text is characters here: --endoftext 1 makes it the token")

    n = int(args.val_fraction * len(text.encode())) if paths else VAL_BYTES
    training, validation = cut(text, n)
    found = f"{len(validation)} characters validate, {len(training)} train"
    require(training and validation, f"{found}: use a longer text or another --val_fraction")

    vocabulary, kind = "gpt2", ""
    if args.bytes:
        vocabulary, kind = "bytes", "_bytes"
    if args.vocabulary:
        vocabulary, kind = read_vocabulary(os.path.expanduser(args.vocabulary)), "_own"
    if args.vocab_size:
        learned_from = training.replace("\0", "\n").encode()
        vocabulary, kind = learn_vocabulary(learned_from, args.vocab_size), f"_{args.vocab_size}"
        if len(vocabulary) + 1 < args.vocab_size:
            say(f"the text has pairs for a --vocab_size of {len(vocabulary) + 1} only")
    name = Path(paths[0]).stem if paths else f"tiny_shakespeare{kind}"
    prefix = args.output_prefix or in_data(name)
    return token_files(os.path.expanduser(prefix), training, validation, vocabulary)


def quoted(words):
    """A command as its user can paste it into his shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def main(argv=None):
    """The command line. Returns the exit code: 0, 1 after what its user can mend, 130 at Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(AttributeError):  # a closed stdout is None
        sys.stdout.reconfigure(errors="backslashreplace")  # it may lack a letter of a file's name
    args = parse_args(argv)
    try:
        files = own_files(args)
        for path, data in files.items():
            same = not os.path.exists(path) or Path(path).read_bytes() == data
            again = quoted(["python", sys.argv[0], *argv, "--replace", "1"])
            message = f"{path} is there and holds something else: choose another --output_prefix, "
            require(same or args.replace or not argv, f"{message}or replace it: {again}")
        write_files(files)
        train_path, val_path, *own = files
        for path in (train_path, val_path):
            print(f"{path}: {(len(files[path]) - 1024) // 2:,} tokens")
        model = "bytes" if args.bytes else "d2" if own else "gpt2"
        trainer = os.path.join(os.path.dirname(sys.argv[0]), "train_gpt2.py")
        flags = ["--model", model, "--input_bin", train_path, "--input_val_bin", val_path]
        print(f"train on it: {quoted(['python', trainer, *flags])}")
        return 0
    except KeyboardInterrupt:
        say("stopped: run it again to go on")
        return 130
    except (InputError, OSError) as error:
        say(f"error: {error if isinstance(error, InputError) else reason(error)}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
