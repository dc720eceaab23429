"""RevCol-Transformer for fairseq: `fairseq-train DATA --user-dir nlp --arch revcol_transformer ...`.

The guide is docs/guides/translation-model.md.

fairseq imports this folder when it is named by `--user-dir`, and then every module of its folder `models`, which
registers the model. It skips both if a package of this name is imported already: `import nlp.models.revcol_transformer`
registers the model then, and `nlp.model`, its former path. This module does not import fairseq, which takes seconds.

Modules here import each other by relative names, because a wheel installs the folder as `revnets_nlp`: a top-level
package `nlp` would be in the way of everybody's own.
"""

from __future__ import annotations

import argparse

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
