"""plan, audit and show accept the names of registered models and import paths."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import revnets
from revnets.cli import main
from revnets.models import loading
from revnets.models.loading import load_model
from tests.support.errors import assert_error, raises_error
from tests.support.paths import ROOT

MODULE = """
import torch
from torch import nn
import revnets


class Model(nn.Module):
    def __init__(self, depth=4, bias=True):
        super().__init__()
        self.body = revnets.ReversibleSequence([nn.Linear(7, 7, bias=bias) for _ in range(depth)])

    def forward(self, x):
        return self.body(x)[-1]


def names():
    return ["small_model", "plain_model"]


def create(name, **options):
    return Model(**options) if name == "small_model" else nn.Linear(7, 7)


def number():
    return 5
"""


@pytest.fixture
def providers(own_modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a package with two models, and one whose requirements are missing."""
    (own_modules / "my_models.py").write_text(MODULE)
    (own_modules / "broken_models.py").write_text("import missing_module")
    monkeypatch.chdir(own_modules)
    monkeypatch.syspath_prepend(own_modules)
    entries = [EntryPoint("broken", "broken_models", loading.GROUP), EntryPoint("mine", "my_models", loading.GROUP)]
    monkeypatch.setattr(loading, "entry_points", lambda group: entries if group == loading.GROUP else [])


@pytest.mark.parametrize("name", ["small_model", "my_models:Model"])
def test_load_by_name_and_by_import_path(providers: None, name: str) -> None:
    model = load_model(name, ["depth=6", "bias=false"])
    assert [parameter.shape for parameter in model.parameters()] == [(7, 7)] * 6


def test_other_sources_are_passed_to_build(tmp_path: Path) -> None:
    data = {"columns": 2, "stem": "patchify", "levels": [{"dim": 8, "depth": 1, "block": "convnext"}] * 2}
    (tmp_path / "net.yaml").write_text(json.dumps(data))
    for source in (data, revnets.load_spec(data), tmp_path / "net.yaml", str(tmp_path / "net.yaml")):
        model = load_model(source, ["columns=3"])
        assert isinstance(model, revnets.Net)
        assert model.spec.columns == 3


@pytest.mark.parametrize(
    ("name", "overrides", "code", "names"),
    [
        ("smal_model", [], "unknown-model", ["broken", "Did you mean small_model?"]),
        ("xyz", [], "unknown-model", "package.module:function"),
        ("small_model", ["dept=3"], "component-failed", "'dept'"),
        ("my_models:Modl", [], "unknown-component", ["my_models", '"Modl"', "Did you mean Model?"]),
        ("no_models:Model", [], "missing-module", "no_models"),
        ("my_models:number", [], "invalid-component", ["a int", "torch.nn.Module"]),
        ("net.yml", [], "missing-file", ()),
    ],
)
def test_invalid_sources_raise(
    providers: None, name: str, overrides: list[str], code: str, names: str | list[str]
) -> None:
    with raises_error(code=code, source=name, key="", names=names):
        load_model(name, overrides)


def test_override_without_a_value_raises(providers: None) -> None:
    with raises_error(code="invalid-override", source="command line", key="depth"):
        load_model("small_model", ["depth"])


def test_plan_by_name(providers: None) -> None:
    found = revnets.plan("small_model", (11, 7), modes=("exact",))
    assert found.modes[0].parameters == 4 * 4 * (49 + 7)


def test_commands_by_name(providers: None) -> None:
    run = CliRunner().invoke
    done = run(main.app, ["audit", "small_model", "depth=8", "--input", "7", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["model"] == "Model"
    assert [(mode["mode"], mode["equal"]) for mode in found["modes"]][-1] == ("exact", True)
    assert all(mode["seconds"] > 0 for mode in found["modes"])
    done = run(main.app, ["plan", "my_models:Model", "--input", "7", "--batch", "3", "--json"])
    assert json.loads(done.stdout)["input_shape"] == [3, 7]
    for arguments, code, key, names in (
        (["audit", "plain_model", "--input", "7"], "no-columns", "", "Linear"),
        (["audit", "small_model"], "missing-shape", "stem", "--input"),
        (["audit", "small_model", "--input", "8"], "input-rejected", "", "(8,)"),
        (["show", "small_model", "--input", "7"], "no-spec", "", "audit"),
    ):
        failed = run(main.app, arguments)
        assert_error(failed.exception, code=code, source=arguments[1], key=key, names=names)


def test_wrong_gradient_exits_with_code_1(providers: None, own_modules: Path) -> None:
    (own_modules / "noisy.py").write_text(
        "import torch, revnets\n"
        "class Noisy(torch.nn.Linear):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        Noisy.calls += 1\n"
        "        return super().forward(x) * Noisy.calls\n"
        "def net():\n"
        "    return revnets.ReversibleSequence([Noisy(7, 7) for _ in range(6)])\n"
    )
    done = CliRunner().invoke(main.app, ["audit", "noisy:net", "--input", "7"])
    assert done.exit_code == 1
    assert "WRONG" in done.output


def test_timm_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(loading, "entry_points", lambda group: [EntryPoint("timm", "vision.revcol", group)])
    with torch.device("meta"):
        model = load_model("revcol_tiny", ["columns=2", "num_classes=7"])
    assert isinstance(model, nn.Module)
    assert model.columns.graph.columns == 2
    with raises_error(code="unknown-model", source="revcol_tinny", names="Did you mean revcol_tiny?"):
        load_model("revcol_tinny")
    done = CliRunner().invoke(main.app, ["plan", "test_revcol", "columns=2", "--batch", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["input_shape"][:2] == [2, 3]
    failed = CliRunner().invoke(main.app, ["audit", "resnet10t", "--input", "3,32,32"])
    assert_error(failed.exception, code="no-columns", source="resnet10t", names=["ResNet", "--reversible"])


def test_entry_point_of_timm_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'[project.entry-points."{loading.GROUP}"]\ntimm = "vision.revcol"' in text
