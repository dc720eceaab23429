"""Memory of a model in fairseq's training: bytes that the encoder saves for backward, and plans within a budget.

Shapes: B sentences, T positions.
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
"""Number of state tensors per weight of fairseq's optimizers."""


class TrainingStep(nn.Module):
    """A model with its criterion, from the tokens of a batch to the loss, as in fairseq's trainer.

    Only copies on fake tensors are run (`revnets.memory.simulation`).

    Args:
        model: fairseq's model.
        criterion: fairseq's criterion.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module):
        super().__init__()
        self.model = model
        self.criterion = copy.copy(criterion)
        self.criterion.task = None  # type: ignore[assignment]  # it holds the text, which must not be copied

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            source: (B, T) source tokens.
            lengths: (B,) lengths of the source sentences.
            previous: (B, T) input tokens of the decoder.
            target: (B, T) target tokens.
        """
        words = {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": previous}
        batch = {"net_input": words, "target": target, "ntokens": target.numel(), "nsentences": len(target)}
        with _without_values():
            loss, _, _ = self.criterion(self.model, batch)
        return loss


@contextmanager
def _without_values() -> Iterator[None]:
    """Let fairseq run on fake tensors: return shapes as plain sizes, and assume that there is padding."""
    operators = torch.onnx.operators
    original = operators.shape_as_tensor
    operators.shape_as_tensor = lambda x: x.shape
    try:
        with _Affirmative():
            yield
    finally:
        operators.shape_as_tensor = original


class _Affirmative(TorchDispatchMode):
    """Return True where Python converts a tensor to a bool, as in `if mask.any()`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


def plan_encoder_memory(model: Any, budget: BudgetSpec, args: argparse.Namespace, task: Any) -> None:
    """Plan the memory of the encoder at the first training forward, when the text is loaded, and log the plan.

    Args:
        model: fairseq's model with reversible columns.
        budget: Memory budget of a training step.
        args: All options of `fairseq-train`.
        task: fairseq's task, which holds the text.

    Raises:
        SystemExit: At the first forward, if no plan fits; the message names the smallest possible peak.
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
        logger.info("memory plan for %d sentences of %d tokens: %s", *plan.input_shape, plan.sentence)

    model.register_forward_pre_hook(turn)


class Encoding(nn.Module):
    """An encoder from tokens to its output states, for copies on fake tensors.

    Args:
        encoder: fairseq's encoder.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Encode tokens (B, T) of lengths (B,) to states (T, B, C)."""
        with _without_values():
            return self.encoder(words, lengths)["encoder_out"][0]


def log_encoder_memory(model: Any) -> None:
    """Log at the first training forward what the encoder saves for backward, and what `store` would save."""

    def report(module: Any, _: Any, inputs: dict[str, Any]) -> None:
        words = inputs.get("src_tokens")
        if not (module.training and torch.is_grad_enabled()) or type(words) is not Tensor or words.is_meta:
            return  # evaluation, or a simulated step of a memory plan
        handle.remove()
        if torch.compiler.is_compiling() or not logger.isEnabledFor(logging.INFO):
            return
        shape = (words.shape[0], words.shape[1])
        try:
            kept = encoder_bytes(module.encoder, shape)
            with module.encoder.columns.using(modes="store"):
                store = encoder_bytes(module.encoder, shape)
        except Exception as error:  # must not stop the training
            logger.info("bytes saved for backward by the encoder are unknown: %s", " ".join(str(error).split()))
            return
        logger.info(
            "the encoder saves %.1f MB for backward in the first batch, %d sentences of %d tokens (store: %.1f MB)",
            *(kept / 1e6, *shape, store / 1e6),
        )

    handle = model.register_forward_pre_hook(report, with_kwargs=True)


def encoder_bytes(encoder: nn.Module, shape: tuple[int, int]) -> int:
    """Simulate a forward pass of (B, T) tokens and return the bytes that the encoder saves for backward."""
    words = torch.empty(shape, dtype=torch.long, device="meta")
    dtype = _dtype(encoder)  # before autocast ends
    with outside_of_autocast(), torch.random.fork_rng(devices=[]):
        return simulate(Encoding(encoder), (words, words[:, 0]), dtype=dtype).kept


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of autocast if it is enabled, else float32."""
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
    """Simulate a training step of a translation model with its largest batch and return its peak in bytes."""
    weights = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return simulate(*_step(model, args, task), accumulates=max(args.update_freq) > 1).peak + _states(args) * weights


def _step(model: Any, args: argparse.Namespace, task: Any) -> tuple[TrainingStep, tuple[Tensor, ...]]:
    """Return a training step and its largest input as fake tensors."""
    criterion: Any = criterions.build_criterion(args, task)  # type: ignore[arg-type]  # which takes both forms of options
    shape = largest_batch(args, task, model.max_positions())
    words = torch.empty(shape, dtype=torch.long, device="meta")
    return TrainingStep(model, criterion), (words, words[:, 0], words.clone(), words.clone())


def largest_batch(args: argparse.Namespace, task: Any, limits: tuple[int, int]) -> tuple[int, int]:
    """Return the shape (B, T) of a batch that needs at least as much memory as any batch of the training text.

    Attention memory grows quadratically with length, so long sentences cost more per token. The batch has as many
    tokens as `--max-tokens` allows, in sentences at least as long as the longest of both languages.

    Args:
        args: All options of `fairseq-train`.
        task: fairseq's task, which holds the text.
        limits: Maximum source and target length of the model.
    """
    text = task.dataset(args.train_subset)
    longest = min(int(np.max(text.sizes)), *limits)
    sentences = args.batch_size or len(text)
    if args.max_tokens is None or sentences * longest <= args.max_tokens:
        return sentences, longest
    sentences = max(args.max_tokens // longest, 1)
    return sentences, max(args.max_tokens // sentences, longest)


def _states(args: argparse.Namespace) -> int:
    """Return the number of state tensors per weight of the optimizer and of `--store-ema`.

    In half precision, there are also float32 copies of weights and gradients, unless `--memory-efficient-fp16` is set.
    Tensors in float32 count twice then.
    """
    states, half = STATES.get(args.optimizer, 2), args.fp16 or args.bf16
    if half and not (args.memory_efficient_fp16 or args.memory_efficient_bf16):
        states += 2
    wide = 2 if half else 1
    averaged = 1 + wide * args.ema_fp32 if args.store_ema else 0
    return wide * states + averaged
