"""The loss of the next token, without the logits of a whole batch: they are what takes most memory beside a
reversible network (N tokens x V words, and their gradient).

N tokens, C channels, V words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Label of tokens without a loss, as in transformers."""


def shifted(labels: Tensor) -> Tensor:
    """For each position the label of the next one, (B, T) to (B, T); the last position has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def chunked_loss(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int) -> Tensor:
    """The summed cross entropy of all tokens. Logits exist for `chunk` tokens at a time, in backward as well.

    Each chunk is checkpointed: backward computes its logits again, which takes as long as the head's forward.

    Args:
        hidden: (N, C), what the head reads.
        head: to logits (..., V).
        targets: (N,) words, or `IGNORED`.
        chunk: the most tokens whose logits are there at once.
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
