"""Files in MNIST's idx format, and the errors for wrong ones."""

from __future__ import annotations

import gzip
import struct
import zlib

import pytest
import torch

from tests.support.errors import raises_error
from vision.config.run import load_config
from vision.data.dataset import load_data
from vision.data.samplers import TrainBatches, val_loader


def open_data(run):
    config = load_config(run)
    data = load_data(config.data, config.seed)
    return data, TrainBatches(config, data), val_loader(config, data)


def idx(root, name, array, zipped=False):
    data = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.numpy().tobytes()
    path = root / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(data) if zipped else data)


@pytest.fixture
def fashion(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, count, zipped in (("train", 12, True), ("t10k", 7, False)):
        labels = torch.arange(count, dtype=torch.uint8) % 3
        pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        idx(tmp_path, f"{name}-images-idx3-ubyte", pixels, zipped)
        idx(tmp_path, f"{name}-labels-idx1-ubyte", labels, zipped)
    return tmp_path


def idx_run(root, **data):
    data = {"name": "idx", "root": str(root), "shift": 0.0, "rotate": 0.0, "scale": 0.0, **data}
    return {"model": {"timm": "test_revcol"}, "output": "x", "data": data, "batch_size": 4, "epochs": 1}


def test_idx_files_gzipped_or_not(fashion):
    data, train, val = open_data(idx_run(fashion, img_size=32, classes=["a", "b", "c", "d"]))
    assert (data.classes, data.shape, len(data.train), len(data.val)) == (("a", "b", "c", "d"), (1, 32, 32), 12, 7)
    pictures, labels = (torch.cat(parts) for parts in zip(*train.epoch(0), strict=True))
    assert abs(pictures.mean().item()) < 1e-5
    assert abs(pictures.std().item() - 1) < 1e-3
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert (pictures[:, :, :2] == pictures.min()).all()  # the margin
    assert torch.cat([labels for _, labels in val]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    raw = torch.frombuffer(bytearray((fashion / "t10k-images-idx3-ubyte").read_bytes()[16:]), dtype=torch.uint8)
    shown = torch.cat([pictures for pictures, _ in val])[:, 0, 2:-2, 2:-2] * data.std[0] + data.mean[0]
    torch.testing.assert_close(shown, raw.view(7, 28, 28) / 255, rtol=0, atol=1e-5)


def test_mirrored_images(fashion):
    plain, mirrored = ([x for x, _ in open_data(idx_run(fashion, hflip=hflip))[1].epoch(0)] for hflip in (0.0, 1.0))
    torch.testing.assert_close(torch.cat(mirrored), torch.cat(plain).flip(3), rtol=0, atol=1e-4)


def test_small_images_are_shrunk_and_limited(fashion):
    data, *_ = open_data(idx_run(fashion, img_size=14, train_samples=5))
    assert (data.shape, len(data.train), len(data.val)) == ((1, 14, 14), 5, 7)


@pytest.mark.parametrize(
    ("damage", "code", "names"),
    [
        (lambda root: (root / "t10k-labels-idx1-ubyte").unlink(), "missing-file", "t10k-labels-idx1-ubyte"),
        (
            lambda root: (root / "t10k-images-idx3-ubyte").write_bytes(b"12345"),
            "damaged-file",
            "t10k-images-idx3-ubyte: ",
        ),
        (
            lambda root: (root / "train-images-idx3-ubyte.gz").write_bytes(b"12345"),
            "damaged-file",
            "train-images-idx3-ubyte.gz: ",
        ),
        (
            lambda root: idx(root, "t10k-labels-idx1-ubyte", torch.zeros(3, dtype=torch.uint8)),
            "misaligned-data",
            ["7 images", "3 labels"],
        ),
        (
            lambda root: idx(root, "t10k-labels-idx1-ubyte", torch.zeros(7, 2, dtype=torch.uint8)),
            "damaged-file",
            ["t10k-labels-idx1-ubyte", "1 axes"],
        ),
    ],
)
def test_wrong_idx_files_are_refused(fashion, damage, code, names):
    damage(fashion)
    with raises_error(code=code, key="data.root", source="training run", names=names):
        open_data(idx_run(fashion))


def header(*sizes):
    return struct.pack(f">{1 + len(sizes)}i", 0x0800 + len(sizes), *sizes)


@pytest.mark.parametrize(
    "content",
    [
        header(2**31 - 1, 2**31 - 1, 2**31 - 1),
        header(-3, 28, 28),
        header(12, 28, 28),
        header(12, 28, 28) + bytes(12 * 28 * 28 - 1),
        header(12, 28, 28) + bytes(12 * 28 * 28 + 1),
        b"",
    ],
    ids=["2^93", "negative", "header alone", "a byte short", "a byte more", "empty"],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_sizes_of_an_idx_file_are_those_of_its_bytes(fashion, content, zipped):
    (fashion / "train-images-idx3-ubyte.gz").unlink()
    path = fashion / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    with raises_error(code="damaged-file", key="data.root", names=f"{path}: "):
        open_data(idx_run(fashion))


def test_a_gzip_bomb_is_not_unpacked(fashion):
    """256 MB of zeros in 1 MB, as its header says; and what small images would fill when they are enlarged."""
    sizes = (2**28 // 784, 28, 28)
    packer = zlib.compressobj(1, wbits=31)
    parts = [packer.compress(header(*sizes)), *(packer.compress(bytes(2**24)) for _ in range(2**4)), packer.flush()]
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"".join(parts))
    assert path.stat().st_size < 2**28 / 100
    with raises_error(code="damaged-file", key="data.root", names=[str(path), str(sizes[0])]):
        open_data(idx_run(fashion))
    path.unlink()
    idx(fashion, "train-images-idx3-ubyte", torch.ones(2**18, 1, 1, dtype=torch.uint8))
    idx(fashion, "train-labels-idx1-ubyte", torch.ones(2**18, dtype=torch.uint8))
    (fashion / "train-labels-idx1-ubyte.gz").unlink()
    with raises_error(code="out-of-range", key="data.img_size", names="1 x 1"):
        open_data(idx_run(fashion))


@pytest.mark.parametrize(("root", "code"), [("x" * 5000, "missing-file"), ("a\0b", "invalid-encoding")])
def test_an_impossible_path(root, code):
    with raises_error(code=code, key="data.root"):
        open_data(idx_run(root))


def test_classes_without_training_images_cause_a_warning(fashion):
    for count, remarks in ((2, 1), (5, 0)):
        config = load_config(idx_run(fashion, train_samples=count, classes=["ant", "bee", "cat"]))
        found = load_data(config.data, 0).remarks
        assert len(found) == remarks
        assert all("cat" in remark for remark in found)
