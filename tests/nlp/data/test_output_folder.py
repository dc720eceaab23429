"""prepare-mt replaces only its own data sets; texts and other files stay with all options."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support.errors import raises_error
from tests.support.parallel_texts import QUIET, numbered_pairs, recipe_for, write_pairs

pytest.importorskip("fairseq")

from nlp.data import prepare as module
from nlp.data.binarization import count_sentences, run_preprocess, unknown_words
from nlp.data.corpus import TranslationError
from nlp.data.output_folder import check_replaceable
from nlp.data.prepare import prepare
from nlp.data.resumable_steps import MAX_NOTE, Stages, read_array, read_note
from revnets.utils.file_lock import FileLock

pytestmark = pytest.mark.usefixtures("forked_preprocess")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a text, two data sets in `data-bin`, and links."""
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "data-bin/mine", "data-bin/other", "empty"):
        (tmp_path / name).mkdir(parents=True)
    write_pairs(tmp_path / "corpus", numbered_pairs(60))
    for name in ("mine", "other"):
        data_set(tmp_path / "data-bin" / name)
    (tmp_path / "file").write_text("x")
    (tmp_path / "to-corpus").symlink_to("corpus")
    (tmp_path / "to-mine").symlink_to("data-bin/mine")
    return tmp_path


def data_set(folder: Path) -> None:
    """Write the files of a data set of another recipe."""
    (folder / "prepared.json").unlink(missing_ok=True)
    names = ("dict.en.txt", "codes", "train.en-de.en.bin", "test.raw.de", "preprocess.log")
    Stages("other").run(folder, lambda partial: {name: (partial / name).write_text("x") for name in names})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replaced(folder: Path, output: str | Path) -> None:
    texts = [folder / "corpus" / name for name in ("train.en", "train.de")]
    prepare(recipe_for(texts, tokenize=False, merges=None), Path(output), overwrite=True, console=QUIET)


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("corpus", "conflicting-values"),
        ("corpus/", "conflicting-values"),
        ("to-corpus", "conflicting-values"),
        ("data-bin/../corpus", "conflicting-values"),
        (".", "conflicting-values"),
        ("", "conflicting-values"),
        ("/", "file-exists"),
        ("data-bin", "file-exists"),
        ("data-bin/..", "conflicting-values"),
        ("file", "file-exists"),
    ],
)
def test_other_directories_are_never_replaced(folder, output, code):
    before = contents(folder)
    with raises_error(TranslationError, code=code, names=["--output"]):
        replaced(folder, output)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["checkpoints/last.pt", "notes.txt", ".hidden", "train.en-de.en.bin.old"])
def test_a_data_set_with_something_else_in_it_is_not_replaced(folder, name):
    extra = folder / "data-bin/mine" / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("mine")
    before = contents(folder)
    with raises_error(TranslationError, code="file-exists", names=["data-bin/mine", name.split("/")[0]]):
        replaced(folder, "data-bin/mine")
    assert contents(folder) == before


def test_a_data_set_without_its_note_is_not_replaced(folder):
    for text in (None, "{", "[]", '{"key": 1}'):
        note = folder / "data-bin/mine/prepared.json"
        note.unlink() if text is None else note.write_text(text)
        before = contents(folder)
        with raises_error(TranslationError, code="file-exists", names="data-bin/mine"):
            replaced(folder, "data-bin/mine")
        assert contents(folder) == before


def test_a_text_of_another_data_set_keeps_it(folder):
    """`test.raw.de` of a data set is the training text of a new data set at the same path."""
    mine = folder / "data-bin/mine"
    texts = [mine / "test.raw.de", folder / "corpus/train.de"]
    before = contents(folder)
    with raises_error(TranslationError, code="conflicting-values", names=["test.raw.de"]):
        prepare(recipe_for(texts), mine, overwrite=True, console=QUIET)
    assert contents(folder) == before


def test_the_working_directory_is_not_replaced(folder, monkeypatch):
    monkeypatch.chdir(folder / "data-bin/mine")
    before = contents(folder)
    for output in (".", "../mine", str(folder / "to-mine")):
        with raises_error(TranslationError, code="conflicting-values", names="working directory"):
            replaced(folder, output)
    assert contents(folder) == before


def test_steps_do_not_replace_other_directories(folder):
    other = folder / "out.work" / "tokens"
    other.mkdir(parents=True)
    (other / "notes").write_text("mine")
    with raises_error(TranslationError, code="file-exists", names="out.work/tokens"):
        replaced(folder, "out")
    assert (other / "notes").read_text() == "mine"


