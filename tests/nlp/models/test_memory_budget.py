"""Memory budgets in fairseq's training, planned for a step of model and criterion with the largest batch."""

from __future__ import annotations

import argparse
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from fairseq import criterions
from fairseq import options as fairseq_options

from nlp.models.memory_budget import TrainingStep, _states, footprint, largest_batch
from nlp.models.revcol_transformer import RevColTransformerModel
from revnets.memory.simulation import simulate
from revnets.memory.tracker import MemoryTracker
from tests.support.fairseq import USER_DIR, dictionary, sample

WORDS = 53


def command_line(*given: str) -> argparse.Namespace:
    """All options of `fairseq-train`."""
    words = ["data", "--user-dir", str(USER_DIR), "--arch", "revcol_transformer_tiny", "--share-all-embeddings"]
    words += ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--optimizer", "adam"]
    return fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), [*words, *given])


class Text(list):
    """The sizes of a training text: pairs of lengths."""

    @property
    def sizes(self) -> np.ndarray:
        return np.array(self)


def task(*sizes: tuple[int, int]) -> Any:
    words = dictionary(WORDS)
    return SimpleNamespace(source_dictionary=words, target_dictionary=words, dataset=lambda name: Text(sizes))


def step_and_batch(memory: str) -> tuple[TrainingStep, tuple[torch.Tensor, ...]]:
    args = command_line("--revcol-memory", memory, "--dropout", "0.1")
    torch.manual_seed(0)
    model = RevColTransformerModel.build_model(args, task())
    inputs = sample((31, 29, 17, 11), WORDS)
    batch = (*inputs.values(), inputs["prev_output_tokens"].clone())
    return TrainingStep(model, criterions.build_criterion(args, task())), batch


@pytest.mark.parametrize(("memory", "accumulates"), [("store", False), ("exact", True)])
def test_a_step_takes_what_is_predicted(memory, accumulates):
    step, batch = step_and_batch(memory)
    predicted = simulate(step, batch, accumulates=accumulates)
    if accumulates:
        step(*batch).backward()
    with MemoryTracker() as tracker:
        tracker.register(step)
        step(*batch).backward()
    assert all(parameter.grad is not None for parameter in step.parameters())
    assert abs(predicted.peak / tracker.peak - 1) < 0.02


def planned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the logged plans. Other loggers are enabled by fairseq commands in this process."""
    return [record.getMessage() for record in caplog.records if record.name == "nlp.models.memory_budget"]


def run(budget: str, caplog: pytest.LogCaptureFixture, *given: str) -> tuple[RevColTransformerModel, str]:
    """Return a model after its first training forward with the largest batch, and the log."""
    args = command_line("--revcol-memory", f"{{budget: {budget}}}", "--max-tokens", "124", *given)
    torch.manual_seed(0)
    model = RevColTransformerModel.build_model(args, task(*[(31, 30), (7, 31)] * 4))
    with caplog.at_level(logging.INFO, logger="nlp.models.memory_budget"):
        model.eval()(**sample((11, 7)))
        assert not planned(caplog)  # no plan without a training step
        model.train()(**sample((11, 7)))
    return model, next(line for line in planned(caplog) if line.startswith("memory plan for"))


@pytest.fixture(scope="module")
def most() -> int:
    """Bytes of a step with `store` and this batch."""
    args = command_line("--revcol-memory", "store", "--max-tokens", "124")
    text = task(*[(31, 30), (7, 31)] * 4)
    return footprint(RevColTransformerModel.build_model(args, text), args, text)


def test_what_fits_is_kept(caplog, most):
    model, message = run(str(most - 1), caplog)
    columns = model.encoder.columns
    assert message.startswith("memory plan for 4 sentences of 31 tokens: Chosen for ")
    assert set(columns.memory) == {"exact"}
    assert 0 < len(columns.stored) < 8
    assert columns.kept  # remaining memory stores a part of other cells
    assert columns.budget is None
    caplog.clear()
    model(**sample((13, 5)))
    assert not planned(caplog)  # planned only once


def test_everything_is_stored_if_it_fits(caplog, most):
    model, message = run(str(most), caplog)
    assert set(model.encoder.columns.memory) == {"store"}
    assert "no more FLOPs" in message


def test_the_peak_of_exact_always_fits(caplog):
    model, _ = run("exact", caplog)
    assert "exact" in model.encoder.columns.memory


def test_too_small_a_budget_ends_the_command_with_one_line(caplog):
    with pytest.raises(SystemExit) as caught:
        run("1MB", caplog)
    assert str(caught.value).startswith("--revcol-memory {budget: 1MB}: ")
    assert "977 KiB" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "limits", "expected"),
    [
        (("--max-tokens", "100"), (1024, 1024), (3, 33)),  # sentences slightly longer than the longest
        (("--max-tokens", "20"), (1024, 1024), (1, 31)),  # at least one sentence
        (("--max-tokens", "100", "--batch-size", "2"), (1024, 1024), (2, 31)),
        (("--batch-size", "5"), (1024, 1024), (5, 31)),
        (("--max-tokens", "100000"), (1024, 1024), (8, 31)),  # the whole text
        (("--max-tokens", "100"), (20, 1024), (5, 20)),
    ],
)
def test_the_largest_batch(given, limits, expected):
    assert largest_batch(command_line(*given), task(*[(31, 7), (5, 9)] * 4), limits) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), 2),
        (("--optimizer", "nag"), 1),
        (("--fp16",), 8),  # in units of two bytes: weights, gradients and two states in float32
        (("--fp16", "--memory-efficient-fp16"), 4),
        (("--store-ema",), 3),
        (("--store-ema", "--ema-fp32", "--fp16"), 11),
    ],
)
def test_what_the_optimizer_holds(given, expected):
    assert _states(command_line(*given)) == expected


def test_accumulated_gradients_need_memory():
    """At the start of backward, the peak of this step, gradients exist only with `--update-freq`."""
    text = task(*[(31, 30)] * 40)
    args = command_line("--revcol-memory", "store", "--max-tokens", "1240")
    model = RevColTransformerModel.build_model(args, text)
    once = footprint(model, args, text)
    several = footprint(model, command_line("--max-tokens", "1240", "--update-freq", "3"), text)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert 0.8 * weights < several - once < 1.2 * weights


def test_stored_cells_give_the_same_gradients():
    found = []
    for stored in ("0", "3"):
        args = command_line("--revcol-stored", stored, "--dropout", "0.2")
        torch.manual_seed(0)
        model = RevColTransformerModel.build_model(args, task())
        assert len(model.encoder.columns.stored) == int(stored)
        torch.manual_seed(1)
        model(**sample())[0].square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*found, rtol=0, atol=0)
