"""The encoder's columns: from the options of a model, or from a YAML file, to a spec and to modules. No fairseq."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from revnets import ColumnsSpec, ReversibleColumns, SpecError, build_columns
from revnets.config.errors import ArgumentError, problem
from revnets.config.imports import foreign_file
from revnets.config.loader import Layers, read_layers
from revnets.config.net_spec import INITIALIZATIONS, dump
from revnets.config.overrides import parse_value
from revnets.models.net import Level
from revnets.nn.blocks import MLPBlock

from ..layers import transformer as transformer  # registers the block

DEFAULTS = {
    "revcol_columns": 4,
    "revcol_blocks": "1,1,1,1",
    "revcol_fusion": "{type: linear, project: [above]}",
    "revcol_attention": "standard",
    "revcol_norm": "post",
    "revcol_init": "paper",
    "revcol_gain": 0.5,
    "revcol_memory": "exact",
    "revcol_stored": 0,
}
"""What a checkpoint that does not record an option was trained with; gains may depend on `revcol_init`."""

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


MEANINGLESS = {
    "encoder_layerdrop": "a reversible column cannot do without one of its cells. Use --dropout",
    "encoder_layers_to_keep": "a reversible column cannot do without one of its cells. Use fewer --revcol-columns",
    "quant_noise_pq": "the blocks of the columns are not quantised. Leave it out",
    "quant_noise_scalar": "its modules count their calls, so that a replay would not repeat them. Leave it out",
    "encoder_xformers_att_config": "the columns use scaled_dot_product_attention. Leave it out",
}
"""Options of fairseq's transformer that this encoder cannot honour, each with the reason."""


TRUST = "REVNETS_TRUST"
"""Environment variable: with 1, columns in checkpoints may name classes of other projects, which are imported and run.

Besides, it hands on to the processes that fairseq starts which columns were given on the command line.
"""


