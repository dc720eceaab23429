"""Configurations of others run no code: neither those in checkpoints and run folders, nor a YAML that is looked at.

Each attack makes a file, the canary, when it succeeds. All of them work if everything that can be imported is called.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import revnets
from revnets.config.imports import PACKAGES, is_in_project
from revnets.config.registry import find_component, options
from tests.support.command_batch import run_batch
from tests.support.errors import raises_error
from tests.support.paths import ROOT
from tests.support.training_runs import tiny
from vision import load_run
from vision.config.run import load_config
from vision.training.trainer import Trainer

CANARY = "canary"
CODE = f"__import__('pathlib').Path('{CANARY}').touch()"
MODULE = f"""
from pathlib import Path
from torch import nn
from vision.tasks import Task
Path('{CANARY}').touch()
class Part(nn.Module):
    default_stride = 1
    def __init__(self, **options):
        super().__init__()
"""

FUNCTIONS: dict[str, dict[str, Any]] = {
    "sympy:simplify": {"expr": CODE},
    "sympy:solve": {"f": CODE},
    "sympy:factor": {"f": CODE},
    "sympy:trigsimp": {"expr": CODE},
    "torch.hub:load": {"repo_or_dir": "hub", "model": "net", "source": "local"},
    "logging:basicConfig": {"filename": CANARY, "filemode": "w", "force": True},
}
"""Functions of installed packages that run what they are given, with such options."""

MODULES = ("in_working_directory", "beside_yaml.more", "beside_base")
"""Modules whose import alone runs code, by the places where they are."""


def net(block: dict[str, Any], **parts: Any) -> dict[str, Any]:
    levels = [{"dim": 3, "depth": 1, **block}, {"dim": 5, "depth": 1, "block": "convnext"}]
    model = {"columns": 2, "stem": {"type": "patchify", "in_chans": 1, "patch": 2}, "levels": levels}
    return {**model, "head": {"type": "classifier", "num_classes": 10}, **parts}


GOOD = {"block": "convnext"}
PARTS = {f"block {name}": net({"block": name, **given}) for name, given in FUNCTIONS.items()}
PARTS |= {f"block {name}": net({"block": f"{name}:Part"}) for name in MODULES}
PARTS |= {
    f"{kind} {name}": net(GOOD, **{kind: {"type": name, **given}})
    for kind in ("stem", "fusion", "head")
    for name, given in [("sympy:simplify", FUNCTIONS["sympy:simplify"]), ("in_working_directory:Part", {})]
}
"""Nets, by the attack that is in them."""

CALLED = [name for name in PARTS if not any(module in name for module in ("_directory", "beside"))]
"""Those of functions, which no command calls; modules that a YAML names are imported by commands that run it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict[str, Any]:
    """The content of a checkpoint of `revnets train`."""
    folder = tmp_path_factory.mktemp("run")
    done = Trainer(load_config(tiny(folder / "run", epochs=1, ema=None, mixup=None))).fit()
    return torch.load(done.last, weights_only=True)


def write_modules(folder: Path) -> None:
    """The modules of all attacks, each in its place around `folder`, which commands run in."""
    places = {"in_working_directory": ".", "beside_base": "base"}
    for name, place in places.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / f"{name}.py").write_text(MODULE)
    (folder / "yaml" / "beside_yaml").mkdir(parents=True)
    (folder / "yaml" / "beside_yaml" / "__init__.py").write_text(MODULE)
    (folder / "yaml" / "beside_yaml" / "more.py").write_text("from . import Part\n")
    (folder / "hub").mkdir()
    (folder / "hub" / "hubconf.py").write_text(MODULE + "def net(**options):\n    return Part()\n")


def case(folder: Path, *argv: object) -> dict[str, Any]:
    return {"folder": str(folder), "canary": str(folder / CANARY), "argv": [str(word) for word in argv]}


# ---------------------------------------------------------------------------------------------------------------- YAML

LOOKING = {
    "show": ("show", "yaml/net.yaml"),
    "plan": ("plan", "yaml/net.yaml", "--no-trust"),
    "audit": ("audit", "yaml/net.yaml", "--no-trust"),
    "gains": ("analyze", "gains", "yaml/net.yaml"),
    "memory": ("analyze", "memory", "yaml/net.yaml", "--measure-columns", "1"),
    "cka": ("analyze", "cka", "yaml/run.yaml"),
    "layercam": ("analyze", "layercam", "yaml/run.yaml"),
    "eval": ("eval", "weights.pth", "--config", "yaml/run.yaml"),
}
RUNNING = {
    "plan": ("plan", "yaml/net.yaml"),
    "audit": ("audit", "yaml/net.yaml"),
    "train": ("train", "yaml/run.yaml"),
}


@pytest.fixture(scope="module")
def of_yaml(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder, cases = tmp_path_factory.mktemp("yaml"), {}
    for number, (attack, model) in enumerate(PARTS.items()):
        place = folder / str(number)
        write_modules(place)
        (place / "base" / "net.yaml").write_text(yaml.safe_dump(model))
        (place / "base" / "run.yaml").write_text(yaml.safe_dump(tiny(place / "run", model=model)))
        for name in ("net", "run"):
            (place / "yaml" / f"{name}.yaml").write_text(f"base: ../base/{name}.yaml\n")
        torch.save({}, place / "weights.pth")
        commands = {f"look {name}": argv for name, argv in LOOKING.items()}
        if attack in CALLED:
            commands |= {f"run {name}": argv for name, argv in RUNNING.items()}
        cases |= {f"{command}, {attack}": case(place, *argv) for command, argv in commands.items()}
    return run_batch(folder, cases)


@pytest.mark.parametrize("attack", PARTS)
@pytest.mark.parametrize("command", LOOKING)
def test_commands_that_look_at_a_yaml_run_nothing(of_yaml, command, attack):
    result = of_yaml[f"look {command}, {attack}"]
    assert not result["fired"]
    assert (result["code"], result["exit"]) == ("not-trusted", 2), result
    assert attack.split()[1].partition(":")[0] in result["text"]
    assert "\n" not in result["text"]


@pytest.mark.parametrize("attack", CALLED)
@pytest.mark.parametrize("command", RUNNING)
def test_commands_that_run_a_yaml_call_modules_only(of_yaml, command, attack):
    result = of_yaml[f"run {command}, {attack}"]
    assert not result["fired"]
    assert (result["code"], result["exit"]) == ("invalid-component", 2), result
    assert attack.split()[1] in result["text"]


# --------------------------------------------------------------------------------------------------------- checkpoints

ROUTES = {
    "eval": ("eval", "run/checkpoints/best.pt"),
    "eval of a folder": ("eval", "run"),
    "eval with its config.yaml": ("eval", "weights.pth", "--config", "run/config.yaml"),
    "cka": ("analyze", "cka", "run/checkpoints/best.pt"),
    "cka of its config.yaml": ("analyze", "cka", "run/config.yaml"),
    "layercam": ("analyze", "layercam", "run"),
    "load_run": ("load_run", "run"),
}
"""Ways to use the configuration of a run."""

OTHERS = {
    "convert": ("convert", "run/checkpoints/best.pt", "converted.safetensors"),
    "reshard": ("reshard", "run/checkpoints/best.pt", "shards", "--shards", "2"),
    "gains": ("analyze", "gains", "run"),
    "resume": ("train", "good.yaml", "resume=run/checkpoints/best.pt"),
    "pretrained": ("train", "good.yaml", "output=other", "pretrained.source=run/checkpoints/best.pt"),
}
"""Ways that need nothing of it."""

CONFIGS: dict[str, dict[str, Any]] = {
    **{attack: {"model": model} for attack, model in PARTS.items() if "beside" not in attack},
    "task in_working_directory": {"task": "in_working_directory:Task"},
    "task sympy:simplify": {"task": {"type": "sympy:simplify", "expr": CODE}},
}
"""Configurations, by the attack that is in them: changes of that of a run, where None removes the key."""

FILES: dict[str, dict[str, Any]] = {
    "base": {"base": "base/run.yaml", "model": None},
    "model": {"model": "base/net.yaml"},
}
"""Configurations that name another file, by the key that does it."""


def write_run(folder: Path, state: dict[str, Any], **changes: Any) -> None:
    """The folder of a run, and weights alone, with another configuration."""
    (folder / "run" / "checkpoints").mkdir(parents=True)
    config = {**copy.deepcopy(state["config"]), **changes}
    state = {**state, "config": {key: value for key, value in config.items() if key != "model" or value is not None}}
    torch.save(state, folder / "run" / "checkpoints" / "best.pt")
    torch.save(state["model"], folder / "weights.pth")
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(state["config"]))


