"""
Text to tokens: what must be there before training can begin, fetched and prepared.

    python prepro_tinyshakespeare.py                    # Tiny Shakespeare, tokenised for GPT-2
    python prepro_tinyshakespeare.py --input my.txt     # your own text: data/my_train.bin, data/my_val.bin
    python prepro_tinyshakespeare.py --input my.txt --val_fraction 0.05 --output_prefix data/notes

Everything that comes from the network comes through this file: the text, GPT-2's vocabulary, its weights.
train_gpt2.py imports it when it misses one of them. All of it goes to data/, and is fetched only once:

    tiny_shakespeare.txt               the text, 1.1 MB
    tiny_shakespeare_{train,val}.bin   its tokens, in llm.c's format
    gpt2_tokenizer.bin                 every token's bytes, in llm.c's format
    gpt2_124M{,_debug_state}.bin       weights, and a batch with its gradients, in llm.c's format: --write_tensors
    tiktoken/                          GPT-2's vocabulary, as tiktoken keeps it
    gpt2.safetensors, ...              weights

A file under its real name is whole: while it arrives it ends in .part, and is renamed when it has passed
its checks. A .part that an earlier run left behind is continued where it ends.
"""
import argparse, contextlib, hashlib, importlib, os, re, sys, time
from array import array
from dataclasses import asdict

from train_gpt2 import LOGITS_ROWS, InputError, atomic_write, open_tokens, require, sync_folder
import numpy as np  # after train_gpt2, which tells BLAS how to behave before NumPy loads it

# ----------------------------------------------------------------------------------------------------
# 1. What there is to fetch

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_SIZE = 1_115_394
VAL_TOKENS = 32_768  # llm.c's split: the first 32 * 1024 tokens validate, the other 305,260 train

VOCABULARY = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's own address
VOCABULARY_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
WEIGHTS = {  # name: (revision, SHA-256, bytes). None: we take the hub's word for it
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707", 548_105_171),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None, None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None, None),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a", None),
}


def fetch_weights(name):
    """The path of OpenAI's weights of that name: in data/, else fetched from the hub (HF_ENDPOINT, if set).

    InputError if the name is unknown, the file there has the wrong size, or it can't be fetched.
    """
    require(name in WEIGHTS, f"no weights are called {name!r}: choose one of {', '.join(WEIGHTS)}")
    revision, sha256, size = WEIGHTS[name]
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{hub}/openai-community/{name}/resolve/{revision}/model.safetensors"
    return download(url, f"data/{name}.safetensors", sha256, size)


def get_encoding():
    """tiktoken's "gpt2": a tiktoken.Encoding. InputError if tiktoken or the vocabulary can't be had.

    By itself tiktoken keeps the vocabulary in a temporary folder, so it would be fetched anew after every
    reboot, and without a timeout. So we fetch it, to data/tiktoken unless TIKTOKEN_CACHE_DIR is set.
    """
    tiktoken = package("tiktoken")
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", "data/tiktoken")
    for name, sha256 in VOCABULARY_SHA256.items() if folder else ():  # "" is tiktoken's way to say: no cache
        path = f"{folder}/{hashlib.sha1((VOCABULARY + name).encode()).hexdigest()}"  # where tiktoken looks
        if os.path.exists(path) and digest(path) != sha256:
            say(f"{path} is damaged: fetching {name} again")
            os.remove(path)
        download(VOCABULARY + name, path, sha256)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever it is, it comes from tiktoken's files or its network
        raise InputError(f"tiktoken can't load GPT-2's vocabulary ({reason(error)}): set TIKTOKEN_CACHE_DIR "
                         "to a folder that has it, or unset it and try again with a network") from None


