"""Class maps and shard names that are pipes, endless, or expand to more than fits into memory."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc

import pytest

from tests.support.errors import raises_error
from vision.config.run import load_config
from vision.data.class_maps import read_class_map
from vision.data.shard_names import MAX_SHARDS, check_shards, count_names

NAMES = {"cat": 0, "dog": 1}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_dict_of_every_protocol_is_a_class_map(tmp_path, protocol):
    numbers = {f"class {number}": number for number in range(1000)}
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(numbers, protocol))
    assert read_class_map("map.pkl", str(tmp_path)) == numbers


def test_a_text_file_is_a_class_map(tmp_path):
    (tmp_path / "map.txt").write_text("cat\ndog\n\n")
    assert read_class_map(str(tmp_path / "map.txt")) == NAMES


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["map.txt", "map.pkl"])
def test_a_pipe_is_not_a_class_map(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with raises_error(code="missing-file", key="data.class_map", names="not a regular file"):
        read_class_map(str(tmp_path / name))


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs devices")
def test_a_link_to_a_device_is_not_a_class_map(tmp_path):
    (tmp_path / "map.txt").symlink_to("/dev/zero")
    with raises_error(code="missing-file", key="data.class_map", names="not a regular file"):
        read_class_map(str(tmp_path / "map.txt"))


@pytest.mark.parametrize(
    "data",
    [
        pickle.PROTO + b"\x02}r" + struct.pack("<I", 2**26) + b".",
        b"}p" + b"99999999\n.",
        pickle.PROTO + b"\x05\x96" + struct.pack("<Q", 2**28) + b".",
        pickle.PROTO + b"\x04B" + struct.pack("<I", 2**28) + b".",
    ],
)
def test_memory_of_a_class_map_is_bounded_by_its_size(tmp_path, data):
    (tmp_path / "map.pkl").write_bytes(data)
    tracemalloc.start()
    try:
        with raises_error(code="wrong-format", key="data.class_map", names="map.pkl"):
            read_class_map(str(tmp_path / "map.pkl"))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_class_map_with_nested_tuples_is_refused_before_they_are_hashed(tmp_path):
    nested = b"K\x00" + 60 * (pickle.DUP + pickle.TUPLE2)  # its hash takes 2**60 steps
    (tmp_path / "map.pkl").write_bytes(b"\x80\x02}" + nested + b"K\x01s.")
    with raises_error(code="wrong-format", key="data.class_map", names="more than class names and numbers"):
        read_class_map(str(tmp_path / "map.pkl"))


@pytest.mark.parametrize(
    ("name", "data"),
    [("map.pkl", b"\x80\x04cos\nsystem\n."), ("map.pkl", b"no pickle"), ("map.pkl", b""), ("map.csv", b"cat,dog\n")],
)
def test_other_files_are_not_class_maps(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with raises_error(code="wrong-format", key="data.class_map", names=name):
        read_class_map(str(tmp_path / name))


@pytest.mark.parametrize(
    ("split", "count"),
    [("train", 1), ("train-{0000..0099}.tar", 100), ("{a,b}-{9..0}.tar|5", 20), ("{a,{b,c}}.tar", 4)],
)
def test_names_in_braces_are_counted(split, count):
    assert count_names(split) == count


@pytest.mark.parametrize(
    "split",
    [
        "x-{0..99999999999}.tar",
        "{0..9999}{0..9999}.tar",
        "{a,b}" * 40 + ".tar",
        "{a..z}" * 6,
        "{" * 10**6,
        f"{{0..{'9' * 10**4}}}",
    ],
)
def test_more_shards_than_any_data_set_has_are_refused(tmp_path, split):
    assert count_names(split) > MAX_SHARDS
    with raises_error(code="out-of-range", key="data", names=split[:40]):
        check_shards(tmp_path, split)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["info.json", "_info.json"])
def test_a_pipe_is_refused_as_a_description_of_shards(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with raises_error(code="not-a-file", key="data.root", names=name):
        check_shards(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "code"),
    [("hfds/pandas", "unsafe-file"), ("hfids/pandas/", "unsafe-file"), (["digits"], "wrong-type"), ({}, "wrong-type")],
)
def test_data_names_never_unpickle_files(name, code):
    with raises_error(code=code, key="data.name"):
        load_config({"model": {"timm": "revcol_tiny"}, "output": "run", "data": {"name": name}})
