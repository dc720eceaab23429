from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from revnets.audit import ROUNDS, audit, find_columns
from revnets.cell import Cell, Gain
from revnets.columns import ReversibleColumns, ReversibleSequence
from revnets.distance import same_bits
from revnets.graph import STEM, wire
from revnets.reconstruction import reconstruction
from revnets.report import Audit, duration, size, thinned
from revnets.tracker import OpCounter, kept_bytes, peak_bytes

DIMS = (5, 7, 11)
TAPED = ("recompute", "invert", "exact")


class ConvLevel(nn.Module):
    """F_t on NHWC images of one size: reads are projected and summed, then a depthwise convolution and an MLP."""

    def __init__(self, dim: int, read_dims: list[int], drop: float = 0.0, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.fuse = nn.ModuleList(nn.Linear(read_dim, dim) for read_dim in read_dims)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = norm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.Dropout(drop))

    def forward(self, *reads: Tensor) -> Tensor:
        x = sum(fuse(read) for fuse, read in zip(self.fuse, reads, strict=True))
        y = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        return x + self.mlp(self.norm(y.flatten(0, -2)).view(y.shape))


def conv_columns(columns: int, gain: float = 0.55, make: Callable[..., nn.Module] = ConvLevel, **options):
    m = len(DIMS)
    graph = wire(columns * m, m, [("below", "above")] * m)
    cells = []
    for node in graph.nodes:
        dims = [DIMS[0] if read == STEM else DIMS[read % m] for read in node.reads]
        level = make(DIMS[node.level], dims, **options)
        cells.append(Cell(level, None if node.residual is None else Gain(DIMS[node.level], gain)))
    return ReversibleColumns(graph, cells)


class Net(nn.Module):
    """A stem, columns and a head that reads the last level."""

    def __init__(self, columns: ReversibleColumns):
        super().__init__()
        self.stem = nn.Conv2d(3, DIMS[0], 3, padding=1)
        self.columns = columns
        self.head = nn.Linear(DIMS[-1], 4)

    def forward(self, image: Tensor) -> Tensor:
        levels = self.columns(self.stem(image).movedim(1, -1).contiguous())
        return self.head(levels[-1].mean((1, 2)))


def stem_output(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 6, DIMS[0])


def by_mode(result: Audit) -> dict:
    return {mode.mode: mode for mode in result.modes}


# ---------------------------------------------------------------------------------------------- what the numbers mean


def test_a_shallow_net_is_exact_and_drifts_little():
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


def test_drift_grows_towards_the_first_column_and_is_called_wrong():
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


def test_reconstruction_errors_are_those_of_the_inverse():
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


def test_gradient_error_is_that_of_an_ordinary_backward():
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


def test_bytes_and_work_are_those_of_a_pass_measured_alone():
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


def test_a_plan_in_force_is_no_part_of_a_mode():
    net, x = conv_columns(3), stem_output()
    expected = audit(net, x).modes
    net.stored = [1, 4]
    found = audit(net, x).modes
    assert [mode.kept_bytes for mode in found] == [mode.kept_bytes for mode in expected]
    assert net.stored == {1, 4}


def test_bytes_per_column_are_what_one_more_column_costs():
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
        if mode != "exact":  # there the lost bits depend on the numbers
            assert sum(added) == five
            assert added[0] == one
            assert added[1] == two - one
            assert modes[mode].bytes_per_column == (five - one) / 4
    assert modes["invert"].bytes_per_column == 0
    assert modes["recompute"].bytes_per_column == state_set
    assert modes["store"].bytes_per_column > 2 * state_set
    assert 0 < modes["exact"].bytes_per_column < state_set / 2


