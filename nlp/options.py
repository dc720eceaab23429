"""Options of `--arch revcol_transformer`: on the command line, in a checkpoint, and as the specification of a net."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from revnets import NetSpec, load_spec
from revnets.registry import importable, register_stem
from revnets.spec import dump

from . import blocks as blocks  # registers the block

DEFAULTS = {
    "revcol_columns": 4,
    "revcol_blocks": "1,1,1,1",
    "revcol_fusion": "{type: linear, project: [above]}",
    "revcol_attention": "standard",
    "revcol_norm": "post",
    "revcol_gain": 0.5,
    "revcol_memory": "exact",
}
"""What a checkpoint that does not record an option was trained with."""

STEM = "words"
"""The stem of every encoder."""


@register_stem(STEM)
class Words(nn.Module):
    """Stands in a specification for fairseq's embedding of words and positions, which fairseq builds itself."""

    def __init__(self, dim: int):
        raise ValueError("it is fairseq's embedding. Use the file by --arch revcol_transformer --revcol-spec FILE")


MEANINGLESS = {
    "encoder_layerdrop": "a reversible column cannot do without one of its cells. Use --dropout",
    "encoder_layers_to_keep": "a reversible column cannot do without one of its cells. Use fewer --revcol-columns",
    "quant_noise_pq": "the blocks of the columns are not quantised. Leave it out",
    "encoder_xformers_att_config": "the columns use scaled_dot_product_attention. Leave it out",
}
"""Options of fairseq's transformer that this encoder cannot honour, each with the reason."""


def add_arguments(parser: Any) -> None:
    """Add `--revcol-*`. None has a default here, so that an architecture sees what was given."""
    text = {key: f"(default: {value})" for key, value in DEFAULTS.items()}
    add = parser.add_argument
    add("--revcol-columns", type=_count, metavar="N", help=f"columns of the encoder {text['revcol_columns']}")
    add(
        "--revcol-blocks",
        type=_counts,
        metavar="N,N,...",
        help=f"transformer blocks of each level of a column; two levels or more {text['revcol_blocks']}",
    )
    add(
        "--revcol-fusion",
        metavar="YAML",
        help=f"how a level joins what it reads, as in docs/yaml.md {text['revcol_fusion']}",
    )
    add(
        "--revcol-attention",
        choices=["standard", "cosine"],
        help=f"dot products, or the cosines of Swin Transformer V2 {text['revcol_attention']}",
    )
    add(
        "--revcol-norm",
        choices=["post", "pre", "res-post"],
        help="LayerNorm after the sum, before the branch (as --encoder-normalize-before), or after the branch "
        f"{text['revcol_norm']}",
    )
    add("--revcol-gain", type=float, metavar="G", help=f"first value of every gain {text['revcol_gain']}")
    add(
        "--revcol-memory",
        metavar="MODE[,MODE,...]",
        help="what is kept for backward: store, recompute, invert or exact; one mode, or one for each column "
        f"{text['revcol_memory']}",
    )
    add(
        "--revcol-spec",
        metavar="FILE",
        help="YAML file of columns and blocks (docs/nlp.md); other options given besides change what it says",
    )


def settle(args: argparse.Namespace) -> None:
    """Check the options of a new model and fill in all that a checkpoint should record.

    Raises:
        ValueError: an option that this encoder cannot honour; `revnets.SpecError` for what is wrong with the net.
    """
    refuse_meaningless(args)
    if getattr(args, "revcol_norm", None) == "pre":
        args.encoder_normalize_before = True
    if getattr(args, "revcol_spec", None) and not getattr(args, "revcol_net", None):
        args.revcol_spec = str(Path(args.revcol_spec).resolve())
        args.revcol_net = json.dumps(dump(_read(args)))
    elif not getattr(args, "revcol_net", None):
        if getattr(args, "encoder_normalize_before", False):
            args.revcol_norm = getattr(args, "revcol_norm", None) or "pre"
        for key, value in DEFAULTS.items():
            if getattr(args, key, None) is None:
                setattr(args, key, value)
    spec = net_spec(vars(args))
    blocks = spec.columns * sum(level.depth for level in spec.levels)
    if getattr(args, "encoder_layers", None) not in (None, blocks):
        raise ValueError(
            f"--encoder-layers {args.encoder_layers}: the encoder has {blocks} blocks in {spec.columns} columns. Use "
            "--revcol-columns and --revcol-blocks"
        )
    args.encoder_layers = blocks