def package(name):
    """Import what is needed only now. InputError with the remedy if that fails."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"the package {name} is needed here ({error}): pip install {name}") from None


# ----------------------------------------------------------------------------------------------------
# 2. Downloading
#
# Hugging Face answers with a redirect, and this first response already says what is to come: X-Linked-Etag
# is the file's SHA-256, in quotes, X-Linked-Size its length. Only a file whose SHA-256 is known is ever
# continued: nothing else would notice that two halves don't belong together.

ATTEMPTS = 8        # connections that one download may take, if the first of them brought anything at all
RETRY_WAIT = 2.0    # seconds between them
TIMEOUT = (10, 30)  # seconds to wait for a connection, and for the next bytes
CHUNK = 1 << 16     # bytes at a time: a connection that breaks loses less than that


def download(url, path, sha256=None, size=None):
    """Fetch url to path, unless it is there, and return path. sha256, size: what is known of the file.

    InputError, with the cause and the way to place the file by hand, if there is no network, a refusal, a
    web page instead of the file, another file than expected, no room on the disk, or no requests.
    """
    if os.path.exists(path):
        found = os.path.getsize(path)
        require(size in (None, found), f"{path} has {found} bytes, expected {size}: delete it and run again")
        return path
    requests, part, moved, continued = package("requests"), f"{path}.part", False, False
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        for _ in range(ATTEMPTS):
            before = length(part)
            continued = continued or before > 0
            try:
                want_sha256, want_size = receive(requests, url, part, sha256, size)
            except requests.RequestException as error:
                cause, moved = reason(error), moved or length(part) != before
                require(moved, cause)  # nothing came at all: no network, and waiting won't bring one
                time.sleep(RETRY_WAIT)
                continue
            found, nbytes = digest(part), length(part)
            if want_sha256 in (None, found) and want_size in (None, nbytes) and nbytes > 0:
                os.replace(part, path)
                sync_folder(os.path.dirname(path))
                return path
            os.remove(part)
            require(continued, f"what came has {nbytes} bytes and SHA-256 {found}, expected "
                               f"{want_size or 'any number of'} bytes and SHA-256 {want_sha256}")
            say(f"{part} was continued, but the whole is not what was expected: once more from the start")
            continued = False
        raise InputError(f"the connection broke {ATTEMPTS} times, in the end because: {cause} "
                         f"({length(part)} bytes are kept, and continued next time)")
    except (InputError, OSError) as error:
        raise InputError(f"can't fetch {url}: {reason(error)}; try again, or fetch it by hand and "
                         f"put it at {path}") from None


def receive(requests, url, part, sha256, size):
    """One connection: append to the file `part` what it lacks. Returns what is known of it: (sha256, size).

    requests.RequestException if the connection breaks; InputError if the answer can't be the file.
    """
    have = length(part)
    headers = {"Accept-Encoding": "identity"}  # so that all lengths count the file's own bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        for answer in (*response.history, response):
            linked = answer.headers.get("X-Linked-Etag", "").strip('"').lower()
            if re.fullmatch("[0-9a-f]{64}", linked):
                require(sha256 in (None, linked), f"the server offers SHA-256 {linked}, expected {sha256}")
                sha256 = linked
            size = agreed(size, answer.headers.get("X-Linked-Size"))

        status = response.status_code
        spot = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        fits = status == 206 and sha256 is not None and spot is not None and int(spot[1]) == have
        if have and status == 416 and have == size:
            return sha256, size  # nothing was missing
        if have and status in (206, 416) and not fits:
            os.remove(part)
            return receive(requests, url, part, sha256, size)
        require(status == 200 or have and fits, f"the server answered {status} {response.reason}")
        require("text/html" not in response.headers.get("Content-Type", ""),
                "a web page came instead of the file (does this network want you to log in?)")
        if fits:
            size = agreed(size, spot[2])
        elif "Content-Encoding" not in response.headers:
            size = agreed(size, response.headers.get("Content-Length"))
        with open(part, "ab" if fits else "wb") as f:  # 200 is the whole file, even if we asked for its end
            for chunk in watched(response.iter_content(CHUNK), part, have if fits else 0, size):
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
    if size is not None and length(part) < size:
        raise requests.ConnectionError("the connection ended early")
    return sha256, size


def agreed(size, offered):
    """The file's size, now that a header says `offered`. InputError if another one was expected."""
    offered = int(offered) if (offered or "").isdecimal() else None
    require(None in (size, offered) or size == offered, f"the server offers {offered} bytes, expected {size}")
    return size if offered is None else offered


def length(path):
    """The bytes in a file; 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def digest(path):
    """A file's SHA-256, in hex."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        for chunk in watched(iter(lambda: f.read(1 << 20), b""), f"checking {path}", 0, length(path)):
            sha256.update(chunk)
    return sha256.hexdigest()


def reason(error):
    """What lies at the bottom of an exception, in one line: requests wraps up to five around the system's."""
    inside = (error.__cause__, getattr(error, "reason", None), *error.args)
    inside = [e for e in inside if isinstance(e, Exception)]
    return reason(inside[0]) if inside else " ".join(str(error).split()) or type(error).__name__


def watched(pieces, what, done, total):
    """The same pieces, while a line on stderr, if it is a terminal, says how far we are."""
    start, first, shown = time.monotonic(), done, 0.0  # quiet for the first second
    try:
        for piece in pieces:
            yield piece
            done, now = done + len(piece), time.monotonic()
            if now - start > 1 and now - shown > 0.2 and sys.stderr.isatty():
                shown, rate = now, max(1.0, (done - first) / (now - start))
                line = f"\r{what}: {done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
                line += f", {100 * done / total:.0f}%, {(total - done) / rate:.0f} s left   " if total else ""
                print(line, end="", file=sys.stderr, flush=True)
    finally:
        if shown:
            say("")