def test_autocast_around_the_audit_or_inside_of_the_model_measures_the_same():
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
        assert product.grad_fn.next_functions == again.grad_fn.next_functions  # one cast, still in the cache
    assert torch.autocast_increment_nesting() == 1  # every region that was entered has been left
    torch.autocast_decrement_nesting()
    assert in_backward
    assert not any(in_backward)
    hook.remove()
    plain = audit(columns, x)
    for a, b in zip(inside.modes, around.modes, strict=True):
        assert replace(a, worst_parameter="") == replace(b, worst_parameter="")
    assert inside.columns == around.columns
    assert by_mode(inside)["exact"].equal
    assert by_mode(inside)["invert"].bytes_per_column == 0  # weights in half precision are nothing that columns keep
    assert by_mode(inside)["store"].kept_bytes < by_mode(plain)["store"].kept_bytes


def test_dropout_and_batch_norm_take_part():
    columns = conv_columns(4, drop=0.5, norm=nn.BatchNorm1d)
    training = audit(columns, stem_output())
    assert training.ok
    assert by_mode(training)["invert"].gradient_error < 1e-3  # the replay draws the forward's numbers
    assert by_mode(training)["exact"].equal
    assert audit(columns.eval(), stem_output()).ok


def test_each_pass_starts_from_the_same_buffers():
    class Spectral(ConvLevel):
        """Its estimate of the largest singular value, a buffer, moves in every forward and scales the weight."""

        def __init__(self, dim: int, read_dims: list[int]):
            super().__init__(dim, read_dims)
            nn.utils.parametrizations.spectral_norm(self.mlp[0])

    result = audit(conv_columns(3, make=Spectral), stem_output())
    assert result.noise == 0
    assert by_mode(result)["exact"].equal


def test_gradients_of_inputs_are_compared_as_well():
    x = stem_output().requires_grad_()
    columns = conv_columns(8, gain=0.1)
    for parameter in columns.parameters():
        parameter.requires_grad_(False)
    result = audit(columns, x)
    assert by_mode(result)["exact"].equal
    assert by_mode(result)["invert"].worst_parameter == "input 0"
    assert x.grad is None


def test_arguments_of_the_columns_reach_the_reconstruction():
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


def test_reconstruction_depends_on_its_seed_alone():
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


def test_one_column_has_nothing_to_rebuild():
    result = audit(conv_columns(1), stem_output())
    assert result.columns == ()
    assert result.ok
    assert all(mode.equal for mode in result.modes)
    assert math.isnan(by_mode(result)["exact"].bytes_per_column)
    assert "one column" in render(result)


# ----------------------------------------------------------------------------------------- nets that are not reversible


class _Counting(nn.Module):
    """Computes something else in every call."""

    def __init__(self, dim: int, read_dims: list[int], paths: bool):
        super().__init__()
        self.inner = ConvLevel(dim, read_dims)
        self.calls = 0
        self.paths = paths

    def forward(self, *reads: Tensor) -> Tensor:
        self.calls += 1
        update = self.inner(*reads)
        if self.paths:
            return update.sin() if self.calls % 2 else update
        return update * (1 + 0.5 * (self.calls % 2))


def test_a_cell_that_computes_something_else_in_its_replay_is_found():
    result = audit(conv_columns(3, make=_Counting, paths=False), stem_output())
    modes = by_mode(result)
    assert result.noise > 0  # even store differs from itself, so the limit is generous
    assert not all(column.exact for column in result.columns)
    assert not modes["exact"].equal
    assert not result.ok


def test_a_cell_that_takes_another_path_in_its_replay_fails_with_a_reason():
    result = audit(conv_columns(3, make=_Counting, paths=True), stem_output())
    exact = by_mode(result)["exact"]
    assert "replay" in exact.failure
    assert math.isnan(exact.gradient_error)
    assert math.isnan(exact.seconds)
    assert result.verdict(exact) == "wrong"
    assert not result.ok
    text = render(result)
    assert "FAILED" in text
    assert "Usual causes" in text


def test_a_cell_that_changes_its_read_in_place_fails_and_store_does_not():
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().add_(1) + x

    columns = ReversibleSequence([nn.Linear(6, 6), nn.Linear(6, 6), Careless(), nn.Linear(6, 6)], m=2)
    result = audit(columns, torch.randn(3, 6))
    assert [bool(mode.failure) for mode in result.modes] == [False, True, True, True]
    assert result.columns == ()
    assert not result.ok
    assert "could not be rebuilt" in render(result)


