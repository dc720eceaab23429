"""Specifications: defaults, short forms, options with the types of a signature, and conversion to plain data."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import revnets
from revnets.config.loader import load
from revnets.config.net_spec import dump, load_spec
from tests.support.errors import raises_error

NET = """\
columns: 2
stem: {type: patchify, patch: 2}
levels:
  - {dim: 8, depth: 1, block: convnext}
  - {dim: 12, depth: 1, block: vit, heads: 3}
head: {type: classifier, num_classes: 3}
drop_path: 0.1
"""


def net(**changes: Any) -> dict[str, Any]:
    """Return NET as a dict with changes."""
    return yaml.safe_load(NET) | changes


def test_defaults() -> None:
    required = {key: net()[key] for key in ("columns", "stem", "levels")}
    spec = load_spec(required)
    assert spec == load_spec(net(taps=[], head=None, drop_path=0))
    assert (spec.reads, spec.memory, spec.taps, spec.head) == (("below", "above"), "exact", (), None)
    assert (spec.gain.init, spec.gain.min_abs, spec.gain.learn) == (0.5, 1e-3, True)


def test_one_item_means_a_list_of_one() -> None:
    spec = load_spec(net(reads="full", taps=1))
    assert (spec.reads, spec.taps) == (("full",), (1,))
    assert load_spec(net(reads=1)).reads == (1,)


def test_memory_per_column() -> None:
    assert load_spec(net(memory=["store", "exact"])).memory == ("store", "exact")


def test_name_alone_means_a_component_without_options() -> None:
    assert load_spec(net(stem="patchify")).stem == load_spec(net(stem={"type": "patchify"})).stem


def test_meaning_of_null() -> None:
    """No head, or for a level the setting of the network."""
    data = net(head=None)
    data["levels"][0] |= {"stride": None, "reads": None}
    assert load_spec(data) == load_spec(net(head=None))


def test_reductions() -> None:
    levels = [{"dim": 8, "depth": 1, "block": "mlp", **extra} for extra in ({}, {}, {"stride": 3}, {"stride": 1})]
    assert load_spec(net(levels=levels, drop_path=0.1)).reductions() == [1, 2, 6, 6]
    assert load_spec(net(levels=levels, fusion="linear")).reductions() == [1, 1, 3, 3]
    levels[0]["stride"] = 2
    assert load_spec(net(levels=levels)).reductions() == [2, 4, 12, 12]


def test_drop_path_rates_rise_within_a_column() -> None:
    """As in the official release. Blocks keep their own rate, and blocks without this option are skipped."""
    levels = [
        {"dim": 8, "depth": 2, "block": "mlp"},
        {"dim": 8, "depth": 1, "block": "mlp", "drop_path": 0.5},
        {"dim": 8, "depth": 1, "block": "torch.nn:Identity"},
        {"dim": 8, "depth": 0, "block": "mlp"},
        {"dim": 8, "depth": 2, "block": "mlp"},
    ]
    rates = load_spec(net(levels=levels, drop_path=0.5)).drop_path_rates()
    assert rates == [pytest.approx([0, 0.1]), [0], [0], [], pytest.approx([0.4, 0.5])]
    assert load_spec(net(drop_path=0)).drop_path_rates() == [[0], [0]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": None},
        {"fusion": {"type": "linear", "project": ["below"]}},
        {"gain": {"init": -1, "learn": False}},
        {"reads": ["below", 1]},
        {"init": "fast"},
        {"init": "fast", "gain": {"init": 0.5}},
        {"init": "fast", "gain": {"learn": False}},
    ],
)
def test_dump_loads_again(changes: dict[str, Any]) -> None:
    data = net(**changes)
    data["levels"][1] |= {"stride": 1, "reads": ["below", "stem"]}
    spec = load_spec(data)
    text = yaml.safe_dump(dump(spec))
    assert load_spec(yaml.safe_load(text)) == spec


def test_dump_contains_the_initialization_but_not_its_values() -> None:
    data = dump(load_spec(net(init="fast", gain={"min_abs": 0.125})))
    assert (data["init"], data["gain"]) == ("fast", {"min_abs": 0.125})
    assert load_spec(data, ["init=paper"]).gain.init == 0.5


def test_spec_is_frozen_survives_pickle_and_takes_overrides() -> None:
    spec = load_spec(net())
    with pytest.raises(ValueError, match="frozen"):
        spec.columns = 3
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert load_spec(spec) is spec
    assert load_spec(spec, ["columns=5"]) == load_spec(net(columns=5))


OWN_OPTIONS = """
import enum
from typing import Literal, Optional
from torch import nn

