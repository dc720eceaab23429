"""Parquet files of soft labels: round trips, and one-line errors for damaged files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.testing import assert_close

from tests.support.errors import raises_error
from vision.pseudo_labels.label_files import METADATA, Provenance, part_path, read_labels, write_part
from vision.pseudo_labels.sparse import SparseProbabilities, joined_rows, largest

HEADS = {"places": 7, "animals": 5}
SET = Provenance("t" * 64, "d" * 64, {"min_probability": 0.01}, HEADS, 3)
ROWS = 11


def dense(part: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(part)
    return {name: (3 * torch.randn(ROWS, count, generator=generator)).softmax(1) for name, count in HEADS.items()}


def keys(part: int) -> list[str]:
    return [f"{part}/{row:02d}.jpg" for row in range(ROWS)]


def write(folder, part: int, provenance: Provenance = SET, name: int | None = None) -> None:
    heads = {head: largest(values, 0.01) for head, values in dense(part).items()}
    path = part_path(folder, part if name is None else name)
    write_part(path, provenance, part, keys(part), heads, [f"{part}/broken.jpg"])


@pytest.fixture
def folder(tmp_path):
    for part in range(3):
        write(tmp_path, part)
    return tmp_path


def rewritten(path, change) -> None:
    """The file with another table, which still has the metadata."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def test_rows_are_read_in_order(folder):
    found = read_labels(folder)
    assert (found.heads, found.rows, found.provenance) == (HEADS, 3 * ROWS, SET)
    assert found.unreadable == {f"{part}/broken.jpg" for part in range(3)}
    batches = list(found.batches(4))
    assert [key for batch in batches for key in batch.keys] == [key for part in range(3) for key in keys(part)]
    for name, count in HEADS.items():
        sparse = joined_rows([batch.heads[name] for batch in batches])
        rows = torch.stack([sparse.row(row, count) for row in range(len(sparse))])
        wanted = torch.cat([dense(part)[name] for part in range(3)])
        stored = wanted > 0.01
        assert_close(rows[stored], wanted[stored], atol=0, rtol=2**-10)
        rest = torch.where(stored, 0.0, wanted).sum(1)
        assert_close(torch.where(stored, 0.0, rows).sum(1), rest, atol=3e-3, rtol=0)


def test_equal_labels_are_equal_bytes(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(other, 1)
    assert part_path(other, 1).read_bytes() == part_path(folder, 1).read_bytes()


def test_columns_have_the_types_that_are_documented(folder):
    schema = pq.read_schema(part_path(folder, 0))
    assert str(schema.field("key").type) == "string"
    for name in HEADS:
        assert schema.field(f"{name}.classes").type.value_type == pa.int32()
        assert schema.field(f"{name}.probabilities").type.value_type == pa.float16()
        assert schema.field(f"{name}.rest").type == pa.float16()
    content = json.loads(schema.metadata[METADATA])
    assert set(content) == {"teacher", "data", "settings", "heads", "parts", "round", "part", "unreadable", "digest"}


def test_a_missing_part_is_named(folder):
    part_path(folder, 1).unlink()
    with raises_error(code="missing-file", source=folder, names=["2 of 3", "part-00001.parquet"]):
        read_labels(folder)


def test_a_duplicate_part_is_named(folder):
    write(folder, 0, name=2)
    with raises_error(code="name-clash", source=part_path(folder, 2), names="part-00000.parquet"):
        read_labels(folder)


def test_a_part_of_another_set_is_named(folder):
    write(folder, 1, replace(SET, teacher="u" * 64))
    with raises_error(code="settings-differ", source=part_path(folder, 1), names="teacher"):
        read_labels(folder)


def test_images_in_two_parts_are_named(folder):
    heads = {name: largest(values, 0.01) for name, values in dense(0).items()}
    write_part(part_path(folder, 1), SET, 1, keys(0), heads)
    with raises_error(code="name-clash", source=part_path(folder, 1), names="0/00.jpg"):
        list(read_labels(folder).batches())


@pytest.mark.parametrize("size", [0, 3, 100, -9, -1])
def test_a_truncated_file_is_named(folder, size):
    path = part_path(folder, 1)
    path.write_bytes(path.read_bytes()[:size])
    with raises_error(code="damaged-file", source=path):
        read_labels(folder)


def test_damaged_pages_are_noticed(folder):
    path = part_path(folder, 1)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with raises_error(code="damaged-file", source=path):
        list(read_labels(folder).batches())


def test_another_parquet_file_is_not_a_label_file(folder):
    pq.write_table(pa.table({"key": ["a"]}), part_path(folder, 1))
    with raises_error(code="wrong-format", source=part_path(folder, 1)):
        read_labels(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"part": "1"},
        {"part": 3},
        {"parts": 10**9},
        {"round": 0},
        {"heads": {}},
        {"heads": {"places": 10**9, "animals": 5}},
        {"heads": {"places": 7}},
        {"unreadable": 3},
        {"settings": None},
        {"digest": 3},
    ],
)
def test_metadata_that_do_not_fit_are_refused(folder, change):
    path = part_path(folder, 1)
    table = pq.read_table(path)
    content = json.loads(table.schema.metadata[METADATA]) | change
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(content)}), path)
    with raises_error(code="damaged-file", source=path):
        read_labels(folder)


