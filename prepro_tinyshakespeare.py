"""
What must be ready before training. It lies in data/, and what is missing there is fetched, once:

    tiny_shakespeare.txt               the text, 1.1 MB
    tiny_shakespeare_{train,val}.bin   its tokens, in llm.c's format
    tiktoken/                          GPT-2's vocabulary, as tiktoken keeps it
    gpt2.safetensors, ...              OpenAI's weights, unless Hugging Face's cache has them

While a file arrives, its name ends in .part, and a .part that an earlier run left is continued.
train_gpt2.py calls provide() where something is missing. The files are all that the two share.
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import os
import re
import shlex
import sys
import time
from array import array
from pathlib import Path

import numpy as np

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_SIZE = 1_115_394
VAL_TOKENS = 32_768  # llm.c's split: the first 32 * 1024 tokens validate, the other 305,260 train

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

# --------------------------------------------------------------------------------------------------
# 1. What training needs


class InputError(ValueError):
    """One line that says what was found and the remedy. .cause: what was found, alone."""

    def __init__(self, message, cause=None):
        super().__init__(message)
        self.cause = cause or message


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def provide(what):
    """The path of something that training needs. It is fetched if it is not there.

        "tiny_shakespeare"           (train_path, val_path), two token files
        "vocabulary"                 the folder in which tiktoken finds GPT-2's vocabulary
        "gpt2", "gpt2-medium", ...   OpenAI's weights, a .safetensors file

    InputError if it is none of these, can't be fetched, or can't be written.
    """
    try:
        if what == "tiny_shakespeare":
            return provide_tinyshakespeare()
        if what == "vocabulary":
            return provide_vocabulary()
        return provide_weights(what)
    except OSError as error:
        raise InputError(reason(error)) from None


def provide_tinyshakespeare():
    """Token files that are whole stay as they are, and a text that is there is used as it is."""
    text = in_data("tiny_shakespeare.txt")
    paths = in_data("tiny_shakespeare_train.bin"), in_data("tiny_shakespeare_val.bin")
    whole = lambda: all(read_tokens(path) is not None for path in paths)
    if whole():
        return paths

    if not os.path.exists(text):
        download(SHAKESPEARE, text, SHAKESPEARE_SHA256, SHAKESPEARE_SIZE, "Tiny Shakespeare")
    elif digest(text) != SHAKESPEARE_SHA256:
        say(f"{text} is not the original, but is used: delete it to fetch the original")

    encoding = get_encoding()
    with alone(paths[0], f"writing {paths[0]}"):
        if not whole():
            tokens = encode_text(read_text(text), encoding)
            write_tokens(paths[0], tokens[VAL_TOKENS:], encoding.n_vocab)
            write_tokens(paths[1], tokens[:VAL_TOKENS], encoding.n_vocab)
    return paths


def provide_vocabulary():
    """Two files, in TIKTOKEN_CACHE_DIR or data/tiktoken, under the SHA-1 of their addresses.

    tiktoken's own choice is a temporary folder, which is gone after a reboot.
    """
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or in_data("tiktoken")
    for name, sha256 in VOCABULARY_SHA256.items():
        url = VOCABULARY + name
        path = f"{folder}/{hashlib.sha1(url.encode()).hexdigest()}"
        if os.path.exists(path) and digest(path) != sha256:
            say(f"{path} is damaged: fetching {name} again")
            os.remove(path)
        download(url, path, sha256, what="GPT-2's vocabulary")
    return folder


def provide_weights(name):
    """data/NAME.safetensors, or Hugging Face's cache, or else fetched (from HF_ENDPOINT if set)."""
    require(name in WEIGHTS, f"no weights are called {name!r}: choose one of {', '.join(WEIGHTS)}")
    path = in_data(f"{name}.safetensors")
    cached = in_hub_cache(name)
    if cached and not os.path.exists(path):
        say(f"{name}: using {cached}")
        return cached

    revision, sha256, size = WEIGHTS[name]
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    folder = f"{hub.rstrip('/')}/openai-community/{name}/resolve/{revision}"
    return download(f"{folder}/model.safetensors", path, sha256, size, f"the weights of {name}")


def in_hub_cache(name):
    """The path of these weights in the cache of Hugging Face's own programs; None if not there.

    snapshots/REVISION/model.safetensors is a link to ../../blobs/SHA256, which is always whole.
    """
    pinned, sha256, size = WEIGHTS[name]
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    hub = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{home}/hub"))

    for folder in (f"models--openai-community--{name}", f"models--{name}"):
        for path in sorted(hub.glob(f"{folder}/snapshots/*/model.safetensors")):
            blob = Path(os.path.realpath(path))
            by_revision = path.parent.name == pinned and re.fullmatch("[0-9a-f]{64}", blob.name)
            right_name = blob.name == sha256 if sha256 else by_revision
            if right_name and blob.is_file() and size in (None, blob.stat().st_size):
                return str(path)
    return None


