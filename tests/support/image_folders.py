"""Small data sets of every kind that timm reads: random images whose brightness depends on the class."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def image(label: int, number: int, side: int = 20) -> Image.Image:
    generator = np.random.default_rng((label, number))
    return Image.fromarray(generator.integers(60 * label, 60 * label + 80, (side, side + 3, 3), dtype=np.uint8))


def jpeg(label: int, number: int) -> bytes:
    buffer = io.BytesIO()
    image(label, number).save(buffer, "JPEG")
    return buffer.getvalue()


def folder(root: Path, train: int = 8, val: int = 3) -> Path:
    """Write root/train/CLASS/N.jpg and root/val/CLASS/N.jpg with a number of images per class."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.jpg").write_bytes(jpeg(label, number + 100 * (split == "val")))
    return root


def tars(root: Path) -> Path:
    """Write the same images as root/train.tar and root/val.tar."""
    folder(root / "loose")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for path in sorted((root / "loose" / split).rglob("*.jpg")):
                tar.add(path, str(path.relative_to(root / "loose" / split)))
    return root


def shards(root: Path, count: int = 4, each: int = 6, broken: bool = False) -> Path:
    """Write shards for webdataset: train-N.tar and val-0.tar, and the description that timm reads."""
    root.mkdir(exist_ok=True)
    for split, numbers in (("train", range(count)), ("val", range(1))):
        for shard in numbers:
            with tarfile.open(root / f"{split}-{shard}.tar", "w") as tar:
                for number in range(each):
                    label = number % len(CLASSES)
                    data = jpeg(label, 100 * shard + number + 1000 * (split == "val"))
                    if broken and (split, shard, number) == ("train", 1, 2):
                        data = data[: len(data) // 3]
                    add(tar, f"{shard}_{number}.jpg", data)
                    add(tar, f"{shard}_{number}.cls", str(label).encode())
    names = {"train": [f"train-{n}.tar" for n in range(count)], "validation": ["val-0.tar"]}
    info = {
        "splits": {
            split: {
                "filenames": files,
                "shard_lengths": [each] * len(files),
                "num_samples": each * len(files),
                "name": split,
            }
            for split, files in names.items()
        }
    }
    (root / "_info.json").write_text(json.dumps(info))
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def bomb(side: int) -> bytes:
    """Return a PNG whose header declares this many pixels per side."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes(side + 1)) for _ in range(10)]

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"".join([*rows, packer.flush()])) + chunk(b"IEND", b"")
