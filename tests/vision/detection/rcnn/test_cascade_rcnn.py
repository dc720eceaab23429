"""Cascade Mask R-CNN and HTC as whole models."""

import math

import pytest
import torch

pytest.importorskip("torchvision")

from revnets.memory.tracker import kept_bytes
from tests.support.detection import CLASSES, SIZES, SMALL, STUFF, detection_batch
from vision.detection import cascade_mask_rcnn, htc
from vision.detection.training_targets import checked_targets

BUILDERS = {"cascade": (cascade_mask_rcnn, {}), "htc": (htc, {"stuff_classes": STUFF})}
SAMPLED = 61
NOTHING = (([], []), ([], []))


def build(name="cascade", **options):
    torch.manual_seed(0)
    builder, own = BUILDERS[name]
    model = builder("test_revcol", CLASSES, **SMALL, **own, **options)
    for stage in model.roi_heads.box_stages:
        stage.sampler.batch_size_per_image = SAMPLED
    return model


@pytest.fixture(scope="module")
def untrained():
    return build("htc")


def trained(model, content=None):
    """Return the losses of one step after its backward pass."""
    torch.manual_seed(2)
    losses = model.train()(*detection_batch() if content is None else detection_batch(content))
    sum(losses.values()).backward()
    return losses


def gradients(model):
    trained(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module", params=BUILDERS)
def stored(request):
    """A name, and its gradients and buffers after a step in mode `store`."""
    model = build(request.param, memory="store")
    return request.param, gradients(model), dict(model.named_buffers())


@pytest.mark.parametrize("heads", [False, True], ids=["kept", "recomputed"])
def test_exact_gradients_and_statistics_equal_stored_ones(stored, heads):
    name, expected, buffers = stored
    model = build(name, memory="exact", checkpoint_heads=heads)
    found = gradients(model)
    assert all(gradient is not None for gradient in found.values())
    assert [key for key, gradient in found.items() if not torch.equal(gradient, expected[key])] == []
    assert [key for key, buffer in model.named_buffers() if not torch.equal(buffer, buffers[key])] == []


@pytest.mark.parametrize("name", BUILDERS)
def test_recomputed_heads_keep_fewer_bytes(name):
    kept = [kept_bytes(build(name, checkpoint_heads=heads).train(), *detection_batch()) for heads in (False, True)]
    convolutions = 4 * len(SIZES) * 3 * SAMPLED * 7 * 7 * SMALL["channels"] * 4  # of the boxes of three stages
    assert kept[0] - kept[1] > convolutions


def test_detections_are_those_of_torchvision_s_detectors():
    model = build().eval()
    with torch.no_grad():
        found = model(detection_batch()[0])
    for item, size in zip(found, SIZES, strict=True):
        count = len(item["labels"])
        assert 0 < count <= 100
        assert item["boxes"].shape == (count, 4)
        assert item["masks"].shape == (count, 1, *size)
        assert set(item["labels"].tolist()) <= set(range(1, CLASSES + 1))
        assert torch.equal(item["scores"], item["scores"].sort(descending=True).values)
        assert (item["boxes"] >= 0).all()
        assert (item["boxes"][:, 2:] <= torch.tensor(size[::-1])).all()
        assert (item["masks"] >= 0).all()
        assert (item["masks"] <= 1).all()


def test_a_cascade_without_masks_needs_none():
    model = build(masks=False)
    images, targets = detection_batch()
    losses = model.train()(images, [{key: target[key] for key in ("boxes", "labels")} for target in targets])
    assert not any("mask" in name for name in losses)
    with torch.no_grad():
        assert set(model.eval()(images)[0]) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("content", [NOTHING, (NOTHING[0], ([[11, 3, 53, 47]], [2]))], ids=["none", "one"])
def test_images_without_objects_have_finite_gradients(name, content):
    model = build(name)
    losses = trained(model, content)
    assert all(torch.isfinite(loss) for loss in losses.values())
    for parameter in model.parameters():
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("content", [NOTHING, None], ids=["none", "objects"])
def test_images_without_proposals_have_finite_losses_and_statistics(content):
    model = build()
    model.rpn._post_nms_top_n = {"training": 0, "testing": 0}
    assert all(torch.isfinite(loss) for loss in trained(model, content).values())
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    with torch.no_grad():
        assert all(torch.isfinite(item["scores"]).all() for item in model.eval()(detection_batch()[0]))


def test_images_smaller_than_every_anchor_have_finite_gradients():
    model = build().train()
    target = {"boxes": torch.tensor([[2.0, 3.0, 11.0, 13.0]]), "labels": torch.tensor([1])}
    losses = model([torch.randn(3, 17, 19)], [{**target, "masks": torch.ones(1, 17, 19)}])
    sum(losses.values()).backward()
    assert losses["loss_objectness"] == losses["loss_rpn_box_reg"] == 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_boxes_without_an_area_in_the_image_do_not_count():
    images, targets = detection_batch()
    expected = trained(build())
    target = targets[0]
    more = torch.tensor([[13.0, 17.0, 29.0, 17.0], [30.0, 5.0, 20.0, 50.0], [93.0, 5.0, 1e30, 11.0]])
    target["boxes"] = torch.cat([more, target["boxes"]])
    target["labels"] = torch.cat([torch.tensor([2, 1, 3]), target["labels"]])
    target["masks"] = torch.cat([torch.ones(3, *SIZES[0], dtype=torch.uint8), target["masks"]])
    model = build().train()
    torch.manual_seed(2)
    found = model(images, targets)
    assert {name: loss.item() for name, loss in found.items()} == {key: loss.item() for key, loss in expected.items()}


def test_boxes_are_clipped_to_the_image():
    images, targets = detection_batch()
    targets[0]["boxes"][0] = torch.tensor([-1e30, 7.0, 1e30, 41.0])
    checked = checked_targets(images, targets, CLASSES)
    assert checked[0]["boxes"][0].tolist() == [0, 7, 93, 41]


def broken(name, value):
    def change(targets):
        targets[1][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "key", "code"),
    [
        (lambda targets: targets.pop(), "targets", "wrong-length"),
        (lambda targets: targets[0].pop("masks"), "targets.0.masks", "missing-key"),
        (lambda targets: targets.__setitem__(0, None), "targets.0", "wrong-type"),
        (broken("boxes", torch.zeros(1, 5)), "targets.1.boxes", "shape-mismatch"),
        (broken("labels", torch.ones(2, dtype=torch.long)), "targets.1.labels", "shape-mismatch"),
        (broken("masks", torch.zeros(1, 71, 64)), "targets.1.masks", "shape-mismatch"),
        (broken("boxes", torch.tensor([[1.0, 2.0, math.nan, 7.0]])), "targets.1.boxes", "not-finite"),
        (broken("labels", torch.ones(1, 1, dtype=torch.long)), "targets.1.labels", "shape-mismatch"),
        (broken("labels", torch.tensor([1.5])), "targets.1.labels", "wrong-type"),
        (broken("masks", torch.full((1, *SIZES[1]), math.nan)), "targets.1.masks", "not-finite"),
        (broken("labels", torch.tensor([0])), "targets.1.labels", "out-of-range"),
        (broken("labels", torch.tensor([CLASSES + 1])), "targets.1.labels", "out-of-range"),
        (lambda targets: targets[0].pop("semantic_map"), "targets.0.semantic_map", "missing-key"),
        (broken("semantic_map", torch.zeros(71, 64)), "targets.1.semantic_map", "shape-mismatch"),
        (broken("semantic_map", torch.full(SIZES[1], STUFF)), "targets.1.semantic_map", "out-of-range"),
    ],
)
def test_mismatched_targets_are_named(untrained, change, key, code):
    images, targets = detection_batch()
    change(targets)
    with pytest.raises(ValueError) as caught:
        untrained.train()(images, targets)
    assert (caught.value.key, caught.value.code) == (key, code)


