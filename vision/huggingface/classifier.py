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
    """Images to scores of `config.num_labels` classes, for `pipeline("image-classification")` and `Trainer`.

    Attributes:
        revcol: the timm model.
    """

    def __init__(self, config: RevColBackboneConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.revcol = create_revcol(config, self.num_labels)
        self.post_init()

    @classmethod
    def from_timm(cls, model: RevCol, classes: Sequence[str] | None = None) -> RevColForImageClassification:
        """A RevCol of timm as a classifier of transformers; both share their parameters.

        Args:
            model: of the family, such as from `timm.create_model("revcol_tiny", pretrained=True)`.
            classes: names of its classes, in order.

        Raises:
                ValueError: there are more or fewer names than classes, or a configuration cannot describe the model.
        """
        with torch.device("meta"):
            classifier = cls(configuration_of(model, classes))
        classifier.revcol = model
        return classifier

    def image_processor(self) -> ConvNextImageProcessor:
        """How images are resized, cropped and normalized for this model, as its timm configuration states."""
        return image_processor(self.revcol)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """Images to logits, and to a loss where labels are given.

        Args:
            pixel_values: images (B, num_channels, H, W).
            labels: classes (B,), or targets (B, num_labels) of several labels or of a regression.
            return_dict: False for a tuple.

        Returns:
            `logits` (B, num_labels) and perhaps `loss`.
        """
        logits = self.revcol(pixel_values)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()
