"""Example inputs of a model, derived from its attributes and configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 128
"""Maximum length of the example input of a language model."""


def example_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of one sample, from the stem of a `Net` or the configuration of a timm or transformers model.

    Returns:
        The shape without the batch axis; None if the model does not define one.
    """
    shape = getattr(getattr(model, "stem", None), "example_shape", None)
    if shape is None:
        shape = getattr(model, "pretrained_cfg", {}).get("input_size")
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if shape is not None and size is not None:
            shape = (shape[0], *size)  # a Vision Transformer built for images of another size
    config: Any = getattr(model, "config", None)
    if shape is None and takes_tokens(model):
        shape = (min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS),)
    if shape is None and getattr(config, "image_size", None):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (getattr(config, "num_channels", 3), height, width)
    return None if shape is None else tuple(shape)


def takes_tokens(model: nn.Module) -> bool:
    """Whether the input of the model is token indices, according to the main input of a transformers model."""
    return getattr(model, "main_input_name", None) == "input_ids"


def example_input(model: nn.Module, shape: Sequence[int], *, device: str | None = None) -> Tensor:
    """Return a random input for a model: normal values or token indices.

    Args:
        model: The model.
        shape: Shape of the input, batch first.
        device: "meta" for an input without values; by default the default device.
    """
    if not takes_tokens(model):
        return torch.randn(tuple(shape), device=device)
    config: Any = getattr(model, "config", None)
    return torch.randint(0, config.get_text_config().vocab_size, tuple(shape), device=device)
