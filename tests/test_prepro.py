"""Fetching and tokenising: prepro_tinyshakespeare.py, with a hub that misbehaves."""

import hashlib
import io
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from common import VOCABULARY_FILES, VOCABULARY_FOLDER, need_gpt2_vocabulary

import prepro_tinyshakespeare as prepro
from train_gpt2 import InputError

SHAKESPEARE_TEXT = os.path.abspath(
    os.environ.get("TINY_SHAKESPEARE") or "data/tiny_shakespeare.txt"
)


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def sha256_of(data):
    return hashlib.sha256(data).hexdigest()


def closed_port():
    """The number of a port of this machine where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder, with nobody's caches and proxies, and without waiting between
    attempts."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "TIKTOKEN_CACHE_DIR",
        "HF_ENDPOINT",
        *PROXIES,
        *(name.lower() for name in PROXIES),
    ):
        monkeypatch.setenv(
            name, ""
        )  # so that what a test leaves behind is undone, even where it was not set
        monkeypatch.delenv(name)
    monkeypatch.setattr(prepro, "RETRY_WAIT", 0)
    return tmp_path


def cut_the_network(monkeypatch):
    """No network, wherever the tests run: all of it goes through a proxy that is not there."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")


@pytest.fixture
def hub(empty_folder):
    """A hub with one file, hub.body. Tests set its other attributes to make it misbehave.

    cuts: after how many bytes each connection breaks. linked: headers of the first response. seen:
    the requests, as (path, Range). sent: bytes."""
    hub = SimpleNamespace(
        body=random.Random(1).randbytes(700_001),
        content_type="application/octet-stream",
        status=200,
        ranges="honoured",
        tell_length=True,
        linked={},
        cuts=[],
        seen=[],
        sent=0,
    )

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, headers, body=b""):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers and hub.tell_length:
                self.send_header("Content-Length", str(len(body)))
            if not hub.tell_length:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            self.wfile.write(body)
            hub.sent += len(body)

        def do_GET(self):
            asked = self.headers.get("Range")
            hub.seen.append((self.path, asked))
            assert self.headers["Accept-Encoding"] == "identity"
            if hub.status != 200:
                return self.answer(hub.status, {"Content-Type": "text/html"}, b"<html>no</html>")
            if not self.path.startswith("/cdn/"):
                return self.answer(302, {"Location": "/cdn" + self.path, **hub.linked})
            start, status, headers = 0, 200, {"Content-Type": hub.content_type}
            if asked and hub.ranges != "ignored":
                start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
                if start >= len(hub.body):
                    return self.answer(416, {"Content-Range": f"bytes */{len(hub.body)}"})
                start -= (
                    hub.ranges == "shifted"
                )  # a broken server: one byte too early, and it says so
                headers["Content-Range"] = f"bytes {start}-{len(hub.body) - 1}/{len(hub.body)}"
            rest, cut = hub.body[start:], hub.cuts.pop(0) if hub.cuts else None
            if cut is None:
                return self.answer(status, headers, rest)
            headers["Content-Length"] = str(len(rest))
            self.answer(status, headers, rest[:cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # we hang up on a server that offers the wrong thing
    hub.url = f"http://127.0.0.1:{server.server_port}/model"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def link(hub):
    """Let the hub announce its file in the first response, as Hugging Face does."""
    hub.linked = {"X-Linked-Etag": f'"{sha256_of(hub.body)}"', "X-Linked-Size": str(len(hub.body))}


def content(path):
    with open(path, "rb") as f:
        return f.read()


def put(path, data):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)
    return path


def one_line(message, *parts):
    """The message is one line and says all of these."""
    assert message.strip() and "\n" not in message.strip(), message
    for part in parts:
        assert part in message, f"{part!r} is missing in: {message}"


def refused(call, *parts):
    """The call ends with an InputError of one line that says all of these. Returns the line."""
    with pytest.raises(InputError) as caught:
        call()
    one_line(str(caught.value), *parts)
    return str(caught.value)


def test_download_follows_the_redirect_and_fetches_once(hub, capsys):
    link(hub)
    for _ in range(2):
        assert prepro.download(hub.url, "data/deep/file") == "data/deep/file"
        assert content("data/deep/file") == hub.body
    assert hub.seen == [("/model", None), ("/cdn/model", None)] and hub.sent == len(hub.body)
    assert os.listdir("data/deep") == ["file"]
    assert capsys.readouterr() == ("", ""), "quiet where stderr is no terminal"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("source", ["the caller", "the hub"])
def test_connections_cut_anywhere_are_resumed(hub, seed, source):
    rng = random.Random(seed)
    hub.cuts = [
        rng.randrange(prepro.CHUNK, 300_000),
        rng.randrange(300_000),
        rng.randrange(300_000),
    ]
    known = (sha256_of(hub.body), len(hub.body)) if source == "the caller" else link(hub) or ()
    prepro.download(hub.url, "file", *known)
    assert content("file") == hub.body and os.listdir() == ["file"]
    starts = [
        int(asked[6:-1]) if asked else 0 for path, asked in hub.seen if path.startswith("/cdn")
    ]
    assert len(starts) == 4 and starts == sorted(starts) and starts[1] > 0, "none begins anew"
    assert hub.sent <= len(hub.body) + 3 * prepro.CHUNK, "and hardly anything comes twice"


def test_a_download_that_breaks_for_good_is_continued_by_the_next_run(hub, monkeypatch):
    digest = sha256_of(hub.body)
    hub.cuts = [150_000] + [0] * 99
    refused(
        lambda: prepro.download(hub.url, "file", digest),
        hub.url,
        "broke 8 times",
        "put it at file",
        "are kept",
    )
    kept = content("file.part")
    assert 150_000 - prepro.CHUNK <= len(kept) <= 150_000 and hub.body.startswith(kept)
    assert os.listdir() == ["file.part"]
    assert len(hub.seen) == 2 * prepro.ATTEMPTS
    hub.cuts, hub.seen = [], []
    prepro.download(hub.url, "file", digest)
    assert hub.seen[-1] == ("/cdn/model", f"bytes={len(kept)}-") and content("file") == hub.body
    assert os.listdir() == ["file"]


def test_a_connection_that_brings_nothing_is_not_tried_again(hub):
    hub.cuts = [0] * 99
    refused(
        lambda: prepro.download(hub.url, "file", sha256_of(hub.body)), hub.url, "put it at file"
    )
    assert len(hub.seen) == 2 and not os.path.exists("file")


@pytest.mark.parametrize("ranges", ["honoured", "ignored", "shifted"])
@pytest.mark.parametrize("part", ["beginning", "all", "too long"])
def test_what_an_earlier_run_left_behind_is_continued_or_started_anew(hub, capsys, ranges, part):
    hub.ranges = ranges
    put(
        "file.part",
        {"beginning": hub.body[:1000], "all": hub.body, "too long": hub.body + b"!"}[part],
    )
    prepro.download(hub.url, "file", sha256_of(hub.body), len(hub.body))
    assert content("file") == hub.body and os.listdir() == ["file"]
    assert capsys.readouterr().err == "", (
        "the answer's headers told; nothing was put together wrongly first"
    )
    if ranges == "honoured":
        assert (
            hub.sent
            == {"beginning": len(hub.body) - 1000, "all": 0, "too long": len(hub.body)}[part]
        )
    else:
        assert hub.sent >= len(hub.body) - (part == "all" and ranges == "shifted") * len(hub.body)


def test_a_part_of_another_file_is_noticed_and_fetched_from_the_start(hub, capsys):
    put("file.part", b"x" * 1000)
    prepro.download(hub.url, "file", sha256_of(hub.body))
    assert content("file") == hub.body and os.listdir() == ["file"]
    assert [asked for path, asked in hub.seen if path.startswith("/cdn")] == ["bytes=1000-", None]
    one_line(capsys.readouterr().err, "file.part", "from the start")


def test_a_part_is_only_trusted_where_a_hash_will_judge_it(hub):
    put("file.part", b"x" * 1000)
    prepro.download(hub.url, "file", None, len(hub.body))
    assert content("file") == hub.body


def test_a_part_is_not_continued_with_a_file_of_another_size(hub):
    put("file.part", hub.body[:1000])
    refused(
        lambda: prepro.download(hub.url, "file", sha256_of(hub.body), 700_000),
        "offers 700001 bytes",
        "expected 700000",
    )
    assert len(content("file.part")) == 1000


def test_a_download_is_on_the_disk_before_it_becomes_real(hub, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, call=call: calls.append(name) or call(*args)
        )
    prepro.download(hub.url, "file")
    assert calls[:2] == ["fsync", "replace"]
    assert os.name == "nt" or calls[2:] == ["fsync"], (
        "the folder, which now has it under its new name"
    )


def test_the_hash_in_the_first_response_judges_what_comes(hub):
    link(hub)
    hub.body = hub.body[:-1] + bytes([hub.body[-1] ^ 1])
    refused(
        lambda: prepro.download(hub.url, "file"),
        hub.url,
        "SHA-256",
        hub.linked["X-Linked-Etag"].strip('"'),
    )
    assert os.listdir() == []


REFUSALS = {  # how the hub misbehaves: (its attributes, what the message must name)
    "404": (dict(status=404), ["404 Not Found"]),
    "401": (dict(status=401), ["401 Unauthorized"]),
    "403": (dict(status=403), ["403 Forbidden"]),
    "500": (dict(status=500), ["500"]),
    "a web page": (dict(content_type="text/html; charset=utf-8"), ["web page", "log in"]),
    "another file": (dict(body=bytes(700_001)), ["SHA-256", "expected"]),
    "a short file": (dict(body=bytes(1000)), ["1000 bytes", "expected 700001"]),
    "a long file": (dict(body=bytes(800_000)), ["800000 bytes", "expected 700001"]),
    "a short file of untold length": (dict(body=bytes(1000), tell_length=False), ["ended early"]),
    "a long file of untold length": (
        dict(body=bytes(800_000), tell_length=False),
        ["800000 bytes", "expected 700001"],
    ),
    "another file announced": (
        dict(linked={"X-Linked-Etag": '"' + "0" * 64 + '"'}),
        ["offers SHA-256 000", "expected"],
    ),
    "another size announced": (
        dict(linked={"X-Linked-Size": "7"}),
        ["offers 7 bytes", "expected 700001"],
    ),
    "a part nobody asked for": (dict(status=206), ["206"]),
    "nothing at all": (dict(body=b""), ["offers 0 bytes"]),
}


@pytest.mark.parametrize("misbehaviour", REFUSALS)
def test_a_file_that_is_not_the_one_expected_never_becomes_real(hub, misbehaviour):
    attributes, named = REFUSALS[misbehaviour]
    good = dict(vars(hub), seen=[], linked={})
    vars(hub).update(attributes)

    def fetch():
        return prepro.download(hub.url, "data/file", sha256_of(good["body"]), len(good["body"]))

    refused(fetch, hub.url, "put it at data/file", *named)
    assert not os.path.exists("data/file")
    vars(hub).update(good)  # and whatever was left behind does no harm
    assert content(fetch()) == good["body"] and os.listdir("data") == ["file"]


def test_an_empty_answer_is_no_file_even_if_nothing_is_known_of_it(hub):
    hub.body = b""
    refused(lambda: prepro.download(hub.url, "file"), hub.url, "0 bytes")
    assert os.listdir() == []


def test_the_size_alone_is_verified_where_no_hash_is_known(hub):
    hub.tell_length = False
    refused(
        lambda: prepro.download(hub.url, "file", None, 700_000), "700001 bytes", "expected 700000"
    )
    assert os.listdir() == []


def test_no_server_no_name_no_address(empty_folder):
    url = f"http://127.0.0.1:{closed_port()}/model"
    line = refused(lambda: prepro.download(url, "file"), url, "put it at file")
    assert "refused" in line and "HTTPConnectionPool" not in line, (
        "the system's own words, unwrapped"
    )
    refused(lambda: prepro.download("nonsense", "file"), "nonsense", "put it at file")
    assert os.listdir() == []


def test_the_disk_refuses(hub):
    put("data", b"a file where a folder is needed")
    refused(lambda: prepro.download(hub.url, "data/file"), hub.url, "put it at data/file")


@pytest.mark.parametrize("name", ["requests", "tiktoken"])
def test_a_missing_package_is_named_with_its_remedy(empty_folder, monkeypatch, name):
    monkeypatch.setitem(
        sys.modules, name, None
    )  # which is how Python marks an import that must fail
    call = (
        prepro.get_encoding
        if name == "tiktoken"
        else lambda: prepro.download("http://localhost", "x")
    )
    refused(call, f"pip install {name}")


def test_stopping_a_download_keeps_what_has_come(hub, monkeypatch, capsys):
    whole_watch = prepro.watched

    def stopped(pieces, *args):
        for piece in whole_watch(pieces, *args):
            yield piece
            raise KeyboardInterrupt

    monkeypatch.setattr(prepro, "SHAKESPEARE", hub.url)
    monkeypatch.setattr(prepro, "SHAKESPEARE_SHA256", sha256_of(hub.body))
    monkeypatch.setattr(prepro, "SHAKESPEARE_SIZE", len(hub.body))
    monkeypatch.setattr(prepro, "watched", stopped)
    assert prepro.main([]) == 130
    one_line(capsys.readouterr().err, "stopped")
    assert os.listdir("data") == ["tiny_shakespeare.txt.part"]
    assert content("data/tiny_shakespeare.txt.part") == hub.body[: prepro.CHUNK]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress_is_shown_on_a_terminal_only(monkeypatch, stderr):
    clock = iter([0.0, 0.5, 2.0, 2.1, 4.0])  # at the start, and after each of four pieces
    monkeypatch.setattr(prepro, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(prepro.sys, "stderr", stderr)
    pieces = [bytes(1_000_000)] * 4
    assert list(prepro.watched(iter(pieces), "fetching", 1_000_000, 10_000_000)) == pieces
    shown = [line.strip() for line in stderr.getvalue().split("\r")]
    assert shown == (
        [
            "",
            "fetching: 3.0 MB, 1.0 MB/s, 30%, 7 s left",
            "fetching: 5.0 MB, 1.0 MB/s, 50%, 5 s left",
        ]
        if stderr.isatty()
        else [""]
    )


# Weights


def test_weights_come_from_the_endpoint_the_user_named(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.removesuffix("/model") + "/mirror/")
    for name, (revision, sha256, size) in dict(prepro.WEIGHTS).items():
        known = sha256 and sha256_of(hub.body), size and len(hub.body)
        monkeypatch.setitem(prepro.WEIGHTS, name, (revision, *known))
        link(hub)
        hub.seen = []
        assert prepro.fetch_weights(name) == f"data/{name}.safetensors"
        assert hub.seen[0] == (
            f"/mirror/openai-community/{name}/resolve/{revision}/model.safetensors",
            None,
        )
        assert content(f"data/{name}.safetensors") == hub.body
        hub.status = 500  # from now on they are there
        assert prepro.fetch_weights(name) == f"data/{name}.safetensors"
        hub.status = 200


def test_the_hub_s_wrong_weights_are_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.removesuffix("/model"))
    link(hub)  # 700,001 bytes are not GPT-2
    refused(
        lambda: prepro.fetch_weights("gpt2"),
        "put it at data/gpt2.safetensors",
        "expected 248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    )
    assert os.listdir("data") == []


def test_weights_at_hand_are_checked_by_size(empty_folder, monkeypatch):
    put("data/gpt2.safetensors", bytes(1000))
    refused(
        lambda: prepro.fetch_weights("gpt2"),
        "data/gpt2.safetensors",
        "1000 bytes",
        "expected 548105171",
        "delete",
    )
    assert len(content("data/gpt2.safetensors")) == 1000, "it is the user's to delete"
    refused(lambda: prepro.fetch_weights("gpt3"), "gpt3", "gpt2-medium")


# The vocabulary


def test_no_vocabulary_and_no_network(empty_folder, monkeypatch):
    cut_the_network(monkeypatch)
    refused(prepro.get_encoding, "gpt-2/encodings/main/vocab.bpe", "put it at data/tiktoken/")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "elsewhere")
    refused(prepro.get_encoding, "vocab.bpe", "put it at elsewhere/")


def test_a_damaged_vocabulary_is_never_used(empty_folder, monkeypatch, capsys):
    cut_the_network(monkeypatch)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", "what an earlier test has loaded")
    path = put(
        "data/tiktoken/" + os.path.basename(VOCABULARY_FILES["vocab.bpe"]), b"#version: 0.2\nh e\n"
    )
    refused(prepro.get_encoding, "vocab.bpe", f"put it at {path}")
    one_line(capsys.readouterr().err, path, "damaged")
    assert not os.path.exists(path)


def test_what_tiktoken_can_not_load_is_said_in_one_line(empty_folder, monkeypatch):
    cut_the_network(monkeypatch)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken's way to say: no cache, try the network
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    refused(prepro.get_encoding, "tiktoken", "TIKTOKEN_CACHE_DIR")


def test_the_vocabulary_is_fetched_once_and_stays_in_data(hub, monkeypatch):
    need_gpt2_vocabulary()
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)  # or it would remember
    download, fetched = prepro.download, []

    def from_our_hub(url, path, sha256):
        name = url.removeprefix(prepro.VOCABULARY)
        hub.body = content(VOCABULARY_FILES[name])
        fetched.append(name)
        return download(hub.url, path, sha256)

    monkeypatch.setattr(prepro, "download", from_our_hub)
    assert prepro.get_encoding().n_vocab == 50257
    assert fetched == ["vocab.bpe", "encoder.json"] and len(hub.seen) == 4
    monkeypatch.setattr(prepro, "download", download)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2")
    cut_the_network(monkeypatch)
    assert prepro.get_encoding().encode_ordinary("hello world") == [31373, 995]
    assert os.listdir() == ["data"] and sorted(os.listdir("data/tiktoken")) == sorted(
        os.path.basename(path) for path in VOCABULARY_FILES.values()
    )


