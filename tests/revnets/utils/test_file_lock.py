"""A lock has one owner, names it, and ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from revnets.utils import file_lock
from revnets.utils.atomic_files import remove_leftovers
from revnets.utils.file_lock import FileLock, LockedError, Owner

HOLD = """
import sys, time
from pathlib import Path
from revnets.utils.file_lock import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.acquire()
if "fork" in sys.argv:
    import os
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start():
    """Return a function that starts Python processes and waits for a line. They are ended afterwards."""
    started = []

    def run(code: str, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, words)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline()
        return child

    yield run
    for child in started:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_owner_is_named_and_its_lock_ends_with_it(tmp_path, start):
    path = tmp_path / ".lock"
    child = start(HOLD, path)
    with pytest.raises(LockedError) as caught:
        FileLock(path).acquire()
    assert caught.value.owner == Owner(child.pid, Owner.current().host)
    child.kill()
    child.wait()
    assert path.exists()
    with FileLock(path):
        assert path.read_text().split()[0] == str(os.getpid())
    assert not path.exists()


def test_fork_does_not_keep_the_lock_of_its_parent(tmp_path, start):
    """Workers of a data loader outlive a killed process for some seconds."""
    path = tmp_path / ".lock"
    child = start(HOLD, path, "fork")
    child.kill()
    child.wait()
    with FileLock(path):
        assert path.exists()


def test_two_locks_of_one_process_exclude_each_other(tmp_path):
    with FileLock(tmp_path / "a") as lock, pytest.raises(LockedError):
        FileLock(lock.path).acquire()


def test_live_process_is_detected_on_file_systems_without_locks(tmp_path, start, monkeypatch):
    monkeypatch.setattr(file_lock, "try_lock", lambda _: None)
    path = tmp_path / "lock"
    child = start("import time; print('ready', flush=True); time.sleep(600)")
    path.write_text(f"{child.pid} {Owner.current().host}\n")
    with pytest.raises(LockedError):
        FileLock(path).acquire()
    path.write_text(f"{child.pid} another-host\n")
    with FileLock(path) as lock:
        assert not lock.is_reliable


def test_reused_process_id_does_not_hold_the_lock(tmp_path, start):
    path = tmp_path / "file"
    path.touch()
    time.sleep(0.2)  # /proc has a resolution of 10 ms
    child = start("import time; print('ready', flush=True); time.sleep(600)")
    host = Owner.current().host
    assert not Owner(child.pid, host).may_have_written(path)
    path.write_text("later")
    assert Owner(child.pid, host).may_have_written(path)
    child.kill()
    child.wait()
    assert not Owner(child.pid, host).may_have_written(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"no number here\n", b"\xff 1\n", b"99999999999999999999 host\n"])
def test_damaged_lock_file_is_replaced(tmp_path, content):
    path = tmp_path / "lock"
    path.write_bytes(content)
    with FileLock(path):
        assert path.read_text().split()[0] == str(os.getpid())


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "pipe", "folder"])
def test_other_files_are_unchanged(tmp_path, kind):
    path, other = tmp_path / "lock", tmp_path / "other"
    if kind == "link":
        other.write_text("precious")
    make = {"pipe": os.mkfifo, "folder": os.mkdir}.get(kind, lambda path: path.symlink_to(other))
    make(path)
    with pytest.raises(OSError, match=r"not a regular file: .*lock"):
        FileLock(path).acquire()
    assert path.is_symlink() or path.exists()
    assert other.exists() == (kind == "link")
    assert kind != "link" or other.read_text() == "precious"


WRITE = """
import sys, time
from pathlib import Path
from revnets.utils.atomic_files import replacing, replacing_folder
with replacing(Path(sys.argv[1]) / "file") as file, replacing_folder(Path(sys.argv[1]) / "folder") as folder:
    file.write(b"half")
    (folder / "part").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("exclusive", [False, True])
def test_files_of_live_processes_are_kept(tmp_path, start, exclusive):
    child = start(WRITE, tmp_path)
    there = sorted(os.listdir(tmp_path))
    assert len(there) == 2
    remove_leftovers(tmp_path, exclusive=exclusive)
    assert sorted(os.listdir(tmp_path)) == there
    child.kill()
    child.wait()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []
