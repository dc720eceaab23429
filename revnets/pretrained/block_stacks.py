"""Finds the stacks of residual blocks in a network, which can become reversible sequences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from revnets.engine.columns import ReversibleColumns
from revnets.engine.errors import ArgumentError

CONTAINERS = re.compile(r"(blocks?|layers?\d*|h|resblocks|stages?|encoder|decoder|\d+)")
"""Last component of the names of block containers in timm, transformers and torchvision."""

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Ordered containers. torchtitan uses a dictionary for its layers."""

MIXTURE = re.compile(r"Experts|Router|Moe(?![a-z])|MoE|SwitchTransformers")


@dataclass(frozen=True, slots=True)
class BlockStack:
    """Consecutive blocks of equal shape.

    Attributes:
        name: Name of their container.
        names: Names of the blocks.
        blocks: The blocks.
    """

    name: str
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]


def find_stacks(model: nn.Module, names: str | Sequence[str] | None = None) -> list[BlockStack]:
    """Return the stacks of a network, in the order of its modules.

    Args:
        model: The network.
        names: Containers (`nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`) of which all blocks are used. By default,
            a stack is at least two consecutive blocks of one class with equal parameter shapes, in a container with a
            name that timm, transformers or torchvision use.

    Raises:
        ArgumentError: If a container or a stack does not exist, blocks of a named container differ in shape, or a block
            cannot be replayed.
    """
    stacks = list(_found(model)) if names is None else [_named(model, name) for name in _as_list(names)]
    if not stacks:
        text = (
            f"{type(model).__name__} has no stack of at least two blocks of equal shape under a common name. If it has "
            "a stack, give the name of its container, such as blocks='encoder.blocks'"
        )
        raise ArgumentError(text, "blocks", code="no-blocks")
    for stack in stacks:
        for name, block in zip(stack.names, stack.blocks, strict=True):
            _check(name, block)
    _check_distinct(stacks)
    _check_model(model)
    return stacks


def _as_list(names: str | Sequence[str]) -> list[str]:
    result = [names] if isinstance(names, str) else list(names)
    if not result or not all(isinstance(name, str) for name in result):
        raise ArgumentError("blocks: give the name of a container of blocks, or a list", "blocks", code="wrong-type")
    return result


def _found(model: nn.Module) -> Iterator[BlockStack]:
    taken: tuple[str, ...] = ()
    for name, container in model.named_modules():
        if name.startswith(taken or "\0") or not isinstance(container, LISTS):
            continue
        usual = CONTAINERS.fullmatch(name.rpartition(".")[2]) is not None
        children = [(f"{name}.{key}" if name else key, child) for key, child in _children(container)]
        if not (usual or all(_is_checkpointed(child) for _, child in children)):
            continue
        for _, run in groupby(children, key=lambda item: _signature(item[1])):
            blocks = list(run)
            if len(blocks) < 2 or not _is_composite(blocks[0][1]):
                continue
            taken = (*taken, *(f"{block}." for block, _ in blocks))
            yield BlockStack(name, tuple(key for key, _ in blocks), tuple(block for _, block in blocks))


def _named(model: nn.Module, name: str) -> BlockStack:
    try:
        container = model.get_submodule(name)
    except AttributeError:
        text = f"{type(model).__name__} has no module {name!r}"
        raise ArgumentError(text, "blocks", code="unknown-choice") from None
    children = _children(container) if isinstance(container, LISTS) else []
    if len(children) < 2:
        kinds = "Sequential, ModuleList or ModuleDict"
        text = f"{name} is a {type(container).__name__}; give a {kinds} of at least two blocks"
        raise ArgumentError(text, "blocks", code="no-blocks")
    _, first = children[0]
    for key, child in children[1:]:
        if _signature(child)[1:] != _signature(first)[1:]:
            text = (
                f"{name}.{key} ({type(child).__name__}) has other weight shapes or strides than "
                f"{name}.{children[0][0]}; blocks of a reversible sequence must have equal shape. Does one of them "
                "change the resolution?"
            )
            raise ArgumentError(text, "blocks", code="shape-mismatch")
    return BlockStack(name, tuple(f"{name}.{key}" for key, _ in children), tuple(child for _, child in children))


def _children(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """Like `named_children`, but with duplicates."""
    return [(key, child) for key, child in container._modules.items() if child is not None]


def _signature(block: nn.Module) -> tuple[object, ...]:
    """Return what blocks of equal shape share: class, weight shapes, and strides, which change the resolution."""
    shapes = tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters())
    strides = tuple((name, str(module.stride)) for name, module in block.named_modules() if hasattr(module, "stride"))
    return type(block), shapes, strides


def _is_composite(block: nn.Module) -> bool:
    """Whether the block contains layers, unlike a single linear layer or convolution."""
    return any(next(child.parameters(), None) is not None for child in block.children())


def _is_checkpointed(block: nn.Module) -> bool:
    """Whether this is a layer that transformers can checkpoint, which are the repeated layers of its networks."""
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(block).__mro__)


def _check(name: str, block: nn.Module) -> None:
    kind = type(block).__name__
    if "_reversible_call" in vars(block):
        text = f"{name} is already reversible; call revnets.undo_reversible(model) first"
        raise ArgumentError(text, "blocks", code="conflicting-values")
    for module in block.modules():
        if isinstance(module, ReversibleColumns):
            text = f"{name} ({kind}) contains reversible columns"
            raise ArgumentError(f"{text}; tapes do not nest", "blocks", code="unsupported-block")
        if MIXTURE.search(type(module).__name__):
            text = (
                f"{name} ({kind}) routes tokens to experts ({type(module).__name__}). Routing may communicate between "
                "processes and drop tokens, so a replay may differ"
            )
            raise ArgumentError(text, "blocks", code="unsupported-block")
        if getattr(module, "is_kv_shared_layer", False):
            text = f"{name} ({kind}) reads keys and values of an earlier layer, which are not available in a replay"
            raise ArgumentError(text, "blocks", code="unsupported-block")


def _check_distinct(stacks: Sequence[BlockStack]) -> None:
    seen: dict[int, str] = {}
    for stack in stacks:
        for name, block in zip(stack.names, stack.blocks, strict=True):
            if id(block) in seen:
                text = f"{name} and {seen[id(block)]} are the same module; a sequence may use a block only once"
                raise ArgumentError(text, "blocks", code="unsupported-block")
            seen[id(block)] = name


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        skipping = next((key for key in ("layerdrop", "layer_drop") if _is_positive(getattr(module, key, 0))), None)
        if skipping is not None:
            text = f"{name or type(model).__name__} skips layers at random in training ({skipping}); set it to 0"
            raise ArgumentError(text, "blocks", code="unsupported-block")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