@pytest.fixture(scope="module")
def of_checkpoints(tmp_path_factory, checkpoint) -> dict[str, dict[str, Any]]:
    folder, cases = tmp_path_factory.mktemp("checkpoints"), {}
    for number, (attack, changes) in enumerate((CONFIGS | FILES).items()):
        place = folder / str(number)
        write_modules(place)
        write_run(place, checkpoint, **changes)
        model = net({"block": "beside_base:Part"})
        (place / "base" / "net.yaml").write_text(yaml.safe_dump(model))
        (place / "base" / "run.yaml").write_text(yaml.safe_dump(tiny(place / "run", model=model)))
        good = {**checkpoint["config"], "output": str(place / "good")}
        (place / "good.yaml").write_text(yaml.safe_dump(good))
        routes = ROUTES | (OTHERS if attack in ("block sympy:simplify", "task in_working_directory") else {})
        cases |= {f"{route}, {attack}": case(place, *argv) for route, argv in routes.items()}
    return run_batch(folder, cases)


@pytest.mark.parametrize("attack", CONFIGS)
@pytest.mark.parametrize("route", ROUTES)
def test_the_configuration_of_a_run_runs_nothing(of_checkpoints, route, attack):
    result = of_checkpoints[f"{route}, {attack}"]
    assert not result["fired"]
    assert result["code"] == "not-trusted", result
    assert attack.split()[1] in result["text"]
    assert "\n" not in result["text"]


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("route", [route for route in ROUTES if "config.yaml" not in route])
def test_the_configuration_in_a_checkpoint_names_no_other_file(of_checkpoints, route, key):
    result = of_checkpoints[f"{route}, {key}"]
    assert not result["fired"]
    assert (result["code"], result["key"]) == ("not-trusted", key), result


@pytest.mark.parametrize("attack", ["block sympy:simplify", "task in_working_directory"])
@pytest.mark.parametrize("route", OTHERS)
def test_what_needs_no_configuration_does_not_look_at_it(of_checkpoints, route, attack):
    result = of_checkpoints[f"{route}, {attack}"]
    assert not result["fired"]
    assert result["code"] != "not-trusted"


def test_other_keys_of_a_checkpoint_run_nothing(tmp_path, checkpoint, monkeypatch):
    """Models that timm would fetch, weights that it would read, and a shell command for webdataset."""
    monkeypatch.chdir(tmp_path)
    shell = f"pipe:touch {CANARY}; cat x.tar"
    stream = {"name": "wds/", "root": "", "train_split": shell, "val_split": shell, "num_classes": 10, "img_size": 8}
    images = {**stream, "train_samples": 4, "val_samples": 4}
    write_modules(tmp_path)
    model = net(GOOD, stem={"type": "patchify", "in_chans": 3, "patch": 2})
    weights = {**checkpoint, "model": revnets.build(model).state_dict(), "classes": None}
    (tmp_path / "hub" / "config.json").write_text("{}")
    write_run(tmp_path / "stream", weights, model=model, data=images)
    write_run(tmp_path / "timm", checkpoint, model={"timm": f"local-dir:{tmp_path / 'hub'}"})
    results = run_batch(
        tmp_path,
        {name: case(tmp_path, "eval", tmp_path / name / "run") for name in ("stream", "timm")},
    )
    assert [result["fired"] for result in results.values()] == [False, False]
    assert results["timm"]["code"] == "unknown-model"


def test_a_run_of_timms_is_loaded_without_other_weights(tmp_path, checkpoint):
    import timm

    model = timm.create_model("test_revcol", num_classes=10, in_chans=1)
    given = {"timm": "test_revcol", "pretrained": True, "checkpoint_path": str(tmp_path / "missing.pth")}
    state = {**checkpoint, "model": model.state_dict(), "classes": [str(digit) for digit in range(10)]}
    write_run(tmp_path, state, model=given, data={"name": "digits", "img_size": 32})
    run = load_run(tmp_path / "run")
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