# Tokens: a small vocabulary, real in all but its size, needs no network. Ids 0 to 255 are the
# bytes.


def small_encoding():
    merges = [b"th", b"the", b" t", b" the", b"\n\n", b"or", "é".encode(), b"to", b"be"]
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    return tiktoken.Encoding(
        "small",
        pat_str=r" ?\p{L}+| ?[^\s\p{L}]+|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 265},
    )


@pytest.fixture
def small_vocabulary(empty_folder, monkeypatch):
    encoding = small_encoding()
    monkeypatch.setattr(prepro, "get_encoding", lambda: encoding)
    return encoding


def test_encode_text_by_hand():
    # the small vocabulary has "to", "be", "or" and " the" in one piece, and so the blank line; "
    # be" not
    tokens = prepro.encode_text("to be\n\nor the", small_encoding())
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [265, 263, ord(" "), 264, 260, 265, 261, 259]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "\n\n",
        "a\n\n",
        "a\n\nb",
        "\n\na\n\n\nb\n\n\n\nc",
        "é\n\n\n",
        "the to be or\n not\n\nthe",
    ],
)
def test_encode_text_equals_tiktoken_on_the_text_with_the_marks_written_in(text):
    encoding = small_encoding()
    marked = "<|endoftext|>" + text.replace("\n\n", "\n\n<|endoftext|>")
    assert prepro.encode_text(text, encoding).tolist() == encoding.encode(
        marked, allowed_special="all"
    )


