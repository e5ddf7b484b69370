"""Fetching and tokenising: prepro_tinyshakespeare.py, with a hub that misbehaves."""

import hashlib
import io
import os
import random
import re
import shlex
import shutil
import signal
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
from prepro_tinyshakespeare import InputError

SHAKESPEARE_TEXT = os.path.abspath(
    os.environ.get("TINY_SHAKESPEARE") or "data/tiny_shakespeare.txt"
)


posix_only = pytest.mark.skipif(
    os.name == "nt",
    reason="Windows has no such signals and streams: run python -m pytest on Linux or macOS",
)


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def names(folder="."):
    """What lies in a folder. Windows keeps a lock's empty file."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


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
        "HF_HUB_CACHE",
        *PROXIES,
        *(name.lower() for name in PROXIES),
    ):
        monkeypatch.setenv(
            name, ""
        )  # so that what a test leaves behind is undone, even where it was not set
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr(prepro, "RETRY_WAIT", 0)
    return tmp_path


def cut_the_network(monkeypatch):
    """No network, wherever the tests run: all of it goes through a proxy that is not there."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")


@pytest.fixture
def hub(empty_folder):
    """A hub with one file, hub.body. Tests set its other attributes to make it misbehave.

    cuts: after how many bytes each connection breaks. gate: an event for which the hub waits after
    half of the file, when it has set `half`. linked: headers of the first response. seen:
    the requests, as (path, Range). sent: bytes."""
    hub = SimpleNamespace(
        body=random.Random(1).randbytes(700_001),
        content_type="application/octet-stream",
        status=200,
        ranges="honoured",
        tell_length=True,
        linked={},
        cuts=[],
        gate=None,
        half=threading.Event(),
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
                headers["Content-Range"] = f"bytes {start}-{len(hub.body) - 1}/{len(hub.body)}"
            rest, cut = hub.body[start:], hub.cuts.pop(0) if hub.cuts else None
            if hub.gate is not None:
                headers["Content-Length"] = str(len(rest))
                self.answer(status, headers, rest[: len(rest) // 2])
                self.wfile.flush()
                hub.half.set()
                hub.gate.wait(30)
                return self.wfile.write(rest[len(rest) // 2 :])
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
    assert names("data/deep") == ["file"]
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
    assert content("file") == hub.body and names() == ["file"]
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
        "the connection broke",
        "put it at file",
    )
    kept = content("file.part")
    assert 150_000 - prepro.CHUNK <= len(kept) <= 150_000 and hub.body.startswith(kept)
    assert names() == ["file.part"]
    assert len(hub.seen) == 2 * prepro.ATTEMPTS
    hub.cuts, hub.seen = [], []
    prepro.download(hub.url, "file", digest)
    assert hub.seen[-1] == ("/cdn/model", f"bytes={len(kept)}-") and content("file") == hub.body
    assert names() == ["file"]


def test_a_connection_that_brings_nothing_is_not_tried_again(hub):
    hub.cuts = [0] * 99
    refused(
        lambda: prepro.download(hub.url, "file", sha256_of(hub.body)), hub.url, "put it at file"
    )
    assert len(hub.seen) == 2 and not os.path.exists("file")


@pytest.mark.parametrize("ranges", ["honoured", "ignored"])
@pytest.mark.parametrize("part", ["beginning", "all"])
def test_what_an_earlier_run_left_behind_is_continued_or_started_anew(hub, capsys, ranges, part):
    hub.ranges = ranges
    put("file.part", hub.body[:1000] if part == "beginning" else hub.body)
    prepro.download(hub.url, "file", sha256_of(hub.body), len(hub.body))
    assert content("file") == hub.body and names() == ["file"]
    assert capsys.readouterr().err == ""
    if ranges == "honoured":
        assert hub.sent == (len(hub.body) - 1000 if part == "beginning" else 0)


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * 800_000], ids=["short", "too long"])
def test_a_part_of_another_file_is_noticed_and_fetched_anew_by_the_next_run(hub, part):
    put("file.part", part)
    fetch = lambda: prepro.download(hub.url, "file", sha256_of(hub.body))
    refused(fetch, "another file came", "try again")
    assert names() == []
    assert content(fetch()) == hub.body and names() == ["file"]


def test_a_part_is_only_trusted_where_a_hash_will_judge_it(hub):
    put("file.part", b"x" * 1000)
    prepro.download(hub.url, "file", None, len(hub.body))
    assert content("file") == hub.body


def test_a_download_is_on_the_disk_before_it_becomes_real(hub, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, call=call: calls.append(name) or call(*args)
        )
    prepro.download(hub.url, "file")
    assert calls == ["fsync", "replace"]


def test_the_hash_in_the_first_response_judges_what_comes(hub):
    link(hub)
    hub.body = hub.body[:-1] + bytes([hub.body[-1] ^ 1])
    refused(
        lambda: prepro.download(hub.url, "file"),
        hub.url,
        "SHA-256",
        hub.linked["X-Linked-Etag"][1:13],
    )
    assert names() == []


REFUSALS = {  # how the hub misbehaves: (its attributes, what the message must name)
    "404": (dict(status=404), ["404 Not Found"]),
    "401": (dict(status=401), ["401 Unauthorized"]),
    "403": (dict(status=403), ["403 Forbidden"]),
    "500": (dict(status=500), ["500"]),
    "a web page": (dict(content_type="text/html; charset=utf-8"), ["web page", "log in"]),
    "another file": (dict(body=bytes(700_001)), ["another file", "SHA-256", "expected"]),
    "a short file": (dict(body=bytes(1000)), ["another file"]),
    "a long file": (dict(body=bytes(800_000)), ["another file"]),
    "a short file of untold length": (
        dict(body=bytes(1000), tell_length=False),
        ["another file"],
    ),
    "nothing at all": (dict(body=b""), ["ended early"]),
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
    assert content(fetch()) == good["body"] and names("data") == ["file"]


def test_a_connection_cut_where_nothing_is_known_of_the_file(hub):
    """It begins anew, and nothing is put together."""
    hub.cuts = [300_000]
    assert content(prepro.download(hub.url, "file")) == hub.body
    assert None in {asked for path, asked in hub.seen[2:]} and names() == ["file"]


def test_no_server_no_name_no_address(empty_folder):
    url = f"http://127.0.0.1:{closed_port()}/model"
    line = refused(lambda: prepro.download(url, "file"), url, "put it at file")
    assert "refused" in line and "HTTPConnectionPool" not in line, (
        "the system's own words, unwrapped"
    )
    refused(lambda: prepro.download("nonsense", "file"), "nonsense", "put it at file")
    assert names() == []


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

    fake_shakespeare(hub, monkeypatch)
    monkeypatch.setattr(prepro, "CHUNK", 1000)
    monkeypatch.setattr(prepro, "watched", stopped)
    assert prepro.main([]) == 130
    one_line(capsys.readouterr().err, "stopped")
    assert names("data") == ["tiny_shakespeare.txt.part"]
    assert content("data/tiny_shakespeare.txt.part") == hub.body[:1000]


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
        assert prepro.provide(name) == f"data/{name}.safetensors"
        assert hub.seen[0] == (
            f"/mirror/openai-community/{name}/resolve/{revision}/model.safetensors",
            None,
        )
        assert content(f"data/{name}.safetensors") == hub.body
        hub.status = 500  # from now on they are there
        assert prepro.provide(name) == f"data/{name}.safetensors"
        hub.status = 200


def test_the_hub_s_wrong_weights_are_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url.removesuffix("/model"))
    link(hub)  # 700,001 bytes are not GPT-2
    refused(
        lambda: prepro.provide("gpt2"),
        "put it at data/gpt2.safetensors",
        "another file",
        "expected 248dfc391186",
    )
    assert names("data") == []


def test_weights_at_hand_are_checked_by_size(empty_folder, monkeypatch):
    put("data/gpt2.safetensors", bytes(1000))
    refused(
        lambda: prepro.provide("gpt2"),
        "data/gpt2.safetensors",
        "1000 bytes",
        "expected 548105171",
        "delete",
    )
    assert len(content("data/gpt2.safetensors")) == 1000, "it is the user's to delete"
    refused(lambda: prepro.provide("gpt3"), "gpt3", "gpt2-medium")


# Hugging Face's cache


CACHES = {  # how its place is told: (the environment, the folder)
    "HF_HUB_CACHE": ({"HF_HUB_CACHE": "[c]/hub", "HF_HOME": "elsewhere"}, "[c]/hub"),
    "HF_HOME": ({"HF_HOME": "[c]"}, "[c]/hub"),
    "nothing": ({"HF_HOME": "", "HOME": ".", "USERPROFILE": "."}, ".cache/huggingface/hub"),
}


def forge_cache(hub, name, body, blob=None, revision=None, owner="openai-community--"):
    """What Hugging Face's programs leave behind: a file, and a link to it. Returns the link."""
    blob_path = put(f"{hub}/models--{owner}{name}/blobs/{blob or sha256_of(body)}", body)
    revision = revision or prepro.WEIGHTS[name][0]
    link_path = f"{hub}/models--{owner}{name}/snapshots/{revision}/model.safetensors"
    os.makedirs(os.path.dirname(link_path))
    try:
        os.symlink(f"../../blobs/{os.path.basename(blob_path)}", link_path)
    except OSError:
        pytest.skip("this system lets nobody make a link: run it on Linux or macOS")
    return link_path


def know(monkeypatch, name, body, sha256=True):
    """Let the weights of that name be these bytes."""
    revision = prepro.WEIGHTS[name][0]
    known = (sha256_of(body), len(body)) if sha256 else (None, None)
    monkeypatch.setitem(prepro.WEIGHTS, name, (revision, *known))


@pytest.mark.parametrize("owner", ["openai-community--", ""])
@pytest.mark.parametrize("place", CACHES)
def test_weights_in_hugging_faces_cache_are_used(empty_folder, monkeypatch, capsys, place, owner):
    cut_the_network(monkeypatch)
    environment, folder = CACHES[place]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    know(monkeypatch, "gpt2", b"weights")
    path = forge_cache(folder, "gpt2", b"weights", revision="another", owner=owner)
    found = prepro.provide("gpt2")
    assert os.path.samefile(found, path) and found.endswith("model.safetensors")
    one_line(capsys.readouterr().err, "gpt2", found)
    put("data/gpt2.safetensors", b"WEIGHTS")
    assert prepro.provide("gpt2") == "data/gpt2.safetensors", "data/ comes first"


def test_weights_of_unknown_sha256_are_used_under_our_revision_only(empty_folder, monkeypatch):
    cut_the_network(monkeypatch)
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    know(monkeypatch, "gpt2-medium", b"", sha256=False)
    forge_cache("hub", "gpt2-medium", b"weights", revision="another")
    refused(lambda: prepro.provide("gpt2-medium"), "can't fetch the weights of gpt2-medium")
    path = forge_cache("hub", "gpt2-medium", b"weights")
    assert os.path.samefile(prepro.provide("gpt2-medium"), path)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fault", ["size", "name", "broken link"])
def test_what_is_wrong_in_hugging_faces_cache_is_not_used(empty_folder, monkeypatch, fault, known):
    cut_the_network(monkeypatch)
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    know(monkeypatch, "gpt2", b"weights", known)
    body = b"weight" if fault == "size" and known else b"weights"
    blob = "model.safetensors" if fault == "name" or not known else sha256_of(b"weights")
    path = forge_cache("hub", "gpt2", body, blob)
    if fault == "broken link":
        os.remove(os.path.realpath(path))
    refused(lambda: prepro.provide("gpt2"), "can't fetch the weights of gpt2")


def test_a_folder_that_can_not_be_written_is_said_in_one_line(empty_folder):
    put("data", b"a file where a folder is needed")
    for what in ("tiny_shakespeare", "vocabulary", "gpt2"):
        refused(lambda what=what: prepro.provide(what), "data")


def test_the_cause_alone_is_short(empty_folder, monkeypatch):
    cut_the_network(monkeypatch)
    for what in ("tiny_shakespeare", "vocabulary", "gpt2-medium"):
        with pytest.raises(InputError) as caught:
            prepro.provide(what)
        cause = caught.value.cause
        assert cause.startswith("can't fetch ") and "no network (Connection refused)" in cause
        assert len(cause) <= 100 and str(caught.value).startswith(cause + ": ")
        assert "--bytes 1" in str(caught.value) and "--model bytes" in str(caught.value)


# The vocabulary


def test_no_vocabulary_and_no_network(empty_folder, monkeypatch):
    cut_the_network(monkeypatch)
    refused(prepro.get_encoding, "gpt-2/encodings/main/vocab.bpe", "put it at data/tiktoken/")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    refused(prepro.get_encoding, "vocab.bpe", "put it at data/tiktoken/")
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


def test_the_vocabulary_is_fetched_once_and_stays_in_data(hub, monkeypatch):
    need_gpt2_vocabulary()
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)  # or it would remember
    download, fetched = prepro.download, []

    def from_our_hub(url, path, sha256, what):
        name = url.removeprefix(prepro.VOCABULARY)
        hub.body = content(VOCABULARY_FILES[name])
        fetched.append(name)
        return download(hub.url, path, sha256, what=what)

    monkeypatch.setattr(prepro, "download", from_our_hub)
    assert prepro.get_encoding().n_vocab == 50257
    assert fetched == ["vocab.bpe", "encoder.json"] and len(hub.seen) == 4
    monkeypatch.setattr(prepro, "download", download)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2")
    cut_the_network(monkeypatch)
    assert prepro.get_encoding().encode_ordinary("hello world") == [31373, 995]
    assert prepro.provide("vocabulary") == "data/tiktoken"
    assert names() == ["data"] and names("data/tiktoken") == sorted(
        os.path.basename(path) for path in VOCABULARY_FILES.values()
    )


def test_a_damaged_vocabulary_is_fetched_again(hub, monkeypatch, capsys):
    monkeypatch.setattr(prepro, "VOCABULARY", hub.url.removesuffix("model"))
    right = sha256_of(hub.body)
    monkeypatch.setattr(prepro, "VOCABULARY_SHA256", {"a": right, "b": right})
    folder = prepro.provide("vocabulary")
    assert folder == "data/tiktoken" and len(names(folder)) == 2 and len(hub.seen) == 4
    damaged = put(f"{folder}/{names(folder)[0]}", hub.body[:-1])
    assert prepro.provide("vocabulary") == folder and content(damaged) == hub.body
    one_line(capsys.readouterr().err, damaged, "damaged")
    assert len(hub.seen) == 6, "the other one stays"


def test_a_vocabulary_that_is_there_needs_neither_tiktoken_nor_a_network(empty_folder):
    need_gpt2_vocabulary()
    code = "import sys, prepro_tinyshakespeare as prepro; print(prepro.provide('vocabulary')); "
    code += "assert not {'tiktoken', 'requests'} & set(sys.modules)"
    ran = run_prepro(
        driver=["-c", code],
        TIKTOKEN_CACHE_DIR=VOCABULARY_FOLDER,
        PYTHONPATH=os.path.dirname(prepro.__file__),
    )
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, VOCABULARY_FOLDER, "")


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