# ------------------------------------------------------------------------------------------------------ what is trusted


def test_one_line_and_an_exit_code(tmp_path):
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(PARTS["block sympy:simplify"]))
    done = subprocess.run(
        [sys.executable, "-m", "revnets", "show", "net.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: net.yaml: levels.0.block: ")
    assert all(word in done.stderr for word in ("sympy:simplify", "--trust"))
    assert not (tmp_path / CANARY).exists()


def test_with_trust_classes_of_others_are_used(tmp_path, checkpoint, own_modules, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from revnets.nn.blocks import ConvNeXtBlock\nclass Mine(ConvNeXtBlock): pass\n")
    model = copy.deepcopy(checkpoint["config"]["model"])
    model["levels"][1]["block"] = "mine:Mine"
    write_run(tmp_path, checkpoint, model=model)
    with raises_error(code="not-trusted", key="model.levels.1.block", names=["mine:Mine", "best.pt"]):
        load_run(tmp_path / "run")
    assert "mine" not in sys.modules
    columns = load_run(tmp_path / "run", trust=True).model.columns
    assert type(columns.cells[0][1].function.blocks[0]).__name__ == "Mine"
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(model))
    commands = ("show net.yaml --trust", "audit net.yaml", "plan net.yaml", "eval run --trust")
    results = run_batch(tmp_path, {command: case(tmp_path, *command.split()) for command in commands})
    assert {command: result["text"] for command, result in results.items()} == dict.fromkeys(commands, "")


def test_registered_components_are_trusted(checkpoint, tmp_path, monkeypatch):
    from revnets.config import registry

    monkeypatch.setattr(registry, "_REGISTRY", {kind: dict(parts) for kind, parts in registry._REGISTRY.items()})
    revnets.register_block("mine")(lambda dim, drop_path=0.0: torch.nn.Linear(dim, dim))
    assert list(options("block", "mine", trust=False)) == ["drop_path"]
    assert revnets.build(net({"block": "mine"}), trust=False).columns.cells


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("vision.vit:PostNormBlock", None),
        ("vision.models.vit_blocks:PostNormBlock", None),
        ("revnets.blocks:MLPBlock", None),
        ("revnets.models.net:build", "invalid-component"),
        ("revnets.models.net:nn", "invalid-component"),
        ("vision.models.architecture:NormMlpClassifierHead", "not-trusted"),
        ("revnets.absent:Block", "missing-module"),
        ("revnetsx:Block", "not-trusted"),
        ("Revnets.blocks:MLPBlock", "not-trusted"),
        ("revnets_nlp_extra:Block", "not-trusted"),
        ("..revnets:Block", "not-trusted"),
        ("torch.nn:Identity", "not-trusted"),
        (":Block", "not-trusted"),
    ],
)
def test_classes_of_this_project_are_trusted(name, code):
    if code is None:
        assert issubclass(find_component("block", name, trust=False), torch.nn.Module)
        return
    with raises_error(ValueError, code=code, names=name.rpartition(":")[2]):
        find_component("block", name, trust=False)


def test_a_package_of_the_same_name_is_not_trusted(tmp_path):
    """The working directory of `python -m revnets` comes before all else."""
    (tmp_path / PACKAGES[2]).mkdir()
    (tmp_path / PACKAGES[2] / "__init__.py").write_text(MODULE)
    code = f"from revnets.config.imports import is_in_project; print(is_in_project('{PACKAGES[2]}.blocks'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    assert not (tmp_path / CANARY).exists()
    assert all(is_in_project(package) for package in PACKAGES)


def test_modules_that_a_yaml_does_not_name_are_not_imported(tmp_path, own_modules):
    """`timm` beside a YAML is not what a block of this project imports, trusted or not."""
    for name in ("timm", "torchvision", "einops", "mine"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / CANARY)!r}, 'w')\n")
    block = {"block": "vision.models.vit_blocks:PostNormBlock", "heads": 1}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(net(block)))
    code = "import sys, revnets; print(len(revnets.build(sys.argv[1]).spec.levels))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "net.yaml"], cwd="/", env=environment, check=True)
    assert not (tmp_path / CANARY).exists()
