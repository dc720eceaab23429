"""How fairseq reads its checkpoints: `torch.load` is restricted, and files are checked before it gets them."""

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
    # NumPy 1 and 2 have these two functions in modules of different names.
    *(
        (value.__reduce__()[0], f"{module}.multiarray.{name}")  # type: ignore[misc]
        for value, name in ((np.zeros(0), "_reconstruct"), (_NUMBERS[0], "scalar"))
        for module in ("numpy.core", "numpy._core")
    ),
)
"""Options as a Namespace, and numbers and arrays of NumPy, by their own classes, which `torch.load` demands."""


def allow_fairseq_checkpoints() -> None:
    """Let `torch.load` of this process read what fairseq saves beside tensors: options, numbers, arrays.

    fairseq calls `torch.load` itself (`--restore-file`, `fairseq-generate`), so nothing but the list of the process
    reaches it. Call it where fairseq loads the models, not where a package is imported for other reasons.
    """
    torch.serialization.add_safe_globals(list(RECORDS))


def check_fairseq_checkpoints() -> None:
    """Let fairseq's reader of checkpoints refuse files that `torch.load` would need unbounded memory or time for.

    A file is read as `revnets average-checkpoints` reads it, with its tensors left on the disk, before fairseq loads
    it. With `REVNETS_TRUST=1` or `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` it is not checked, since it may hold objects of
    other classes. Call it once, where fairseq loads the models.
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
                raise SystemExit(str(error)) from error  # the last line of a command of fairseq
        return load(path, *args, **options)

    checkpoint_utils.load_checkpoint_to_cpu = load_checked


def _is_trusted() -> bool:
    forced = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "").lower()  # torch's own switch, and its values
    return "1" in os.environ.get(TRUST, "").split(",") or forced in ("1", "y", "yes", "true")
