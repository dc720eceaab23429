"""The whole pipeline of `prepare`, from raw text to a fairseq data set."""

from __future__ import annotations

import gzip
import io
import os
import random
import signal
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support import forked_programs
from tests.support.errors import raises_error

pytest.importorskip("fairseq")

from fairseq.data import Dictionary, data_utils
from rich.console import Console
from rich.progress import Progress

from nlp.data import prepare as module
from nlp.data import worker_pool
from nlp.data.binarization import count_sentences, unknown_words
from nlp.data.corpus import TranslationError, lines_of
from nlp.data.prepare import prepare
from nlp.data.recipe import RECIPES, Recipe, read_recipe
from nlp.data.resumable_steps import Stages
from nlp.data.splits import SPLITS
from nlp.data.subwords.byte_pairs import join
from nlp.data.subwords.moses import detokenize
from revnets.config.loader import load

QUIET = Console(file=io.StringIO())


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of a language of 60 words and one with reversed words; some are repeated or far too long."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    lines = [rng.choices(words, k=rng.randint(3, 9)) for _ in range(count)]
    pairs = [(f"{' '.join(line)}.".capitalize(), f"{' '.join(word[::-1] for word in line)}.") for line in lines]
    return [*pairs, *pairs[:7], (" ".join(words), " ".join(words[:3])), ("", "x")]


def decoded(folder: Path, name: str, code: str, languages: str = "en-de") -> list[str]:
    """Read the words of a binarized split with fairseq."""
    dictionary = Dictionary.load(str(folder / f"dict.{code}.txt"))
    data = data_utils.load_indexed_dataset(str(folder / f"{name}.{languages}.{code}"), dictionary)
    assert data is not None
    return [join(dictionary.string(data[index])) for index in range(len(data))]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "table.tsv.gz"
    path.write_bytes(gzip.compress("".join(f"{i}\t{s}\t{t}\n" for i, (s, t) in enumerate(sentences(300))).encode()))
    return path


OPTIONS = {"languages": "en-de", "valid": 11, "test": 13, "merges": 40}