def test_a_text_can_not_forge_the_end_of_text():
    encoding, text = small_encoding(), "a <|endoftext|> b"
    tokens = prepro.encode_text(text, encoding).tolist()
    assert tokens.count(265) == 1 and tokens[0] == 265 and encoding.decode(tokens[1:]) == text


def test_encode_text_refuses_ids_beyond_uint16():
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i, j]): 256 + 256 * i + j for i in range(256) for j in range(256)}
    huge = tiktoken.Encoding(
        "huge", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 65792}
    )
    refused(lambda: prepro.encode_text("a", huge), "65793", "65536")


def read_token_file(path):
    """llm.c's token file as its description says, with nothing of ours: (version, list of
    tokens)."""
    data = content(path)
    header = struct.unpack("<256i", data[:1024])
    assert header[0] == 20240520 and header[3:] == (0,) * 253 and len(data) == 1024 + 2 * header[2]
    return header[1], list(struct.unpack(f"<{header[2]}H", data[1024:]))


def test_write_tokens_byte_for_byte(empty_folder):
    tokens = [0, 1, 255, 256, 50256, 65535]
    for kind in (np.uint16, np.int64, ">i4", list):
        prepro.write_tokens("data/x.bin", tokens if kind is list else np.array(tokens, kind))
        assert read_token_file("data/x.bin") == (1, tokens)
        assert content("data/x.bin")[1024:] == bytes.fromhex("0000 0100 ff00 0001 50c4 ffff")
        assert os.listdir("data") == ["x.bin"]