def get_encoding():
    """tiktoken's "gpt2". InputError if tiktoken or the vocabulary is missing."""
    tiktoken = package("tiktoken")
    os.environ["TIKTOKEN_CACHE_DIR"] = provide("vocabulary")
    return tiktoken.get_encoding("gpt2")


def package(name):
    """Import a package that is needed only now. InputError with the remedy if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"the package {name} is missing: pip install {name}") from None


# --------------------------------------------------------------------------------------------------
# 2. Downloading, and what it needs

ATTEMPTS = 8  # connections that one download may take, if the first of them brought anything at all
RETRY_WAIT = 2.0  # seconds between them
TIMEOUT = (10, 30)  # seconds to wait for a connection, and for the next bytes
CHUNK = 1 << 16  # bytes at a time: a connection that breaks loses less than that


def download(url, path, sha256=None, size=None, what=None):
    """Fetch url to path, unless it is there, and return path. sha256, size: what is known of it.

    what: its name in messages. If another process is fetching it, wait for that. InputError if
    there is no network, a refusal, a web page or another file instead of this one, or no room.
    """
    if os.path.exists(path):
        n = length(path)
        require(size in (None, n), f"{path} has {n} bytes, expected {size}: delete it")
        return path

    what = what or os.path.basename(path)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with alone(path, f"fetching {what}"):
            if not os.path.exists(path):  # another process may just have brought it
                fetch(url, path, sha256, size, what)
    except (InputError, OSError) as error:
        cause = f"can't fetch {what}: {reason(error)}"
        message = f"{cause}: try again, or fetch {url} by hand and put it at {path}; {OFFLINE}"
        raise InputError(message, cause) from None
    return path


@contextlib.contextmanager
def alone(path, doing):
    """One process at a time does what stands in this block. Another one waits, and says so.

    The system locks the file PATH.lock, and unlocks it when its process ends, however that ends.
    """
    for attempt in itertools.count():
        file = open(f"{path}.lock", "wb")
        if take_lock(file):
            break
        file.close()
        if attempt == 0:
            say(f"another process is {doing}: waiting for it")
        time.sleep(0.2)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file: there it stays
            os.remove(file.name)
        file.close()


def take_lock(file):
    """Whether an open file is now locked for us alone, and still the one of its name."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samefile(file.name, file.fileno())
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
    except OSError:  # the file system has no locks: Lustre, unless it is mounted with "flock"
        return True


def fetch(url, path, sha256, size, what):
    """download, with as many connections as it takes. InputError or OSError if that fails."""
    requests = package("requests")
    part = f"{path}.part"
    begun = length(part)  # by an earlier run
    for attempt in range(1, ATTEMPTS + 1):
        try:
            want_sha256, want_size = receive(requests, url, part, sha256, size, what)
            break
        except requests.RequestException as error:
            came = length(part) > begun  # if nothing came, waiting won't bring a network
            trouble = "the connection broke" if came else "no network"
            require(came and attempt < ATTEMPTS, f"{trouble} ({reason(error)})")
            time.sleep(RETRY_WAIT)

    found = digest(part)
    if want_sha256 in (None, found) and want_size in (None, length(part)):
        os.replace(part, path)
        return
    os.remove(part)
    raise InputError(f"another file came (SHA-256 {found:.12}, expected {want_sha256!s:.12})")