def say(line):
    """Tell the person, not the program that may be reading stdout."""
    print(line, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------
# 3. Tokens
#
# A language model sees no letters but ids, each of which stands for a few bytes. GPT-2 has the 256 single
# bytes, 50,000 frequent strings of them, and <|endoftext|>, which says that something new begins.

def encode_text(text, encoding):
    """text as token ids, uint16: the first section, and each after a blank line, begins with <|endoftext|>.

        "To be.\\n\\nOr not."  ->  <|endoftext|> To be.\\n\\n <|endoftext|> Or not.

    Only we put that id there. Where the text itself says <|endoftext|>, these are characters like any
    others. encoding: any tiktoken.Encoding with an eot_token and, or else InputError, at most 65536 ids.
    """
    require(encoding.n_vocab <= 1 << 16, f"{encoding.name} has {encoding.n_vocab} ids, expected <= 65536")
    *sections, rest = text.split("\n\n")
    tokens = array("H")
    for section in watched([*(s + "\n\n" for s in sections), rest], "tokenising", 0, len(text)):
        tokens.append(encoding.eot_token)
        tokens.extend(encoding.encode_ordinary(section))
    return np.frombuffer(tokens, np.uint16)


def write_with_header(path, numbers, parts):
    """llm.c's files begin with 256 int32, little-endian, of which the first few say what follows. parts: bytes or
    arrays (fractions as float32), any iterable of them: each is written before the next is asked for."""
    header = np.zeros(256, "<i4")
    header[:len(numbers)] = numbers
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_write(path) as f:
        f.write(header)
        for part in parts:
            f.write(part if isinstance(part, bytes) else np.ascontiguousarray(part, "<f4" if part.dtype.kind == "f" else None))


def write_tokens(path, tokens):
    """llm.c's token file: 20240520, version 1, number of tokens | the tokens, uint16. InputError if none."""
    tokens = np.asarray(tokens)
    require(tokens.dtype.kind in "iu" and tokens.ndim == 1 and 0 < len(tokens) < 1 << 31
            and 0 <= tokens.min() and tokens.max() < 1 << 16,
            f"{path}: expected a row of ids from 0 to 65535, found {tokens.dtype} of shape {tokens.shape}")
    write_with_header(path, (20240520, 1, len(tokens)), [tokens.astype("<u2")])


def write_tokenizer(path, encoding):
    """llm.c's tokenizer file: 20240328, version 2, number of tokens, <|endoftext|>'s id | for every token,
    one byte with its length, then its bytes. A program without tiktoken can print what it samples."""
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    require(max(map(len, tokens)) < 256, f"{path}: {encoding.name} has a token of more than 255 bytes")
    write_with_header(path, (20240328, 2, len(tokens), encoding.eot_token),
                      (bytes([len(token)]) + token for token in tokens))


def write_tensors(model, inputs, targets, folder):
    """What a port of train_gpt2.py to another language checks itself against, as llm.c's two files:

        model   20240326, version 3, max_seq_len, vocab_size, num_layers, num_heads, channels, padded_vocab_size
                | the 16 parameters in order, float32, wte with rows of zeros up to a multiple of 128
        state   20240327, version 2, B, T | inputs, targets (B, T) int32 | logits (B, T, V) float32 | loss
                | the 16 gradients, wte's with the same rows of zeros

    model: a GPT2; inputs, targets (B, T): the batch. Returns the two paths, folder/gpt2_124M.bin and
    folder/gpt2_124M_debug_state.bin for a model of 124 million parameters.
    """
    millions = round(sum(view.size for view in model.params.values()) / 1e6)
    paths = [os.path.join(folder, f"gpt2_{millions}M{end}.bin") for end in ("", "_debug_state")]
    sizes, wte = list(asdict(model.config).values()), model.params["wte"]
    padding = np.zeros((-len(wte) % 128, wte.shape[1]), "<f4")
    write_with_header(paths[0], [20240326, 3, *sizes, len(wte) + len(padding)],
                      [wte, padding, *list(model.params.values())[1:]])

    model.zero_grad()
    loss = model.forward(inputs, targets)
    model.backward()

    def state():
        yield from (inputs.astype("<i4"), targets.astype("<i4"))
        lnf = model.acts["lnf"].reshape(inputs.size, -1)
        for i in range(0, inputs.size, LOGITS_ROWS):  # never all logits at once
            yield lnf[i:i + LOGITS_ROWS] @ wte.T
        yield from (np.float32(loss), model.grads["wte"], padding, *list(model.grads.values())[1:])

    write_with_header(paths[1], [20240327, 2, *inputs.shape], state())
    return paths


def read_text(path):
    """A UTF-8 text, without Windows's byte order mark and "\\r\\n". InputError if it is none, or empty."""
    require(os.path.exists(path), f"{path}: no such file, expected a UTF-8 text")
    with open(path, "rb") as f:
        data = f.read()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte 0x{data[error.start]:02x} at position {error.start} is not UTF-8: "
                         "save it as UTF-8, for instance with iconv -f LATIN1 -t UTF-8") from None
    require(text.strip(), f"{path}: is empty, expected a UTF-8 text")
    return text


