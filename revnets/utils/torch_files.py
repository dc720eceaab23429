"""Files of `torch.save`: a zip of a pickle and storages, or, before torch 1.6, pickles followed by storages."""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor

from revnets.utils.plain_pickles import PlainUnpickler, Storage
from revnets.utils.read_bounds import MAX_NAME, Allowance, RejectedError, require_bounded

ZIP, PICKLE, LEGACY = b"PK\x03\x04", b"\x80", (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""First bytes of a zip, of a pickle, and of the number that is the first pickle of an older file."""

FREE_PICKLE_BYTES = 2**21
"""Largest pickle, plus a quarter of the file: each byte of a pickle can become an object of 100 bytes."""


def read_zip(path: Path, allowed: Mapping[str, Any], mmap: bool) -> Any:
    """Read a file of torch 1.6 or newer.

    Args:
        path: Path of the file.
        allowed: Objects that the pickle may reference in addition to tensors and plain data, by name.
        mmap: Whether to leave storages in the file and read them on first use. If False, they are read at once and
            their checksums are verified.

    Raises:
        RejectedError: If the file contains more than plain data, or declares more data than it contains.
        Exception: If the file is damaged.
    """
    size = path.stat().st_size
    with ZipFile(path) as archive, path.open("rb") as file:
        records = _records(archive, size)
        pickled = _bytes(file, records["data.pkl"], "data.pkl")
        order = _bytes(file, records["byteorder"], "byteorder") if "byteorder" in records else b"little"
        offsets = {name: _offset(file, record, size) for name, record in records.items() if name.startswith("data/")}
    whole = torch.UntypedStorage.from_file(str(path), False, size)
    found: dict[Any, Tensor] = {}

    def storage(dtype: torch.dtype, key: Any, count: int) -> Storage:
        if key not in found:
            name, wanted = f"data/{key}", count * dtype.itemsize
            record = records[name]
            if record.file_size != wanted:
                raise RejectedError(
                    code="damaged-file", message=f"damaged: {name} has {record.file_size} bytes, not {wanted}"
                )
            memory: Any = whole[offsets[name] : offsets[name] + wanted]
            if not mmap or offsets[name] % dtype.itemsize:
                memory = memory.clone()
            if not mmap and zlib.crc32(_buffer(as_bytes(memory))) != record.CRC:
                raise RejectedError(code="damaged-file", message=f"damaged: the checksum of {name} differs")
            if order != sys.byteorder.encode():
                memory.byteswap(dtype)
            found[key] = as_bytes(memory)
        return Storage(found[key], dtype)

    content = PlainUnpickler(io.BytesIO(pickled), Allowance(size), allowed, storage).load()
    require_bounded(content)
    return content


def _records(archive: ZipFile, size: int) -> dict[str, ZipInfo]:
    """Return the entries by name, without their common directory."""
    entries = archive.infolist()
    records = {entry.filename.partition("/")[2]: entry for entry in entries}
    if not all(name.isprintable() and len(name) <= MAX_NAME for name in records):
        raise RejectedError(code="damaged-file", message="damaged: the name of an entry cannot be printed on one line")
    if "constants.pkl" in records:
        raise RejectedError(
            code="unsafe-file", message="rejected: it is a TorchScript program, which is not plain data"
        )
    if any(entry.compress_type != ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise RejectedError(code="wrong-format", message="not a checkpoint: its entries are compressed or encrypted")
    if sum(entry.file_size for entry in entries) > size:
        raise RejectedError(code="damaged-file", message="damaged: its entries are larger than the file")
    if "data.pkl" not in records:
        raise RejectedError(code="wrong-format", message="not a checkpoint: it is a zip without data.pkl")
    if len(records) < len(entries):
        raise RejectedError(code="damaged-file", message="damaged: two of its entries have the same name")
    if records["data.pkl"].file_size > FREE_PICKLE_BYTES + size // 4:
        raise RejectedError(code="unsafe-file", message="rejected: its pickle is too large for weights")
    return records


def _offset(file: BinaryIO, record: ZipInfo, size: int) -> int:
    """Return the offset of the data of an entry."""
    file.seek(record.header_offset)
    header = file.read(30)
    begin = (
        record.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    )
    if header[:4] != ZIP or begin + record.file_size > size:
        raise RejectedError(
            code="damaged-file",
            message=f"damaged: the entry {record.filename.partition('/')[2]} is at the wrong offset",
        )
    return begin


def _bytes(file: BinaryIO, record: ZipInfo, name: str) -> bytes:
    file.seek(_offset(file, record, sys.maxsize))
    data = file.read(record.file_size)
    if zlib.crc32(data) != record.CRC:
        raise RejectedError(code="damaged-file", message=f"damaged: the checksum of {name} differs")
    return data


def as_bytes(memory: torch.UntypedStorage) -> Tensor:
    """Return memory as a tensor (uint8, 1-D)."""
    return torch.empty(0, dtype=torch.uint8).set_(memory)  # pyright: ignore[reportArgumentType]


def _buffer(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)


class _Limited:
    """A file with a limit on the number of bytes read."""

    def __init__(self, file: BinaryIO, left: int):
        self.file, self.left = file, left

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise RejectedError(code="unsafe-file", message="rejected: its pickle is too large for weights")
        return self.file.read(size)

    def readline(self) -> bytes:
        return self.file.readline(1024)


def read_legacy(path: Path, allowed: Mapping[str, Any]) -> Any:
    """Read a file from before torch 1.6.

    Args:
        path: Path of the file.
        allowed: Objects that its pickles may reference in addition to tensors and plain data, by name.

    Raises:
        RejectedError: If the file contains more than plain data, or declares more data than it contains.
        Exception: If the file is damaged.
    """
    size = path.stat().st_size
    allowance, room = Allowance(size), size
    found: dict[Any, Storage] = {}

    def storage(dtype: torch.dtype, key: Any, count: int, view: Any = None) -> Storage:
        nonlocal room
        if key not in found:
            room -= count * dtype.itemsize
            if room < 0:
                raise RejectedError(code="damaged-file", message="damaged: it declares more data than it contains")
            found[key] = Storage(torch.empty(count * dtype.itemsize, dtype=torch.uint8), dtype)
        if view is None:
            return Storage(found[key].data, dtype)
        _, begin, length = view
        memory = found[key].data.untyped_storage()[begin * dtype.itemsize :][: length * dtype.itemsize]
        return Storage(as_bytes(memory), dtype)

    with path.open("rb") as file:
        limited = _Limited(file, FREE_PICKLE_BYTES + size // 4)
        for _ in range(3):  # a number, the version of the format, and the sizes of integers
            PlainUnpickler(limited, allowance, {}).load()
        content = PlainUnpickler(limited, allowance, allowed, storage).load()
        require_bounded(content)
        keys = PlainUnpickler(limited, allowance, {}).load()
        if type(keys) is not list or not all(type(key) in (str, int) for key in keys):
            raise RejectedError(code="damaged-file", message="damaged: its list of tensors is invalid")
        for key in keys:
            data, dtype = found.pop(key)
            count = int.from_bytes(file.read(8), "little")
            if count * dtype.itemsize != data.numel() or file.readinto(_buffer(data)) < data.numel():
                raise RejectedError(code="damaged-file", message="")
    if found:
        raise RejectedError(code="damaged-file", message="damaged: the data of some tensors are missing")
    return content
