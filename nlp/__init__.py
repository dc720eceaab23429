"""RevCol-Transformer for fairseq: `fairseq-train DATA --user-dir nlp --arch revcol_transformer ...`.

The guide is docs/guides/translation-model.md.

fairseq imports this folder when it is named by `--user-dir`, and the model becomes known to it. To import the folder
without fairseq, as the commands for data do, stays cheap: fairseq takes seconds.
`import nlp.models.revcol_transformer` does both.

Modules here import each other by relative names, because a wheel installs the folder as `revnets_nlp`: a top-level
package `nlp` would be in the way of everybody's own.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

# What fairseq's checkpoints hold besides tensors, and torch's safe loader refuses unless told: options as a Namespace,
# numbers and arrays of NumPy (the counts of --eval-bleu).
NUMBERS = (np.float32(0), np.float64(0), np.int32(0), np.int64(0))
torch.serialization.add_safe_globals(
    [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        np.zeros(0).__reduce__()[0],  # type: ignore[arg-type]  # NumPy 1 and 2 keep them in different modules
        NUMBERS[0].__reduce__()[0],  # type: ignore[arg-type]
        *(type(number.dtype) for number in NUMBERS),
    ]
)

if "fairseq" in sys.modules:
    from .models import revcol_transformer as revcol_transformer
