"""Images with class maps in the directory layout of ADE20K."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torchvision import tv_tensors

pytest.importorskip("transformers")

from revnets import SpecError
from revnets.config.loader import validate
from vision.config.data import SemanticMapsConfig
from vision.data.decoding import read_semantic_map
from vision.data.samplers import Key
from vision.errors import DataError
from vision.segmentation.semantic_maps import PhotometricDistortion, load_semantic_maps

COLORS = np.array([[0, 0, 0], [200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)


def write(root, split, name, height=37, width=53, numbers=None):
    """An image with three stripes in the colors of their classes, and its map."""
    if numbers is None:
        numbers = np.repeat(np.arange(1, 4, dtype=np.uint8), -(-width // 3))[:width]
        numbers = np.tile(numbers, (height, 1))
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLORS[numbers % 4]).save(root / "images" / split / f"{name}.png")
    Image.fromarray(numbers).save(root / "annotations" / split / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    for number in range(3):
        write(tmp_path, "training", f"t{number}")
    write(tmp_path, "validation", "v0")
    return tmp_path


def config(root, **options):
    values = {"name": "semantic_maps", "root": str(root), "num_classes": 3, "reduce_zero_label": True}
    values |= {"img_size": 29, "short_side": 37, "long_side": 97, **options}
    return validate(TypeAdapter(SemanticMapsConfig), values)


def colors_of(image, settings):
    """Return the class with the nearest color for each pixel of (3, H, W)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    pixels = (image * std + mean) * 255
    distances = (pixels[None] - torch.tensor(COLORS[1:]).float()[:, :, None, None]).square().sum(1)
    return distances.argmin(0)


def test_a_validation_pair_keeps_its_size_and_its_classes(root):
    settings = config(root)
    image, classes = load_semantic_maps(settings, 0).val[0]
    assert image.shape == (3, 37, 53)
    assert torch.equal(colors_of(image, settings), classes)


def test_augmented_pixels_keep_their_classes(root):
    settings = config(root, photometric=False)
    train = load_semantic_maps(settings, 0).train
    for epoch in range(7):
        image, classes = train[Key(epoch, 1)]
        assert image.shape == (3, 29, 29)
        counts = classes != 255
        agreed = (colors_of(image, settings) == classes)[counts]
        assert agreed.float().mean() > 0.9  # all but the borders of stripes, where colors are mixed


def test_small_images_are_padded_with_ignored_pixels(root):
    settings = config(root, img_size=61, scale=(0.5, 0.5), photometric=False, hflip=0.0)
    image, classes = load_semantic_maps(settings, 0).train[Key(0, 0)]
    assert image.shape == (3, 61, 61)
    assert (classes[-20:] == 255).all()
    assert (image[:, -20:] == 0).all()


def test_augmentation_is_a_function_of_seed_epoch_and_index(root):
    first, second = (load_semantic_maps(config(root), 5).train for _ in range(2))
    for key in (Key(0, 0), Key(3, 2)):
        for ours, theirs in zip(first[key], second[key], strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(first[Key(0, 0)][0], first[Key(1, 0)][0])


def test_zero_is_ignored_if_labels_are_reduced(tmp_path):
    numbers = np.array([[0, 1, 3, 255]], np.uint8)
    for split in ("training", "validation"):
        write(tmp_path, split, "a", numbers=numbers)
    assert load_semantic_maps(config(tmp_path), 0).val[0][1].tolist() == [[255, 0, 2, 255]]
    kept = config(tmp_path, reduce_zero_label=False, num_classes=4)
    assert load_semantic_maps(kept, 0).val[0][1].tolist() == [[0, 1, 3, 255]]


def test_palette_indices_are_classes(root):
    numbers = Image.open(root / "annotations/validation/v0.png")
    palette = numbers.convert("P")
    palette.putdata(np.asarray(numbers).flatten().tolist())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(root / "annotations/validation/v0.png")
    expected = torch.from_numpy(np.asarray(numbers).astype(np.int64)) - 1
    assert torch.equal(load_semantic_maps(config(root), 0).val[0][1], expected)


def gray_png(bits, rows):
    """Return a PNG of gray values packed into bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = len(rows[0]) * 8 // bits, len(rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))


@pytest.mark.parametrize(
    ("bits", "row", "expected"),
    [(1, b"\x1b", [0, 0, 0, 1, 1, 0, 1, 1]), (2, b"\x1b", [0, 1, 2, 3]), (4, b"\x01\x23", [0, 1, 2, 3])],
)
def test_class_indices_of_few_bits_are_not_rescaled(bits, row, expected):
    file = io.BytesIO(gray_png(bits, [row]) + b"\0\0\0\0IEND\xaeB`\x82")
    assert read_semantic_map(file).tolist() == [expected]


def test_distortions_do_not_swap_channels():
    distortion = PhotometricDistortion(brightness=(1, 1), contrast=(1, 1), saturation=(1, 1), hue=(0, 0), p=1.0)
    image = torch.arange(3, dtype=torch.uint8).view(3, 1, 1).expand(3, 5, 7).contiguous()
    for _ in range(11):
        assert torch.equal(distortion(tv_tensors.Image(image)).as_subclass(torch.Tensor), image)


@pytest.mark.parametrize(("folder", "named"), [("images", "t1"), ("annotations", "t1")])
def test_a_file_without_its_partner_is_refused(root, folder, named):
    (root / folder / "training" / f"{named}.png").unlink()
    with pytest.raises(SpecError) as caught:
        load_semantic_maps(config(root), 0)
    assert (caught.value.key, caught.value.code) == ("data.root", "misaligned-data")
    assert named in caught.value.problem


@pytest.mark.parametrize("damage", ["size", "class", "colors", "bytes"])
def test_unusable_pairs_are_noted_and_do_not_count(root, tmp_path, damage):
    file = root / "annotations/validation/v0.png"
    if damage == "size":
        Image.fromarray(np.ones((31, 53), np.uint8)).save(file)
    elif damage == "class":
        Image.fromarray(np.full((37, 53), 9, np.uint8)).save(file)
    elif damage == "colors":
        Image.new("RGB", (53, 37)).save(file)
    else:
        file.write_bytes(b"\x89PNG\r\n\x1a\n")
    data = load_semantic_maps(config(root), 0, tmp_path / "unreadable.txt")
    assert (data.val[0][1] == 255).all()
    assert data.unreadable.count() == 1


def test_training_takes_the_next_pair_instead(root):
    (root / "annotations/training/t0.png").write_bytes(b"")
    train = load_semantic_maps(config(root), 0).train
    assert torch.isfinite(train[Key(0, 0)][0]).all()


def test_damaged_data_raise_an_error_if_configured(root):
    (root / "annotations/validation/v0.png").write_bytes(b"")
    data = load_semantic_maps(config(root, unreadable="stop"), 0)
    with pytest.raises(DataError):
        data.val[0]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"window": 32}, "stride"),
        ({"window": 32, "stride": 33}, "stride"),
        ({"scales": [0.0]}, "scales"),
        ({"scale": [2.0, 0.5]}, "scale"),
        ({"num_classes": 1}, "num_classes"),
    ],
)
def test_invalid_values_are_refused(root, options, key):
    with pytest.raises(ValueError) as caught:
        config(root, **options)
    assert key in str(caught.value)


def test_the_number_of_names_must_match_num_classes(root):
    (root / "names.txt").write_text("wall\nsky\n")
    with pytest.raises(SpecError) as caught:
        load_semantic_maps(config(root, class_map=str(root / "names.txt")), 0)
    assert (caught.value.key, caught.value.code) == ("data.class_map", "class-mismatch")
