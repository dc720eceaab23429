"""Components by name and by import path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import revnets
from revnets.config import registry
from revnets.config.errors import PartError
from revnets.config.registry import find_component, names, options
from tests.support.errors import raises_error


@pytest.fixture(autouse=True)
def _registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {kind: dict(parts) for kind, parts in registry._REGISTRY.items()})


class Doubling(nn.Module):
    def __init__(self, dim: int, times: int = 2):
        super().__init__()
        self.times = times

    def forward(self, x):
        return x * self.times


def test_registered_components_are_found_by_name() -> None:
    kinds = {"block": revnets.register_block, "fusion": revnets.register_fusion,
             "stem": revnets.register_stem, "head": revnets.register_head}  # fmt: skip
    for kind, register in kinds.items():
        part = type("Part", (nn.Module,), {})
        assert register(f"my_{kind}")(part) is part
        assert find_component(kind, f"my_{kind}") is part
        assert [other for other in kinds if f"my_{kind}" in names(other)] == [kind]


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("block", "vit_post_norm", "vision.vit:PostNormBlock"),
        ("stem", "patch_embed", "vision.vit:PatchEmbed"),
    ],
)
def test_components_of_vision_are_found_by_name_and_path(kind: str, name: str, path: str) -> None:
    pytest.importorskip("timm")
    for trust in (True, False):
        assert find_component(kind, name, trust=trust) is find_component(kind, path, trust=trust)
    assert name in names(kind)


def test_names_and_paths_of_vision_components_build_the_same_network() -> None:
    pytest.importorskip("timm")
    builds = []
    for stem, block in (("patch_embed", "vit_post_norm"), ("vision.vit:PatchEmbed", "vision.vit:PostNormBlock")):
        level = {"dim": 6, "depth": 1, "block": block, "heads": 3}
        torch.manual_seed(0)
        stem = {"type": stem, "img_size": 10, "patch": 5}
        builds.append(revnets.build({"columns": 2, "stem": stem, "fusion": "linear", "levels": [level, level]}))
    for one, other in zip(builds[0].state_dict().items(), builds[1].state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_registered_block_may_have_the_name_of_a_vision_block() -> None:
    revnets.register_block("vit_post_norm")(Doubling)
    assert find_component("block", "vit_post_norm") is Doubling


def test_registered_block_is_built_and_its_options_are_checked() -> None:
    revnets.register_block("doubling")(Doubling)
    level = {"dim": 8, "depth": 1, "block": "doubling", "times": 3}
    data = {"columns": 1, "stem": "patchify", "levels": [level, level]}
    assert revnets.build(data).columns.cells[0][1].function.blocks[0].times == 3
    with raises_error(code="number-as-text", key="levels.1.times", source="command line", names='"3"'):
        revnets.build(data, ["levels.1.times='3'"])


def test_names_are_unique() -> None:
    revnets.register_block("doubling")(Doubling)
    revnets.register_block("doubling")(Doubling)  # registered twice
    again = type("Doubling", (nn.Module,), {"__module__": Doubling.__module__, "__qualname__": Doubling.__qualname__})
    revnets.register_block("doubling")(again)  # its module runs a second time
    assert find_component("block", "doubling") is again
    with raises_error(ValueError, code="name-clash", key="name", names=["'doubling'", Doubling.__module__]):
        revnets.register_block("doubling")(nn.Identity)
    with raises_error(ValueError, code="invalid-value", key="name", names="'my:block'"):
        revnets.register_block("my:block")


def test_built_in_components() -> None:
    assert set(names("block")) >= {"convnext", "vit", "mlp"}
    assert set(names("fusion")) >= {"convnext", "linear", "identity"}
    assert set(names("stem")) >= {"patchify", "tokens", "linear"}
    assert set(names("head")) >= {"classifier"}


def test_unknown_names() -> None:
    with raises_error(PartError, code="unknown-component", names=['"convnest"', "Did you mean convnext?"]):
        find_component("block", "convnest")
    with raises_error(PartError, code="unknown-component", names=["package.module:Class", *names("block")]):
        find_component("block", "zzz")


def test_options_are_the_remaining_arguments() -> None:
    assert list(options("block", "convnext")) == ["kernel_size", "expand", "layer_scale", "drop_path", "shortcut"]
    assert list(options("fusion", "linear")) == ["project", "norm"]
    assert list(options("head", "classifier")) == ["num_classes", "dropout"]
    assert list(options("block", "torch.nn:Identity")) == ["**"]


FUNCTION = """
from torch import nn

def pair(dim: int, *, bias: bool = True):
    return nn.Linear(dim, dim, bias)
"""


def test_registered_function_is_a_component(own_modules: Path) -> None:
    (own_modules / "own_function.py").write_text(FUNCTION)
    with raises_error(PartError, code="invalid-component", names=["own_function:pair", "revnets.register_block"]):
        options("block", "own_function:pair", [own_modules])
    registered = FUNCTION.replace("def pair", "@revnets.register_block('pair')\ndef pair")
    (own_modules / "own_registered.py").write_text(f"import revnets\n{registered}")
    importlib.invalidate_caches()
    assert list(options("block", "own_registered:pair", [own_modules])) == ["bias"]
    assert list(options("block", "pair")) == ["bias"]


def test_modules_next_to_the_file_and_in_the_working_directory(own_modules: Path, monkeypatch) -> None:
    for folder, name in (("yaml", "own_beside"), ("work", "own_working"), ("base", "own_base")):
        (own_modules / folder).mkdir()
        (own_modules / folder / f"{name}.py").write_text("from torch.nn import Identity as Block\n")
    monkeypatch.chdir(own_modules / "work")
    blocks = [f"{{dim: 8, depth: 1, block: '{name}:Block'}}" for name in ("own_beside", "own_working", "own_base")]
    (own_modules / "base" / "base.yaml").write_text(f"columns: 1\nstem: patchify\nlevels: [{', '.join(blocks)}]")
    (own_modules / "yaml" / "net.yaml").write_text("base: ../base/base.yaml\ncolumns: 2")
    before = list(sys.path)
    net = revnets.build("../yaml/net.yaml")
    assert sys.path == before
    assert {type(block) for cell in net.columns.flat() for block in cell.function.blocks} == {nn.Identity}
    revnets.build(net.spec)  # later, from elsewhere


def test_another_module_of_the_same_name(own_modules: Path) -> None:
    """Of two experiments with a blocks.py each, the second must not get the classes of the first."""
    for folder in ("one", "two"):
        (own_modules / folder).mkdir()
        (own_modules / folder / "own_twin.py").write_text("from torch.nn import Identity as Block\n")
    find_component("block", "own_twin:Block", [own_modules / "one"])
    find_component("block", "own_twin:Block", [own_modules / "one"])
    with raises_error(PartError, code="name-clash", names=str(own_modules / "one" / "own_twin")):
        find_component("block", "own_twin:Block", [own_modules / "two"])
    (own_modules / "two" / "math.py").write_text("")
    with raises_error(PartError, code="name-clash", names=str(own_modules / "two" / "math.py")):
        find_component("block", "math:sqrt", [own_modules / "two"])


def test_custom_package(own_modules: Path) -> None:
    package = own_modules / "own_package" / "parts"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "more.py").write_text("from torch.nn import Identity as Block\n")
    importlib.invalidate_caches()
    assert find_component("block", "own_package.parts.more:Block", [own_modules]) is nn.Identity
    with raises_error(PartError, code="missing-module", names="own_package.parts.less"):
        find_component("block", "own_package.parts.less:Block", [own_modules])
