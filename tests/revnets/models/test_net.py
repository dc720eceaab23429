"""Networks built from specifications: their components, outputs and errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import revnets
from revnets import FixedGain, Gain
from revnets.config.imports import importable
from revnets.config.net_spec import dump
from revnets.config.registry import PROVIDED
from revnets.engine.errors import ArgumentError
from revnets.models.net import Level, Net
from revnets.nn.blocks import ConvNeXtBlock, DropPath, ViTBlock
from tests.support.errors import raises_error
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples/configs"


def spec(**changes: Any) -> dict[str, Any]:
    data = {
        "columns": 3,
        "stem": {"type": "patchify", "patch": 2},
        "levels": [
            {"dim": 8, "depth": 2, "block": "convnext", "kernel_size": 5},
            {"dim": 12, "depth": 1, "block": "vit", "heads": 3},
            {"dim": 16, "depth": 0, "block": "mlp"},
        ],
        "head": {"type": "classifier", "num_classes": 5},
    }
    return data | changes


def test_components_match_the_specification() -> None:
    net = revnets.build(spec())
    assert [len(column) for column in net.columns.cells] == [3, 3, 3]
    for column in net.columns.cells:
        kinds = [[type(block) for block in cell.function.blocks] for cell in column]
        assert kinds == [[ConvNeXtBlock, ConvNeXtBlock], [ViTBlock], []]
        assert column[0].function.blocks[1].dwconv.kernel_size == (5, 5)
        assert [cell.function.dim for cell in column] == [8, 12, 16]
    assert [cell.function.name for cell in net.columns.flat()][:4] == ["c0.l0", "c0.l1", "c0.l2", "c1.l0"]
    assert net.stem.conv.kernel_size == (2, 2)
    assert net.head.fc.out_features == 5


def test_gains() -> None:
    for gain, kind in (({"init": -0.25, "min_abs": 0.1}, Gain), ({"init": -0.25, "learn": False}, FixedGain)):
        net = revnets.build(spec(gain=gain))
        for cell in net.columns.cells[0]:
            assert cell.gain is None  # the first column has no residuals
        for column in list(net.columns.cells)[1:]:
            for cell in column:
                assert type(cell.gain) is kind
                assert torch.as_tensor(cell.gain()).eq(-0.25).all()
    assert revnets.build(spec(gain={"min_abs": 0.1})).columns.cells[1][0].gain.min_abs == 0.1


def test_drop_path_rates_reach_the_blocks() -> None:
    net = revnets.build(spec(drop_path=0.3))
    for column in net.columns.cells:
        rates = [module.rate for module in column.modules() if isinstance(module, DropPath)]
        assert rates == pytest.approx([0, 0.15, 0.3])
    levels = spec()["levels"]
    levels[0] |= {"drop_path": 0.1}
    net = revnets.build(spec(drop_path=0.3, levels=levels))
    rates = [module.rate for module in net.columns.cells[0].modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1, 0.1, 0.3])


def test_fast_initialization_changes_only_gains_and_layer_scales() -> None:
    nets = []
    for init in ("paper", "fast"):
        torch.manual_seed(0)
        nets.append(revnets.build(spec(init=init)))
    paper, fast = (dict(net.named_parameters()) for net in nets)
    changed = {name for name in fast if name.endswith((".gain.weight", ".scale.gamma"))}
    assert len(changed) == 2 * 3 + 3 * 2  # columns with gains * levels, columns * ConvNeXt blocks
    for name in fast:
        assert torch.equal(fast[name], torch.ones_like(fast[name]) if name in changed else paper[name]), name


def test_explicit_gains_and_layer_scales_override_the_initialization() -> None:
    levels = spec()["levels"]
    levels[0] |= {"layer_scale": 0.25}
    net = revnets.build(spec(init="fast", levels=levels, gain={"init": 0.5}))
    assert net.columns.cells[1][0].gain.weight.eq(0.5).all()
    assert net.columns.cells[1][0].function.blocks[1].scale.gamma.eq(0.25).all()


RECORDER = """
from torch import nn
GIVEN = []
class Recorder(nn.Identity):
    def __init__(self, **given):
        GIVEN.append(given)
        super().__init__()
class Sum(Recorder):
    default_stride = 3
    def forward(self, *reads):
        return sum(reads)
