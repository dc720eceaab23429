"""Lists of keys, and bounds of the memory that they need."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.errors import raises_error
from vision.data.key_lists import MAX_KEY, key_texts, read_keys


@pytest.fixture
def pool():
    """A pool that counts what pyarrow allocates."""
    before = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counting)
    yield counting
    pa.set_memory_pool(before)


def test_repeated_keys_are_stored_once(tmp_path, pool):
    path, key, rows = tmp_path / "list.parquet", "a" * MAX_KEY, 30_011
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([key]))
    pq.write_table(pa.table({"key": column}), path, store_schema=False)
    assert path.stat().st_size < 10_000
    assert read_keys(str(path)) == {key}
    assert pool.max_memory() < rows * MAX_KEY / 10


def test_equal_keys_are_one_object():
    column = pa.array(["x/1.jpg", None, "x/2.jpg", "x/1.jpg"]).dictionary_encode()
    keys = key_texts(column)
    assert keys == ["x/1.jpg", "x/2.jpg", "x/1.jpg"]
    assert keys[0] is keys[2]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("has_dictionary", [False, True])
def test_columns_of_texts_are_read(tmp_path, kind, has_dictionary):
    keys = [f"{number:03d}.jpg" for number in range(307)]
    path = tmp_path / "list.parquet"
    table = pa.table({"key": pa.array([*keys, None, *keys], kind)})
    pq.write_table(table, path, use_dictionary=has_dictionary, row_group_size=101)
    assert read_keys(str(path)) == set(keys)


def test_keys_that_repeat_the_beginning_of_others_are_refused(tmp_path):
    """This encoding stores the common beginning of two keys once, whatever its length."""
    path = tmp_path / "list.parquet"
    table = pa.table({"key": ["a" * 5003] * 3})
    pq.write_table(table, path, use_dictionary=False, column_encoding={"key": "DELTA_BYTE_ARRAY"})
    with raises_error(code="damaged-file", source=path):
        read_keys(str(path))


@pytest.mark.parametrize("column", [{"key": [7, 11]}, {"name": ["a"]}, {"key": [["a"]]}, {"key": [b"a"]}])
def test_columns_without_keys_are_refused(tmp_path, column):
    pq.write_table(pa.table(column), tmp_path / "list.parquet")
    with raises_error(code="wrong-format", key="data.exclude"):
        read_keys(str(tmp_path / "list.parquet"))


def test_long_keys_are_refused(tmp_path):
    key = "a" * (MAX_KEY + 1)
    (tmp_path / "list.txt").write_text(f"b\n{key}\n")
    with raises_error(code="too-large", key="data.exclude"):
        read_keys(str(tmp_path / "list.txt"))
    pq.write_table(pa.table({"key": ["b", key]}), tmp_path / "list.parquet")
    with raises_error(code="damaged-file", source=tmp_path / "list.parquet"):
        read_keys(str(tmp_path / "list.parquet"))
