"""Random numbers of a cell, which its replay draws again.

Draws without a `torch.Generator` use the default generator of the process, or of the accelerator. With one thread, a
replay only has to restore the state of that generator. With several threads, another thread may draw at any time:
between two draws of a forward pass, or from a generator that a replay has reset.

In that case the forward pass records the state of the CPU generator before each draw. It intercepts the random
operations of its own thread (`torch_internals.intercepted_draws`), which still take the next numbers. The replay draws
the same numbers from a separate generator and leaves the default one unchanged.

Two uses need the default generator itself: code that reads its state, such as an activation checkpoint inside a cell,
and random operations of accelerators. For their replays it is reset, under a lock against other replays
(`threads.py`). The same applies to all draws if this version of PyTorch does not support interception.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from revnets.engine.replay.threads import is_alone, process_lock
from revnets.engine.torch_internals import draw_key, intercepted_draws, saving_hook

Draw = Callable[[torch.Generator], Any]
"""A random operation; its only missing argument is the generator."""


class RandomNumbers:
    """What one call of a cell drew from the default generators.

    Args:
        devices: Accelerators whose generators the cell may use.
        always: Intercept draws even without other threads. Dynamo compiles intercepted code separately, so this must
            not depend on a thread that starts between a forward pass and its replay.

    Attributes:
        states: CPU generator states before the draws. Draw k starts at `states[k]`, or without that entry where draw
            k - 1 ended.
        accelerators: Generator state of each accelerator before the call, if the call drew from it.
    """

    def __init__(self, devices: frozenset[torch.device], always: bool = False):
        self.states: dict[int, Tensor] = {}
        self.accelerators: dict[torch.device, Tensor] = {}
        self._devices = devices
        self._always = always
        self._needs_default = False  # whether the cell reads the default generator's state

    @contextmanager
    def recorded(self) -> Generator[None]:
        """Record what the body, the call of the cell, draws. It runs under the hooks of its tape."""
        before = _states_of(self._devices)
        key = _draw_key() if self._always or not is_alone() else None
        if key is None:
            cpu = torch.get_rng_state()
            yield
            if not _is_equal(cpu, torch.get_rng_state()):
                self.states[0] = cpu
        else:
            with intercepted_draws(key, self._recording()):
                yield
        after = _states_of(self._devices)
        self.accelerators = {device: state for device, state in before.items() if not _is_equal(state, after[device])}

    def _recording(self) -> Callable[[Draw], Any]:
        """Return a function that draws the next numbers; it records the first state and those after foreign draws."""
        generator, outer_hook = torch.Generator(), saving_hook()
        count, end = 0, None

        def draw(operation: Draw) -> Any:
            nonlocal count, end
            with process_lock():
                state = torch.get_rng_state()
                generator.set_state(state)
                result = operation(generator)
                after = generator.get_state()
                if _is_equal(after, state):  # an empty tensor, or a tracing compiler
                    return result
                if end is None or not _is_equal(state, end):
                    self.states[count] = state
                count, end = count + 1, after
                if _is_equal(state, torch.get_rng_state()):  # otherwise code without the lock drew in the meantime
                    torch.set_rng_state(after)
            # An activation checkpoint runs under its own hooks, or without gradients.
            self._needs_default |= not torch.is_grad_enabled() or saving_hook() is not outer_hook
            return result

        return draw

    @contextmanager
    def restored(self) -> Generator[None]:
        """Make the body draw the same numbers, and restore the generators afterwards."""
        alone = is_alone()
        key = _draw_key() if self._always or (self.states and not (alone and len(self.states) == 1)) else None
        with ExitStack() as stack:
            if self.accelerators:
                stack.enter_context(_accelerators_as(self.accelerators))
            if self.states and (alone or self._needs_default or key is None):
                if not alone:
                    stack.enter_context(process_lock())
                stack.enter_context(_default_as(self.states[0]))
            if key is not None:
                stack.enter_context(self._redrawn(key))
            yield

    @contextmanager
    def _redrawn(self, key: Any) -> Generator[None]:
        """Draw from a separate generator. The default one follows it only if the cell reads its state."""
        generator = torch.Generator()
        count, seeded = 0, False

        def draw(operation: Draw) -> Any:
            nonlocal count, seeded
            if count in self.states:
                seeded |= _is_equal(self.states[count], torch.get_rng_state())
                generator.set_state(self.states[count])
            before = generator.get_state()
            with process_lock():
                result = operation(generator)
            after = generator.get_state()
            count += not _is_equal(before, after)
            if self._needs_default:
                torch.set_rng_state(self.states.get(count, after))
            return result

        default = torch.get_rng_state()
        try:
            with intercepted_draws(key, draw):
                yield
        finally:
            if seeded and not self._needs_default:  # the cell itself called `manual_seed`
                torch.set_rng_state(default)


def _draw_key() -> Any:
    with process_lock():
        return draw_key()


@contextmanager
def _default_as(state: Tensor) -> Generator[None]:
    now = torch.get_rng_state()
    try:
        torch.set_rng_state(state)
        yield
    finally:
        torch.set_rng_state(now)


@contextmanager
def _accelerators_as(states: dict[torch.device, Tensor]) -> Generator[None]:
    now = _states_of(states)
    try:
        _set_states(states)
        yield
    finally:
        _set_states(now)


def _states_of(devices: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """Return the generator states of accelerators."""
    return {device: torch.get_device_module(device).get_rng_state(device) for device in devices}


def _set_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        torch.get_device_module(device).set_rng_state(state, device)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two generator states are equal. Bypasses the dispatcher: states are real even in fake tensor mode."""
    return ctypes.string_at(a.data_ptr(), a.nbytes) == ctypes.string_at(b.data_ptr(), b.nbytes)
