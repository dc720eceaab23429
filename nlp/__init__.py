"""RevCol-Transformer for fairseq: `fairseq-train DATA --user-dir nlp --arch revcol_transformer ...` (docs/nlp.md).

fairseq imports this folder when it is named by `--user-dir`, and the model becomes known to it. To import the folder
without fairseq, as the commands for data do, stays cheap: fairseq takes seconds. `import nlp.model` does both.

Modules here import each other by relative names, because a wheel installs the folder as `revnets_nlp`: a top-level
package `nlp` would be in the way of everybody's own.
"""

from __future__ import annotations

import argparse
import sys

import torch

# A fairseq checkpoint holds its options as a Namespace, which torch's safe loader refuses unless told.
torch.serialization.add_safe_globals([argparse.Namespace])

if "fairseq" in sys.modules:
    from . import model as model