class _Noise(torch.autograd.Function):
    """The identity, whose gradient a kernel with atomic additions would give: a little different every time."""

    generator = torch.Generator()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-6 * torch.rand(grad.shape, generator=_Noise.generator))


def test_kernels_that_do_not_repeat_themselves_are_no_fault_of_the_engine():
    class Noisy(ConvLevel):
        def forward(self, *reads: Tensor) -> Tensor:
            return _Noise.apply(super().forward(*reads))

    result = audit(conv_columns(3, make=Noisy), stem_output())
    modes = by_mode(result)
    assert 0 < result.noise < 1e-5
    assert not modes["exact"].equal
    assert result.verdict(modes["exact"]) == "drift"
    assert all(column.exact for column in result.columns)
    assert result.ok
    assert "not deterministic" in render(result)
    assert not replace(result, noise=0.0).ok


# ------------------------------------------------------------------------------------------------------ left as found


def _state(net: nn.Module) -> list:
    return [
        {name: tensor.clone() for name, tensor in net.state_dict().items()},
        [None if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()],
        [parameter._version for parameter in net.parameters()],
        [module.training for module in net.modules()],
        net.columns.memory,
        torch.get_rng_state(),
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()],
    ]


def _equal_states(a: list, b: list) -> bool:
    buffers = all(same_bits(a[0][name], b[0][name]) for name in a[0])
    gradients = all(
        (x is None) == (y is None) and (x is None or same_bits(x, y)) for x, y in zip(a[1], b[1], strict=True)
    )
    return buffers and gradients and a[2:5] == b[2:5] and torch.equal(a[5], b[5]) and a[6] == b[6]


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing):
    net, image = Net(conv_columns(3, drop=0.3, norm=nn.BatchNorm1d)), torch.randn(2, 3, 6, 6)
    net(image).sum().backward()
    net.head.bias.grad = None
    net.columns.cells[1].eval()
    net.columns.memory = ["store", "invert", "recompute"]
    before, gradient = _state(net), net.head.weight.grad
    if failing:
        with pytest.raises(ZeroDivisionError):
            audit(net, image, loss=lambda _: 1 / 0)
    else:
        audit(net, image)
    assert _equal_states(before, _state(net))
    assert net.head.weight.grad is gradient
    net(image)
    assert not _equal_states(before, _state(net))  # BatchNorm and the generator have moved


def test_the_same_seed_gives_the_same_numbers():
    columns, x = conv_columns(3, drop=0.3), stem_output()
    first = audit(columns, x, seed=1)
    torch.randn(10)
    assert audit(columns, x, seed=1) == first
    assert audit(columns, x, seed=2) != first
    assert audit(columns, x, modes=["exact"], seed=1).columns == first.columns


# ------------------------------------------------------------------------------------------------------------ calling


def test_columns_are_found_wherever_they_are():
    columns = conv_columns(2)
    net = Net(columns)
    assert find_columns(columns) is columns
    assert find_columns(net) is columns
    assert find_columns(nn.Sequential(nn.Identity(), net)) is columns
    several = nn.ModuleDict({"a": conv_columns(1), "b": conv_columns(1)})
    with pytest.raises(ValueError, match="several, at a, b"):
        find_columns(several)
    several.columns = columns
    assert find_columns(several) is columns
    with pytest.raises(ValueError, match="Linear must be or contain exactly one ReversibleColumns; it has none"):
        find_columns(nn.Linear(1, 1))


def test_steps_are_timed_without_counters(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))
    result = audit(conv_columns(2), stem_output(), modes=("store", "exact"))
    assert [mode.seconds for mode in result.modes] == [1.0, 1.0]
    assert next(clock) == 2 * 2 * ROUNDS  # nothing else was timed


