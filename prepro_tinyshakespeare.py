"""
What must be ready before training. It lies in data/, and what is missing there is fetched, once:

    tiny_shakespeare.txt               the text, 1.1 MB
    tiny_shakespeare_{train,val}.bin   its tokens, in llm.c's format
    tiktoken/                          GPT-2's vocabulary, as tiktoken keeps it
    gpt2.safetensors, ...              OpenAI's weights, unless Hugging Face's cache has them

    python prepro_tinyshakespeare.py                                    Tiny Shakespeare
    python prepro_tinyshakespeare.py --input my.txt                     data/my_{train,val}.bin
    python prepro_tinyshakespeare.py --input my.txt --bytes 1           its bytes as tokens
    python prepro_tinyshakespeare.py --input my.txt --vocab_size 1024   and data/my.tiktoken
"""

import argparse
import contextlib
import hashlib
import heapq
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
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
END_OF_TEXT = "<|endoftext|>"
REVISIONS = {  # of openai-community/NAME on Hugging Face's hub
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SHA256 = {  # that of medium and large is in the hub's answer
    "input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
}
GPT2_FILES = {  # of GPT-2's vocabulary, as they are called in tiktoken's cache
    "vocab.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    "merges.txt": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
}

# --------------------------------------------------------------------------------------------------
# 1. What training needs, and how it is fetched


class InputError(ValueError):
    """One line that says what was found and the remedy."""


class FetchError(ConnectionError):
    """Something that is needed can't be had: what was found, and the remedy."""

    def __str__(self):
        return ": ".join(self.args)


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def provide(what):
    """The path of what training needs, which is fetched if it is not there. FetchError if it can't.

    "tiny_shakespeare": (train_path, val_path), two token files.
    "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl": OpenAI's weights, a .safetensors file.
    """
    if what == "tiny_shakespeare":
        paths = in_data(f"{what}_train.bin"), in_data(f"{what}_val.bin")
        if not all(map(os.path.exists, paths)):
            write_files(own_files(parse_args([])))
        return paths

    path = in_data(f"{what}.safetensors")
    if os.path.exists(path):
        return path
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    sha256 = SHA256.get(what)
    for cached in hub.glob(f"models--*{what}/snapshots/{REVISIONS[what]}/model.safetensors"):
        if cached.exists() and sha256 in (None, cached.resolve().name, digest(cached)):
            say(f"{what}: using {cached}")
            return str(cached)
    server = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{server}/openai-community/{what}/resolve/{REVISIONS[what]}/model.safetensors"
    return download(url, path, f"the weights of {what}", sha256)


def get_encoding():
    """tiktoken's "gpt2". It fetches two files for that, and checks them. FetchError if it can't."""
    ours = os.environ.get("TIKTOKEN_CACHE_DIR") or in_data("tiktoken")
    theirs = os.environ.get("DATA_GYM_CACHE_DIR") or f"{tempfile.gettempdir()}/data-gym-cache"
    missing = [name for name in GPT2_FILES.values() if not os.path.exists(f"{ours}/{name}")]
    cached = missing and all(os.path.exists(f"{theirs}/{name}") for name in GPT2_FILES.values())
    folder = os.environ["TIKTOKEN_CACHE_DIR"] = theirs if cached else ours
    tiktoken = package("tiktoken")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        cause = f"can't fetch GPT-2's vocabulary to {folder}: {reason(error)}"
        raise FetchError(cause, "try again, or train by bytes: --bytes 1") from None


def package(name):
    """Import a package that is needed only now. FetchError if it is missing."""
    try:
        return __import__(name)
    except ImportError:
        raise FetchError(f"package {name} is missing (pip install {name})", "install it") from None


def download(url, path, what, sha256=None):
    """Fetch url to path, unless it is there. Returns path. FetchError if that can't be done."""
    if os.path.exists(path):
        return path
    requests = package("requests")
    remedy = "try again (a proxy may need its certificate in REQUESTS_CA_BUNDLE, or pip install "
    remedy += f'"requests[socks]"), train by bytes, or fetch {url} and put it at {path}'
    with whole(path, resumed=True) as file:
        while True:
            have = file.seek(0, os.SEEK_END)
            try:
                fetch(url, file, what, sha256)
                return path
            except (requests.RequestException, ValueError) as error:
                cause = error if isinstance(error, ValueError) else f"no network ({reason(error)})"
            if file.seek(0, os.SEEK_END) <= have:
                raise FetchError(f"can't fetch {what}: {cause}", remedy)
            time.sleep(1)  # the connection broke: another one goes on


def fetch(url, file, what, sha256):
    """Append to a file what it lacks, by one connection. InputError if it is the wrong one then."""
    have = file.tell()
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    response = package("requests").get(url, headers=headers, stream=True, timeout=30)
    for redirect in response.history:  # in which Hugging Face says what is to come
        sha256 = sha256 or redirect.headers.get("X-Linked-Etag", "").strip('"') or None
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    if status != 416 or not have:  # or else nothing was missing
        right = status in (200, 206) and "text/html" not in kind  # a hotel's page, say
        require(right, f"the server sent {status} {response.reason}, {kind}")
        if status == 200:  # the whole file, whatever we asked for
            file.truncate(file.seek(0))
        size = int(response.headers.get("Content-Length", 0)) >> 16
        chunks = response.iter_content(1 << 16)
        for chunk in counted(chunks, f"fetching {what}, pieces of 64 KB", size):
            file.write(chunk)

    file.flush()
    found = digest(file.name)
    if sha256 not in (None, found):
        file.truncate(0)
        raise InputError(f"another file came, of SHA-256 {found:.12}, not {sha256:.12}")


def digest(path):
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


@contextlib.contextmanager
def whole(path, resumed=False):
    """A file to append to, which becomes path when it is whole and on the disk.

    Until then it has a name of its own, so that two runs at once do not write to the same file. If
    it is resumed, it begins with what an earlier run has left of it as PATH.part.
    """
    path, part = Path(path), Path(f"{path}.part")
    if os.path.lexists(path.parent) and not path.parent.is_dir():
        raise OSError(f"{path.parent} is a file, or a link to something that is gone")
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = Path(f"{part}.{os.urandom(4).hex()}")
    if resumed:
        with contextlib.suppress(OSError):  # there is none, or another run was faster
            part.rename(mine)
    try:
        with open(mine, "a+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mine.replace(path)
    finally:
        if resumed and mine.exists() and mine.stat().st_size:
            mine.replace(part)
        mine.unlink(missing_ok=True)


def write_files(files):
    """Write {path: bytes}. No file is ever half a file."""
    for path, data in files.items():
        with whole(path) as file:
            file.write(data)


def in_data(name):
    """data/NAME; if there is no data/ in this folder, the one beside this file, if that exists."""
    beside = Path(__file__).absolute().parent / "data"
    folder = beside if beside.is_dir() and not os.path.isdir("data") else "data"
    return f"{folder}/{name}"


def reason(error):
    """What lies at the bottom of an exception, in one line: requests wraps up to five of them."""
    while error.__context__:
        error = error.__context__
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)


def say(line):
    """Print to stderr, since a program may be reading stdout. If nobody listens, go on."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def counted(pieces, doing, total):
    """The same pieces, while a line every five seconds says how many of them there were."""
    said = time.monotonic()
    for done, piece in enumerate(pieces, 1):
        yield piece
        if time.monotonic() > said + 5:
            said = time.monotonic()
            say(f"{doing}: {done:,} of {total:,}")


# --------------------------------------------------------------------------------------------------
# 2. Tokens
#
# A language model sees no letters but ids, each of which stands for a few bytes. GPT-2 has the 256
# single bytes, 50,000 frequent strings of them, and <|endoftext|>, with which a text begins.
# Several texts are one string here, with "\0" between them, which no text contains.


def read_text(path, encoding):
    """A text, without a byte order mark and Windows's "\\r\\n". InputError if it is none."""
    advice = "you must know its encoding, and name it: --encoding utf-16, or cp1252, gbk, shift_jis"
    try:
        text = Path(path).read_bytes().decode(encoding)
        text.encode()  # some decoders give half characters
    except (LookupError, UnicodeError) as error:  # which tells the byte and its position
        raise InputError(f"{path} is not {encoding}: {error}: {advice}") from None
    require("\0" not in text, f"{path}: there is a NUL in it: is it a text? If so, {advice}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def token_files(prefix, training, validation, vocabulary):
    """{path: bytes}: PREFIX.tiktoken, if the vocabulary is one's own, and PREFIX_{train,val}.bin.

    vocabulary: "bytes", "gpt2", one's own, a list of bytes by id, or how many tokens are to be
    learned from the text for training. For GPT-2, as in llm.c, a text begins anew after each blank
    line. In one's own <|endoftext|> stands between texts only.

        "To be.\\n\\nOr not."  ->  <|endoftext|> To be.\\n\\n <|endoftext|> Or not.

    A token file is llm.c's: 256 int32, which are 20240520, version 1, the number of tokens, that of
    the vocabulary, the CRC-32 of PREFIX.tiktoken and zeros, and then the tokens, uint16.
    """
    files, texts, vocab_size = {}, [training, validation], 256
    if isinstance(vocabulary, int):
        vocabulary = learn_vocabulary(training.replace("\0", "\n"), vocabulary)
    if vocabulary == "gpt2":  # the text for validation begins one, and that for training goes on
        texts = [text.replace("\n\n", "\n\n\0") for text in (training, "\0" + validation)]
        encoding = get_encoding()
    elif vocabulary != "bytes":
        files = {f"{prefix}.tiktoken": vocabulary_file(vocabulary)}
        encoding = encoding_of(vocabulary)
    crc32 = zlib.crc32(b"".join(files.values()))

    for name, text in zip(("train", "val"), texts, strict=True):
        if vocabulary == "bytes":
            tokens = np.frombuffer(text.replace("\0", "\n").encode(), np.uint8).astype("<u2")
        else:
            vocab_size = encoding.n_vocab
            parts = map(encoding.encode_ordinary, text.split("\0"))
            ids = itertools.chain.from_iterable([*part, encoding.eot_token] for part in parts)
            tokens = np.fromiter(ids, "<u2")[:-1]
        header = np.array([20240520, 1, len(tokens), vocab_size, crc32, *[0] * 251], "<u4")
        files[f"{prefix}_{name}.bin"] = header.tobytes() + tokens.tobytes()
    return files


# --------------------------------------------------------------------------------------------------
# 3. A vocabulary of one's own
#
# Byte pair encoding (Sennrich, Haddow and Birch, 2016, https://arxiv.org/abs/1508.07909) begins
# with the 256 bytes and makes the most frequent pair of neighbours a new token, again and again.
# In their example low, lower, newest, widest occur 5, 2, 6, 3 times, so the pair e s 6 + 3 times:
#
#     l o w, l o w e r, n e w e s t, w i d e s t
#         e s 9, s t 9, w e 8, l o 7, o w 7, ...: (e s) is before (s t), so    256 = e s
#     l o w, l o w e r, n e w es t, w i d es t
#         es t 9, l o 7, o w 7, e w 6, n e 6, ...:                             257 = es t
#     l o w, l o w e r, n e w est, w i d est
#         l o 7, o w 7, e w 6, n e 6, w est 6, ...: (l o) is before (o w), so  258 = l o
#
# In a text the words are what GPT-2's pattern cuts out of it, so no token spans two words. With
# 1,024 tokens a model has fewer rows in wte than with GPT-2's, and need not spell as with bytes.

BYTES_CRC, GPT2_CRC = 3569890623, 2990262213  # of the files of these two vocabularies
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = [bytes([i]) for i in range(256)]


def learn_vocabulary(text, vocab_size):
    """The bytes of each token, a list by id, learned from a text.

    Ids 0 to 255 are the bytes, 256 is the first merge, and the last of the vocab_size ids will be
    <|endoftext|>, which is not in the list. Fewer are learned if the text has no more pairs. "aaa"
    has two pairs. Of equally frequent ones that with the smallest (left id, right id) is merged.
    """
    # Id 300 is chr(300), and a word a string of such characters: str.replace merges a pair.
    times = Counter(m.group() for m in package("regex").finditer(PATTERN, text))
    ids = dict.fromkeys(times, "")
    frequency = Counter()  # of a pair, a str of two such characters
    where = defaultdict(set)  # the words in which a pair occurs, or did before a merge
    changed = set()  # the pairs whose frequency the last merge has changed
    heap = []  # of (-frequency, pair), the greatest frequency first; some are out of date

    def write(word, new_ids):
        """Give a word new ids, and change the frequency of its pairs by what that changes."""
        change = Counter(map("".join, itertools.pairwise(new_ids)))
        change.subtract(map("".join, itertools.pairwise(ids[word])))
        ids[word] = new_ids
        for pair, difference in change.items():
            if difference:
                frequency[pair] += difference * times[word]
                where[pair].add(word)
                changed.add(pair)

    for word in ids:
        write(word, "".join(map(chr, word.encode())))
    vocabulary = list(BYTES)
    for new in counted(range(256, vocab_size - 1), "learning tokens", vocab_size - 257):
        while changed:
            pair = changed.pop()
            heapq.heappush(heap, (-frequency[pair], pair))
        while heap and heap[0][0] != -frequency[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or heap[0][0] == 0:
            say(f"the text has pairs for a --vocab_size of {new + 1} only")
            break

        pair = heap[0][1]
        vocabulary.append(b"".join(vocabulary[ord(letter)] for letter in pair))
        for word in where.pop(pair):  # since write() adds to where
            write(word, ids[word].replace(pair, chr(new)))
    return vocabulary


def encoding_of(vocabulary):
    """The tiktoken.Encoding of a vocabulary, bytes by id, with <|endoftext|> as its last id."""
    ranks = {token: i for i, token in enumerate(vocabulary)}
    last = {END_OF_TEXT: len(vocabulary)}
    make = package("tiktoken").Encoding
    return make("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=last)


def vocabulary_file(vocabulary):
    """The bytes of tiktoken's file of a vocabulary: a line for each id, base64 and the id."""
    return b"".join(b"%s %d\n" % (b64encode(token), i) for i, token in enumerate(vocabulary))


def read_vocabulary(path):
    """The vocabulary, as of token_files, in a .tiktoken file or a saved model's folder."""
    try:
        if os.path.isdir(path):
            other = Path(path, "tokenizer.json")
            found = json.loads((other if other.exists() else Path(path, "vocab.json")).read_bytes())
            found = found["model"]["vocab"] if other.exists() else found
            ids = {name.translate(BACK).encode("latin1"): i for name, i in found.items()}
            require(ids.pop(END_OF_TEXT.encode()) == len(ids), f"{END_OF_TEXT} is not the last")
        else:
            lines = map(bytes.split, Path(path).read_bytes().splitlines())
            ids = {b64decode(token, validate=True): int(i) for token, i in lines}
        complete = sorted(ids.values()) == list(range(len(ids)))
        require(complete and len(ids) < 65536, "expected the ids from 0 on, up to 65535")
        vocabulary = sorted(ids, key=ids.get)
        merges_of(vocabulary)  # or an InputError
        crc32 = zlib.crc32(vocabulary_file(vocabulary))
        return {BYTES_CRC: "bytes", GPT2_CRC: "gpt2"}.get(crc32, vocabulary)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no vocabulary: {error}") from None


# In Hugging Face's files vocab.json, the ids, and merges.txt, the merges in their order, a byte is
# the character of its number or, if that can't be seen, one of the characters from 256 on.

UNSEEN = [i for i in range(256) if not chr(i).isprintable() or chr(i) == " "]
LETTERS = {i: letter for letter, i in enumerate(UNSEEN, 256)}
BACK = {letter: i for i, letter in LETTERS.items()}


def spelled(token):
    """A token's bytes as Hugging Face's files spell them, a str."""
    return token.decode("latin1").translate(LETTERS)


def merges_of(vocabulary):
    """The lines of merges.txt for a vocabulary without its <|endoftext|>: a list of str."""
    require(sorted(vocabulary[:256]) == BYTES, "a vocabulary's first 256 tokens must be the bytes")
    ranks = {token: i for i, token in enumerate(vocabulary)}
    lines = []
    for new, token in enumerate(vocabulary[256:], 256):
        parts = [token[i : i + 1] for i in range(len(token))]  # two, after all earlier merges
        while len(parts) > 2:
            pairs = list(map(b"".join, itertools.pairwise(parts)))
            rank, i = min((ranks.get(pair, new), i) for i, pair in enumerate(pairs))
            if rank >= new:
                break
            parts[i : i + 2] = [pairs[i]]
        require(len(parts) == 2, f"token {new}, {token}, does not merge two earlier ones")
        lines.append(" ".join(map(spelled, parts)))
    return lines


def huggingface_files(vocabulary):
    """Hugging Face's two files of a vocabulary, {name: bytes}, or {} if it is not at hand."""
    if vocabulary == "gpt2":
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or in_data("tiktoken")
        with contextlib.suppress(OSError):
            return {to: Path(folder, name).read_bytes() for to, name in GPT2_FILES.items()}
    elif vocabulary:
        tokens = BYTES if vocabulary == "bytes" else vocabulary
        names = [*map(spelled, tokens), END_OF_TEXT]  # which transformers needs, also for bytes
        ids = {name: i for i, name in enumerate(names)}
        lines = ["#version: 0.2", *merges_of(tokens), ""]
        return {"vocab.json": json.dumps(ids).encode(), "merges.txt": "\n".join(lines).encode()}
    return {}


# --------------------------------------------------------------------------------------------------
# 4. The command line


def parse_args(argv):
    """The command line's flags. Leaves with exit code 2 if they make no sense."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    path = {"type": os.path.expanduser}
    switch = {"type": int, "choices": (0, 1), "metavar": "X", "default": 0}
    add("--input", **path, nargs="+", metavar="FILE", help="your texts, not Tiny Shakespeare")
    add("--encoding", default="utf-8", metavar="NAME", help="their encoding (utf-8): gbk, cp1252")
    add("--val_fraction", type=float, default=0.1, metavar="X", help="this part validates (0.1)")
    add("--output_prefix", **path, metavar="PREFIX", help="write PREFIX_train.bin, PREFIX_val.bin")
    add("--endoftext", **switch, help=f"1: {END_OF_TEXT} is that token, or a newline in bytes")
    add("--replace", **switch, help="1: replace token files that hold something else")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--bytes", **switch, help="1: the text's bytes are the tokens")
    add("--vocab_size", type=int, metavar="V", help="learn a vocabulary of V tokens from the text")
    add("--vocabulary", **path, metavar="PATH", help="take that of a .tiktoken file or a model")
    args = parser.parse_args(argv)

    if args.vocab_size is not None and not 258 <= args.vocab_size <= 50256:
        parser.error(f"--vocab_size {args.vocab_size} is not between 258 and 50256")
    if not 0 < args.val_fraction < 1:
        parser.error(f"--val_fraction {args.val_fraction} is not between 0 and 1")
    return args


def own_files(args):
    """{path: bytes}, as of token_files, of what the flags ask for."""
    paths = args.input or [in_data("tiny_shakespeare.txt")]
    if not args.input:
        download(f"{SHAKESPEARE}input.txt", paths[0], "Tiny Shakespeare", SHA256["input.txt"])
        if digest(paths[0]) != SHA256["input.txt"]:
            say(f"{paths[0]} is not the original, but is used: delete it to fetch the original")
    text = "\0".join(read_text(path, args.encoding) for path in paths)
    if args.endoftext:
        text = text.replace(END_OF_TEXT, "\0")
    elif END_OF_TEXT in text and not args.bytes:
        say(f"{END_OF_TEXT} in the text is characters here: --endoftext 1 makes it the token")

    # A cut by bytes is the same for every vocabulary. No character is cut in two.
    as_llmc = not args.input and args.val_fraction == 0.1
    n = VAL_BYTES if as_llmc else int(args.val_fraction * len(text.encode()))
    head = text.encode()[:n].decode(errors="ignore")
    training, validation = text[len(head) :].strip("\0"), head.strip("\0")
    found = f"{len(validation)} characters validate, {len(training)} train"
    require(training and validation, f"{found}: use a longer text or another --val_fraction")

    vocabulary = "bytes" if args.bytes else args.vocab_size or "gpt2"
    if args.vocabulary:
        vocabulary = read_vocabulary(args.vocabulary)
    kind = "_own" if isinstance(vocabulary, list) else f"_{vocabulary}"
    kind = "" if args.input or vocabulary == "gpt2" else kind
    prefix = args.output_prefix or in_data(Path(paths[0]).stem + kind)
    return token_files(prefix, training, validation, vocabulary)


def main(argv=None):
    """The command line. Returns the exit code: 0, 1 after what its user can mend, 130 at Ctrl-C."""
    args = parse_args(argv)
    try:
        files = own_files(args)
        old = [p for p in files if os.path.exists(p) and Path(p).read_bytes() != files[p]]
        found = f"something else is in {' and '.join(old)}"
        require(args.replace or not old, f"{found}: add --replace 1, or another --output_prefix")
        write_files(files)

        *own, train_path, val_path = files
        model = "bytes" if args.bytes else "d2" if own else "gpt2"
        if args.vocabulary and os.path.isdir(args.vocabulary):
            model = args.vocabulary
        trainer = os.path.join(os.path.dirname(sys.argv[0]), "train_gpt2.py")
        flags = ["--model", model, "--input_bin", train_path, "--input_val_bin", val_path]
        quoted = subprocess.list2cmdline if os.name == "nt" else shlex.join
        print(f"train on it: {quoted(['python', trainer, *flags])}")
        return 0
    except KeyboardInterrupt:
        say("stopped: run it again to go on")
        return 130
    except (InputError, OSError, UnicodeError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
