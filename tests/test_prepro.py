"""Fetching, tokenising and learning a vocabulary: prepro_tinyshakespeare.py."""

import hashlib
import os
import random
import shlex
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import regex
import requests
import tiktoken
from common import NOBODY, VOCABULARY_FILES, VOCABULARY_FOLDER, need_gpt2_vocabulary

import prepro_tinyshakespeare as prepro
from prepro_tinyshakespeare import FetchError, InputError

SHAKESPEARE_TEXT = os.path.abspath(
    os.environ.get("TINY_SHAKESPEARE") or "data/tiny_shakespeare.txt"
)
PLACES = "TIKTOKEN_CACHE_DIR DATA_GYM_CACHE_DIR HF_ENDPOINT HF_HUB_CACHE HF_HOME XDG_CACHE_HOME"
PROXIES = "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy"


def put(path, data):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    return path


def content(path):
    with open(path, "rb") as file:
        return file.read()


def one_line(message, *parts):
    """The message is one line and says all of these."""
    assert message.strip() and "\n" not in message.strip(), message
    assert [part for part in parts if part not in message] == [], message


def refused(call, *parts, error=FetchError):
    """The call ends with just this error, of one line that says all of these."""
    with pytest.raises((InputError, OSError)) as caught:
        call()
    assert type(caught.value) is error
    one_line(str(caught.value), *parts)
    return caught.value


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder, with nobody's caches and without a network."""
    monkeypatch.chdir(tmp_path)
    for name in (PLACES + " " + PROXIES).split():
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(prepro.tempfile, "gettempdir", lambda: "temporary")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # or it would remember GPT-2's
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Fetching, from a server that misbehaves


class Hub(BaseHTTPRequestHandler):
    """A server with one file behind a redirect. Tests make it misbehave."""

    def log_message(self, *args):
        pass

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self):
        hub = self.server
        if not self.path.startswith("/cdn"):
            return self.answer(302, {"Location": "/cdn" + self.path, **hub.linked})
        asked = self.headers["Range"]
        hub.seen.append(asked)
        start = int(asked[6:-1]) if hub.ranges else 0
        if start >= len(BODY):
            return self.answer(416, {})
        rest = BODY[start:]
        status = hub.status or (206 if hub.ranges else 200)
        self.answer(status, {"Content-Type": hub.type, "Content-Length": len(rest)})
        if hub.cuts:
            self.wfile.write(rest[: hub.cuts.pop(0)])
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.wfile.write(rest[:999_999])
        hub.halfway()
        self.wfile.write(rest[999_999:])


