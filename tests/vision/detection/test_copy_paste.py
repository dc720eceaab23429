"""Copy-paste augmentation."""

import pytest
import torch

pytest.importorskip("torchvision")

from tests.support.detection import detection_batch
from vision.detection import CopyPaste
from vision.detection.copy_paste import paste_objects, pixel_boxes


def pasted(chosen=(True,)):
    (image, source), (target, other) = detection_batch()
    return image, target, source, other, *paste_objects(image, target, source, other, torch.tensor(chosen))


def test_pixels_of_the_object_come_from_the_other_image():
    image, _, source, other, found, _ = pasted()
    mask = torch.zeros(image.shape[1:], dtype=torch.bool)
    mask[:, :71] = other["masks"][0, :61].bool()
    assert mask.any()
    assert torch.equal(found[:, mask], source[:, :61][:, mask[:, :71]])
    assert torch.equal(found[:, ~mask], image[:, ~mask])


def test_occluded_objects_lose_pixels_and_get_new_boxes():
    _, target, _, other, _, result = pasted()
    cover = torch.zeros_like(target["masks"][0]).bool()
    cover[:, :71] = other["masks"][0, :61].bool()
    behind = target["masks"] * ~cover
    counts = behind.flatten(1).sum(1)
    visible = counts >= 16
    assert not torch.equal(counts, target["masks"].flatten(1).sum(1))
    assert torch.equal(result["masks"][:-1], behind[visible])
    assert torch.equal(result["boxes"][:-1], pixel_boxes(behind[visible]))
    assert result["labels"].tolist() == [*target["labels"][visible].tolist(), 2]


def test_covered_objects_are_dropped():
    (image, source), (target, other) = detection_batch()
    other["masks"][:] = 1
    _, result = paste_objects(image, target, source, other, torch.tensor([True]))
    assert result["labels"].tolist() == [3, 2]  # only the object that reaches beyond the other image is left
    assert result["boxes"][1].tolist() == [0, 0, 71, 61]


def test_classes_of_pixels_move_with_the_object():
    _, target, _, other, _, result = pasted()
    front = result["masks"][-1].bool()
    assert torch.equal(result["semantic_map"][front], other["semantic_map"][:61][front[:, :71]])
    assert torch.equal(result["semantic_map"][~front], target["semantic_map"][~front])


@pytest.mark.parametrize("value", [255, 0.25])
def test_pixels_of_objects_count_for_any_value(value):
    (image, source), (target, other) = detection_batch()
    visible = int(other["masks"][:, : image.shape[1], : image.shape[2]].sum())
    for part in (target, other):
        part["masks"] = part["masks"] * value
    for least, is_pasted in ((visible, True), (visible + 1, False)):
        _, result = paste_objects(image, target, source, other, torch.tensor([True]), least)
        assert (2 in result["labels"]) == is_pasted


def test_areas_and_crowds_move_with_their_objects():
    (image, source), (target, other) = detection_batch()
    for part in (target, other):
        part["area"] = part["masks"].flatten(1).sum(1).float()
        part["iscrowd"] = torch.zeros_like(part["labels"])
    other["iscrowd"][:] = 1
    _, result = paste_objects(image, target, source, other, torch.tensor([True]))
    assert torch.equal(result["area"], result["masks"].flatten(1).sum(1).float())
    assert result["iscrowd"].tolist() == [0] * (len(result["labels"]) - 1) + [1]


@pytest.mark.parametrize(
    ("extra", "code"),
    [({"area": torch.ones(2)}, "missing-key"), ({"keypoints": torch.ones(2, 5, 3)}, "unknown-key")],
)
def test_unknown_keys_of_targets_are_refused(extra, code):
    images, (target, other) = detection_batch()
    with pytest.raises(ValueError) as caught:
        CopyPaste()(images, [target | extra, other])
    assert (caught.value.key, caught.value.code) == (f"targets.{next(iter(extra))}", code)


def test_nothing_changes_without_chosen_objects():
    image, target, *_, found, result = pasted((False,))
    assert found is image
    assert result is target


def test_a_batch_gets_the_objects_of_its_next_image():
    images, targets = detection_batch()
    before = [image.clone() for image in images]
    found, results = CopyPaste(probability=1.0)(images, targets, torch.Generator().manual_seed(0))
    again, _ = CopyPaste(probability=1.0)(images, targets, torch.Generator().manual_seed(0))
    assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))
    assert all(torch.equal(first, second) for first, second in zip(images, before, strict=True))
    assert any(not torch.equal(first, second) for first, second in zip(found, images, strict=True))
    for image, result in zip(found, results, strict=True):
        assert result["masks"].shape == (len(result["labels"]), *image.shape[1:])


def test_one_image_and_images_without_objects_are_unchanged():
    images, targets = detection_batch((([], []), ([], [])))
    found, _ = CopyPaste(probability=1.0)(images, targets)
    assert all(first is second for first, second in zip(found, images, strict=True))
    found, _ = CopyPaste(probability=1.0)(*(part[:1] for part in detection_batch()))
    assert torch.equal(found[0], detection_batch()[0][0])
