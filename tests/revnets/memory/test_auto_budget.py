"""A model with a budget plans memory at its first training forward pass, and the step stays within the budget."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revnets
from revnets.config.memory_budget import OPTIMIZERS, BudgetSpec
from revnets.memory.simulation import total
from revnets.memory.tracker import MemoryTracker
from revnets.models.plan import PlanError, plan
from revnets.utils.format import size
from tests.support.errors import raises_error
from tests.support.simulated_steps import simulated_once

NET = {
    "columns": 3,
    "stem": {"type": "linear", "in_dim": 13},
    "fusion": "linear",
    "levels": [{"dim": 16, "depth": 1, "block": "mlp"}] * 2,
    "head": {"type": "classifier", "num_classes": 5},
}
SHAPE = (401, 13)  # activations outweigh weights


@pytest.fixture(scope="module", autouse=True)
def _simulated_once() -> Iterator[None]:
    with simulated_once():
        yield


def between(share: float, shape: tuple[int, ...] = SHAPE, **request) -> int:
    """Return a budget between the lowest and the highest peak of the model."""
    rows = {row.mode: row for row in plan(NET, shape, optimizer="none", modes=("store", "exact"), **request).modes}
    least, most = 1.011 * rows["exact"].peak, rows["store"].peak
    return int(least + share * (most - least))


def net(**memory) -> revnets.Net:
    torch.manual_seed(0)
    return revnets.build({**NET, "memory": {"optimizer": "none", **memory}})


def peak_of_step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> int:
    with MemoryTracker() as tracker:
        tracker.register(model)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = total(model(x))
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return tracker.peak


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_first_training_forward_plans_and_step_fits(share: float) -> None:
    budget = between(share)
    model = net(budget=budget)
    x = torch.randn(SHAPE)
    model(x)
    expected = plan(NET, SHAPE, optimizer="none", budget=budget, modes=()).chosen
    assert expected is not None
    assert list(model.columns.memory) == expected.memory(model.columns.graph.columns)
    assert model.columns.stored == set(expected.stored)
    assert model.memory_plan.chosen == expected
    assert 0.7 * budget < peak_of_step(model, x) <= budget


def test_large_budget_stores_everything() -> None:
    model = net(budget="1GiB")
    model(torch.randn(SHAPE))
    assert set(model.columns.memory) == {"store"}


def test_plan_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net(budget=between(0.4))
    with caplog.at_level(logging.INFO, logger="revnets"):
        for _ in range(3):
            model(torch.randn(SHAPE))
    (record,) = caplog.records
    assert record.getMessage() == f"input 401 x 13, float32: {model.memory_plan.sentence}"
    assert "more FLOPs than keeping everything" in record.getMessage()


def test_gradients_equal_those_without_budget() -> None:
    x, found = torch.randn(SHAPE), []
    for memory in ("store", {"budget": between(0.4), "optimizer": "none"}):
        torch.manual_seed(0)
        model = revnets.build({**NET, "levels": [{**NET["levels"][0], "dropout": 0.2}] * 2, "memory": memory})
        torch.manual_seed(1)
        found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    assert model.columns.stored
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_eval_and_no_grad_do_not_plan() -> None:
    model = net(budget="1KiB")
    with torch.no_grad():
        model(torch.randn(SHAPE))
    model.eval()(torch.randn(SHAPE))
    assert model.columns.budget is not None
    with pytest.raises(PlanError):
        model.train()(torch.randn(SHAPE))


def test_first_forward_under_transforms_and_hooks() -> None:
    """torch.func runs the model without a plan. A checkpoint around the model must not see simulated tensors."""
    model, x = net(budget=between(0.4)), torch.randn(SHAPE)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    grads = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (x,)).square().sum())(weights)
    assert model.columns.budget is not None
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert model.columns.stored
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)


def test_nothing_fits() -> None:
    model = net(budget="90KiB", optimizer="adamw")
    smallest = 1.01 * plan(NET, SHAPE, modes=("exact",)).modes[0].peak
    for _ in range(2):  # the second call also requires a plan
        with raises_error(
            PlanError, code="over-budget", key="budget", names=["90.0 KiB", size(int(smallest))]
        ) as caught:
            model(torch.randn(SHAPE))
        assert "an optimizer" in str(caught.value)  # the largest part
    with raises_error(PlanError, code="over-budget", key="budget", names=["401 samples", "lower the batch"]):
        net(budget="500KiB")(torch.randn(SHAPE))


def test_setting_a_mode_cancels_the_budget() -> None:
    model = net(budget="1KiB")
    model.columns.memory = "exact"
    model(torch.randn(SHAPE))
    assert not hasattr(model, "memory_plan")


def test_audit_and_plan_keep_the_budget_pending() -> None:
    model = net(budget="1GiB")
    found = revnets.audit(model, torch.randn(7, 13))
    assert [mode.equal for mode in found.modes if mode.mode == "exact"] == [True]
    assert found.modes[-1].kept_bytes < found.modes[0].kept_bytes
    plan(model, SHAPE)
    assert model.columns.budget is not None
    assert set(model.columns.memory) == {"exact"}


def test_copies_make_their_own_plan() -> None:
    model = net(budget="1GiB")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(SHAPE))
        assert set(other.columns.memory) == {"store"}
    assert model.columns.budget is not None


def test_plan_uses_autocast_state() -> None:
    budget = between(0.3, dtype=torch.bfloat16)
    model, x = net(budget=budget), torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    expected = plan(NET, SHAPE, dtype=torch.bfloat16, optimizer="none", budget=budget, modes=()).chosen
    assert model.memory_plan.dtype == "bfloat16"
    assert model.memory_plan.chosen == expected
    assert peak_of_step(model, x, torch.bfloat16) <= budget


def test_larger_input_raises_warning() -> None:
    model = net(budget=between(0.4))
    model(torch.randn(SHAPE))
    model(torch.randn(300, 13))
    with pytest.warns(UserWarning, match=r"of shape \(401, 13\); an input of shape \(500, 13\) may exceed"):
        model(torch.randn(500, 13))
    revnets.keep_budget(model, "1GiB")
    model(torch.randn(500, 13))
    assert model.memory_plan.input_shape == (500, 13)


class Host(nn.Module):
    """A model that contains columns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(13, 16), revnets.ReversibleSequence([nn.Linear(16, 16) for _ in range(12)])

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.body(scale * self.embed(x))[-1]