"""


def test_arguments_of_each_kind_of_component(own_modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_modules / "recorder.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(own_modules)
    levels = [{"dim": dim, "depth": 1, "block": "recorder:Recorder", "tone": dim} for dim in (4, 5)]
    parts = {"stem": "recorder:Recorder", "fusion": "recorder:Sum", "head": {"type": "recorder:Recorder", "n": 1}}
    revnets.build(spec(columns=2, levels=levels, reads=["stem", "below", "above"], **parts))
    import recorder

    stem, *cells, head = recorder.GIVEN
    assert stem == {"dim": 4}
    assert head == {"dims": [4, 5], "n": 1}
    assert [given for given in cells if "tone" in given] == 2 * [{"dim": 4, "tone": 4}, {"dim": 5, "tone": 5}]
    fusions = [given for given in cells if "sources" in given]
    assert [(given["dim"], given["reduction"]) for given in fusions] == 2 * [(4, 1), (5, 3)]
    sources = [[tuple(source) for source in given["sources"]] for given in fusions]
    assert sources[0] == [("stem", 4, 1)]
    assert sources[1] == sources[3] == [("stem", 4, 1), ("below", 4, 1)]
    assert sources[2] == [("stem", 4, 1), ("above", 5, 3)]
    assert {*stem, *head, *cells[0], *cells[1]} - {"n", "tone"} == {key for keys in PROVIDED.values() for key in keys}


def test_outputs() -> None:
    x = torch.randn(2, 3, 20, 12)
    net = revnets.build(spec())
    assert net(x).shape == (2, 5)
    shapes = [(2, 10, 6, 8), (2, 5, 3, 12), (2, 3, 2, 16)]
    levels = revnets.build(spec(head=None))(x)
    assert [level.shape for level in levels] == shapes
    logits, taps = revnets.build(spec(taps=[0, 2]))(x)
    assert logits.shape == (2, 5)
    assert [tap.shape for tap in taps] == [shapes[-1], shapes[-1]]
    levels, taps = revnets.build(spec(taps=2, head=None))(x)
    assert taps[0] is levels[-1]


def test_intermediate_outputs_are_top_levels() -> None:
    torch.manual_seed(0)
    net = revnets.build(spec(taps=[0, 1, 2], head=None)).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        levels, taps = net(x)
        states = net.columns.inverse(levels, net.stem(x))
    for tap, column in zip(reversed(taps), states, strict=True):
        assert_close(tap, column[-1], rtol=1e-3, atol=1e-4)


def test_states_match_the_equation_of_the_paper() -> None:
    """Compute x_t = F_t(below, above) + gamma x_{t-m} in a loop from the components of the network."""
    torch.manual_seed(0)
    net = revnets.build(spec(head=None)).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    stem = net.stem(x)
    before: list[torch.Tensor] = []
    for column in net.columns.cells:
        now: list[torch.Tensor] = []
        for level, cell in enumerate(column):
            reads = [now[-1] if now else stem, *before[level + 1 : level + 2]]
            f = cell.function.fusion(*reads)
            for block in cell.function.blocks:
                f = block(f)
            now.append(f + cell.gain() * before[level] if before else f)
        before = now
    for level, expected in zip(net(x), before, strict=True):
        assert_close(level, expected)


def test_gradients_of_exact_equal_store() -> None:
    torch.manual_seed(0)
    net = revnets.build(spec(drop_path=0.3, memory=["recompute", "exact", "exact"], reads="full"))
    x = torch.randn(4, 3, 16, 16)
    grads = []
    for memory in (net.columns.memory, "store"):
        net.columns.memory = memory
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("name", "headed"),
    # numbers of the paper and of the release, without the unused gains of the first column
    [
        ("revcol_tiny", 30_456_168 - 960),
        ("revcol_small", 60_568_424 - 960),
        ("huge_reads", 2_157_600_160 - 5400),
    ],
)
def test_parameter_counts_of_the_paper(name: str, headed: int) -> None:
    with torch.device("meta"):
        net = revnets.build(EXAMPLES / f"{name}.yaml")
    assert sum(parameter.numel() for parameter in net.parameters()) == headed


def test_all_sources_of_a_specification_build_the_same_network(tmp_path: Path) -> None:
    loaded = revnets.load_spec(spec())
    file = tmp_path / "net.yaml"
    file.write_text(repr(dump(loaded)).replace("'", '"'))  # this Python literal is valid YAML
    nets = [revnets.build(source, ["columns=2"]) for source in (spec(), loaded, str(file), file)]
    assert [net.spec for net in nets] == 4 * [nets[0].spec]
    assert {tuple(net.state_dict()) for net in nets} == {tuple(nets[0].state_dict())}
    assert isinstance(nets[0], Net)
    columns = revnets.build_columns(nets[0].spec)
    columns.load_state_dict(nets[0].columns.state_dict())


def test_errors_of_components_name_their_source(tmp_path: Path) -> None:
    bad = spec(levels=[{"dim": 8, "depth": 1, "block": "vit", "heads": 3}] * 2)
    file = tmp_path / "net.yaml"
    file.write_text(repr(bad).replace("'", '"'))
    for source, name in ((bad, "dict"), (revnets.load_spec(bad), "spec"), (file, str(file))):
        with pytest.raises(revnets.SpecError) as caught:
            revnets.build(source)
        assert str(caught.value) == (
            f'{name}: levels.0: block "vit": 8 channels are not divisible by 3 heads. '
            "Give another dim, or heads 1, 2, 4"
        )
        assert isinstance(caught.value.__cause__, ValueError)


class Widening(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], -1)


def test_errors_name_components_that_change_the_shape() -> None:
    level = Level(nn.Identity(), [nn.Identity(), Widening()], 3, "c2.l1")
    with raises_error(
        ArgumentError, code="shape-mismatch", key="c2.l1", names=["block 1 (Widening)", "(2, 6)", "(2, 3)"]
    ):
        level(torch.ones(2, 3))
    level = Level(Widening(), [], 3, "c2.l1")
    with raises_error(ArgumentError, code="shape-mismatch", key="c2.l1", names=["Widening", "(2, 6)", "dim 3"]):
        level(torch.ones(2, 3))


def test_copy_is_independent() -> None:
    net = revnets.build(spec())
    twin = copy.deepcopy(net)
    x = torch.randn(1, 3, 8, 8)
    twin(x).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(net(x), twin(x))


def test_options_may_have_the_names_of_internal_arguments(own_modules) -> None:
    (own_modules / "named.py").write_text(
        "from revnets.nn.blocks import MLPBlock\n"
        "class Named(MLPBlock):\n"
        "    def __init__(self, dim: int, name: str, kind: str, key: str, source: str):\n"
        "        super().__init__(dim)\n"
        "        self.given = (name, kind, key, source)\n"
    )
    block = {"block": "named:Named", "name": "a", "kind": "b", "key": "c", "source": "d"}
    level = {"dim": 4, "depth": 1, **block}
    data = {"columns": 1, "stem": {"type": "linear", "in_dim": 3}, "fusion": "linear", "levels": [level] * 2}
    with importable(own_modules):
        net = revnets.build(data)
    assert net.columns.cells[0][0].function.blocks[0].given == ("a", "b", "c", "d")
