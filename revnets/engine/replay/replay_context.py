"""The replay context: what a replay must restore so that the same call returns the same numbers.

The output of a cell depends on its inputs, its parameters and an implicit context: random number generators, autocast,
the enabled attention kernels, train/eval flags and buffers. `ReplayContext.record` saves the context before the forward
pass. `ReplayContext.restored` restores it for the replay and resets it afterwards, so BatchNorm statistics change once
per step and the replay draws no new random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from revnets.engine.errors import ArgumentError, ReplayError
from revnets.engine.replay.random_numbers import RandomNumbers
from revnets.engine.replay.threads import exclusive, process_lock
from revnets.engine.torch_internals import buffers_of, fsdp_casts, has_autocast, is_compiled, modules_of, parameters_of

if TYPE_CHECKING:
    from revnets.engine.replay.buffers import CellBuffers, Overwritten


class Weight(NamedTuple):
    """A parameter of a module at the start of the forward pass."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int
    grad: bool


class ReplayContext:
    """The context of one cell's forward pass. It belongs to the pass, not to the module."""

    def __init__(self, modules: list[nn.Module], devices: frozenset[torch.device], overwritten: Overwritten):
        self._modules = modules
        for module in self._modules:
            if isinstance(module, LazyModuleMixin) and any(is_lazy(weight) for weight in module.parameters()):
                raise ArgumentError(
                    f"{type(module).__name__} has no weights before its first input; run the model once under "
                    "torch.no_grad(), then train it",
                    type(module).__name__,
                    code="invalid-value",
                )
        self._training = [module.training for module in self._modules]
        self._weights = [
            Weight(module, name, tensor, tensor._version, tensor.requires_grad)
            for module in self._modules
            for name, tensor in parameters_of(module).items()
            if tensor is not None
        ]
        self._devices = devices | {weight.tensor.device for weight in self._weights}
        kinds = sorted({"cpu"} | {device.type for device in self._devices})
        self._autocast = [Autocast.now(kind) for kind in kinds if has_autocast(kind)]
        self._attention = _attention_kernels()
        compiled = any(is_compiled(module) for module in self._modules)
        self._random = RandomNumbers(_accelerators(self._devices), always=compiled)
        self._overwritten = overwritten
        self._buffers = self._cell_buffers()

    @classmethod
    @contextmanager
    def record(
        cls, cell: nn.Module, devices: frozenset[torch.device], overwritten: Overwritten
    ) -> Generator[ReplayContext]:
        """Save the context, let the body run the cell, and keep only what the cell changed.

        Generator states are kept only if the cell draws random numbers, buffers only if it writes them.

        Args:
            cell: Called in the body.
            devices: Devices of its inputs.
            overwritten: Buffers that cells of this pass have written, for earlier cells that read them.
        """
        modules = modules_of(cell)
        with exclusive(modules, _accelerators(devices)):
            self = cls(modules, devices, overwritten)
            buffers = nullcontext() if self._buffers is None else self._buffers.recorded(cell, self._training)
            with self._random.recorded(), buffers:
                yield self

    @contextmanager
    def restored(self) -> Generator[None]:
        """Run the body in the context that the forward pass started with.

        Raises:
            ReplayError: If a parameter or buffer was changed in place between the forward pass and its backward.
        """
        with ExitStack() as stack:
            stack.enter_context(exclusive(self._modules, _accelerators(self._devices)))
            self._check_weights()
            buffers = self._buffers or self._cell_buffers()  # the forward pass may have registered the first buffer
            if buffers is not None:
                buffers.check()
            for autocast in self._autocast:
                kind, enabled, dtype, cache = autocast
                if autocast != Autocast.now(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            stack.enter_context(_attention_as(self._attention))
            stack.enter_context(_flags(self._modules, self._training))
            stack.enter_context(fsdp_casts(self._modules))
            stack.enter_context(self._weights_of_the_forward())
            if buffers is not None:
                stack.enter_context(buffers.restored())
            stack.enter_context(self._random.restored())
            try:
                yield
            except RuntimeError as error:
                self._require_weights(error)
                raise

    def _require_weights(self, error: RuntimeError) -> None:
        """Raise a `ReplayError` if a replay failed because a weight was released after the forward pass."""
        for module, name, *_ in self._weights:
            now = parameters_of(module).get(name)
            if now is not None and now.numel() == 0 and not isinstance(error, ReplayError):
                raise ReplayError(
                    f"the parameter {name} of {type(module).__name__} is empty in a replay: it was released after the "
                    "forward pass, as in ZeRO-3, and was not gathered again. Gather it in a forward pre-hook of the "
                    "cell or of this module; hooks of modules around the columns do not run in a replay",
                    code="weights-released",
                ) from error

    def _cell_buffers(self) -> CellBuffers | None:
        """Return the buffers of the cell; None if it has none, like most cells without BatchNorm."""
        if not any(buffers_of(module) for module in self._modules):
            return None
        from revnets.engine.replay.buffers import CellBuffers

        return CellBuffers(self._modules, self._overwritten)

    def _check_weights(self) -> None:
        for weight in self._weights:
            if weight.tensor._version != weight.version:
                raise ReplayError(
                    f"a parameter of shape {tuple(weight.tensor.shape)} was changed in place (by an optimizer step?) "
                    "between the forward pass and its backward; call backward() before the step",
                    code="changed-in-place",
                )

    @contextmanager
    def _weights_of_the_forward(self) -> Generator[None]:
        """Use the forward pass's weights in the replay, after functional_call or a change of requires_grad.

        Weights of other types, such as DTensor, are left to the hooks that gather and shard them.
        """
        held: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        for module, name, tensor, _, grad in self._weights:
            parameters = parameters_of(module)
            now = parameters.get(name)
            if now is None or (now is tensor and now.requires_grad == grad):
                continue
            if {type(now), type(tensor)} <= {Tensor, nn.Parameter}:
                held.append((parameters, name, now))
                parameters[name] = tensor.detach().requires_grad_(grad)
        try:
            yield
        finally:
            for parameters, name, now in held:
                parameters[name] = now


def _accelerators(devices: Iterable[torch.device]) -> frozenset[torch.device]:
    return frozenset(device for device in devices if device.type not in ("cpu", "meta"))


@contextmanager
def _flags(modules: list[nn.Module], training: list[bool]) -> Generator[None]:
    now = [module.training for module in modules]
    if now == training:
        yield
        return
    try:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        yield
    finally:
        for module, flag in zip(modules, now, strict=True):
            module.training = flag


_ATTENTION = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
)
"""Switches of `torch.nn.attention.sdpa_kernel`, on all devices. Usually only the forward pass runs in its context."""


