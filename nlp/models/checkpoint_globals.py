"""Safe reading of fairseq's checkpoints: globals for the restricted `torch.load`, and a check of every file."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from revnets.utils import checkpoint_io

from .encoder_spec import TRUST

_NUMBERS = [np.float32(0), np.float64(0), np.int32(0), np.int64(0)]

RECORDS: tuple[Callable[..., Any] | tuple[Callable[..., Any], str], ...] = (
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(type(number.dtype) for number in _NUMBERS),
    # These functions are in different modules in NumPy 1 and 2.
    *(
        (value.__reduce__()[0], f"{module}.multiarray.{name}")  # type: ignore[misc]
        for value, name in ((np.zeros(0), "_reconstruct"), (_NUMBERS[0], "scalar"))
        for module in ("numpy.core", "numpy._core")
    ),
)
"""Classes of what fairseq saves in addition to tensors: options as a Namespace, and NumPy scalars and arrays."""


def allow_fairseq_checkpoints() -> None:
    """Add `RECORDS` to the globals that `torch.load` accepts in this process.

    fairseq calls `torch.load` itself (`--restore-file`, `fairseq-generate`), so only the list of the process has an
    effect. Call this function where fairseq loads the models, not in modules that are imported for other reasons.
    """
    torch.serialization.add_safe_globals(list(RECORDS))


def check_fairseq_checkpoints() -> None:
    """Make fairseq refuse checkpoints for which `torch.load` would need unbounded memory or time.

    Before fairseq loads a file, it is read like in `revnets average-checkpoints`, without its tensors. With
    `REVNETS_TRUST=1` or `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`, the check is skipped, because the file may contain
    objects of other classes. Call this function once, where fairseq loads the models.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    load = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(load)
    def load_checked(path: str, *args: Any, **options: Any) -> Any:
        if not _is_trusted():
            try:
                checkpoint_io.read_checkpoint(PathManager.get_local_path(path), checkpoint_io.RECORDS, mmap=True)
            except checkpoint_io.CheckpointReadError as error:
                raise SystemExit(str(error)) from error  # printed as the last line of a fairseq command
        return load(path, *args, **options)

    checkpoint_utils.load_checkpoint_to_cpu = load_checked


def _is_trusted() -> bool:
    forced = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "").lower()  # torch's own variable and values
    return "1" in os.environ.get(TRUST, "").split(",") or forced in ("1", "y", "yes", "true")
