"""Options of `--arch revcol_transformer`, on the command line and in a checkpoint."""

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
"""What this process was given on its command line for options that can name code of others."""


def add_arguments(parser: Any) -> None:
    """Add `--revcol-*`. None has a default here, so that an architecture sees what was given."""

    def add(option: str, text: str, **kwargs: Any) -> None:
        default = DEFAULTS.get(option.lstrip("-").replace("-", "_"))
        parser.add_argument(option, help=text if default is None else f"{text} (default: {default})", **kwargs)

    add("--revcol-columns", "columns of the encoder", type=_count, metavar="N")
    add("--revcol-blocks", "transformer blocks of each level of a column", type=_counts, metavar="N,N,...")
    add("--revcol-fusion", "how a level joins what it reads, as in docs/reference/yaml.md", type=_note, metavar="YAML")
    add(
        "--revcol-attention",
        "by dot products, or by the cosines of Swin Transformer V2",
        choices=["standard", "cosine"],
    )
    add(
        "--revcol-norm",
        "LayerNorm behind the sum, before the branch (as --encoder-normalize-before), or behind the branch",
        choices=["post", "pre", "res-post"],
    )
    add("--revcol-init", "first values: the paper's, or fast, where gains are 1", choices=[*INITIALIZATIONS])
    add("--revcol-gain", "first value of every gain; with --revcol-init fast 1", type=float, metavar="G")
    add(
        "--revcol-memory",
        "what is kept for backward: store, recompute, invert or exact; one mode, or one per column; or a budget such "
        "as '{budget: 24GiB}', under which as much is kept as fits ('{budget: exact}': under the peak of exact)",
        metavar="MODE,...",
    )
    add("--revcol-stored", "cells that keep everything, counted from the end", type=_number, metavar="N")
    add(
        "--revcol-spec",
        "YAML file of columns and blocks (docs/guides/translation-model.md); options that are given override it. The "
        "file is a program: the classes that it names are imported and run",
        type=_note,
        metavar="FILE",
    )


def settle(args: argparse.Namespace, encoder_layers: int | None) -> None:
    """Check the options of a new model and fill in all that its checkpoints should record.

    Args:
        args: complete, but for options of the encoder's columns; from the command line, or out of a checkpoint. In a
            checkpoint they may name blocks and fusions of this project alone (`encoder_spec.TRUST`).
        encoder_layers: `--encoder-layers`, if it was given.

    Raises:
        ArgumentError: an option that this encoder cannot honour; its key is the option.
        revnets.SpecError: something is wrong with the net.
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
                "--revcol-blocks: the levels are those of --revcol-spec. Change them in the file",
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
            f"--encoder-layers {encoder_layers}: the encoder has {blocks} blocks in {spec.columns} columns. Use "
            "--revcol-columns and --revcol-blocks",
            "--encoder-layers",
            code="conflicting-values",
        )
    args.encoder_layers = blocks


def _note(text: str) -> str:
    """The type of an option that can name code of others. argparse calls it for what a user gives alone."""
    _typed.add(text)
    return text


def _is_typed(args: argparse.Namespace) -> bool:
    """Are the options that can name code of others from the command line of this process, and not out of a file?"""
    given = [getattr(args, key, None) for key in ("revcol_spec", "revcol_fusion")]
    others = [value for value in given if value not in (None, DEFAULTS["revcol_fusion"])]
    return bool(others) and not getattr(args, "revcol_net", None) and all(value in _typed for value in others)


def _refuse_expressions(args: argparse.Namespace) -> None:
    """fairseq's decoder evaluates some options as Python, in a checkpoint as well."""
    for key in ("adaptive_softmax_cutoff", "decoder_xformers_att_config"):
        text = getattr(args, key, None)
        if not isinstance(text, str):
            continue
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            option = f"--{key.replace('_', '-')}"
            problem = f"{option} {text[:60]!r}: give plain numbers or a plain dict"
            raise ArgumentError(problem, option, code="invalid-syntax") from None


def _settle_norm(args: argparse.Namespace) -> None:
    """`--revcol-norm pre` and `--encoder-normalize-before` are one: pre-norm blocks need a LayerNorm at the end."""
    norm = getattr(args, "revcol_norm", None)
    if getattr(args, "encoder_normalize_before", False):
        if norm not in (None, "pre"):
            raise ArgumentError(
                f"--revcol-norm {norm} contradicts --encoder-normalize-before. Give one of them",
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
            f"--revcol-stored {stored}: there are {cells} cells. Give as many or fewer",
            "--revcol-stored",
            code="out-of-range",
        )
    if stored and isinstance(spec.memory, BudgetSpec):
        raise ArgumentError(
            f"--revcol-stored {stored}: under a budget the cells are chosen. Give one or the other",
            "--revcol-stored",
            code="conflicting-values",
        )


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of cells; give 0 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of columns; give 1 or more")
    return int(text)


def _counts(text: str) -> str:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give the blocks of two levels or more, as in 1,1,1,1")
    return ",".join(parts)
