"""Resuming a run: the checkpoint that `resume` selects, and checks of the configuration against it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from revnets import SpecError
from revnets.config.errors import show
from vision.checkpoints import reader
from vision.checkpoints.layout import TO_RESUME
from vision.checkpoints.manager import sample_counts, step_of
from vision.config.data import DataConfig
from vision.config.learning import OptimizerConfig
from vision.config.run import TrainConfig
from vision.distributed.context import World
from vision.errors import CheckpointError, comparable, run_error

FIXED = ("task", "seed", "data", "heads", "batch_size", "optimizer", "supervision", "pretrained")
"""Keys that may not change when a run is resumed. The forward passes per update of all processes may not change either.

The learning rate of the optimizer may change, because the schedule sets it.
"""

IMPLIED = {"task": "classification"}
"""Values of keys that older checkpoints lack."""


def find_checkpoint(config: TrainConfig, world: World, there: list[Path], say: Callable[[str], None]) -> Path | None:
    """The checkpoint from which a run resumes; None for a new run.

    Args:
        config: Of the run.
        world: The processes of the run. The main process calls this function.
        there: The checkpoints in the output directory, oldest first.
        say: Called with a message about a newer checkpoint that cannot be read.

    Raises:
        revnets.SpecError: If the directory has a run that this one would overwrite.
        CheckpointError: If no checkpoint can be read.
    """
    name, resume = "training run", config.resume
    if resume == "auto":
        return _newest(world, there, say)
    hint = "Use resume=auto to resume it, or another output"
    if resume == "none":
        if there:
            problem = f"{config.output} already has a run ({there[-1].name})"
            raise SpecError(name, "output", problem, hint, code="run-exists")
        return None
    state = read(Path(resume), world)
    if there and step_of(there[-1]) > state["progress"]["step"]:
        problem = f"{config.output} has a later checkpoint, {there[-1].name}"
        raise SpecError(name, "output", problem, hint, code="run-exists")
    return Path(resume)


def read(path: Path, world: World) -> dict[str, Any]:
    """Read a checkpoint with everything that a run needs to resume.

    Raises:
        CheckpointError: If it cannot be read, or lacks an entry.
    """
    return reader.read(path, world, TO_RESUME)


def _newest(world: World, there: list[Path], say: Callable[[str], None]) -> Path | None:
    problems = []
    for path in reversed(there):
        try:
            read(path, world)
        except CheckpointError as error:
            problems.append(error)
            continue
        if problems:
            say(str(problems[0]))
        return path
    if len(problems) > 1:
        problem = f"{problems[0].problem}; none of the {len(problems)} checkpoints in the directory can be read"
        raise CheckpointError(there[-1], problem, "Give another output, or resume a backup", code=problems[0].code)
    if problems:
        raise problems[0]
    return None


def require_same_course(config: TrainConfig, size: int, state: dict[str, Any], path: Path, data: object = None) -> None:
    """Refuse a configuration with which a run would not continue as before.

    Args:
        config: Of this run.
        size: Number of processes of this run.
        state: The checkpoint at `path`.
        path: Of the checkpoint.
        data: Of this run. Its paths may change, but not its classes, the number of images, the teacher and settings of
            soft labels, and the excluded images.

    Raises:
        revnets.SpecError: If a value differs; names the key, the new and the old value.
    """
    new, old = config.plain(), state["config"]
    for key in FIXED:
        ours, theirs = new[key], old.get(key, IMPLIED.get(key))
        if key == "optimizer":
            ours, theirs = {**ours, "lr": None}, {**OptimizerConfig().model_dump(mode="json"), **theirs, "lr": None}
        if key == "data":
            ours, theirs = (
                {str(number): _without_place(source) for number, source in enumerate(data)}
                if isinstance(data, list)
                else _without_place(data)
                for data in (ours, theirs)
            )
        if ours != theirs:
            _refuse(*_first_difference(key, ours, theirs), path)
    passes, before = new["grad_accum"] * size, old["grad_accum"] * state["world"]
    if passes != before:
        ours, theirs = (
            f"{accum} with {count} processes"
            for accum, count in ((new["grad_accum"], size), (old["grad_accum"], state["world"]))
        )
        _refuse("grad_accum", ours, theirs, path)
    if config.batch_is_stream and (size, new["workers"]) != (state["world"], old["workers"]):
        ours, theirs = f"{new['workers']} with {size} processes", f"{old['workers']} with {state['world']} processes"
        _refuse("workers", f"{ours} (which determine the order of a stream)", theirs, path)
    _require_same_data(data, state, path)


def _require_same_data(data: object, state: dict[str, Any], path: Path) -> None:
    ours, theirs = getattr(data, "classes", None), state.get("classes")
    if isinstance(ours, tuple) and isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            _refuse("data", f"{len(ours)} classes", len(theirs), path)
        for one, other in zip(map(comparable, ours), map(comparable, theirs), strict=True):
            if one != other:
                _refuse("data", f"the class {one}", f"{other} at this position", path)
    before = state.get("samples")
    for part, count in sample_counts(data).items():
        if isinstance(before, dict) and before.get(part, count) != count:
            _refuse("data", f"{count} samples in {part}", before[part], path)
    if (was := state.get("provenance")) is not None:  # earlier versions did not record it
        now = getattr(data, "provenance", {})
        for key in {**now, **was}:
            if now.get(key) != was.get(key):
                place, one, other = _first_difference(key, now.get(key), was.get(key))
                name = place.removeprefix(key).lstrip(".")
                _refuse(key, f"{name} {show(one)}".lstrip(), show(other), path)


def _without_place(data: dict[str, Any]) -> dict[str, Any]:
    """The key `data` without paths, and with the defaults of keys that checkpoints of earlier versions lack."""
    with suppress(ValidationError):
        data = TypeAdapter(DataConfig).validate_python(data).model_dump(mode="json")
    kind, _, name = str(data.get("name")).partition("/")
    places = {key: None for key in ("root", "class_map", "labels", "exclude") if key in data}
    return {
        **data,
        **places,
        "name": f"{kind}/{Path(name).name}" if name and kind in ("hfds", "hfids") else data["name"],
    }


def _refuse(key: str, ours: Any, theirs: Any, path: Path) -> None:
    problem = f"{ours}, but the run of {path} has {theirs}"
    raise run_error(key, problem, "Use the value of that run, or give another output", code="settings-differ")


def _first_difference(key: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """The key path of the first value that differs between two configurations, and both values."""
    while isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        name = next(name for name in ours if ours[name] != theirs[name])
        key, ours, theirs = f"{key}.{name}", ours[name], theirs[name]
    return key, ours, theirs
