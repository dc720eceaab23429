"""Random numbers of a cell, drawn again by its replay.

Every draw without a `torch.Generator` of its own takes the next numbers of one generator for the process (for each
accelerator, one for the device). With one thread, setting that generator back is enough. With several, another thread
draws from it at any moment: between the draws of a forward, and from a generator that a replay has set back.

Then the forward notes the state of the generator of the CPU draw by draw, for which its random operations are
intercepted in its thread alone (`torch_internals.intercepted_draws`). They still take the numbers that are next. The
replay draws the same numbers from a generator of its own and leaves that of the process as it is.

Two things need the generator of the process itself: code that looks at its state, such as an activation checkpoint
inside of a cell, and the random operations of accelerators. It is set back for their replays, under a lock against
other replays (`threads.py`). So it is for all draws where PyTorch lacks what intercepting them needs.
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
"""A random operation that lacks its generator alone."""


class RandomNumbers:
    """What one call of a cell drew from the default generators.

    Args:
        devices: accelerators whose generators the cell may use.
        always: intercept draws even where there is no other thread. To Dynamo that is another version of the code, so
            it should not depend on a thread that starts between a forward and its replay.

    Attributes:
        states: generator states of the CPU before the draws. Draw k starts from `states[k]`, or if there is none,
            where draw k - 1 ended.
        accelerators: generator state of each accelerator before the call, if the call drew from it.
    """

    def __init__(self, devices: frozenset[torch.device], always: bool = False):
        self.states: dict[int, Tensor] = {}
        self.accelerators: dict[torch.device, Tensor] = {}
        self._devices = devices
        self._always = always
        self._needs_default = False  # does the cell look at the generator of the process?

    @contextmanager
    def recorded(self) -> Generator[None]:
        """Let the body run the cell, and note what it draws. The body runs under the hooks of its tape."""
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
        """Draws the numbers that are next, and notes the generator's state wherever others have drawn in between."""
        generator, outer_hook = torch.Generator(), saving_hook()
        count, end = 0, None

        def draw(operation: Draw) -> Any:
            nonlocal count, end
            with process_lock():
                state = torch.get_rng_state()
                generator.set_state(state)
                result = operation(generator)
                after = generator.get_state()
                if _is_equal(after, state):  # no element, or a compiler that traces
                    return result
                if end is None or not _is_equal(state, end):
                    self.states[count] = state
                count, end = count + 1, after
                if _is_equal(state, torch.get_rng_state()):  # or code that takes no lock has drawn meanwhile
                    torch.set_rng_state(after)
            # An activation checkpoint runs under hooks of its own, or without gradients.
            self._needs_default |= not torch.is_grad_enabled() or saving_hook() is not outer_hook
            return result

        return draw

    @contextmanager
    def restored(self) -> Generator[None]:
        """Let the body draw the same numbers; afterwards the generators are as they were."""
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
        """Draw from a generator of its own. That of the process follows it only where the cell looks there."""
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
            if seeded and not self._needs_default:  # the cell itself has called `manual_seed`
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
    """Generator states of accelerators; none is started that was not in use."""
    return {device: torch.get_device_module(device).get_rng_state(device) for device in devices}


def _set_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        torch.get_device_module(device).set_rng_state(state, device)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Are two generator states equal? Read past the dispatcher: among fake tensors these are real all the same."""
    return ctypes.string_at(a.data_ptr(), a.nbytes) == ctypes.string_at(b.data_ptr(), b.nbytes)