def test_files_added_during_a_run_stay(folder, monkeypatch):
    mine = folder / "data-bin/mine"
    binarize = module._Steps.binarize

    def slow(self, *args):
        (mine / "results.txt").write_text("mine")
        return binarize(self, *args)

    monkeypatch.setattr(module._Steps, "binarize", slow)
    with raises_error(TranslationError, code="file-exists", names=["data-bin/mine", "results.txt"]):
        replaced(folder, "data-bin/mine")
    assert (mine / "results.txt").read_text() == "mine"
    assert (mine / "codes").read_text() == "x"


def test_two_processes_do_not_write_one_directory(folder):
    lock = FileLock(folder / "data-bin" / ".mine.lock")
    before = contents(folder)
    with lock, raises_error(TranslationError, code="output-in-use", names=["data-bin/mine", f"process {os.getpid()}"]):
        replaced(folder, "to-mine")
    assert contents(folder) == before


@pytest.mark.parametrize("output", ["data-bin/mine", "data-bin/mine/", "to-mine", "empty"])
def test_a_data_set_and_an_empty_directory_are_replaced(folder, output):
    """A link is followed. Other directories, and other files in `.work`, do not change."""
    before = contents(folder)
    work = folder / ("empty.work" if output == "empty" else "data-bin/mine.work")
    work.mkdir()
    (work / "notes").write_text("mine")
    replaced(folder, output)
    after = contents(folder)
    assert (folder / output / "train.en-de.en.bin").stat().st_size > 1
    place = "empty" if output == "empty" else "data-bin/mine"
    changed = {name for name in before if before[name] != after.get(name)}
    assert all(name.startswith(place) for name in changed)
    assert {name for name in after.keys() - before.keys() if not name.startswith(f"{place}/")} == {
        f"{place}.work/notes"
    }
    assert (folder / "to-mine").is_symlink()
    log = (folder / output / "preprocess.log").read_text()
    assert str(folder / place) in log
    assert ".partial" not in log
    assert os.listdir(work) == ["notes"]


@pytest.mark.parametrize("name", ["prepared.json", "preprocess.log"])
def test_a_pipe_in_a_data_set_does_not_block(folder, name):
    """Without its note, a directory is not replaced."""
    path = folder / "data-bin" / "mine" / name
    path.unlink()
    os.mkfifo(path)
    assert unknown_words(path.parent) == {}
    if name == "prepared.json":
        assert Stages("other").facts(path.parent) is None
        with raises_error(TranslationError, code="file-exists"):
            check_replaceable(path.parent)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_log_that_is_not_a_regular_file(tmp_path, make):
    make(tmp_path / "preprocess.log")
    with pytest.raises(OSError) as caught:
        run_preprocess(tmp_path, tmp_path / "out", ("en", "de"), None, 1, tmp_path / "preprocess.log")
    assert (caught.value.filename, bool(caught.value.strerror)) == (str(tmp_path / "preprocess.log"), True)
    assert not (tmp_path / "out").exists()


def test_a_large_note_is_not_read(folder):
    note = folder / "data-bin" / "mine" / "prepared.json"
    os.truncate(note, MAX_NOTE + 1)
    with pytest.raises(OSError, match=f"{MAX_NOTE:,}"):
        read_note(note.parent)


@pytest.mark.parametrize("facts", [[], "train", {"train": "many"}, None])
def test_a_note_with_facts_of_another_type_is_not_used(tmp_path, facts):
    stages = Stages("same")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "prepared.json").write_text(json.dumps({"key": stages.key, "facts": facts, "inputs": "same"}))
    assert stages.facts(tmp_path / "made") is None


@pytest.mark.parametrize("content", ["pickle", "type", "shape", "cut", "pipe", "missing"])
def test_an_array_that_no_step_wrote_is_refused(tmp_path, content):
    path = tmp_path / "chosen.npy"
    arrays = {"pickle": np.array([print]), "type": np.zeros(7, np.int64), "shape": np.zeros((7, 3), np.int8)}
    if content == "pipe":
        os.mkfifo(path)
    elif content != "missing":
        np.save(path, arrays.get(content, np.zeros(7, np.int8)), allow_pickle=True)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    with raises_error(TranslationError, code="damaged-file", names=str(path)):
        read_array(path, np.int8)


@pytest.mark.parametrize("content", [b"", b"MMIDIDX\0\0", b"x" * 997])
def test_an_index_that_fairseq_did_not_write_is_refused(tmp_path, content):
    (tmp_path / "train.en-de.en.idx").write_bytes(content)
    with raises_error(TranslationError, code="damaged-file", names="train.en-de.en.idx"):
        count_sentences(tmp_path / "train.en-de.en.idx")
