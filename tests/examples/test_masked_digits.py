"""`examples/quickstart/masked_digits.py`, with a few epochs of a narrow network."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import revnets
from revnets.config.memory_budget import parse_bytes
from tests.support.paths import ROOT

MODES = ("store", "exact")
SCRIPT = ROOT / "examples/quickstart/masked_digits.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_masking(script: dict) -> None:
    images = torch.rand(7, 1, 8, 8) + 1
    x, hidden = script["masked"](images, torch.Generator().manual_seed(0))
    assert x.shape == (7, 2, 8, 8)
    assert torch.equal(x[:, :1], images.masked_fill(hidden, 0))
    assert torch.equal(x[:, 1:], 1.0 - hidden.float())
    patches = hidden.unflatten(3, (4, 2)).unflatten(2, (4, 2))
    assert torch.equal(patches.all(dim=(3, 5)), patches.any(dim=(3, 5)))  # whole patches
    assert (patches.all(dim=(3, 5)).sum(dim=(1, 2, 3)) == script["MASKED"]).all()
    found = images.clone()
    found[hidden] += 3
    assert script["error"](found + (~hidden), images, hidden) == pytest.approx(9, rel=1e-5)


def test_gradients_equal_store(script: dict) -> None:
    torch.manual_seed(0)
    model = script["MaskedAutoencoder"](revnets.build(SCRIPT.with_suffix(".yaml")))
    images = torch.rand(3, 1, 8, 8)
    x, hidden = script["masked"](images, torch.Generator().manual_seed(0))
    gradients = {}
    for mode in MODES:
        model.net.columns.memory = mode
        gradients[mode] = torch.autograd.grad(script["error"](model(x), images, hidden), list(model.parameters()))
    assert all(map(torch.equal, gradients["exact"], gradients["store"]))
    assert all(gradient.any() for gradient in gradients["exact"])


def test_script_learns_and_prints_memory(script: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = [f"levels.{level}.dim={dim}" for level, dim in enumerate((8, 16, 32))]
    script["main"]([*narrow, "columns={up: 1, down: 1}", "constant.column=1"], 3, tmp_path / "runs" / "digits.png")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    trained, mean = (float(re.search(rf"{words}: ([\d.]+)", printed)[1]) for words in ("held-out images", "mean image"))
    assert len(losses) == 1
    assert trained < 3 * mean
    store, exact = (parse_bytes("".join(re.search(rf"{mode} saves (\S+) (\S+)", printed).groups())) for mode in MODES)
    assert exact < store / 3
    assert (tmp_path / "runs" / "digits.png").read_bytes()[:4] == b"\x89PNG"