def with_values(table: pa.Table, name: str, change) -> pa.Table:
    """The table with other values in a list column."""
    column = table[name].combine_chunks()
    values = change(np.array(column.flatten()))
    lists = pa.ListArray.from_arrays(column.offsets, pa.array(values, column.type.value_type))
    return table.set_column(table.schema.get_field_index(name), name, lists)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("places.classes", lambda values: values + 3),
        ("places.classes", lambda values: values * 0),
        ("places.classes", lambda values: values - 1),
        ("places.probabilities", lambda values: values * 0),
        ("places.probabilities", lambda values: -values),
        ("places.probabilities", lambda values: values * np.float16(0.5)),
        ("places.probabilities", lambda values: values[::-1].copy()),
        ("places.probabilities", lambda values: values + np.float16(np.nan)),
    ],
)
def test_rows_that_are_not_predictions_are_refused(folder, name, change):
    path = part_path(folder, 1)
    rewritten(path, lambda table: with_values(table, name, change))
    with raises_error(code="damaged-file", source=path, names="places"):
        list(read_labels(folder).batches())


@pytest.mark.parametrize("size", [4, 2**16])
def test_other_rows_of_the_same_shape_do_not_match_the_digest(folder, size):
    path = part_path(folder, 1)
    heads = {name: largest(values, 0.01) for name, values in dense(2).items()}
    other = path.with_name("other")
    write_part(other, SET, 1, keys(1), heads, ["1/broken.jpg"])
    rewritten(path, lambda _: pq.read_table(other))
    with raises_error(code="damaged-file", source=path, names="digest"):
        list(read_labels(folder).batches(size))


def test_a_file_without_a_digest_is_read(folder):
    """Earlier versions wrote none."""
    path = part_path(folder, 1)
    table = pq.read_table(path)
    content = json.loads(table.schema.metadata[METADATA])
    del content["digest"]
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(content)}), path)
    assert len(list(read_labels(folder).batches())) == 3


def test_keys_that_are_not_sorted_are_refused(folder):
    path = part_path(folder, 1)
    rewritten(path, lambda table: table.take([*range(5), 3, *range(6, ROWS)]))
    with raises_error(code="damaged-file", source=path, names="1/03.jpg"):
        list(read_labels(folder).batches())


def test_long_keys_are_refused(folder):
    path = part_path(folder, 1)
    rewritten(path, lambda table: table.set_column(0, "key", pa.array(["a" * 100_003] * ROWS)))
    with raises_error(code="damaged-file", source=path, names="100003 characters"):
        list(read_labels(folder).batches())


def test_a_key_that_would_fill_the_line_is_shortened(folder):
    path = part_path(folder, 1)
    rewritten(path, lambda table: table.set_column(0, "key", pa.array(["a" * 5003] * ROWS)))
    with raises_error(code="damaged-file", source=path) as caught:
        list(read_labels(folder).batches())
    assert len(str(caught.value)) < 1000


def test_an_image_with_a_row_that_is_also_unreadable_is_named(folder):
    heads = {name: largest(values, 0.01) for name, values in dense(1).items()}
    write_part(part_path(folder, 1), SET, 1, keys(1), heads, [keys(1)[3]])
    with raises_error(code="damaged-file", source=part_path(folder, 1), names="1/03.jpg"):
        list(read_labels(folder).batches())


def test_a_row_that_would_fill_the_memory_is_refused(tmp_path):
    """Sixteen million equal probabilities in one row take few bytes on the disk."""
    count = 2**24
    sparse = SparseProbabilities(
        np.array([0, count]), np.zeros(count, np.int32), np.zeros(count, np.float16), np.ones(1, np.float16)
    )
    write_part(part_path(tmp_path, 0), replace(SET, heads={"places": 7}, parts=1), 0, ["a"], {"places": sparse})
    assert part_path(tmp_path, 0).stat().st_size < 2**20
    with raises_error(code="damaged-file", source=part_path(tmp_path, 0), names="declares"):
        read_labels(tmp_path)


def test_directories_without_labels_are_named(tmp_path):
    with raises_error(code="missing-file", source=tmp_path):
        read_labels(tmp_path)
    with raises_error(code="missing-file", source=tmp_path / "no"):
        read_labels(tmp_path / "no")
    (tmp_path / "file").touch()
    with raises_error(code="not-a-folder", source=tmp_path / "file"):
        read_labels(tmp_path / "file")


def test_the_rest_is_spread_over_the_other_classes():
    sparse = largest(torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]), 0.2)
    assert sparse.classes.tolist() == [0, 1]
    assert_close(sparse.row(0, 5), torch.tensor([0.5, 0.25, 0.25 / 3, 0.25 / 3, 0.25 / 3]))


def test_equal_probabilities_are_ordered_by_class():
    sparse = largest(torch.tensor([[0.1, 0.3, 0.3, 0.3]]), 0.01)
    assert sparse.classes.tolist() == [1, 2, 3, 0]