@pytest.mark.parametrize("text", ["a<|endoftext|>b", "<|endoftext|>a\n\n<|endoftext|>b\n\nc"])
def test_the_mark_in_a_text_is_the_token_if_asked_for(text):
    encoding = small_encoding()
    tokens = prepro.encode_text(text, encoding, endoftext=True)
    marked = text.replace("\n\n", "\n\n<|endoftext|>").replace(2 * "<|endoftext|>", "<|endoftext|>")
    marked = "<|endoftext|>" + marked.removeprefix("<|endoftext|>")
    assert tokens.tolist() == encoding.encode(marked, allowed_special="all")


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
    assert header[0] == 20240520 and header[4:] == (0,) * 252 and len(data) == 1024 + 2 * header[2]
    return header[1], list(struct.unpack(f"<{header[2]}H", data[1024:]))


def tokens_of(prefix):
    """All tokens of a text, in its order."""
    return read_token_file(f"{prefix}_val.bin")[1] + read_token_file(f"{prefix}_train.bin")[1]


def test_write_tokens_byte_for_byte(empty_folder):
    tokens = [0, 1, 255, 256, 50256, 65535]
    for kind in (np.uint16, np.int64, ">i4", list):
        prepro.write_tokens("data/x.bin", tokens if kind is list else np.array(tokens, kind))
        assert read_token_file("data/x.bin") == (1, tokens)
        assert content("data/x.bin")[1024:] == bytes.fromhex("0000 0100 ff00 0001 50c4 ffff")
        assert names("data") == ["x.bin"]


