"""DINO as a whole model."""

import math
from functools import partial

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from torchvision.ops import box_iou

from revnets.memory.tracker import kept_bytes
from tests.support.detection import CLASSES, SIZES, detection_batch
from tests.support.two_processes import in_two_processes
from vision.detection import dino

SMALL = {"width": 32, "feedforward": 64, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "queries": 7}
NOTHING = (([], []), ([], []))


def build(**options):
    torch.manual_seed(0)
    return dino("test_revcol", CLASSES, **{**SMALL, "denoising": 5, **options})


def trained(model, batch=None):
    """Return the losses of one step after its backward pass."""
    torch.manual_seed(2)
    losses = model.train()(*(batch or detection_batch()))
    sum(losses.values()).backward()
    return losses


def gradients(model, batch=None):
    trained(model, batch)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def stored():
    return gradients(build(memory="store"))


@pytest.mark.parametrize("options", [{}, {"checkpoint_heads": True}], ids=["kept", "checkpointed"])
def test_exact_gradients_equal_stored_ones(stored, options):
    found = gradients(build(memory="exact", **options))
    assert [name for name, gradient in found.items() if not torch.equal(gradient, stored[name])] == []


@pytest.mark.parametrize("options", [{}, {"scales": 5}, {"shared_heads": False}, {"denoising": 0}])
@pytest.mark.parametrize("content", [None, NOTHING], ids=["objects", "background"])
def test_every_parameter_has_a_finite_gradient(options, content):
    found = gradients(build(**options), None if content is None else detection_batch(content))
    assert [name for name, gradient in found.items() if gradient is None or not gradient.isfinite().all()] == []


def test_checkpointed_layers_keep_fewer_bytes():
    kept = [kept_bytes(build(checkpoint_heads=is_on).train(), *detection_batch()) for is_on in (False, True)]
    hidden = 2 * 9 * 12 * SMALL["feedforward"] * 4  # of two images: activations of one network at the finest level
    assert kept[0] - kept[1] > 2 * SMALL["encoder_layers"] * hidden


def test_losses_have_a_name_for_every_layer():
    parts = ["", "_0", "_proposals", "_denoising", "_denoising_0"]
    losses = trained(build())
    assert set(losses) == {f"loss_{kind}{part}" for kind in ("class", "box", "giou") for part in parts}


def test_detections_are_those_of_torchvision_s_detectors():
    model = build(detections=19).eval()
    with torch.no_grad():
        found = model(detection_batch()[0])
    for item, size in zip(found, SIZES, strict=True):
        assert item["boxes"].shape == (19, 4)
        assert set(item["labels"].tolist()) <= set(range(1, CLASSES + 1))
        assert torch.equal(item["scores"], item["scores"].sort(descending=True).values)
        assert (item["boxes"] >= 0).all()
        assert (item["boxes"][:, 2:] <= torch.tensor(size[::-1])).all()


def test_more_objects_than_queries_have_finite_losses():
    boxes = [[index, index, index + 9, index + 13] for index in range(17)]
    losses = trained(build(), detection_batch(((boxes, [1] * 17), ([], []))))
    assert all(loss.isfinite() for loss in losses.values())


def test_boxes_without_an_area_do_not_count():
    plain = detection_batch()
    odd = detection_batch((([[5, 7, 31, 41], [40, 10, 83, 57], [9, 9, 9, 30]], [1, 3, 2]), ([[11, 3, 53, 47]], [2])))
    torch.testing.assert_close(trained(build(), odd), trained(build(), plain))


@pytest.mark.parametrize("size", [(199, 2), (3, 67)])
def test_images_thinner_than_the_coarsest_stride_are_padded(size):
    torch.manual_seed(3)
    images = [torch.randn(3, *size)]
    targets = [{"boxes": torch.tensor([[0.0, 0, size[1], size[0]]]), "labels": torch.tensor([2])}]
    model = build()
    for name, loss in trained(model, (images, targets)).items():
        assert loss.isfinite(), name
    with torch.no_grad():
        (found,) = model.eval()(images)
    assert found["scores"].isfinite().all()
    assert (found["boxes"] <= torch.tensor([size[1], size[0]] * 2)).all()


def test_bfloat16_autocast_gives_finite_losses():
    with torch.autocast("cpu", torch.bfloat16):
        losses = build().train()(*detection_batch())
    assert all(loss.isfinite() for loss in losses.values())


def test_one_image_is_learned():
    images, targets = (items[:1] for items in detection_batch())
    model = build(width=64, queries=11, encoder_layers=1, denoising=20).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        found = model.eval()(images)[0]
    assert losses[-1] < losses[0] / 2
    assert found["labels"][0] in targets[0]["labels"]
    overlap = box_iou(found["boxes"][:1], targets[0]["boxes"][targets[0]["labels"] == found["labels"][0]])
    assert overlap.max() > 0.5


def images_of_one_size():
    images, targets = detection_batch()
    return [image[:, :61, :71] for image in images], targets


def _compare_mean(expected, rank):
    images, targets = images_of_one_size()
    found = build(denoising=0).train()(images[rank : rank + 1], targets[rank : rank + 1])
    for name, loss in expected.items():
        mean = loss.new_tensor(found[name].item())
        torch.distributed.all_reduce(mean)
        torch.testing.assert_close(mean / 2, loss)


def test_losses_of_two_processes_are_those_of_all_images_on_average(tmp_path):
    """Also if the images have different numbers of objects."""
    with torch.no_grad():
        expected = build(denoising=0).train()(*images_of_one_size())
    in_two_processes(partial(_compare_mean, expected), tmp_path)


@pytest.mark.parametrize(
    ("options", "key", "code"),
    [
        ({"scales": 3}, "scales", "unknown-choice"),
        ({"width": 48}, "width", "not-divisible"),
        ({"heads": 5}, "width", "not-divisible"),
        ({"queries": 0}, "queries", "out-of-range"),
        ({"queries": "x"}, "queries", "wrong-type"),
        ({"denoising": -1}, "denoising", "out-of-range"),
        ({"denoising": 2.5}, "denoising", "wrong-type"),
        ({"box_noise": math.nan}, "box_noise", "out-of-range"),
        ({"memory": {"budget": "1GiB"}}, "memory", "conflicting-values"),
        ({"kernel_sizes": 3}, "backbone", "component-failed"),
    ],
)
def test_invalid_options_are_refused(options, key, code):
    with pytest.raises(ValueError) as caught:
        build(**options)
    assert (caught.value.key, caught.value.code) == (key, code)


def test_training_needs_targets():
    with pytest.raises(ValueError) as caught:
        build().train()(detection_batch()[0])
    assert (caught.value.key, caught.value.code) == ("targets", "wrong-length")


@pytest.mark.parametrize(("scales", "millions"), [(4, 2185.6), (5, 2186.0)])
def test_parameters_of_the_paper_s_model(scales, millions):
    with torch.device("meta"):
        model = dino("revcol_huge", 80, kernel_size=7, scales=scales)
    assert math.isclose(sum(parameter.numel() for parameter in model.parameters()) / 1e6, millions, abs_tol=0.05)