def refuse_meaningless(args: argparse.Namespace) -> None:
    """Raises ValueError for an option of fairseq's transformer that this encoder cannot honour."""
    for key, reason in MEANINGLESS.items():
        if value := getattr(args, key, None):
            raise ValueError(f"--{key.replace('_', '-')} {value}: {reason}")


def net_spec(options: Mapping[str, Any]) -> NetSpec:
    """The specification of the encoder's columns.

    Args:
        options: the flat options of a model, such as `vars(args)`; those of a checkpoint may lack some.

    Raises:
        revnets.SpecError: the net cannot be built as described.
    """
    get = _getter(options)
    if get("revcol_net"):
        with importable(*_folders(options)):
            spec = load_spec(json.loads(get("revcol_net")))
    else:
        level = {"dim": get("encoder_embed_dim"), "block": "transformer"}
        spec = load_spec(
            {
                "columns": get("revcol_columns"),
                "stem": STEM,
                "levels": [{**level, "depth": int(depth)} for depth in get("revcol_blocks").split(",")],
                "fusion": yaml.safe_load(get("revcol_fusion")),
                "gain": {"init": get("revcol_gain")},
                "memory": _modes(get("revcol_memory")),
            }
        )
    return _with_options(spec, get)


def _read(args: argparse.Namespace) -> NetSpec:
    """The net that `--revcol-spec` describes, changed by the options that were given besides."""
    if getattr(args, "revcol_blocks", None):
        raise ValueError("--revcol-blocks: the levels are those of --revcol-spec. Change them in the file")
    overrides = [f"stem={STEM}"]
    for option, key in (("revcol_columns", "columns"), ("revcol_gain", "gain.init"), ("revcol_fusion", "fusion")):
        if getattr(args, option, None) is not None:
            overrides.append(f"{key}={getattr(args, option)}")
    if getattr(args, "revcol_memory", None):
        overrides.append(f"memory={json.dumps(_modes(args.revcol_memory))}")
    spec = load_spec(args.revcol_spec, overrides)
    if "fusion" in spec.model_fields_set:
        return spec
    return load_spec(args.revcol_spec, [*overrides, f"fusion={DEFAULTS['revcol_fusion']}"])


def _with_options(spec: NetSpec, get: Callable[[str], Any]) -> NetSpec:
    """The spec in which blocks `transformer` have fairseq's options, unless they say something else themselves."""
    given = {
        "heads": get("encoder_attention_heads"),
        "ffn_dim": get("encoder_ffn_embed_dim"),
        "dropout": get("dropout"),
        "attention_dropout": get("attention_dropout"),
        "activation_dropout": get("activation_dropout"),
        "activation": get("activation_fn"),
        "attention": get("revcol_attention"),
        "norm": get("revcol_norm"),
    }
    given = {key: value for key, value in given.items() if value is not None}
    data = dump(spec)
    data["levels"] = [given | level if level["block"] == "transformer" else level for level in data["levels"]]
    return load_spec(data)


def _getter(options: Mapping[str, Any]) -> Callable[[str], Any]:
    def get(key: str) -> Any:
        value = options.get(key)
        return DEFAULTS.get(key) if value is None else value

    return get


def _folders(options: Mapping[str, Any]) -> list[Path]:
    """Where the blocks of a recorded net may lie: beside the file that it was read from."""
    return [Path(options["revcol_spec"]).parent] if options.get("revcol_spec") else []


def _modes(text: str) -> str | list[str]:
    modes = [mode.strip() for mode in text.split(",")]
    return modes[0] if len(modes) == 1 else modes


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of columns; give 1 or more")
    return int(text)


def _counts(text: str) -> str:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give the blocks of two levels or more, as in 1,1,1,1")
    return ",".join(parts)