@pytest.mark.parametrize("tokens", [[], np.zeros(0, int), [65536], [-1], [0.5], [[1, 2]]])
def test_write_tokens_refuses_what_does_not_fit(empty_folder, tokens):
    put("x.bin", b"what was there")
    refused(lambda: prepro.write_tokens("x.bin", tokens), "x.bin", "0 to 65535")
    assert content("x.bin") == b"what was there"


def test_files_are_replaced_whole_or_not_at_all(empty_folder, monkeypatch):
    put("x.bin", b"what was there")

    def no_room(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "fsync", no_room)
        with pytest.raises(OSError):
            prepro.write_tokens("x.bin", [1, 2, 3])
    assert content("x.bin") == b"what was there"
    prepro.write_tokens("x.bin", [1, 2, 3])
    assert names() == ["x.bin"]


@pytest.mark.parametrize("vocab_size", [0, 256, 50257])
def test_a_token_file_says_its_vocabularys_size(empty_folder, vocab_size):
    prepro.write_tokens("x.bin", [0, 255], vocab_size)
    assert struct.unpack("<4i", content("x.bin")[:16]) == (20240520, 1, 2, vocab_size)
    if vocab_size:
        too_high = f"0 to {vocab_size - 1}"
        refused(lambda: prepro.write_tokens("x.bin", [0, vocab_size], vocab_size), too_high)


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
        assert struct.unpack("<4i", content(f"data/tiny_shakespeare_{part}.bin")[:16])[3] == 50257
    assert len(names("data")) == 3, "the text and its tokens"
    ids = [i for i in tokens_of("data/tiny_shakespeare") if i != 50256]
    spelt = tiktoken.get_encoding("gpt2").decode_bytes(ids)
    assert spelt == text, "and they spell the text"


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
    tokens = lambda: prepro.provide("tiny_shakespeare")
    refused(tokens, "another file", "put it at data/tiny_shakespeare.txt")
    hub.body = text
    assert (
        prepro.provide("tiny_shakespeare") == paths and content("data/tiny_shakespeare.txt") == text
    )
    written = [content(path) for path in paths]
    val, train = read_token_file(paths[1])[1], read_token_file(paths[0])[1]
    assert (
        len(val) == 32_768
        and val + train == prepro.encode_text(text.decode(), small_vocabulary).tolist()
    )

    hub.status = 500  # from here on there is no help from outside
    before = [os.stat(path).st_mtime_ns for path in paths]
    assert prepro.provide("tiny_shakespeare") == paths
    assert [os.stat(path).st_mtime_ns for path in paths] == before, "whole files are left alone"
    for broken in (written[0][:-2], written[0] + b"xx", written[0][:100], b"", None):
        put(paths[0], broken) if broken is not None else os.remove(paths[0])
        assert (
            prepro.provide("tiny_shakespeare") == paths
            and [content(path) for path in paths] == written
        )
    os.remove("data/tiny_shakespeare.txt")
    os.rename("data", "moved")
    put(paths[0], written[0])
    put(paths[1], written[1])
    assert prepro.provide("tiny_shakespeare") == paths, "the tokens alone are enough"
    os.remove(paths[1])
    refused(tokens, hub.url, "500", "put it at data/tiny_shakespeare.txt")


