"""Loss of the next token without the logits of a whole batch.

These logits (N tokens x V types) and their gradient dominate the memory of a reversible language model.

Shapes: N tokens, C channels, V types.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Label of tokens that are excluded from the loss, as in transformers."""


def shifted(labels: Tensor) -> Tensor:
    """Shift labels (B, T) to the position that predicts them; the last position gets `IGNORED`."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def chunked_loss(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int) -> Tensor:
    """Compute the summed cross entropy of all tokens, with logits of `chunk` tokens at a time in both passes.

    Each chunk is checkpointed: the backward pass recomputes its logits, which costs one more forward pass of the head.

    Args:
        hidden: (N, C) inputs of the head.
        head: Maps (..., C) to logits (..., V).
        targets: (N,) token indices, or `IGNORED`.
        chunk: Maximum number of tokens whose logits are in memory.

    Returns:
        A float32 scalar.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, words in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_summed, states, head, words, use_reentrant=False)
        else:
            total = total + _summed(states, head, words)
    return total


def _summed(states: Tensor, head: Callable[[Tensor], Tensor], words: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), words, ignore_index=IGNORED, reduction="sum")
