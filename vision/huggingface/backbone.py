"""RevCol as a backbone of transformers' detectors and segmenters."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from revnets.nn.blocks import init_weights
from vision.errors import CheckpointError
from vision.huggingface.configuration import RevColBackboneConfig
from vision.huggingface.saved_sizes import require_fitting
from vision.models.architecture import RevCol


class RevColPreTrainedModel(PreTrainedModel):
    """Base class of backbone and classifier. Weights have the prefix `revcol` and are read from safetensors only."""

    config_class = RevColBackboneConfig
    base_model_prefix = "revcol"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = False  # use `memory` of the configuration instead

    revcol: RevCol

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a classifier that a checkpoint lacks. All other modules are initialized on construction."""
        if module is self.revcol.head.fc:
            module.apply(init_weights)
            self.revcol.scale_classifier()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model from a directory or the hub, as `PreTrainedModel.from_pretrained`.

        Weights are read from safetensors. Only those of the classifier may be missing.

        Raises:
            revnets.SpecError: If the configuration in a directory describes a larger model than its weights.
            vision.errors.CheckpointError: If weights are missing or have other shapes.
        """
        kwargs.setdefault("use_safetensors", True)
        require_fitting(cls, args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("revcol.head."))
        if missing:
            problem = f"{len(missing)} weights are missing, such as {missing[0]}"
            hint = "Check that the configuration describes a RevCol of this size"
            raise CheckpointError(str(args[0]), problem, hint, code="weights-mismatch")
        return (model, info) if output_loading_info else model


class RevColBackbone(BackboneMixin, RevColPreTrainedModel):
    """Levels of the last column as feature maps, for `UperNetForSemanticSegmentation` and others.

    Levels above the highest one of `config.out_features` are removed, as in timm's `features_only`.

    Args:
        config: With `out_features` or `out_indices`; the coarsest level if both are missing.

    Attributes:
        revcol: The timm model, for example for `revcol.load_pretrained(path)`.
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected: Any = (r"^revcol\.head\.",)

    def __init__(self, config: RevColBackboneConfig):
        super().__init__(config)
        self.revcol = create_revcol(config, num_classes=0)
        self.num_features = list(config.hidden_sizes)
        self.revcol.prune_intermediate_layers(list(config.out_indices or ()))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Return the levels of images that the configuration names.

        Args:
            pixel_values: Images (B, num_channels, H, W).
            output_hidden_states: Also return all computed levels.
            output_attentions: Ignored.
            return_dict: False for a tuple.

        Returns:
            `feature_maps`, a tuple of tensors (B, dim, H / stride, W / stride), and optional `hidden_states`.
        """
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        levels = cast(list[Tensor], self.revcol.forward_intermediates(pixel_values, intermediates_only=True))
        maps = tuple(levels[index] for index in self.out_indices)
        output = BackboneOutput(feature_maps=maps, hidden_states=tuple(levels) if output_hidden_states else None)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


def create_revcol(config: RevColBackboneConfig, num_classes: int) -> RevCol:
    """Build the timm model of a configuration with newly initialized weights."""
    model = timm.create_model(
        config.name,
        num_classes=num_classes,
        in_chans=config.num_channels,
        columns=config.columns,
        dims=config.dims,
        depths=config.depths,
        kernel_size=config.kernel_size,
        drop_path_rate=config.drop_path_rate,
        memory=config.memory,
        img_size=config.img_size,
        patch_size=config.patch_size,
        drop_rate=config.drop_rate,
        head_init_scale=config.head_init_scale,
    )
    return cast(RevCol, model)
