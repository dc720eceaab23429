"""`revnets train-lm`: a language model in the trainer of `vision.training`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("transformers")
pytest.importorskip("timm")

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from nlp.cli import train_lm
from nlp.language_modeling.training import load_language_run, train_language_model
from revnets import SpecError
from revnets.utils.checkpoint_io import read_checkpoint
from tests.support.errors import raises_error
from vision.config.run import load_config
from vision.training.trainer import Trainer

OWN = {
    "hf": "revcol_lm",
    "hidden_size": 12,
    "columns": 2,
    "levels": 2,
    "num_attention_heads": 2,
    "intermediate_size": 17,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(5):
        lines = [f"{number + line} and {line} are {number + 2 * line}.\n" for line in range(9)]
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


def run_file(folder: Path, texts: Path, **values: Any) -> Path:
    run = {
        "model": OWN, "text": {"train": str(texts), "val": 0.2, "length": 17}, "output": str(folder / "run"),
        "epochs": 1, "batch_size": 4, "device": "cpu", "optimizer": {"lr": 0.01}, **values,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def weights(folder: Path) -> dict[str, Any]:
    return read_checkpoint(sorted(folder.glob("checkpoints/step-*.pt"))[-1])["model"]


def command(*words: str) -> Any:
    app = typer.Typer()
    app.command()(train_lm)
    return CliRunner().invoke(app, list(words))


@pytest.fixture(scope="module")
def trained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    path = run_file(folder, texts, epochs=2, save_every=7)
    result = command(str(path), "keep=9", "model.hidden_dropout=0.1")
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_a_run_writes_a_model_of_transformers(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert model.config.vocab_size == 257
    assert model.config.use_cache
    assert model.config.pad_token_id == tokenizer.pad_token_id == 256
    best = read_checkpoint(trained / "checkpoints" / "best.pt")["model"]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    words = tokenizer(["1 and 2", "3"], padding=True, return_tensors="pt")
    assert model.generate(**words, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_the_metric_is_the_bits_that_held_out_text_takes(trained: Path, texts: Path) -> None:
    task_data = Trainer(load_config(trained / "config.yaml", ["output=" + str(trained.parent / "other")])).data
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    tokens = torch.from_numpy(task_data.val.tokens.astype("int64"))
    held = bytes(byte for byte in tokens.tolist() if byte < 256)
    assert held.decode() in {path.read_text() for path in texts.iterdir()}
    nats = 0.0
    for start in range(0, len(tokens) - 1, 16):
        part = tokens[start : start + 17]
        with torch.no_grad():
            nats += F.cross_entropy(model(part[None]).logits[0, :-1], part[1:], reduction="sum").item()
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    best = min(line["raw_bits_per_byte"] for line in lines if line["kind"] == "eval")
    assert math.isclose(nats / math.log(2) / len(held), best, rel_tol=1e-5)
    assert any("tokens_per_second" in line for line in lines)


def test_a_resumed_run_gives_the_same_bits(trained: Path, tmp_path: Path) -> None:
    middle = trained / "checkpoints" / "step-0000007.pt"
    config = load_config(trained / "config.yaml", [f"resume={middle}", f"output={tmp_path / 'again'}"])
    Trainer(config).fit()
    found, wanted = weights(tmp_path / "again"), weights(trained)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_memory_modes_and_budgets_train_the_same_weights(texts: Path, tmp_path: Path) -> None:
    found = []
    for name, memory in (("store", "store"), ("exact", "exact"), ("budget", {"budget": "exact"})):
        (tmp_path / name).mkdir()
        config = load_language_run(run_file(tmp_path / name, texts, memory=memory, clip_grad=1.0))
        trainer = Trainer(config)
        trainer.fit()
        found.append(weights(tmp_path / name / "run"))
        assert bool(trainer.state.note) == (name == "budget")
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)


def test_the_trainer_takes_other_models_of_transformers(texts: Path, tmp_path: Path) -> None:
    gpt = {"hf": "gpt2", "n_embd": 12, "n_layer": 1, "n_head": 2}
    text = {"train": str(texts), "val": str(texts / "0.txt"), "length": 17, "tokenizer": {"pairs": 263}}
    outcome, folder = train_language_model(load_language_run(run_file(tmp_path, texts, model=gpt, text=text)))
    assert outcome.score < 9
    assert folder is not None
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 263


@pytest.mark.parametrize(
    "model", [OWN, {"hf": "llama", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}]
)
def test_the_end_of_a_text_is_a_token_that_learns(model: dict[str, Any], texts: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_language_run(run_file(tmp_path, texts, model=model)))
    built: Any = trainer.task.build_model(trainer.data)
    end = trainer.data.tokenizer.eos_token_id
    tokens = torch.tensor([[1, end, 2]])
    table = built.get_input_embeddings()
    assert table.weight[end].all()
    table(tokens).sum().backward()
    assert table.weight.grad[end].all()


@pytest.mark.parametrize(
    ("override", "key", "code"),
    [
        ("model.hf=gpt-5", "model.hf", "unknown-model"),
        ("model.hf=5", "model.hf", "wrong-type"),
        ("model.hidden_siz=8", "model.hidden_siz", "unknown-key"),
        ("model.num_attention_heads=5", "model.num_attention_heads", "not-divisible"),
        ("model.vocab_size=50", "model.vocab_size", "conflicting-values"),
        ("model.max_position_embeddings=16", "model.max_position_embeddings", "conflicting-values"),
        ("model={timm: test_revcol}", "model", "wrong-type"),
        ("text.length=1", "task.length", "out-of-range"),
        ("text.vol=0.5", "task.vol", "unknown-key"),
        ("text.val=1.5", "task.val", "out-of-range"),
        ("text.tokenizer=/dev/null", "task.tokenizer", "unreadable-file"),
        ("text.tokenizer.pairs=100", "task.tokenizer.pairs", "out-of-range"),
        ("text=5", "text", "wrong-type"),
        ("label_smoothing=0.1", "label_smoothing", "reserved-key"),
    ],
)  # fmt: skip
def test_errors_name_the_key(texts: Path, tmp_path: Path, override: str, key: str, code: str) -> None:
    path = run_file(tmp_path, texts)
    with raises_error(key=key, code=code):
        Trainer(load_language_run(path, [override]))
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_text_is_refused(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {hf: revcol_lm}\noutput: run\n")
    with raises_error(key="text", code="missing-key"):
        load_language_run(path)


def test_an_image_task_takes_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        Trainer(load_config({"model": {"hf": "gpt2", "n_embd": 12, "n_head": 2}, "output": str(tmp_path / "run")}))
    assert caught.value.key == "model"
    # Embeddings of older versions of PyTorch accept an image without values, and then the output is no class score.
    assert caught.value.code in ("input-rejected", "shape-mismatch")
