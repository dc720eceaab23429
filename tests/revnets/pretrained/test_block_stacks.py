"""The stacks of blocks found in networks of timm and torchvision, and unsupported blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import revnets
from revnets.engine.errors import ArgumentError
from revnets.pretrained.block_stacks import find_stacks
from tests.support.residual_networks import ResidualBlock, ResidualNetwork

FOUND = {
    "vit_tiny_patch16_224": {"blocks": 12},
    "swin_tiny_patch4_window7_224": {"layers.0.blocks": 2, "layers.1.blocks": 2, "layers.2.blocks": 6}
    | {"layers.3.blocks": 2},
    "convnext_atto": {"stages.0.blocks": 2, "stages.1.blocks": 2, "stages.2.blocks": 6, "stages.3.blocks": 2},
    "resnet50": {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2},  # the first block of each stage changes the shape
    "efficientnet_b0": {"blocks.2": None, "blocks.3": 2, "blocks.4": 2, "blocks.5": 3},
    "mixer_s32_224": {"blocks": 8},
}


@pytest.mark.parametrize("name", FOUND)
def test_stacks_of_timm_models(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    found = {stack.name: len(stack.blocks) for stack in find_stacks(model)}
    assert found == {key: length for key, length in FOUND[name].items() if length}


def test_stacks_of_a_torch_transformer():
    layer = nn.TransformerEncoderLayer(14, 2, 17)
    assert [stack.name for stack in find_stacks(nn.TransformerEncoder(layer, 5))] == ["layers"]


def test_gradients_of_a_timm_model_with_several_stages():
    timm = pytest.importorskip("timm")
    model = timm.create_model("convnext_atto", depths=(2, 3, 2, 2), dims=(5, 7, 11, 13), num_classes=3)
    revnets.make_reversible(model, 0.3)
    from tests.support.residual_networks import assert_same_tensors, training_step

    x = torch.randn(2, 3, 64, 64)
    assert_same_tensors(training_step(model, x, memory="exact"), training_step(model, x, memory="store"))


def test_single_layers_are_not_blocks():
    with pytest.raises(ArgumentError) as error:
        find_stacks(nn.ModuleDict({"layers": nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))}))
    assert (error.value.key, error.value.code) == ("blocks", "no-blocks")


def test_named_containers_may_have_any_name():
    model = nn.ModuleDict({"tower": nn.Sequential(ResidualBlock(), ResidualBlock())})
    with pytest.raises(ArgumentError):
        find_stacks(model)
    (stack,) = find_stacks(model, "tower")
    assert stack.names == ("tower.0", "tower.1")


def test_layers_in_a_dictionary():
    (stack,) = find_stacks(nn.ModuleDict({"layers": nn.ModuleDict({str(key): ResidualBlock() for key in range(3)})}))
    assert stack.names == ("layers.0", "layers.1", "layers.2")


def test_named_container_with_a_block_of_another_shape_raises():
    model = nn.ModuleDict({"layers": nn.Sequential(ResidualBlock(), ResidualBlock(hidden=19), ResidualBlock())})
    with pytest.raises(ArgumentError) as error:
        find_stacks(model, "layers")
    assert error.value.code == "shape-mismatch"
    assert "layers.1" in str(error.value)


class StridedBlock(ResidualBlock):
    """Has the weight shapes of its neighbors and half their resolution."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.pool = nn.AvgPool1d(stride, stride)


def test_block_that_changes_the_resolution_is_excluded():
    blocks = nn.Sequential(StridedBlock(2), StridedBlock(), StridedBlock())
    (stack,) = find_stacks(nn.ModuleDict({"layers": blocks}))
    assert stack.names == ("layers.1", "layers.2")
    with pytest.raises(ArgumentError) as error:
        find_stacks(nn.ModuleDict({"layers": blocks}), "layers")
    assert error.value.code == "shape-mismatch"


def test_errors_name_the_block_in_a_stack_with_an_offset():
    model = nn.ModuleDict({"layers": nn.Sequential(StridedBlock(2), StridedBlock(), StridedBlock())})
    revnets.make_reversible(model)
    with pytest.raises(ArgumentError) as error:
        model["layers"][2](torch.randn(2, 7, 13))
    assert error.value.key == "layers.2"


class Router(nn.Linear):
    """Selects experts."""


class ExpertBlock(ResidualBlock):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router(13, 3)


def refused(model: nn.Module) -> str:
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    with pytest.raises(ArgumentError) as error:
        revnets.make_reversible(model)
    assert error.value.code == "unsupported-block"
    assert {name: vars(module) for name, module in model.named_modules()} == before
    return str(error.value)


def test_mixtures_of_experts_raise():
    assert "layers.0" in refused(ResidualNetwork(block=ExpertBlock))


def test_layers_skipped_at_random_raise():
    model = ResidualNetwork()
    model.layerdrop = 0.1
    assert "layerdrop" in refused(model)


def test_blocks_that_share_keys_and_values_raise():
    model = ResidualNetwork()
    model.layers[3].is_kv_shared_layer = True
    assert "layers.3" in refused(model)


def test_columns_inside_a_block_raise():
    class Nested(ResidualBlock):
        def __init__(self) -> None:
            super().__init__()
            self.columns = revnets.ReversibleSequence([nn.Linear(13, 13) for _ in range(3)])

    with pytest.raises(ArgumentError) as error:
        revnets.make_reversible(ResidualNetwork(block=Nested))
    assert (error.value.key, error.value.code) == ("model", "conflicting-values")


def test_module_used_twice_raises():
    model = ResidualNetwork()
    model.layers[2] = model.layers[1]
    assert "layers.2" in refused(model) or "layers.1" in refused(model)
