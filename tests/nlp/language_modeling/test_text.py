"""Documents, tokenizers and packed text."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from nlp.language_modeling.loss import IGNORED
from nlp.language_modeling.packed_text import PackedText, encoded, uncounted
from nlp.language_modeling.text_documents import MAX_DOCUMENT, DatasetConfig, documents, held_out
from nlp.language_modeling.text_tokenizers import byte_tokenizer, learned_tokenizer, saved_tokenizer
from tests.support.errors import raises_error

TEXT = "Tö be,\r\n\n  or not — 漢字 \x00 "


def test_tokens_of_bytes_are_the_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer(TEXT).input_ids == list(TEXT.encode())
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert encoded([TEXT, "b"], tokenizer).tolist() == [256, *TEXT.encode(), 256, 98, 256]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids == list(TEXT.encode())


def test_learned_pairs_spell_every_text_with_fewer_tokens() -> None:
    tokenizer = learned_tokenizer(["the cat and the hat and that"] * 3, 277)
    tokens = encoded([TEXT, "the cat and the hat"], tokenizer)
    assert 257 < len(tokenizer) <= 277
    assert tokenizer.decode(tokens[1:-1]) == f"{TEXT}<|endoftext|>the cat and the hat"
    assert len(tokens) < len(TEXT.encode()) + 3 + 12


def test_an_invalid_tokenizer_is_refused(tmp_path: Path) -> None:
    with raises_error(code="unreadable-file", key="tokenizer"):
        saved_tokenizer(str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "b.txt": b"second",
        "a.txt": b"\xef\xbb\xbffirst",
        "deep/c.txt": b"third",
        "d.md": b"-",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_documents_are_files_in_the_order_of_their_names(folder: Path) -> None:
    assert documents(str(folder), "train") == ["first", "second", "third"]
    assert documents(str(folder / "*.txt"), "train") == ["first", "second"]
    assert documents([str(folder / "d.md"), str(folder / "a.txt")], "train") == ["-", "first"]


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "empty-file"), (b" \n\n", "empty-file"), (b"abc\xe4", "invalid-encoding"), (None, "missing-file")],
)
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, content: bytes | None, code: str) -> None:
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    with raises_error(code=code, key="task.train", names=str(path)):
        documents(str(path), "train")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(MAX_DOCUMENT + 1)
    with raises_error(code="too-large", key="task.train", names=[str(tmp_path / "a.txt"), f"{MAX_DOCUMENT:,}"]):
        documents(str(tmp_path), "train")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.txt")
    with raises_error(code="not-a-file", key="task.val"):
        documents(str(tmp_path), "val")


def test_rows_of_a_data_set_are_documents(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"words": ["one", "", "two"], "number": [1, 2, 3]})
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path)
    place = str(tmp_path)
    assert documents(DatasetConfig(dataset=place, column="words"), "train") == ["one", "two"]
    assert documents(DatasetConfig(dataset=place, column="words", split="test"), "train") == ["one"]
    for options, key, code in (
        ({"split": "other"}, "task.train.split", "unknown-choice"),
        ({"column": "text"}, "task.train.column", "unknown-choice"),
        ({"column": "number"}, "task.train", "empty-data"),
    ):
        with raises_error(code=code, key=key):
            documents(DatasetConfig(dataset=place, **options), "train")


def test_whole_documents_are_held_out() -> None:
    texts = [str(number) for number in range(23)]
    train, val = held_out(texts, 0.2)
    assert len(val) == 5
    assert sorted([*train, *val], key=int) == texts
    assert (train, val) == held_out(texts, 0.2)
    with raises_error(code="too-few-samples", key="task.val"):
        held_out(["one"], 0.5)


def test_validation_predicts_every_token_once() -> None:
    tokens = np.arange(1, 31, dtype=np.uint16)
    packed = PackedText(tokens, 8, end=0)
    samples = [packed[index] for index in range(len(packed))]
    predicted = torch.cat([sample["labels"][1:] for sample in samples])
    assert predicted[predicted != IGNORED].tolist() == list(range(2, 31))
    assert samples[-1]["input_ids"].tolist() == [29, 30, 0, 0, 0, 0, 0, 0]
    for sample in samples:
        counts = sample["labels"] != IGNORED
        assert torch.equal(sample["input_ids"][counts], sample["labels"][counts])
    assert (uncounted(samples[0])["labels"] == IGNORED).all()


def test_training_sequences_are_cut_differently_in_every_epoch() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    packed = PackedText(tokens, 8, end=0, seed=3)
    assert len(packed) == 13
    starts = []
    for epoch in range(40):
        first, last = (packed[epoch, index]["input_ids"].tolist() for index in (0, 12))
        assert first == list(range(first[0], first[0] + 8))
        assert last == [number + 84 for number in first]
        starts.append(first[0])
    assert set(starts) == set(range(7))
    assert starts[5] == PackedText(tokens, 8, end=0, seed=3)[5, 0]["input_ids"][0]
    assert starts != [PackedText(tokens, 8, end=0, seed=4)[epoch, 0]["input_ids"][0].item() for epoch in range(40)]


def test_a_text_shorter_than_two_sequences_is_refused() -> None:
    with raises_error(code="too-few-samples", key="task.train"):
        PackedText(np.arange(13, dtype=np.uint16), 8, end=0, seed=0)
