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
    """What backbone and classifier share: weights under the prefix `revcol`, read from safetensors only."""

    config_class = RevColBackboneConfig
    base_model_prefix = "revcol"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = False  # `memory` of the configuration is the way

    revcol: RevCol

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a classifier that a checkpoint lacks; the rest was initialized when it was made."""
        if module is self.revcol.head.fc:
            module.apply(init_weights)
            self.revcol.scale_classifier()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """A model with the weights of a folder or a name of the hub, as `PreTrainedModel.from_pretrained`.

        Weights are read from safetensors. Only those of the classifier may be missing.

        Raises:
            revnets.SpecError: the configuration of a folder asks for a larger model than its weights are.
            vision.errors.CheckpointError: weights are missing or belong to a model of other sizes.
        """
        kwargs.setdefault("use_safetensors", True)
        require_fitting(cls, args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("revcol.head."))
        if missing:
            problem = f"{len(missing)} weights are missing, such as {missing[0]}"
            raise CheckpointError(str(args[0]), problem, "Is it a RevCol of another size?", code="weights-mismatch")
        return (model, info) if output_loading_info else model


class RevColBackbone(BackboneMixin, RevColPreTrainedModel):
    """Levels of the last column as feature maps, for `UperNetForSemanticSegmentation` and others.

    The levels above the highest one of `config.out_features` are left out, as in timm's `features_only`.

    Args:
        config: with `out_features` or `out_indices`; the coarsest level if it names none.

    Attributes:
        revcol: the timm model, such as for `revcol.load_pretrained(path)`.
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
        """Images to the levels that the configuration names.

        Args:
            pixel_values: images (B, num_channels, H, W).
            output_hidden_states: return every level that was computed, too.
            output_attentions: has no meaning here.
            return_dict: False for a tuple.

        Returns:
            `feature_maps`, a tuple of tensors (B, dim, H / stride, W / stride), and perhaps `hidden_states`.
        """
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        levels = cast(list[Tensor], self.revcol.forward_intermediates(pixel_values, intermediates_only=True))
        maps = tuple(levels[index] for index in self.out_indices)
        output = BackboneOutput(feature_maps=maps, hidden_states=tuple(levels) if output_hidden_states else None)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


def create_revcol(config: RevColBackboneConfig, num_classes: int) -> RevCol:
    """The timm model of a configuration, with the weights of its initialization."""
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
