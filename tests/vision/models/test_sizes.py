"""The published parameters and multiply-accumulates of every model, on the meta device."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import revnets
import vision
from tests.support.paths import ROOT
from vision.config.learning import SupervisionConfig
from vision.revcol import MODELS, REVISED
from vision.supervision.supervised import Supervised

FAMILY = {
    # millions of parameters, G multiply-accumulates at 224, and with the heads of ImageNet-1K and 22K: Table 1 of the
    # paper gives them shorter, the released code to these places
    "revcol_tiny": (30.456, 4.517, 33.064, 79.50),
    "revcol_small": (60.568, 9.044, 63.176, 109.61),
    "revcol_base": (138.616, 16.585, 141.695, 193.77),
    "revcol_large": (273.095, 39.306, 280.372, 371.08),
    "revcol_xlarge": (833.807, 120.21, 851.959, 1005.20),
    "revcol_huge": (2157.600, 310.62, 2199.108, 2433.00),
}
VIT = {  # what the stated hyperparameters give, and the variants fitted to Table 9 (16 M, 4.6 G; 67 M, 18.8 G)
    "revcol_vit_small": (20.87, 4.568),
    "revcol_vit_base": (89.06, 18.73),
    "revcol_vit_small_p14": (15.70, 4.631),
    "revcol_vit_base_p14": (66.82, 18.74),
}


@cache
def create(name: str, **options) -> vision.RevCol:
    return timm.create_model(name, device="meta", **options)


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def unused_gains(model: vision.RevCol) -> float:
    """The first column of the published code has unused gains, which count there but not here."""
    return sum(level.dim for level in model.spec.levels) / 1e6


def giga_macs(model: vision.RevCol, size: int) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_of_table_1(name: str) -> None:
    model = create(name)
    parameters, macs, *_ = FAMILY[name]
    assert round(millions(model) + unused_gains(model), 3) == parameters
    assert giga_macs(model.eval(), 224) == pytest.approx(macs, abs=0.005)


@pytest.mark.parametrize(
    ("name", "size", "macs"),
    [("revcol_base", 384, 48.74), ("revcol_large", 384, 115.51), ("revcol_huge", 640, 2535.6)],
)
def test_at_the_resolution_of_fine_tuning(name: str, size: int, macs: float) -> None:
    assert giga_macs(create(name).eval(), size) == pytest.approx(macs, rel=1e-4)


@pytest.mark.parametrize("name", VIT)
def test_the_isotropic_models(name: str) -> None:
    model = create(name)
    assert millions(model) + unused_gains(model) == pytest.approx(VIT[name][0], abs=0.006)
    assert giga_macs(model.eval(), 224) == pytest.approx(VIT[name][1], abs=0.006)


@pytest.mark.parametrize("name", FAMILY)
def test_with_intermediate_supervision(name: str) -> None:
    model = create(name)
    for classes, expected in zip((21841, 1000), FAMILY[name][:1:-1], strict=True):
        with torch.device("meta"):
            model.reset_classifier(classes)
            supervised = Supervised(model, SupervisionConfig())
        assert millions(supervised) + unused_gains(model) == pytest.approx(expected, abs=0.0055)


@pytest.mark.parametrize(
    ("kernel_size", "parameters", "macs"),
    [(5, 30.61, 4.572), (7, 30.85, 4.654), (9, 31.16, 4.763), (11, 31.55, 4.899)],
)
def test_larger_kernels(kernel_size: int, parameters: float, macs: float) -> None:
    """Table 8."""
    model = create("revcol_tiny", kernel_size=kernel_size)
    assert millions(model) + unused_gains(model) == pytest.approx(parameters, abs=0.006)
    assert giga_macs(model.eval(), 224) == pytest.approx(macs, abs=0.001)


@pytest.mark.parametrize("columns", [1, 2, 5, 20])
def test_more_and_fewer_columns(columns: int) -> None:
    """Figure 4; each column has the same size."""
    model = create("revcol_tiny", columns=columns)
    expected = {1: 7.87, 2: 15.40, 5: (30.456 + 7.5277), 20: 150.91}[columns]
    assert millions(model) + unused_gains(model) == pytest.approx(expected, abs=0.006)


def test_an_ablation_of_table_5() -> None:
    model = create("revcol_tiny", columns=12, dims=(40, 80, 160, 320), depths=(1, 2, 3, 2))
    assert millions(model) + unused_gains(model) == pytest.approx(33.03, abs=0.006)
    assert giga_macs(model.eval(), 224) == pytest.approx(4.35, abs=0.006)


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_yaml_builds_the_parameters_of_its_model(file: Path) -> None:
    assert timm.is_model(file.stem)
    with torch.device("meta"):
        net = revnets.build(file)
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    assert shapes == {name: value.shape for name, value in create(file.stem).state_dict().items()}
    assert file.read_text().startswith("# ")


def test_every_model_has_a_yaml() -> None:
    names = timm.list_models(module="revcol")
    assert sorted(names) == sorted(file.stem for file in MODELS.glob("*.yaml"))
    assert len(names) == 13


# ------------------------------------------------------------------------------------------------ the page on vision

PAGES = ROOT / "docs/guides"
PAGE = (PAGES / "image-models.md").read_text(encoding="utf-8")


def test_the_page_lists_every_model_with_its_size() -> None:
    rows = dict(re.findall(r"^\| `(revcol_\w+)` \|(.*)\|$", PAGE, flags=re.MULTILINE))
    assert rows.keys() == FAMILY.keys() | VIT.keys()
    for name, row in rows.items():
        columns, dims, depths, parameters, macs, *_ = (cell.strip() for cell in row.split("|"))
        model = create(name)
        levels = model.spec.levels
        assert int(columns) == model.spec.columns
        assert dims in (", ".join(str(level.dim) for level in levels), f"{levels[0].dim}, at every level")
        assert depths == ", ".join(str(level.depth) for level in levels)
        assert parameters == f"{millions(model):.2f}"
        assert macs == f"{(FAMILY | VIT)[name][1]:.2f}"


def test_what_the_page_shows_runs() -> None:
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert [level.shape[2:] for level in names["backbone"](torch.randn(1, 3, 200, 300))] == [
        (25, 38),
        (13, 19),
        (7, 10),
    ]
    assert names["backbone"].feature_info.reduction() == [8, 16, 32]
    assert [level.shape[1:] for level in names["maps"].values()][::3] == [(256, 56, 80), (256, 7, 10)]
    assert all(parameter.grad is not None for parameter in names["levels"].parameters())
    shown = re.search(r"sorted\(result\)  # (.*)", PAGE)
    assert shown
    assert [word.strip("' ") for word in shown[1].split(",")] == sorted(names["result"])
    assert "top1_1" in names["evaluator"].compute()


def test_what_the_page_on_adding_models_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGES / "adding-models.md"
    blocks = re.findall(
        r"^```(python|yaml)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for kind, text in blocks:
        if file := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            Path(file[1]).write_text(text)
        if kind == "python":
            exec(text, names)
    assert len(names["model"].columns.cells) == 3
    assert [tuple(level.shape[1:]) for level in names["levels"]] == [
        (32, 24, 32),
        (64, 12, 16),
        (128, 6, 8),
        (256, 3, 4),
    ]
    net = names["model"].columns
    x = torch.randn(1, 6, 8, 32)
    grads = []
    for memory in ("store", "exact"):
        net.memory = memory
        loss = sum(level.square().sum() for level in net(x))
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_page_names_every_argument_and_key() -> None:
    words = set(re.findall(r"`(\w+)`", PAGE))
    assert words >= set(REVISED) | set(SupervisionConfig.model_fields)