@pytest.mark.parametrize("tokens", [[], np.zeros(0, int), [65536], [-1], [0.5], [[1, 2]]])
def test_write_tokens_refuses_what_does_not_fit(empty_folder, tokens):
    put("x.bin", b"what was there")
    refused(lambda: prepro.write_tokens("x.bin", tokens), "x.bin", "0 to 65535")
    assert content("x.bin") == b"what was there"


def test_files_are_replaced_whole_or_not_at_all(empty_folder, monkeypatch):
    put("x.bin", b"what was there")

    def no_room(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError):
        prepro.write_tokens("x.bin", [1, 2, 3])
    with pytest.raises(OSError):
        prepro.write_tokenizer("x.bin", small_encoding())
    assert content("x.bin") == b"what was there" and os.listdir() == ["x.bin"]


def read_tokenizer_file(path):
    """llm.c's tokenizer file as its description says: (version, end of text's id, the tokens'
    bytes)."""
    data, tokens, at = content(path), [], 1024
    magic, version, n, eot, *rest = struct.unpack("<256i", data[:1024])
    assert magic == 20240328 and rest == [0] * 252
    for _ in range(n):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    assert at == len(data)
    return version, eot, tokens


def test_write_tokenizer_byte_for_byte(empty_folder):
    prepro.write_tokenizer("data/t.bin", small_encoding())
    version, eot, tokens = read_tokenizer_file("data/t.bin")
    assert (version, eot, len(tokens), tokens[265]) == (2, 265, 266, b"<|endoftext|>")
    assert tokens[:256] == [bytes([i]) for i in range(256)]
    assert tokens[257] == b"the" and tokens[262] == b"\xc3\xa9"
    ids = prepro.encode_text("to be\n\nor thé", small_encoding())
    assert b"".join(tokens[i] for i in ids).decode() == "<|endoftext|>to be\n\n<|endoftext|>or thé"


