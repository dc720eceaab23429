"""The sentencepiece pipeline with a few verses: preparation, training, translation and scores."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")
pytest.importorskip("sentencepiece")

from sacrebleu import corpus_bleu

from tests.nlp.test_cli import call
from tests.support.fairseq import USER_DIR, fairseq, train
from tests.support.paths import ROOT

CORPUS = ROOT / "examples" / "data" / "kjv-elberfelder-short.en-de.tsv.gz"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set of a few verses."""
    folder = tmp_path_factory.mktemp("verses")
    with gzip.open(CORPUS, "rt", encoding="utf-8") as file:
        (folder / "verses.tsv").write_text("".join(next(file) for _ in range(401)), encoding="utf-8")
    size = ("--valid", 23, "--test", 29, "--vocab", 211, "--workers", 1)
    code, _, err = call("prepare-mt", folder / "verses.tsv", "-l", "en-de", *size, "-o", folder / "data")
    assert code == 0, err
    return folder / "data"


@pytest.fixture(scope="module")
def checkpoint(data) -> Path:
    torch.set_num_threads(1)
    train(data, data.parent / "trained", "--max-tokens", "800", "--max-update", "41", "--disable-validation")
    return data.parent / "trained" / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def generated(data, checkpoint) -> Path:
    """Output of fairseq-generate for the test set."""
    search = ("--beam", "2", "--max-len-a", "1", "--max-len-b", "5", "--required-batch-size-multiple", "1")
    fairseq(
        *("generate", data, "--user-dir", USER_DIR, "--path", checkpoint, "--cpu", *search),
        *("--remove-bpe", "sentencepiece", "--results-path", data.parent / "generated"),
    )
    return data.parent / "generated" / "generate-test.txt"


def lines_of_kind(kind: str, text: str) -> list[str]:
    """Return the lines of a kind in the order of the data set."""
    found = re.findall(rf"^{kind}-(\d+)\t(.*)$", text, re.MULTILINE)
    return [line.split("\t")[-1] for _, line in sorted(found, key=lambda row: int(row[0]))]


def test_references_are_the_raw_text(data, generated):
    references = (data / "test.raw.de").read_text(encoding="utf-8").splitlines()
    found = lines_of_kind("T", generated.read_text(encoding="utf-8"))
    assert len(found) == 29
    assert [line for line in found if "<unk>" not in line] == [
        line for line, read in zip(references, found, strict=True) if "<unk>" not in read
    ]
    assert sum("<unk>" in line for line in found) < 5


def test_score_mt_scores_text(data, generated):
    code, out, err = call("score-mt", generated, "-l", "de", "--reference", data / "test.raw.de", "--json")
    assert code == 0, err
    references = (data / "test.raw.de").read_text(encoding="utf-8").splitlines()
    hypotheses = lines_of_kind("H", generated.read_text(encoding="utf-8"))
    assert not any("\u2581" in line for line in hypotheses)
    assert json.loads(out) == {"sacreBLEU": pytest.approx(corpus_bleu(hypotheses, [references], force=True).score)}


def test_interactive_translates_raw_text_as_generate_does(data, checkpoint, generated, capsys):
    capsys.readouterr()
    fairseq(
        *("interactive", data, "--user-dir", USER_DIR, "--path", checkpoint, "--cpu", "--input", data / "test.raw.en"),
        *("--source-lang", "en", "--target-lang", "de", "--beam", "2", "--max-len-a", "1", "--max-len-b", "5"),
        *("--bpe", "sentencepiece", "--sentencepiece-model", data / "sentencepiece.model"),
    )
    found = lines_of_kind("D", capsys.readouterr().out)
    assert found == lines_of_kind("D", generated.read_text(encoding="utf-8"))
