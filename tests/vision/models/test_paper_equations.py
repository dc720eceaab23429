"""The models compute the paper's equations and are grouped for layer-wise decay as in the release."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor
from torch.testing import assert_close

import vision

# --------------------------------------------------------------------------------------------------------- the forward


def randomized(name: str, **options) -> vision.RevCol:
    """Return a float64 model whose weights are neither 0 nor 1, so that every parameter matters."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=11, **options).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_((0.5 if "gain" in key else 0.0) + 0.2 * torch.randn_like(parameter))
    return model


def by_the_paper(model: vision.RevCol, image: Tensor, blocks: Callable, fuse: Callable) -> Tensor:
    """Section 2.2 with channels first, column by column: c_l = F_l(c_(l-1), c_(l+1) before) + gamma_l * c_l before."""
    weights = dict(model.named_parameters())
    stem = F.conv2d(image, weights["stem.conv.weight"], weights["stem.conv.bias"], stride=model.stem.conv.stride)
    if "stem.norm.weight" in weights:
        stem = norm(stem, weights, "stem.norm")
    else:
        stem = stem + weights["stem.pos_embed"].permute(2, 0, 1)
    before: list[Tensor] = []
    for column in range(model.spec.columns):
        now: list[Tensor] = []
        for level, spec in enumerate(model.spec.levels):
            prefix = f"columns.cells.{column}.{level}"
            x = fuse(weights, f"{prefix}.function.fusion.paths", level, now[-1] if now else stem, before)
            for index in range(spec.depth):
                x = blocks(weights, f"{prefix}.function.blocks.{index}", x)
            if column:
                x = x + weights[f"{prefix}.gain.weight"].view(-1, 1, 1) * before[level]
            now.append(x)
        before = now
    pooled = F.layer_norm(
        before[-1].mean((2, 3)), (model.num_features,), weights["head.norm.weight"], weights["head.norm.bias"], 1e-6
    )
    return F.linear(pooled, weights["head.fc.weight"], weights["head.fc.bias"])


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """LayerNorm over the channels of (B, C, H, W)."""
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    scale, shift = weights[f"{name}.weight"].view(-1, 1, 1), weights[f"{name}.bias"].view(-1, 1, 1)
    return (x - mean) / (var + 1e-6).sqrt() * scale + shift


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return torch.einsum("oc,bchw->bohw", weights[f"{name}.weight"], x) + weights[f"{name}.bias"].view(-1, 1, 1)


