"""DINO on a RevCol backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from einops import repeat
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from revnets.config.errors import ArgumentError
from vision.detection.detector_options import require_counts, require_numbers
from vision.detection.dino_detr.deformable_transformer import (
    DeformableDecoder,
    DeformableEncoder,
    DetectionHead,
    ScoredBoxes,
)
from vision.detection.dino_detr.denoising_queries import ContrastiveDenoising, DenoisingQueries
from vision.detection.dino_detr.hungarian_matching import hungarian_pairs, in_pixels
from vision.detection.dino_detr.padded_levels import FeatureProjection, FeatureSequence
from vision.detection.dino_detr.proposal_selection import ProposalSelection
from vision.detection.dino_detr.set_losses import set_losses
from vision.detection.dino_detr.target_boxes import TargetBoxes, target_boxes
from vision.detection.feature_pyramid import STRIDES, revcol_levels
from vision.detection.training_targets import Target, checked_targets, padded_batch
from vision.models.architecture import RevCol


class DINO(nn.Module):
    """A detector without anchors and without non-maximum suppression (Zhang et al., ICLR 2023).

    Args:
        backbone: A timm model with `features_only`. The detector uses the levels that it returns and a coarser one.
        num_classes: Number of classes without background.
        width: Channels of the transformer, a multiple of 32 and of `heads`.
        feedforward: Hidden channels of the feed-forward networks.
        heads: Number of attention heads.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        queries: Number of queries, the maximum number of objects in an image.
        denoising: Approximate number of positive noisy copies of the objects of a training image; 0 for none.
        label_noise: Twice the probability that a copy gets a random label.
        box_noise: Scale of the shift of a copy's corners, relative to half a side.
        shared_heads: Use one head for all decoder layers, as the paper's code, instead of one per layer, as OpenMMLab.
        detections: Maximum number of detections per image.
        checkpoint_heads: Recompute the layers of the transformer in backward instead of storing their activations.

    Raises:
        ValueError: If an option has a wrong type or is out of range, or `width` is not a multiple of 32 and of `heads`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        width: int = 256,
        feedforward: int = 2048,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        queries: int = 900,
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        shared_heads: bool = True,
        detections: int = 300,
        checkpoint_heads: bool = False,
    ):
        super().__init__()
        require_counts(1, num_classes=num_classes, width=width, feedforward=feedforward, heads=heads)
        require_counts(1, decoder_layers=decoder_layers, queries=queries, detections=detections)
        require_counts(0, encoder_layers=encoder_layers, denoising=denoising)
        require_numbers(math.inf, label_noise=label_noise, box_noise=box_noise)
        for divisor in (32, heads):
            if width % divisor:
                raise ArgumentError(f"width is {width}, not a multiple of {divisor}", "width", code="not-divisible")
        self.num_classes, self.detections = num_classes, detections
        self.backbone = backbone
        channels = cast(Any, backbone).feature_info.channels()
        levels = len(channels) + 1
        self.projection = FeatureProjection(channels, width)
        self.encoder = DeformableEncoder(width, feedforward, heads, levels, encoder_layers, checkpoint_heads)
        self.decoder = DeformableDecoder(width, feedforward, heads, levels, decoder_layers, checkpoint_heads)
        self.proposals = ProposalSelection(width, num_classes, queries)
        self.contents = nn.Embedding(queries, width)
        distinct = 1 if shared_heads else decoder_layers
        self.detection_heads = nn.ModuleList(DetectionHead(width, num_classes) for _ in range(distinct))
        self.denoising = None
        if denoising:
            self.denoising = ContrastiveDenoising(num_classes, width, queries, denoising, label_noise, box_noise)
        nn.init.xavier_uniform_(self.contents.weight)

    @property
    def revcol(self) -> RevCol:
        """The timm model in the backbone."""
        return next(module for module in self.modules() if isinstance(module, RevCol))

    def class_parameters(self) -> set[str]:
        """Return the names of the parameters that have a row for each class."""
        heads = [name for name, module in self.named_modules() if isinstance(module, DetectionHead)]
        found = {f"{name}.classes.{part}" for name in heads for part in ("weight", "bias")}
        return found if self.denoising is None else found | {"denoising.labels.weight"}

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training mode and detections in evaluation mode, as torchvision's detectors do.

        Args:
            images: (3, H, W) each, normalized. Their sizes may differ.
            targets: For each image, `boxes` (N, 4) as x1, y1, x2, y2 in pixels, and `labels` (N,) from 1 to
                `num_classes`.

        Returns:
            In training mode, losses by name, to be summed: of the last decoder layer (`loss_class`, `loss_box`,
            `loss_giou`), of the other layers (`..._0` and so on), of the proposals (`..._proposals`) and of denoising
            (`..._denoising`). In evaluation mode, for each image `boxes` (D, 4) in pixels, `labels` (D,) from 1 and
            `scores` (D,), best first.

        Raises:
            ValueError: If images or targets have wrong shapes or values out of range.
        """
        batch = padded_batch(images, self.revcol.in_chans, multiple=1, least=STRIDES[-1])
        padded = _padding(batch)
        if self.training:
            objects = target_boxes(checked_targets(images, targets, self.num_classes))
            return self._losses(batch.tensors, padded, objects)
        return self._detections(self._decoded(batch.tensors, padded), batch.image_sizes)

    def _encoded(self, batch: Tensor, padded: Tensor | None) -> tuple[FeatureSequence, ScoredBoxes, Tensor]:
        """Return the encoder's features, the proposals, and the contents (B, Q, C) of as many queries."""
        sequence = self.encoder(self.projection(self.backbone(batch), padded))
        proposals = self.proposals(sequence)
        count = proposals.boxes.shape[1]
        return sequence, proposals, self.contents.weight[:count].expand(len(batch), -1, -1)

    def _layer_heads(self) -> list[DetectionHead]:
        heads = list(self.detection_heads)
        return cast(list[DetectionHead], heads * len(self.decoder.layers) if len(heads) == 1 else heads)

    def _losses(self, batch: Tensor, padded: Tensor | None, objects: list[TargetBoxes]) -> dict[str, Tensor]:
        sequence, proposals, queries = self._encoded(batch, padded)
        references, noisy, copies = proposals.boxes.detach(), None, 0
        if self.denoising is not None:
            noisy = cast(DenoisingQueries, self.denoising(objects, queries.shape[1]))
            copies = noisy.contents.shape[1]
            queries = torch.cat([noisy.contents, queries], 1)
            references = torch.cat([noisy.references, references], 1)
        blocked = None if noisy is None else noisy.blocked
        layers = self.decoder(queries, references, sequence, self._layer_heads(), blocked)
        losses = {}
        for number, layer in enumerate(layers):
            suffix = "" if number == len(layers) - 1 else f"_{number}"
            ordinary = ScoredBoxes(layer.scores[:, copies:], layer.boxes[:, copies:])
            losses |= set_losses(ordinary, objects, hungarian_pairs(ordinary, objects), suffix)
            if noisy is not None:
                copied = ScoredBoxes(layer.scores[:, :copies], layer.boxes[:, :copies])
                losses |= set_losses(copied, objects, noisy.pairs, f"_denoising{suffix}")
        return losses | set_losses(proposals, objects, hungarian_pairs(proposals, objects), "_proposals")

    def _decoded(self, batch: Tensor, padded: Tensor | None) -> ScoredBoxes:
        sequence, proposals, queries = self._encoded(batch, padded)
        return self.decoder(queries, proposals.boxes, sequence, self._layer_heads())[-1]

    def _detections(self, predicted: ScoredBoxes, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return the best pairs of a query and a class for each image."""
        probabilities = predicted.scores.float().sigmoid().flatten(1)
        scores, taken = probabilities.topk(min(self.detections, probabilities.shape[1]), dim=1)
        queries, labels = taken // self.num_classes, taken % self.num_classes + 1
        boxes = predicted.boxes.float().gather(1, repeat(queries, "b d -> b d n", n=4))
        found = []
        for image, (height, width) in enumerate(sizes):
            corners = in_pixels(boxes[image], boxes.new_tensor([width, height, width, height]))
            inside = clip_boxes_to_image(corners, (height, width))
            found.append({"boxes": inside, "labels": labels[image], "scores": scores[image]})
        return found


def dino(
    backbone: str,
    num_classes: int,
    *,
    kernel_size: int | None = None,
    memory: Any = None,
    scales: Literal[4, 5] = 4,
    width: int = 256,
    feedforward: int = 2048,
    heads: int = 8,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    queries: int = 900,
    denoising: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
    shared_heads: bool = True,
    detections: int = 300,
    checkpoint_heads: bool = False,
    **backbone_options: Any,
) -> DINO:
    """Build a DINO on a RevCol with newly initialized weights.

    Arguments that are not listed are those of `DINO`.

    Args:
        backbone: A RevCol model name such as `revcol_huge`.
        num_classes: Number of classes without background, 80 for COCO.
        kernel_size: Kernel size of the backbone's convolutions.
        memory: Memory mode of the backbone.
        scales: Number of feature levels: 4 for strides 8 to 64, 5 for strides 4 to 64.
        backbone_options: Options of `timm.create_model`, such as `drop_path_rate`.

    Raises:
        ValueError: If the backbone does not exist, has a memory budget, or rejects an option, or another option is
            wrong.
    """
    if scales not in (4, 5):
        raise ArgumentError(f"scales is {scales}, but must be 4 or 5", "scales", code="unknown-choice")
    given = {"kernel_size": kernel_size, "memory": memory}
    backbone_options |= {name: value for name, value in given.items() if value is not None}
    return DINO(
        revcol_levels(backbone, 5 - scales, **backbone_options),
        num_classes,
        width=width,
        feedforward=feedforward,
        heads=heads,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        queries=queries,
        denoising=denoising,
        label_noise=label_noise,
        box_noise=box_noise,
        shared_heads=shared_heads,
        detections=detections,
        checkpoint_heads=checkpoint_heads,
    )


def _padding(batch: ImageList) -> Tensor | None:
    """Return a mask (B, H, W) that is true at padding; None if every image is as large as the batch."""
    height, width = batch.tensors.shape[-2:]
    if all(size == (height, width) for size in batch.image_sizes):
        return None
    sizes = torch.tensor(batch.image_sizes, device=batch.tensors.device)[..., None, None]
    rows, columns = (torch.arange(count, device=sizes.device) for count in (height, width))
    return (rows[:, None] >= sizes[:, 0]) | (columns >= sizes[:, 1])
