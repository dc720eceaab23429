"""`revnets audit` and `revnets plan` with --reversible."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from revnets.cli import main
from revnets.cli.audit import explain_memory, measure
from revnets.cli.common import reversible_model
from revnets.cli.plan import forecast
from revnets.config.errors import SpecError

VIT = ("vit_tiny_patch16_224", ["img_size=32", "depth=5", "embed_dim=24", "num_heads=3", "num_classes=7"])
REQUEST = {"dtype": "float32", "optimizer": None, "ranks": None, "sharding": None, "grad_accum": None, "budget": None}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small GPT-2 in a directory."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=12, n_layer=5, n_head=3, n_positions=23, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_audit_of_a_timm_model(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("timm")
    assert measure(*VIT, None, 2, None, True, blend=0.1) == 0
    numbers = json.loads(capsys.readouterr().out)
    modes = {mode["mode"]: mode for mode in numbers["modes"]}
    assert modes["exact"]["equal"]
    assert modes["exact"]["kept_bytes"] < modes["store"]["kept_bytes"] / 3
    assert 0.9 < numbers["fidelity"]["cosine"] < 1


def test_audit_of_a_transformers_model(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    assert measure(f"hf:{gpt2}", [], None, 2, None, True, blend=0.1) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert all(mode["equal"] for mode in numbers["modes"] if mode["mode"] != "invert")


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_plan_under_a_budget(kind: str, gpt2: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("timm")
    source, overrides = (f"timm:{VIT[0]}", VIT[1]) if kind == "timm" else (f"hf:{gpt2}", [])
    forecast(source, overrides, None, 13, {**REQUEST, "budget": "exact"}, None, True, blend=0.1)
    plan = json.loads(capsys.readouterr().out)
    peaks = {mode["mode"]: mode["peak"] for mode in plan["modes"]}
    assert peaks["exact"] < peaks["store"]
    assert plan["chosen"]["peak"] <= peaks["exact"]
    assert plan["input_shape"] == ([13, 3, 32, 32] if kind == "timm" else [13, 23])


@pytest.mark.parametrize("kind", ["timm", "hf", "yaml"])
def test_parts_of_the_peak(kind: str, gpt2: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    pytest.importorskip("timm")
    source, overrides, blend = {
        "timm": (f"timm:{VIT[0]}", VIT[1], 0.1),
        "hf": (f"hf:{gpt2}", [], 0.1),
        "yaml": ("examples/configs/vectors.yaml", ["columns=2"], None),
    }[kind]
    picture = tmp_path / "peak.png"
    explain_memory(source, overrides, None, 13, "bfloat16", "lion", picture, True, blend=blend)
    numbers = json.loads(capsys.readouterr().out)
    modes = {mode["mode"]: mode for mode in numbers["modes"]}
    assert modes["exact"]["peak"] <= modes["store"]["peak"]
    assert all(mode["parts"]["weights"] >= mode["parts"]["optimizer"] > 0 for mode in modes.values())
    assert numbers["advice"].startswith("exact takes")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "key", "code"),
    [
        ({"optimizer": "sgdm"}, "--optimizer", "unknown-choice"),
        ({"dtype": "int8"}, "--dtype", "unknown-choice"),
        ({"shape": (3, 5)}, "", "input-rejected"),
    ],
)
def test_parts_of_the_peak_without_columns(given: dict[str, object], key: str, code: str):
    options = {"shape": None, "batch": 2, "dtype": "float32", "optimizer": "adamw", "png": None, "json": True} | given
    with pytest.raises(SpecError) as caught:
        explain_memory("examples/configs/vectors.yaml", [], **options)
    assert (caught.value.key, caught.value.code) == (key, code)


@pytest.mark.parametrize("option", ["optimizer", "dtype"])
def test_options_that_require_memory(option: str):
    with pytest.raises(SpecError) as caught:
        main.audit("examples/configs/vectors.yaml", **{option: "lion"})
    assert (caught.value.key, caught.value.code) == (f"--{option}", "conflicting-values")


def test_weights_in_a_directory_are_read(gpt2: Path):
    import torch
    import transformers

    expected = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    model = reversible_model(f"hf:{gpt2}", [], blend=0.1)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


@pytest.mark.parametrize(
    ("source", "blend", "key", "code"),
    [
        ("vit_tiny_patch16_224", None, "", "no-columns"),
        ("vit_tiny_patch16_224", 3.0, "blend", "out-of-range"),
        ("resnet26", 0.1, "blocks", "no-blocks"),
        ("timm:vit_tiny", 0.1, "", "component-failed"),
        ("timm:revcol_tiny", 0.1, "model", "conflicting-values"),
        ("hf:/no/such/folder", 0.1, "", "component-failed"),
    ],
)
def test_models_that_cannot_be_rewired(source: str, blend: float | None, key: str, code: str):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    with pytest.raises(SpecError) as error:
        reversible_model(source, [], blend=blend)
    assert (error.value.key, error.value.code) == (key, code)


def test_directory_with_another_architecture(gpt2: Path, tmp_path: Path):
    config = json.loads((gpt2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["os.system"]}))
    with pytest.raises(SpecError) as error:
        reversible_model(f"hf:{tmp_path}", [], blend=0.1)
    assert (error.value.key, error.value.code) == ("architectures", "unknown-model")


def test_directory_with_too_many_layers(gpt2: Path, tmp_path: Path):
    config = json.loads((gpt2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 10**9}))
    with pytest.raises(SpecError) as error:
        reversible_model(f"hf:{tmp_path}", [], blend=0.1)
    assert (error.value.key, error.value.code) == ("n_layer", "too-large")


def test_pipe_instead_of_a_configuration(tmp_path: Path):
    pytest.importorskip("transformers")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SpecError) as error:
        reversible_model(f"hf:{tmp_path}", [], blend=0.1)
    assert error.value.code == "not-a-file"
