"""Memory of a model in fairseq's training: what its encoder keeps, and a budget that is planned for the largest batch.

B sentences, T positions.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.onnx.operators
from fairseq import criterions
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revnets.config.memory_budget import BudgetSpec, host_memory, parse_budget
from revnets.memory import outside_of_autocast
from revnets.memory.planner import Plan, PlanError, plan_module
from revnets.memory.simulation import simulate

logger = logging.getLogger(__name__)

STATES = {"sgd": 1, "nag": 1, "adagrad": 1, "adafactor": 0, "adam": 2, "adamax": 2, "adadelta": 2, "lamb": 2}
"""Tensors of a weight's size that fairseq's optimizers hold."""


class TrainingStep(nn.Module):
    """A model with its criterion, from the words of a batch to the loss, as fairseq's trainer runs them.

    Only copies without values are run (`revnets.memory.simulation`).
    """

    def __init__(self, model: nn.Module, criterion: nn.Module):
        super().__init__()
        self.model = model
        self.criterion = copy.copy(criterion)
        self.criterion.task = None  # type: ignore[assignment]  # it holds the text; a copy of it is no use

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor, target: Tensor) -> Tensor:
        words = {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": previous}
        batch = {"net_input": words, "target": target, "ntokens": target.numel(), "nsentences": len(target)}
        with _without_values():
            loss, _, _ = self.criterion(self.model, batch)
        return loss


@contextmanager
def _without_values() -> Iterator[None]:
    """Let fairseq run on tensors that have none: it asks for shapes as tensors, and whether there is padding (yes)."""
    operators = torch.onnx.operators
    original = operators.shape_as_tensor
    operators.shape_as_tensor = lambda x: x.shape
    try:
        with _Affirmative():
            yield
    finally:
        operators.shape_as_tensor = original


class _Affirmative(TorchDispatchMode):
    """Says yes where Python asks a tensor for a truth, as in `if mask.any()`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


def plan_encoder_memory(model: Any, budget: BudgetSpec, args: argparse.Namespace, task: Any) -> None:
    """Plan at the first training forward, when the text is loaded; the logger of this module tells what was chosen.

    Args:
        args: all options of `fairseq-train`.

    Raises:
        SystemExit: at the first forward, if nothing fits; one line says what the least is.
    """
    model.encoder.columns.budget = budget

    def turn(module: Any, *_: Any) -> None:
        columns = module.encoder.columns
        if columns.budget is None or not (module.training and torch.is_grad_enabled()):
            return
        try:
            plan = _plan(module, columns.budget, args, task)
        except PlanError as error:
            raise SystemExit(f"--revcol-memory {{budget: {budget.budget}}}: {error}") from None
        plan.apply(module.encoder)
        logger.info("memory for %d sentences of %d words: %s", *plan.input_shape, plan.sentence)

    model.register_forward_pre_hook(turn)


class Encoding(nn.Module):
    """An encoder from words to its states, for copies without values."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        with _without_values():
            return self.encoder(words, lengths)["encoder_out"][0]


def log_encoder_memory(model: Any) -> None:
    """Log at the first training forward what the encoder keeps for backward of this batch, and what `store` would."""

    def report(module: Any, _: Any, inputs: dict[str, Any]) -> None:
        words = inputs.get("src_tokens")
        if not (module.training and torch.is_grad_enabled()) or type(words) is not Tensor or words.is_meta:
            return  # evaluation, or a step without values that the plan of a budget takes
        handle.remove()
        if torch.compiler.is_compiling() or not logger.isEnabledFor(logging.INFO):
            return
        shape = (words.shape[0], words.shape[1])
        try:
            kept = encoder_bytes(module.encoder, shape)
            with module.encoder.columns.using(modes="store"):
                store = encoder_bytes(module.encoder, shape)
        except Exception as error:  # whatever it is, it concerns this line and not the training
            logger.info("what the encoder keeps for backward is not known: %s", " ".join(str(error).split()))
            return
        logger.info(
            "the encoder keeps %.1f MB for backward of the first batch, %d sentences of %d words (%.1f MB in store)",
            *(kept / 1e6, *shape, store / 1e6),
        )

    handle = model.register_forward_pre_hook(report, with_kwargs=True)


def encoder_bytes(encoder: nn.Module, shape: tuple[int, int]) -> int:
    """Bytes that the encoder keeps for backward of (B, T) words, found without computing anything."""
    words = torch.empty(shape, dtype=torch.long, device="meta")
    dtype = _dtype(encoder)  # before autocast ends
    with outside_of_autocast(), torch.random.fork_rng(devices=[]):
        return simulate(Encoding(encoder), (words, words[:, 0]), dtype=dtype).kept


def _dtype(model: nn.Module) -> torch.dtype:
    """That of autocast where it is on."""
    kind = next(model.parameters()).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def _plan(model: nn.Module, budget: BudgetSpec, args: argparse.Namespace, task: Any) -> Plan:
    dtype = _dtype(model)  # before autocast ends
    with outside_of_autocast(), torch.random.fork_rng(devices=[]):
        return plan_module(
            *_step(model, args, task),
            dtype=dtype,
            optimizer=budget.optimizer if "optimizer" in budget.model_fields_set else _states(args),
            ranks=budget.ranks or args.distributed_world_size,
            grad_accum=max(budget.grad_accum, *args.update_freq),
            budget=parse_budget(budget.budget),
            host=host_memory(budget.host, budget.link, budget.flops),
            modes=(),
        )


def footprint(model: nn.Module, args: argparse.Namespace, task: Any) -> int:
    """Bytes of a training step of any model of translation with its largest batch, counted as for a budget."""
    weights = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return simulate(*_step(model, args, task), accumulates=max(args.update_freq) > 1).peak + _states(args) * weights


def _step(model: Any, args: argparse.Namespace, task: Any) -> tuple[TrainingStep, tuple[Tensor, ...]]:
    """A training step and the largest input of it, without values."""
    criterion: Any = criterions.build_criterion(args, task)  # type: ignore[arg-type]  # which takes both forms of options
    shape = largest_batch(args, task, model.max_positions())
    words = torch.empty(shape, dtype=torch.long, device="meta")
    return TrainingStep(model, criterion), (words, words[:, 0], words.clone(), words.clone())


def largest_batch(args: argparse.Namespace, task: Any, limits: tuple[int, int]) -> tuple[int, int]:
    """(B, T) of a batch that needs no less memory than any that fairseq makes of the training text.

    Attention makes a word of a long sentence dearer than one of a short one, so it has as many words as `--max-tokens`
    allows, in sentences as long as the longest or a little longer, in both languages.

    Args:
        limits: of the lengths, those of the model.
    """
    text = task.dataset(args.train_subset)
    longest = min(int(np.max(text.sizes)), *limits)
    sentences = args.batch_size or len(text)
    if args.max_tokens is None or sentences * longest <= args.max_tokens:
        return sentences, longest
    sentences = max(args.max_tokens // longest, 1)
    return sentences, max(args.max_tokens // sentences, longest)


def _states(args: argparse.Namespace) -> int:
    """Tensors of a weight's size that the optimizer and the averaged weights of `--store-ema` take.

    In half precision there are weights and gradients in float32 as well, unless `--memory-efficient-fp16`; what is in
    float32 counts twice then.
    """
    states, half = STATES.get(args.optimizer, 2), args.fp16 or args.bf16
    if half and not (args.memory_efficient_fp16 or args.memory_efficient_bf16):
        states += 2
    wide = 2 if half else 1
    averaged = 1 + wide * args.ema_fp32 if args.store_ema else 0
    return wide * states + averaged
