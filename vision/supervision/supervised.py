"""Intermediate supervision: classifiers and decoders at some columns, and the compound loss (section 2.3, D.1).

Column i has a decoder, which reconstructs the image, and a classifier at its end:

    L = sum_i alpha_i * BCE_i + beta_i * CE_i

Along the columns alpha decreases to 0 and beta increases to 1, so early columns preserve the image and later columns
learn its class. After training, the heads are removed.
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
    """Outputs of the heads by the index of their column.

    Attributes:
        logits: (B, num_classes). Those of the last column are the model's own.
        pixels: Logits of reconstructed images, (B, in_chans, H', W').
    """

    logits: dict[int, Tensor]
    pixels: dict[int, Tensor]


class Supervised(nn.Module):
    """A model with classifiers and decoders at some of its columns.

    `model` is not modified and can be evaluated, saved and deployed alone. Heads whose loss has weight 0 are not built.

    Args:
        model: The model to train.
        config: Positions and weights of the heads.

    Raises:
        ValueError: If the model has no classifier, or the number of weights does not match its columns.
    """

    def __init__(self, model: RevCol, config: SupervisionConfig):
        from vision.models.architecture import classifier
        from vision.supervision.decoders import decoder

        super().__init__()
        if model.num_classes == 0:
            raise ArgumentError("supervision needs a model with a classifier. Set num_classes", "num_classes")
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
        if model.columns.budget is not None:  # plan the step with the heads instead
            from revnets import keep_budget

            keep_budget(self, model.columns.budget)

    def forward(self, x: Tensor) -> Outputs:
        """Return the outputs of the heads for images (B, in_chans, H, W). Decoders run in training mode only."""
        from vision.models.architecture import to_nchw

        columns = [stop.column for stop in self.stops]
        _, tops = self.model.columns(self.model.stem(x), taps=columns)
        states = dict(zip(columns, tops, strict=True))
        logits = {int(key): head(to_nchw(states[int(key)])) for key, head in self.classifiers.items()}
        logits[columns[-1]] = self.model.forward_head(to_nchw(tops[-1]))
        decoders = self.decoders if self.training else {}
        return Outputs(logits, {int(key): head(states[int(key)]) for key, head in decoders.items()})

    def twin(self) -> Supervised:
        """Return a copy without values on the meta device."""
        return Supervised(self.model.twin(), self.config)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the model's groups for layer-wise decay. All heads are in the last group."""
        groups = self.model.group_matcher(coarse)
        if coarse:
            return {name: within(pattern) for name, pattern in groups.items()}
        blocks = [(within(pattern), group) for pattern, group in groups["blocks"]]
        return {"stem": within(groups["stem"]), "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Return the model's parameters without weight decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}


def within(pattern: str) -> str:
    """Prefix a pattern of the model's parameter names with `model.`."""
    return pattern.replace("^", r"^model\.", 1)


def reconstruction_loss(pixels: Tensor, image: Tensor) -> Tensor:
    """Return the binary cross entropy of reconstructed pixels, averaged over all pixels.

    Args:
        pixels: Logits (B, C, H', W'). If a side of the image is not a multiple of the reduction, the sizes differ
            slightly, and only the common region is compared.
        image: (B, C, H, W), values between 0 and 1.
    """
    height, width = min(pixels.shape[2], image.shape[2]), min(pixels.shape[3], image.shape[3])
    return F.binary_cross_entropy_with_logits(pixels[..., :height, :width].float(), image[..., :height, :width])


class HeadsEvaluator:
    """Evaluates the accuracy of every head. `update` takes the outputs of `Supervised` instead of logits.

    Args:
        stops: Positions and weights of the heads.
        options: Options of `timm.task.evaluator.ClassificationEvaluator`.
    """

    def __init__(self, stops: Sequence[Stop], **options: Any):
        self.evaluators = {stop.column: ClassificationEvaluator(**options) for stop in stops if stop.beta}

    def update(self, outputs: Outputs, target: Tensor) -> None:
        for column, evaluator in self.evaluators.items():
            evaluator.update(outputs.logits[column], target)

    def compute(self, distributed: bool = False) -> OrderedDict[str, float]:
        """Return `loss`, `top1` and `top5` of the model, and of every other head with its column as a suffix."""
        found = {column: evaluator.compute(distributed) for column, evaluator in self.evaluators.items()}
        last = max(found)
        named = (
            (f"{key}_{column}", value) for column in found if column != last for key, value in found[column].items()
        )
        return OrderedDict([*found[last].items(), *named])
