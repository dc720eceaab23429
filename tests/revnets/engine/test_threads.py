"""Several threads: a replay draws the random numbers of its forward and does not affect other threads."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnets import ReversibleSequence
from revnets.engine import torch_internals
from revnets.engine.replay import random_numbers
from revnets.engine.replay.threads import exclusive, process_lock

TAPED = ("recompute", "exact")


@pytest.fixture
def other_thread() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Return a function that runs another one in a second thread, which lives as long as the test."""
    wanted, done, left = threading.Semaphore(0), threading.Semaphore(0), []

    def work() -> None:
        while wanted.acquire() and left:
            left.pop()()
            done.release()

    def run(function: Callable[[], object]) -> None:
        left.append(function)
        wanted.release()
        assert done.acquire(timeout=60)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield run
    wanted.release()
    thread.join(60)


@pytest.fixture
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Call(nn.Module):
    def __init__(self, function: Callable[[], object]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.function()
        return x


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
        self.first = nn.Dropout(0.5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


class Seeded(nn.Module):
    """Draws the same numbers in every call and restores the generator."""

    def __init__(self, fork: bool):
        super().__init__()
        self.linear, self.fork = nn.Linear(8, 8), fork

    def forward(self, x: Tensor) -> Tensor:
        before = torch.get_rng_state()
        torch.manual_seed(7)
        noise = torch.rand_like(x)
        if self.fork:
            torch.set_rng_state(before)
        return self.linear(x * noise).tanh()


def gradients(block: Callable[[], nn.Module], memory: str, steps: int = 2) -> list[Tensor]:
    """Return the gradients of several steps, and the next random number."""
    torch.manual_seed(0)
    net = ReversibleSequence([block() for _ in range(4)], m=2, memory=memory)
    x = torch.randn(4, 8, requires_grad=True)
    for _ in range(steps):
        net(x)[-1].pow(2).sum().backward()
    return [x.grad, *(parameter.grad for parameter in net.parameters()), torch.rand(1)]


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("memory", TAPED)
def test_masks_of_two_threads(memory):
    wrong = []

    def train() -> None:
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Tanh()) for _ in range(6)]
        net, masks = ReversibleSequence(blocks, m=2, memory=memory), {}
        for block in blocks:
            block[1].register_forward_hook(lambda module, _, y: masks.setdefault(module, []).append(y == 0))
        for _ in range(30):
            masks.clear()
            net(torch.randn(32, 16))[-1].pow(2).sum().backward()
            wrong.extend(not torch.equal(forward, replay) for forward, replay in masks.values())

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 2 * 30 * 6
    assert not any(wrong)


@pytest.fixture
def older_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that removes one private name of PyTorch that intercepting draws needs."""

    def without(name: str) -> None:
        monkeypatch.delattr(torch._C, name)
        spec = importlib.util.spec_from_file_location("revnets_torch_internals_again", torch_internals.__file__)
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
        monkeypatch.setattr(random_numbers, "draw_key", again.draw_key)

    return without


@pytest.mark.parametrize("name", torch_internals._NEEDED.split())
@pytest.mark.parametrize("memory", TAPED)
def test_torch_without_support_for_intercepted_draws(older_torch, other_thread, memory, name):
    """If the other thread draws nothing, replays are correct and do not advance the generator."""
    block = lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())  # noqa: E731
    reference = gradients(block, "store")
    older_torch(name)
    other_thread(lambda: None)
    with pytest.warns(RuntimeWarning, match=name) as warned:
        ours = gradients(block, memory)
    assert len(warned) == 1
    assert len(str(warned[0].message).splitlines()) == 1
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("memory", TAPED)
def test_draw_of_another_thread_between_two_masks(other_thread, memory):
    drawn: dict[str, list[float]] = {}

    def block(mode: str) -> nn.Module:
        numbers = drawn.setdefault(mode, [])
        elsewhere = Call(lambda: other_thread(lambda: numbers.append(torch.rand(1).item())))
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), elsewhere, nn.Linear(8, 8), nn.Dropout(0.5))

    ours = gradients(lambda: block(memory), memory, steps=1)[:-1]
    reference = gradients(lambda: block("store"), "store", steps=1)[:-1]
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
    assert len(drawn[memory]) == 2 * len(drawn["store"])
    assert len(set(drawn[memory])) == len(drawn[memory])  # a replay does not reset the generator


CELLS = {
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.2)),
    "rrelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Linear(8, 8)),
    "checkpoint": lambda: Checkpointed(reentrant=False),
    "reentrant": lambda: Checkpointed(reentrant=True),
    "forked": lambda: Seeded(fork=True),
    "seeded": lambda: Seeded(fork=False),
}


@pytest.mark.usefixtures("other_thread")
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_with_several_threads_equal_a_single_thread(cell):
    reference = gradients(CELLS[cell], "store")
    for memory in TAPED:
        assert all(torch.equal(a, b) for a, b in zip(gradients(CELLS[cell], memory), reference, strict=True))


@pytest.mark.usefixtures("other_thread")
def test_random_operations_under_a_dispatch_mode():
    from torch.utils.flop_counter import FlopCounterMode

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.native_dropout(self.linear(x) * torch.rand(8) + torch.randn_like(x), 0.5, True)[0]

    with FlopCounterMode(display=False):
        reference, ours = gradients(Noisy, "store"), gradients(Noisy, "exact")
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_thread_started_between_forward_and_replay(other_thread):
    def run(memory: str, function: Callable[[Callable[[], object]], None]) -> list[Tensor]:
        torch.manual_seed(0)
        net = ReversibleSequence([CELLS["dropout"]() for _ in range(4)], m=2, memory=memory)
        loss = net(torch.randn(4, 8))[-1].pow(2).sum()
        function(loss.backward)
        return [parameter.grad for parameter in net.parameters()]

    reference = run("store", lambda backward: backward())
    assert all(torch.equal(a, b) for a, b in zip(run("exact", other_thread), reference, strict=True))


@pytest.mark.usefixtures("quick_switches")
def test_threads_with_shared_buffers():
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)]
    net = ReversibleSequence(blocks, m=2)
    before = dict(net.named_buffers())

    def train() -> None:
        for _ in range(20):
            torch.autograd.grad(net(torch.randn(4, 8))[-1].pow(2).sum(), list(net.parameters()))

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(buffer is before[name] for name, buffer in net.named_buffers())
    assert [block[1].num_batches_tracked.item() for block in blocks] == [40] * 4


@pytest.mark.skipif(not hasattr(multiprocessing, "get_context") or sys.platform == "win32", reason="there is no fork")
def test_fork_while_another_thread_holds_the_locks(other_thread):
    cell = CELLS["dropout"]()
    net = ReversibleSequence([cell, CELLS["dropout"]()], m=2)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with process_lock(), exclusive([net.cells[0][0]], []):
            held.set()
            free.wait(60)

    def child() -> None:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        net(torch.randn(2, 8))  # no backward, which autograd refuses in a fork of a process with autograd threads

    threading.Thread(target=hold).start()
    assert held.wait(60)
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join(120)
    free.set()
    assert process.exitcode == 0
