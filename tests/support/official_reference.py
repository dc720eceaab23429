"""Reference of the official RevCol: names and shapes of its weights, its forward pass, and its checkpoints.

Everything is a plain function of a dict of tensors under official names, with channels first.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Net:
    """Arguments of the official constructors."""

    columns: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    classes: int = 11
    supervised: bool = False
    huge: bool = False
    kernel: int = 3
    headless: bool = False


TEST = Net(4, (8, 16, 32, 64), (1, 1, 2, 1))  # like test_revcol
TEST_HUGE = Net(3, (8, 16, 32, 64), (1, 1, 1, 1), huge=True)  # like test_revcol_huge


def shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of weights in the order of the official modules."""
    dims = net.dims
    out: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = weight, weight[:1]

    def block(name: str, dim: int, hidden: int, kernel: int) -> None:
        out[f"{name}.gamma"] = (dim,)
        layer(f"{name}.dwconv", dim, 1, kernel, kernel)
        layer(f"{name}.norm", dim)
        layer(f"{name}.pwconv1", hidden, dim)
        layer(f"{name}.pwconv2", dim, hidden)

    layer("stem.0", dims[0], 3, 4, 4)
    layer("stem.1", dims[0])
    for column in range(net.columns):
        for level, dim in enumerate(dims):
            out[f"subnet{column}.alpha{level}"] = (1, dim, 1, 1)
        for level, dim in enumerate(dims):
            name = f"subnet{column}.level{level}"
            if level:
                layer(f"{name}.fusion.down.0", dim, dims[level - 1], 2, 2)
                layer(f"{name}.fusion.down.1", dim)
            if column and level < 3:
                layer(f"{name}.fusion.up.channel_reschedule.0", dim, dims[level + 1])
                layer(f"{name}.fusion.up.channel_reschedule.1", dim)
            if column and level == 0 and net.huge:
                layer(f"{name}.fusion.up2.channel_reschedule.0", dim, dims[3])
                layer(f"{name}.fusion.up2.channel_reschedule.1", dim)
            for index in range(net.depths[level]):
                block(f"{name}.blocks.{index}", dim, 4 * dim, net.kernel)
    if net.headless:
        return out
    for name in [f"cls_blocks.{head}" for head in range(4)] if net.supervised else ["cls"]:
        layer(f"{name}.classifier.0", dims[3])
        layer(f"{name}.classifier.1", net.classes, dims[3])
    for name in [f"decoder_blocks.{head}" for head in range(3)] if net.supervised else []:
        if net.classes > 1000:
            layer(f"{name}.projback.0", dims[3])
            layer(f"{name}.projback.1", 3 * 32**2, dims[3], 1, 1)
            continue
        for stage, (high, low) in enumerate([(dims[3], dims[2]), (dims[2], dims[1]), (dims[1], dims[0])]):
            block(f"{name}.normal_layers.{stage}.0", low, low, 3)
            layer(f"{name}.proj_layers.{stage}.0", low, high, 1, 1)
            layer(f"{name}.proj_layers.{stage}.1", low)
        layer(f"{name}.projback.0", 3 * 4**2, dims[0], 1, 1)
    return out


def random_state(net: Net, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Return weights that are neither 0 nor 1, so that every tensor matters, and that keep states bounded."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes(net).items():
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        is_scale = "alpha" in name or name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1)
        fan_in = torch.tensor(shape[1:]).prod().item() if len(shape) > 1 else 1
        state[name] = 0.5 + 0.2 * noise if is_scale else noise * fan_in**-0.5
    return state


# ------------------------------------------------------------------------------------------------------ forward pass


