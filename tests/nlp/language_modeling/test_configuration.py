"""Checks of the configuration of a language model, and of its directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

import revnets
from nlp.language_modeling import RevColForCausalLM, RevColLMConfig
from revnets import Memory
from tests.support.errors import raises_error
from tests.support.language_models import language_config, language_model, text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    language_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"hidden_size": "28"}, "hidden_size", "number-as-text"),
    ({"hidden_size": 2**40}, "hidden_size", "out-of-range"),
    ({"vocab_size": 0}, "vocab_size", "out-of-range"),
    ({"columns": 10**9}, "columns", "out-of-range"),
    ({"columns": 10_000}, "columns", "out-of-range"),
    ({"levels": 1}, "levels", "out-of-range"),
    ({"num_attention_heads": 3}, "num_attention_heads", "not-divisible"),
    ({"num_attention_heads": 28}, "num_attention_heads", "not-divisible"),
    ({"num_attention_heads": 7, "num_key_value_heads": 2}, "num_key_value_heads", "not-divisible"),
    ({"hidden_act": "swish"}, "hidden_act", "unknown-choice"),
    ({"architecture": "gpt"}, "architecture", "unknown-choice"),
    ({"max_position_embeddings": -1}, "max_position_embeddings", "out-of-range"),
    ({"rope_theta": float("inf")}, "rope_theta", "not-finite"),
    ({"hidden_dropout": 1.5}, "hidden_dropout", "out-of-range"),
    ({"memory": "exactly"}, "memory", "unknown-choice"),
    ({"memory": ["exact", "store"]}, "memory", "wrong-length"),
    ({"memory": {"budget": "much"}}, "memory.budget", "invalid-value"),
    ({"supervised_columns": [2]}, "supervised_columns", "out-of-range"),
    ({"pad_token_id": 61}, "pad_token_id", "out-of-range"),
    ({"loss_chunk": 0}, "loss_chunk", "out-of-range"),
    ({"gain_init": 0.0}, "gain.init", "out-of-range"),
    ({"fusion": "linaer"}, "fusion", "unknown-component"),
    ({"fusion": "convnext"}, "levels", "shape-mismatch"),
    ({"net": "columns.yaml"}, "net", "wrong-type"),
    ({"net": {"columns": 2}}, "levels", "missing-key"),
    ({"net": {"columns": 2, "levels": []}, "architecture": "midpoint"}, "net", "conflicting-values"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "key", "code"), MISTAKES)
def test_errors_name_the_key(values: dict[str, Any], key: str, code: str) -> None:
    with raises_error(key=key, code=code):
        language_config(**values)


def net(block: str, **options: Any) -> dict[str, Any]:
    return {"columns": 2, "levels": [{"dim": 28, "depth": 1, "block": block, **options}] * 2, "fusion": "linear"}


@pytest.mark.parametrize("block", ["vit", "nlp.layers.transformer:TransformerBlock"])
def test_blocks_without_a_causal_mask_are_refused(block: str) -> None:
    with raises_error(code="invalid-component", key="net.levels", names="mask"):
        RevColForCausalLM(language_config(net=net(block, heads=2)))


@pytest.mark.parametrize("block", ["os:system", "tests.support.language_models:language_model"])
def test_a_configuration_cannot_name_code_of_other_packages(block: str) -> None:
    with raises_error(code="not-trusted", names="register_block"):
        language_config(net=net(block))


class Shift(nn.Module):
    """A custom block: each position depends on the previous one."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, rotation: Any = None, mask: Any = None, cache: Any = None) -> torch.Tensor:
        return x + self.linear(nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))


class MeanFusion(nn.Module):
    """A custom fusion that mixes positions."""

    def __init__(self, dim: int, reduction: int, sources: list[Any]):
        super().__init__()

    def forward(self, *reads: torch.Tensor) -> torch.Tensor:
        return sum(read + read.mean(1, keepdim=True) for read in reads)  # type: ignore[return-value]


class SumFusion(MeanFusion):
    """A custom fusion that acts on every position separately."""

    is_positionwise = True

    def forward(self, *reads: torch.Tensor) -> torch.Tensor:
        return sum(reads)  # type: ignore[return-value]


def test_fusions_are_positionwise_by_declaration() -> None:
    revnets.register_fusion("mean_of_tests")(MeanFusion)
    revnets.register_fusion("sum_of_tests")(SumFusion)
    RevColForCausalLM(language_config(net={**net("mlp"), "fusion": "sum_of_tests"}))
    with raises_error(code="invalid-component", key="net.fusion", names="is_positionwise"):
        RevColForCausalLM(language_config(net={**net("mlp"), "fusion": "mean_of_tests"}))


def test_registered_blocks_build_a_model_that_is_saved_and_read(tmp_path: Path) -> None:
    revnets.register_block("shift_of_tests")(Shift)
    yaml = tmp_path / "columns.yaml"
    levels = "[{dim: 28, depth: 1, block: shift_of_tests}, {dim: 28, depth: 2, block: mlp}]"
    yaml.write_text(f"columns: 3\nstem: {{type: linear, in_dim: 3}}\nlevels: {levels}\nfusion: linear\n")
    model = RevColForCausalLM(
        RevColLMConfig.from_yaml(yaml, vocab_size=61, hidden_size=28, num_attention_heads=2)
    ).eval()
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model(text()).logits, again(text()).logits)
    changed = torch.cat([text()[:, :-1], text(seed=1)[:, -1:]], 1)
    assert torch.equal(model(text()).logits[:, :-1], model(changed).logits[:, :-1])


def test_levels_next_to_the_embedding_have_its_width(tmp_path: Path) -> None:
    with raises_error(key="net.levels.0.dim", code="shape-mismatch"):
        language_config(net=net("mlp"), hidden_size=24)


@pytest.mark.parametrize(("key", "value"), [("direction", ["up", "down"]), ("constant", {"column": 1})])
def test_the_text_goes_up_all_columns(key: str, value: Any) -> None:
    with raises_error(key=key, code="reserved-key"):
        language_config(net={**net("mlp"), key: value})


def test_heads_of_all_levels_have_the_width_of_the_rotary_positions() -> None:
    language_config(net=net("causal_transformer", heads=2))
    with raises_error(key="net.levels.0.heads", code="shape-mismatch"):
        language_config(net=net("causal_transformer", heads=7))


def test_auto_classes_load_the_model(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert type(model) is RevColForCausalLM
    assert type(AutoConfig.from_pretrained(saved)) is RevColLMConfig
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(map(torch.equal, model.parameters(), language_model().parameters()))


@pytest.mark.parametrize(
    "options", [{"tie_word_embeddings": False}, {"architecture": "midpoint"}, {"norm_type": "layer"}]
)
def test_other_models_are_saved_and_read(options: dict[str, Any], tmp_path: Path) -> None:
    model = language_model(**options, hidden_act="gelu", use_bias=True, supervised_columns=[0])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(model(text()).logits, again(text()).logits)


def test_a_folder_gives_its_model_in_another_memory_mode(saved: Path) -> None:
    model = RevColForCausalLM.from_pretrained(saved, memory=["store", "exact", "recompute"])
    assert model.model.columns.memory == (Memory.STORE, Memory.EXACT, Memory.RECOMPUTE)


@pytest.mark.parametrize(
    ("values", "key", "code"),
    [
        ({"columns": 999}, "columns", "weights-mismatch"),
        ({"hidden_size": 2**16}, "hidden_size", "weights-mismatch"),
        ({"vocab_size": 2**24}, "hidden_size", "weights-mismatch"),
        ({"columns": 4}, "weights", "weights-mismatch"),
        ({"columns": 2}, "weights", "weights-mismatch"),
        ({"intermediate_size": 41}, "weights", "weights-mismatch"),
        ({"hidden_size": [28]}, "hidden_size", "wrong-type"),
        ({"dtype": "float33"}, "", "wrong-format"),
        ({"id2label": 5}, "", "wrong-format"),
        ({"memory": {"budget": [1]}}, "memory.budget", "wrong-type"),
    ],
)
def test_a_folder_whose_configuration_does_not_fit_is_refused(
    folder: Path, values: dict[str, Any], key: str, code: str
) -> None:
    change(folder, **values)
    with raises_error(key=key, code=code):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kind", [RevColForCausalLM, AutoModelForCausalLM])
def test_a_subfolder_is_compared_with_its_configuration(kind: Any, folder: Path) -> None:
    found = kind.from_pretrained(folder.parent, subfolder=folder.name)
    assert all(map(torch.equal, found.parameters(), language_model().parameters()))
    change(folder, hidden_size=2**16)
    with raises_error(key="hidden_size", code="weights-mismatch", source=folder):
        kind.from_pretrained(folder.parent, subfolder=folder.name)


def test_damaged_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with raises_error(code="damaged-file", source=path):
        RevColForCausalLM.from_pretrained(folder)


def test_a_large_configuration_is_not_read(folder: Path) -> None:
    with open(folder / "config.json", "ab") as file:
        file.truncate(2**25)
    with raises_error(code="too-large", source=folder / "config.json"):
        RevColForCausalLM.from_pretrained(folder)


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with raises_error(code="missing-weights", source=folder):
        RevColForCausalLM.from_pretrained(folder)
