"""Intermediate supervision: classifiers and decoders at some columns, and the compound loss (section 2.3, D.1).

At the end of column i stand a decoder, which gives back the image, and a classifier:

    L = sum_i alpha_i * BCE_i + beta_i * CE_i

alpha falls to 0 and beta rises to 1 along the columns, so early columns keep what the image holds and later ones learn
what it means. After training the heads are dropped; what remains is the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from vision.config.learning import Stop, SupervisionConfig

if TYPE_CHECKING:
    from vision.models.architecture import RevCol


class Outputs(NamedTuple):
    """What the heads say, by the column (from 0) at whose end they stand."""

    logits: dict[int, Tensor]  # (B, num_classes); the last are the model's own
    pixels: dict[int, Tensor]  # logits of reconstructed images, (B, in_chans, H', W')


class Supervised(nn.Module):
    """A model with classifiers and decoders at some of its columns.

    `model` stays whole: it is what is evaluated, saved and deployed. A head whose loss weighs nothing is not built.

    Args:
        model: what is trained.
        config: where heads stand.

    Raises:
        ValueError: the model has no classifier, or the weights do not fit its columns.
    """

    def __init__(self, model: RevCol, config: SupervisionConfig):
        from vision.models.architecture import classifier
        from vision.supervision.decoders import decoder

        super().__init__()
        if model.num_classes == 0:
            raise ArgumentError("a model without classifier cannot be supervised; give num_classes", "num_classes")
        self.model, self.config = model, config
        self.stops = config.stops(model.columns.graph.columns)
        dims = [info["num_chs"] for info in model.feature_info]
        reductions = [info["reduction"] for info in model.feature_info]
        kind = config.decoder if config.decoder != "auto" else "staged" if model.num_classes <= 1000 else "single"
        self.classifiers = nn.ModuleDict(
            {
                str(stop.column): classifier(dims[-1], model.num_classes, model.global_pool, model.drop_rate)
                for stop in self.stops[:-1]
                if stop.beta
            }
        )
        self.decoders = nn.ModuleDict(
            {str(stop.column): decoder(kind, dims, reductions, model.in_chans) for stop in self.stops if stop.alpha}
        )
        like = next(model.parameters())
        self.classifiers.to(like)
        self.decoders.to(like)
        if model.columns.budget is not None:  # its step is now a step of this
            from revnets import keep_budget

            keep_budget(self, model.columns.budget)

    def forward(self, x: Tensor) -> Outputs:
        """Images (B, in_chans, H, W) to what the heads say; decoders are silent in evaluation mode."""
        from vision.models.architecture import to_nchw

        columns = [stop.column for stop in self.stops]
        _, tops = self.model.columns(self.model.stem(x), taps=columns)
        states = dict(zip(columns, tops, strict=True))
        logits = {int(key): head(to_nchw(states[int(key)])) for key, head in self.classifiers.items()}
        logits[columns[-1]] = self.model.forward_head(to_nchw(tops[-1]))
        decoders = self.decoders if self.training else {}
        return Outputs(logits, {int(key): head(states[int(key)]) for key, head in decoders.items()})

    def twin(self) -> Supervised:
        """The same without values, on the meta device."""
        return Supervised(self.model.twin(), self.config)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The model's groups for layer-wise decay; all heads are in the last one."""
        groups = self.model.group_matcher(coarse)
        if coarse:
            return {name: within(pattern) for name, pattern in groups.items()}
        blocks = [(within(pattern), group) for pattern, group in groups["blocks"]]
        return {"stem": within(groups["stem"]), "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """The model's."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}


def within(pattern: str) -> str:
    """A pattern of the model's parameters, as they are called here."""
    return pattern.replace("^", r"^model\.", 1)


def reconstruction_loss(pixels: Tensor, image: Tensor) -> Tensor:
    """Binary cross entropy of reconstructed pixels, the mean over all of them.

    Args:
        pixels: logits (B, C, H', W'). A side of the image that is no multiple of the reduction makes it a little larger
            or smaller than the image; what is too much of either is not compared.
        image: (B, C, H, W), values between 0 and 1.
    """
    height, width = min(pixels.shape[2], image.shape[2]), min(pixels.shape[3], image.shape[3])
    return F.binary_cross_entropy_with_logits(pixels[..., :height, :width].float(), image[..., :height, :width])


class HeadsEvaluator:
    """The accuracy of every head: `update` with `Supervised`'s outputs instead of logits.

    Args:
        stops: the heads.
        options: of `timm.task.evaluator.ClassificationEvaluator`.
    """

    def __init__(self, stops: Sequence[Stop], **options: Any):
        self.evaluators = {stop.column: ClassificationEvaluator(**options) for stop in stops if stop.beta}

    def update(self, outputs: Outputs, target: Tensor) -> None:
        for column, evaluator in self.evaluators.items():
            evaluator.update(outputs.logits[column], target)

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """`loss`, `top1` and `top5` of the model, and the same with a column's number for every other head."""
        found = {column: evaluator.compute(distributed) for column, evaluator in self.evaluators.items()}
        last = max(found)
        named = (
            (f"{key}_{column}", value) for column in found if column != last for key, value in found[column].items()
        )
        return OrderedDict([*found[last].items(), *named])