def receive(requests, url, part, sha256, size, what):
    """One connection: append to the file `part` what it lacks. Returns (sha256, size), if known."""
    have = length(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        for redirect in response.history:  # in which Hugging Face says what is to come
            if "X-Linked-Etag" in redirect.headers:
                sha256 = sha256 or redirect.headers["X-Linked-Etag"].strip('"')
                size = size or int(redirect.headers["X-Linked-Size"])
        if have and sha256 is None:  # nothing would notice that two halves do not belong together
            os.remove(part)
            return receive(requests, url, part, sha256, size, what)

        status = response.status_code
        if have and status == 416:  # nothing was missing
            return sha256, size
        require(status in (200, 206), f"the server answered {status} {response.reason}")
        web_page = "text/html" in response.headers.get("Content-Type", "")
        require(not web_page, "a web page came (does this network want you to log in?)")

        have = have if status == 206 else 0  # 200 brings the whole file, whatever we asked for
        if "Content-Length" in response.headers:
            size = size or have + int(response.headers["Content-Length"])
        with open(part, "ab" if have else "wb") as file:
            for chunk in watched(response.iter_content(CHUNK), f"fetching {what}", have, size):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    if size is not None and length(part) < size:
        raise requests.ConnectionError("it ended early")
    return sha256, size


def in_data(name):
    """data/NAME; if there is no data/ in this folder, the one beside this file, if that exists."""
    beside = Path(__file__).absolute().parent / "data"
    folder = beside if beside.is_dir() and not os.path.isdir("data") else "data"
    return f"{folder}/{name}"


def length(path):
    """The bytes in a file; 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def digest(path):
    """A file's SHA-256, in hex."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        pieces = iter(lambda: file.read(1 << 20), b"")
        for piece in watched(pieces, f"checking {path}", 0, length(path)):
            sha256.update(piece)
    return sha256.hexdigest()


def reason(error):
    """What lies at the bottom of an exception, in one line: requests wraps up to five of them."""
    for inside in (error.__cause__, getattr(error, "reason", None), *error.args):
        if isinstance(inside, Exception):
            return reason(inside)
    return re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())) or type(error).__name__


def say(line, end="\n"):
    """Print to stderr, since a program may be reading stdout. If nobody listens, go on."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(line, end=end, file=sys.stderr, flush=True)


def watched(pieces, what, done, total):
    """The same pieces, while stderr, if a terminal, says how far we are. done, total: bytes."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    start = shown = time.monotonic()
    first = done
    try:
        for piece in pieces:
            yield piece
            done += len(piece)
            now = time.monotonic()
            if terminal and now > shown + 1:
                shown = now
                rate = max(1.0, (done - first) / (now - start))
                left = f", {done / total:.0%}, {(total - done) / rate:.0f} s left" if total else ""
                say(f"\r{what}: {done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s{left}   ", end="")
    finally:
        if shown > start:
            say("")


# --------------------------------------------------------------------------------------------------
# 3. Tokens
#
# A language model sees no letters but ids, each of which stands for a few bytes. GPT-2 has the 256
# single bytes, 50,000 frequent strings of them, and <|endoftext|>, with which a text begins.

TOKENS = 20240520
END_OF_TEXT = "<|endoftext|>"

FIRST_BYTES = {  # of a text in which a letter takes two
    "UTF-16": rb"\xff\xfe|\xfe\xff",  # a byte order mark
    "UTF-16LE": rb"([^\0]\0){2}",
    "UTF-16BE": rb"(\0[^\0]){2}",
}


def read_text(path):
    """A UTF-8 text, without Windows's byte order mark and "\\r\\n". InputError if it is none."""
    data = Path(path).read_bytes()
    encoding = next((name for name in FIRST_BYTES if re.match(FIRST_BYTES[name], data)), None)
    require(encoding or b"\0" not in data, f"{path}: has NUL characters: is it a text?")
    place = ""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f" (byte 0x{data[error.start]:02x} at position {error.start})"
        encoding = encoding or "LATIN1"
    if encoding:
        command = shlex.join(["iconv", "-f", encoding, "-t", "UTF-8", path])
        raise InputError(f"{path}: is not UTF-8{place}: save it so: {command} > utf8.txt")

    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    require(text.strip(), f"{path}: is empty, expected a UTF-8 text")
    return text


def encode_text(text, encoding, endoftext=False):
    """text as token ids, uint16. Each section, up to a blank line, begins with <|endoftext|>.

        "To be.\\n\\nOr not."  ->  <|endoftext|> To be.\\n\\n <|endoftext|> Or not.

    Where the text itself says <|endoftext|>, these are characters like any others, unless endoftext
    is true. encoding: any tiktoken.Encoding with an eot_token and at most 65536 ids.
    """
    n = encoding.n_vocab
    require(n <= 1 << 16, f"{encoding.name} has {n} ids, expected <= 65536")
    *sections, rest = text.split("\n\n")
    sections = [section + "\n\n" for section in sections] + [rest]

    tokens = array("H")
    for section in watched(sections, "tokenising", 0, len(text)):
        marked = section.removeprefix(END_OF_TEXT).split(END_OF_TEXT)
        for part in marked if endoftext else [section]:
            tokens.append(encoding.eot_token)
            try:
                tokens.extend(encoding.encode_ordinary(part))
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # in Rust, at a million spaces
                    raise
                raise InputError("tiktoken gives up on this text: use --bytes 1") from None
    return np.frombuffer(tokens, np.uint16)


