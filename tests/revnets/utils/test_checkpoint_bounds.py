"""Files that declare more data than they contain are rejected without using much memory or time."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from revnets.utils.checkpoint_io import RECORDS, CheckpointReadError, read_checkpoint
from tests.support.errors import raises_error


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Limit memory to half a GiB more than before, so that a bomb raises MemoryError."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def zipped(path: Path, pickled: bytes, method: int = zipfile.ZIP_STORED, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in storages.items():
            archive.writestr(f"archive/data/{name.removeprefix('s')}", data)
    return path


def tensor(count: int, shape: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """Return the opcodes of a tensor with a float32 storage, as a part of a pickle."""

    def plain(value: object) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain(key) + plain("cpu") + plain(count) + b"tQ"
    rest = plain(0) + plain(shape) + plain(stride) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def called(name: str, *args: object) -> bytes:
    module, _, function = name.rpartition(".")
    return f"\x80\x02c{module}\n{function}\n".encode("latin1") + pickle.dumps(args, protocol=2)[2:-1] + b"R."


def doubled(levels: int, make: bytes) -> bytes:
    """Return nested containers that contain the previous one twice: 2 ** levels when they are traversed."""
    return b"\x80\x02)q\x00" + b"".join(b"h\x00h\x00" + make + b"q\x00" for _ in range(levels)) + b"."


BOMBS = {
    "bytearray": (called("builtins.bytearray", 40 * 2**30), "unsafe-file"),
    "array": (called("numpy._core.multiarray._reconstruct", None, (40 * 2**30,), b"b"), "damaged-file"),
    "number": (called("numpy._core.multiarray.scalar", None, None), "damaged-file"),
    "type of numbers": (called("numpy.dtype", "V2000000000"), "damaged-file"),
    "legacy tensor": (called("torch.FloatTensor", 10 * 2**30), "unsafe-file"),
    "sparse": (called("torch._utils._rebuild_sparse_tensor", None, None), "unsafe-file"),
    "quantized": (called("torch._utils._rebuild_qtensor", None), "unsafe-file"),
    "meta": (called("torch._utils._rebuild_meta_tensor_no_storage", None), "unsafe-file"),
    "text": (b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.", "damaged-file"),
    "larger than its storage": (b"\x80\x02" + tensor(1, (10 * 2**30,), (1,)) + b".", "damaged-file"),
    "larger than its record": (b"\x80\x02" + tensor(2**30, (1,), (1,)) + b".", "damaged-file"),
    "stride of 0": (b"\x80\x02" + tensor(1, (10 * 2**30,), (0,)) + b".", "unsafe-file"),
    "huge empty axes": (b"\x80\x02" + tensor(1, (0, 2**61, 2**61), (1, 1, 1)) + b".", "damaged-file"),
    "copies of bytes": (
        b"\x80\x02c_codecs\nencode\nq\x01"
        + pickle.dumps("a" * 10**6, 2)[2:-1]
        + b"q\x02X\x06\0\0\0latin1q\x03(l"[:-1]
        + b"".join(b"h\x01h\x02h\x03\x86R" for _ in range(2000))
        + b"l."[1:],
        "unsafe-file",
    ),
    "shared tuples": (doubled(40, b"\x86"), "unsafe-file"),
    "nested tuples": (b"\x80\x02)" + b"\x85" * 10**5 + b".", "unsafe-file"),
    "a key of shared tuples": (b"\x80\x02}" + doubled(40, b"\x86")[2:-1] + b"K\x01s.", "damaged-file"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "unsafe-file"),
}


@pytest.mark.parametrize("allowed", [(), RECORDS], ids=["plain", "records"])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_in_a_pickle(tmp_path, name, allowed):
    pickled, code = BOMBS[name]
    path = zipped(tmp_path / "bomb.pt", pickled, s0=b"\0" * 4)
    codes = {code} if allowed or "numpy" not in str(pickled[:20]) else {"unsafe-file"}
    for mmap in (False, True):
        with pytest.raises(CheckpointReadError) as caught:
            read_checkpoint(path, allowed, mmap)
        assert caught.value.code in codes, str(caught.value)
        assert "bomb.pt" in str(caught.value)


@pytest.mark.parametrize("count", [2**40, 2**62, 10**6])
def test_storage_of_the_legacy_format(tmp_path, count):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes()
    old = pickle.dumps(1000, 2)[2:-1] + b"Nt"
    assert data.count(old) == 1
    (tmp_path / "old.pt").write_bytes(data.replace(old, pickle.dumps(count, 2)[2:-1] + b"Nt"))
    with raises_error(CheckpointReadError, code="damaged-file", names="old.pt"):
        read_checkpoint(tmp_path / "old.pt")


def test_compressed_entries(tmp_path):
    """A quarter of a megabyte that torch would expand to 256 MiB."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + tensor(2**26, (2**26,), (1,)) + b".")
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(4):
                entry.write(bytes(2**26))
    for mmap in (False, True):
        with raises_error(CheckpointReadError, code="wrong-format", names="compressed"):
            read_checkpoint(tmp_path / "bomb.pt", mmap=mmap)


