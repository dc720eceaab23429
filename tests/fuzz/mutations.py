"""Mutations of weight files: flipped bytes, missing ends, and entries of other kinds."""

from __future__ import annotations

import copy
import io
import random
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

ODD: tuple[Any, ...] = (
    *(None, True, -1, 2**70, 10**12, float("nan"), float("inf"), "", "text", "\ud800", "a\nb", b"bytes"),
    *([], [1], {}, {"a": 1}, {1: 2}, (), ("a", [None]), {"in shards": "/x", "shape": (2,)}),
    *(torch.tensor(1), torch.zeros(0), torch.zeros(3), torch.zeros(2, 0, 2**40), torch.tensor(float("nan"))),
    *(torch.zeros(2, dtype=torch.complex64), torch.ones(1, dtype=torch.bool), torch.zeros(1).expand(10**6)),
)
"""Values of kinds that do not occur in checkpoints."""


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Return a file with changed bytes, without its end, or with a part that is missing or repeated."""
    kind, data = generator.randrange(5), bytearray(data)
    place, length = generator.randrange(len(data)), generator.choice((1, 4, 64, 1000))
    if kind == 0:
        del data[place:]
    elif kind == 1:
        del data[place : place + length]
    elif kind == 2:
        data[place:place] = data[place : place + length]
    else:
        for _ in range(generator.choice((1, 8))):
            data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data)


def with_other_pickle(data: bytes, generator: random.Random) -> bytes:
    """Return a zip of torch with a damaged pickle and correct checksums, so that the pickle is read."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    entries = {entry.filename: source.read(entry) for entry in source.infolist()}
    name = next(name for name in entries if name.endswith("/data.pkl"))
    entries[name] = damaged(entries[name], generator)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return target.getvalue()


def with_other_entries(data: bytes, generator: random.Random) -> bytes:
    """Return a zip of torch with entries that are swapped, missing, renamed or compressed."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    entries = [(entry.filename, source.read(entry)) for entry in source.infolist()]
    one, other = generator.sample(range(len(entries)), 2)
    kind, method = generator.randrange(4), zipfile.ZIP_STORED
    if kind == 0:
        (name, content), (second, rest) = entries[one], entries[other]
        entries[one], entries[other] = (name, rest), (second, content)
    elif kind == 1:
        del entries[one]
    elif kind == 2:
        entries[one] = (generator.choice(("../x", "/etc/x", "a/data/999", "x\n")), entries[one][1])
    else:
        method = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return target.getvalue()


def with_other_header(data: bytes, generator: random.Random) -> bytes:
    """Return a file of safetensors with a changed header."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = generator.randrange(4)
    if kind == 0:
        return struct.pack("<Q", generator.choice((0, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + data[8:]
    if kind == 1:
        header = damaged(header, generator)
    elif kind == 2:
        old, new = generator.choice(((b"F32", b"X99"), (b"F32", b"F64"), (b"shape", b"sharp"), (b"[", b"[-1,")))
        header = header.replace(old, new, generator.randrange(1, 4))
    else:
        digits = [index for index, byte in enumerate(header) if chr(byte).isdigit()]
        place = generator.choice(digits)
        header = header[:place] + generator.choice((b"9", b"0", b"9" * 30, b"-1")) + header[place + 1 :]
    return struct.pack("<Q", len(header)) + header + rest


def with_other_value(content: Any, generator: random.Random) -> Any:
    """Return a copy of nested dicts and lists in which one entry has another kind or name, or is missing."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    depths = {depth for depth, *_ in places}
    depth = generator.choice(sorted(depths))
    _, parent, key = generator.choice([place for place in places if place[0] == depth])
    kind = generator.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[generator.choice((1, "other", "", ("a", 1)))] = parent.pop(key)
    else:
        parent[key] = generator.choice(ODD)
    return content


def _places(content: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    else:
        return
    for key, value in items:
        yield depth, content, key
        yield from _places(value, depth + 1)