def convnext_block(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    kernel = weights[f"{name}.dwconv.weight"]
    out = F.conv2d(x, kernel, weights[f"{name}.dwconv.bias"], padding=kernel.shape[-1] // 2, groups=x.shape[1])
    out = linear(
        F.gelu(linear(norm(out, weights, f"{name}.norm"), weights, f"{name}.mlp.fc1")), weights, f"{name}.mlp.fc2"
    )
    return x + out * weights[f"{name}.scale.gamma"].view(-1, 1, 1)


def hierarchical_fusion(
    weights: dict[str, Tensor], name: str, level: int, below: Tensor, before: list[Tensor]
) -> Tensor:
    out = below
    if level:
        out = F.conv2d(below, weights[f"{name}.0.conv.weight"], weights[f"{name}.0.conv.bias"], stride=2)
        out = norm(out, weights, f"{name}.0.norm")
    ups = [] if not before or level == 3 else [(1, before[level + 1], 2)]
    if f"{name}.2.proj.linear.weight" in weights:  # RevCol-H
        ups.append((2, before[3], 8))
    for index, above, ratio in ups:
        above = norm(linear(above, weights, f"{name}.{index}.proj.linear"), weights, f"{name}.{index}.proj.norm")
        out = out + above.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
    return out


def attention_block(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    heads = len(weights[f"{name}.attn.logit_scale"])
    q, k, v = linear(x, weights, f"{name}.attn.qkv").flatten(2).unflatten(1, (3, heads, -1)).unbind(1)  # (B, h, C/h, N)
    cosine = torch.einsum("bhcn,bhcm->bhnm", q / q.norm(dim=2, keepdim=True), k / k.norm(dim=2, keepdim=True))
    shares = (cosine * weights[f"{name}.attn.logit_scale"].exp().view(-1, 1, 1)).softmax(-1)
    out = torch.einsum("bhnm,bhcm->bhcn", shares, v).flatten(1, 2).view_as(x)
    x = x + norm(linear(out, weights, f"{name}.attn.proj"), weights, f"{name}.norm1")
    out = linear(F.gelu(linear(x, weights, f"{name}.mlp.fc1")), weights, f"{name}.mlp.fc2")
    return x + norm(out, weights, f"{name}.norm2")


def isotropic_fusion(weights: dict[str, Tensor], name: str, level: int, below: Tensor, before: list[Tensor]) -> Tensor:
    def projected(x: Tensor, index: int) -> Tensor:
        return norm(linear(x, weights, f"{name}.{index}.linear"), weights, f"{name}.{index}.norm")

    out = projected(below, 0) if level else below
    return out + projected(before[level + 1], 1) if before and level < 3 else out


@pytest.mark.parametrize(
    ("name", "blocks", "fuse"),
    [
        ("test_revcol", convnext_block, hierarchical_fusion),
        ("test_revcol_huge", convnext_block, hierarchical_fusion),
        ("test_revcol_vit", attention_block, isotropic_fusion),
    ],
)
def test_forward_is_the_paper_s(name: str, blocks: Callable, fuse: Callable) -> None:
    model, image = randomized(name), torch.randn(2, 3, 96, 96, dtype=torch.float64)
    ours, theirs = model(image), by_the_paper(model, image, blocks, fuse)
    assert_close(ours, theirs)
    parameters = list(model.parameters())
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), parameters),
        torch.autograd.grad((theirs * weight).sum(), parameters),
        strict=True,
    ):
        assert_close(a, b)


def test_temperature_of_attention_is_bounded() -> None:
    model, image = randomized("test_revcol_vit"), torch.randn(1, 3, 96, 96, dtype=torch.float64)
    scale = model.columns.cells[0][0].function.blocks[0].attn.logit_scale
    outs = []
    for value in (100.0, 200.0, 50.0):
        scale.data.fill_(torch.tensor(value).log())
        outs.append(model(image))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# ------------------------------------------------------------------------------------------- groups of the optimizer


def published_layer_id(key: str, depths: list[int], highest: int) -> int:
    """Depth in the grid: the stem is 0, block b of column j is b + j + 1, and heads are last."""
    if key.startswith("stem"):
        return 0
    if not key.startswith("columns"):
        return highest
    _, _, column, level, part, *rest = key.split(".")
    if part == "gain":
        return int(column) + 1
    block = int(rest[1]) if rest[0] == "blocks" else 0
    return sum(depths[: int(level)]) + block + int(column) + 1


@pytest.mark.parametrize(
    ("name", "highest"),
    [("revcol_tiny", 14), ("revcol_small", 18), ("revcol_base", 23), ("revcol_large", 19), ("test_revcol_vit", 7)],
)
def test_layer_decay(name: str, highest: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.8, no_weight_decay_list=())
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    depths = [level.depth for level in model.spec.levels]
    seen = 0
    for group in groups:
        for parameter in group["params"]:
            layer = published_layer_id(keys[id(parameter)], depths, highest)
            assert group["lr_scale"] == pytest.approx(0.8 ** (highest - layer))
            seen += 1
    assert seen == len(keys)


def test_coarse_groups_are_columns() -> None:
    model = timm.create_model("test_revcol")
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(groups) == model.spec.columns + 2
    assert all(key.startswith("columns.cells.2.") for key in groups[3])


def test_no_weight_decay() -> None:
    model = timm.create_model("test_revcol_vit")
    decayed, free = [], []
    for group in create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups:
        (decayed if group["weight_decay"] else free).extend(id(parameter) for parameter in group["params"])
    for key, parameter in model.named_parameters():
        matrix = key.endswith("weight") and parameter.dim() > 1
        assert id(parameter) in (decayed if matrix else free), key
    assert {key.rpartition(".")[2] for key in model.no_weight_decay()} == {"weight", "pos_embed", "logit_scale"}
