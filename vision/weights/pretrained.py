"""Weights from files and URLs for models of timm: ours and the official ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from timm.models import load_pretrained
from torch import Tensor

from vision.models.architecture import RevCol
from vision.models.vit_blocks import resized
from vision.weights.convert import names_in, ours_of, skeleton
from vision.weights.files import channels_in, class_count, read, select
from vision.weights.kernel_padding import fit_kernels
from vision.weights.official_names import HEADS, MismatchError, check

_logger = logging.getLogger(__name__)


class LoadableRevCol(RevCol):
    """A RevCol as timm's registry makes it: it takes weights from files, official ones too."""

    def load_pretrained(self, path: str) -> None:
        """Load a file; timm calls this with what it has downloaded, for it would refuse the official files itself.

        Classifiers and first convolutions of other sizes are adapted, as timm does it; what they are made for is told
        by the file, whatever `pretrained_cfg` says.

        Raises:
            vision.errors.CheckpointError: the file cannot be used, or is of another model.
        """
        content = read(path)
        tensors = select(content, path=path).tensors
        cfg = {**_cfg(self), "state_dict": content, "source": ""}
        cfg["num_classes"] = class_count(tensors) or self.num_classes
        cfg["input_size"] = (channels_in(tensors), *cfg["input_size"][1:])
        try:
            load_pretrained(self, cfg, self.num_classes, self.in_chans, checkpoint_filter_fn)
        except MismatchError as error:
            raise MismatchError(path, error.model, error.problems) from None


def checkpoint_filter_fn(content: Mapping[str, Any], model: RevCol) -> dict[str, Tensor]:
    """What timm calls with the content of a file, and gets weights for `model` from.

    The official names become ours, heads of intermediate supervision are left out, a classifier that is not in the file
    stays as it is in the model, kernels are padded to the model's size, and position embeddings are interpolated to its
    size of image.

    Raises:
        vision.errors.CheckpointError: the file is of another model.
    """
    found, name = select(content), _cfg(model).get("architecture", "this model")
    found = found._replace(tensors=fit_kernels(found.tensors, model.state_dict()))
    state = found.tensors
    if found.layout != "ours":
        net, _ = skeleton(found, model.spec)
        state = ours_of(found, names_in(found, net), (), "weights", name)
    own = model.state_dict()
    state = {key: tensor for key, tensor in state.items() if not key.startswith(HEADS)}
    if not any(key.startswith("head.") for key in state):
        _logger.warning("The file has no classifier; the model keeps its own.")
        state |= {key: tensor for key, tensor in own.items() if key.startswith("head.")}
    state = fit_positions(state, model)
    adapted = ("head.fc.*", "stem.conv.weight")  # by timm, to the model's number of classes and of channels
    check({key: tuple(tensor.shape) for key, tensor in own.items()}, state, adapted, model=name)
    return state


def fit_positions(state: dict[str, Tensor], model: RevCol) -> dict[str, Tensor]:
    """Weights of a model for another size of image: position embeddings are interpolated."""
    name = "stem.pos_embed"
    if name in state:
        height, width, _ = model.get_parameter(name).shape
        state = {**state, name: resized(state[name], height, width)}
    return state


def _cfg(model: RevCol) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", {})  # timm gives it to every model that it makes
