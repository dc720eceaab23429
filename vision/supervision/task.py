"""Training with intermediate supervision as a timm task, with the compound loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.task import ClassificationTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from vision.config.learning import SupervisionConfig
from vision.models.architecture import RevCol
from vision.supervision.supervised import Outputs, Supervised, reconstruction_loss


class SupervisionTask(ClassificationTask):
    """Training with intermediate supervision as a timm task.

    `get_eval_model` and checkpoints contain only the model. The heads are the state of the task.

    Args:
        model: The model to train.
        config: Positions and weights of the heads.
        criterion: Loss of every classifier; created from `criterion_kwargs` if None.
        criterion_kwargs: Options of `timm.loss.create_classification_loss`.
        mean: Mean of the image normalization, which is undone for decoders; by default from `pretrained_cfg`.
        std: Standard deviation of the normalization, as `mean`.
        device: Device of the task.
        verbose: Whether timm's logger reports the task.
    """

    def __init__(
        self,
        model: RevCol,
        config: SupervisionConfig | None = None,
        criterion: nn.Module | Callable | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | None = None,
        verbose: bool = True,
    ):
        supervised = Supervised(model, config or SupervisionConfig())
        super().__init__(supervised, criterion, criterion_kwargs, device=device, verbose=verbose)
        self.stops = supervised.stops
        cfg = getattr(model, "pretrained_cfg", None) or {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", mean or cfg["mean"]), ("std", std or cfg["std"])):
            if len(values) not in (1, model.in_chans):
                raise ArgumentError(
                    f"{name} has {len(values)} values for images of {model.in_chans} channels",
                    name,
                    code="wrong-length",
                )
            self.register_buffer(name, torch.tensor(values, device=device).view(-1, 1, 1), persistent=False)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The compound loss of a batch.

        Args:
            input: Normalized images (B, C, H, W), after mixup and all other augmentation.
            target: Class indices (B,), or their mixture (B, num_classes).

        Returns:
            `loss`; `output`, the model's logits; and the unweighted terms `ce_<column>` and `bce_<column>` without
            gradients, by column from 0.
        """
        outputs: Outputs = self.trainable_module(input)
        image = self.image(input)
        terms: dict[str, Tensor] = {}
        loss = torch.zeros((), device=input.device)
        for column, alpha, beta in self.stops:
            if column in outputs.pixels:
                terms[f"bce_{column}"] = term = reconstruction_loss(outputs.pixels[column], image)
                loss = loss + alpha * term
            if column in outputs.logits:
                terms[f"ce_{column}"] = term = self.criterion(outputs.logits[column], target)
                loss = loss + beta * term
        last = outputs.logits[max(outputs.logits)]
        return {"loss": loss, "output": last, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def image(self, input: Tensor) -> Tensor:
        """Return images without normalization, clamped to [0.01, 0.99] so that all target logits are finite."""
        return (input.float() * self.std + self.mean).clamp_(0.01, 0.99)

    def supervised(self, ema: bool = False) -> Supervised | None:
        """Return the unwrapped model with its heads. In evaluation mode it returns the logits of every head."""
        module = self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the model without heads."""
        supervised = self.supervised(ema) if module is None else unwrap_model(module)
        return None if supervised is None else supervised.model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the heads."""
        supervised = self.supervised(ema) if module is None else unwrap_model(module)
        state = {} if supervised is None else supervised.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("model.")}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load the result of `get_task_state`."""
        supervised = self.supervised(ema) if module is None else unwrap_model(module)
        if supervised is not None and (state or strict):
            model = {f"model.{name}": value for name, value in supervised.model.state_dict().items()}
            supervised.load_state_dict({**model, **(state or {})}, strict=strict)

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the cells of the columns, because a compiled graph cannot contain a tape."""
        model = cast(RevCol, self.get_eval_model())
        model.columns.compile(backend=backend, mode=mode, **compile_kwargs)
        return model