@pytest.fixture(scope="module")
def made(table, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "bin"
    recipe, base = read_recipe([str(table)], OPTIONS)
    return output, prepare(recipe, output, base, console=QUIET), recipe


def test_every_pair_is_accounted_for(made, table):
    output, facts, _ = made
    assert facts["pairs read"] == 309 == sum(1 for _ in lines_of(table))
    assert (facts["repeated"], facts["empty"], facts["length ratio too large"]) == (7, 1, 1)
    assert (facts["valid"], facts["test"], facts["merges"]) == (11, 13, 40)
    dropped = ("empty", "repeated", "overlaps valid or test", "too long", "too short", "length ratio too large")
    assert sum(facts.get(key, 0) for key in (*SPLITS, *dropped)) == 309
    for name in SPLITS:
        assert len(decoded(output, name, "en")) == len(decoded(output, name, "de")) == facts[name]
    assert os.listdir(output.parent) == ["bin"]


def test_fairseq_reads_the_sentences_that_were_given(made, table):
    """Binarized text decodes and detokenizes to the raw text, and pairs stay aligned."""
    output, _, _ = made
    given = Counter(sentences(300))
    for name in SPLITS:
        sides = [detokenize(decoded(output, name, code), code) for code in ("en", "de")]
        assert not Counter(zip(*sides, strict=True)) - given
    for code, lines in zip(("en", "de"), sides, strict=True):
        assert list(lines_of(output / f"test.raw.{code}")) == lines


def test_the_dictionary_is_joined(made):
    output, facts, _ = made
    words = (output / "dict.en.txt").read_text()
    assert words == (output / "dict.de.txt").read_text()
    assert len(words.splitlines()) == facts["types"]
    assert len((output / "codes").read_text().splitlines()) == 41


def test_the_share_of_unknown_words_is_that_of_the_data(made):
    output, facts, _ = made
    shares = unknown_words(output)
    assert set(shares) == set(SPLITS)
    for name, found in shares.items():
        for code in ("en", "de"):
            dictionary = Dictionary.load(str(output / f"dict.{code}.txt"))
            data = data_utils.load_indexed_dataset(str(output / f"{name}.en-de.{code}"), dictionary)
            assert data is not None
            tokens = torch.cat([data[index] for index in range(len(data))])
            share = 100 * (tokens == dictionary.unk()).double().mean().item()
            assert found[code] == pytest.approx(share, rel=0.01, abs=1e-9)
            assert count_sentences(output / f"{name}.en-de.{code}.idx") == len(data) == facts[name]


def test_the_log_names_the_folder_itself(made):
    output, _, _ = made
    log = (output / "preprocess.log").read_text()
    assert str(output) in log
    assert ".partial" not in log


@pytest.mark.parametrize(("languages", "warned"), [("en-zh_CN", "zh_CN"), ("ja-th", "ja and th"), ("en-ko", None)])
def test_languages_without_spaces_get_a_warning(tmp_path, languages, warned):
    console = Console(file=io.StringIO(), width=500)
    recipe = Recipe(languages=languages, train=("none.tsv",), valid=1, test=1)
    for wanted, given in ((warned, recipe), (None, recipe.model_copy(update={"tokenize": False}))):
        with raises_error(TranslationError, code="missing-file"):
            prepare(given, tmp_path / "bin", tmp_path, console=console)
        text = console.file.getvalue()
        console.file.truncate(0)
        assert ("warning" in text) == (wanted is not None)
        assert wanted is None or (f"{wanted}: " in text and "tokenize: false" in text)


def test_a_header_is_skipped_with_a_message(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("source\ttarget\n" + "".join(f"s {number}\tt {number}\n" for number in range(40)))
    console = Console(file=io.StringIO(), width=500)
    recipe = Recipe(languages="en-de", train=(str(path),), valid=3, test=4, merges=5)
    steps = module._Steps(recipe, (tmp_path,), tmp_path, 1, Progress(console=console, disable=True))
    (tmp_path / "chosen").mkdir()
    assert steps.choose(tmp_path / "chosen")["pairs read"] == 40
    assert f"{path}: line 1 names the columns (source, target)" in console.file.getvalue()


@pytest.mark.parametrize("change", [1, -1])
def test_a_text_that_changes_while_it_is_read(tmp_path, change):
    path = tmp_path / "a.tsv"
    lines = [f"s {number}\tt {number}\n" for number in range(40)]
    path.write_text("".join(lines))
    recipe = Recipe(languages="en-de", train=(str(path),), valid=3, test=4, tokenize=False, merges=None)
    steps = module._Steps(recipe, (tmp_path,), tmp_path, 1, Progress(console=QUIET, disable=True))
    for name in ("chosen", "tokens"):
        (tmp_path / name).mkdir()
    steps.choose(tmp_path / "chosen")
    path.write_text("".join([*lines, "x\ty\n"] if change > 0 else lines[:-1]))
    with raises_error(TranslationError, code="misaligned-data", names=[str(path), "no longer 40"]):
        steps.tokenize(tmp_path / "tokens")


def test_a_full_disk_is_named(tmp_path):
    def fill(folder: Path) -> dict[str, int]:
        with open("/dev/full", "w") as file:
            file.write("x")
        return {}

    with raises_error(TranslationError, code="unwritable-file", names=[str(tmp_path / "s"), "No space left"]):
        Stages({}).run(tmp_path / "s", fill)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("forked_preprocess")
def test_two_processes_give_the_same(made, table, tmp_path, monkeypatch):
    output, facts, recipe = made
    monkeypatch.setattr(worker_pool, "FEW", 0)
    assert prepare(recipe, tmp_path / "bin", workers=2, console=QUIET) == facts
    for path in output.glob("*.*"):
        if path.suffix not in (".log", ".json"):
            assert (tmp_path / "bin" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_existing_data_set_is_not_changed(made, table, monkeypatch):
    output, facts, recipe = made
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    monkeypatch.setattr(module, "choose", None)
    assert prepare(recipe, output, console=QUIET) == facts
    other = recipe.model_copy(update={"merges": 41})
    with raises_error(TranslationError, code="settings-differ", names=[str(output), "--output", "--overwrite"]):
        prepare(other, output, console=QUIET)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


KILLED = """
import os, signal, sys
from pathlib import Path
from nlp.data import prepare as module
from nlp.data.recipe import read_recipe

steps, stage = module._Steps, sys.argv[3]
before = getattr(steps, stage)

def killed(self, folder, *rest):
    before(self, folder, *rest)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    setattr(steps, stage, killed)
    recipe, base = read_recipe([sys.argv[1]], {options})
    module.prepare(recipe, Path(sys.argv[2]), base)
"""


@pytest.mark.usefixtures("forked_preprocess")
@pytest.mark.parametrize("stage", ["tokenize", "binarize"])
def test_a_killed_run_resumes(made, table, tmp_path, monkeypatch, stage):
    """After a kill at the end of a step, no partial result is visible, and finished steps are skipped."""
    output, facts, recipe = made
    script = KILLED.replace("{options}", repr(OPTIONS))
    command = [sys.executable, "-c", script, str(table), str(tmp_path / "bin"), stage]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parents[2])}
    done = forked_programs.run(command, env=environment, forks=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "bin").exists()
    assert (tmp_path / "bin.work" / "chosen").exists()
    monkeypatch.setattr(module, "choose", None)  # must not be called
    assert prepare(recipe, tmp_path / "bin", console=QUIET) == facts
    assert os.listdir(tmp_path) == ["bin"]
    for code in ("en", "de"):
        name = f"train.en-de.{code}.bin"
        assert (tmp_path / "bin" / name).read_bytes() == (output / name).read_bytes()


def archive(path: Path, texts: dict[str, list[str]]) -> str:
    """Write an archive of texts and return its URL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".tgz", ".gz") else "w") as tar:
        for name, lines in texts.items():
            data = "".join(line + "\n" for line in lines).encode()
            data = gzip.compress(data) if name.endswith(".gz") else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.as_uri()


def localized(name: str, urls: dict[str, str], tmp_path: Path, *overrides: str) -> Recipe:
    """A built-in recipe with other URLs."""
    recipe = load(Recipe, RECIPES / f"{name}.yaml", overrides)
    assert {item.file for item in recipe.downloads} == set(urls)
    items = [
        item.model_copy(update={"url": urls[item.file], "size": None, "checksum": None}) for item in recipe.downloads
    ]
    return recipe.model_copy(update={"downloads": tuple(items)})


@pytest.mark.usefixtures("forked_preprocess")
def test_wmt14_en_fr(tmp_path):
    """The published steps on archives of the same form: files, their order, and cleaning."""
    pairs = sentences(90)
    spans = dict(zip(("europarl", "crawl", "un", "news", "giga"), range(0, 100, 20), strict=True))
    parts = {key: pairs[start : start + 20] for key, start in spans.items()}
    files = {
        "training-parallel-europarl-v7.tgz": {"training/europarl-v7.fr-en": "europarl"},
        "training-parallel-commoncrawl.tgz": {"commoncrawl.fr-en": "crawl"},
        "training-parallel-un.tgz": {"un/undoc.2000.fr-en": "un"},
        "training-parallel-nc-v9.tgz": {"training/news-commentary-v9.fr-en": "news"},
        "training-giga-fren.tar": {"giga-fren.release2.fixed": "giga"},
    }
    urls = {}
    for name, stems in files.items():
        ending = ".gz" if "giga" in name else ""
        urls[name] = archive(
            tmp_path / "www" / name,
            {
                f"{stem}.{code}{ending}": [pair[side] for pair in parts[part]]
                for stem, part in stems.items()
                for side, code in enumerate(("en", "fr"))
            },
        )
    test = [("He said: \u201cIt\u2019s a well-known fact.\u201d", "L\u2019eau, c\u2019est la vie."), ("b", "c " * 30)]
    sgm = {
        f"test-full/newstest2014-fren-{role}.{code}.sgm": [
            "<doc>",
            *(f'<seg id="{number}">{pair[side].strip()}</seg>' for number, pair in enumerate(test)),
            "</doc>",
        ]
        for side, (role, code) in enumerate((("src", "en"), ("ref", "fr")))
    }
    urls["test-full.tgz"] = archive(tmp_path / "www" / "test-full.tgz", sgm)
    recipe = localized("wmt14_en_fr", urls, tmp_path, "merges=30", "valid.every=10")
    output = tmp_path / "bin"
    facts = prepare(recipe, output, downloads=tmp_path / "downloads", console=QUIET)

    every = [pair for number, pair in enumerate(pairs, 1) if number % 10 == 0]
    assert detokenize(decoded(output, "valid", "en", "en-fr"), "en") == [pair[0] for pair in every]
    assert facts["repeated" if "repeated" in facts else "empty"] == 1
    assert facts["train"] == facts["pairs read"] - 1 - facts["length ratio too large"] - len(every)
    tokens = decoded(output, "test", "en", "en-fr")
    assert len(tokens) == 2  # a given test set is not cleaned
    raw = list(lines_of(output / "test.raw.fr"))
    assert raw == [test[0][1], test[1][1].strip()]
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == sorted(urls)


@pytest.mark.usefixtures("forked_preprocess")
def test_wmt16_en_de(tmp_path):
    """Google's archive contains subwords: lines do not change, and the dictionary has the right size."""
    pairs = [(f"the@@ s{i} &apos;s  x", f"d@@ er t{i} @-@ y") for i in range(40)]
    stems = {"train.tok.clean.bpe.32000": pairs, "newstest2013.tok.bpe.32000": pairs[:5]}
    stems["newstest2014.tok.bpe.32000"] = pairs[5:9]
    texts = {
        f"{stem}.{code}": [pair[side] for pair in lines]
        for stem, lines in stems.items()
        for side, code in enumerate(("en", "de"))
    }
    urls = {"wmt16_en_de.tar.gz": archive(tmp_path / "www" / "wmt16_en_de.tar.gz", texts)}
    recipe = localized("wmt16_en_de", urls, tmp_path, "words=64")
    facts = prepare(recipe, tmp_path / "bin", downloads=tmp_path / "downloads", console=QUIET)
    assert [facts[name] for name in SPLITS] == [40, 5, 4]
    dictionary = Dictionary.load(str(tmp_path / "bin" / "dict.de.txt"))
    assert len(dictionary) == 64
    known = [[word if word in dictionary else "<unk>" for word in target.split()] for _, target in pairs]
    assert decoded(tmp_path / "bin", "train", "de") == [join(" ".join(words)) for words in known]
    assert not (tmp_path / "bin" / "test.raw.de").exists()  # there is no raw text


def test_stages_are_bound_to_their_inputs(tmp_path):
    calls = []

    def make(folder: Path) -> dict[str, int]:
        calls.append(folder)
        (folder / "x").write_text("done")
        return {"n": len(calls)}

    assert Stages({"a": 1}).run(tmp_path / "s", make) == {"n": 1}
    assert Stages({"a": 1}).run(tmp_path / "s", make) == {"n": 1}
    assert Stages({"a": 2}).run(tmp_path / "s", make) == {"n": 2}
    (tmp_path / "s" / "prepared.json").write_text('{"key": ')
    assert Stages({"a": 2}).run(tmp_path / "s", make) == {"n": 3}


def test_changed_files_are_noticed(table, tmp_path):
    copy = tmp_path / "copy.tsv.gz"
    copy.write_bytes(table.read_bytes())
    for corpus in own_recipes(copy):
        recipe, base = read_recipe([str(corpus)], OPTIONS)
        before = Stages(module._inputs(recipe, base)).key
        os.utime(copy, ns=(time.time_ns(), time.time_ns() + 1))
        assert Stages(module._inputs(recipe, base)).key != before, corpus


def own_recipes(text: Path) -> list[Path]:
    """Return the text and recipes in the same directory that name it."""
    recipes = [text.with_name("template.yaml"), text.with_name("paths.yaml")]
    for path, train in zip(recipes, (text.name, f"[{text.name}]"), strict=True):
        path.write_text(f"{{languages: en-de, train: [{train}], valid: 11, test: 13}}")
    return [text, *recipes]


def test_a_recipe_names_files_in_its_directory(table, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    copy = tmp_path / "text" / "copy.tsv.gz"
    copy.write_bytes(table.read_bytes())
    monkeypatch.chdir(tmp_path)
    for corpus in own_recipes(copy):
        recipe, base = read_recipe([str(corpus)], OPTIONS)
        assert [found.paths for found in recipe.corpora("train", [base])] == [(copy,)]


def test_nothing_left_after_cleaning(table, tmp_path):
    recipe, base = read_recipe([str(table)], {**OPTIONS, "clean": {"max": 2}})
    with raises_error(TranslationError, code="empty-data", names=["train", " too long"]):
        prepare(recipe, tmp_path / "bin", base, console=QUIET)
    assert not (tmp_path / "bin").exists()
