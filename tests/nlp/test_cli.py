"""Commands that complement fairseq: checkpoint averaging, scores, and their errors."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.support.errors import raises_error

pytest.importorskip("fairseq")

from fairseq.data import Dictionary
from fairseq.scoring import bleu

from nlp import cli
from nlp.data.corpus import TranslationError
from nlp.evaluation.bleu import compound_split, named_reference, read_output, scores
from nlp.evaluation.checkpoint_averaging import average, select_checkpoints
from revnets import SpecError
from revnets.utils.checkpoint_io import RECORDS, read_checkpoint

app = typer.Typer()
app.command("prepare-mt")(cli.prepare_mt)
app.command("average-checkpoints")(cli.average_checkpoints)
app.command("score-mt")(cli.score_mt)


def call(*words) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if isinstance(result.exception, SpecError):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


# Averaging


def checkpoint(path: Path, seed: int, dtype: torch.dtype = torch.float32, width: int = 5) -> dict[str, torch.Tensor]:
    """Write a checkpoint in fairseq's format and return its weights."""
    generator = torch.Generator().manual_seed(seed)
    model = {
        "encoder.weight": torch.randn(7, width, generator=generator).to(dtype),
        "encoder.version": torch.tensor([3.0]),
        "steps": torch.tensor(seed),
    }
    state = {
        "args": None,
        "cfg": {"model": argparse.Namespace(arch="revcol_transformer_tiny", seed=seed)},
        "model": model,
        "last_optimizer_state": {"exp_avg": torch.ones(7)},
        "extra_state": {"epoch": seed},
    }
    torch.save(state, path)
    return model


