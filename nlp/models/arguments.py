"""Options of `--arch revcol_transformer`, from the command line or a checkpoint."""

from __future__ import annotations

import argparse
import ast
import os
from pathlib import Path
from typing import Any

from revnets import ColumnsSpec
from revnets.config.errors import ArgumentError
from revnets.config.memory_budget import BudgetSpec
from revnets.config.net_spec import INITIALIZATIONS

from .encoder_spec import DEFAULTS, are_trusted, defaults, encoder_spec, read_spec, trust_columns

_typed: set[str] = set()
"""Command-line values of this process for options that can name code of other packages."""


def add_arguments(parser: Any) -> None:
    """Add the options `--revcol-*` to a parser.

    They have no defaults here, so an architecture can tell which ones were set.
    """

    def add(option: str, text: str, **kwargs: Any) -> None:
        default = DEFAULTS.get(option.lstrip("-").replace("-", "_"))
        parser.add_argument(option, help=text if default is None else f"{text} (default: {default})", **kwargs)

    add("--revcol-columns", "number of columns", type=_count, metavar="N")
    add("--revcol-blocks", "transformer blocks in each level of a column", type=_counts, metavar="N,N,...")
    add("--revcol-fusion", "how a level combines its inputs, see docs/reference/yaml.md", type=_note, metavar="YAML")
    add(
        "--revcol-attention",
        "attention by dot products, or by cosines as in Swin Transformer V2",
        choices=["standard", "cosine"],
    )
    add(
        "--revcol-norm",
        "LayerNorm after the sum, before the branch (the same as --encoder-normalize-before), or after the branch",
        choices=["post", "pre", "res-post"],
    )
    add("--revcol-init", "initialization: that of the paper, or fast, with gains of 1", choices=[*INITIALIZATIONS])
    add("--revcol-gain", "initial value of every gain; 1 with --revcol-init fast", type=float, metavar="G")
    add(
        "--revcol-memory",
        "what is saved for backward: store, recompute, invert or exact, for all columns or one per column; or a budget "
        "such as '{budget: 24GiB}', within which as much as possible is saved ('{budget: exact}': the peak of exact)",
        metavar="MODE,...",
    )
    add("--revcol-stored", "number of cells that are not recomputed, counted from the end", type=_number, metavar="N")
    add(
        "--revcol-spec",
        "YAML file of columns and blocks (docs/guides/translation-model.md); other options override it. The classes "
        "that it names are imported and run, so use trusted files only",
        type=_note,
        metavar="FILE",
    )


def settle(args: argparse.Namespace, encoder_layers: int | None) -> None:
    """Check the options of a new model, and set all options that its checkpoints record.

    Args:
        args: Options from the command line or a checkpoint, complete except for those of the columns. Options from a
            checkpoint may name only blocks and fusions of this project (`encoder_spec.TRUST`).
        encoder_layers: Value of `--encoder-layers`, or None if it was not set.

    Raises:
        ArgumentError: If the encoder does not support an option; the key is the option.
        revnets.SpecError: If the columns are invalid.
    """
    _refuse_expressions(args)
    _settle_norm(args)
    trust = _is_typed(args)
    if not getattr(args, "revcol_spec", None):
        for key, value in defaults(vars(args)).items():
            if getattr(args, key, None) is None:
                setattr(args, key, value)
    elif not getattr(args, "revcol_net", None):
        if getattr(args, "revcol_blocks", None):
            raise ArgumentError(
                "--revcol-blocks: --revcol-spec defines the levels. Change them in the file",
                "--revcol-blocks",
                code="conflicting-values",
            )
        args.revcol_spec = str(Path(os.path.expanduser(args.revcol_spec)).resolve())
        args.revcol_net = read_spec(Path(args.revcol_spec), vars(args), trust or are_trusted(vars(args)))
    if trust:
        trust_columns(vars(args))
    spec = encoder_spec(vars(args))
    _check_stored(getattr(args, "revcol_stored", None) or 0, spec)
    blocks = spec.columns * sum(level.depth for level in spec.levels)
    if encoder_layers not in (None, blocks):
        raise ArgumentError(
            f"--encoder-layers {encoder_layers}: the encoder has {blocks} blocks in {spec.columns} columns. Set "
            "--revcol-columns and --revcol-blocks instead",
            "--encoder-layers",
            code="conflicting-values",
        )
    args.encoder_layers = blocks


def _note(text: str) -> str:
    """Record the value of an option that can name code. As its argparse type, it gets only values of a user."""
    _typed.add(text)
    return text


def _is_typed(args: argparse.Namespace) -> bool:
    """Return True if all options that can name code come from the command line of this process, not from a file."""
    given = [getattr(args, key, None) for key in ("revcol_spec", "revcol_fusion")]
    others = [value for value in given if value not in (None, DEFAULTS["revcol_fusion"])]
    return bool(others) and not getattr(args, "revcol_net", None) and all(value in _typed for value in others)


def _refuse_expressions(args: argparse.Namespace) -> None:
    """Refuse Python expressions in options that fairseq's decoder evaluates, also those of a checkpoint."""
    for key in ("adaptive_softmax_cutoff", "decoder_xformers_att_config"):
        text = getattr(args, key, None)
        if not isinstance(text, str):
            continue
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            option = f"--{key.replace('_', '-')}"
            problem = f"{option} {text[:60]!r}: not a literal. Give plain numbers or a plain dict"
            raise ArgumentError(problem, option, code="invalid-syntax") from None


def _settle_norm(args: argparse.Namespace) -> None:
    """Make `--revcol-norm pre` and `--encoder-normalize-before` equal: pre-norm blocks need a final LayerNorm."""
    norm = getattr(args, "revcol_norm", None)
    if getattr(args, "encoder_normalize_before", False):
        if norm not in (None, "pre"):
            raise ArgumentError(
                f"--revcol-norm {norm} contradicts --encoder-normalize-before. Remove one",
                "--revcol-norm",
                code="conflicting-values",
            )
        args.revcol_norm = "pre"
    elif norm == "pre":
        args.encoder_normalize_before = True


def _check_stored(stored: int, spec: ColumnsSpec) -> None:
    cells = spec.columns * len(spec.levels)
    if stored > cells:
        raise ArgumentError(
            f"--revcol-stored {stored}: the encoder has only {cells} cells. Use a smaller number",
            "--revcol-stored",
            code="out-of-range",
        )
    if stored and isinstance(spec.memory, BudgetSpec):
        raise ArgumentError(
            f"--revcol-stored {stored}: a budget selects the cells itself. Remove one of the two",
            "--revcol-stored",
            code="conflicting-values",
        )


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of cells. Give 0 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of columns. Give 1 or more")
    return int(text)


def _counts(text: str) -> str:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of two or more counts. Give the blocks of each level, as in 1,1,1,1"
        )
    return ",".join(parts)
