"""Learning rates and weight decay of a model with a RevCol backbone, such as a segmenter or a detector."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vision.models.architecture import RevCol


def find_backbone(model: nn.Module) -> tuple[str, RevCol] | None:
    """Return the prefix and the module of the first RevCol in a model; None if there is none or it is the model."""
    inside = ((f"{name}.", module) for name, module in model.named_modules() if name and isinstance(module, RevCol))
    return None if isinstance(model, RevCol) else next(inside, None)


def backbone_matcher(prefix: str, backbone: RevCol, coarse: bool = False) -> dict[str, Any]:
    """Prefix a backbone's group matcher. Parameters outside the backbone are in the last group, like a classifier."""
    groups, start = backbone.group_matcher(coarse), "^" + prefix.replace(".", r"\.")
    blocks = groups["blocks"]
    if isinstance(blocks, str):
        blocks = start + blocks.removeprefix("^")
    else:
        blocks = [(start + pattern.removeprefix("^"), order) for pattern, order in blocks]
    return {"stem": start + groups["stem"].removeprefix("^"), "blocks": blocks}


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None, backbone_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer of timm, in the order of timm's `param_groups_layer_decay`.

    The layers are those of the backbone as a classifier. Layer l of n has its learning rate scaled by
    `layer_decay` ** (n - l), and the heads of the model are layer n, like the classifier. Removed levels and frozen
    cells, such as those of `freeze_idle`, count as layers but have no parameters in the groups. Vectors (biases, norms,
    gains) and parameters in `no_weight_decay` of the model or the backbone have no weight decay.

    Args:
        model: A model with a RevCol backbone.
        weight_decay: Weight decay of all other parameters.
        layer_decay: Factor of the learning rate from layer to layer; None for 1.
        backbone_lr_scale: Learning rate of the backbone relative to that of the heads.

    Raises:
        LookupError: If the model has no RevCol backbone.
    """
    found = find_backbone(model)
    if found is None:
        raise LookupError("the model has no RevCol backbone")
    prefix, backbone = found
    matcher = backbone_matcher(prefix, backbone)
    places = [(re.compile(matcher["stem"]), 0), *((re.compile(name), layer) for name, (layer,) in matcher["blocks"])]
    top = 1 + max(layer for _, layer in places)  # also if the highest levels of the backbone were removed
    exempt = {prefix + name for name in backbone.no_weight_decay()} | getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = next((layer for pattern, layer in places if pattern.match(name)), top)
        decays = parameter.ndim > 1 and name not in exempt
        is_inside = name.startswith(prefix)  # a classifier of the backbone is in the layer of the heads
        scale = backbone_lr_scale if is_inside else 1.0
        group = {
            "lr_scale": scale * (1.0 if layer_decay is None else layer_decay ** (top - layer)),
            "weight_decay": weight_decay if decays else 0.0,
            "params": [],
        }
        groups.setdefault((layer, decays, is_inside and backbone_lr_scale < 1), group)["params"].append(parameter)
    return list(groups.values())
