"""Loading of weights in our or the official layout, from files and URLs, into timm models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from timm.models import load_pretrained
from torch import Tensor

from vision.models.architecture import RevCol
from vision.models.vit_blocks import fit_positions
from vision.weights.convert import names_in, ours_of, skeleton
from vision.weights.files import channels_in, class_count, read, select
from vision.weights.kernel_padding import fit_kernels
from vision.weights.official_names import HEADS, MismatchError, check

_logger = logging.getLogger(__name__)


def load_file(model: RevCol, path: str) -> None:
    """Load a file into a model, as documented in `RevCol.load_pretrained`.

    Raises:
        vision.errors.CheckpointError: If the file cannot be used, or is of another model.
    """
    content = read(path)
    tensors = select(content, path=path).tensors
    cfg = {"classifier": "head.fc", "first_conv": "stem.conv", **_cfg(model), "state_dict": content, "source": ""}
    cfg["num_classes"] = class_count(tensors) or model.num_classes
    cfg["input_size"] = (channels_in(tensors), *cfg.get("input_size", (3, 224, 224))[1:])
    try:
        load_pretrained(model, cfg, model.num_classes, model.in_chans, checkpoint_filter_fn)
    except MismatchError as error:
        raise MismatchError(path, error.model, error.problems) from None


def checkpoint_filter_fn(content: Mapping[str, Any], model: RevCol) -> dict[str, Tensor]:
    """Convert the content of a file to weights for `model`; called by timm.

    Official names become ours, heads of intermediate supervision are omitted, a missing classifier is taken from the
    model, and one that the model does not have is omitted. Kernels are padded to the model's size, and position
    embeddings are interpolated to its image size.

    Raises:
        vision.errors.CheckpointError: If the file is of another model.
    """
    found, name = select(content), _cfg(model).get("architecture", "this model")
    found = found._replace(tensors=fit_kernels(found.tensors, model.state_dict()))
    state = found.tensors
    if found.layout != "ours":
        net, _ = skeleton(found, model.spec)
        state = ours_of(found, names_in(found, net), (), "weights", name)
    own = model.state_dict()
    state = {key: tensor for key, tensor in state.items() if not key.startswith(HEADS)}
    if not any(key.startswith("head.") for key in own):  # the backbone of a detector or a segmenter
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    elif not any(key.startswith("head.") for key in state):
        _logger.warning("The file has no classifier; the model's classifier is not changed.")
        state |= {key: tensor for key, tensor in own.items() if key.startswith("head.")}
    state = fit_positions(state, model)
    adapted = ("head.fc.*", "stem.conv.weight")  # by timm, to the model's number of classes and of channels
    check({key: tuple(tensor.shape) for key, tensor in own.items()}, state, adapted, model=name)
    return state


def _cfg(model: RevCol) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", {})  # timm sets it on every model
