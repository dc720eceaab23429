"""The output directory of a run: one run at a time, atomic files, and one-line errors for unusable directories."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from revnets.utils.file_lock import FileLock, Owner
from tests.support import forked_programs
from tests.support.errors import raises_error
from tests.support.training_processes import console_output, process
from tests.support.training_runs import tiny
from vision.checkpoints import reader
from vision.checkpoints.manager import CheckpointError
from vision.checkpoints.reshard import reshard
from vision.config.run import load_config
from vision.training.run_log import LOG, RunLogger, read_log, read_records
from vision.training.trainer import Trainer

SHORT = {"epochs": 1, "batch_size": 340, "save_every": None, "log_every": 1}


def trainer(output: Path, console: Console | None = None, **changes) -> Trainer:
    return Trainer(load_config(tiny(output, **{**SHORT, **changes})), console or Console(quiet=True))


def test_a_run_whose_output_is_in_use_is_refused_before_it_reads_data(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with (
        FileLock(output / ".lock"),
        raises_error(code="output-in-use", key="output", names=[str(output), str(Owner.current())]),
    ):
        trainer(output, data={"name": "idx", "root": "nowhere"})
    assert os.listdir(output) == []


def test_a_run_is_refused_if_another_has_written_checkpoints(tmp_path):
    late = trainer(tmp_path)
    trainer(tmp_path).fit()
    with raises_error(code="output-in-use", key="output"):
        late.fit()


def test_a_run_holds_the_lock_until_it_ends(tmp_path):
    run, seen = trainer(tmp_path), []
    evaluate = run.state.evaluate

    def looking(*args):
        with raises_error(code="output-in-use", key="output"):
            trainer(tmp_path)
        seen.append((tmp_path / ".lock").read_text().split()[0])
        return evaluate(*args)

    run.state.evaluate = looking
    run.fit()
    assert seen == [str(os.getpid())]
    assert not (tmp_path / ".lock").exists()


def test_leftovers_of_killed_runs_are_removed_at_the_next_start(tmp_path):
    trainer(tmp_path).fit()
    expected = sorted(path.name for path in tmp_path.rglob("*") if "tfevents" not in path.name)
    for left in (".curves.png", ".config.yaml", ".log.jsonl", "checkpoints/.best.pt", "checkpoints/.step-0000002.pt"):
        (tmp_path / f"{left}.123.partial").write_bytes(b"half")
        (tmp_path / f"{left}.4000000000@elsewhere.partial").write_bytes(b"half")
    (tmp_path / "checkpoints" / ".best.123.partial").mkdir()
    (tmp_path / "checkpoints" / ".best.123.partial" / "state.pt").write_bytes(b"half")
    trainer(tmp_path).fit()
    assert sorted(path.name for path in tmp_path.rglob("*") if "tfevents" not in path.name) == expected


def test_an_evaluation_without_its_checkpoint_is_dropped(tmp_path):
    """A run was killed between the two; a checkpoint of the same step was written before the evaluation."""
    with RunLogger(tmp_path, 0) as logger:
        logger.write("eval", 1, 5, {"raw_loss": 1.0})
        logger.write("train", 2, 10, {"loss": 1.0})
        logger.write("eval", 2, 10, {"raw_loss": 1.0})
    RunLogger(tmp_path, 10, epoch=1)
    assert [(line["kind"], line["step"]) for line in read_log(tmp_path / LOG)] == [("eval", 5), ("train", 10)]


GOOD = b'{"kind": "train", "epoch": 1, "step": 1, "loss": 0.5}\n'
DAMAGE = {
    "garbage": b"what is this\n",
    "zeros": bytes(64) + b"\n",
    "zeros at the end": bytes(64),
    "cut short": GOOD[:-9],
    "not UTF-8": b'{"kind": "tr\xc3\n',
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "text": b'"train"\n',
    "deep": b"[" * 100_000 + b"\n",
    "deep mapping": b'{"kind": ' * 50_000 + b"\n",
    "no kind": b'{"epoch": 1, "step": 1, "loss": 0.5}\n',
    "another kind": b'{"kind": ["train"], "epoch": 1, "step": 1, "loss": 0.5}\n',
    "no step": b'{"kind": "train", "epoch": 1, "loss": 0.5}\n',
    "step as text": b'{"kind": "train", "epoch": 1, "step": "1", "loss": 0.5}\n',
    "step is null": b'{"kind": "train", "epoch": 1, "step": null, "loss": 0.5}\n',
    "step is true": b'{"kind": "train", "epoch": 1, "step": true, "loss": 0.5}\n',
    "step is 1.5": b'{"kind": "train", "epoch": 1, "step": 1.5, "loss": 0.5}\n',
    "step is 0": b'{"kind": "eval", "epoch": 1, "step": 0, "raw_loss": 0.5}\n',
    "epoch is 0": b'{"kind": "eval", "epoch": 0, "step": 1, "raw_loss": 0.5}\n',
    "step is huge": b'{"kind": "train", "epoch": 1, "step": ' + b"9" * 400 + b', "loss": 0.5}\n',
    "more digits than Python reads": b'{"kind": "train", "epoch": 1, "step": ' + b"9" * 9000 + b', "loss": 0.5}\n',
    "no loss": b'{"kind": "train", "epoch": 1, "step": 1}\n',
    "loss as text": b'{"kind": "train", "epoch": 1, "step": 1, "loss": "0.5"}\n',
    "loss is huge": b'{"kind": "train", "epoch": 1, "step": 1, "loss": 1e300}\n',
    "a note": b'{"note": "lr was too high"}\n',
}


@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_skipped_and_counted(tmp_path, line):
    (tmp_path / LOG).write_bytes(GOOD + line)
    assert read_records(tmp_path / LOG) == ([{"kind": "train", "epoch": 1, "step": 1, "loss": 0.5}], 1)


def test_a_run_resumes_with_a_damaged_log_and_counts_lost_lines(tmp_path):
    trainer(tmp_path / "run").fit()
    log = tmp_path / "run" / LOG
    good = log.read_bytes()
    evaluation = b'{"kind": "eval", "epoch": 1, "step": 2}\n'  # readable, but without what figures show
    log.write_bytes(evaluation + b"".join(line.rstrip(b"\n") + b"\n" for line in DAMAGE.values()) + good)
    with open(tmp_path / "output", "w") as file:
        trainer(tmp_path / "run", Console(file=file, width=400), epochs=2).fit()
    assert f"{log}: skipped {len(DAMAGE)} damaged lines" in (tmp_path / "output").read_text().splitlines()
    assert log.read_bytes().startswith(evaluation + good)
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_log_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / LOG)
    with pytest.raises(OSError, match="not a regular file"):
        read_log(tmp_path / LOG)


@pytest.mark.parametrize("folder", ["", "tensorboard", LOG, "checkpoints"])
def test_a_run_continues_if_its_directory_is_removed(tmp_path, capfd, folder):
    run = trainer(tmp_path / "run", save_every=1)
    evaluate = run.state.evaluate

    def removing(*args):
        path = tmp_path / "run" / folder
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        return evaluate(*args)

    run.state.evaluate = removing
    outcome = run.fit()
    assert outcome.last is not None
    assert reader.read(outcome.last)["progress"]["epoch"] == 1
    assert read_log(tmp_path / "run" / LOG)[-1]["kind"] == "eval"
    assert capfd.readouterr().err == ""


def test_an_output_that_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circular").symlink_to(tmp_path / "circular")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "nowhere")
    for output, named in (
        ("file", "file"),
        ("file/below", "file"),
        ("dangling", "dangling"),
        ("dangling/below", "dangling"),
        ("circular", "circular"),
        ("run", "run/checkpoints"),
    ):
        with raises_error(code="not-a-folder", key="output", names=str(tmp_path / named)):
            trainer(tmp_path / output)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    trainer(tmp_path / "link").fit()
    assert (tmp_path / "real" / "checkpoints" / "best.pt").exists()


WITHOUT_PRIVILEGES = """
import ctypes
from revnets.cli.main import main
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0
main()
"""
"""`revnets` in a process that is bound by permissions, also if root runs it."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs capset")
def test_missing_permissions_are_reported_on_one_line(tmp_path):
    run = tmp_path / "run"
    last = trainer(run).fit().last
    command = ("digits", "device=cpu", f"output={run}")
    for folder, mode, words, named in (
        (run / "checkpoints", 0o333, ("train", *command), run / "checkpoints"),
        (run, 0o555, ("train", *command), run),
        (run, 0o000, ("eval", run), run),
    ):
        folder.chmod(mode)
        done = forked_programs.run([sys.executable, "-c", WITHOUT_PRIVILEGES, *words])
        folder.chmod(0o755)
        assert done.returncode in (1, 2)
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert str(named) in line
    assert sorted(os.listdir(run / "checkpoints")) == ["best.pt", last.name]


@pytest.mark.parametrize("count", [0, 2])
def test_reshard_refuses_a_target_in_use(tmp_path, count):
    source = trainer(tmp_path / "run").fit().last
    target = tmp_path / "target"
    with (
        FileLock(tmp_path / ".target.lock"),
        raises_error(CheckpointError, code="output-in-use", source=target, names=str(Owner.current())),
    ):
        reshard(source, target, count)
    reshard(source, target, count)
    assert sorted(os.listdir(tmp_path)) == ["run", "target"]


def test_the_second_of_two_runs_names_the_owner_of_the_output(tmp_path):
    config = tiny(tmp_path / "run", **SHORT)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert process(config) == 4  # a ConfigError
    assert f"is in use by {Owner.current()}. Wait until it ends" in console_output(config)
    assert process(config) == 0
