"""Files are written completely or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest
import torch

from revnets.utils.atomic_files import TEMPORARY, append, link, remove_leftovers, replacing, replacing_folder
from revnets.utils.file_lock import Owner


def test_failure_leaves_only_the_old_file(tmp_path):
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


def test_old_file_exists_until_the_new_one_is_complete(tmp_path):
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


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / f".state.123{TEMPORARY}").write_bytes(b"half")
    (tmp_path / "state").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["state"]


def test_directory_is_replaced_completely_or_not_at_all(tmp_path):
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


def test_failed_rename_leaves_the_old_directory(tmp_path, monkeypatch):
    path = tmp_path / "data"
    with replacing_folder(path) as folder:
        (folder / "part").write_text("first")

    def refuse(source, target):
        raise OSError(errno.EIO, "Input/output error", str(source))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output error") as caught, replacing_folder(path) as folder:
        (folder / "part").write_text("second")
    assert caught.value.filename == str(path)
    assert (path / "part").read_text() == "first"
    assert os.listdir(tmp_path) == ["data"]


def test_directories_of_killed_processes_are_removed(tmp_path):
    left = tmp_path / f".data.1{TEMPORARY}"
    left.mkdir()
    (left / "part").touch()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["state", "a.1", "set [v2]*"])
def test_writing_a_file_removes_its_leftovers(tmp_path, name):
    for left in (f".{name}.123{TEMPORARY}", f".{name}.4000000000@{Owner.current().host}{TEMPORARY}"):
        (tmp_path / left).write_bytes(b"half")
    (tmp_path / f".other.123{TEMPORARY}").write_bytes(b"half of another")
    with replacing(tmp_path / name) as file:
        file.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted([name, f".other.123{TEMPORARY}"])


def test_files_of_other_machines_stay_for_a_day_unless_exclusive(tmp_path):
    left = tmp_path / f".state.123@elsewhere{TEMPORARY}"
    left.write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert left.exists()
    remove_leftovers(tmp_path, exclusive=True)
    assert not left.exists()


def test_directory_is_restored_after_an_interrupted_replacement(tmp_path):
    """A process can be killed between both renames of `replacing_folder`."""
    aside = tmp_path / f".data.4000000000@{Owner.current().host}.old{TEMPORARY}"
    aside.mkdir()
    (aside / "part").write_text("first")
    remove_leftovers(tmp_path)
    assert (tmp_path / "data" / "part").read_text() == "first"


def test_error_of_a_full_disk_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "state"
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    try:
        for write in (lambda file: file.write(bytes(1 << 16)), lambda file: torch.save(torch.zeros(1 << 14), file)):
            with pytest.raises(OSError, match="File too large") as caught, replacing(path) as file:
                write(file)
            assert caught.value.filename == str(path)
        with pytest.raises(OSError, match="File too large") as caught:
            append(path, bytes(1 << 16))
        assert caught.value.filename == str(path)
        with pytest.raises(OSError, match="File too large") as caught, replacing_folder(tmp_path / "data") as folder:
            (folder / "part").write_bytes(bytes(1 << 16))
        assert caught.value.filename == str(tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["{0}", "{name}", "a%s", "[b]", "*"])
def test_names_with_special_characters(tmp_path, name):
    for _ in range(2):
        with replacing(tmp_path / name, "w") as file:
            file.write("text")
        with replacing_folder(tmp_path / f"{name}.d") as folder:
            (folder / "x").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name}.d"])
    assert (tmp_path / name).read_text() == "text"