@pytest.mark.parametrize(
    ("images", "code"),
    [
        ([], "shape-mismatch"),
        ([torch.zeros(3, 5)], "shape-mismatch"),
        ([torch.zeros(3, 0, 5)], "shape-mismatch"),
        ([torch.zeros(3, 37, 41), torch.zeros(1, 37, 41)], "shape-mismatch"),
        ([torch.zeros(1, 37, 41)], "shape-mismatch"),
        ([None], "wrong-type"),
        ([torch.zeros(3, 37, 41, dtype=torch.uint8)], "wrong-type"),
    ],
)
def test_images_of_other_shapes_are_refused(untrained, images, code):
    with pytest.raises(ValueError) as caught:
        untrained.eval()(images)
    assert (caught.value.key, caught.value.code) == ("images", code)


@pytest.mark.parametrize(
    ("backbone", "classes", "options", "key", "code"),
    [
        ("revcol_none", 3, {}, "backbone", "component-failed"),
        ("resnet18", 3, {}, "backbone", "no-columns"),
        ("test_revcol", 3, {"height": 3}, "backbone", "component-failed"),
        ("test_revcol", 0, {}, "num_classes", "out-of-range"),
        ("test_revcol", 3, {"memory": {"budget": "1GiB"}}, "memory", "conflicting-values"),
    ],
)
def test_unsuitable_backbones_are_refused(backbone, classes, options, key, code):
    with pytest.raises(ValueError) as caught:
        cascade_mask_rcnn(backbone, classes, **options)
    assert (caught.value.key, caught.value.code) == (key, code)


@pytest.mark.parametrize("build", [cascade_mask_rcnn, htc])
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"channels": -5}, "out-of-range"),
        ({"channels": 0}, "out-of-range"),
        ({"channels": True}, "wrong-type"),
        ({"width": 0}, "out-of-range"),
        ({"mask_width": 2.5}, "wrong-type"),
        ({"score_threshold": -1}, "out-of-range"),
        ({"score_threshold": 1}, "out-of-range"),
        ({"score_threshold": math.nan}, "out-of-range"),
        ({"score_threshold": "high"}, "wrong-type"),
    ],
)
def test_invalid_options_are_refused(build, options, code):
    with pytest.raises(ValueError) as caught:
        build("test_revcol", 3, **options)
    assert (caught.value.key, caught.value.code) == (next(iter(options)), code)


@pytest.mark.parametrize(("classes", "code"), [(0, "out-of-range"), ("x", "wrong-type")])
def test_invalid_stuff_classes_are_refused(classes, code):
    with pytest.raises(ValueError) as caught:
        htc("test_revcol", 3, classes)
    assert (caught.value.key, caught.value.code) == ("stuff_classes", code)


@pytest.mark.parametrize(
    ("variant", "millions"), [("tiny", 87.94), ("small", 118.05), ("base", 196.07), ("large", 330.31)]
)
def test_cascade_has_the_parameters_of_the_paper(variant, millions):
    with torch.device("meta"):
        model = cascade_mask_rcnn(f"revcol_{variant}", 80)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_htc_of_the_largest_backbone_with_larger_kernels():
    with torch.device("meta"):
        model = htc("revcol_huge", 80, 183, kernel_size=7)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(2221.96, abs=0.005)
