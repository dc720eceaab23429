"""States whose tensors are sharded over processes: saved as one file per process, or gathered into one file.

FSDP2 divides a tensor along its first axis, like `torch.chunk`. A sharded checkpoint is a directory: `state.pt` has
everything except the sharded tensors, and `shard-R-of-N.pt` has the parts of process R. All files have the id of the
save that wrote them. docs/development/design-decisions.md explains why this is not the layout of
torch.distributed.checkpoint.
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
"""Keys of a state whose tensors can be sharded."""

STATE = "state.pt"
PLACE = "in shards"
"""Key of the mapping that replaces a sharded tensor in `state.pt`. Its value is the name of the tensor in shards."""

SAVE = "save"
"""Key of the id of a save in `state.pt`, and of the id and the number of the shard in a shard.

Files of earlier versions do not have it.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tensor that belongs to one process."""

    local: Tensor
    shape: torch.Size  # of the whole tensor
    whole: Callable[[], Tensor]  # also reads the parts of other processes


def shard_name(rank: int, count: int) -> str:
    return f"shard-{rank:05d}-of-{count:05d}.pt"


def new_save_id() -> str:
    """A random identifier of a save."""
    return os.urandom(16).hex()


def mapped(tree: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """Copy nested dicts and lists, and replace each leaf by `change(place, leaf)`."""
    if isinstance(tree, Mapping) and PLACE not in tree:
        return {key: mapped(item, change, f"{place}/{key}") for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(item, change, f"{place}/{index}") for index, item in enumerate(tree))
    return change(place, tree)


def gathered(state: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Gather the sharded tensors of a state into CPU memory. All processes must call it.

    Args:
        state: Of a run.
        keep: Whether this process needs the result. The others get empty tensors.
    """

    def whole(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        full = leaf.full_tensor()
        return full.cpu() if keep else torch.empty(0)

    return mapped(state, whole)


def divided(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a state into a state without its sharded tensors, and the parts of this process by name."""
    parts: dict[str, Tensor] = {}

    def part(place: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        parts[place] = leaf.to_local().detach().cpu()
        return {PLACE: place, "shape": leaf.shape}

    return mapped(state, part), parts


def split(state: Mapping[str, Any], count: int) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Split a whole state as `divided` would in each of `count` processes."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]

    def part(place: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or place.split("/")[1] not in DIVISIBLE:
            return leaf
        for rank in range(count):
            parts[rank][place] = own_part(leaf, rank, count).clone()
        return {PLACE: place, "shape": leaf.shape}

    return mapped(state, part), parts


def own_part(whole: Tensor, rank: int, count: int) -> Tensor:
    """The part of a tensor that FSDP2 assigns to process `rank`; empty if there are fewer rows than processes."""
    parts = whole.chunk(count)
    return parts[rank] if rank < len(parts) else whole[:0]


def read_shards(folder: Path, load: Callable[[Path], Any], rank: int = 0, count: int = 0) -> dict[str, Any]:
    """Read a sharded checkpoint.

    Args:
        folder: Directory of the checkpoint.
        load: Reads one file.
        rank, count: of this run. If `count` is the number of shards, sharded tensors are `Piece`s, otherwise whole.

    Raises:
        CheckpointError: If a shard is of another save than `state.pt`, or has the name of another shard.
        Exception: If parts are missing, or do not match each other.
    """
    state = load(folder / STATE)
    shards, save = state.pop("shards"), state.pop(SAVE, None)
    if type(shards) is not int or shards < 1:
        raise ValueError("the number of shards is not a positive number")
    files: dict[int, dict[str, Any]] = {}

    def part(number: int, name: str, shape: torch.Size) -> Tensor:
        if number not in files:
            file = shard_name(number, shards)
            files[number] = load(folder / file)
            if files[number].get(SAVE) != (None if save is None else (save, number)):
                problem = f"its {file} is not shard {number} of the save that wrote {STATE}"
                raise CheckpointError(folder, problem, "Use an older checkpoint", code="damaged-file")
        tensor = files[number][name]
        if tensor.shape != own_part(torch.empty(shape, device="meta"), number, shards).shape:
            raise ValueError(f"{name} has another shape in shard {number}")
        return tensor

    def leaf(place: str, found: Any) -> Any:
        if not isinstance(found, Mapping):
            return found
        name, shape = found[PLACE], torch.Size(found["shape"])
        if name != place:  # also prevents that one stored tensor is expanded to many
            raise ValueError(f"{place} does not belong to this checkpoint")

        def whole() -> Tensor:
            return torch.cat([part(number, name, shape) for number in range(shards)])

        return Piece(part(rank, name, shape), shape, whole) if shards == count else whole()

    return mapped(state, leaf)


def copy_into(target: Tensor, source: Tensor | Piece) -> None:
    """Copy a whole tensor or a piece into a tensor that may be sharded. Shapes are those of the whole tensors."""
    with torch.no_grad():
        if not isinstance(target, DTensor):
            target.copy_(source.whole() if isinstance(source, Piece) else source)
            return
        local = target.to_local()
        local.copy_(source.local if isinstance(source, Piece) else own_part(source, *_place(target)))


def like(target: Tensor, source: Any) -> Any:
    """Shard a source like the target if it has the target's shape."""
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