def load(path: Path) -> dict:
    return read_checkpoint(path, allowed=RECORDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_average_is_rounded_once(tmp_path, dtype):
    paths = [tmp_path / f"checkpoint{seed}.pt" for seed in range(1, 8)]
    weights = [checkpoint(path, seed, dtype)["encoder.weight"] for seed, path in enumerate(paths, 1)]
    average(paths, tmp_path / "average.pt")
    state = load(tmp_path / "average.pt")
    mean = torch.stack(weights).double().mean(0)
    assert state["model"]["encoder.weight"].dtype == dtype
    torch.testing.assert_close(state["model"]["encoder.weight"], mean.to(dtype), rtol=0, atol=0)
    assert state["model"]["steps"] == 7
    assert state["cfg"]["model"].seed == 7
    assert state["last_optimizer_state"] is None


def test_the_newest_are_chosen_by_number(tmp_path):
    for name in (
        "checkpoint2",
        "checkpoint10",
        "checkpoint9",
        "checkpoint_1_500",
        "checkpoint_2_1500",
        "checkpoint_best",
    ):
        checkpoint(tmp_path / f"{name}.pt", 1)
    assert [path.stem for path in select_checkpoints(tmp_path, 2)] == ["checkpoint9", "checkpoint10"]
    assert [path.stem for path in select_checkpoints(tmp_path, 2, updates=True)] == [
        "checkpoint_1_500",
        "checkpoint_2_1500",
    ]
    code, out, _ = call("average-checkpoints", tmp_path, "--last", 3, "-o", tmp_path / "a.pt")
    assert code == 0
    assert "a.pt: the average of checkpoint2.pt, checkpoint9.pt, checkpoint10.pt" in out


def test_averaging_errors_are_one_line(tmp_path):
    one, other, torn, text = (tmp_path / name for name in ("one.pt", "other.pt", "torn.pt", "text.pt"))
    checkpoint(one, 1)
    checkpoint(other, 2, width=6)
    torn.write_bytes(one.read_bytes()[:-200])
    text.write_text("no checkpoint")
    torch.save({"weights": 1}, tmp_path / "plain.pt")
    torch.save({"model": {"encoder": {"weight": torch.ones(7, 5)}}}, tmp_path / "nested.pt")
    torch.save({"model": {}}, tmp_path / "empty.pt")
    (tmp_path / "run").mkdir()
    output = tmp_path / "average.pt"
    for paths, message in (
        ([one, other], r"other.pt: encoder.weight \(7, .\) is not in all checkpoints. Average checkpoints of one run"),
        ([one, torn], r"torn.pt: damaged or cut short. Give a checkpoint of fairseq-train"),
        ([one, text], r"text.pt: not a checkpoint. Give a checkpoint of fairseq-train"),
        ([one, tmp_path / "plain.pt"], r"plain.pt: no key `model`"),
        ([one, tmp_path / "nested.pt"], r"nested.pt: no key `model` with a mapping to tensors"),
        ([tmp_path / "empty.pt"], r"empty.pt: no key `model`"),
        ([one, tmp_path / "none.pt"], r"none.pt: there is no such file"),
        ([tmp_path / "run"], r"run: 0 epoch checkpoints, but 10 requested. Request fewer \(--last\)"),
        ([tmp_path / "none.pt"], r"none.pt: there is no such file. Check the path"),
        ([tmp_path / "nowhere"], r"nowhere: no such directory. Give the --save-dir of a run"),
    ):
        code, _, err = call("average-checkpoints", *paths, "-o", output)
        assert code == 1
        assert re.search(message, err), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not output.exists()


# Scoring

GENERATED = """Hydra14Migration: T and H begin this line too
S-1\tthe s@@ econd one
T-1\tdie Er@@ ste-Hilfe-Tasche ist da , sagte er &quot; gern &quot; .
H-1\t-0.5\tdie Er@@ ste-Hilfe-Tasche ist hier , sagte er &quot; gern &quot; .
H-1\t-0.9\tworse
D-1\t-0.5\tignored
P-1\t-0.1 -0.2
S-0\tfirst
T-0\tder Mann ging am Abend nach Haus@@ e .
H-0\t-0.4\tder Mann ging am Abend nach Haus@@ e .
Generate test with beam=4: BLEU4 = 1.00
"""


@pytest.fixture
def generated(tmp_path) -> Path:
    path = tmp_path / "test.out"
    path.write_text(GENERATED)
    return path


def fairseq_bleu(hypotheses: list[str], references: list[str]) -> float:
    """Compute BLEU with the C++ code of fairseq-score."""
    words = Dictionary()
    scorer = bleu.Scorer(bleu.BleuConfig(pad=words.pad(), eos=words.eos(), unk=words.unk()))
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        encoded = [words.encode_line(line, add_if_not_exist=True).int() for line in (reference, hypothesis)]
        scorer.add(*encoded)
    return scorer.score()


def test_output_is_read_in_the_order_of_the_data(generated):
    output = read_output(generated)
    assert output.sources == ["first", "the second one"]
    assert output.hypotheses[0] == "der Mann ging am Abend nach Hause ."
    assert output.references[1].startswith("die Erste-Hilfe-Tasche ist da ,")
    assert output.detokenized("de")[1] == 'die Erste-Hilfe-Tasche ist hier, sagte er "gern".'


def test_tokenised_scores_are_those_of_fairseq(generated):
    output = read_output(generated)
    found = {score.kind: score.value for score in scores(output, "de")}
    split = compound_split(output.hypotheses), compound_split(output.references)
    assert found["tokenised"] == pytest.approx(fairseq_bleu(output.hypotheses, output.references), abs=1e-3)
    assert found["compound split"] == pytest.approx(fairseq_bleu(*split), abs=1e-3)
    assert 100 > found["compound split"] > found["tokenised"] > 50


def test_compounds_are_split_as_by_the_common_perl_script():
    lines = ["rich-text format", "Erste-Hilfe-Tasche - x", "a-b-c", "-b a-", "@-@"]
    assert compound_split(lines) == [
        "rich ##AT##-##AT## text format",
        "Erste ##AT##-##AT## Hilfe ##AT##-##AT## Tasche - x",
        "a ##AT##-##AT## b-c",
        "-b a-",
        "@ ##AT##-##AT## @",
    ]


def test_score_command(generated, tmp_path):
    reference = tmp_path / "raw.de"
    reference.write_text('Der Mann ging am Abend nach Hause.\ndie Erste-Hilfe-Tasche ist da, sagte er "gern".\n')
    code, out, _ = call("score-mt", generated, "-l", "de", "--reference", reference, "--json")
    assert code == 0
    numbers = json.loads(out)
    assert list(numbers) == ["tokenised", "compound split", "sacreBLEU"]
    without = {score.kind: score.value for score in scores(read_output(generated), "de")}
    assert numbers["tokenised"] == without["tokenised"]
    assert numbers["sacreBLEU"] < without["sacreBLEU"]  # the reference begins with a capital
    code, out, _ = call("score-mt", generated, "-l", "de")
    assert code == 0
    assert "2 sentences" in out
    assert f"{numbers['tokenised']:.2f}" in out
    assert "tok:13a" in out


def test_omitted_sentences_are_reported(generated):
    """`--required-batch-size-multiple 8` omits sentences of a test set. The output on stdout stays valid JSON."""
    generated.write_text(GENERATED.replace("-1\t", "-3\t"))
    code, out, err = call("score-mt", generated, "-l", "de", "--json")
    assert code == 0
    assert list(json.loads(out)) == ["tokenised", "compound split", "sacreBLEU"]
    assert err.startswith("warning: 2 sentences of the data set have no translation")
    assert "--required-batch-size-multiple 1" in err
    assert err.count("\n") == 1
    generated.write_text(GENERATED)
    assert not call("score-mt", generated, "-l", "de", "--json")[2]


def test_a_cached_reference_of_sacrebleu(tmp_path, monkeypatch):
    """A file as sacrebleu writes it after a download."""
    from sacrebleu import utils
    from sacrebleu.dataset import DATASETS

    monkeypatch.setattr("sacrebleu.dataset.base.SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(utils, "SACREBLEU_DIR", str(tmp_path))
    data = DATASETS["wmt14/full"]
    for field in data.fieldnames("en-de"):
        path = Path(data._get_txt_file_path("en-de", field))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{field} one\n{field} zwei\n")
    assert named_reference("wmt14/full:en-de") == ["ref one", "ref zwei"]
    with raises_error(TranslationError, code="unknown-choice", names=["'wmt14full'", "Did you mean wmt14/full?"]):
        named_reference("wmt14full:en-de")
    with raises_error(TranslationError, code="unknown-choice", names=["wmt14/full", "'de'", "wmt14/full:en-de"]):
        named_reference("wmt14/full:de")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text.replace("H-", "X-"), "H-"),
        (lambda text: text.replace("T-0", "X-0"), "T-0"),
        (lambda text: "", "H-"),
    ],
)
def test_output_that_cannot_be_scored(generated, change, named):
    generated.write_text(change(GENERATED))
    code, _, err = call("score-mt", generated, "-l", "de")
    assert code == 1
    assert err.startswith(f"error: {generated}: ")
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["score-mt", "{out}", "-l", "german"], ["'german'"]),
        (["score-mt", "{out}", "-l", "de", "--reference", "{one}"], ["1 lines", "2 translations"]),
        (["score-mt", "{tmp}/none", "-l", "de"], ["{tmp}/none: "]),
        (["prepare-mt", "{one}", "-l", "en-de", "-o", "{tmp}/bin"], ["{one}, line 1: ", "1 tab-separated field"]),
        (["prepare-mt", "{one}", "{tmp}/none", "-l", "en-de", "-o", "{tmp}/bin"], ["{tmp}/none: "]),
        (["prepare-mt", "{one}", "-o", "{tmp}/bin"], ["{one}: ", "--languages"]),
    ],
)
def test_invalid_arguments_are_one_line_errors(generated, tmp_path, words, names):
    (tmp_path / "one").write_text("one\n")
    paths = {"out": generated, "tmp": tmp_path, "one": tmp_path / "one"}
    code, _, err = call(*(word.format(**paths) for word in words))
    assert code == 1
    assert err.startswith("error: ")
    assert all(name.format(**paths) in err for name in names), err
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["one", "test.out"]


def test_a_missing_requirement_is_named(generated, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    for name in ("nlp.data.subwords.moses", "nlp.evaluation.bleu"):
        monkeypatch.delitem(sys.modules, name)
    code, _, err = call("score-mt", generated, "-l", "de")
    assert (code, err) == (1, "error: sacremoses is not installed. Try: pip install 'revnets[nlp]'\n")


def test_missing_fairseq_is_reported_first(tmp_path, monkeypatch):
    monkeypatch.setattr("nlp.data.prepare.find_spec", lambda name: None)
    (tmp_path / "one").write_text("one\n")
    code, _, err = call("prepare-mt", tmp_path / "one", tmp_path / "one", "-l", "en-de", "-o", tmp_path / "bin")
    assert code == 1
    assert err.startswith("error: fairseq, which binarizes the text, is not installed. Try: pip install")
    assert os.listdir(tmp_path) == ["one"]
