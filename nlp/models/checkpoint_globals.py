"""What fairseq needs to read its own checkpoints under a torch whose `torch.load` is restricted."""

from __future__ import annotations

import torch

from revnets.utils.checkpoint_io import RECORDS


def allow_fairseq_checkpoints() -> None:
    """Let `torch.load` of this process read what fairseq saves beside tensors: options, numbers, arrays.

    fairseq calls `torch.load` itself (`--restore-file`, `fairseq-generate`), so nothing but the list of the process
    reaches it. Call it where fairseq loads the models, not where a package is imported for other reasons.
    """
    torch.serialization.add_safe_globals(list(RECORDS))
