"""Labeling with Ray Data writes the files of the local engine."""

from __future__ import annotations

import sys

import pytest

from tests.support.errors import raises_error
from tests.support.labeled_images import images, labels, teacher  # noqa: F401  (fixtures)
from tests.support.labeling import contents, label


def test_files_are_those_of_the_local_engine(teacher, images, labels, tmp_path):  # noqa: F811
    ray = pytest.importorskip("ray")
    kept = "part-00001.parquet"
    (tmp_path / kept).write_bytes((labels / kept).read_bytes())
    try:
        assert "23 images in 5 shards, 5 of them labeled" in label(teacher, images, tmp_path, engine="ray")
    finally:
        ray.shutdown()
    assert contents(tmp_path) == contents(labels)


def test_a_missing_ray_is_reported_on_one_line(teacher, images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    with raises_error(code="missing-dependency", key="--engine", names="revnets[ray]"):
        label(teacher, images, tmp_path, engine="ray")
