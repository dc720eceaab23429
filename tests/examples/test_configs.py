"""Every example is built at full size, and trained for one step at a small size."""

from __future__ import annotations

import runpy

import pytest
import torch
from torch import Tensor

import revnets
from revnets.memory.tracker import kept_bytes
from tests.support.paths import ROOT

FOLDER = ROOT / "examples/configs"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))

SMALLER = {
    "huge_reads": [f"levels.{level}.{key}" for level in range(4) for key in (f"dim={8 * 2**level}", "depth=1")],
    "mixed": ["levels.0.dim=12", "levels.1.dim=18", "levels.2.dim=24", "levels.3.dim=36", "columns=3"],
    "revcol_small": ["levels.0.dim=8", "levels.1.dim=12", "levels.2.dim=16", "levels.3.dim=20"],
    "vit": ["stem.img_size=32", "stem.patch=8", *(f"levels.{level}.dim=32" for level in range(4))],
}


@pytest.fixture(params=NAMES)
def net(request: pytest.FixtureRequest) -> revnets.Net:
    torch.manual_seed(0)
    return revnets.build(FOLDER / f"{request.param}.yaml", SMALLER.get(request.param, []))


def loss_of(net: revnets.Net, x: Tensor) -> Tensor:
    """Compute the cross entropy of the logits plus a term for every intermediate output."""
    torch.manual_seed(1)  # equal dropout in every call
    out = net(x)
    logits, taps = out if net.spec.taps else (out, [])
    labels = torch.arange(len(x)) % logits.shape[1]
    return torch.nn.functional.cross_entropy(logits, labels) + sum(tap.square().mean() for tap in taps)


def test_training_step(net: revnets.Net) -> None:
    first, *sides = net.stem.example_shape
    x = torch.randn(8, first, *(32 for _ in sides))
    parameters = list(net.parameters())
    grads = {}
    for memory in ("exact", "store"):
        net.columns.memory = memory
        grads[memory] = torch.autograd.grad(loss_of(net, x), parameters)
    assert all(torch.equal(exact, store) for exact, store in zip(grads["exact"], grads["store"], strict=True))
    assert all(grad.isfinite().all() and grad.any() for grad in grads["exact"])
    with torch.no_grad():
        before = loss_of(net, x)
        for parameter, grad in zip(parameters, grads["exact"], strict=True):
            parameter -= 1e-3 * grad
        assert loss_of(net, x) < before


@pytest.mark.parametrize("name", NAMES)
def test_file_starts_with_comment_and_builds_at_full_size(name: str) -> None:
    file = FOLDER / f"{name}.yaml"
    assert file.read_text().startswith("# ")
    with torch.device("meta"), torch.no_grad():
        net = revnets.build(file)
        shape = (2, *net.stem.example_shape)
        out = net(torch.empty(shape))
    logits, taps = out if net.spec.taps else (out, [])
    assert logits.shape == (2, net.spec.head.options["num_classes"])
    assert len(taps) == len(net.spec.taps)


def test_examples_match_their_descriptions() -> None:
    specs = {name: revnets.load_spec(FOLDER / f"{name}.yaml") for name in NAMES}
    assert {level.block for level in specs["mixed"].levels} == {"convnext", "vit"}
    assert len(specs["revnet"].levels) == 2
    assert (specs["revnet"].reads, specs["revnet"].gain.init, specs["revnet"].gain.learn) == ((1,), 1.0, False)
    assert len(specs["eq2"].graph().nodes[-2].reads) == len(specs["eq2"].levels) - 1
    assert (specs["revcol_small"].columns, specs["revcol_small"].taps) == (8, (1, 3, 5))
    assert specs["revcol_small"].levels == specs["revcol_tiny"].levels
    assert len({level.dim for level in specs["vit"].levels}) == 1


def test_revnet_memory_does_not_grow_with_columns() -> None:
    x = torch.randn(2, 3, 16, 16)
    kept = [kept_bytes(revnets.build(FOLDER / "revnet.yaml", [f"columns={columns}"]), x) for columns in (4, 8)]
    assert kept[0] == kept[1]


def test_revvit_script(capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(ROOT / "examples/quickstart/revvit.py"))
    module["main"](depth=3, dim=24, heads=3)
    out = capsys.readouterr().out
    assert "equal bit for bit" in out
    plain, reversible = (float(line.split(" saves ")[1].split()[0]) for line in out.splitlines()[1:])
    assert 0 < reversible < plain / 5


def test_revvit_script_detects_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "examples/quickstart/revvit.py"))
    add = module["Plain"].forward

    def wrong(self, x: Tensor) -> list[Tensor]:
        return add(self, x * 1.0001)

    monkeypatch.setattr(module["Plain"], "forward", wrong)
    with pytest.raises(SystemExit, match="gradients differ"):
        module["main"](depth=2, dim=24, heads=3)