def test_another_text_in_its_place_is_used_and_announced(empty_folder, small_vocabulary, capsys):
    put("data/tiny_shakespeare.txt", b"x" * 33_000)
    prepro.provide("tiny_shakespeare")
    one_line(capsys.readouterr().err, "data/tiny_shakespeare.txt", "not the original")
    assert len(read_token_file("data/tiny_shakespeare_train.bin")[1]) == 33_001 - 32_768
    put("data/tiny_shakespeare.txt", b"too short")
    os.remove("data/tiny_shakespeare_train.bin")
    refused(lambda: prepro.provide("tiny_shakespeare"), "expected ids")


# The command line


@pytest.mark.parametrize(
    "flags, prefix, n_val",
    [
        ([], "data/my", 3),
        (["--val_fraction", ".5"], "data/my", 15),
        (["--output_prefix", "o/x"], "o/x", 3),
    ],
)
def test_a_text_of_ones_own(empty_folder, small_vocabulary, capsys, flags, prefix, n_val):
    put("my.txt", "\ufeffto be\r\n\r\nor thé, the to be <|endoftext>.\n".encode())
    assert prepro.main(["--input", "my.txt", *flags]) == 0
    tokens = prepro.encode_text(
        "to be\n\nor thé, the to be <|endoftext>.\n", small_vocabulary
    ).tolist()
    assert len(tokens) == 31
    assert read_token_file(f"{prefix}_val.bin") == (1, tokens[:n_val])
    assert read_token_file(f"{prefix}_train.bin") == (1, tokens[n_val:])
    out, err = capsys.readouterr()
    assert (
        out == f"{prefix}_train.bin: {31 - n_val} tokens\n{prefix}_val.bin: {n_val} tokens\n"
        and err == ""
    )


