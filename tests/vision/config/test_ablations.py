"""The models of the paper's ablations: their sizes, the page that lists them, and their training."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import revnets
from tests.support.errors import raises_error
from tests.support.paths import ROOT
from vision.config.run import load_config
from vision.data.dataset import ImageData
from vision.paths import CONFIGS
from vision.tasks.builders import build_model

FOLDER = CONFIGS / "ablations"
PAGE = (ROOT / "docs/results/ablations.md").read_text(encoding="utf-8")

SIZES = {  # M parameters and G multiply-accumulates at 224, here; and what the paper prints
    "columns_1": (28.33, 4.37, "28", "4.4"),
    "columns_4": (30.46, 4.52, "30", "4.5"),
    "columns_8": (34.08, 4.63, "34", "4.7"),
    "columns_12": (33.03, 4.34, "33", "4.4"),
    "columns_20": (34.58, 4.12, "35", "4.2"),
    "multi_branch": (34.61, 4.99, "35", "4.9"),
    "revnet": (33.65, 4.54, "34", "4.5"),
    "kernel_3": (30.46, 4.52, "", "4.5"),
    "kernel_5": (30.61, 4.57, "", "4.5"),
    "kernel_7": (30.84, 4.65, "", "4.6"),
    "kernel_11": (31.54, 4.90, "", ""),
    "vit_base_columns_1": (57.94, 16.28, "", "18"),
    "vit_base_columns_2": (58.83, 16.50, "", "18"),
    "vit_base_columns_4": (60.62, 16.96, "", "18"),
    "vit_base_columns_8": (64.19, 17.86, "", "18"),
}


@cache
def measured(name: str) -> tuple[float, float]:
    """M parameters and G multiply-accumulates."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = revnets.build(FOLDER / f"{name}.yaml").eval()
        net(torch.empty(1, 3, 224, 224))
    return sum(parameter.numel() for parameter in net.parameters()) / 1e6, counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    assert measured(name) == pytest.approx(SIZES[name][:2], abs=0.0051)


def test_the_page_lists_every_model_next_to_the_paper() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, flags=re.MULTILINE))
    files = {file.stem for file in FOLDER.glob("*.yaml") if not file.stem.startswith("fashion_")}
    assert rows.keys() == files == SIZES.keys()
    for name, row in rows.items():
        _, _, parameters, macs, paper, paper_macs = (cell.strip() for cell in row.split("|"))
        assert (parameters, macs) == tuple(f"{value:.2f}" for value in SIZES[name][:2])
        assert (paper, paper_macs) == SIZES[name][2:]


@pytest.mark.parametrize("name", ["multi_branch", "revnet"])
def test_the_trainer_accepts_them(name: str) -> None:
    config = load_config("revcol_tiny_in1k", [f"model={FOLDER / name}.yaml", "supervision=null"])
    data = ImageData(None, None, tuple(map(str, range(1000))), (3, 224, 224), (0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        model = build_model(config, data)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(measured(name)[0])


def test_kernels_and_columns() -> None:
    base = revnets.load_spec(FOLDER / "columns_4.yaml")
    assert base == revnets.load_spec(FOLDER / "kernel_3.yaml")
    assert base == revnets.load_spec(CONFIGS / "models" / "revcol_tiny.yaml")
    for name in SIZES:
        spec = revnets.load_spec(FOLDER / f"{name}.yaml")
        kind, number = name.rpartition("_")[::2]
        if kind == "kernel":
            assert {level.options.get("kernel_size", 3) for level in spec.levels} == {int(number)}
        elif number.isdigit():
            assert spec.columns == int(number)


@pytest.mark.parametrize("name", ["fashion_multi_branch", "fashion_revnet"])
def test_small_models_have_the_connections_of_large_ones(name: str) -> None:
    small, large = (revnets.load_spec(FOLDER / f"{stem}.yaml") for stem in (name, name.removeprefix("fashion_")))
    assert small.graph() == large.graph()
    assert (small.fusion, small.gain, small.reductions()) == (large.fusion, large.gain, large.reductions())
    torch.manual_seed(0)
    net, images = revnets.build(small), torch.randn(4, 1, 32, 32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(net(images), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_supervision_needs_a_timm_model() -> None:
    with raises_error(code="conflicting-values", key="supervision", names="timm"):
        load_config("revcol_tiny_in1k", [f"model={FOLDER / 'columns_8.yaml'}"])
