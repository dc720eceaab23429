"""Specification and modules of the encoder's columns, from options or a YAML file. Does not need fairseq."""

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
from revnets.config.overrides import apply_overrides, parse_value
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
"""Defaults of the options, also for checkpoints that do not record them; gains may depend on `revcol_init`."""

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
"""Options of the block `transformer`, and the model options that set their defaults."""


MEANINGLESS = {
    "encoder_layerdrop": "a reversible column cannot skip a cell. Use --dropout",
    "encoder_layers_to_keep": "a reversible column cannot skip a cell. Use fewer --revcol-columns",
    "quant_noise_pq": "the blocks of the columns are not quantized. Remove it",
    "quant_noise_scalar": "its modules count their calls, so a replay would not repeat them. Remove it",
    "encoder_xformers_att_config": "the columns use scaled_dot_product_attention. Remove it",
}
"""Options of fairseq's transformer that this encoder does not support, with the reason."""


TRUST = "REVNETS_TRUST"
"""Environment variable. If it is 1, columns in checkpoints may name classes of other packages, which run.

It also passes the trusted columns of the command line on to the processes that fairseq starts.
"""


class EncoderSpec(ColumnsSpec):
    """Specification of the encoder's columns.

    fairseq's embedding is the stem, so a stem in the file of a whole network is ignored. A head or intermediate outputs
    (`taps`) are refused.
    """

    @model_validator(mode="before")
    @classmethod
    def _without_ends(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in ("head", "taps"):
            if value.get(key):
                raise problem(
                    "the decoder reads the last level of the last column", "Remove the key", key, code="reserved-key"
                )
        default = {"fusion": parse_value(DEFAULTS["revcol_fusion"])}
        return default | {key: item for key, item in value.items() if key not in ("stem", "head", "taps")}


def defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of unset options: `DEFAULTS`, with the gain of the initialization `revcol_init`."""
    init = options.get("revcol_init")
    named = INITIALIZATIONS.get(init) if isinstance(init, str) else None
    return DEFAULTS if named is None else DEFAULTS | {"revcol_gain": named.gain}


def trust_columns(options: Mapping[str, Any]) -> None:
    """Allow exactly these columns to name classes of other packages, in this process and its child processes."""
    os.environ[TRUST] = ",".join(filter(None, (os.environ.get(TRUST), _digest(options))))


def are_trusted(options: Mapping[str, Any]) -> bool:
    """Return True if the columns of these options may name classes of other packages."""
    return not {"1", _digest(options)}.isdisjoint(os.environ.get(TRUST, "").split(","))


def _digest(options: Mapping[str, Any]) -> str:
    names = [options.get(key) for key in ("revcol_net", "revcol_fusion", "revcol_spec")]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def read_spec(path: Path, options: Mapping[str, Any], trust: bool) -> str:
    """Read the columns of a YAML file as JSON text, for the option `revcol_net`.

    Args:
        path: YAML file.
        options: Options of the model, which override the file.
        trust: Whether the file may name classes of other packages.

    Raises:
        revnets.SpecError: If the file or an option is invalid.
    """
    layers = read_layers(path)
    apply_overrides(layers, _overrides({key: value for key, value in options.items() if value is not None}))
    return json.dumps(dump(layers.check(EncoderSpec, trust=trust)))


def encoder_spec(options: Mapping[str, Any]) -> EncoderSpec:
    """Create the specification of the encoder's columns; it is checked once per model.

    Options of a checkpoint may name only blocks and fusions of this project, see `TRUST`.

    Args:
        options: Flat options of a model, such as `vars(args)`; an old checkpoint may lack some. `revcol_net` holds
            columns as JSON, `revcol_spec` the path of their file.

    Raises:
        ArgumentError: If the encoder does not support an option; the key is the option.
        revnets.SpecError: If the columns cannot be built.
    """
    for key, reason in MEANINGLESS.items():
        if value := options.get(key):
            option = f"--{key.replace('_', '-')}"
            raise ArgumentError(f"{option} {value}: {reason}", option, code="reserved-key")
    for key in ("revcol_net", "revcol_spec", "revcol_blocks", "revcol_fusion", "revcol_init", "revcol_memory"):
        if not isinstance(options.get(key), str | None):
            raise ArgumentError(f"{key} {options[key]!r:.60}: not a string. Give text", key, code="wrong-type")
    keys = (*DEFAULTS, *BLOCK_OPTIONS.values(), "encoder_embed_dim", "revcol_net", "revcol_spec")
    given = defaults(options) | {key: options[key] for key in keys if options.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str | float | int) or (isinstance(value, int) and value.bit_length() > 64):
            problem = f"{key}: expected text or a number, not {type(value).__name__}"
            raise ArgumentError(problem, key, code="wrong-type")
    return _checked(json.dumps(given, sort_keys=True), are_trusted(options))


@lru_cache(maxsize=16)
def _checked(options: str, trust: bool) -> EncoderSpec:
    """Check options in JSON. Cached, because fairseq calls it several times for one model."""
    given = json.loads(options)
    spec = _layers(given, trust).check(EncoderSpec, trust=trust)
    with torch.device("meta"):  # building finds errors that the specification does not
        encoder_columns(spec, given["encoder_embed_dim"], given.get("revcol_spec") or "options")
    return spec


def _layers(given: Mapping[str, Any], trust: bool) -> Layers:
    """Load columns, in which blocks `transformer` take the model options that their level does not set."""
    if given.get("revcol_net"):
        try:
            data = json.loads(given["revcol_net"])
        except (ValueError, RecursionError):  # not JSON, a number with thousands of digits, or too deep nesting
            data = None
        if not isinstance(data, dict) or not isinstance(data.get("levels"), list):
            raise ArgumentError(
                "revcol_net: not a description of columns. Use a checkpoint of fairseq-train",
                "revcol_net",
                code="wrong-format",
            )
        if "base" in data:
            raise foreign_file("revcol_net", "base")
    else:
        level = {"dim": given["encoder_embed_dim"], "block": "transformer"}
        depths = [part.strip() for part in given["revcol_blocks"].split(",")]
        if not all(part.isdecimal() and len(part) < 10 for part in depths):
            option = "--revcol-blocks"
            problem = f"{option} {given['revcol_blocks']!r:.60}: not a list of counts. Give numbers, as in 1,1,1,1"
            raise ArgumentError(problem, option, code="invalid-syntax")
        data = {"columns": 1, "levels": [{**level, "depth": int(depth)} for depth in depths]}
    defaults = {key: given[option] for key, option in BLOCK_OPTIONS.items() if option in given}
    data["levels"] = [
        defaults | level if isinstance(level, dict) and level.get("block") == "transformer" else level
        for level in data["levels"]
    ]
    layers = read_layers(data, "options")
    if not given.get("revcol_net"):
        apply_overrides(layers, _overrides(given))
    elif given.get("revcol_spec") and trust:  # blocks may be in the directory of the file
        layers.folders = [Path(given["revcol_spec"]).parent, *layers.folders]
    return layers


def encoder_columns(spec: ColumnsSpec, dim: int, name: str = "spec") -> ReversibleColumns:
    """Build the columns. They map an embedding (B, T, dim) to states, the last of which is (B, T, dim).

    States are in float32 or wider for weights of any dtype, because inversion loses too much in half precision. A cell
    gets its inputs in the dtype of its weights.

    Args:
        spec: Specification of the columns.
        dim: Channels of the embedding and of the decoder's attention.
        name: Name of the specification in error messages.

    Raises:
        revnets.SpecError: If the specification does not describe an encoder.
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
    """Convert a tensor to float32, unless it is float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class EveryPosition(nn.Module):
    """Adapter for a block that acts on every position separately, so it needs no padding mask."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Apply the block and ignore the padding mask; the shape (B, T, C) does not change."""
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
        f"{type(block).__name__} has no argument padding_mask, so padding would change the states of words",
        "Add padding_mask=None to its forward: (B, T), True at padding, or None without padding",
        code="invalid-component",
    )


def _check(spec: ColumnsSpec, dim: int, name: str) -> None:
    for index in (0, len(spec.levels) - 1):
        if spec.levels[index].dim != dim:
            raise SpecError(
                name,
                f"levels.{index}.dim",
                f"{spec.levels[index].dim} channels, but the embedding and the decoder have {dim}",
                f"Use {dim}, or another --encoder-embed-dim",
                code="shape-mismatch",
            )
    if any(reduction != 1 for reduction in spec.reductions()):
        raise SpecError(
            name, "levels", "a level changes the number of positions", "Remove its stride", code="shape-mismatch"
        )


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options of the columns to key paths of the specification."""
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