class Mode(enum.Enum):
    SOFT = "soft"

class Block(nn.Module):
    def __init__(self, dim: int, sizes: tuple[int, ...] = (), weights: list[float] = [], mode: Mode = None,
                 act: Literal["relu", "gelu"] = "relu", bias: Optional[bool] = None, anything=None,
                 norm: type[nn.Module] = nn.LayerNorm, odd: "set[NoSuchName]" = None, depth: int = 7):
        super().__init__()
        self.given = {**locals()}

    def forward(self, x):
        return x
"""


def test_options_have_the_types_of_the_signature(own_modules: Path) -> None:
    (own_modules / "own_options.py").write_text(OWN_OPTIONS)
    file = own_modules / "net.yaml"
    options = "sizes: [1, 2], weights: [1, 2.5], mode: soft, act: gelu, bias: true, anything: {a: [1]}, odd: 1"
    file.write_text(NET.replace("block: convnext", f"block: 'own_options:Block', {options}", 1))
    given = revnets.build(file).columns.cells[0][0].function.blocks[0].given
    expected = {"sizes": (1, 2), "weights": [1.0, 2.5], "act": "gelu", "bias": True, "anything": {"a": [1]}, "odd": 1}
    assert {key: given[key] for key in expected} == expected
    assert given["mode"].name == "SOFT"
    assert given["depth"] == 7  # `depth: 1` is a key of the level, not an argument of the block


def test_dict_may_contain_values_that_files_cannot(own_modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_modules / "own_options.py").write_text(OWN_OPTIONS)
    monkeypatch.syspath_prepend(own_modules)
    level = {"dim": 8, "depth": 1, "block": "own_options:Block", "norm": torch.nn.BatchNorm2d}
    spec = load_spec(net(levels=[level, level], drop_path=0))
    assert spec.levels[0].options["norm"] is torch.nn.BatchNorm2d
    with raises_error(code="invalid-value", key="levels.0.norm"):
        load_spec(net(levels=[level | {"norm": int}, level]))


def test_columns_require_no_stem() -> None:
    data = {key: value for key, value in net().items() if key not in ("stem", "head", "taps")}
    columns = load(revnets.ColumnsSpec, data)
    assert not {"stem", "head", "taps"} & set(revnets.ColumnsSpec.model_fields)
    torch.manual_seed(0)
    ours = revnets.build_columns(columns).state_dict()
    torch.manual_seed(0)
    theirs = revnets.build_columns(load_spec(net())).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with raises_error(code="unknown-key", key="stem"):
        load(revnets.ColumnsSpec, net(head=None))


def test_overrides_may_be_values() -> None:
    assert load_spec(net(), {"columns": 5, "gain.init": 0.25}) == load_spec(net(), ["columns=5", "gain.init=0.25"])


def test_untrusted_spec_is_validated_again() -> None:
    spec = load_spec(net())
    first = spec.levels[0].model_copy(update={"block": "torch.nn:Identity", "options": {}})
    with raises_error(code="not-trusted", key="levels.0.block"):
        revnets.build(spec.model_copy(update={"levels": (first, *spec.levels[1:])}), trust=False)
    assert load_spec(spec, trust=False) == spec
