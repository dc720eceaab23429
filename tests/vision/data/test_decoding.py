"""Images of every mode have the pixels that viewers show, or are noted as unreadable."""

from __future__ import annotations

import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from revnets.utils.regular_files import open_regular
from tests.support import image_folders as images
from vision.config.run import load_config
from vision.data.dataset import load_data
from vision.data.decoding import converted, read_image
from vision.data.samplers import TrainBatches
from vision.data.transforms import val_transform

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


def saved(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def read(content: bytes, mode: str = "RGB", **options) -> np.ndarray:
    return np.asarray(read_image(io.BytesIO(content), mode, **options))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_a_ramp_of_16_bits_keeps_its_256_levels(kind, mode, exif):
    found = read(saved(Image.fromarray(RAMP * 256 + 7), kind), mode, exif=exif)
    assert np.array_equal(found, np.stack([RAMP] * 3, 2) if mode == "RGB" else RAMP)


def test_big_endian_and_12_bit_images():
    found = converted(Image.fromarray((RAMP * 256).astype(">u2")), "L")
    assert np.array_equal(np.asarray(found), RAMP)
    assert np.array_equal(read(saved(Image.fromarray(RAMP * 16)), "L"), RAMP // 16)


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("reader", ["folder", "wds"])
def test_pixels_without_a_scale_are_unreadable(tmp_path, mode, reader):
    """A directory replaces such an image by the next one; a stream skips it."""
    content = saved(Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32), mode), "TIFF")
    if reader == "folder":
        root = images.folder(tmp_path / "data", 2, 1)
        (root / "val" / "ant" / "0.jpg").write_bytes(content)
        given = {"name": "folder", "root": str(root), "img_size": 32}
    else:
        pytest.importorskip("webdataset")
        root = images.shards(tmp_path / "data", count=1)
        path = root / "val-0.tar"
        path.unlink()
        with tarfile.open(path, "w") as tar:
            for number, data in enumerate([content, images.jpeg(1, 1), images.jpeg(2, 1)]):
                images.add(tar, f"{number}.jpg", data)
                images.add(tar, f"{number}.cls", str(number).encode())
        given = {"name": "wds", "root": str(root), "img_size": 32, "num_classes": 3}
    config = load_config({"model": {"timm": "test_revcol"}, "output": "x", "data": given})
    data = load_data(config.data, 0, tmp_path / "notes.txt")
    labels = [label for _, label in (data.val if reader == "wds" else [data.val[index] for index in range(3)])]
    assert labels == [-1, 1, 2]
    assert f"mode {mode}" in (tmp_path / "notes.txt").read_text()
    assert data.unreadable.count() == 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_colors_are_those_of_pillow(mode):
    """Transparency is dropped, and the colors below it are kept."""
    picture = images.image(2, 0).convert(mode)
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    content = saved(picture, kind)
    assert np.array_equal(read(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colors_without_a_warning():
    picture = images.image(2, 0).quantize(16)
    content = saved(picture, transparency=bytes(range(0, 256, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(content)
    assert np.array_equal(found, np.asarray(picture.convert("RGB")))


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    assert (read(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 10).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    picture = images.image(1, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture, "PNG", exif=exif)
    assert np.array_equal(read(content), np.asarray(picture))
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(read(content, exif="apply"), np.asarray(shown))
    assert np.array_equal(read(content), read(content, exif="apply")) == (orientation == 1)


def test_damaged_exif_data_is_ignored():
    content = saved(images.image(1, 0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert np.array_equal(read(content, exif="apply"), read(content))


@pytest.mark.parametrize("kind", ["folder", "tar", "wds"])
def test_the_key_exif_reaches_every_reader(tmp_path, kind):
    """Images are rotated in training and validation only if the key is set."""
    if kind == "wds":
        pytest.importorskip("webdataset")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 32, 64))  # as stored, the left half is bright; as shown, the upper
    content = saved(picture, "JPEG", exif=exif, quality=95)
    root = tmp_path / "data"
    if kind == "wds":
        images.shards(root, count=1)
        for name, count in (("train-0.tar", 6), ("val-0.tar", 2)):
            (root / name).unlink()
            with tarfile.open(root / name, "w") as tar:
                for number in range(count):
                    images.add(tar, f"{number}.jpg", content)
                    images.add(tar, f"{number}.cls", b"1")
    else:
        (images.folder if kind == "folder" else images.tars)(root)
        for path in root.rglob("*.jpg"):
            path.write_bytes(content)
        if kind == "tar":
            for split in ("train", "val"):
                with tarfile.open(root / f"{split}.tar", "w") as tar:
                    tar.add(root / "loose" / split, ".")
    for key, upright in (("ignore", False), ("apply", True)):
        given = {
            "name": kind, "root": str(root), "img_size": 32, "exif": key, "crop_pct": 1.0, "num_classes": 3,
            "augment": {"scale": (0.99, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": None},
        }  # fmt: skip
        config = load_config({"model": {"timm": "test_revcol"}, "output": "x", "data": given, "batch_size": 2})
        data = load_data(config.data, 0)
        val = next(iter(data.val))[0] if kind == "wds" else data.val[0][0]
        for image in (val, next(TrainBatches(config, data).epoch(0))[0][0]):
            assert (image[:, :12].mean() > image[:, 20:].mean() + 1) == upright
            assert (image[:, :, :12].mean() > image[:, :, 20:].mean() + 1) != upright


# -------------------------------------------------------------------------------------------------------- hazards


def crowded() -> bytes:
    texts = PngImagePlugin.PngInfo()
    for number in range(3):
        texts.add_text(str(number), "x" * 2**21, zip=True)
    return saved(images.image(1, 0), pnginfo=texts)


@pytest.mark.parametrize("hazard", ["bomb", "small bomb", "texts", "truncated", "Ghostscript", "empty"])
def test_dangerous_files_are_unreadable(tmp_path, hazard):
    root = images.folder(tmp_path / "data", 2, 1)
    (root / "val" / "ant" / "0.jpg").write_bytes({
        "bomb": lambda: images.bomb(20_000),
        "small bomb": lambda: images.bomb(10_000),
        "texts": crowded,
        "truncated": lambda: saved(images.image(1, 0))[:200],
        "Ghostscript": lambda: saved(images.image(1, 0), "EPS"),
        "empty": lambda: b"",
    }[hazard]())  # fmt: skip
    given = {"name": "folder", "root": str(root), "img_size": 32}
    config = load_config({"model": {"timm": "test_revcol"}, "output": "x", "data": given})
    data = load_data(config.data, 0, tmp_path / "notes.txt")
    assert [data.val[index][1] for index in range(3)] == [-1, 1, 2]
    assert (tmp_path / "notes.txt").read_text().startswith("ant/0.jpg: ")


def test_devices_are_not_opened():
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(Path("/dev/zero"))


def test_pixels_of_a_default_run(tmp_path):
    """The images of a folder are bit for bit those of Pillow's conversion and timm's transform."""
    root = images.folder(tmp_path, 2, 1)
    images.image(1, 0).convert("RGBA").save(root / "val" / "bee" / "0.png")
    given = {"name": "folder", "root": str(root), "img_size": 32}
    config = load_config({"model": {"timm": "test_revcol"}, "output": "x", "data": given})
    data, transform = load_data(config.data, 0), val_transform(config.data)
    assert len(data.val) == 4
    for index in range(4):
        path = root / "val" / data.val.reader.filename(index)
        assert torch.equal(data.val[index][0], transform(Image.open(path).convert("RGB")))


def test_formats_that_run_other_programs_are_not_opened():
    with pytest.raises(OSError, match="not an image"):
        read_image(io.BytesIO(saved(images.image(1, 0), "EPS")))
