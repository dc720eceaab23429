"""Parts of a model that keep no activations: backward computes them again, with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module | Callable[..., Any], *args: Any, draws: bool = False) -> Any:
    """`module(*args)` without its activations, which backward computes again, with the same bits.

    Running statistics of BatchNorm move once, in the forward pass.

    Args:
        module: or a method of one.
        draws: may it draw random numbers, as dropout does? They are the same in backward.
    """
    owner = module if isinstance(module, nn.Module) else cast(nn.Module, cast(Any, module).__self__)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _fixed_statistics(owner)

    if not torch.is_grad_enabled():
        return module(*args)
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)


@contextmanager
def _fixed_statistics(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are; batches are still normalized by their own."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked, _copied(norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the kernel then writes the old values
    try:
        yield
    finally:
        for norm, momentum, count, value in before:
            norm.momentum = momentum
            if count is not None and value is not None:
                count.copy_(value)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
