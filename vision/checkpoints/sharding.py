"""States whose tensors are divided among processes: as one file for each process, or gathered into one.

FSDP2 divides a tensor along its first axis, as `torch.chunk` does. A checkpoint in shards is a folder: `state.pt` has
everything but the divided tensors, and `shard-R-of-N.pt` has the parts of process R. All of them carry the id of the
save that wrote them. Why this is not the layout of torch.distributed.checkpoint is in
docs/development/design-decisions.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vision.errors import CheckpointError

DIVISIBLE = ("model", "ema", "heads", "heads_ema", "optimizer")
"""Keys of a state below which tensors can be divided."""

STATE = "state.pt"
PLACE = "in shards"
"""Key of the small mapping that stands in `state.pt` for a divided tensor, and says under which name to find it."""

SAVE = "save"
"""Key of the id of a save in `state.pt`, and of the id and the number of the shard in a shard. Earlier versions have
none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tensor that belongs to one process."""

    local: Tensor
    shape: torch.Size  # of the whole
    whole: Callable[[], Tensor]  # reads the parts of the others as well


def shard_name(rank: int, count: int) -> str:
    return f"shard-{rank:05d}-of-{count:05d}.pt"


def new_save_id() -> str:
    """A random text that no other save has."""
    return os.urandom(16).hex()


def mapped(tree: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """A copy of nested dicts and lists whose leaves are `change(place, leaf)`."""
    if isinstance(tree, Mapping) and PLACE not in tree:
        return {key: mapped(item, change, f"{place}/{key}") for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(item, change, f"{place}/{index}") for index, item in enumerate(tree))
    return change(place, tree)


def gathered(state: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """A state without divided tensors, in the memory of the CPU. All processes call it together.

    Args:
        keep: does this process need the result? The others get empty tensors, one after the other.
    """

    def whole(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        full = leaf.full_tensor()
        return full.cpu() if keep else torch.empty(0)

    return mapped(state, whole)


def divided(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state without its divided tensors, and this process's parts of them by name."""
    parts: dict[str, Tensor] = {}

    def part(place: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        parts[place] = leaf.to_local().detach().cpu()
        return {PLACE: place, "shape": leaf.shape}

    return mapped(state, part), parts


def split(state: Mapping[str, Any], count: int) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """A whole state as `divided` would give it in each of `count` processes."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]

    def part(place: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or place.split("/")[1] not in DIVISIBLE:
            return leaf
        for rank in range(count):
            parts[rank][place] = own_part(leaf, rank, count).clone()
        return {PLACE: place, "shape": leaf.shape}

    return mapped(state, part), parts


def own_part(whole: Tensor, rank: int, count: int) -> Tensor:
    """The part of a tensor that FSDP2 gives to process `rank`; empty where there are more processes than rows."""
    parts = whole.chunk(count)
    return parts[rank] if rank < len(parts) else whole[:0]


def read_shards(folder: Path, load: Callable[[Path], Any], rank: int = 0, count: int = 0) -> dict[str, Any]:
    """Read a checkpoint in shards.

    Args:
        load: reads one file.
        rank, count: with as many processes as wrote it, divided tensors come as `Piece`s; otherwise whole.

    Raises:
        CheckpointError: a shard is of another save than `state.pt`, or has the name of another shard.
        Exception: parts are missing, or do not fit together.
    """
    state = load(folder / STATE)
    shards, save = state.pop("shards"), state.pop(SAVE, None)
    if type(shards) is not int or shards < 1:
        raise ValueError("the number of shards is none")
    files: dict[int, dict[str, Any]] = {}

    def part(number: int, name: str, shape: torch.Size) -> Tensor:
        if number not in files:
            file = shard_name(number, shards)
            files[number] = load(folder / file)
            if files[number].get(SAVE) != (None if save is None else (save, number)):
                problem = f"{file} in it is not the shard {number} of the save that wrote {STATE}"
                raise CheckpointError(folder, problem, "Use an older checkpoint", code="damaged-file")
        tensor = files[number][name]
        if tensor.shape != own_part(torch.empty(shape, device="meta"), number, shards).shape:
            raise ValueError(f"{name} has another shape in shard {number}")
        return tensor

    def leaf(place: str, found: Any) -> Any:
        if not isinstance(found, Mapping):
            return found
        name, shape = found[PLACE], torch.Size(found["shape"])
        if name != place:  # nor are many tensors made of one
            raise ValueError(f"{place} is not of this checkpoint")

        def whole() -> Tensor:
            return torch.cat([part(number, name, shape) for number in range(shards)])

        return Piece(part(rank, name, shape), shape, whole) if shards == count else whole()

    return mapped(state, leaf)


def copy_into(target: Tensor, source: Tensor | Piece) -> None:
    """Fill a tensor, divided or not, from one that is whole or in pieces; shapes are those of the whole."""
    with torch.no_grad():
        if not isinstance(target, DTensor):
            target.copy_(source.whole() if isinstance(source, Piece) else source)
            return
        local = target.to_local()
        local.copy_(source.local if isinstance(source, Piece) else own_part(source, *_place(target)))


def like(target: Tensor, source: Any) -> Any:
    """A source as a tensor that is divided as the target is, if it is of the target's shape."""
    if isinstance(source, Piece):
        if isinstance(target, DTensor) and source.shape == target.shape:
            return _as_dtensor(target, source.local)
        source = source.whole()
    if isinstance(target, DTensor) and isinstance(source, Tensor) and source.shape == target.shape:
        return _as_dtensor(target, own_part(source, *_place(target)))
    return source


def _as_dtensor(target: DTensor, local: Tensor) -> DTensor:
    local = local.to(target.device_mesh.device_type)
    return DTensor.from_local(
        local, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def _place(target: DTensor) -> tuple[int, int]:
    return target.device_mesh.get_local_rank(), target.device_mesh.size()
