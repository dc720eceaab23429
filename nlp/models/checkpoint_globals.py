"""What fairseq needs to read its own checkpoints under a torch whose `torch.load` is restricted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

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
