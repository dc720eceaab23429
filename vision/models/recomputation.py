"""Recomputation of a module's activations in backward, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module | Callable[..., Any], *args: Any, draws: bool = False, **kwargs: Any) -> Any:
    """Call `module(*args, **kwargs)` without storing activations. Backward recomputes them bit for bit.

    Running statistics of BatchNorm are updated only once, in the forward pass.

    Args:
        module: A module, or a method of one.
        args: Positional arguments.
        draws: Whether it draws random numbers, as dropout does. Backward then draws the same numbers.
        kwargs: Keyword arguments.
    """
    owner = module if isinstance(module, nn.Module) else cast(nn.Module, cast(Any, module).__self__)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _FixedStatistics(owner)

    if not torch.is_grad_enabled():
        return module(*args, **kwargs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws, "context_fn": contexts}
    return checkpoint(module, *args, **options, **kwargs)


class _FixedStatistics(AbstractContextManager[None]):
    """Keeps running statistics unchanged during a replay. Batches are still normalized by their own statistics."""

    def __init__(self, module: nn.Module):
        self._norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
        self._outside: list[list[dict[str, Tensor]]] = []

    def __enter__(self) -> None:
        self._outside.append([dict(norm.named_buffers(recurse=False)) for norm in self._norms])
        for norm in self._norms:
            for name, statistic in norm.named_buffers(recurse=False):
                setattr(norm, name, statistic.clone())

    def __exit__(self, *exception: object) -> None:
        for norm, statistics in zip(self._norms, self._outside.pop(), strict=True):
            for name, statistic in statistics.items():
                setattr(norm, name, statistic)