class EncoderSpec(ColumnsSpec):
    """The columns of an encoder. fairseq's embedding is its stem: that of a file which describes a whole net is left
    out, and a head or taps are refused.
    """

    @model_validator(mode="before")
    @classmethod
    def _without_ends(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in ("head", "taps"):
            if value.get(key):
                raise problem(
                    "the decoder reads the last column's last level", "Remove the key", key, code="reserved-key"
                )
        default = {"fusion": parse_value(DEFAULTS["revcol_fusion"])}
        return default | {key: item for key, item in value.items() if key not in ("stem", "head", "taps")}


def defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """What an option is that is not given: those of `DEFAULTS`, with the gain that `revcol_init` names."""
    init = options.get("revcol_init")
    named = INITIALIZATIONS.get(init) if isinstance(init, str) else None
    return DEFAULTS if named is None else DEFAULTS | {"revcol_gain": named.gain}


def trust_columns(options: Mapping[str, Any]) -> None:
    """Let exactly these columns name classes of other projects, in this process and in those that it starts."""
    os.environ[TRUST] = ",".join(filter(None, (os.environ.get(TRUST), _digest(options))))


def are_trusted(options: Mapping[str, Any]) -> bool:
    """May the columns that these options describe name classes of other projects?"""
    return not {"1", _digest(options)}.isdisjoint(os.environ.get(TRUST, "").split(","))


def _digest(options: Mapping[str, Any]) -> str:
    names = [options.get(key) for key in ("revcol_net", "revcol_fusion", "revcol_spec")]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def read_spec(path: Path, options: Mapping[str, Any], trust: bool) -> str:
    """The columns of a YAML file as JSON text, for `revcol_net`. Options that were given besides change what it says.

    Args:
        trust: may the file name classes of other projects?

    Raises:
        revnets.SpecError: something in the file or in the options is wrong.
    """
    layers = read_layers(path)
    layers.apply(_overrides({key: value for key, value in options.items() if value is not None}))
    return json.dumps(dump(layers.check(EncoderSpec, trust=trust)))


def encoder_spec(options: Mapping[str, Any]) -> EncoderSpec:
    """The specification of the encoder's columns, with every option of its blocks; it is checked once per model.

    Options of a checkpoint may name blocks and fusions of this project alone, see `TRUST`.

    Args:
        options: the flat options of a model, such as `vars(args)`. Those of an old checkpoint may lack some.
            `revcol_net` are columns as JSON, `revcol_spec` the file that they came from.

    Raises:
        ArgumentError: an option of fairseq's transformer that this encoder cannot honour; its key is the option.
        revnets.SpecError: the columns cannot be built as described.
    """
    for key, reason in MEANINGLESS.items():
        if value := options.get(key):
            option = f"--{key.replace('_', '-')}"
            raise ArgumentError(f"{option} {value}: {reason}", option, code="reserved-key")
    for key in ("revcol_net", "revcol_spec", "revcol_blocks", "revcol_fusion", "revcol_init", "revcol_memory"):
        if not isinstance(options.get(key), str | None):
            raise ArgumentError(f"{key} {options[key]!r:.60}: this is no text", key, code="wrong-type")
    keys = (*DEFAULTS, *BLOCK_OPTIONS.values(), "encoder_embed_dim", "revcol_net", "revcol_spec")
    given = defaults(options) | {key: options[key] for key in keys if options.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str | float | int) or (isinstance(value, int) and value.bit_length() > 64):
            problem = f"{key}: {type(value).__name__}, where text or a number is needed"
            raise ArgumentError(problem, key, code="wrong-type")
    return _checked(json.dumps(given, sort_keys=True), are_trusted(options))


@lru_cache(maxsize=16)
def _checked(options: str, trust: bool) -> EncoderSpec:
    """The spec for options as JSON. fairseq asks for it several times: for the command line, for the model."""
    given = json.loads(options)
    spec = _layers(given, trust).check(EncoderSpec, trust=trust)
    with torch.device("meta"):  # what only shows when it is built is a mistake of the options, too
        encoder_columns(spec, given["encoder_embed_dim"], given.get("revcol_spec") or "options")
    return spec


def _layers(given: Mapping[str, Any], trust: bool) -> Layers:
    """Blocks `transformer` take the options of the model, unless their level says something else."""
    if given.get("revcol_net"):
        try:
            data = json.loads(given["revcol_net"])
        except (ValueError, RecursionError):  # no JSON, numbers of thousands of digits, or nested too deep
            data = None
        if not isinstance(data, dict) or not isinstance(data.get("levels"), list):
            raise ArgumentError("revcol_net: these are no columns", "revcol_net", code="wrong-format")
        if "base" in data:
            raise foreign_file("revcol_net", "base")
    else:
        level = {"dim": given["encoder_embed_dim"], "block": "transformer"}
        depths = [part.strip() for part in given["revcol_blocks"].split(",")]
        if not all(part.isdecimal() and len(part) < 10 for part in depths):
            option = "--revcol-blocks"
            problem = f"{option} {given['revcol_blocks']!r:.60}: give numbers, as in 1,1,1,1"
            raise ArgumentError(problem, option, code="invalid-syntax")
        data = {"columns": 1, "levels": [{**level, "depth": int(depth)} for depth in depths]}
    defaults = {key: given[option] for key, option in BLOCK_OPTIONS.items() if option in given}
    data["levels"] = [
        defaults | level if isinstance(level, dict) and level.get("block") == "transformer" else level
        for level in data["levels"]
    ]
    layers = read_layers(data, "options")
    if not given.get("revcol_net"):
        layers.apply(_overrides(given))
    elif given.get("revcol_spec") and trust:  # blocks may lie beside the file that was read
        layers.folders = [Path(given["revcol_spec"]).parent, *layers.folders]
    return layers


def encoder_columns(spec: ColumnsSpec, dim: int, name: str = "spec") -> ReversibleColumns:
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


def _check(spec: ColumnsSpec, dim: int, name: str) -> None:
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


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """What options say about the columns, by key paths of the spec."""
    keys = {"revcol_columns": "columns", "revcol_init": "init", "revcol_gain": "gain.init"}
    overrides = {key: given[option] for option, key in keys.items() if option in given}
    if "revcol_fusion" in given:
        overrides["fusion"] = parse_value(given["revcol_fusion"], "fusion")
    if "revcol_memory" in given:
        modes = given["revcol_memory"]
        is_list = "," in modes and not modes.startswith("{")
        overrides["memory"] = parse_value(f"[{modes}]" if is_list else modes, "memory")
    return overrides


def _to_dtype_of_weights(function: nn.Module, reads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    weight = next(function.parameters(), None)
    return tuple(reads) if weight is None else tuple(read.to(weight.dtype) for read in reads)


def _to_float32(function: nn.Module, reads: Sequence[Tensor], update: Tensor) -> Tensor:
    return float32(update)
