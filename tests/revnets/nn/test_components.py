"""Blocks, fusions, stems and heads, compared with timm, operators of torch, and each other."""

from __future__ import annotations

from functools import partial

import pytest
import timm.models.convnext
import timm.models.vision_transformer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import revnets
from revnets.memory.tracker import OpCounter
from revnets.nn.blocks import Attention, ConvNeXtBlock, DropPath, MLPBlock, ViTBlock
from revnets.nn.fusions import ConvNeXtFusion, Down, IdentityFusion, LinearFusion, Project, Source, Up
from revnets.nn.stems_and_heads import ClassifierHead, LinearStem, PatchifyStem, TokenStem
from tests.support.errors import raises_error
from tests.support.versions import TORCH


def randomized(module: nn.Module) -> nn.Module:
    """Convert to float64 with random weights instead of zeros and ones, so that every parameter matters."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


def assert_same_function(ours: nn.Module, theirs: nn.Module, names: dict[str, str], x: Tensor, run=None) -> None:
    """Check that outputs and the gradients of the input and of all parameters are equal.

    Args:
        names: maps names of submodules of `ours` to those of `theirs`, whose weights are replaced.
        run: calls `theirs`, if it needs another memory layout.
    """
    pairs = {}
    for our_name, _ in ours.named_parameters():
        their_name = our_name
        for our, their in names.items():
            their_name = their_name.replace(our, their)
        pairs[our_name] = their_name
    theirs.double().load_state_dict({pairs[name]: value for name, value in ours.state_dict().items()})  # strict
    x.requires_grad_()
    out, expected = ours(x), (run or theirs)(x)
    assert_close(out, expected)
    weight = torch.randn_like(out)
    parameters = [x, *ours.parameters(), *(theirs.get_parameter(name) for name in pairs.values())]
    ours_x, *ours_grads = torch.autograd.grad((out * weight).sum(), parameters[: 1 + len(pairs)])
    theirs_x, *theirs_grads = torch.autograd.grad((expected * weight).sum(), [x, *parameters[1 + len(pairs) :]])
    assert_close(ours_x, theirs_x)
    assert_close(dict(zip(pairs, ours_grads, strict=True)), dict(zip(pairs, theirs_grads, strict=True)))


# ------------------------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_convnext_block_equals_timm(kernel_size: int) -> None:
    ours = randomized(ConvNeXtBlock(11, kernel_size=kernel_size))
    theirs = timm.models.convnext.ConvNeXtBlock(11, kernel_size=kernel_size)
    names = {"dwconv": "conv_dw", "scale.gamma": "gamma"}
    x = torch.randn(2, 7, 5, 11, dtype=torch.float64)
    assert_same_function(ours, theirs, names, x, lambda x: theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("heads", [1, 3])
def test_vit_block_equals_timm(heads: int) -> None:
    ours = randomized(ViTBlock(12, heads=heads))
    norm = partial(nn.LayerNorm, eps=1e-6)
    theirs = timm.models.vision_transformer.Block(12, num_heads=heads, qkv_bias=True, norm_layer=norm)
    assert_same_function(ours, theirs, {}, torch.randn(2, 7, 12, dtype=torch.float64))


def test_vit_block_treats_pixels_as_tokens() -> None:
    block = randomized(ViTBlock(12, heads=3))
    image = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    assert_close(block(image), block(image.flatten(1, 2)).unflatten(1, (5, 7)))
    strided = image.transpose(1, 2)
    assert_close(block(strided), block(strided.contiguous()))


def test_attention_dropout_acts_on_the_weights() -> None:
    """With equal values at all positions, dropped weights only scale the result of each position."""
    attention = randomized(Attention(8, heads=2, dropout=0.5))
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 64, 8)
    assert_close(attention.eval()(x)[0], attention(x)[0, :1].expand(64, 8))
    dropped = attention.train()(x) - attention.proj.bias
    whole = (attention.eval()(x) - attention.proj.bias)[0, 0]
    by_head = [dropped[0] @ torch.linalg.pinv(attention.proj.weight.T)[:, part] for part in (slice(0, 4), slice(4, 8))]
    for part, head in zip((slice(0, 4), slice(4, 8)), by_head, strict=True):
        value = (whole @ torch.linalg.pinv(attention.proj.weight.T))[part]
        scale = head / value
        assert_close(scale, scale[:, :1].expand_as(scale))
        assert 0.5 < scale.mean().item() < 1.5
        assert scale.std() > 0.01


def test_mlp_block_applies_to_each_position_independently() -> None:
    block = randomized(MLPBlock(5, expand=3))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    hidden = F.gelu(F.linear(F.layer_norm(x, (5,), *block.norm.parameters(), 1e-6), *block.mlp.fc1.parameters()))
    assert_close(block(x), x + F.linear(hidden, *block.mlp.fc2.parameters()))
    assert_close(block(x)[:, 1, 2], block(x[:, 1, 2]))


@pytest.mark.parametrize("make", [ConvNeXtBlock, partial(ViTBlock, heads=2), MLPBlock])
def test_drop_path_drops_the_branch_of_a_sample(make) -> None:
    block = randomized(make(8, drop_path=0.6))
    x = torch.randn(200, 2, 2, 8, dtype=torch.float64)
    same = (block.train()(x) == x).flatten(1).all(1).double().mean().item()
    branches = 2 if isinstance(block, ViTBlock) else 1
    assert abs(same - 0.6**branches) < 0.12
    assert not torch.equal(block.eval()(x), x)


def test_drop_path_keeps_the_mean() -> None:
    out = DropPath(0.25)(torch.ones(10_000, 1, 1))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(out.mean().item() - 1) < 0.03
    assert DropPath(0.25)(torch.ones(4, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with raises_error(ValueError, code="out-of-range", key="drop_path", names="1.0"):
        DropPath(1.0)


def test_initial_weights() -> None:
    """Truncated normal with standard deviation 0.02, biases zero, and the layer scale (RevCol, appendix D.1)."""
    block = ConvNeXtBlock(256, layer_scale=1e-3)
    for weight in (block.dwconv.weight, block.mlp.fc1.weight, block.mlp.fc2.weight):
        assert abs(weight.std().item() - 0.02) < 2e-3
    assert all(not parameter.any() for name, parameter in block.named_parameters() if name.endswith("bias"))
    assert block.scale.gamma.eq(1e-3).all()


def test_attention_on_vectors_raises() -> None:
    with raises_error(ValueError, code="shape-mismatch", key="x", names="(2, 8)"):
        ViTBlock(8, heads=2)(torch.randn(2, 8))


# ----------------------------------------------------------------------------------------------------------- fusions


@pytest.mark.parametrize("ratio", [2, 3, 4, 8])
def test_up_repeats_pixels(ratio: int) -> None:
    up = randomized(Up(5, 3, ratio))
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    plain = Project(5, 3)
    names = {"proj.": ""}
    assert_same_function(
        up, plain, names, x, lambda x: plain(x).repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)
    )


@pytest.mark.parametrize("ratio", [2, 3])
def test_down_is_a_strided_convolution_of_the_padded_image(ratio: int) -> None:
    down = randomized(Down(5, 3, ratio))
    x = torch.randn(2, 7, 11, 5, dtype=torch.float64)
    padded = torch.zeros(2, 9 if ratio == 3 else 8, 12, 5, dtype=torch.float64)
    padded[:, :7, :11] = x
    patches = padded.unflatten(1, (-1, ratio)).unflatten(3, (-1, ratio)).permute(0, 1, 3, 5, 2, 4).flatten(3)
    out = F.linear(patches, down.conv.weight.flatten(1), down.conv.bias)
    assert_close(down(x), F.layer_norm(out, (3,), *down.norm.parameters(), 1e-6))


def test_convnext_fusion_sums_resampled_inputs() -> None:
    sources = [Source("below", 4, 2), Source("above", 9, 8), Source("stem", 6, 4), Source("above", 7, 4)]
    fusion = randomized(ConvNeXtFusion(6, 4, sources))
    assert [type(path) for path in fusion.paths] == [Down, Up, nn.Identity, Project]
    reads = [torch.randn(2, 16 // s.reduction, 24 // s.reduction, s.dim, dtype=torch.float64) for s in sources]
    parts = [path(read) for path, read in zip(fusion.paths, reads, strict=True)]
    assert_close(fusion(*reads), torch.stack(parts).sum(0))
    with raises_error(ValueError, code="shape-mismatch", key="reads", names=["(2, 7, 4)", "fusion linear"]):
        fusion(torch.randn(2, 7, 4), *reads[1:])


def test_fusion_without_resampling_accepts_any_shape() -> None:
    fusion = ConvNeXtFusion(4, 2, [Source("below", 4, 2), Source("above", 4, 2)])
    for shape in ((3, 4), (3, 5, 4), (3, 5, 6, 4)):
        assert torch.equal(fusion(torch.ones(shape), torch.ones(shape)), torch.full(shape, 2.0))


def test_linear_fusion_projects_the_selected_kinds() -> None:
    sources = [Source("stem", 8, 1), Source("below", 8, 1), Source("above", 8, 1), Source("stem", 5, 1)]
    assert [type(path) for path in LinearFusion(8, 1, sources).paths] == [nn.Identity, Project, Project, Project]
    fusion = randomized(LinearFusion(8, 1, sources, project=("above",), norm=False))
    assert [type(path) for path in fusion.paths] == [nn.Identity, nn.Identity, Project, Project]
    reads = [torch.randn(2, 3, source.dim, dtype=torch.float64) for source in sources]
    linear = [F.linear(read, *fusion.paths[index].linear.parameters()) for index, read in enumerate(reads) if index > 1]
    assert_close(fusion(*reads), reads[0] + reads[1] + linear[0] + linear[1])


def test_identity_fusion_adds() -> None:
    fusion = IdentityFusion(4, 1, [Source("below", 4, 1), Source("above", 4, 1)])
    assert not list(fusion.parameters())
    assert torch.equal(fusion(torch.ones(2, 4), torch.ones(2, 4)), torch.full((2, 4), 2.0))
    with raises_error(ValueError, code="shape-mismatch", key="sources", names=["4 channels", "one has 5"]):
        IdentityFusion(4, 1, [Source("below", 5, 1)])
    for make in (IdentityFusion, LinearFusion):
        with raises_error(ValueError, code="shape-mismatch", key="sources", names=["1/1 of the stem's", "1/2"]):
            make(4, 1, [Source("above", 4, 2)])


# ------------------------------------------------------------------------------------------- memory layout and sizes


def small(levels: int = 3, block: str = "convnext", **changes) -> revnets.Net:
    dims = [8, 12, 16, 20][:levels]
    extra = {"heads": 4} if block == "vit" else {}
    data = {
        "columns": 3,
        "stem": {"type": "patchify", "patch": 2},
        "levels": [{"dim": dim, "depth": 1, "block": block, **extra} for dim in dims],
    }
    return revnets.build(data | changes)


@pytest.mark.skipif(TORCH < (2, 14), reason="older versions copy in their own backward operators")
def test_states_are_contiguous_without_copies() -> None:
    """Convolutions read and return channels_last views; a hidden copy would appear as one of these operators."""
    net = small()
    x = torch.randn(2, 3, 32, 32)
    assert all(state.is_contiguous() for state in net.columns(net.stem(x)))
    net.columns.memory = "store"
    stem = net.stem(x).detach().requires_grad_()
    with OpCounter() as counter:
        loss = sum(state.sum() for state in net.columns(stem))
        torch.autograd.grad(loss, [stem, *net.columns.parameters()])
    copies = {"aten.clone", "aten.copy_", "aten._to_copy", "aten.contiguous", "aten.slice", "aten.constant_pad_nd"}
    assert not copies & counter.ops.keys()
    assert counter.ops["aten.convolution"] == 3 * 3 + 3 * 2  # one per block, one per Down


@settings(max_examples=30)
@given(st.integers(1, 29), st.integers(1, 29), st.integers(2, 4), st.sampled_from(["convnext", "vit"]))
def test_images_of_any_size(height: int, width: int, levels: int, block: str) -> None:
    """Down rounds up and Up crops: states have side ceil(side / reduction), and gradients equal `store`."""
    torch.manual_seed(0)
    net = small(levels, block)
    stem = torch.randn(1, height, width, 8)
    grads = []
    for memory in ("exact", "store"):
        net.columns.memory = memory
        states = net.columns(stem)
        for level, state in enumerate(states):
            assert state.shape[1:3] == (-(-height // 2**level), -(-width // 2**level))
        grads.append(torch.autograd.grad(sum(state.square().sum() for state in states), list(net.columns.parameters())))
    assert all(torch.equal(exact, store) for exact, store in zip(*grads, strict=True))


def test_level_0_reads_the_top_at_odd_sizes() -> None:
    net = small(4, reads=["below", "above", "top"])
    assert [type(path) for path in net.columns.cells[1][0].function.fusion.paths] == [nn.Identity, Up, Up]
    states = net.columns(torch.randn(1, 13, 21, 8))
    assert [state.shape[1:3] for state in states] == [(13, 21), (7, 11), (4, 6), (2, 3)]


# ---------------------------------------------------------------------------------------------------- stems and heads


def test_patchify_stem() -> None:
    stem = randomized(PatchifyStem(6, in_chans=2, patch=3))
    x = torch.randn(2, 2, 10, 8, dtype=torch.float64)  # the last pixels are ignored
    patches = F.unfold(x[:, :, :9, :6], 3, stride=3).transpose(1, 2)
    out = F.layer_norm(
        F.linear(patches, stem.conv.weight.flatten(1), stem.conv.bias), (6,), *stem.norm.parameters(), 1e-6
    )
    assert_close(stem(x), out.unflatten(1, (3, 2)))


def test_token_stem() -> None:
    stem = randomized(TokenStem(6, img_size=8, in_chans=2, patch=4))
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2)
    assert_close(stem(x), F.linear(patches, stem.conv.weight.flatten(1), stem.conv.bias) + stem.pos_embed)
    with raises_error(ValueError, code="shape-mismatch", key="img_size", names=["12 x 8", "img_size 8"]):
        stem(torch.randn(2, 2, 12, 8, dtype=torch.float64))
    with raises_error(ValueError, code="not-divisible", key="img_size", names=["img_size 9", "patch 4"]):
        TokenStem(6, img_size=9, patch=4)


def test_linear_stem_and_example_shapes() -> None:
    for stem in (LinearStem(6, in_dim=5), PatchifyStem(6), TokenStem(6, img_size=32)):
        assert stem(torch.randn(2, *stem.example_shape)).shape[0::100] == (2,)
        assert stem(torch.randn(2, *stem.example_shape)).shape[-1] == 6
    assert LinearStem(6, in_dim=5)(torch.randn(2, 3, 4, 5)).shape == (2, 3, 4, 6)


def test_classifier_head_averages_the_top_level() -> None:
    head = randomized(ClassifierHead([3, 5], num_classes=7, dropout=0.5)).eval()
    low = torch.full((2, 3), torch.nan, dtype=torch.float64)
    image = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = F.linear(F.layer_norm(image.mean((1, 2)), (5,), *head.norm.parameters(), 1e-6), *head.fc.parameters())
    assert_close(head([low, image]), expected)
    assert_close(head([low, image.flatten(1, 2)]), expected)
    assert_close(head([low, image.mean((1, 2))]), expected)
    assert not torch.equal(head.train()([low, image]), expected)