def write_split(paths, tokens, n):
    """Write the first n tokens to paths[1] for validation, as in llm.c, and the others to paths[0]."""
    require(0 < n < len(tokens), f"{n} of {len(tokens)} tokens for validation: expected at least one on both "
                                 "sides: use a longer text or another --val_fraction")
    write_tokens(paths[0], tokens[n:])
    write_tokens(paths[1], tokens[:n])


def prepare_tinyshakespeare():
    """Make sure of Tiny Shakespeare's tokens in data/: (train_path, val_path).

    Token files that are whole stay as they are, and a text that is there is used as it is, so nothing is
    fetched twice. InputError if something is missing and can't be fetched.
    """
    text, *paths = (f"data/tiny_shakespeare{end}" for end in (".txt", "_train.bin", "_val.bin"))
    with contextlib.suppress(InputError, OSError):  # which mean that one is missing or broken
        if all(len(open_tokens(path, 1)) for path in paths):
            return tuple(paths)
    if not os.path.exists(text):
        download(SHAKESPEARE, text, SHAKESPEARE_SHA256, SHAKESPEARE_SIZE)
    elif digest(text) != SHAKESPEARE_SHA256:
        say(f"{text} is not the original, but used as it is: delete it to have the original fetched")
    write_split(paths, encode_text(read_text(text), get_encoding()), VAL_TOKENS)
    return tuple(paths)


def tokenizer(vocab_size):
    """How a model of that vocabulary reads and writes: (encode a text to ids, decode an id to bytes, the id that
    starts a text). Up to 256 ids are bytes, a new text starts with a line feed; more are GPT-2's tokens."""
    if vocab_size <= 256:
        return lambda text: list(text.encode(errors="surrogateescape")), lambda i: bytes([i]), ord("\n") % vocab_size
    encoding = get_encoding()
    def decode(i):  # models whose vocabulary was padded, to 50304, say, can choose ids that mean nothing
        return encoding.decode_single_token_bytes(i) if i < encoding.n_vocab else b""
    return encoding.encode_ordinary, decode, encoding.eot_token


OWN_FILES = ("train_gpt2.py", "test_gpt2.py", "prepro_tinyshakespeare.py", "README.md")
PASSAGE = 1000  # bytes


def own_text():
    """(training, validation) text that needs no network, as bytes in uint8 arrays: this project's own files. Every
    tenth passage of it validates, so that both sides have some of everything."""
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [path for path in (os.path.join(here, name) for name in OWN_FILES) if os.path.exists(path)]
    text = np.concatenate([np.fromfile(path, np.uint8) for path in paths])
    passages = np.split(text, range(PASSAGE, len(text), PASSAGE))
    return np.concatenate([p for i, p in enumerate(passages) if i % 10 != 5]), np.concatenate(passages[5::10])


# ----------------------------------------------------------------------------------------------------
# 4. The command line

def main(argv=None):
    """The command line. Returns the exit code: 0, 1 after what its user can mend, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="FILE", help="your own UTF-8 text, instead of Tiny Shakespeare")
    parser.add_argument("--val_fraction", type=float, metavar="X", help="the part that validates (0.1)")
    parser.add_argument("--output_prefix", metavar="PREFIX",
                        help="write PREFIX_train.bin and PREFIX_val.bin (default data/NAME for NAME.txt)")
    args = parser.parse_args(argv)
    if args.input is None and (args.val_fraction, args.output_prefix) != (None, None):
        parser.error("--val_fraction and --output_prefix need --input: Tiny Shakespeare is split as in llm.c")
    try:
        if args.input is None:
            paths = prepare_tinyshakespeare()
            write_tokenizer("data/gpt2_tokenizer.bin", get_encoding())
            print("data/gpt2_tokenizer.bin: the bytes of every token")
        else:
            fraction = 0.1 if args.val_fraction is None else args.val_fraction
            require(0 < fraction < 1, f"--val_fraction is {fraction}, expected a number between 0 and 1")
            tokens = encode_text(read_text(args.input), get_encoding())
            prefix = args.output_prefix or "data/" + os.path.splitext(os.path.basename(args.input))[0]
            paths = f"{prefix}_train.bin", f"{prefix}_val.bin"
            write_split(paths, tokens, int(fraction * len(tokens)))
        for path in paths:
            print(f"{path}: {len(open_tokens(path, 1)):,} tokens")
        return 0
    except KeyboardInterrupt:
        say("stopped: run it again to go on")
        return 130
    except (InputError, OSError) as error:
        say(f"error: {reason(error)}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
