"""RevCol as an image classifier of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ConvNextImageProcessor
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from vision.huggingface.backbone import RevColPreTrainedModel, create_revcol
from vision.huggingface.configuration import RevColBackboneConfig, configuration_of
from vision.huggingface.image_processing import image_processor
from vision.models.architecture import RevCol


class RevColForImageClassification(RevColPreTrainedModel):
    """An image classifier with `config.num_labels` classes, for `pipeline("image-classification")` and `Trainer`.

    Attributes:
        revcol: The timm model.
    """

    def __init__(self, config: RevColBackboneConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.revcol = create_revcol(config, self.num_labels)
        self.post_init()

    @classmethod
    def from_timm(cls, model: RevCol, classes: Sequence[str] | None = None) -> RevColForImageClassification:
        """Wrap a RevCol of timm. Both models share their parameters.

        Args:
            model: A RevCol, for example from `timm.create_model("revcol_tiny", pretrained=True)`.
            classes: Names of its classes, in order.

        Raises:
            ValueError: If the number of names differs from that of the classes, or no configuration describes the
                model.
        """
        with torch.device("meta"):
            classifier = cls(configuration_of(model, classes))
        classifier.revcol = model
        return classifier

    def image_processor(self) -> ConvNextImageProcessor:
        """Return the image processor that matches the model's timm configuration."""
        return image_processor(self.revcol)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """Return the logits of images, and the loss if labels are given.

        Args:
            pixel_values: Images (B, num_channels, H, W).
            labels: Classes (B,), or targets (B, num_labels) for several labels per image or for regression.
            return_dict: False for a tuple.

        Returns:
            `logits` (B, num_labels) and optional `loss`.
        """
        logits = self.revcol(pixel_values)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()
