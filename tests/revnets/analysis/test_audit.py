from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnets.analysis.audit import audit
from revnets.analysis.reconstruction import reconstruction
from revnets.engine.columns import ReversibleColumns, ReversibleSequence
from revnets.memory.tracker import OpCounter, kept_bytes, peak_bytes
from tests.support.audit_networks import DIMS, ConvLevel, Net, by_mode, conv_columns, render, stem_output

TAPED = ("recompute", "invert", "exact")


def test_shallow_model_is_exact_and_drifts_little():
    result = audit(conv_columns(4), stem_output())
    modes = by_mode(result)
    assert list(modes) == ["store", "recompute", "invert", "exact"]
    assert [result.verdict(mode) for mode in result.modes] == ["exact", "exact", "drift", "exact"]
    assert modes["exact"].equal
    assert modes["exact"].gradient_error == 0
    assert modes["exact"].worst_parameter == ""
    assert 0 < modes["invert"].gradient_error < 1e-3
    assert modes["invert"].worst_error >= modes["invert"].gradient_error
    assert [column.column for column in result.columns] == [0, 1, 2]
    assert all(column.exact for column in result.columns)
    assert result.noise == 0
    assert result.ok


def test_drift_grows_toward_the_first_column_and_is_wrong():
    result = audit(conv_columns(16, gain=0.2), stem_output())
    modes = by_mode(result)
    assert result.verdict(modes["invert"]) == "wrong"
    assert modes["invert"].gradient_error > 0.01
    assert result.verdict(modes["exact"]) == "exact"
    assert all(column.exact for column in result.columns)
    errors = [column.invert_error for column in result.columns]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1 > 1e-5 > errors[-1] > 0
    assert not result.ok
    assert replace(result, modes=(modes["store"], modes["recompute"], modes["exact"])).ok


def test_reconstruction_errors_agree_with_the_inverse():
    columns, x = conv_columns(5), stem_output()
    result = audit(columns, x, modes=())
    states = [[None] * columns.graph.m for _ in range(5)]
    hooks = [
        cell.register_forward_hook(lambda _m, _a, out, c=c, i=i: states[c].__setitem__(i, out))
        for c, column in enumerate(columns.cells)
        for i, cell in enumerate(column)
    ]
    with torch.no_grad():
        last = columns(x)
    for hook in hooks:
        hook.remove()
    rebuilt = columns.inverse(last, x)[::-1]
    for column in result.columns:
        wanted, found = states[column.column], rebuilt[column.column]
        errors = [float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]
        assert column.invert_levels == pytest.approx(errors, rel=1e-4)
        total = [torch.cat([state.flatten() for state in level]) for level in (found, wanted)]
        assert column.invert_error == pytest.approx(float((total[0] - total[1]).norm() / total[1].norm()), rel=1e-4)
        largest = max(float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True))
        assert column.invert_max == pytest.approx(largest, rel=1e-4)
        assert column.elements == tuple(w.numel() for w in wanted)


@pytest.mark.filterwarnings("ignore::revnets.DriftWarning")
def test_gradient_error_agrees_with_ordinary_backward():
    net, image = Net(conv_columns(8, gain=0.3)), torch.randn(2, 3, 6, 6)

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, torch.tensor([1, 3]))

    result = audit(net, image, loss=loss)
    gradients = {}
    for mode in ("store", "invert"):
        net.columns.memory = mode
        net.zero_grad()
        loss(net(image)).backward()
        gradients[mode] = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    expected = (gradients["invert"] - gradients["store"]).norm() / gradients["store"].norm()
    assert by_mode(result)["invert"].gradient_error == pytest.approx(float(expected), rel=1e-4)


def test_bytes_and_flops_agree_with_a_separate_pass():
    net, image = Net(conv_columns(4)), torch.randn(2, 3, 6, 6)
    result = audit(net, image)
    for mode in result.modes:
        net.columns.memory = mode.mode
        assert mode.kept_bytes == kept_bytes(net, image)
        assert mode.peak_bytes == peak_bytes(net, image)
        with OpCounter() as forward:
            output = net(image)
        with OpCounter() as backward:
            output.sum().backward()
        assert (mode.forward_matmuls, mode.forward_flops) == (forward.matmuls, forward.flops)
        assert (mode.backward_matmuls, mode.backward_flops) == (backward.matmuls, backward.flops)
    modes = by_mode(result)
    for mode in TAPED:
        more = modes[mode].backward_matmuls - modes["store"].backward_matmuls
        assert 0 < more <= modes["store"].forward_matmuls


def test_current_plan_does_not_affect_the_audit():
    net, x = conv_columns(3), stem_output()
    expected = audit(net, x).modes
    net.stored = [1, 4]
    found = audit(net, x).modes
    assert [mode.kept_bytes for mode in found] == [mode.kept_bytes for mode in expected]
    assert net.stored == {1, 4}