@pytest.fixture
def hub(empty_folder):
    """The server. cuts: after how many bytes each connection breaks. seen: the Ranges asked for."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    hub.handle_error = lambda *args: None  # we hang up on a server that offers the wrong thing
    hub.url = f"http://127.0.0.1:{hub.server_port}/model"
    hub.status, hub.ranges, hub.type, hub.linked = None, True, "text/plain", {}
    hub.cuts, hub.seen, hub.halfway = [], [], lambda: None
    threading.Thread(target=hub.serve_forever, args=[0.01]).start()
    yield hub
    hub.shutdown()
    hub.server_close()


BODY = random.Random(1).randbytes(2_500_001)
RIGHT = hashlib.sha256(BODY).hexdigest()
LINKED = {"linked": {"X-Linked-Etag": f'"{RIGHT}"'}}
WRONG = {"linked": {"X-Linked-Etag": f'"{64 * "0"}"'}}
SERVERS = {  # how it behaves: (its attributes, SHA-256 known, file.part before, Ranges, the error)
    "a redirect with the hash": (LINKED, None, b"", [0], []),
    "a redirect with another hash": (WRONG, None, b"", [0], ["another file", "000000000000"]),
    "a redirect without headers": ({}, None, b"", [0], []),
    "cut connections": ({"cuts": [1_200_000, 1_100_000]}, RIGHT, b"", [0, 1_000_000, 2_000_000], []),
    "a part of an earlier run": ({}, RIGHT, BODY[:999], [999], []),
    "all of it from an earlier run": ({}, RIGHT, BODY, [2_500_001], []),
    "a refused range": ({"ranges": False}, RIGHT, BODY[:999], [999], []),
    "a part of another file": ({}, RIGHT, b"x" * 999, [999], ["another file", RIGHT[:12]]),
    "a web page": ({"type": "text/html"}, RIGHT, b"", [0], ["200 OK, text/html"]),
    "no such file": ({"status": 404}, RIGHT, b"", [0], ["404 Not Found"]),
    "nothing": ({"cuts": [0]}, RIGHT, b"", [0], ["no network"]),
}


@pytest.mark.parametrize("behaviour", SERVERS)
def test_a_server(hub, behaviour):
    attributes, sha256, part, starts, said = SERVERS[behaviour]
    vars(hub).update(attributes)
    if part:
        put("data/file.part", part)
    fetch = lambda: prepro.download(hub.url, "data/file", "the file", sha256)
    if said:
        said = [*said, hub.url, "put it at data/file", "train by bytes", "REQUESTS_CA_BUNDLE"]
        error = refused(fetch, *said)
        assert error.cause.startswith("can't fetch the file: ") and len(error.cause) < 100
        assert os.listdir("data") == [], "what is wrong is not kept"
    else:
        assert fetch() == "data/file" and content("data/file") == BODY
        assert os.listdir("data") == ["file"]
        fetch()
    assert hub.seen == [f"bytes={n}-" for n in starts], "and what is there is not fetched again"


def test_a_download_that_breaks_for_good_is_continued_by_the_next_run(hub):
    hub.cuts = [1_200_000, 0]
    fetch = lambda: prepro.download(hub.url, "file", "the file", RIGHT)
    refused(fetch, "no network")
    assert os.listdir() == ["file.part"] and BODY.startswith(content("file.part"))
    fetch()
    assert hub.seen[1:] == ["bytes=1000000-"] * 2 and content("file") == BODY


def test_two_first_runs_at_once_do_not_write_to_the_same_file(hub):
    """The first takes over what is left of an earlier run; both are halfway at the same time."""
    put("file.part", BODY[:999])
    hub.halfway = threading.Barrier(2, timeout=20).wait
    fetch = lambda: prepro.download(hub.url, "file", "the file", RIGHT)
    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hub.seen) == ["bytes=0-", "bytes=999-"]
    assert content("file") == BODY and os.listdir() == ["file"]


def test_files_are_replaced_whole_or_not_at_all(empty_folder, monkeypatch):
    put("x.bin", b"what was there")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError("no space is left")))
    refused(lambda: prepro.write_files({"x.bin": b"new"}), "no space", error=OSError)
    assert content("x.bin") == b"what was there" and os.listdir() == ["x.bin"]


def test_only_what_could_not_be_had_is_a_fetch_error(empty_folder, monkeypatch):
    for what in ("tiny_shakespeare", "gpt2"):
        provide = lambda: prepro.provide(what)
        put("data", b"a file where a folder is needed")
        refused(provide, "data is a file", error=OSError)
        os.remove("data")
        if os.name != "nt":
            os.symlink("nowhere", "data")
            refused(provide, "data is ", "a link to something that is gone", error=OSError)
            os.remove("data")
        refused(provide, "can't fetch", "no network")
    get = Mock(side_effect=requests.exceptions.InvalidSchema("no SOCKS"))
    monkeypatch.setattr(requests, "get", get)
    assert refused(provide).cause == "can't fetch the weights of gpt2: no network (no SOCKS)"
    for name in ("requests", "tiktoken", "regex"):
        monkeypatch.setitem(sys.modules, name, None)  # so Python marks an import that must fail
        learn = lambda: prepro.learned_files("data/x", b"to be", b"or", 300)
        refused(provide if name == "requests" else learn, f"pip install {name}")


def test_ctrl_c_ends_with_130(empty_folder, monkeypatch, capsys):
    monkeypatch.setattr(prepro, "download", Mock(side_effect=KeyboardInterrupt))
    assert prepro.main([]) == 130
    one_line(capsys.readouterr().err, "stopped")


def test_progress_is_counted_every_five_seconds(monkeypatch, capsys):
    clock = iter([0, 1, 5.1, 5.1, 6, 11, 11])  # at the start, after each piece, and when one is said
    monkeypatch.setattr(prepro, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(prepro.counted("abcd", "fetching", 9000)) == list("abcd")
    assert capsys.readouterr().err == "fetching: 2 of 9,000\nfetching: 4 of 9,000\n"


# --------------------------------------------------------------------------------------------------
# Caches


def test_what_is_fetched_lies_in_data(hub, monkeypatch):
    vars(hub).update(LINKED)
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    assert prepro.provide("gpt2-medium") == "data/gpt2-medium.safetensors"
    assert content("data/gpt2-medium.safetensors") == BODY
    named = f"{hub.url}/openai-community/gpt2/resolve/{OURS}/model.safetensors"
    refused(lambda: prepro.provide("gpt2"), "another file", "not 248dfc391186", named)


OURS = prepro.REVISIONS["gpt2"]
OWNER = "openai-community--"
CACHES = {  # (how its place is told, the place, the owner, the revision, where a link points)
    "a link": ({}, ".cache/huggingface/hub", OWNER, OURS, "blob"),
    "a file": ({"XDG_CACHE_HOME": "[c]"}, "[c]/huggingface/hub", OWNER, OURS, ""),
    "of an old name": ({"HF_HOME": "[c]", "XDG_CACHE_HOME": "no"}, "[c]/hub", "", OURS, ""),
    "in a place": ({"HF_HUB_CACHE": "~/c", "HF_HOME": "no"}, "c", OWNER, OURS, ""),
    "not another": ({"HF_HUB_CACHE": "c"}, "c", OWNER, "another", ""),
    "not a link to nothing": ({"HF_HUB_CACHE": "c"}, "c", OWNER, OURS, "nothing"),
}


@pytest.mark.parametrize("case", CACHES)
def test_weights_in_hugging_faces_cache(empty_folder, monkeypatch, capsys, case):
    environment, hub, owner, revision, link = CACHES[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = put(f"{hub}/models--{owner}gpt2/snapshots/{revision}/model.safetensors", b"weights")
    if link and os.name != "nt":
        put(f"{hub}/models--{owner}gpt2/blobs/blob", b"weights")
        os.remove(path)
        os.symlink(f"../../blobs/{link}", path)
    if case.startswith("not "):
        return refused(lambda: prepro.provide("gpt2"), "can't fetch")
    found = prepro.provide("gpt2")
    assert os.path.samefile(found, path) and found.endswith("model.safetensors")
    one_line(capsys.readouterr().err, found)
    put("data/gpt2.safetensors", b"mine")
    assert prepro.provide("gpt2") == "data/gpt2.safetensors", "data/ comes first"


FOLDERS = {  # where tiktoken's files lie: the environment
    "data/tiktoken": {"DATA_GYM_CACHE_DIR": "elsewhere"},
    "mine": {"TIKTOKEN_CACHE_DIR": "mine"},
    "gym": {"DATA_GYM_CACHE_DIR": "gym", "TIKTOKEN_CACHE_DIR": "elsewhere"},
    "temporary/data-gym-cache": {},
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_gpt2s_vocabulary_is_used_where_it_is(empty_folder, monkeypatch, folder):
    need_gpt2_vocabulary()
    for path in VOCABULARY_FILES.values():
        put(f"{folder}/{os.path.basename(path)}", content(path))
    for name, value in FOLDERS[folder].items():
        monkeypatch.setenv(name, value)
    assert prepro.get_encoding().encode_ordinary("hello world") == [31373, 995]
    files = prepro.huggingface_files(50304, None)
    assert files["vocab.json"] == content(VOCABULARY_FILES["encoder.json"])
    assert files["merges.txt"] == content(VOCABULARY_FILES["vocab.bpe"])
    tiktoken.registry.ENCODINGS.clear()
    put(f"{folder}/{os.path.basename(path)}", b"{}")
    refused(prepro.get_encoding, "can't fetch GPT-2's vocabulary: Connection refused")


# --------------------------------------------------------------------------------------------------
# Texts and tokens


def read_token_file(path):
    """A token file as its description says, with nothing of ours: (V, crc32, list of tokens)."""
    data = content(path)
    header = struct.unpack("<256I", data[:1024])
    assert header[:2] == (20240520, 1) and header[5:] == (0,) * 251
    assert len(data) == 1024 + 2 * header[2]
    return *header[3:5], list(struct.unpack(f"<{header[2]}H", data[1024:]))


def tokens_of(prefix):
    """The tokens for validation and those for training, which follow them in the text."""
    return [read_token_file(f"{prefix}_{part}.bin")[2] for part in ("val", "train")]


def prepared(capsys, *flags):
    """main(flags) must end well. Returns the command that it prints."""
    assert prepro.main(list(flags)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    one_line(out, "train on it: python ")
    return out.strip()


TEXT = "to be, or not to be: naïve, 東京\n" * 9


@pytest.mark.parametrize("name", "utf-8 utf-8-sig utf-16 utf-16-be utf-32 shift_jis".split())
def test_text_encodings(empty_folder, capsys, name):
    text = TEXT.replace("ï", "i") if name == "shift_jis" else TEXT
    put("my.txt", text.replace("\n", "\r\n").encode(name))
    flags = [] if name.startswith("utf-8") else ["--encoding", name]
    prepared(capsys, "--input", "my.txt", "--bytes", "1", *flags)
    val, train = tokens_of("data/my")
    assert bytes(val + train) == text.encode() and bytes(train).decode()


def test_several_texts_and_the_command_that_trains_on_them(empty_folder, capsys):
    put("a b.txt", b"to be\n")
    put("c.txt", b"or not to be\n")
    flags = "--input", "~/a b.txt", "c.txt", "--bytes", "1", "--output_prefix", "~/d/x y"
    command = prepared(capsys, *flags, "--val_fraction", "0.6")
    assert list(map(bytes, tokens_of("d/x y"))) == [b"to be\n\nor no", b"t to be\n"]
    paths = [f"{os.path.expanduser('~/d/x y')}_{part}.bin" for part in ("train", "val")]
    words = ["--model", "bytes", "--input_bin", paths[0], "--input_val_bin", paths[1]]
    if os.name != "nt":
        assert shlex.split(command)[-6:] == words


CUTS = {  # the bytes of text.txt: (--val_fraction, what validates, what trains)
    "to be": ("0.5", "to", " be"),
    "é東京": ("0.5", "é", "東京"),
    "to<|endoftext|>be!": ("0.4", "to", "be!"),
    "to<|endoftext|>be?": ("0.5", "to", "be?"),
}


@pytest.mark.parametrize("text", CUTS)
def test_a_cut_parts_no_character_and_leaves_no_end_of_text(empty_folder, capsys, text):
    share, *parts = CUTS[text]
    put("my.txt", text.encode())
    flags = "--bytes", "1", "--endoftext", "1", "--val_fraction", share
    prepared(capsys, "--input", "my.txt", *flags)
    assert [bytes(tokens).decode() for tokens in tokens_of("data/my")] == parts


MISTAKES = {  # what a user does: (the bytes of text.txt, flags, what the message must name)
    "latin-1": (b"na\xefve", [], ["text.txt is not utf-8", "0xef", "position 2", "--encoding"]),
    "utf-16, no mark": (b"t\0o\0", [], ["text.txt", "NUL", "--encoding"]),
    "no encoding": (b"to be", ["--encoding", "klingon"], ["unknown encoding: klingon"]),
    "empty": (b"\xef\xbb\xbf", [], ["0 characters validate, 0 train"]),
    "missing": (b"", ["--input", "nothing.txt"], ["No such file", "nothing.txt"]),
    "a folder": (b"", ["--input", "."], ["directory: '.'"]),
    "too short": (b"to be", ["--bytes", "1"], ["0 characters validate, 5 train", "--val_fraction"]),
    "nowhere to write": (b"x" * 99, ["--bytes", "1", "--output_prefix", "text.txt/x"], ["is a file"]),
    "no vocabulary": (b"to be" * 99, ["--vocabulary", "text.txt"], ["text.txt is no vocabulary"]),
    "no folder's": (b"to be" * 99, ["--vocabulary", "."], ["No such file", "vocab.json"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_exit_code_1(empty_folder, capsys, mistake):
    text, flags, named = MISTAKES[mistake]
    put("text.txt", text)
    assert prepro.main(["--input", "text.txt", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ")
    one_line(err, *named)
    assert os.listdir() == ["text.txt"], "and nothing was written"


SENSELESS = """--inptu x; --inp x; x; --val_fraction much --input x; --val_fraction 1 --input x;
    --val_fraction nan --input x; --bytes 1 --vocab_size 300; --vocab_size 257; --vocab_size 50257"""


@pytest.mark.parametrize("flags", SENSELESS.split(";"))
def test_a_command_line_that_makes_no_sense_ends_with_2(empty_folder, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        prepro.main(flags.split())
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err
    assert os.listdir() == []


def test_tokens_are_replaced_only_if_asked_to(empty_folder, capsys):
    put("my.txt", b"to be, or not to be\n" * 9)
    flags = "--input", "my.txt", "--bytes", "1"
    prepared(capsys, *flags)
    prepared(capsys, *flags)  # the same once more is no conflict
    put("my.txt", b"that is the question\n" * 9)
    assert prepro.main(list(flags)) == 1
    one_line(capsys.readouterr().err, "data/my_train.bin", "--output_prefix", "--replace 1")
    assert b"question" not in bytes(sum(tokens_of("data/my"), []))
    prepared(capsys, *flags, "--replace", "1")
    assert bytes(sum(tokens_of("data/my"), [])) == b"that is the question\n" * 9


def test_old_versions_are_refused_in_one_line(empty_folder):
    def error(change):
        words = f"{change}; import runpy; runpy.run_path({prepro.__file__!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
        assert done.returncode == 1
        one_line(done.stderr)
        return done.stderr

    told = error("import numpy; numpy.__version__ = '2.0.2'")
    assert told == 'error: NumPy 2.0.2 is too old: pip install -U "numpy>=2.1"\n'
    assert "install Python 3.10 or newer" in error("import sys; sys.version_info = (3, 9, 1)")


def test_tiny_shakespeare_has_the_tokens_every_llm_c_user_knows(empty_folder, monkeypatch, capsys):
    need_gpt2_vocabulary()
    if not os.path.isfile(SHAKESPEARE_TEXT):
        pytest.skip(
            "needs data/tiny_shakespeare.txt: run `python prepro_tinyshakespeare.py`, "
            "or name the text in TINY_SHAKESPEARE"
        )
    text = content(SHAKESPEARE_TEXT)
    put("data/tiny_shakespeare.txt", text)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY_FOLDER)
    paths = prepro.provide("tiny_shakespeare")
    assert paths == ("data/tiny_shakespeare_train.bin", "data/tiny_shakespeare_val.bin")
    val, train = tokens_of("data/tiny_shakespeare")
    assert (len(val), len(train)) == (32_768, 305_260)
    assert val[:5] == [50256, 5962, 22307, 25, 198] and train[:4] == [9203, 262, 39418, 13]
    spelt = prepro.get_encoding().decode_bytes([i for i in val + train if i != 50256])
    assert spelt == text and read_token_file(paths[0])[:2] == (50257, 0)
    os.remove("data/tiny_shakespeare.txt")
    assert prepro.provide("tiny_shakespeare") == paths, "the tokens are enough"

    put("data/tiny_shakespeare.txt", text)
    assert "--model d2 " in prepared(capsys, "--vocab_size", "300")
    vocabulary = prepro.read_vocabulary("data/tiny_shakespeare_300.tiktoken")
    val, _ = tokens_of("data/tiny_shakespeare_300")
    assert b"".join(vocabulary[i] for i in val) == text[:106_657], "llm.c's validation"
    prepared(capsys, "--bytes", "1", "--val_fraction", "0.2")
    assert bytes(tokens_of("data/tiny_shakespeare_own")[0]) == text[: len(text) // 5]


def test_gpt2s_tokens_of_ones_own_texts(empty_folder, monkeypatch, capsys):
    need_gpt2_vocabulary()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY_FOLDER)
    put("a.txt", b"to be\n\nor not<|endoftext|>to be")
    put("b.txt", b"that\n\n\nis")
    flags = "--input", "a.txt", "b.txt", "--val_fraction", "0.07"
    gpt2 = prepro.get_encoding()
    marked = " be\n\n<|endoftext|>or not", "to be<|endoftext|>that\n\n<|endoftext|>\nis"
    before, after = (gpt2.encode(part, allowed_special="all") for part in marked)
    assert "--model gpt2 " in prepared(capsys, *flags, "--endoftext", "1")
    assert tokens_of("data/a") == [[50256, 1462], before + [50256] + after]

    assert prepro.main([*flags, "--replace", "1"]) == 0
    one_line(capsys.readouterr().err, "--endoftext 1 makes it the token")
    spelt = gpt2.encode_ordinary("<|endoftext|>")
    assert tokens_of("data/a") == [[50256, 1462], before + spelt + after]


# --------------------------------------------------------------------------------------------------
# A vocabulary of one's own, beside a plain one that counts anew for each merge

SAMPLES = [
    "The quick brown fox's jumps; we'll see. 1,024 tokens",
    "naïve café, Ångström, e\u0301 \u0308",
    "東京は日本の首都です。我们学习语言模型，我们学习。",
    "👩‍👩‍👧‍👦🙂🙂🙂 a🙂",
    "a   b  \n\n\n  c \t\t d\r\n ",
    "aaaa aaaaaaa aaa",
]
MIXTURE = content(__file__).decode()[:6000] + "".join(SAMPLES) * 3


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


LEARNED = {  # what is learned from a text: (the text, the tokens that are no single bytes)
    "the worked example": (
        "low\n" * 5 + "lower\n" * 2 + "newest\n" * 6 + "widest\n" * 3,
        "es est lo low ew new newest dest idest widest er lower",
    ),
    "equals: the smallest left id": ("dc\nba\n", "ba dc"),
    "equals: then the smallest right id": ("ba\nbc\nad\n", "ad ba bc"),
    "overlaps count": ("aaa\nbc\nbc\n", "aa bc aaa"),
    "from left to right": ("aaaaa\n" * 2, "aa aaa aaaaa"),
    "no token spans two words": ("ab,ab,", "ab"),
    "no pair at all": ("a\n", ""),
}


@pytest.mark.parametrize("example", LEARNED)
def test_what_is_learned(example):
    text, tokens = LEARNED[example]
    learned = prepro.learn_vocabulary(text, 1000)
    assert learned == [bytes([i]) for i in range(256)] + tokens.encode().split()
    assert prepro.learn_vocabulary(text, 258) == learned[:257]


def test_a_mixture_is_learned_and_merged_as_by_a_plain_program():
    vocabulary, expected = learn_plainly(MIXTURE, 500)
    assert prepro.learn_vocabulary(MIXTURE, 500) == vocabulary
    encoding = prepro.encoding_of(vocabulary)
    ids = encoding.encode_ordinary(MIXTURE)
    assert ids == expected and b"".join(vocabulary[i] for i in ids).decode() == MIXTURE
    assert encoding.eot_token == len(vocabulary) == encoding.n_vocab - 1


def test_gpt2s_ranks_through_this_path_give_gpt2s_ids(empty_folder, monkeypatch):
    need_gpt2_vocabulary()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY_FOLDER)
    gpt2 = prepro.get_encoding()
    vocabulary = [gpt2.decode_single_token_bytes(i) for i in range(50256)]
    ours = prepro.encoding_of(vocabulary)
    assert ours.encode_ordinary(MIXTURE) == gpt2.encode_ordinary(MIXTURE)
    put("model/vocab.json", content(VOCABULARY_FILES["encoder.json"]))
    assert prepro.read_vocabulary("model") == vocabulary, "as Hugging Face writes it"
    put("gpt2.tiktoken", prepro.vocabulary_file(vocabulary))
    assert prepro.read_vocabulary("gpt2.tiktoken") == vocabulary


def test_vocabularies_that_are_none(empty_folder):
    lines = prepro.vocabulary_file([*prepro.BYTES, b"ab", b"bc"]).splitlines()
    many = [b"%s %d" % (prepro.b64encode(b"%06d" % n), n) for n in range(258, 65536)]
    wrong = [lines[1:], lines[:256] + lines[257:], [*lines, b"!"], [*lines, b"YWI= x"]]
    wrong += [lines + many, [*lines, b"YWI= 258"], [*lines, b"eHl6 258"], [*lines, b"= 258"]]
    for found in wrong:
        put("x.tiktoken", b"\n".join(found))
        refused(lambda: prepro.read_vocabulary("x.tiktoken"), "x.tiktoken", error=InputError)
    put("x.tiktoken", b"\r\n".join(lines))
    assert prepro.read_vocabulary("x.tiktoken")[256:] == [b"ab", b"bc"]


def test_a_vocabulary_is_learned_from_the_training_part_and_used_again(empty_folder, capsys):
    put("a.txt", b"z" * 40 + b"low lower\n" * 9)
    put("b.txt", b"newest <|endoftext|>widest\n" * 9)
    flags = "--input", "a.txt", "b.txt", "--val_fraction", "0.152", "--endoftext", "1"
    assert "--model d2 " in prepared(capsys, *flags, "--vocab_size", "270")
    data = content("data/a.tiktoken")
    assert data.startswith(b"AA== 0\nAQ== 1\n") and data.count(b"\n") == 269
    vocabulary = prepro.read_vocabulary("data/a.tiktoken")
    trained = "low lower\n" * 9 + "\n" + "newest \nwidest\n" * 9
    assert vocabulary == prepro.learn_vocabulary(trained, 270)
    val, train = tokens_of("data/a")
    V, crc32, _ = read_token_file("data/a_train.bin")
    assert (V, crc32) == (270, zlib.crc32(data))
    assert train[0] != 269 and train.count(269) == 10, "between texts only: at b.txt, and at marks"
    text = b"".join([*vocabulary, b"<eot>"][i] for i in val + train)
    assert text == b"z" * 40 + b"low lower\n" * 9 + b"<eot>" + b"newest <eot>widest\n" * 9

    prepared(capsys, "--input", "b.txt", "--vocabulary", "data/a.tiktoken", "--endoftext", "1")
    assert content("data/b.tiktoken") == data
    assert read_token_file("data/b_val.bin")[:2] == (V, crc32)
    assert prepro.main([*flags, "--vocab_size", "5000", "--output_prefix", "x"]) == 0
    one_line(capsys.readouterr().err, f"{len(prepro.read_vocabulary('x.tiktoken')) + 1} only")


def test_two_texts_in_a_vocabulary_learned_from_the_first(empty_folder):
    training, validation = "to be, é, or\n" * 40, "not to be\n\nto be\n"
    texts = training.encode(), validation.encode()
    paths = prepro.learned_files("data/first", *texts, 270)
    assert paths == ("data/first_train.bin", "data/first_val.bin")
    vocabulary = prepro.read_vocabulary("data/first.tiktoken")
    assert vocabulary == prepro.learn_vocabulary(training, 270)
    decoded = [b"".join(vocabulary[i] for i in read_token_file(path)[2]) for path in paths]
    assert tuple(decoded) == texts
