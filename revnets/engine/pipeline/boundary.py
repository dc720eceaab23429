"""What one pipeline stage sends to the next: states, and a header that describes them.

A runtime such as `torch.distributed.pipelining` sends contiguous tensors of fixed shapes forward, and their gradients
backward. Three things would be lost: the strides of a state and of its gradient, which affect how kernels round;
whether a state has a gradient at all; and the generator state of the micro-batch. The header, a small tensor before
the states, carries them. Its gradient carries the strides of the gradients.

A header is a float64 vector, which represents every stride exactly: a magic number, a flag and the strides of each
state, then the raw bytes of the generator states. A header without the magic number is uninitialized memory, which
runtimes use to infer shapes; then tensors are used unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

_MARK = 0x5265764E6574  # an integer that float64 represents exactly
Layout = tuple[int, ...] | None
"""The strides of a tensor; None if there is no tensor."""


def generator_state(device: torch.device) -> Tensor:
    """Return the states of the default generators of the CPU and of `device`, as a float64 tensor on the CPU."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return torch.cat(states).view(torch.float64)


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """Set the generators to states from `generator_state`, possibly of another process."""
    size = torch.get_rng_state().numel()
    states = state.cpu().view(torch.uint8).tensor_split([size])
    torch.set_rng_state(states[0].clone())  # it does not accept a slice
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).set_rng_state(states[1].clone(), device)


def header(tensors: Sequence[Tensor | None], axes: Sequence[int], rest: Tensor, device: torch.device) -> Tensor:
    """Return the header of tensors.

    Args:
        tensors: States or their gradients.
        axes: Number of axes of each tensor.
        rest: float64 vector to append.
        device: Of the header.
    """
    values = [float(_MARK)]
    for tensor, count in zip(tensors, axes, strict=True):
        values += [0.0, *[0.0] * count] if tensor is None else [1.0, *map(float, tensor.stride())]
    return torch.cat([torch.tensor(values, dtype=torch.float64), rest]).to(device)


def header_length(axes: Sequence[int]) -> int:
    """Return the length of a header without the appended vector."""
    return 1 + len(axes) + sum(axes)


def read_header(given: Tensor, axes: Sequence[int]) -> tuple[list[Layout], Tensor] | None:
    """Return the strides of tensors with these numbers of axes, and the appended vector; None without the mark."""
    length = header_length(axes)
    values = cast("list[float]", cast(Any, given[:length]).tolist())
    if values[0] != _MARK:
        return None
    layouts: list[Layout] = []
    place = 1
    for count in axes:
        strides = tuple(int(value) for value in values[place + 1 : place + 1 + count])
        layouts.append(strides if values[place] else None)
        place += 1 + count
    return layouts, given[length:]


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a copy with these strides. A copy, because runtimes receive the next micro-batch into the same memory."""
    once = tensor  # a gradient may be an expanded tensor with stride 0
    for axis, stride in enumerate(strides):
        once = once.narrow(axis, 0, 1) if stride == 0 and once.shape[axis] else once
    copy = torch.empty_strided(once.shape, strides, dtype=once.dtype, device=once.device).copy_(once)
    return copy.expand(tensor.shape)


class Leave(torch.autograd.Function):
    """Makes states contiguous and prepends their header; gradients get their original strides."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.axes = [state.ndim for state in states]
        first = header(states, ctx.axes, rest, states[0].device)
        sent = [state.detach().contiguous() for state in states]  # shares memory with the tape if contiguous already
        pairs = zip(states, sent, strict=True)
        ctx.mark_non_differentiable(*[copy for state, copy in pairs if not state.requires_grad])
        return first, *sent

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first, *received = grads
        read = None if first is None else read_header(first, ctx.axes)
        if read is None:
            return None, *received
        return None, *[
            None if grad is None or layout is None else _laid_out(grad, layout)
            for grad, layout in zip(received, read[0], strict=True)
        ]


class Enter(torch.autograd.Function):
    """Restores the states that `Leave` of the previous stage sent; gradients leave as contiguous tensors.

    Args:
        found: Strides of the states; None to keep those of the received tensors.
        first: The header.
    """

    @staticmethod
    def forward(ctx: Any, found: Sequence[Layout] | None, first: Tensor, *received: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.received = [(tensor.shape, tensor.dtype) for tensor in received]
        ctx.length, ctx.device = first.numel(), first.device
        layouts = [None] * len(received) if found is None else found
        states = [
            _laid_out(tensor, layout or tensor.stride()) for tensor, layout in zip(received, layouts, strict=True)
        ]
        pairs = zip(received, states, strict=True)
        ctx.mark_non_differentiable(*[state for tensor, state in pairs if not tensor.requires_grad])
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        axes = [len(shape) for shape, _ in ctx.received]
        rest = torch.zeros(ctx.length - header_length(axes), dtype=torch.float64)
        sent = [
            torch.zeros(shape, dtype=dtype, device=ctx.device) if grad is None else grad.contiguous()
            for grad, (shape, dtype) in zip(grads, ctx.received, strict=True)
        ]
        return None, header(grads, axes, rest, ctx.device), *sent
