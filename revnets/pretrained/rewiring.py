"""Makes trained networks reversible, and reverts it: `revnets.make_reversible`, `revnets.undo_reversible`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from revnets.config.memory_budget import BudgetSpec
from revnets.engine.cell import Gain
from revnets.engine.columns import ReversibleColumns
from revnets.engine.errors import ArgumentError
from revnets.engine.memory_mode import memory_modes
from revnets.pretrained.block_stacks import BlockStack, find_stacks
from revnets.pretrained.rewired_sequence import CALL, CHECKPOINTING, BlockCall, RewiredSequence
from revnets.pretrained.update_rules import Blend, checked_blend

Model = TypeVar("Model", bound=nn.Module)


def make_reversible(
    model: Model,
    blend: float = 0.1,
    *,
    blocks: str | Sequence[str] | None = None,
    memory: str | Mapping[str, Any] = "exact",
    learn_blend: bool = False,
    rule: str = "blend",
) -> Model:
    """Rewire the residual blocks of a trained network so that they keep almost nothing for backward.

    Each stack of blocks G_1 ... G_L of equal shape becomes a reversible sequence,

        x_t = G_t(x_{t-1}) - b x_{t-1} + b x_{t-2},    x_{-1} = x_0,

    which is the original network at b = 0. Weights and their names, hooks, masks, other outputs, and caches of keys and
    values in evaluation do not change. In every memory mode but `invert`, gradients equal those of ordinary autograd on
    the rewired network bit for bit.

    A small b stays close to the original network and keeps more lost bits: about 0.8 bytes per element and block at
    0.05, 0.6 at 0.1, 0.5 at 0.5.

    Args:
        model: A network with stacks of shape-preserving blocks, such as those of timm and transformers.
        blend: b, in (0, 1]. Networks that normalize after the sum (BERT) need a small value.
        blocks: Name of a container of blocks, or a list of names; by default all stacks are found.
        memory: Memory mode, or a budget as in YAML: `{"budget": "8GiB"}`.
        learn_blend: Whether b is a trained parameter of every block but the first, `blend.weight` in the block.
        rule: Update rule: `blend`, or another published rule, see `revnets.pretrained.update_rules.RULES`.

    Returns:
        The same module.

    Raises:
        ArgumentError: If an argument is invalid, or a block cannot be rewired; the model is unchanged.

    Example:
        >>> model = timm.create_model("vit_tiny_patch16_224", pretrained=True)
        >>> model = revnets.make_reversible(model, blend=0.1)
    """
    budget = None if isinstance(memory, str) else _budget(memory)
    mode = memory_modes(memory if isinstance(memory, str) else "exact", 1)[0]
    constant = Blend(checked_blend(blend), rule)
    if any(isinstance(module, ReversibleColumns) for module in model.modules()):
        text = f"{type(model).__name__} already has reversible columns; set revnets.find_columns(model).memory instead"
        raise ArgumentError(text, "model", code="conflicting-values")
    stacks = find_stacks(model, blocks)
    if learn_blend:
        _require_free(stacks)
        Blend(blend, rule, Gain(1, blend))  # raises if the rule cannot be learned
    state_names = [_state_names(stack) for stack in stacks]
    for stack, names in zip(stacks, state_names, strict=True):
        blends = [constant] * len(stack.blocks)
        if learn_blend:
            blends[1:] = [_learned(block, blend, rule) for block in stack.blocks[1:]]
        sequence = RewiredSequence(stack.names, stack.blocks, blends, mode)
        for position, (block, name) in enumerate(zip(stack.blocks, names, strict=True)):
            call = BlockCall(sequence, position, name)
            block.__dict__[CALL] = call  # not __setattr__, which registers modules and parameters
            block.__dict__["forward"] = call.forward
            block.__dict__["_replicate_for_data_parallel"] = _no_replica
    _without_checkpointing(model)
    if budget is not None:
        from revnets.memory.auto_budget import keep_budget

        keep_budget(model, budget)
    return model


def undo_reversible(model: Model) -> Model:
    """Restore the original blocks of a rewired network. Trained weights are kept, learned blends are removed.

    Args:
        model: A network from `make_reversible`.

    Returns:
        The same module.

    Raises:
        ArgumentError: If the model is not rewired.
    """
    for block in _rewired_blocks(model):
        call = block.__dict__.pop(CALL)
        cell = call.sequence.block_cells[call.position]
        del block.__dict__["forward"], block.__dict__["_replicate_for_data_parallel"]
        if cell.wrapper is not None:
            block.__dict__["forward"] = cell.wrapper
        if cell.blend.learned is not None:
            del block.blend
    from revnets.memory.auto_budget import forget_budget

    for module in model.modules():
        module.__dict__.pop("set_grad_checkpointing", None)
        forget_budget(module)
    return model


@contextmanager
def original_blocks(model: nn.Module) -> Generator[None]:
    """Restore the computation of the original network in a `with` block.

    Raises:
        ArgumentError: If the model is not rewired.
    """
    blocks = _rewired_blocks(model)
    rewired = [block.__dict__.pop("forward") for block in blocks]
    try:
        for block in blocks:
            call = vars(block)[CALL]
            wrapper = call.sequence.block_cells[call.position].wrapper
            if wrapper is not None:
                block.__dict__["forward"] = wrapper
        yield
    finally:
        for block, forward in zip(blocks, rewired, strict=True):
            block.__dict__["forward"] = forward


def _rewired_blocks(model: nn.Module) -> list[nn.Module]:
    blocks = [module for module in model.modules() if CALL in vars(module)]
    if not blocks:
        raise ArgumentError(f"{type(model).__name__} is not rewired", "model", code="no-columns")
    return blocks


def _budget(memory: Mapping[str, Any]) -> BudgetSpec:
    try:
        return BudgetSpec(**memory)
    except (TypeError, ValueError) as error:
        text = f"memory = {memory!r}: give a memory mode, or a budget such as {{'budget': '8GiB'}}"
        raise ArgumentError(text, "memory", code="invalid-value") from error


def _require_free(stacks: Sequence[BlockStack]) -> None:
    for stack in stacks:
        for name, block in zip(stack.names, stack.blocks, strict=True):
            if hasattr(block, "blend"):
                text = f"{name} already has an attribute `blend`, which a learned blend would replace"
                raise ArgumentError(text, "learn_blend", code="name-clash")


def _learned(block: nn.Module, blend: float, rule: str) -> Blend:
    weight = next(block.parameters())
    gain = Gain(1, blend).to(weight.device, weight.dtype if weight.dtype.is_floating_point else None)
    block.blend = gain
    return Blend(blend, rule, gain)


def _state_names(stack: BlockStack) -> list[str]:
    """Return the name of each block's first argument, the state."""
    names = []
    for name, block in zip(stack.names, stack.blocks, strict=True):
        first = next(iter(inspect.signature(block.forward).parameters.values()), None)
        if first is None or first.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
            text = f"{name} ({type(block).__name__}) does not take the state as its first argument"
            raise ArgumentError(text, "blocks", code="unsupported-block")
        names.append(first.name)
    return names


def _without_checkpointing(model: nn.Module) -> None:
    """Turn off gradient checkpointing, which would replay a second time, and disable timm's method to turn it on.

    In transformers it is a flag of the blocks, which the sequence checks in every forward pass.
    """
    for module in model.modules():
        if getattr(module, "grad_checkpointing", False) is True:
            module.grad_checkpointing = False  # type: ignore[assignment]
            warnings.warn(CHECKPOINTING, stacklevel=3)
        if hasattr(module, "set_grad_checkpointing"):
            module.__dict__["set_grad_checkpointing"] = _no_grad_checkpointing


def _no_grad_checkpointing(enable: bool = True) -> None:
    if enable:
        warnings.warn(CHECKPOINTING, stacklevel=2)


def _no_replica() -> nn.Module:
    """Reject `nn.DataParallel`, which calls this method to copy a block; the copy would run the original's forward."""
    text = (
        "nn.DataParallel copies the model in every forward pass, but a copy of a reversible block calls the original "
        "block, on its device. Use torch.nn.parallel.DistributedDataParallel, one process per device"
    )
    raise ArgumentError(text, "model", code="unsupported-block")