def _attention_kernels() -> tuple[bool, ...]:
    return tuple(allowed() for allowed, _ in _ATTENTION)


@contextmanager
def _attention_as(kernels: tuple[bool, ...]) -> Generator[None]:
    if _attention_kernels() == kernels:
        yield
        return
    with process_lock():
        now = _attention_kernels()
        try:
            for (_, allow), value in zip(_ATTENTION, kernels, strict=True):
                allow(value)
            yield
        finally:
            for (_, allow), value in zip(_ATTENTION, now, strict=True):
                allow(value)


class Autocast(NamedTuple):
    """Autocast settings of one device type. They are thread-local, and backward may run in another thread."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache: bool

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )


@contextmanager
def outside_of_autocast() -> Generator[Callable[[], ExitStack]]:
    """Leave the autocast regions of the caller; yields a function that enters an equal region.

    So backward runs outside autocast, as in a training loop, and weights cast for the forward pass are freed in time.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu", *([accelerator.type] if accelerator else [])]
    enabled_regions = [Autocast.now(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
    depth = torch.autocast_increment_nesting()

    def region() -> ExitStack:
        stack = ExitStack()
        for kind, enabled, dtype, cache in enabled_regions:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
        return stack

    for _ in range(depth):
        torch.autocast_decrement_nesting()
    for autocast in enabled_regions:
        torch.set_autocast_enabled(autocast.device_type, False)
    torch.clear_autocast_cache()
    try:
        yield region
    finally:
        for autocast in enabled_regions:
            torch.set_autocast_enabled(autocast.device_type, True)
        for _ in range(depth - 1):
            torch.autocast_increment_nesting()
