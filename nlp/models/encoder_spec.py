"""The encoder's columns: from the options of a model, or from a YAML file, to a spec and to modules. No fairseq."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from revnets import NetSpec, ReversibleColumns, SpecError, build_columns, load_spec
from revnets.config.net_spec import dump
from revnets.config.registry import importable, register_stem
from revnets.models.net import Level
from revnets.nn.blocks import MLPBlock

from ..layers import transformer as transformer  # registers the block

DEFAULTS = {
    "revcol_columns": 4,
    "revcol_blocks": "1,1,1,1",
    "revcol_fusion": "{type: linear, project: [above]}",
    "revcol_attention": "standard",
    "revcol_norm": "post",
    "revcol_gain": 0.5,
    "revcol_memory": "exact",
    "revcol_stored": 0,
}
"""What a checkpoint that does not record an option was trained with."""

STEM = "words"
"""The stem of every encoder."""

BLOCK_OPTIONS = {
    "heads": "encoder_attention_heads",
    "ffn_dim": "encoder_ffn_embed_dim",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "activation": "activation_fn",
    "attention": "revcol_attention",
    "norm": "revcol_norm",
}
"""Options of the block `transformer`, and the options of the model that they follow unless a level says otherwise."""


@register_stem(STEM)
class Words(nn.Module):
    """Stands in a specification for fairseq's embedding of words and positions, which fairseq builds itself."""

    def __init__(self, dim: int):
        raise ValueError("it is fairseq's embedding. Use the file by --arch revcol_transformer --revcol-spec FILE")


def net_spec(options: Mapping[str, Any]) -> NetSpec:
    """The specification of the encoder's columns, with every option of its blocks.

    Args:
        options: the flat options of a model, such as `vars(args)`. Those of an old checkpoint may lack some.
            `revcol_net` is a whole net as JSON, `revcol_spec` the file that it came from.

    Raises:
        revnets.SpecError: the net cannot be built as described.
    """
    given = DEFAULTS | {key: value for key, value in options.items() if value is not None}
    if given.get("revcol_net"):
        with _beside(given):
            return _with_options(load_spec(json.loads(given["revcol_net"])), given)
    level = {"dim": given["encoder_embed_dim"], "block": "transformer"}
    levels = [{**level, "depth": int(depth)} for depth in given["revcol_blocks"].split(",")]
    net = {"columns": 1, "stem": STEM, "levels": levels}
    return _with_options(load_spec(net, _overrides(given)), given)


def read_spec(path: Path, options: Mapping[str, Any]) -> str:
    """The net of a YAML file as JSON text, for `revcol_net`. Options that were given besides change what it says.

    Raises:
        revnets.SpecError: something in the file or in the options is wrong.
    """
    overrides = [f"stem={STEM}", *_overrides({key: value for key, value in options.items() if value is not None})]
    spec = load_spec(path, overrides)
    if "fusion" not in spec.model_fields_set:
        spec = load_spec(path, [*overrides, f"fusion={DEFAULTS['revcol_fusion']}"])
    return json.dumps(dump(spec))


def encoder_columns(spec: NetSpec, dim: int, name: str = "spec") -> ReversibleColumns:
    """The columns as modules: from an embedding (B, T, dim) to states whose last one is (B, T, dim).

    States stay in float32, or wider, whatever the dtype of the weights: the inverse of states in half precision is a
    poor one. A cell sees its reads in the dtype of its weights.

    Args:
        name: of the spec, for error messages.

    Raises:
        revnets.SpecError: the spec describes something that cannot be an encoder.
    """
    _check(spec, dim, name)
    columns = build_columns(spec, name)
    for cell in columns.flat():
        assert isinstance(cell.function, Level)
        for index, block in enumerate(cell.function.blocks):
            cell.function.blocks[index] = _masked(block, f"levels.{index}", name)
        cell.function.register_forward_pre_hook(_to_dtype_of_weights)
        cell.function.register_forward_hook(_to_float32)
    return columns


def float32(x: Tensor) -> Tensor:
    """In float32 at least; the same tensor where it is already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class EveryPosition(nn.Module):
    """A block that looks at one position at a time, and so at no padding but from padding."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return self.block(x)


def _masked(block: nn.Module, key: str, name: str) -> nn.Module:
    parameters = inspect.signature(block.forward).parameters.values()
    if any(item.name == "padding_mask" or item.kind is item.VAR_KEYWORD for item in parameters):
        return block
    if isinstance(block, MLPBlock):
        return EveryPosition(block)
    raise SpecError(
        name,
        key,
        f"{type(block).__name__} takes no padding_mask, so that sentences would see their padding",
        "Give its forward the argument padding_mask=None: (B, T), True at padding, None if there is none",
        code="invalid-component",
    )


def _check(spec: NetSpec, dim: int, name: str) -> None:
    if spec.head is not None or spec.taps:
        key = "taps" if spec.head is None else "head"
        raise SpecError(
            name, key, "the decoder reads the last column's last level", "Remove the key", code="reserved-key"
        )
    for index in (0, len(spec.levels) - 1):
        if spec.levels[index].dim != dim:
            raise SpecError(
                name,
                f"levels.{index}.dim",
                f"{spec.levels[index].dim} channels, but words and the decoder's attention have {dim}",
                f"Give {dim}, or another --encoder-embed-dim",
                code="shape-mismatch",
            )
    if any(reduction != 1 for reduction in spec.reductions()):
        raise SpecError(
            name, "levels", "a level has another resolution than the words", "Give no stride", code="shape-mismatch"
        )


def _overrides(given: Mapping[str, Any]) -> list[str]:
    keys = {"revcol_columns": "columns", "revcol_fusion": "fusion", "revcol_gain": "gain.init"}
    overrides = [f"{key}={given[option]}" for option, key in keys.items() if option in given]
    if "revcol_memory" in given:
        modes = given["revcol_memory"]
        is_list = "," in modes and not modes.startswith("{")
        overrides.append(f"memory=[{modes}]" if is_list else f"memory={modes}")
    return overrides


def _with_options(spec: NetSpec, given: Mapping[str, Any]) -> NetSpec:
    """Blocks `transformer` take the options of the model, unless their level says something else."""
    defaults = {key: given[option] for key, option in BLOCK_OPTIONS.items() if option in given}
    data = dump(spec)
    data["levels"] = [defaults | level if level["block"] == "transformer" else level for level in data["levels"]]
    with _beside(given):
        try:
            return load_spec(data)
        except SpecError as error:  # all but the options has been checked before
            raise SpecError("options", error.key, error.problem, error.remedy, error.code) from None


def _beside(given: Mapping[str, Any]):
    """Blocks of a recorded net may lie beside the file that it was read from."""
    return importable(*([Path(given["revcol_spec"]).parent] if given.get("revcol_spec") else []))


def _to_dtype_of_weights(function: nn.Module, reads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    weight = next(function.parameters(), None)
    return tuple(reads) if weight is None else tuple(read.to(weight.dtype) for read in reads)


def _to_float32(function: nn.Module, reads: Sequence[Tensor], update: Tensor) -> Tensor:
    return float32(update)