def test_overlapping_entries(tmp_path):
    """A thousand entries share the same megabyte."""
    path = zipped(
        tmp_path / "bomb.pt", b"\x80\x02}.", **{f"s{index:03}": b"\0" for index in range(1000)}, big=bytes(2**20)
    )
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    entry = data.rindex(b"PK\x01\x02")
    sizes, place = data[entry + 20 : entry + 28], data[entry + 42 : entry + 46]
    changed, start = bytearray(data), directory
    while (start := data.find(b"PK\x01\x02", start, entry)) != -1:
        if data[start + 46 : start + 60] != b"archive/data.p":
            changed[start + 20 : start + 28], changed[start + 42 : start + 46] = sizes, place
        start += 4
    path.write_bytes(changed)
    with raises_error(CheckpointReadError, code="damaged-file", names="larger than the file"):
        read_checkpoint(path)


def test_flipped_bit_is_detected(tmp_path):
    torch.save({"a": torch.full((1000,), 0.5)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(torch.tensor(0.5).numpy().tobytes() * 9) + 400] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with raises_error(CheckpointReadError, code="damaged-file", names="checksum"):
        read_checkpoint(tmp_path / "a.pt")


def test_names_with_line_breaks(tmp_path):
    torch.save({"a\nb\x1b[31m": 1}, tmp_path / "a.pt")
    with raises_error(CheckpointReadError, code="damaged-file", names="a.pt"):
        read_checkpoint(tmp_path / "a.pt")


def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with raises_error(CheckpointReadError, code="not-a-file", names="pipe.pt"):
        read_checkpoint(tmp_path / "pipe.pt")


def test_tensors_saved_by_torch_are_unchanged(tmp_path):
    """Views, tied and expanded tensors, parameters, and dtypes without their own storage class."""
    base = torch.arange(12.0)
    content = {
        "view": base.view(3, 4).t()[1:],
        "tied": [base, base],
        "expanded": torch.ones(1).expand(5),
        "empty": torch.zeros(2, 0, 3),
        "number": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "unsigned": torch.ones(3, dtype=torch.uint16),
        "complex": torch.ones(3, dtype=torch.complex64),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "shape": torch.Size([1, 2]),
        "type": torch.float16,
        "device": torch.device("cpu"),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "complex number": 1 + 2j,
        "large": 2**80,
    }
    for is_zip in (True, False):
        if not is_zip:  # torch itself cannot read these
            del content["unsigned"], content["float8"]
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
        expected = torch.load(tmp_path / "a.pt", weights_only=True)
        for mmap in (False, True):
            found = read_checkpoint(tmp_path / "a.pt", mmap=mmap)
            assert found.keys() == expected.keys()
            assert found["tied"][0].data_ptr() == found["tied"][1].data_ptr()
            for name, value in found.items():
                one, other = (value, expected[name]) if name != "tied" else (value[0], expected[name][0])
                if isinstance(other, torch.Tensor):
                    assert (type(one), one.dtype, one.stride()) == (type(other), other.dtype, other.stride())
                    assert one.requires_grad == other.requires_grad
                    if other.dtype != torch.float8_e4m3fn:
                        assert torch.equal(one, other)
                    else:
                        assert torch.equal(one.float(), other.float())
                else:
                    assert one == other


def test_versions_of_modules_are_kept(tmp_path):
    model = torch.nn.BatchNorm1d(2)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt")._metadata == model.state_dict()._metadata


def test_arrays_and_numbers_of_numpy(tmp_path):
    content = {
        "array": np.arange(6, dtype=np.float32).reshape(2, 3, order="F"),
        "numbers": [np.float64(0.1), np.int64(3), np.float32(2), np.bool_(True)],
        "options": argparse.Namespace(lr=[0.1]),
    }
    torch.save(content, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt", RECORDS)
    assert np.array_equal(found["array"], content["array"])
    assert found["numbers"] == content["numbers"]
    assert [type(number) for number in found["numbers"]] == [type(number) for number in content["numbers"]]
    assert found["options"] == content["options"]
