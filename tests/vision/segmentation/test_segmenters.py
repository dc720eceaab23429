"""UperNet and Mask2Former on RevCol backbones."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from timm.optim import param_groups_layer_decay
from transformers import Mask2FormerForUniversalSegmentation

import revnets
from revnets.config.errors import ArgumentError
from revnets.memory.tracker import kept_bytes, peak_bytes
from tests.support.errors import raises_error
from vision.huggingface import RevColBackboneConfig
from vision.segmentation import Mask2Former, UperNet, mask2former, upernet
from vision.segmentation.segmenters import IGNORED
from vision.tasks.semantic_segmentation import SegmentationStep

SIZE = (61, 67)
SMALL = {"upernet": {"channels": 16, "auxiliary_channels": 8}}
SMALL["mask2former"] = {
    "width": 32,  # GroupNorm has 32 groups
    "feedforward": 64,
    "queries": 7,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "heads": 2,
    "points": 53,
}
BUILDERS = {"upernet": upernet, "mask2former": mask2former}


def build(name, **options):
    torch.manual_seed(0)
    return BUILDERS[name]("test_revcol", 5, **SMALL[name], **options)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *SIZE, generator=generator)
    maps = torch.randint(0, 5, (2, *SIZE), generator=generator)
    maps[:, :7] = IGNORED
    return images, maps


def gradients(model):
    torch.manual_seed(2)
    model.semantic_loss(*batch()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", BUILDERS)
def test_exact_gradients_equal_stored_ones(name):
    expected = gradients(build(name, memory="store"))
    for parameter, gradient in gradients(build(name, memory="exact")).items():
        assert torch.equal(gradient, expected[parameter]), parameter


@pytest.mark.parametrize("memory", ["store", "exact"])
@pytest.mark.parametrize(("name", "options"), [("upernet", {"dropout": 0.3}), ("mask2former", {})])
def test_checkpointed_heads_are_bit_exact(name, options, memory):
    plain, recomputing = (build(name, memory=memory, checkpoint_heads=value, **options) for value in (False, True))
    expected, found = gradients(plain), gradients(recomputing)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    for name, tensor in recomputing.state_dict().items():  # running statistics among them
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_checkpointed_heads_keep_neither_activations_nor_scores():
    images, maps = batch()
    kept = {}
    for value in (False, True):
        model = SegmentationStep(build("upernet", memory="exact", checkpoint_heads=value).train())
        kept[value] = kept_bytes(model, images)
    backbone = kept_bytes(build("upernet", memory="exact").backbone.train(), images)
    states, loss = 2 * torch.get_rng_state().nbytes, 4  # of dropout, for each head
    assert kept[True] <= backbone + maps.nbytes + states + 4 * loss
    scores = 2 * 5 * SIZE[0] * SIZE[1] * 4
    assert kept[False] - kept[True] > 2 * scores  # the logarithms of those of both heads, in addition to activations


def test_checkpointed_decoders_keep_neither_activations_nor_points():
    images, _ = batch()
    kept = [
        kept_bytes(SegmentationStep(build("mask2former", memory="exact", checkpoint_heads=value).train()), images)
        for value in (False, True)
    ]
    positions, queries = 2 * (8 * 9 + 4 * 5 + 2 * 3), 2 * SMALL["mask2former"]["queries"]
    hidden = positions * 32 + 2 * queries * 64  # of the networks of one pixel layer and of two query layers
    points = 3 * 2 * 5 * SMALL["mask2former"]["points"] * 2  # coordinates, for five masks of three predictions
    assert kept[0] - kept[1] > 4 * (hidden + points)


@pytest.mark.parametrize("name", BUILDERS)
def test_checkpointed_heads_are_saved_with_the_segmenter(name, tmp_path):
    build(name, checkpoint_heads=True).save_pretrained(tmp_path)
    again = {"upernet": UperNet, "mask2former": Mask2Former}[name].from_pretrained(tmp_path)
    assert again.config.checkpoint_heads is True


def test_mask2former_is_that_of_transformers():
    """Loss and gradients equal those of transformers' own class bit for bit."""
    model = build("mask2former")
    original = Mask2FormerForUniversalSegmentation(model.config)
    original.load_state_dict(model.state_dict())
    images, maps = batch()
    results = []
    for module in (model, original):
        torch.manual_seed(3)
        loss = module(pixel_values=images, **model.targets(maps)).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in module.parameters())])
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize(("memory", "recomputes"), [("store", False), ("exact", True)])
def test_the_peak_of_mask2former_is_predicted(memory, recomputes):
    step = SegmentationStep(build("mask2former", memory=memory, checkpoint_heads=recomputes).train())
    images, _ = batch()
    row = revnets.plan(step, images.shape, modes=[memory], optimizer="none").modes[0]
    assert row.peak - row.parameters == pytest.approx(peak_bytes(step, images), rel=0.01)
    assert torch.isfinite(step(images))  # a simulated step leaves nothing behind


def test_checkpointed_heads_refuse_a_single_class():
    model = upernet("test_revcol", 1, **SMALL["upernet"], checkpoint_heads=True)
    images, maps = batch()
    with pytest.raises(ValueError, match="greater than one"):
        model(pixel_values=images, labels=torch.zeros_like(maps))


