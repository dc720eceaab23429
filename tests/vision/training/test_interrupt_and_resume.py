"""A killed, stopped or damaged run resumes to the same bits, or reports why it cannot."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from tests.support.errors import raises_error
from tests.support.training_processes import console_output, process
from tests.support.training_runs import assert_same, assert_same_run, tiny
from vision.checkpoints import manager, reader
from vision.checkpoints.manager import CheckpointError
from vision.config.run import load_config
from vision.training.run_log import LOG, RunLogger, read_log
from vision.training.trainer import Trainer, TrainingError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert process(tiny(output)) == 0
    return output


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("before an update", 1),
        ("before an update", 4),
        ("before an update", 10),
        ("before an evaluation", 1),
        ("while a checkpoint is written", 1),
        ("while a checkpoint is written", 4),
        ("before a file gets its name", 6),
        ("after a file got its name", 6),
        ("before the best gets its name", 1),
        ("before the best gets its name", 2),  # the end of the last epoch: nothing is left to train
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, whole, moment, count):
    config = tiny(tmp_path / "run")
    assert process(config, moment, count) == -signal.SIGKILL
    assert process(config) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_run_killed_repeatedly(tmp_path, whole):
    config, codes = tiny(tmp_path / "run", save_every=1), []
    while not codes or codes[-1] != 0:
        codes.append(process(config, "before an update", 4))
        assert len(codes) < 10
    assert codes[:-1] == [-signal.SIGKILL] * 3  # 3 updates and their checkpoints at a time
    ours, theirs = (reader.read(folder / "checkpoints" / "step-0000010.pt") for folder in (tmp_path / "run", whole))
    assert_same(ours["model"], theirs["model"], "model")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize(("moment", "count", "step"), [("before an update", 7, 7), ("before an evaluation", 1, 5)])
def test_a_signal_stops_a_run_after_saving(tmp_path, whole, number, moment, count, step):
    output = tmp_path / "run"
    assert process(tiny(output, save_every=None, keep=3), moment, count, number) == 128 + number
    assert manager.step_of(manager.Checkpoints(output / "checkpoints", 3).all()[-1]) == step
    text = console_output({"output": output})
    assert f"Stopped by {signal.Signals(number).name} in epoch" in text
    command = text.splitlines()[-1].removeprefix("To resume: revnets train ")
    config = load_config(command)
    assert process({**config.plain(), "save_every": 2, "keep": 2}) == 0
    assert f"Resumed {output}/checkpoints/step-000000{step}.pt: in epoch" in console_output({"output": output})
    assert_same_run(output, whole)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, whole):
    config = tiny(tmp_path / "run")
    assert process(config, "before an update", 8) == -signal.SIGKILL
    newest = tmp_path / "run" / "checkpoints" / "step-0000006.pt"
    os.truncate(newest, 5000)
    assert process(config) == 0
    assert "step-0000006.pt: damaged" in console_output(config)
    assert_same_run(tmp_path / "run", whole)


def test_a_run_without_a_readable_checkpoint_does_not_start_again(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    there = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    for path in there:
        os.truncate(path, 5000)
    with raises_error(CheckpointError, code="damaged-file", source=there[-1], names="2 checkpoints"):
        trainer(tmp_path / "run").fit()
    assert sorted((tmp_path / "run" / "checkpoints").glob("step-*")) == there


def trainer(output: Path, **changes) -> Trainer:
    return Trainer(load_config(tiny(output, **changes)), Console(quiet=True))


def test_a_finished_run_can_be_extended(tmp_path):
    first = trainer(tmp_path).fit()
    assert first.last.name == "step-0000010.pt"
    written = first.last.stat().st_mtime_ns
    again = trainer(tmp_path).fit()
    assert again == first
    assert first.last.stat().st_mtime_ns == written
    longer = trainer(tmp_path, epochs=3)
    assert longer.fit().last.name == "step-0000015.pt"
    assert [line["epoch"] for line in read_log(tmp_path / LOG) if line["kind"] == "eval"] == [1, 2, 3]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["config.yaml", LOG])
def test_a_file_of_the_user_is_not_overwritten(tmp_path, name):
    mine = tmp_path / name
    mine.write_text("base: ../other.yaml  # and why\n")
    with raises_error(code="name-clash", key="output", names=str(mine)):
        trainer(tmp_path).fit()
    assert mine.read_text() == "base: ../other.yaml  # and why\n"
    assert os.listdir(tmp_path) == [name]


def test_a_run_is_neither_overwritten_nor_resumed_as_another(tmp_path):
    saved = trainer(tmp_path / "run", epochs=1, schedule={"name": "constant"}).fit().last
    before = saved.read_bytes()
    with raises_error(code="run-exists", key="output", names="resume=auto"):
        trainer(tmp_path / "run", resume="none").fit()
    for changes, key, names in (
        ({"seed": 2}, "seed", ["2, ", "has 1"]),
        ({"batch_size": 60}, "batch_size", ["60", "120"]),
        ({"grad_accum": 1}, "grad_accum", ["1 with 1 processes", "2 with 1"]),
        ({"optimizer": {"name": "lion", "lr": 0.01}}, "optimizer.name", ["lion", "adamw"]),
        ({"data": {"img_size": 16}}, "data.img_size", ["16, ", "has 8"]),
    ):
        with raises_error(code="settings-differ", key=key, names=names):
            trainer(tmp_path / "run", **changes).fit()
    other = {**tiny("x")["model"], "columns": 2}
    with raises_error(CheckpointError, code="weights-mismatch", names="columns.cells.2"):
        trainer(tmp_path / "run", model=other).fit()
    with raises_error(CheckpointError, code="missing-file", source=tmp_path / "no.pt"):
        trainer(tmp_path / "elsewhere", resume=str(tmp_path / "no.pt")).fit()
    assert saved.read_bytes() == before
    branch = trainer(tmp_path / "branch", resume=str(saved), epochs=2, schedule={"name": "constant"}, memory="store")
    assert branch.fit().last == tmp_path / "branch" / "checkpoints" / "step-0000010.pt"
    with raises_error(code="run-exists", key="output", names="step-0000010"):
        trainer(tmp_path / "branch", resume=str(saved), epochs=2).fit()


def test_progress_bar_is_live_on_a_terminal_only(tmp_path):
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        Trainer(load_config(tiny(tmp_path / str(terminal), log_every=1)), console).fit()
        shown[terminal] = Text.from_ansi(console.file.getvalue()).plain
    for words in ("epoch 1/2  loss", "epoch 2/2  loss"):
        assert all(words in text for text in shown.values())
    assert re.search(
        r"(epoch 2/2|validating) +━+.* +\d+/10 loss \d\.\d+ +\d+\.\d % +lr \de-\d\d +\d+ img/s \d", shown[True]
    )
    assert "img/s" not in shown[False]


def test_memory_modes_train_bit_identical_weights(tmp_path):
    runs = [trainer(tmp_path / mode, memory=mode, epochs=1) for mode in ("store", "recompute", "exact")]
    finals = [reader.read(run.fit().last)["model"] for run in runs]
    assert_same(finals[1], finals[0], "recompute")
    assert_same(finals[2], finals[0], "exact")


def test_float16_run_resumes_with_its_loss_scale(tmp_path):
    config = tiny(tmp_path / "run", amp="float16", keep=9)
    assert process(config) == 0
    expected = reader.read(tmp_path / "run" / "checkpoints" / "step-0000010.pt")
    assert expected["scaler"]["_growth_tracker"] == 10
    path = tmp_path / "run" / "checkpoints" / "step-0000004.pt"
    assert process({**config, "output": str(tmp_path / "branch"), "resume": str(path)}) == 0
    resumed = reader.read(tmp_path / "branch" / "checkpoints" / "step-0000010.pt")
    assert_same(resumed["model"], expected["model"], "model")
    assert_same(resumed["scaler"], expected["scaler"], "scaler")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    run = trainer(tmp_path, epochs=1, save_every=1, log_every=5)
    original = run.state.update

    def update(batches, step):
        if step == 4:  # as a broken image would
            batches = ((images.fill_(float("nan")), labels) for images, labels in batches)
        return original(batches, step)

    run.state.update = update
    with raises_error(
        TrainingError, code="loss-not-finite", names=["nan", "epoch 1, step 4", "step-0000003.pt", "optimizer.lr"]
    ):
        run.fit()
    state = reader.read(tmp_path / "checkpoints" / "step-0000003.pt")
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert not (tmp_path / "checkpoints" / "step-0000004.pt").exists()
    assert trainer(tmp_path, epochs=1).fit().last.name == "step-0000005.pt"


def test_the_log_drops_repeated_and_truncated_lines(tmp_path):
    with RunLogger(tmp_path, 0) as logger:
        for step in (3, 6, 9):
            logger.write("train", 1, step, {"loss": float(step)})
    with open(tmp_path / LOG, "a") as file:
        file.write('{"kind": "train", "ep')
    assert [line["step"] for line in read_log(tmp_path / LOG)] == [3, 6, 9]
    with RunLogger(tmp_path, 6) as logger:
        logger.write("train", 1, 7, {"loss": 0.5})
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 7]
    assert json.loads(lines[-1]) == {"kind": "train", "epoch": 1, "step": 7, "loss": 0.5}


def test_tensorboard_has_the_values_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, epochs=1).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for line in read_log(tmp_path / LOG):
        for name in set(line) - {"kind", "epoch", "step"}:
            values = {event.step: event.value for event in events.Scalars(f"{line['kind']}/{name}")}
            assert values[line["step"]] == pytest.approx(line[name], rel=1e-6)


def test_a_second_signal_has_its_usual_effect():
    from vision.distributed.context import Stopped, StopSignals

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    with StopSignals() as stop:
        stop.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):
            stop.check()
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, inherited) is signal.default_int_handler


def test_the_digits_recipe_reads_digits(tmp_path):
    outcome = Trainer(load_config("digits", [f"output={tmp_path / 'run'}", "epochs=5"])).fit()
    assert outcome.score >= 90  # 98 to 99 after its 20 epochs
