"""Training with intermediate supervision as a task of timm: the compound loss, and checkpoints of the model alone."""

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
    """Training with intermediate supervision, as a task of timm.

    `get_eval_model` and checkpoints see the model alone; the heads are the state of the task.

    Args:
        model: what is trained.
        config: where heads stand and what their losses weigh.
        criterion: of every classifier; made from `criterion_kwargs` if None.
        criterion_kwargs: of `timm.loss.create_classification_loss`.
        mean: of the images' normalisation, to undo it; by default the model's `pretrained_cfg` knows.
        std: likewise.
        device: of the task.
        verbose: tell the logger of timm.
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
            input: normalised images (B, C, H, W), after mixup and all other augmentation.
            target: class numbers (B,), or their mixture (B, num_classes).

        Returns:
            `loss`; `output`, the model's logits; and, without gradients, the terms `ce_<column>` and `bce_<column>`
            before they are weighted, by column from 0.
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
        """Images before their normalisation, within [0.01, 0.99], so that no pixel asks for an endless logit."""
        return (input.float() * self.std + self.mean).clamp_(0.01, 0.99)

    def supervised(self, ema: bool = False) -> Supervised | None:
        """The model with its heads, without what wraps it. In evaluation mode it gives the logits of every head."""
        module = self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The model without heads."""
        supervised = self.supervised(ema) if module is None else unwrap_model(module)
        return None if supervised is None else supervised.model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The state of the heads."""
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
        """Load what `get_task_state` gave."""
        supervised = self.supervised(ema) if module is None else unwrap_model(module)
        if supervised is not None and (state or strict):
            model = {f"model.{name}": value for name, value in supervised.model.state_dict().items()}
            supervised.load_state_dict({**model, **(state or {})}, strict=strict)

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the cells of the columns; a tape cannot be in a compiled graph."""
        model = cast(RevCol, self.get_eval_model())
        model.columns.compile(backend=backend, mode=mode, **compile_kwargs)
        return model
