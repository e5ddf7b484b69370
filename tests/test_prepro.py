"""Fetching, tokenising and learning a vocabulary: prepro_tinyshakespeare.py."""

import hashlib
import os
import random
import re
import shlex
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import regex
import tiktoken
from common import NOBODY, VOCABULARY_FILES, VOCABULARY_FOLDER, need_gpt2_vocabulary

import prepro_tinyshakespeare as prepro
from prepro_tinyshakespeare import FetchError, InputError

SHAKESPEARE = os.path.abspath(os.environ.get("TINY_SHAKESPEARE") or "data/tiny_shakespeare.txt")
content = lambda path: Path(path).read_bytes()


def put(path, data):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)


def refused(call, *parts, error=FetchError):
    """The call ends with just this error, of one line that says all of these."""
    with pytest.raises((InputError, OSError)) as caught:
        call()
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []
    return caught.value


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder, with nobody's caches and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepro, "__file__", str(tmp_path / "prepro.py"))  # no data/ lies beside it
    monkeypatch.setattr(prepro.tempfile, "gettempdir", lambda: "temporary")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # or it would remember GPT-2's
    environment = {name: os.environ.get(name, "") for name in ("PATH", "SYSTEMROOT")}
    environment |= {"HTTP_PROXY": NOBODY, "HTTPS_PROXY": NOBODY, "NO_PROXY": "127.0.0.1"}
    environment |= {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    with patch.dict(os.environ, environment, clear=True):
        yield


# --------------------------------------------------------------------------------------------------
# Fetching, from a server that misbehaves

BODY = random.Random(1).randbytes(2_500_001)
RIGHT = hashlib.sha256(BODY).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """A server with one file behind a redirect. Tests make it misbehave."""

    def do_GET(self):
        hub = self.server
        status, headers, rest = 302, {"Location": "/cdn" + self.path, **hub.linked}, b""
        if self.path.startswith("/cdn"):
            hub.seen.append(int(self.headers["Range"][6:-1]))
            rest = BODY[hub.seen[-1] if hub.ranges else 0 :]
            headers = {"Content-Type": hub.type, "Content-Length": str(len(rest))}
            status = hub.status or (206 if hub.ranges else 200) if rest else 416
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        if rest and hub.cuts:
            self.wfile.write(rest[: hub.cuts.pop(0)])
            self.connection.shutdown(socket.SHUT_RDWR)
        elif rest:
            self.wfile.write(rest[:999_999])
            hub.halfway()
            self.wfile.write(rest[999_999:])


@pytest.fixture
def hub(empty_folder):
    """The server. cuts: after how many bytes each connection breaks. seen: the starts asked for."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        hub.url = f"http://127.0.0.1:{hub.server_port}/model"
        hub.status, hub.ranges, hub.type, hub.linked = None, True, "text/plain", {}
        hub.cuts, hub.seen, hub.halfway = [], [], lambda: None
        threading.Thread(target=hub.serve_forever, args=[0.01]).start()
        yield hub
        hub.shutdown()


LINKED = {"linked": {"X-Linked-Etag": f'"{RIGHT}"'}}
WRONG = {"linked": {"X-Linked-Etag": f'"{64 * "0"}"'}}
CUT = {"cuts": [1_200_000, 1_100_000]}
SERVERS = {  # how it behaves: (its attributes, SHA-256 known, file.part before, starts, the error)
    "a redirect with the hash": (LINKED, None, b"", [0], ""),
    "a redirect with another hash": (WRONG, None, b"", [0], "another file"),
    "a redirect without headers": ({}, None, b"", [0], ""),
    "cut connections": (CUT, RIGHT, b"", [0, 18 << 16, 34 << 16], ""),
    "cut for good": ({"cuts": [1_200_000, 0]}, RIGHT, b"", [0, 18 << 16], "no network"),
    "a part of an earlier run": ({}, RIGHT, BODY[:999], [999], ""),
    "all of it from an earlier run": ({}, RIGHT, BODY, [2_500_001], ""),
    "a refused range": ({"ranges": False}, RIGHT, BODY[:999], [999], ""),
    "a part of another file": ({}, RIGHT, b"x" * 999, [999], "another file"),
    "a web page": ({"type": "text/html"}, RIGHT, b"", [0], "the server sent 206 Partial"),
    "no such file": ({"status": 404}, RIGHT, b"", [0], "the server sent 404 Not Found"),
}


@pytest.mark.parametrize("behaviour", SERVERS)
def test_a_server(hub, monkeypatch, behaviour):
    attributes, sha256, part, starts, said = SERVERS[behaviour]
    vars(hub).update(attributes)
    monkeypatch.setattr(prepro.time, "sleep", lambda seconds: None)
    if part:
        put("data/file.part", part)
    fetch = lambda: prepro.download(hub.url, "data/file", "the file", sha256)
    if said:
        remedy = hub.url, "put it at data/file", "train by bytes", "REQUESTS_CA_BUNDLE"
        cause = refused(fetch, *remedy).args[0]
        assert cause.startswith(f"can't fetch the file: {said}") and len(cause) < 100
        left = [content(path) for path in Path("data").iterdir()]
        assert left == ([BODY[: 18 << 16]] if len(starts) == 2 else []), "what is wrong is not kept"
    else:
        assert fetch() == "data/file" and content("data/file") == BODY
        assert os.listdir("data") == ["file"]
        fetch()
    assert hub.seen == starts, "and what is there is not fetched again"


def test_two_first_runs_at_once_do_not_write_to_the_same_file(hub):
    """The first takes over what is left of an earlier run; both are halfway at the same time."""
    put("file.part", BODY[:999])
    hub.halfway = threading.Barrier(2, timeout=20).wait
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: prepro.download(hub.url, "file", "it", RIGHT), range(2)))
    assert sorted(hub.seen) == [0, 999] and content("file") == BODY and os.listdir() == ["file"]


@pytest.mark.parametrize("what", ["tiny_shakespeare", "gpt2"])
def test_only_what_could_not_be_had_is_a_fetch_error(empty_folder, monkeypatch, what):
    provide = lambda: prepro.provide(what)
    os.symlink("nowhere", "data") if os.name != "nt" else put("data", b"where a folder should be")
    refused(provide, "data is a file, or a link to something that is gone", error=OSError)
    os.remove("data")
    refused(provide, "can't fetch", "no network (Connection refused)")
    monkeypatch.setitem(sys.modules, "requests", None)  # so Python marks an import that must fail
    refused(provide, "pip install requests")
    for name in ("tiktoken", "regex"):
        monkeypatch.setitem(sys.modules, name, None)
        refused(lambda: prepro.token_files("x", "to be", "or", 300), f"pip install {name}")


def test_progress_is_counted_every_five_seconds(monkeypatch, capsys):
    clock = iter([0, 1, 5.1, 5.1, 6, 11, 11])  # seconds at each call
    monkeypatch.setattr(prepro.time, "monotonic", clock.__next__)
    assert list(prepro.counted("abcd", "fetching", 9000)) == list("abcd")
    assert capsys.readouterr().err == "fetching: 2 of 9,000\nfetching: 4 of 9,000\n"


CACHES = {  # where it is: how that is told
    ".cache/huggingface/hub": {},
    "[c]/huggingface/hub": {"XDG_CACHE_HOME": "[c]"},
    "[c]/hub": {"HF_HOME": "[c]", "XDG_CACHE_HOME": "no"},
    "c": {"HF_HUB_CACHE": "~/c", "HF_HOME": "no"},
}


@pytest.mark.parametrize("place", CACHES)
def test_weights_in_hugging_faces_cache(hub, monkeypatch, capsys, place):
    """A link points to them. Others, damaged ones and what a link has lost are not used."""
    os.environ.update(CACHES[place], HF_ENDPOINT=hub.url + "/")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(prepro.SHA256, "gpt2", sha256)
    ours, folder = prepro.REVISIONS["gpt2"], f"{place}/models--openai-community--gpt2"
    path, other = (f"{folder}/snapshots/{name}/model.safetensors" for name in (ours, "other"))
    put(path, b"weights")
    put(other, b"weights")
    if os.name != "nt":
        os.renames(path, f"{folder}/blobs/blob")
        os.makedirs(os.path.dirname(path))
        os.symlink("../../blobs/blob", path)
    found = prepro.provide("gpt2")
    assert os.path.samefile(found, path) and capsys.readouterr().err == f"gpt2: using {found}\n"

    put("data/gpt2.safetensors", b"mine")
    assert prepro.provide("gpt2") == "data/gpt2.safetensors", "data/ comes first"
    os.remove("data/gpt2.safetensors")

    url = f"{hub.url}/openai-community/gpt2/resolve/{ours}/model.safetensors"
    provide = lambda: prepro.provide("gpt2")
    put(path, b"w")
    refused(provide, "another file", f"not {sha256:.12}", url)
    os.remove(os.path.realpath(path))
    refused(provide, "another file", f"not {sha256:.12}", url)


FOLDERS = {  # where tiktoken's files lie: the environment
    "data/tiktoken": {"DATA_GYM_CACHE_DIR": "junk"},
    "mine": {"TIKTOKEN_CACHE_DIR": "mine"},
    "gym": {"DATA_GYM_CACHE_DIR": "gym", "TIKTOKEN_CACHE_DIR": "elsewhere"},
    "temporary/data-gym-cache": {},
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_gpt2s_vocabulary_is_used_where_it_is(empty_folder, folder):
    need_gpt2_vocabulary()
    for path in VOCABULARY_FILES.values():
        put(f"{folder}/{os.path.basename(path)}", content(path))
        put(f"junk/{os.path.basename(path)}", b"{}")
    os.environ.update(FOLDERS[folder])
    assert prepro.get_encoding().encode_ordinary("hello world") == [31373, 995]
    assert list(prepro.huggingface_files("gpt2")) == ["vocab.json", "merges.txt"]
    tiktoken.registry.ENCODINGS.clear()
    put(f"{folder}/{os.path.basename(path)}", b"{}")
    refused(prepro.get_encoding, f"vocabulary to {folder}: Connection refused")


# --------------------------------------------------------------------------------------------------
# Texts and tokens


def read_token_file(path):
    """A token file as its description says, with nothing of ours: (V, crc32, list of tokens)."""
    header = struct.unpack("<256I", content(path)[:1024])
    assert header[:2] == (20240520, 1) and header[5:] == (0,) * 251
    return *header[3:5], list(struct.unpack(f"<{header[2]}H", content(path)[1024:]))


def tokens_of(prefix):
    """The tokens for validation and those for training, which follow them in the text."""
    return [read_token_file(f"{prefix}_{part}.bin")[2] for part in ("val", "train")]


def prepared(capsys, *flags, err=""):
    """main(flags) must end well, and say so much. Returns the words of the command it prints."""
    assert prepro.main(list(flags)) == 0
    said = capsys.readouterr()
    assert said.err == err and said.out.startswith("train on it: python ")
    return shlex.split(said.out)[3:] if os.name != "nt" else said.out.split()[3:]


@pytest.fixture
def gpt2(empty_folder):
    need_gpt2_vocabulary()
    os.environ["TIKTOKEN_CACHE_DIR"] = VOCABULARY_FOLDER
    return prepro.get_encoding()


LINE = "to be: naïve, 東京\n"


@pytest.mark.parametrize("encoding", "utf-8 utf-8-sig utf-16 utf-16-be utf-32 gb18030".split())
def test_the_bytes_of_two_texts(empty_folder, capsys, encoding):
    """One follows the other, on a new line. No character is cut in two."""
    put("a.txt", (9 * LINE).replace("\n", "\r\n").encode(encoding))
    put("b.txt", "or not".encode(encoding))
    prepared(capsys, "--input", "a.txt", "b.txt", "--bytes", "1", "--encoding", encoding)
    val, train = (bytes(tokens).decode() for tokens in tokens_of("data/a"))
    assert (val, train) == (LINE[:15], LINE[15:] + 8 * LINE + "\nor not")


BAD = b"to be" * 99
MISTAKES = {  # the flags: (the exit code, the bytes of text.txt, what the message must name)
    "": (1, b"na\xefve", "text.txt is not utf-8: 'utf-8' codec can't decode byte 0xef"),
    "--bytes 0": (1, b"t\0o\0", "text.txt: there is a NUL in it"),
    "--encoding klingon": (1, BAD, "unknown encoding: klingon"),
    "--endoftext 0": (1, b"\xef\xbb\xbf", "0 characters validate, 0 train"),
    "--bytes 1": (1, b"to be", "0 characters validate, 5 train"),
    "--input nothing.txt": (1, BAD, "No such file or directory: 'nothing.txt'"),
    "--bytes 1 --output_prefix text.txt/x": (1, BAD, "text.txt is a file"),
    "--vocabulary text.txt": (1, BAD, "text.txt is no vocabulary"),
    "--vocabulary .": (1, BAD, "No such file or directory: 'vocab.json'"),
    "--inp x": (2, BAD, "unrecognized arguments: --inp x"),
    "--val_fraction nan": (2, BAD, "--val_fraction nan is not between 0 and 1"),
    "--vocab_size 257": (2, BAD, "--vocab_size 257 is not between 258 and 50256"),
    "--vocab_size 50257": (2, BAD, "--vocab_size 50257 is not between 258 and 50256"),
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_ends_in_one_line(empty_folder, capsys, flags):
    expected, text, named = MISTAKES[flags]
    put("text.txt", text)
    with pytest.raises(SystemExit) as ended:
        sys.exit(prepro.main(["--input", "text.txt", *flags.split()]))
    out, err = capsys.readouterr()
    *usage, line = err.splitlines()
    assert (ended.value.code, out, bool(usage)) == (expected, "", expected == 2)
    assert "error: " in line and named in line
    assert os.listdir() == ["text.txt"], "and nothing was written"


def test_tokens_are_replaced_if_asked_to_and_whole(empty_folder, monkeypatch, capsys):
    put("it's my.txt", b"to be, or not to be\n")
    flags = "--input", "~/it's my.txt", "--bytes", "1"
    prepared(capsys, *flags)
    command = prepared(capsys, *flags)  # the same once more is no conflict
    named = ["--model", "bytes", "--input_bin", "data/it's my_train.bin", "--input_val_bin"]
    assert os.name == "nt" or command[2:-1] == named
    put("it's my.txt", b"that is the question")
    errors = OSError("no space is left"), KeyboardInterrupt
    with patch.object(os, "fsync", Mock(side_effect=errors)):
        ends = [prepro.main([*flags, *more]) for more in ((), *[("--replace", "1")] * 2)]
    conflict, *said = capsys.readouterr().err.splitlines()
    assert "data/it's my_train.bin" in conflict and "add --replace 1" in conflict
    assert (ends, said[0]) == ([1, 1, 130], "error: no space is left") and "stopped" in said[1]
    assert bytes(sum(tokens_of("data/it's my"), [])) == b"to be, or not to be\n"
    assert len(os.listdir("data")) == 2
    prepared(capsys, *flags, "--replace", "1", "--output_prefix", "~/data/it's my")
    assert bytes(sum(tokens_of("data/it's my"), [])) == b"that is the question"


def test_old_versions_are_refused_in_one_line():
    for change in ("numpy.__version__ = '2.0.2'", "sys.version_info = 3, 9"):
        run = f"import sys, numpy, runpy; {change}; runpy.run_path({prepro.__file__!r})"
        done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
        told = r"error: (NumPy 2.0.2 is too old: pip|Python .* is too old: install) .*\n"
        assert done.returncode == 1 and re.fullmatch(told, done.stderr)


def test_tiny_shakespeare_has_the_tokens_every_llm_c_user_knows(gpt2, capsys):
    if not os.path.isfile(SHAKESPEARE):
        pytest.skip("needs data/tiny_shakespeare.txt: run prepro, or name it in TINY_SHAKESPEARE")
    text = content(SHAKESPEARE)
    put("data/tiny_shakespeare.txt", text)
    paths = prepro.provide("tiny_shakespeare")
    assert paths == ("data/tiny_shakespeare_train.bin", "data/tiny_shakespeare_val.bin")
    val, train = tokens_of("data/tiny_shakespeare")
    assert (len(val), len(train)) == (32_768, 305_260)
    assert val[:5] == [50256, 5962, 22307, 25, 198] and train[:4] == [9203, 262, 39418, 13]
    spelt = gpt2.decode_bytes([i for i in val + train if i != 50256])
    assert spelt == text and read_token_file(paths[0])[:2] == (50257, 0)

    assert "d2" in prepared(capsys, "--vocab_size", "300")
    vocabulary = prepro.read_vocabulary("data/tiny_shakespeare_300.tiktoken")
    val, _ = tokens_of("data/tiny_shakespeare_300")
    assert b"".join(vocabulary[i] for i in val) == text[:106_657], "llm.c's validation"
    prepared(capsys, "--bytes", "1", "--val_fraction", "0.2")
    assert bytes(tokens_of("data/tiny_shakespeare_bytes")[0]) == text[: len(text) // 5]
    put("data/tiny_shakespeare.txt", text + b"!")
    hint = "is not the original, but is used: delete it to fetch the original\n"
    prepared(capsys, "--vocab_size", "301", err=f"data/tiny_shakespeare.txt {hint}")
    os.remove("data/tiny_shakespeare.txt")
    assert prepro.provide("tiny_shakespeare") == paths, "the tokens are enough"


def test_gpt2s_tokens_of_ones_own_texts(gpt2, capsys):
    put("a.txt", b"to be\n\nor not<|endoftext|>to be")
    put("b.txt", b"that\n\n\nis")
    flags = "--input", "a.txt", "b.txt", "--val_fraction", "0.07"
    marked = " be\n\n<|endoftext|>or not", "to be<|endoftext|>that\n\n<|endoftext|>\nis"
    before, after = (gpt2.encode(part, allowed_special="all") for part in marked)
    assert "gpt2" in prepared(capsys, *flags, "--endoftext", "1")
    assert tokens_of("data/a") == [[50256, 1462], before + [50256] + after]

    hint = "<|endoftext|> in the text is characters here: --endoftext 1 makes it the token\n"
    prepared(capsys, *flags, "--replace", "1", err=hint)
    assert tokens_of("data/a")[1] == before + gpt2.encode_ordinary("<|endoftext|>") + after


# --------------------------------------------------------------------------------------------------
# A vocabulary of one's own, beside a plain one that counts anew for each merge

SAMPLES = """The quick brown fox's jumps; we'll see. 1,024 tokens, a   b  \n\n\n  c \t\t d\r\n
    naïve café, Ångström, e\u0301 \u0308, 東京は日本の首都です。
    我们学习语言模型，我们学习。
    👩‍👩‍👧‍👦🙂🙂🙂 a🙂 aaaa aaaaaaa aaa"""
MIXTURE = content(__file__).decode()[:6000] + SAMPLES * 3


def learn_plainly(text, vocab_size):
    """(the vocabulary, bytes by id, and the ids of the text): each merge counts all pairs anew."""
    words = ["".join(map(chr, word.encode())) for word in regex.findall(prepro.PATTERN, text)]
    vocabulary = [bytes([i]) for i in range(256)]
    for new in range(256, vocab_size - 1):
        pairs = Counter(left + right for word in words for left, right in pairwise(word))
        merged = min(pairs, key=lambda pair: (-pairs[pair], pair))
        vocabulary.append(vocabulary[ord(merged[0])] + vocabulary[ord(merged[1])])
        words = [word.replace(merged, chr(new)) for word in words]
    return vocabulary, list(map(ord, "".join(words)))


LOW = "low\n" * 5 + "lower\n" * 2 + "newest\n" * 6 + "widest\n" * 3
LEARNED = {  # a text: the tokens that are learned from it
    LOW: "es est lo low ew new newest dest idest widest er lower",  # the worked example
    "dc\nba\n": "ba dc",  # of equals that with the smallest left id
    "ba\nbc\nad\n": "ad ba bc",  # and then the smallest right id
    "aaa\nbc\nbc\n": "aa bc aaa",  # overlaps count
    "aaaaa\n" * 2: "aa aaa aaaaa",  # and are merged from left to right
    "ab,ab,": "ab",  # no token spans two words
    "a\n": "",  # no pair at all
}


@pytest.mark.parametrize("text", LEARNED)
def test_what_is_learned(text):
    learned = prepro.learn_vocabulary(text, 1000)
    assert learned == [bytes([i]) for i in range(256)] + LEARNED[text].encode().split()
    assert prepro.learn_vocabulary(text, 258) == learned[:257]


def test_a_mixture_is_learned_and_merged_as_by_a_plain_program():
    vocabulary, expected = learn_plainly(MIXTURE, 500)
    assert prepro.learn_vocabulary(MIXTURE, 500) == vocabulary
    encoding = prepro.encoding_of(vocabulary)
    ids = encoding.encode_ordinary(MIXTURE)
    assert ids == expected and b"".join(vocabulary[i] for i in ids).decode() == MIXTURE
    assert encoding.eot_token == len(vocabulary) == encoding.n_vocab - 1


def test_vocabularies_that_are_none(empty_folder):
    lines = prepro.vocabulary_file([*prepro.BYTES, b"ab", b"bc"]).splitlines()
    assert lines[:2] == [b"AA== 0", b"AQ== 1"]
    pairs = [left + right for left in prepro.BYTES for right in prepro.BYTES]
    many = prepro.vocabulary_file([*prepro.BYTES, *pairs[:-256]]).splitlines()
    wrong = [lines[1:], lines[:256] + lines[257:], [*lines, b"!"], [*lines, b"YWI= x"], many]
    wrong += [[*lines, b"YWI= 258"], [*lines, b"eHl6 258"], [*lines, b"= 258"]]
    for found in wrong:
        put("x.tiktoken", b"\n".join(found))
        refused(lambda: prepro.read_vocabulary("x.tiktoken"), "x.tiktoken", error=InputError)
    put("x.tiktoken", b"\r\n".join(lines))
    assert prepro.read_vocabulary("x.tiktoken")[256:] == [b"ab", b"bc"]


def test_several_texts_in_a_vocabulary_that_is_learned_and_used_again(empty_folder, capsys):
    put("a.txt", b"z" * 40 + b"low lower\n" * 9)
    put("b.txt", b"newest <|endoftext|>widest\n" * 9)
    flags = "--input", "a.txt", "b.txt", "--val_fraction", "0.152", "--endoftext", "1"
    assert "d2" in prepared(capsys, *flags, "--vocab_size", "270")
    trained = "low lower\n" * 9 + "\n" + "newest \nwidest\n" * 9
    vocabulary = prepro.read_vocabulary("data/a.tiktoken")
    assert vocabulary == prepro.learn_vocabulary(trained, 270)
    told = [270, zlib.crc32(content("data/a.tiktoken"))]
    prepro.write_files(prepro.token_files("data/first", trained, "it validates", 270))
    for path in ("data/a_val.bin", "data/first_val.bin"):
        assert list(read_token_file(path)[:2]) == told
    val, train = tokens_of("data/a")
    assert train[0] != 269 and train.count(269) == 10, "between texts only: at b.txt, and at marks"
    text = b"".join([*vocabulary, b"<eot>"][i] for i in val + train)
    assert text == b"z" * 40 + b"low lower\n" * 9 + b"<eot>" + b"newest <eot>widest\n" * 9

    prepared(capsys, "--input", "b.txt", "--vocabulary", "data/a.tiktoken", "--endoftext", "1")
    assert content("data/b.tiktoken") == content("data/a.tiktoken")
    found = len(prepro.learn_vocabulary(trained, 5000)) + 1
    hint = f"the text has pairs for a --vocab_size of {found} only\n"
    assert capsys.readouterr().err == hint
    prepared(capsys, *flags, "--vocab_size", "5000", "--output_prefix", "x", err=hint)
