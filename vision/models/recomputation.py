"""Heads that keep no activations: backward computes them again, with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, which calls `module`, by torch.utils.checkpoint.

    Dropout draws the same numbers again. Running statistics of BatchNorm move once, in the forward pass.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _fixed_statistics(module)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def _fixed_statistics(module: nn.Module) -> Iterator[None]:
    """Normalize batches by their own statistics, and leave the running ones as they are."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the kernel then writes the old values
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