@pytest.mark.parametrize(("option", "value"), [("return_dict", False), ("output_hidden_states", True)])
def test_checkpointed_heads_return_the_configured_output(option, value):
    images, maps = batch()
    expected, found = (build("upernet", dropout=0.0, checkpoint_heads=checkpoints) for checkpoints in (False, True))
    for model in (expected, found):
        setattr(model.config, option, value)
    expected, found = (model(pixel_values=images, labels=maps) for model in (expected, found))
    assert type(found) is type(expected)
    assert len(found) == len(expected)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("name", BUILDERS)
def test_every_parameter_has_a_gradient(name):
    assert all(gradient is not None for gradient in gradients(build(name)).values())


@pytest.mark.parametrize("name", BUILDERS)
def test_logits_have_the_size_of_the_images(name):
    model = build(name).eval()
    with torch.no_grad():
        assert model.semantic_logits(batch()[0]).shape == (2, 5, *SIZE)


def test_the_loss_of_upernet_ignores_pixels_without_a_class():
    model = build("upernet").eval()
    images, maps = batch()
    with torch.no_grad():
        maps_of_auxiliary = model.auxiliary_head(model.backbone(images).feature_maps)
        auxiliary = F.interpolate(maps_of_auxiliary, size=SIZE, mode="bilinear", align_corners=False)
        counts = maps != IGNORED
        expected = F.cross_entropy(model.semantic_logits(images).movedim(1, -1)[counts], maps[counts])
        expected = expected + 0.4 * F.cross_entropy(auxiliary.movedim(1, -1)[counts], maps[counts])
        torch.testing.assert_close(model.semantic_loss(images, maps), expected)


def test_an_image_without_classes_has_a_finite_mask_loss():
    model = build("mask2former")
    images, maps = batch()
    maps[0] = IGNORED
    loss = model.semantic_loss(images, maps)
    loss.backward()
    assert torch.isfinite(loss)


def test_dropout_changes_the_decoder_in_training_alone():
    model = build("upernet", dropout=0.5).eval()
    images, _ = batch()
    with torch.no_grad():
        assert torch.equal(model.semantic_logits(images), model.semantic_logits(images))
        model.decode_head.classifier.train()
        assert not torch.equal(model.semantic_logits(images), model.semantic_logits(images))


def test_a_saved_segmenter_keeps_its_dropout_and_weights(tmp_path):
    model = build("upernet", dropout=0.3, kernel_size=7).eval()
    model.save_pretrained(tmp_path)
    again = UperNet.from_pretrained(tmp_path).eval()
    images, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(again.semantic_logits(images), model.semantic_logits(images))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert again.config.head_dropout == 0.3


def test_a_saved_mask2former_loads_with_all_weights(tmp_path):
    model = build("mask2former")
    model.save_pretrained(tmp_path)
    again = Mask2Former.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("name", BUILDERS)
def test_layer_decay_scales_the_backbone_and_not_the_heads(name):
    model = build(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    revcol = model.revcol
    inside = {id(parameter) for parameter in revcol.parameters()}
    assert {scale[key] for key in scale if key not in inside} == {1.0}
    reference = param_groups_layer_decay(revcol, layer_decay=0.5, no_weight_decay_list=revcol.no_weight_decay())
    # The backbone has no head of its own; behind its last layer come the heads of the segmenter.
    own = {id(parameter): group["lr_scale"] for group in reference for parameter in group["params"]}
    ratios = {scale[key] / own[key] for key in own}
    assert len(ratios) == 1


def test_a_budget_counts_the_head_and_the_loss():
    model = build("upernet", memory={"budget": "1GiB"}).train()
    images, maps = batch()
    model(pixel_values=images, labels=maps).loss.backward()
    classes = 31
    torch.manual_seed(0)
    wide = upernet("test_revcol", classes, memory={"budget": "1GiB"}, **SMALL["upernet"]).train()
    wide(pixel_values=images, labels=maps).loss.backward()
    scores = 2 * SIZE[0] * SIZE[1] * (classes - 5) * 4
    assert wide.memory_plan.chosen.peak - model.memory_plan.chosen.peak > 2 * scores


def test_mask2former_refuses_a_budget():
    with pytest.raises(ValueError) as caught:
        build("mask2former", memory={"budget": "1GiB"})
    assert (caught.value.key, caught.value.code) == ("memory", "conflicting-values")


@pytest.mark.parametrize(
    ("variant", "channels", "millions"),
    [
        ("revcol_tiny", 512, 60.25),
        ("revcol_small", 512, 90.36),
        ("revcol_base", 512, 168.87),
        ("revcol_large", 512, 306.6),
        ("revcol_huge", 1440, 2421.1),
    ],
)
def test_upernet_has_the_parameters_of_the_paper(variant, channels, millions):
    with torch.device("meta"):
        model = upernet(variant, 150, channels=channels)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("build", [upernet, mask2former])
def test_unknown_options_of_the_backbone_are_refused(build):
    with raises_error(ArgumentError, code="unknown-key", names="kernel_size"):
        build("test_revcol", 5, kernel_sise=7)


@pytest.mark.parametrize("build", [upernet, mask2former])
def test_options_beside_a_configuration_are_refused(build):
    with raises_error(ArgumentError, code="unknown-key", names="kernel_size"):
        build(RevColBackboneConfig(name="test_revcol", out_indices=[0, 1, 2, 3]), 5, kernel_size=7)
