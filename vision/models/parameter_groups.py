"""Learning rates and weight decay of a model with a RevCol inside of it, such as a segmenter or a detector."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vision.models.architecture import RevCol


def find_backbone(model: nn.Module) -> tuple[str, RevCol] | None:
    """The first RevCol inside of a model, and the prefix of its parameters; None for a RevCol itself."""
    inside = ((f"{name}.", module) for name, module in model.named_modules() if name and isinstance(module, RevCol))
    return None if isinstance(model, RevCol) else next(inside, None)


def backbone_matcher(prefix: str, backbone: RevCol, coarse: bool = False) -> dict[str, Any]:
    """timm's matcher for the layers of a backbone by its own; what is not in it comes last, as a classifier does."""
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
    """Groups for an optimizer of timm, in the order in which `param_groups_layer_decay` of timm makes them.

    The layers are those of the backbone as a classifier: layer l of n has the scale `layer_decay` ** (n - l) of the
    learning rate, and the heads of the model take the place of the classifier, layer n. Levels that the backbone has
    lost and frozen cells, such as those of `freeze_idle`, count as layers and are in no group. Vectors (biases, norms,
    gains) and what `no_weight_decay` of the model or the backbone names have no weight decay.

    Args:
        model: with a RevCol inside of it.
        backbone_lr_scale: learning rate of the whole backbone, as a part of that of the heads.

    Raises:
        LookupError: there is no RevCol inside of it.
    """
    found = find_backbone(model)
    if found is None:
        raise LookupError("no RevCol is inside of the model")
    prefix, backbone = found
    matcher = backbone_matcher(prefix, backbone)
    places = [(re.compile(matcher["stem"]), 0), *((re.compile(name), layer) for name, (layer,) in matcher["blocks"])]
    top = 1 + max(layer for _, layer in places)  # also of a backbone that has lost its highest levels
    exempt = {prefix + name for name in backbone.no_weight_decay()} | getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = next((layer for pattern, layer in places if pattern.match(name)), top)
        decays = parameter.ndim > 1 and name not in exempt
        is_inside = name.startswith(prefix)  # a classifier of the backbone has the layer of the heads
        scale = backbone_lr_scale if is_inside else 1.0
        group = {
            "lr_scale": scale * (1.0 if layer_decay is None else layer_decay ** (top - layer)),
            "weight_decay": weight_decay if decays else 0.0,
            "params": [],
        }
        groups.setdefault((layer, decays, is_inside and backbone_lr_scale < 1), group)["params"].append(parameter)
    return list(groups.values())
