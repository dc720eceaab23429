"""UperNet and Mask2Former of transformers on a RevCol backbone (Table 3 and appendix D.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from revnets import keep_budget
from revnets.config.errors import ArgumentError, nearest
from revnets.config.memory_budget import BudgetSpec
from revnets.memory.auto_budget import forget_budget
from revnets.models.saved_folder import require_all
from vision.huggingface import RevColBackboneConfig
from vision.huggingface.saved_sizes import require_fitting
from vision.models.architecture import RevCol
from vision.models.parameter_groups import backbone_matcher, find_backbone
from vision.models.recomputation import recomputed
from vision.models.simulated_values import is_simulated
from vision.segmentation.mask2former_parts import adapt_parts

IGNORED = 255
"""Class of pixels that losses and metrics ignore."""


class RevColSegmenter(nn.Module):
    """Base class of segmenters, with the interface that training and evaluation use."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a segmenter that `save_pretrained` has written, from safetensors files. Arguments as in transformers.

        With `ignore_mismatched_sizes`, weights of other shapes, such as classifiers of other classes, are initialized.
        With `output_loading_info`, differences are returned instead of raising an error.

        Raises:
            revnets.SpecError: If the directory contains a different model than its configuration describes.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        ignores_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.setdefault("use_safetensors", True)
        require_fitting(cls, pretrained_model_name_or_path, kwargs)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": ignores_shapes or not wants_info}
        parent: Any = super()
        model, info = parent.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if wants_info:
            return model, info
        require_all(str(pretrained_model_name_or_path), {**info, "mismatched_keys": ()} if ignores_shapes else info)
        return model

    def targets(self, maps: Tensor, most: int | None = None) -> dict[str, Any]:
        """Return the arguments of `forward` for class maps (B, H, W), in which `IGNORED` does not count.

        Args:
            maps: The class maps.
            most: Classes per image in the simulated step of a memory plan, by default all.
        """
        raise NotImplementedError

    def semantic_loss(self, images: Tensor, maps: Tensor, most: int | None = None) -> Tensor:
        """Return the scalar loss of images (B, C, H, W) with class maps (B, H, W); `most` as for `targets`."""
        return self(pixel_values=images, **self.targets(maps, most)).loss.squeeze()

    def semantic_logits(self, images: Tensor) -> Tensor:
        """Return the scores (B, classes, H, W) of images (B, C, H, W)."""
        raise NotImplementedError

    @property
    def revcol(self) -> RevCol:
        """The timm model in the backbone."""
        return self._found()[1]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the groups of the backbone. Other parameters are in the last group, with the full learning rate."""
        return backbone_matcher(self._prefix(), self.revcol, coarse)

    def no_weight_decay(self) -> set[str]:
        """Return parameters without weight decay: those of the backbone, and embeddings of queries and levels."""
        own = {self._prefix() + name for name in self.revcol.no_weight_decay()}
        endings = ("queries_embedder.weight", "queries_features.weight", "level_embed.weight", "level_embed")
        return own | {name for name, _ in self.named_parameters() if name.endswith(endings)}

    def _prefix(self) -> str:
        return self._found()[0]

    def _found(self) -> tuple[str, RevCol]:
        found = find_backbone(self)
        assert found is not None
        return found


class UperNet(RevColSegmenter, UperNetForSemanticSegmentation):
    """UperNet (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018) with an auxiliary head.

    This is transformers' module with dropout of whole channels before both classifiers, as in mmsegmentation.

    Args:
        config: Configuration of transformers. Its attribute `head_dropout` is the dropout rate (default 0.1). With its
            attribute `checkpoint_heads`, activations of the heads, scores and losses are recomputed in backward.
    """

    _keys_to_ignore_on_load_unexpected: Any = (r"^auxiliary_head\.",)  # with `use_auxiliary_head=False`

    def __init__(self, config: UperNetConfig):
        super().__init__(config)
        dropout = ChannelDropout(float(getattr(config, "head_dropout", 0.1)))
        for head in (self.decode_head, self.auxiliary_head):
            if head is not None:
                head.classifier.register_forward_pre_hook(dropout)
        if isinstance(budget := self.revcol.columns.budget, BudgetSpec):
            forget_budget(self.revcol)
            keep_budget(self, budget)  # also counts the heads and the loss

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return `logits` (B, classes, H, W) of images (B, C, H, W) and, with class maps (B, H, W), the `loss`."""
        others = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        others |= {"return_dict": return_dict, **kwargs}
        recomputes = getattr(self.config, "checkpoint_heads", False) and torch.is_grad_enabled()
        if (
            not recomputes
            or pixel_values is None
            or labels is None
            or any(value is not None for value in others.values())
            or self.config.num_labels == 1  # the parent raises an error
            or self.config.output_hidden_states
            or not self.config.return_dict
        ):
            return super().forward(pixel_values=pixel_values, labels=labels, **others)
        maps, size = self.backbone(pixel_values).feature_maps, pixel_values.shape[2:]
        loss, logits = recomputed(self._loss_of, self.decode_head, labels, size, *maps, draws=True)
        if self.auxiliary_head is not None:
            auxiliary, _ = recomputed(self._loss_of, self.auxiliary_head, labels, size, *maps, draws=True)
            loss = loss + self.config.auxiliary_loss_weight * auxiliary
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    def _loss_of(self, head: nn.Module, labels: Tensor, size: torch.Size, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a head, and its scores at the size of the images."""
        logits = F.interpolate(head(maps), size=size, mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels, ignore_index=self.config.loss_ignore_index), logits

    def targets(self, maps: Tensor, most: int | None = None) -> dict[str, Any]:
        return {"labels": maps}

    def semantic_logits(self, images: Tensor) -> Tensor:
        return cast(Tensor, self(pixel_values=images).logits)


class RevColMask2FormerConfig(Mask2FormerConfig):
    """Configuration of `Mask2Former`, which accepts a RevCol backbone without the warning of transformers."""

    backbones_supported = (*Mask2FormerConfig.backbones_supported, RevColBackboneConfig.model_type)


class Mask2Former(RevColSegmenter, Mask2FormerForUniversalSegmentation):
    """Mask2Former (Cheng et al., CVPR 2022) for semantic classes, with one mask for each class in an image.

    Args:
        config: Configuration of transformers. With its attribute `checkpoint_heads`, activations of the layers of both
            decoders and the sampled points of mask losses are recomputed in backward.

    Raises:
        ValueError: If the backbone has a memory budget.
    """

    config_class = RevColMask2FormerConfig

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        adapt_parts(self, recompute=getattr(config, "checkpoint_heads", False))
        if isinstance(self.revcol.columns.budget, BudgetSpec):
            problem = (
                "Mask2Former cannot plan a memory budget at its first call, because the number of masks varies. Use a "
                "memory mode, then revnets.plan(SegmentationStep(model), shape, budget=...).apply(model)"
            )
            raise ArgumentError(problem, "memory", code="conflicting-values")

    def targets(self, maps: Tensor, most: int | None = None) -> dict[str, Any]:
        """Return the masks (classes in the image, H, W) and the classes of each image."""
        if is_simulated(maps):
            classes = [torch.arange(most or int(self.config.num_labels or 0), device=maps.device) for _ in maps]
        else:
            classes = [present[present != IGNORED] for present in map(torch.unique, maps)]
        masks = [(pixels == present[:, None, None]).float() for pixels, present in zip(maps, classes, strict=True)]
        return {"mask_labels": masks, "class_labels": [present.long() for present in classes]}

    def semantic_logits(self, images: Tensor) -> Tensor:
        """Return scores (B, classes, H, W): the masks of all queries, weighted by their class probabilities."""
        output = self(pixel_values=images)
        classes = output.class_queries_logits.softmax(-1)[..., :-1]
        scores = torch.einsum("bqc,bqhw->bchw", classes, output.masks_queries_logits.sigmoid())
        return F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)


class ChannelDropout:
    """A forward pre-hook that drops whole channels of a module's input while the module is in training mode."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.dropout2d(args[0], self.rate, module.training), *args[1:])


def upernet(
    backbone: str | PreTrainedConfig,
    num_classes: int,
    *,
    channels: int = 512,
    auxiliary_channels: int = 256,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    dropout: float = 0.1,
    checkpoint_heads: bool = False,
    **backbone_options: Any,
) -> UperNet:
    """Build a UperNet on a RevCol with newly initialized weights.

    Args:
        backbone: A RevCol model name such as `revcol_tiny`, or a configuration of transformers.
        num_classes: Number of classes, 150 for ADE20K.
        channels: Width of the decoder (1440 for RevCol-H, Table 14).
        auxiliary_channels: Width of the auxiliary head, which uses the third level.
        pool_scales: Scales of the pyramid pooling module.
        dropout: Dropout rate before the classifiers.
        checkpoint_heads: Recompute activations and scores of the heads in backward instead of storing them.
        backbone_options: Options of `RevColBackboneConfig`, such as `kernel_size`, `drop_path_rate` and `memory`.

    Returns:
        A segmenter of transformers: `model(pixel_values=images, labels=maps)` returns `loss` and `logits`.

    Raises:
        ValueError: If the backbone does not exist or rejects an option.
    """
    # options that are not fields of the configuration class
    others: dict[str, Any] = {"num_labels": num_classes, "head_dropout": dropout, "checkpoint_heads": checkpoint_heads}
    return UperNet(
        UperNetConfig(
            backbone_config=_backbone(backbone, backbone_options),
            hidden_size=channels,
            auxiliary_channels=auxiliary_channels,
            pool_scales=list(pool_scales),
            loss_ignore_index=IGNORED,
            **others,
        )
    )


def mask2former(
    backbone: str | PreTrainedConfig,
    num_classes: int,
    *,
    width: int = 256,
    feedforward: int = 2048,
    queries: int = 100,
    encoder_layers: int = 6,
    decoder_layers: int = 9,
    heads: int = 8,
    points: int = 12544,
    checkpoint_heads: bool = False,
    **backbone_options: Any,
) -> Mask2Former:
    """Build a Mask2Former on a RevCol with newly initialized weights.

    Args:
        backbone: A RevCol model name such as `revcol_huge`, or a configuration of transformers.
        num_classes: Number of classes, 150 for ADE20K.
        width: Channels of the pixel decoder and the queries.
        feedforward: Hidden channels of the transformer decoder. The pixel decoder has half as many.
        queries: Number of queries, the maximum number of masks in an image.
        encoder_layers: Number of layers of the pixel decoder.
        decoder_layers: Number of layers of the transformer decoder.
        heads: Number of attention heads.
        points: Number of points at which mask losses are sampled.
        checkpoint_heads: Recompute the layers of both decoders and the sampled points in backward instead of storing
            their activations.
        backbone_options: Options of `RevColBackboneConfig`, such as `kernel_size`, `drop_path_rate` and `memory`.

    Returns:
        A segmenter of transformers, called as `model(pixel_values, mask_labels, class_labels)`. Its methods
        `semantic_loss` and `semantic_logits` work with class maps.

    Raises:
        ValueError: If the backbone does not exist, has a memory budget, or rejects an option.
    """
    others: dict[str, Any] = {"num_labels": num_classes, "checkpoint_heads": checkpoint_heads}
    return Mask2Former(
        RevColMask2FormerConfig(
            backbone_config=_backbone(backbone, backbone_options),
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=feedforward // 2,
            dim_feedforward=feedforward,
            num_queries=queries,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers + 1,  # transformers counts the prediction before the first layer
            num_attention_heads=heads,
            train_num_points=points,
            ignore_value=IGNORED,
            **others,
        )
    )


def _backbone(backbone: str | PreTrainedConfig, options: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a backbone. Configurations of transformers would keep unknown options silently."""
    known = []
    if isinstance(backbone, str):
        known = [item.name for item in fields(RevColBackboneConfig)] + ["out_indices", "out_features"]
    for name in (name for name in options if name not in known):
        hint = nearest(name, known, "Known options are") if known else "Set it in the configuration of the backbone"
        raise ArgumentError(f"there is no option {name!r}. {hint}", name, code="unknown-key")
    if isinstance(backbone, str):
        return RevColBackboneConfig(name=backbone, **{"out_indices": [0, 1, 2, 3], **options})
    return backbone