def test_any_model_with_columns() -> None:
    model = Host()
    revnets.keep_budget(model, "1GiB")
    revnets.keep_budget(model, "2GiB")
    assert len(model._forward_pre_hooks) == 1
    model(x=torch.randn(7, 13), scale=2.0)
    assert model.memory_plan.input_shape == (7, 13)
    assert model.memory_plan.budget == 2 * 2**30
    with raises_error(ValueError, code="invalid-value", key="budget", names="'plenty'"):
        revnets.keep_budget(model, "plenty")


def test_twin_has_same_shapes_and_frozen_parameters() -> None:
    model = net(budget="1GiB")
    model.stem.requires_grad_(False)
    twin = model.twin()
    expected = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in twin.named_parameters()} == expected
    assert all(parameter.is_meta for parameter in twin.parameters())


def test_spec_round_trip() -> None:
    spec = revnets.load_spec({**NET, "memory": {"budget": "24GiB", "ranks": 4, "sharding": "fsdp"}})
    assert spec.memory == BudgetSpec(budget="24GiB", ranks=4, sharding="fsdp")
    assert revnets.load_spec(spec, ["memory.ranks=2"]).memory == BudgetSpec(budget="24GiB", ranks=2, sharding="fsdp")
    assert revnets.load_spec(spec, ["memory=store"]).memory == "store"
    assert all(net(budget=1, optimizer=name) for name in OPTIMIZERS)


class Called(nn.Module):
    """Checks that every argument arrives as the caller passed it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = revnets.build({**NET, "memory": "exact"})

    def forward(
        self, x: torch.Tensor, mask: object = None, scale: float = 0.0, *, weight: object = None, **more: float
    ):
        assert mask is None
        assert scale == 2.0
        assert isinstance(weight, torch.Tensor)
        assert more == {"shift": 3.0}
        return self.net(x) * weight * scale


@pytest.mark.parametrize("memory", ["store", "exact"])
def test_planned_step_gets_all_arguments_of_the_call(memory: str) -> None:
    model = Called()
    budget = "1GiB" if memory == "store" else between(0.1)
    revnets.keep_budget(model, BudgetSpec(budget=budget, optimizer="none"))
    model(torch.randn(SHAPE), scale=2.0, weight=torch.ones(5), shift=3.0)
    assert model.memory_plan.chosen.mode == memory