def test_write_tokenizer_refuses_a_token_too_long_for_its_length_byte(empty_folder):
    ranks = {bytes([i]): i for i in range(256)} | {b"a" * 256: 256}
    long = tiktoken.Encoding(
        "long", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )
    refused(lambda: prepro.write_tokenizer("t.bin", long), "t.bin", "255 bytes")
    assert os.listdir() == []


# Tiny Shakespeare

FIRST_AND_LAST_TOKENS = {
    "train": (
        305_260,
        [9203, 262, 39418, 13, 628, 50256, 22747, 49208, 805, 25],
        [338, 83, 198, 1199, 2915, 14210, 1242, 23137, 13, 198],
    ),
    "val": (
        32_768,
        [50256, 5962, 22307, 25, 198, 8421, 356, 5120, 597, 2252],
        [30, 628, 50256, 44879, 40, 3535, 1565, 2937, 25, 198],
    ),
}


def test_tiny_shakespeare_has_the_tokens_every_llm_c_user_knows(empty_folder, monkeypatch, capsys):
    need_gpt2_vocabulary()
    if not os.path.isfile(SHAKESPEARE_TEXT):
        pytest.skip(
            "needs data/tiny_shakespeare.txt: run `python prepro_tinyshakespeare.py`, "
            "or name the text in TINY_SHAKESPEARE"
        )
    text = content(SHAKESPEARE_TEXT)
    assert (sha256_of(text), len(text)) == (prepro.SHAKESPEARE_SHA256, prepro.SHAKESPEARE_SIZE)
    put("data/tiny_shakespeare.txt", text)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY_FOLDER)
    cut_the_network(monkeypatch)
    assert prepro.main([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "305,260 tokens" in out and "32,768 tokens" in out
    for part, (n, first, last) in FIRST_AND_LAST_TOKENS.items():
        version, tokens = read_token_file(f"data/tiny_shakespeare_{part}.bin")
        assert (version, len(tokens), tokens[:10], tokens[-10:]) == (1, n, first, last)
    version, eot, tokens = read_tokenizer_file("data/gpt2_tokenizer.bin")
    assert (version, eot, len(tokens), tokens[31373], tokens[995]) == (
        2,
        50256,
        50257,
        b"hello",
        b" world",
    )
    ids = [
        i
        for part in ("val", "train")
        for i in read_token_file(f"data/tiny_shakespeare_{part}.bin")[1]
    ]
    assert b"".join(tokens[i] for i in ids if i != eot) == text, "and they spell the text"


def fake_shakespeare(hub, monkeypatch):
    """Let the hub serve a text of 40,000 bytes as Tiny Shakespeare. Returns the text."""
    hub.body = b"".join(b"%d bottles\n" % i for i in range(2693))[:40_000]
    monkeypatch.setattr(prepro, "SHAKESPEARE", hub.url)
    monkeypatch.setattr(prepro, "SHAKESPEARE_SHA256", sha256_of(hub.body))
    monkeypatch.setattr(prepro, "SHAKESPEARE_SIZE", len(hub.body))
    hub.content_type = "text/plain; charset=utf-8"
    return hub.body


def test_preparing_fetches_what_is_missing_and_only_that(hub, small_vocabulary, monkeypatch):
    text = fake_shakespeare(hub, monkeypatch)
    paths = ("data/tiny_shakespeare_train.bin", "data/tiny_shakespeare_val.bin")
    hub.body = text[::-1]
    refused(prepro.prepare_tinyshakespeare, "SHA-256", "put it at data/tiny_shakespeare.txt")
    hub.body = text
    assert (
        prepro.prepare_tinyshakespeare() == paths and content("data/tiny_shakespeare.txt") == text
    )
    written = [content(path) for path in paths]
    val, train = read_token_file(paths[1])[1], read_token_file(paths[0])[1]
    assert (
        len(val) == 32_768
        and val + train == prepro.encode_text(text.decode(), small_vocabulary).tolist()
    )

    hub.status = 500  # from here on there is no help from outside
    before = [os.stat(path).st_mtime_ns for path in paths]
    assert prepro.prepare_tinyshakespeare() == paths
    assert [os.stat(path).st_mtime_ns for path in paths] == before, "whole files are left alone"
    for broken in (written[0][:-2], written[0] + b"xx", written[0][:100], b"", None):
        put(paths[0], broken) if broken is not None else os.remove(paths[0])
        assert (
            prepro.prepare_tinyshakespeare() == paths
            and [content(path) for path in paths] == written
        )
    os.remove("data/tiny_shakespeare.txt")
    os.rename("data", "moved")
    put(paths[0], written[0])
    put(paths[1], written[1])
    assert prepro.prepare_tinyshakespeare() == paths, "the tokens alone are enough"
    os.remove(paths[1])
    refused(prepro.prepare_tinyshakespeare, hub.url, "500", "put it at data/tiny_shakespeare.txt")


def test_another_text_in_its_place_is_used_and_announced(empty_folder, small_vocabulary, capsys):
    put("data/tiny_shakespeare.txt", b"x" * 33_000)
    prepro.prepare_tinyshakespeare()
    one_line(capsys.readouterr().err, "data/tiny_shakespeare.txt", "not the original")
    assert len(read_token_file("data/tiny_shakespeare_train.bin")[1]) == 33_001 - 32_768
    put("data/tiny_shakespeare.txt", b"too short")
    os.remove("data/tiny_shakespeare_train.bin")
    refused(prepro.prepare_tinyshakespeare, "tokens")


# The command line


@pytest.mark.parametrize(
    "flags, prefix, n_val",
    [
        ([], "data/my", 3),
        (["--val_fraction", ".5"], "data/my", 16),
        (["--output_prefix", "o/x"], "o/x", 3),
    ],
)
def test_a_text_of_ones_own(empty_folder, small_vocabulary, capsys, flags, prefix, n_val):
    put("my.txt", "\ufeffto be\r\n\r\nor thé, the to be <|endoftext|>.\n".encode())
    assert prepro.main(["--input", "my.txt", *flags]) == 0
    tokens = prepro.encode_text(
        "to be\n\nor thé, the to be <|endoftext|>.\n", small_vocabulary
    ).tolist()
    assert len(tokens) == 32
    assert read_token_file(f"{prefix}_val.bin") == (1, tokens[:n_val])
    assert read_token_file(f"{prefix}_train.bin") == (1, tokens[n_val:])
    out, err = capsys.readouterr()
    assert (
        out == f"{prefix}_train.bin: {32 - n_val} tokens\n{prefix}_val.bin: {n_val} tokens\n"
        and err == ""
    )


MISTAKES = {  # what a user does: (the bytes of text.txt, flags, what the message must name)
    "not UTF-8": ("na\xefve".encode("latin-1"), [], ["text.txt", "0xef", "position 2", "UTF-8"]),
    "UTF-16": ("to be".encode("utf-16"), [], ["text.txt", "0xff", "position 0", "UTF-8"]),
    "empty": (b"", [], ["text.txt", "empty"]),
    "blank": (b"\xef\xbb\xbf \r\n\n", [], ["text.txt", "empty"]),
    "missing": (None, [], ["text.txt", "no such file"]),
    "fraction 0": (b"to be", ["--val_fraction", "0"], ["--val_fraction", "0.0", "between 0 and 1"]),
    "fraction 1": (b"to be", ["--val_fraction", "1"], ["--val_fraction", "1.0", "between 0 and 1"]),
    "fraction -0.1": (b"to be", ["--val_fraction=-0.1"], ["--val_fraction", "-0.1"]),
    "fraction nan": (b"to be", ["--val_fraction", "nan"], ["--val_fraction", "nan"]),
    "nothing to validate with": (
        b"to be",
        ["--val_fraction", "0.1"],
        ["0 of 4 tokens", "--val_fraction"],
    ),
    "nowhere to write": (b"to be" * 99, ["--output_prefix", "text.txt/x"], ["text.txt"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_exit_code_1(
    empty_folder, small_vocabulary, capsys, mistake
):
    text, flags, named = MISTAKES[mistake]
    before = [os.path.basename(put("text.txt", text))] if text is not None else []
    assert prepro.main(["--input", "text.txt", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ")
    one_line(err, *named)
    assert os.listdir() == before, "and nothing was written"


def run_prepro(*flags):
    environment = dict(os.environ, HTTPS_PROXY=f"http://127.0.0.1:{closed_port()}")
    return subprocess.run(
        [sys.executable, prepro.__file__, *flags],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        env=environment,
    )


def test_the_program_itself_without_a_network(empty_folder):
    ran = run_prepro()
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.startswith("error: ")
    one_line(ran.stderr, prepro.SHAKESPEARE, "put it at data/tiny_shakespeare.txt")
    assert os.listdir("data") == []


def test_the_program_itself_on_the_command_line(empty_folder):
    ran = run_prepro("--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "python prepro_tinyshakespeare.py --input my.txt" in ran.stdout


@pytest.mark.parametrize(
    "flags",
    [
        ["--inptu", "x"],
        ["--val_fraction", "much", "--input", "x"],
        ["x"],
        ["--val_fraction", "0.2"],
        ["--output_prefix", "x"],
        ["--inp", "x"],
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_2(empty_folder, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        prepro.main(flags)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err and os.listdir() == []