def forward(state: State, net: Net, image: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return logits and pixels of all heads, and the levels of the last column.

    c_l = alpha_l * c_l(before) + Level_l(c_(l-1), c_(l+1)(before)); |alpha| is at least 1e-3, an exact 0 stays 0.
    """
    stem = norm(state, "stem.1", conv(state, "stem.0", image, stride=4))
    logits, pixels = [], []
    before: list[Tensor] = []
    for column in range(net.columns):
        now: list[Tensor] = []
        for level in range(4):
            name = f"subnet{column}.level{level}"
            x = (
                stem
                if level == 0
                else norm(state, f"{name}.fusion.down.1", conv(state, f"{name}.fusion.down.0", now[-1], 2))
            )
            if column and level < 3:
                x = up(state, f"{name}.fusion.up", before[level + 1], 2) + x
            if column and level == 0 and net.huge:
                x = x + up(state, f"{name}.fusion.up2", before[3], 8)
            for index in range(net.depths[level]):
                x = block(state, f"{name}.blocks.{index}", x)
            if column:
                alpha = state[f"subnet{column}.alpha{level}"]
                alpha = torch.where(alpha.abs() < 1e-3, alpha.sign() * 1e-3, alpha)
                x = alpha * before[level] + x
            now.append(x)
        before = now
        if net.supervised and (column + 1) % (net.columns // 4) == 0:
            head = column // (net.columns // 4)
            logits.append(classify(state, f"cls_blocks.{head}", now[3]))
            if column < net.columns - 1:
                pixels.append(decode(state, f"decoder_blocks.{head}", now[3]))
    if not net.supervised and not net.headless:
        logits.append(classify(state, "cls", before[3]))
    return logits, pixels, before


def conv(state: State, name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding, groups=groups)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Apply LayerNorm over the channels of (B, C, H, W)."""
    centered = x - x.mean(1, keepdim=True)
    x = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"][:, :, None, None], state[f"{name}.bias"])


def up(state: State, name: str, x: Tensor, ratio: int) -> Tensor:
    x = norm(state, f"{name}.channel_reschedule.1", linear(state, f"{name}.channel_reschedule.0", x))
    return x.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)


def block(state: State, name: str, x: Tensor) -> Tensor:
    kernel = state[f"{name}.dwconv.weight"].shape[-1]
    out = norm(state, f"{name}.norm", conv(state, f"{name}.dwconv", x, 1, kernel // 2, x.shape[1]))
    out = linear(state, f"{name}.pwconv2", F.gelu(linear(state, f"{name}.pwconv1", out)))
    return x + state[f"{name}.gamma"][:, None, None] * out


def classify(state: State, name: str, x: Tensor) -> Tensor:
    x = x.mean((2, 3))[:, :, None, None]
    return linear(state, f"{name}.classifier.1", norm(state, f"{name}.classifier.0", x)).flatten(1)


def decode(state: State, name: str, x: Tensor) -> Tensor:
    if f"{name}.projback.1.weight" in state:
        return F.pixel_shuffle(conv(state, f"{name}.projback.1", norm(state, f"{name}.projback.0", x)), 32)
    for stage in range(3):
        x = F.gelu(norm(state, f"{name}.proj_layers.{stage}.1", conv(state, f"{name}.proj_layers.{stage}.0", x)))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = block(state, f"{name}.normal_layers.{stage}.0", x)
    return F.pixel_shuffle(conv(state, f"{name}.projback.0", x), 4)


# ------------------------------------------------------------------------------------------------------- files


@contextmanager
def yacs() -> Iterator[type]:
    """Create a class that pickles as yacs.config.CfgNode and can only be imported inside the context."""

    class CfgNode(dict):
        def __init__(self, content: dict):
            super().__init__(content)
            self.__dict__.update(
                __immutable__=True, __deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False
            )

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    modules = {"yacs": types.ModuleType("yacs"), "yacs.config": types.ModuleType("yacs.config")}
    modules["yacs.config"].CfgNode = CfgNode  # pyright: ignore[reportAttributeAccessIssue]
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield CfgNode
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def save_classification(path: Path, state: State, ema: State | None = None) -> Path:
    """Save a checkpoint as the official trainer does: with optimizer, configuration and the builtin `input`."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    with yacs() as CfgNode:
        content = {
            "model": state,
            "optimizer": optimizer.state_dict(),
            "max_accuracy": 82.2,
            "epoch": 299,
            "state_dict_ema": ema,
            "input": input,
            "config": CfgNode({"MODEL": CfgNode({"NAME": "tiny", "LABEL_SMOOTHING": 0.1}), "BASE": [""], "AMP": True}),
        }
        torch.save(content, path)
    return path


def save_openmmlab(path: Path, state: State, parts: dict[str, tuple[int, ...]]) -> Path:
    """Save a checkpoint as mmdet and mmseg do: the backbone together with tensors of other components."""
    tensors = {f"backbone.{name}": tensor for name, tensor in state.items()}
    tensors |= {name: torch.zeros(shape) for name, shape in parts.items()}
    meta = {
        "epoch": 36,
        "iter": 263772,
        "CLASSES": ("person", "bicycle"),
        "PALETTE": [[1, 2, 3]],
        "config": "model = 1\n",
    }
    torch.save({"meta": meta, "state_dict": tensors, "optimizer": {"state": {}, "param_groups": []}}, path)
    return path