def test_bytes_per_column_agree_with_an_additional_column():
    x = stem_output()
    state_set = 4 * sum(x[..., 0].numel() * dim for dim in DIMS)
    kept = {mode: [] for mode in ("store", *TAPED)}
    for count in (1, 2, 5):
        columns = conv_columns(count)
        for mode, values in kept.items():
            columns.memory = mode
            values.append(kept_bytes(columns, x))
    modes = by_mode(audit(conv_columns(5), x))
    for mode, (one, two, five) in kept.items():
        added = modes[mode].column_bytes
        assert len(added) == 5
        if mode != "exact":  # the length of lost bits depends on values
            assert sum(added) == five
            assert added[0] == one
            assert added[1] == two - one
            assert modes[mode].bytes_per_column == (five - one) / 4
    assert modes["invert"].bytes_per_column == 0
    assert modes["recompute"].bytes_per_column == state_set
    assert modes["store"].bytes_per_column > 2 * state_set
    assert 0 < modes["exact"].bytes_per_column < state_set / 2


def test_autocast_around_the_audit_or_in_the_model_measures_the_same():
    class Wrapped(nn.Module):
        def __init__(self, columns: ReversibleColumns):
            super().__init__()
            self.columns = columns

        def forward(self, x: Tensor) -> list[Tensor]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.columns(x)

    columns, x = conv_columns(4), stem_output()
    inside = audit(Wrapped(columns), x)
    in_backward: list[bool] = []
    hook = columns.cells[0][0].function.mlp.register_full_backward_hook(
        lambda *_: in_backward.append(torch.is_autocast_enabled("cpu"))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = audit(columns, x)
        assert torch.is_autocast_enabled("cpu")
        weight = torch.randn(3, 3, requires_grad=True)
        product, again = weight @ weight, weight @ weight
        assert product.dtype == torch.bfloat16
        assert product.grad_fn.next_functions == again.grad_fn.next_functions  # one cast weight, still in the cache
    assert torch.autocast_increment_nesting() == 1  # every autocast region is closed
    torch.autocast_decrement_nesting()
    assert in_backward
    assert not any(in_backward)
    hook.remove()
    plain = audit(columns, x)
    for a, b in zip(inside.modes, around.modes, strict=True):
        assert replace(a, worst_parameter="") == replace(b, worst_parameter="")
    assert inside.columns == around.columns
    assert by_mode(inside)["exact"].equal
    assert by_mode(inside)["invert"].bytes_per_column == 0  # columns do not keep weights in half precision
    assert by_mode(inside)["store"].kept_bytes < by_mode(plain)["store"].kept_bytes


def test_dropout_and_batch_norm_are_included():
    columns = conv_columns(4, drop=0.5, norm=nn.BatchNorm1d)
    training = audit(columns, stem_output())
    assert training.ok
    assert by_mode(training)["invert"].gradient_error < 1e-3  # the replay draws the same random numbers as forward
    assert by_mode(training)["exact"].equal
    assert audit(columns.eval(), stem_output()).ok


def test_each_pass_starts_from_the_same_buffers():
    class Spectral(ConvLevel):
        """Spectral norm updates a buffer, its estimate of the largest singular value, in every forward pass."""

        def __init__(self, dim: int, read_dims: list[int]):
            super().__init__(dim, read_dims)
            nn.utils.parametrizations.spectral_norm(self.mlp[0])

    result = audit(conv_columns(3, make=Spectral), stem_output())
    assert result.noise == 0
    assert by_mode(result)["exact"].equal


def test_gradients_of_inputs_are_compared():
    x = stem_output().requires_grad_()
    columns = conv_columns(8, gain=0.1)
    for parameter in columns.parameters():
        parameter.requires_grad_(False)
    result = audit(columns, x)
    assert by_mode(result)["exact"].equal
    assert by_mode(result)["invert"].worst_parameter == "input 0"
    assert x.grad is None


def test_reconstruction_uses_arguments_of_the_columns():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) * mask

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = ReversibleSequence([Masked() for _ in range(8)], m=2, gain=0.5)

        def forward(self, tokens: Tensor, mask: Tensor) -> dict:
            last, tapped = self.layers(tokens, taps=[1], mask=mask)
            return {"states": last, "tapped": tapped}

    inputs = {"tokens": torch.randn(2, 5, 6), "mask": torch.ones(2, 5, 1)}
    inputs["mask"][:, 3:] = 0
    for x in (inputs, tuple(inputs.values())):
        result = audit(Encoder(), x)
        assert result.ok
        assert len(result.columns) == 3
        assert 0 < result.columns[0].invert_error < 1e-4


def test_reconstruction_depends_only_on_its_seed():
    columns, x = conv_columns(3, drop=0.5), stem_output()
    first = reconstruction(columns, lambda: columns(x), seed=1)
    torch.randn(10)
    assert reconstruction(columns, lambda: columns(x), seed=1) == first
    assert reconstruction(columns, lambda: columns(x), seed=2) != first


def test_a_last_column_may_be_shorter():
    result = audit(ReversibleSequence([nn.Linear(6, 6) for _ in range(7)], m=3), torch.randn(5, 6))
    assert result.ok
    assert [len(column.elements) for column in result.columns] == [3, 1]
    render(result)


def test_nothing_is_rebuilt_with_one_column():
    result = audit(conv_columns(1), stem_output())
    assert result.columns == ()
    assert result.ok
    assert all(mode.equal for mode in result.modes)
    assert math.isnan(by_mode(result)["exact"].bytes_per_column)
    assert "one column" in render(result)
