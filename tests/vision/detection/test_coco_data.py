"""Training and validation sets read from COCO files."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("faster_coco_eval")

from tests.support import coco_files
from tests.support.coco_files import COLORS, settings
from tests.support.errors import raises_error
from vision.config.run import load_config
from vision.data.samplers import Key
from vision.detection.coco_data import NOT_COUNTED, load_coco
from vision.errors import DataError

PLAIN = {"hflip": 0.0, "crop": 0.0, "short_sides": [48], "long_side": 64}
"""Options that disable augmentation."""


@pytest.fixture
def root(tmp_path):
    return coco_files.make_files(tmp_path / "data", train=5)


def changed(root, split, change):
    """Write an annotation file after a change."""
    found = coco_files.read(root, split)
    change(found)
    coco_files.write(root, split, found)


def pixels(image, config):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return (image * std + mean) * 255


def wrong_colors(image, target, config):
    """Return the fraction of mask pixels whose color belongs to another class or to none."""
    distances = (pixels(image, config)[None] - torch.tensor(COLORS).float()[:, :, None, None]).abs().amax(1)
    wrong, total = 0, 0
    for mask, label in zip(target["masks"].bool(), target["labels"], strict=True):
        wrong += int((distances[label - 1][mask] > 60).sum())
        total += int(mask.sum())
    return wrong / total


def test_masks_fill_boxes_and_have_the_colors_of_their_classes(root):
    config = settings(root, **PLAIN)
    image, target = load_coco(config, 0).train[Key(0, 0)]
    assert wrong_colors(image, target, config) == 0
    for (left, top, right, bottom), mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
        expected = torch.zeros(48, 64, dtype=torch.uint8)
        expected[top:bottom, left:right] = 1
        assert torch.equal(mask, expected)


def test_augmented_boxes_masks_and_pixels_are_consistent(root):
    config = settings(root, crop=0.5)
    train = load_coco(config, 0).train
    for epoch in range(13):
        image, target = train[Key(epoch, 1)]
        assert target["masks"].shape[1:] == image.shape[1:]
        if not len(target["labels"]):
            continue
        assert wrong_colors(image, target, config) < 0.2  # edges of resized pictures have mixed colors
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = (axis.nonzero().flatten() for axis in (mask.any(1), mask.any(0)))
            around = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            torch.testing.assert_close(around, box, rtol=0, atol=1.5)  # rounded twice


def test_mirrored_images_have_mirrored_boxes(root):
    plain, mirrored = (load_coco(settings(root, **{**PLAIN, "hflip": rate}), 0).train[Key(0, 0)] for rate in (0.0, 1.0))
    assert torch.equal(mirrored[0], plain[0].flip(-1))
    assert torch.equal(mirrored[1]["masks"], plain[1]["masks"].flip(-1))
    left, _, right, _ = plain[1]["boxes"].unbind(1)
    torch.testing.assert_close(mirrored[1]["boxes"][:, [0, 2]], torch.stack([64 - right, 64 - left], 1))


def test_short_sides_are_drawn_from_the_list_and_long_sides_are_bounded(root):
    config = settings(root, crop=0.0, short_sides=[40, 56, 72], long_side=80)
    train = load_coco(config, 0).train
    sizes = {tuple(train[Key(epoch, 0)][0].shape[1:]) for epoch in range(29)}
    assert sizes == {(40, 53), (56, 75), (60, 80)}


def test_crops_have_sides_within_both_bounds(root):
    config = settings(root, crop=1.0, crop_short_sides=[48], crop_sizes=[24, 31], short_sides=[48], long_side=10_000)
    train = load_coco(config, 0).train
    for epoch in range(11):
        height, width = train[Key(epoch, 0)][0].shape[1:]
        assert 24 / 31 - 0.02 <= height / width <= 31 / 24 + 0.02


def test_a_crop_without_objects_has_an_empty_target(root):
    def in_a_corner(found):
        for item in found["annotations"]:
            item.update(bbox=[0, 0, 2, 2], segmentation=[coco_files.polygon(0, 0, 2, 2)])

    changed(root, "train", in_a_corner)
    config = settings(root, crop=1.0, crop_short_sides=[48], crop_sizes=[8, 8])
    train = load_coco(config, 0).train
    targets = [train[Key(epoch, 0)][1] for epoch in range(7)]
    empty = next(target for target in targets if not len(target["labels"]))
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape[0] == 0


def test_augmentation_is_a_function_of_seed_epoch_and_index(root):
    first, second = (load_coco(settings(root), 5).train for _ in range(2))
    for key in (Key(0, 0), Key(3, 2)):
        ours, theirs = first[key], second[key]
        assert torch.equal(ours[0], theirs[0])
        assert all(torch.equal(ours[1][name], theirs[1][name]) for name in ("boxes", "labels", "masks"))
    images = [first[Key(epoch, 0)][0] for epoch in range(5)]
    assert any(image.shape != images[0].shape or not torch.equal(image, images[0]) for image in images)


def test_validation_images_keep_number_and_size(root):
    image, target = load_coco(settings(root), 0).val[2]
    assert image.shape == (3, 56, 75)
    assert target["image_id"] == 2
    assert target["size"].tolist() == [48, 64]


def test_images_without_objects_are_trained_on_if_configured(root):
    def without_objects(found):
        found["annotations"] = [item for item in found["annotations"] if item["image_id"] != 102]
        for item in found["annotations"]:
            item["iscrowd"] = int(item["image_id"] == 103)

    changed(root, "train", without_objects)
    assert len(load_coco(settings(root), 0).train) == 3
    train = load_coco(settings(root, keep_empty=True), 0).train
    assert len(train) == 5
    assert train[Key(0, 2)][1]["boxes"].shape == (0, 4)
    assert train[Key(0, 3)][1]["masks"].shape[0] == 0  # crowds are not trained on


def test_targets_have_no_masks_if_they_are_not_read(root):
    assert set(load_coco(settings(root, masks=False), 0).train[Key(0, 0)][1]) == {"boxes", "labels"}


def test_semantic_maps_are_augmented_as_their_images(root):
    (root / "maps").mkdir()
    for number in range(5):
        pixels = np.asarray(Image.open(root / f"train2017/{number}.png")).astype(int)
        distances = np.abs(pixels[:, :, None] - COLORS).max(-1)
        Image.fromarray(np.where(distances.min(-1) == 0, distances.argmin(-1), 255).astype(np.uint8)).save(
            root / f"maps/{number}.png"
        )
    train = load_coco(settings(root, stuff_maps="maps"), 0).train
    for epoch in range(7):
        image, target = train[Key(epoch, 1)]
        assert target["semantic_map"].shape == image.shape[1:]
        for mask, label in zip(target["masks"].bool(), target["labels"], strict=True):
            assert (target["semantic_map"][mask] == label - 1).all()


def test_a_semantic_map_of_another_size_cannot_be_used(root, tmp_path):
    (root / "maps").mkdir()
    for number in range(5):
        Image.fromarray(np.zeros((48, 65 if number == 1 else 64), np.uint8)).save(root / f"maps/{number}.png")
    data = load_coco(settings(root, stuff_maps="maps", **PLAIN), 0, tmp_path / "unreadable.txt")
    assert torch.equal(data.train[Key(0, 1)][0], data.train[Key(0, 2)][0])
    assert data.unreadable.count() == 1


def test_a_semantic_map_with_other_classes_cannot_be_used(root, tmp_path):
    (root / "maps").mkdir()
    for number, value in enumerate((4, 5, 255, 0, 200)):
        Image.fromarray(np.full((48, 64), value, np.uint8)).save(root / f"maps/{number}.png")
    notes = tmp_path / "unreadable.txt"
    train = load_coco(settings(root, stuff_maps="maps", **PLAIN), 0, notes, stuff_classes=5).train
    for index, expected in enumerate((4, 255, 255, 0, 4)):  # of 1.png and 4.png, the next images are taken
        assert (train[Key(0, index)][1]["semantic_map"] == expected).all()
    text = notes.read_text()
    assert [f"{number}.png" in text for number in range(5)] == [False, True, False, False, True]


def test_omitted_annotations_are_reported(root):
    changed(root, "train", lambda found: found["annotations"][0].update(bbox=[1, 1, 0, 0]))
    (remark,) = load_coco(settings(root), 0).remarks
    assert "1 with boxes that have no area" in remark


@pytest.mark.parametrize("damage", ["bytes", "size", "missing", "folder"])
def test_unusable_images_are_noted_and_do_not_count(root, tmp_path, damage):
    file = root / "val2017/1.png"
    file.unlink()
    if damage == "bytes":
        file.write_bytes(b"\x89PNG\r\n\x1a\n")
    elif damage == "size":
        Image.fromarray(np.zeros((47, 64, 3), np.uint8)).save(file)
    elif damage == "folder":
        file.mkdir()
    data = load_coco(settings(root), 0, tmp_path / "unreadable.txt")
    assert data.val[1][1]["image_id"] == NOT_COUNTED
    assert data.unreadable.count() == 1


def test_training_takes_the_next_image_instead(root, tmp_path):
    (root / "train2017/0.png").write_bytes(b"")
    config = settings(root, **PLAIN)
    data = load_coco(config, 0, tmp_path / "unreadable.txt")
    image, target = data.train[Key(0, 0)]
    assert torch.equal(image, data.train[Key(0, 1)][0])
    assert wrong_colors(image, target, config) == 0
    assert data.unreadable.count() == 1


def test_damaged_images_stop_a_run_if_configured(root):
    (root / "train2017/0.png").write_bytes(b"")
    with pytest.raises(DataError):
        load_coco(settings(root, unreadable="stop"), 0).train[Key(0, 0)]


def test_masks_that_exceed_the_memory_limit_are_refused(root):
    def huge(found):
        found["images"][0].update(width=40_000, height=40_000)

    changed(root, "train", huge)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "train2017/0.png")
    data = load_coco(settings(root), 0)
    with pytest.raises(ValueError, match="masks"):
        data.train._target(data.train.images[0])


def no_objects(found):
    found["annotations"] = []


def other_ids(found):
    found["categories"][0]["id"] = 4


def other_names(found):
    found["categories"][0]["name"] = "blue"


def more_classes(found):
    found["categories"].append({"id": 99, "name": "blue"})


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (no_objects, "empty-data", "instances_val2017.json"),
        (other_ids, "empty-data", "instances_val2017.json"),
        (other_names, "class-mismatch", "blue"),
        (more_classes, "class-mismatch", "3 classes"),
    ],
)
def test_mismatched_files_are_refused(root, change, code, named):
    if change is other_ids:  # annotations of the other class would still be there
        changed(root, "val", lambda found: [item.update(category_id=3) for item in found["annotations"]])
    changed(root, "val", change)
    with raises_error(code=code, key="data.val_annotations", names=named):
        load_coco(settings(root), 0)


def test_a_missing_directory_is_named(root):
    with raises_error(code="missing-file", key="data.train_images", names="pictures"):
        load_coco(settings(root, train_images="pictures"), 0)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"short_sides": []}, "short_sides"),
        ({"crop_short_sides": [3]}, "crop_short_sides"),
        ({"crop_sizes": [40, 32]}, "crop_sizes"),
        ({"crop": 1.5}, "crop"),
        ({"val_short_side": 0}, "val_short_side"),
    ],
)
def test_invalid_values_are_refused(root, options, key):
    run = {"model": {"timm": "test_revcol"}, "output": "runs/none", "data": {**coco_files.values(root), **options}}
    with raises_error(code="out-of-range", key=f"data.{key}"):
        load_config(run)