MISTAKES = {  # what a user does: (the bytes of text.txt, flags, what the message must name)
    "not UTF-8": ("na\xefve".encode("latin-1"), [], ["text.txt", "0xef", "position 2", "UTF-8"]),
    "UTF-16": ("to be".encode("utf-16"), [], ["text.txt", "-f UTF-16 -t UTF-8"]),
    "UTF-16, the other way": (
        b"\xfe\xff" + "to be".encode("utf-16-be"),
        [],
        ["text.txt", "-f UTF-16 -t UTF-8"],
    ),
    "UTF-16 without a mark": ("to be".encode("utf-16-le"), [], ["-f UTF-16LE -t UTF-8"]),
    "UTF-16, the other way, without": ("to be".encode("utf-16-be"), [], ["-f UTF-16BE -t UTF-8"]),
    "a NUL": (b"to be\0" * 99, ["--bytes", "1"], ["text.txt", "NUL"]),
    "no text at all": (bytes(range(256)) * 9, ["--bytes", "1"], ["text.txt", "NUL"]),
    "empty": (b"", [], ["text.txt", "empty"]),
    "blank": (b"\xef\xbb\xbf \r\n\n", [], ["text.txt", "empty"]),
    "missing": (None, [], ["text.txt", "No such file"]),
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
    assert names() == before, "and nothing was written"


def run_prepro(*flags, before=(), driver=(), **environment):
    """The program as a user runs it, without a network. before: what stands before `python`."""
    proxy = {"HTTPS_PROXY": f"http://127.0.0.1:{closed_port()}"}
    return subprocess.run(
        [*before, sys.executable, *driver, *(() if driver else [prepro.__file__]), *flags],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=60,
        env={**os.environ, **proxy, **environment},
    )


def test_the_program_itself_without_a_network(empty_folder):
    ran = run_prepro()
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.startswith("error: ")
    one_line(ran.stderr, prepro.SHAKESPEARE, "put it at data/tiny_shakespeare.txt")
    assert names("data") == []


def test_the_program_itself_on_the_command_line(empty_folder):
    ran = run_prepro("--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "python prepro_tinyshakespeare.py --input my.txt" in ran.stdout


def test_the_help_needs_no_docstrings(empty_folder):
    ran = run_prepro("--help", driver=["-OO", prepro.__file__])
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "python prepro_tinyshakespeare.py --input my.txt" in ran.stdout


AWKWARD = "[D]  it's" if os.name == "nt" else "[D]  *it's?"


def test_brackets_and_stars_in_a_path_and_the_printed_command(empty_folder):
    """The error names a command, and this very command works."""
    flags = ("--input", f"{AWKWARD}/my.txt", "--output_prefix", f"{AWKWARD}/my", "--bytes", "1")
    put(f"{AWKWARD}/my.txt", b"to be, or not to be\n" * 9)
    assert run_prepro(*flags).returncode == 0
    put(f"{AWKWARD}/my.txt", b"that is the question\n" * 9)
    ran = run_prepro(*flags)
    assert ran.returncode == 1
    one_line(ran.stderr, "choose another --output_prefix", "--replace 1")
    program, script, *again = shlex.split(ran.stderr.split("replace it: ")[1])
    assert (program, script) == ("python", prepro.__file__) and again[: len(flags)] == list(flags)
    ran = run_prepro(*again)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert bytes(tokens_of(f"{AWKWARD}/my")) == b"that is the question\n" * 9


def test_a_changed_text_replaces_its_tokens_if_asked_to(empty_folder):
    put("my.txt", b"to be, or not to be\n" * 9)
    flags = ("--input", "my.txt", "--bytes", "1")
    assert run_prepro(*flags).returncode == 0
    before = content("data/my_train.bin")
    assert run_prepro(*flags).returncode == 0, "the same once more is no conflict"
    put("my.txt", b"that is the question\n" * 9)
    ran = run_prepro(*flags)
    assert ran.returncode == 1 and content("data/my_train.bin") == before
    one_line(ran.stderr, "data/my_train.bin", "--replace 1")
    assert run_prepro(*flags, "--replace", "1").returncode == 0
    assert bytes(tokens_of("data/my")) == b"that is the question\n" * 9


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_the_printed_conversion_of_utf_16_works(empty_folder, encoding):
    text = "to be, or not to be: naïve\n" * 9
    put("a b.txt", text.encode(encoding))
    ran = run_prepro("--input", "a b.txt", "--bytes", "1")
    assert ran.returncode == 1 and names() == ["a b.txt"]
    one_line(ran.stderr, "a b.txt", "iconv -f UTF-16", "-t UTF-8 'a b.txt' > utf8.txt")
    if shutil.which("iconv") and os.name != "nt":
        subprocess.run(["sh", "-c", ran.stderr[ran.stderr.index("iconv") :]], check=True)
        assert run_prepro("--input", "utf8.txt", "--bytes", "1").returncode == 0
        assert bytes(tokens_of("data/utf8")).decode() == text


def test_the_mark_in_a_text_is_announced_once_and_can_be_the_token(empty_folder):
    need_gpt2_vocabulary()
    vocabulary = {"TIKTOKEN_CACHE_DIR": VOCABULARY_FOLDER}
    put("my.txt", b"to be<|endoftext|>or not to be\n" * 9)
    ran = run_prepro("--input", "my.txt", **vocabulary)
    assert ran.returncode == 0
    one_line(ran.stderr, "my.txt", "<|endoftext|>", "--endoftext 1")
    assert read_token_file("data/my_val.bin")[1].count(50256) == 1, "the one at the beginning"
    assert struct.unpack("<4i", content("data/my_val.bin")[:16])[3] == 50257

    flags = ("--input", "my.txt", "--endoftext", "1", "--replace", "1")
    ran = run_prepro(*flags, **vocabulary)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert tokens_of("data/my").count(50256) == 10

    ran = run_prepro("--input", "my.txt", "--endoftext", "1", "--bytes", "1")
    assert ran.returncode == 2 and "--endoftext 1 needs GPT-2's vocabulary" in ran.stderr
    ran = run_prepro("--input", "my.txt", "--output_prefix", "data/b", "--bytes", "1")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert struct.unpack("<4i", content("data/b_val.bin")[:16])[3] == 256


HURRIED = """if True:  # the program, whose every hundredth of a second is a second
    import runpy, sys, time
    monotonic = time.monotonic
    time.monotonic = lambda: 100 * monotonic()
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@posix_only
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_closed_stream_is_no_reason_to_fail(empty_folder, closed):
    need_gpt2_vocabulary()
    if "/dev/full" in closed and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full: run it on Linux")
    put("my.txt", b"to be, or not to be\n\n" * 10_000)
    ran = run_prepro(
        "--input", "my.txt",
        before=["sh", "-c", f'exec "$0" "$@" {closed}'],
        driver=["-c", HURRIED, prepro.__file__],
        TIKTOKEN_CACHE_DIR=VOCABULARY_FOLDER,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(tokens_of("data/my")) == 90_001 and names("data") == ["my_train.bin", "my_val.bin"]


@pytest.mark.parametrize("name", ["naïve", "\udcff"], ids=["not ASCII", "not UTF-8"])
def test_a_name_that_stdout_can_not_print(empty_folder, name):
    try:
        put(f"{name}.txt", b"to be, or not to be\n" * 9)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names: run it on Linux")
    encoding = "ascii" if name.isprintable() else "utf-8:strict"
    ran = run_prepro("--input", f"{name}.txt", "--bytes", "1", PYTHONIOENCODING=encoding)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count(" tokens\n") == 2 and len(names("data")) == 2


# Two processes


FROM_OUR_HUB = """if True:  # the program, with our hub's text as Tiny Shakespeare and no words
    import sys
    import tiktoken
    import prepro_tinyshakespeare as prepro
    url, sha256, size = sys.argv[1:]
    prepro.SHAKESPEARE, prepro.SHAKESPEARE_SHA256, prepro.SHAKESPEARE_SIZE = url, sha256, int(size)
    ranks = {bytes([i]): i for i in range(256)}
    special = {"<|endoftext|>": 256}
    encoding = tiktoken.Encoding(
        "bytes", pat_str="(?s).", mergeable_ranks=ranks, special_tokens=special
    )
    prepro.get_encoding = lambda: encoding
    sys.exit(prepro.main([]))
"""


@pytest.fixture
def start(hub, monkeypatch):
    """start(): a process that fetches and tokenises what the hub serves, slowly: see hub.gate."""
    text = fake_shakespeare(hub, monkeypatch)
    hub.gate = threading.Event()
    beside = {"PYTHONPATH": os.path.dirname(prepro.__file__), "PYTHONUNBUFFERED": "1"}
    processes = []

    def start_one():
        process = subprocess.Popen(
            [sys.executable, "-c", FROM_OUR_HUB, hub.url, sha256_of(text), str(len(text))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, **beside},
        )
        processes.append(process)
        return process

    yield start_one
    hub.gate.set()
    for process in processes:
        process.kill()
        process.communicate()


def waits(process):
    """Return when a process has said that it waits for another one, which it says once."""
    one_line(process.stderr.readline(), "another process is fetching Tiny Shakespeare", "waiting")


def test_of_two_first_runs_at_once_one_fetches_and_the_other_waits(hub, start):
    text = hub.body
    first = start()
    assert hub.half.wait(30)
    second = start()
    waits(second)
    hub.gate.set()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "") and out.count(" tokens\n") == 2
    assert [path for path, _ in hub.seen] == ["/model", "/cdn/model"], "fetched once"
    assert content("data/tiny_shakespeare.txt") == text
    assert bytes(tokens_of("data/tiny_shakespeare")[1:]) == text and len(names("data")) == 3


def test_who_waits_for_a_killed_process_goes_on_where_that_one_stopped(hub, start):
    first = start()
    assert hub.half.wait(30)
    second = start()
    waits(second)
    first.kill()
    first.wait()
    hub.gate.set()
    out, err = second.communicate(timeout=60)
    assert (second.returncode, err) == (0, "") and out.count(" tokens\n") == 2
    assert len(names("data")) == 3


@posix_only
def test_ctrl_c_ends_the_waiting(hub, start):
    start()
    assert hub.half.wait(30)
    second = start()
    waits(second)
    second.send_signal(signal.SIGINT)
    out, err = second.communicate(timeout=10)
    assert (second.returncode, out) == (130, "")
    one_line(err, "stopped")


def test_many_threads_of_this_process_fetch_one_after_the_other(hub):
    """The lock belongs to an open file, so it holds between threads as well."""
    digest = sha256_of(hub.body)
    fetch = lambda: prepro.download(hub.url, "file", digest)
    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content("file") == hub.body and names() == ["file"]
    assert [path for path, _ in hub.seen] == ["/model", "/cdn/model"]


@posix_only
def test_a_lock_whose_file_has_gone_is_no_lock(empty_folder):
    """Who waited for a process that has just deleted its lock must take the new file."""
    with open("x.lock", "wb") as file:
        assert prepro.take_lock(file)
        os.remove("x.lock")
        with open("x.lock", "wb") as newer:
            assert prepro.take_lock(newer)
            assert not prepro.take_lock(file)


@pytest.mark.parametrize(
    "flags",
    [
        ["--inptu", "x"],
        ["--val_fraction", "much", "--input", "x"],
        ["x"],
        ["--val_fraction", "0.2"],
        ["--output_prefix", "x"],
        ["--endoftext", "1"],
        ["--replace", "1"],
        ["--hellaswag"],
        ["--input", "x", "--bytes", "1", "--endoftext", "1"],
        ["--inp", "x"],
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_2(empty_folder, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        prepro.main(flags)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err and names() == []
