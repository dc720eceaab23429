"""Plans and budgets in pickles of earlier versions."""

from __future__ import annotations

import pickle

from revnets.config.memory_budget import BudgetSpec
from revnets.memory.cell_options import CellPolicy
from revnets.memory.predictions import Plan, Prediction

COUNTS = [5, 7, 11, 13, 17, 19, 23, 1.5]  # parameters, gradients, optimizer, buckets, kept, peak, flops, extra
NOW = Prediction("exact", (2,), (1,), ((3, None),), *COUNTS, offloaded=(2,), host=29)  # type: ignore[arg-type]


def restored(kind: type, state: list) -> object:
    """Unpickle a frozen dataclass with slots, whose state is a list of its values."""
    found = object.__new__(kind)
    found.__setstate__(state)
    return found


def test_a_prediction_without_kept_cells():
    found = restored(Prediction, ["exact", (2,), (1,), *COUNTS])
    assert found == Prediction("exact", (2,), (1,), (), *COUNTS)  # type: ignore[arg-type]
    assert found.policy == CellPolicy("exact", (2,), (1,))


def test_a_prediction_without_host_memory():
    found = restored(Prediction, ["exact", (2,), (1,), ((3, None),), *COUNTS])
    assert found == Prediction("exact", (2,), (1,), ((3, None),), *COUNTS)  # type: ignore[arg-type]


def test_a_plan_without_host_memory():
    found = restored(Plan, [(3, 5), "float32", 1, "ddp", (), 31, NOW])
    assert found == Plan((3, 5), "float32", 1, "ddp", (), 31, NOW)


def test_a_budget_without_host_memory():
    spec = BudgetSpec(budget="1GiB", optimizer="sgd")
    state = spec.__getstate__()
    state["__dict__"] = {key: value for key, value in state["__dict__"].items() if key not in {"host", "link", "flops"}}
    found = BudgetSpec.__new__(BudgetSpec)
    found.__setstate__(state)
    assert found == spec
    assert str(found) == "planned for 1GiB"


def test_pickles_of_this_version():
    plan = Plan((3, 5), "float32", 1, "ddp", (NOW,), 31, NOW, host=37)
    spec = BudgetSpec(budget="1GiB", host="3GiB")
    assert pickle.loads(pickle.dumps((plan, spec))) == (plan, spec)
