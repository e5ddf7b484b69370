"""Damage to files, by chance: what the fuzz tests share."""

import os
import random
import re
import struct
import time
import tracemalloc

from common import pack_safetensors, written

import train_gpt2 as gpt2

HUGE = 2**31 - 1


MUTATIONS = 2500 if os.environ.get("LONG_TESTS") == "1" else 200  # per format


JSON_WORD = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|[][{}:,]|\w+')


ODD_WORDS = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1",
    b"2",
    b"1.5",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b'""',
    b"",
    b'"F16"',
    b'"BF16"',
    b'"I32"',
    b'"\\ud800"',
    b'"a\\u0000b"',
    b"9" * 20,
    b"9" * 5000,
    b"[" * 2000,
]


ODD_INTEGERS = [
    0,
    1,
    -1,
    2,
    3,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    HUGE,
    -(2**31),
    1 << 24,
    20240326,
]


def with_odd_json(rng, text):
    """One word of a JSON text replaced by an odd one, by a number, or by another of its words."""
    words = list(JSON_WORD.finditer(text))
    word = rng.choice(words)
    new = rng.choice(
        [rng.choice(ODD_WORDS), rng.choice(words)[0], b"%d" % rng.choice(ODD_INTEGERS)]
    )
    return text[: word.start()] + new + text[word.end() :]


def with_odd_integer(rng, data):
    """One of the first eight int32 replaced by an odd one, or by a relative of its own."""
    at = 4 * rng.randrange(max(1, min(len(data) // 4, 8)))
    old = int.from_bytes(data[at : at + 4], "little", signed=True)
    new = rng.choice([*ODD_INTEGERS, old + 1, old - 1, -old, 2 * old]) % 2**32
    return data[:at] + struct.pack("<I", new) + data[at + 4 :]


def mutated(rng, name, data):
    """A file after an accident or more: to bits, bytes, ranges, a header's integers, the words of
    JSON."""
    n, at = min(len(data), rng.choice([1, 2, 4, 8, 100, 2000])), rng.randrange(len(data))
    at = rng.choice([at, at % 64])  # half of them at the beginning
    how = rng.choice(["bit", "bytes", "cut", "double", "drop", "integer", "json", "json"])
    if how == "json" and name.endswith(".json"):
        data = with_odd_json(rng, data)
    elif how == "json" and name.endswith(".safetensors"):
        end = 8 + struct.unpack_from("<Q", data)[0]
        data = pack_safetensors(with_odd_json(rng, data[8:end]), data[end:])
    elif how == "integer":
        data = with_odd_integer(rng, data)
    elif how == "cut":
        data = data[:at]
    else:
        bit = bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 : at + n]
        middle = {"bytes": rng.randbytes(n), "double": data[at : at + n] * 2, "drop": b""}.get(
            how, bit
        )
        data = data[:at] + middle + data[at + n :]
    return mutated(rng, name, data) if rng.random() < 0.2 and len(data) > 1000 else data


def fuzz(folder, names, read, check, harmless=1, mend=bytes):
    """Damage the folder's files, one at a time. read() may refuse; if not, check(its result) must
    hold. harmless: how many at least must be read, to prove that check is asked at all. mend: what
    to do to the damaged bytes before they are written, such as to correct their checksum."""
    sound, rng, accepted = (
        {name: (folder / name).read_bytes() for name in names},
        random.Random(1),
        0,
    )
    allowed = 8 * sum(map(len, sound.values())) + (4 << 20)  # bytes of memory
    check(read())
    tracemalloc.start()
    try:
        for i in range(MUTATIONS):
            name, result = rng.choice(names), None
            written(folder / name, mend(mutated(rng, name, sound[name])))
            began, before = time.process_time(), tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                result = read()
            except (gpt2.InputError, OSError) as error:
                assert str(error).isprintable(), (i, name)
            except Exception as error:
                raise AssertionError(
                    f"mutation {i}, of {name}, is neither read nor refused"
                ) from error
            assert time.process_time() - began < 5, (i, name)
            assert tracemalloc.get_traced_memory()[1] - before < allowed, (i, name)
            if result is not None:
                check(result)
                accepted += 1
            written(folder / name, sound[name])
    finally:
        tracemalloc.stop()
    assert harmless <= accepted < MUTATIONS / 2  # or they were hardly mutations