def test_only_the_modes_asked_for_are_measured_and_progress_tells_which():
    told: list[str] = []
    result = audit(conv_columns(2), stem_output(), modes=["exact"], progress=told.append)
    assert [mode.mode for mode in result.modes] == ["exact"]
    assert told == ["store", "store, once more", "exact", "time", "reconstruction"]
    assert audit(conv_columns(2), stem_output(), modes="invert").modes[0].mode == "invert"
    assert "exact" in render(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": ["exakt"]}, "'exakt' is unknown; choose store, recompute, invert, exact"),
        ({"loss": lambda levels: levels[0]}, "one number"),
        ({"loss": lambda levels: levels[0].detach().sum()}, "one number"),
        ({"loss": lambda levels: 3}, "one number"),
        ({"loss": lambda levels: levels[0].sum() * math.nan}, "not finite with ordinary autograd"),
    ],
)
def test_bad_calls_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        audit(conv_columns(2), stem_output(), **change)


def test_a_frozen_model_has_no_gradient_to_compare():
    columns = conv_columns(2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter and no input requires a gradient"):
        audit(columns, stem_output())
    net = Net(columns)
    net.stem.requires_grad_(False)
    net.register_parameter("unused", nn.Parameter(torch.ones(1)))
    net.head.requires_grad_(False)
    with pytest.raises(ValueError, match="no output of the model requires a gradient"):
        audit(net, torch.randn(2, 3, 6, 6))


# ------------------------------------------------------------------------------------------------------------- report


def render(result: Audit, colour: bool = False) -> str:
    console = Console(width=80, force_terminal=colour, color_system="standard" if colour else None, record=True)
    with console.capture() as capture:
        console.print(result.table())
    return capture.get()


def test_the_table_says_in_words_and_colours_what_is_wrong():
    result = audit(conv_columns(16, gain=0.2), stem_output())
    text = render(result)
    rows = {line.split()[0]: line for line in reversed(text.splitlines()) if line.split()}
    assert "WRONG" in rows["invert"]
    assert "bit for bit" in rows["exact"]
    assert "reference" in rows["store"]
    modes = by_mode(result)
    assert size(modes["exact"].kept_bytes) in rows["exact"]
    assert f"{modes['exact'].forward_matmuls}+{modes['exact'].backward_matmuls}" in rows["exact"]
    assert modes["invert"].worst_parameter in text
    assert "bit for bit" in rows["0"]
    green, red = "\x1b[32m", "\x1b[31m"
    coloured = render(result, colour=True).splitlines()
    assert any(f"{red}WRONG" in line for line in coloured)
    assert sum(f"{green}bit for bit" in line for line in coloured) == 2 + len(result.columns)
    assert max(map(len, text.splitlines())) <= 80


def test_a_long_table_is_thinned():
    assert thinned([1, 2, 3, 4], 4) == [1, 2, 3, 4]
    assert thinned(list(range(10)), 4) == [0, 1, None, 8, 9]


def test_the_dict_is_plain_json():
    result = audit(conv_columns(2), stem_output())
    infinite = replace(result, modes=tuple(replace(mode, gradient_error=math.inf) for mode in result.modes))
    for each in (result, infinite):
        data = json.loads(json.dumps(each.to_dict(), allow_nan=False))
        assert data == each.to_dict()
        assert data["ok"] is each.ok
        assert [mode["verdict"] for mode in data["modes"]] == [each.verdict(mode) for mode in each.modes]
    assert infinite.to_dict()["modes"][0]["gradient_error"] == "inf"
    assert result.to_dict()["modes"][3]["bytes_per_column"] == by_mode(result)["exact"].bytes_per_column
    assert result.to_dict()["columns"][0]["elements"] == list(result.columns[0].elements)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1.43 * 2**20, "1.43 MiB"),
        (12.34 * 2**30, "12.3 GiB"),
        (512 * 2**40, "512 TiB"),
        (-2048, "-2.00 KiB"),
        (math.nan, "-"),
    ],
)
def test_sizes_read_well(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(123.4, "123 s"), (12.34, "12.3 s"), (1.234, "1.23 s"), (0.4321, "432 ms"), (0.00432, "4.32 ms"), (math.nan, "-")],
)
def test_times_read_well(seconds, text):
    assert duration(seconds) == text