def write_tokens(path, tokens, vocab_size=0):
    """llm.c's token file. InputError unless tokens are ids of that vocabulary, at least one.

        256 int32: 20240520, version 1, number of tokens, vocab_size (0 in llm.c), zeros
        the tokens, uint16
    """
    tokens = np.asarray(tokens)
    highest = vocab_size - 1 if vocab_size else 65535
    right = tokens.dtype.kind in "iu" and tokens.ndim == 1 and 0 < len(tokens) < 1 << 31
    right = right and 0 <= tokens.min() and tokens.max() <= highest
    require(right, f"{path}: expected ids from 0 to {highest}, found {tokens.dtype} {tokens.shape}")
    header = np.array([TOKENS, 1, len(tokens), vocab_size, *[0] * 252], "<i4")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:  # so that PATH is never half a file
        file.write(header)
        file.write(tokens.astype("<u2"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def read_tokens(path):
    """The tokens of a file, mapped into memory: uint16. None if it is no whole token file."""
    if not os.path.isfile(path) or os.path.getsize(path) <= 1024:
        return None
    magic, version, count = np.fromfile(path, "<i4", 3).tolist()
    if (magic, version, 1024 + 2 * count) != (TOKENS, 1, os.path.getsize(path)):
        return None
    return np.memmap(path, "<u2", "r", 1024)


# --------------------------------------------------------------------------------------------------
# 4. The command line

EXAMPLES = """\
python prepro_tinyshakespeare.py                              Tiny Shakespeare, in GPT-2's tokens
python prepro_tinyshakespeare.py --input my.txt               data/my_train.bin and data/my_val.bin
python prepro_tinyshakespeare.py --input my.txt --bytes 1     its bytes as tokens: needs no network
"""


def parse_args(argv):
    """The command line's flags. Leaves with exit code 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        description="Make ready what training needs: a text's tokens, in data/.",
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    switch = {"type": int, "choices": (0, 1), "metavar": "X"}
    add("--input", metavar="FILE", help="your own UTF-8 text, instead of Tiny Shakespeare")
    add("--val_fraction", type=float, default=0.1, metavar="X", help="this part validates (0.1)")
    add("--output_prefix", metavar="PREFIX", help="write PREFIX_train.bin and PREFIX_val.bin")
    add("--bytes", **switch, help="1: the text's bytes are the tokens")
    add("--endoftext", **switch, help=f"1: {END_OF_TEXT} in the text is that token")
    add("--replace", **switch, help="1: replace token files that hold something else")
    args = parser.parse_args(argv)

    if args.input is None and argv:
        parser.error("this flag needs --input: Tiny Shakespeare is split as in llm.c")
    if args.bytes and args.endoftext:
        parser.error(f"--endoftext 1 needs GPT-2's vocabulary: bytes have no {END_OF_TEXT}")
    return args


def write_own_text(args, argv):
    """Write the tokens of the user's own text: [train_path, val_path]. argv: what he typed."""
    require(0 < args.val_fraction < 1, f"--val_fraction {args.val_fraction} is not between 0 and 1")
    text = read_text(args.input)
    if END_OF_TEXT in text and not args.bytes and not args.endoftext:
        say(f"{args.input}: {END_OF_TEXT} is characters here: --endoftext 1 makes it the token")
    if args.bytes:
        tokens = np.frombuffer(text.encode(), np.uint8)
    else:
        encoding = get_encoding()
        tokens = encode_text(text, encoding, args.endoftext)

    n = int(args.val_fraction * len(tokens))
    require(
        0 < n < len(tokens),
        f"{n} of {len(tokens)} tokens for validation: use a longer text or another --val_fraction",
    )
    prefix = args.output_prefix or in_data(Path(args.input).stem)
    parts = {f"{prefix}_train.bin": tokens[n:], f"{prefix}_val.bin": tokens[:n]}
    for path, part in parts.items():
        same = not os.path.exists(path) or np.array_equal(read_tokens(path), part)
        require(
            same or args.replace,
            f"{path} is there and holds something else: choose another --output_prefix, or replace "
            f"it: {shlex.join(['python', sys.argv[0], *argv, '--replace', '1'])}",
        )
    for path, part in parts.items():
        write_tokens(path, part, 256 if args.bytes else encoding.n_vocab)
    return list(parts)


def main(argv=None):
    """The command line. Returns the exit code: 0, 1 after what its user can mend, 130 at Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(AttributeError):  # a closed stdout is None
        sys.stdout.reconfigure(errors="backslashreplace")  # it may lack a letter of a file's name
    args = parse_args(argv)
    try:
        paths = provide("tiny_shakespeare") if args.input is None else write_own_text(args, argv)
        for path in paths:
            print(f"{path}: {len(read_tokens(path)):,} tokens")
        return 0
    except KeyboardInterrupt:
        say("stopped: run it again to go on")
        return 130
    except (InputError, OSError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
