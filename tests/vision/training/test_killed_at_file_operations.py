"""A run that is killed at its file operations and resumed leaves the same files as a run without an interruption."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.training_processes import FILE_OPERATION, console_output, process, together
from tests.support.training_runs import assert_same, tiny
from vision.checkpoints import manager, reader
from vision.training.run_log import LOG, read_log

FEW = {"epochs": 2, "batch_size": 340, "save_every": 1, "log_every": 1}  # 2 updates an epoch, a checkpoint after each
KINDS = {
    "plain": (FEW, 1),
    "rare checkpoints": ({**FEW, "save_every": 2}, 1),  # only where an epoch ends
    "shards": ({**FEW, "grad_accum": 1, "parallel": "fsdp", "checkpoint": "sharded"}, 2),
}


STRIDES = {"plain": 13, "rare checkpoints": 17, "shards": 53}
"""Steps between tried file operations. They are prime, so that a kill hits other operations in every epoch."""


def run(output: Path, kind: str, count: int = 0) -> int:
    """The exit code of the first process, which is killed at its `count`-th file operation."""
    changes, size = KINDS[kind]
    config = tiny(output, **changes)
    if size == 1:
        return process(config, FILE_OPERATION if count else "", count)
    return together(config, FILE_OPERATION if count else "", count, size=size, patience=10)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by kind, made on first use."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / "run"
            assert run(made[kind], kind) == 0, console_output({"output": made[kind]})
        return made[kind]

    return get


def files_of(output: Path) -> list[str]:
    """All files of a run, but one name for those of TensorBoard, of which every start makes one."""
    paths = (path.relative_to(output) for path in output.rglob("*") if not path.is_dir())
    return sorted({str(path.parent if path.parts[0] == "tensorboard" else path) for path in paths})


def assert_nothing_happened(mine: Path, other: Path) -> None:
    """Weights, log, TensorBoard and names of files are those of a run that was never killed."""
    assert files_of(mine) == files_of(other)
    for path in [*manager.Checkpoints(mine / "checkpoints", 9).all(), reader.in_run(mine)]:
        ours, theirs = (reader.read(folder / path.relative_to(mine)) for folder in (mine, other))
        for part in ("model", "ema", "heads", "heads_ema", "optimizer", "progress", "scaler"):
            assert_same(ours[part], theirs[part], part)
    logs = [
        [{key: value for key, value in line.items() if key != "images_per_second"} for line in read_log(folder / LOG)]
        for folder in (mine, other)
    ]
    assert logs[0] == logs[1]
    events = EventAccumulator(str(mine / "tensorboard")).Reload()
    for name in ("train/loss", "eval/ema_loss"):
        kind, key = name.split("/")
        expected = [(line["step"], line[key]) for line in logs[1] if line["kind"] == kind]
        assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)] == expected


def killed_at(output: Path, kind: str, counts, whole: Path) -> bool:
    """Kill a run at these operations, one after the other, and let it end; True if it ended before."""
    codes = [run(output, kind, count) for count in counts]
    assert set(codes) <= {-signal.SIGKILL, 0}, console_output({"output": output})
    assert run(output, kind) == 0, console_output({"output": output})
    assert_nothing_happened(output, whole)
    return 0 in codes


@pytest.mark.parametrize("counts", [(9, 3), (47, 20), (69, 31)])
def test_a_run_killed_at_some_file_operations(tmp_path, whole, counts):
    """Killed twice each time, so that what the second start does with leftovers is interrupted as well."""
    killed_at(tmp_path / "run", "plain", counts, whole("plain"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_every_file_operation(tmp_path, whole, kind):
    if kind == "shards" and not dist.is_gloo_available():
        pytest.skip("needs gloo")
    for count in itertools.count(1, STRIDES[kind]):
        if killed_at(tmp_path / str(count), kind, (count, 1 + count * 7 % 40), whole(kind)):
            break
    assert count > 40
