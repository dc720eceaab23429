"""fairseq's commands end to end with RevCol-Transformer on a small corpus: training, loading, translation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from fairseq.models.transformer import TransformerModel

from tests.support.fairseq import USER_DIR, fairseq, load, preprocess, train


class Trained(NamedTuple):
    data: Path
    checkpoint: Path
    logged: list[dict[str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preprocess(tmp_path_factory.mktemp("corpus"), pairs=1600)


@pytest.fixture(scope="module")
def trained(data: Path) -> Trained:
    torch.set_num_threads(1)
    logged = train(
        *(data, data.parent / "trained", "--max-tokens", "800", "--max-update", "250", "--validate-interval", "100"),
        *(
            "--eval-bleu",
            "--eval-bleu-args",
            '{"beam": 2}',
            "--eval-bleu-remove-bpe",
            "--best-checkpoint-metric",
            "bleu",
        ),
        "--maximize-best-checkpoint-metric",
    )
    return Trained(data, data.parent / "trained" / "checkpoint_best.pt", logged)


class Translation(NamedTuple):
    source: str  # in subwords
    reference: str
    hypothesis: str


def generate(trained: Trained, folder: Path) -> tuple[list[Translation], float]:
    """Beam search on the test set: translations in corpus order, and BLEU."""
    fairseq(
        *("generate", trained.data, "--user-dir", USER_DIR, "--path", trained.checkpoint, "--cpu"),
        *("--beam", "4", "--lenpen", "0.6", "--remove-bpe", "--results-path", folder),
    )
    text = (folder / "generate-test.txt").read_text()
    rows: dict[int, dict[str, str]] = {}
    for kind, index, rest in re.findall(r"^([TH])-(\d+)\t(.*)$", text, re.MULTILINE):
        rows.setdefault(int(index), {})[kind] = rest.split("\t")[-1]
    sources = (trained.data.parent / "test.en").read_text().splitlines()
    found = [Translation(sources[index], row["T"], row["H"]) for index, row in sorted(rows.items())]
    return found, float(re.search(r"BLEU4 = ([\d.]+)", text)[1])


@pytest.fixture(scope="module")
def generated(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Translation], float]:
    return generate(trained, tmp_path_factory.mktemp("generated"))


def test_it_learns_and_beam_search_finds_translations(generated):
    translations, bleu = generated
    assert len(translations) == 200
    assert bleu > 40
    assert not any("@@" in item.hypothesis + item.reference for item in translations)
    assert sum(item.hypothesis == item.reference for item in translations) > 60


def test_bleu_is_evaluated_while_training(trained):
    last = [line for line in trained.logged if "valid_bleu" in line][-1]
    assert float(last["valid_bleu"]) > 30
    assert load(trained.checkpoint)["extra_state"]["best"] == pytest.approx(float(last["valid_bleu"]), abs=0.01)


def test_validate_finds_the_loss_of_the_training(trained):
    logged = fairseq(
        *("validate", trained.data, "--user-dir", USER_DIR, "--path", trained.checkpoint, "--cpu"),
        *("--task", "translation", "--max-tokens", "800", "--log-format", "json"),
    )
    last = [line for line in trained.logged if "valid_loss" in line][-1]
    assert float(logged[-1]["valid_loss"]) == pytest.approx(float(last["valid_loss"]), abs=0.002)


def test_interactive_translates_as_generate_does(trained, generated, tmp_path, capsys):
    chosen = generated[0][:12]
    (tmp_path / "input.txt").write_text("".join(item.source + "\n" for item in chosen))
    fairseq(
        *("interactive", trained.data, "--user-dir", USER_DIR, "--path", trained.checkpoint, "--cpu", "--beam", "4"),
        *(
            "--lenpen",
            "0.6",
            "--remove-bpe",
            "--input",
            tmp_path / "input.txt",
            "--buffer-size",
            "5",
            "--max-tokens",
            "99",
        ),
    )
    lines = re.findall(r"^D-\d+\t.*\t(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert lines == [item.hypothesis for item in chosen]


def test_hub_loads_and_translates(trained, generated):
    hub = TransformerModel.from_pretrained(
        str(trained.checkpoint.parent),
        trained.checkpoint.name,
        str(trained.data),
        user_dir=str(USER_DIR),
    )
    chosen = generated[0][:12]
    translated = hub.translate([item.source for item in chosen], beam=4, lenpen=0.6)
    assert [re.sub("@@ ", "", line) for line in translated] == [item.hypothesis for item in chosen]


# ---------------------------------------------------------------------------------------------------- training in parts


def state(save_dir: Path) -> dict[str, Any]:
    found = load(save_dir / "checkpoint_last.pt")
    return {"model": found["model"], "optimizer": found["last_optimizer_state"]}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


SHORT = ("--max-tokens", "300", "--disable-validation", "--save-interval-updates", "4", "--keep-interval-updates", "1")


def test_resumed_training_and_every_memory_mode_give_the_same_bits(data, tmp_path):
    """Within an epoch: from the second epoch on, fairseq makes different batches after a resume."""
    options = (*SHORT, "--update-freq", "2")
    train(data, tmp_path / "straight", *options, "--max-update", "8")
    train(data, tmp_path / "parts", *options, "--max-update", "4")
    train(data, tmp_path / "parts", *options, "--max-update", "8")
    train(data, tmp_path / "store", *options, "--max-update", "8", "--revcol-memory", "store")
    train(data, tmp_path / "budget", *options, "--max-update", "8", "--revcol-memory", "{budget: 20MB}")
    straight = state(tmp_path / "straight")
    assert load(tmp_path / "straight" / "checkpoint_last.pt")["extra_state"]["train_iterator"]["epoch"] == 1
    assert_same(state(tmp_path / "parts"), straight)
    assert_same(state(tmp_path / "store"), straight)
    assert_same(state(tmp_path / "budget"), straight)


def test_options_are_in_the_checkpoint(trained):
    model = load(trained.checkpoint)["cfg"]["model"]
    assert (model.arch, model.revcol_columns, model.revcol_blocks) == ("revcol_transformer_tiny", 2, "1,1")
    assert (model.revcol_gain, model.revcol_memory, model.revcol_attention) == (0.5, "exact", "standard")


def test_a_network_from_yaml_is_trained_and_loaded_without_its_file(data, tmp_path):
    net = tmp_path / "net.yaml"
    levels = "[{dim: 64, depth: 1, block: transformer, heads: 4}, {dim: 64, depth: 1, block: mlp}]"
    net.write_text(f"columns: 3\nlevels: {levels}\n")
    saved = tmp_path / "saved"
    fairseq(
        *("train", data, "--user-dir", USER_DIR, "--save-dir", saved, "--arch", "revcol_transformer_tiny", "--cpu"),
        *("--revcol-spec", net, "--optimizer", "adam", *SHORT, "--max-update", "2", "--num-workers", "0"),
    )
    net.unlink()
    generate(Trained(data, saved / "checkpoint_last.pt", []), tmp_path / "generated")
    weights = load(saved / "checkpoint_last.pt")["model"]
    assert "encoder.columns.cells.2.1.function.blocks.0.block.mlp.fc1.weight" in weights


def test_checkpointed_decoder_layers_train_alike(data, tmp_path):
    for name, extra in (("plain", ()), ("checkpointed", ("--checkpoint-activations",))):
        train(data, tmp_path / name, *SHORT, "--max-update", "3", *extra)
    torch.testing.assert_close(state(tmp_path / "checkpointed"), state(tmp_path / "plain"), rtol=1e-3, atol=1e-5)


def test_layerdrop_is_refused(data, tmp_path):
    with pytest.raises(SystemExit, match=r"--encoder-layerdrop 0\.3: a reversible column"):
        train(data, tmp_path, "--max-tokens", "300", "--encoder-layerdrop", "0.3")
