"""The predicted drift of `invert` is correct to an order of magnitude, and a large one causes a warning."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import revnets
from revnets import DriftWarning, predict_drift
from revnets.engine import drift
from tests.support.networks import stem_of, token_net


def net(columns: int, gamma: float, memory="invert", learn: bool = True) -> revnets.Net:
    torch.manual_seed(0)
    return revnets.build(
        {
            "columns": columns,
            "stem": {"type": "patchify"},
            "levels": [{"dim": 8 * 2**level, "depth": 1, "block": "convnext"} for level in range(4)],
            "gain": {"init": gamma, "learn": learn},
            "memory": memory,
            "head": {"type": "classifier", "num_classes": 10},
        }
    )


def measured(model: nn.Module, x: Tensor, autocast: bool = False) -> float:
    """Return the relative error of all gradients against ordinary autograd."""
    gradients = []
    modes = model.columns.memory
    for memory in (modes, "store"):
        model.columns.memory = memory
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            warnings.simplefilter("ignore", DriftWarning)
            loss = model(x).float().square().sum()
        parts = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([part.double().flatten() for part in parts]))
    model.columns.memory = modes
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


IMAGE = (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("columns", "gamma"), [(4, 1.0), (12, 1.0), (6, 0.7), (3, 0.5), (4, 0.5), (8, 0.5), (3, 0.2), (2, 0.05)]
)
def test_prediction_in_float32(columns: int, gamma: float) -> None:
    error = measured(net(columns, gamma), torch.randn(IMAGE))
    assert 0.1 * error < predict_drift(["invert"] * columns, [gamma**-2] * columns) < 10 * error


@pytest.mark.parametrize(("columns", "gamma"), [(3, 1.0), (8, 1.0), (4, 0.7), (3, 0.5), (4, 0.5), (3, 0.2)])
def test_prediction_under_autocast(columns: int, gamma: float) -> None:
    error = measured(net(columns, gamma), torch.randn(IMAGE), autocast=True)
    predicted = predict_drift(["invert"] * columns, [gamma**-2] * columns, autocast=torch.bfloat16)
    assert 0.1 * error < predicted < 10 * error


@pytest.mark.parametrize(
    "modes",
    [
        ["invert"] * 4 + ["recompute"] + ["invert"] * 3,  # restarts at 0
        ["invert"] * 4 + ["exact"] * 2 + ["invert"] * 2,  # magnifies the error
        ["store"] * 4 + ["invert"] * 4,
    ],
)
def test_prediction_for_mixed_modes(modes: list[str]) -> None:
    error = measured(net(8, 0.5, modes), torch.randn(IMAGE))
    assert 0.1 * error < predict_drift(modes, [4.0] * 8) < 10 * error


def test_no_drift_without_invert() -> None:
    for modes in (["exact"] * 8, ["store"] * 4 + ["exact"] * 4, ["recompute"] * 8, ["invert"] + ["exact"] * 7):
        assert predict_drift(modes, [4.0] * 8) == 0.0


def test_prediction_for_other_dtypes() -> None:
    x = torch.randn(IMAGE, dtype=torch.float64)
    error = measured(net(12, 0.5).double(), x)
    assert 0.1 * error < predict_drift(["invert"] * 12, [4.0] * 12, torch.float64) < 10 * error


def test_prediction_of_a_deep_network_is_one() -> None:
    assert predict_drift(["invert"] * 64, [400.0] * 64) == 1.0


def warned(model: nn.Module, x: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
    return [str(item.message) for item in caught if issubclass(item.category, DriftWarning)]


def test_one_warning_with_error_and_hint() -> None:
    model, x = net(12, 0.5), torch.randn(IMAGE)
    (text,) = warned(model, x)
    error = predict_drift(["invert"] * 12, [4.0] * 12)
    assert f"12 columns (gamma about 0.5, float32) are predicted to change the gradient by about {error:.0%}" in text
    assert "Use memory 'exact', which does not drift, or 'recompute' in one column out of 8" in text
    assert predict_drift(["invert"] * 8, [4.0] * 8) < 0.01 < predict_drift(["invert"] * 9, [4.0] * 9)
    assert warned(model, x) == []
    model.columns.memory = "invert"
    assert len(warned(model, x)) == 1
    model.columns.memory = ["recompute" if column % 8 == 7 else "invert" for column in range(12)]
    assert warned(model, x) == []


def test_warning_considers_half_precision() -> None:
    model, x = net(4, 0.5), torch.randn(IMAGE)
    assert warned(model, x) == []
    model.columns.memory = "invert"
    with torch.autocast("cpu", torch.bfloat16):
        (text,) = warned(model, x)
    assert "(gamma about 0.5, bfloat16)" in text


@pytest.mark.parametrize("memory", ["store", "recompute", "exact"])
def test_no_warning_in_other_modes(memory: str) -> None:
    assert warned(net(12, 0.2, memory), torch.randn(IMAGE)) == []


def test_stored_cells_do_not_drift() -> None:
    model, x = net(12, 0.5), torch.randn(IMAGE)
    model.columns.stored = 4 * 6
    assert warned(model, x) == []
    model.columns.stored = 0
    model.columns.memory = "invert"
    assert len(warned(model, x)) == 1


def test_no_warning_without_gradients() -> None:
    model, x = net(12, 0.5), torch.randn(IMAGE)
    with torch.no_grad():
        assert warned(model, x) == []


def test_warning_considers_all_kinds_of_gains() -> None:
    assert len(warned(net(12, 0.5, learn=False), torch.randn(IMAGE))) == 1
    sequence = revnets.ReversibleSequence([nn.Linear(5, 5) for _ in range(20)], gain=-0.3, memory="invert")
    with pytest.warns(DriftWarning, match=r"gamma about 0\.3"):
        sequence(torch.randn(3, 5))
    plain = revnets.ReversibleSequence([nn.Linear(5, 5) for _ in range(20)], memory="invert")
    assert warned(plain, torch.randn(3, 5)) == []


def test_warning_when_gains_shrink_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "EVERY", 5)
    columns = token_net(columns=6, gamma=1.0, memory="invert")
    counts = []
    for step in range(12):
        if step == 6:
            for cell in columns.flat():
                if cell.gain is not None:
                    nn.init.constant_(cell.gain.weight, 0.1)
        counts.append(len(warned(columns, stem_of(columns))))
    assert counts == [0] * 10 + [1, 0]


def test_gains_may_arrive_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a GPU: the host does not wait, and evaluates them in a later forward pass."""

    class Event:
        ready = False

        def query(self) -> bool:
            return self.ready

    event = Event()
    monkeypatch.setattr(drift, "_fetch", lambda values: (values, event))
    model, x = net(12, 0.5), torch.randn(IMAGE)
    assert warned(model, x) == warned(model, x) == []
    event.ready = True
    assert len(warned(model, x)) == 1
    assert warned(model, x) == []


def test_audit_does_not_warn() -> None:
    columns = token_net(m=2, columns=8, gamma=0.1, memory="invert")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        found = revnets.audit(columns, stem_of(columns), modes=("invert",))
        revnets.plan(columns, stem_of(columns), modes=("invert",))
    assert found.modes[0].gradient_error > 0.01
    assert len(warned(columns, stem_of(columns))) == 1


def test_watch_does_not_keep_columns_alive() -> None:
    model = net(12, 0.5)
    warned(model, torch.randn(IMAGE))
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(len(warned(other, torch.randn(IMAGE))) == 1 for other in others)
    del model, others
    gc.collect()
    assert all(len(columns.flat()) != 48 for columns in drift._watches)
