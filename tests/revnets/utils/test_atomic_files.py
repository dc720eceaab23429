"""Files appear in full or not at all."""

from __future__ import annotations

import os

import pytest

from revnets.utils.atomic_files import TEMPORARY, link, remove_leftovers, replacing, replacing_folder


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def write() -> None:
        with replacing(path) as file:
            file.write(b"half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "deep" / "folder" / "state"
    with replacing(path, "w") as file:
        file.write("first")
        file.flush()
        assert not path.exists()
    with replacing(path, "w") as file:
        file.write("second")
        file.flush()
        assert path.read_text() == "first"
    assert path.read_text() == "second"


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_link_replaces_and_outlives_its_source(tmp_path, monkeypatch, links):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    if not links:

        def refuse(*_):
            raise OSError("Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    link(source, target)
    source.unlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["b"]


def test_leftovers_of_killed_processes_go(tmp_path):
    (tmp_path / f".state.123{TEMPORARY}").write_bytes(b"half")
    (tmp_path / "state").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["state"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "data"

    def fill(text: str, fail: bool = False) -> None:
        with replacing_folder(path) as folder:
            (folder / "part").write_text(text)
            if fail:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill("half", fail=True)
    assert os.listdir(tmp_path) == []
    fill("first")
    with pytest.raises(ZeroDivisionError):
        fill("half", fail=True)
    assert (path / "part").read_text() == "first"
    fill("second")
    assert (path / "part").read_text() == "second"
    assert os.listdir(tmp_path) == ["data"]


def test_folders_of_killed_processes_are_removed(tmp_path):
    left = tmp_path / f".data.1{TEMPORARY}"
    left.mkdir()
    (left / "part").touch()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []
