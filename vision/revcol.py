"""The RevCol family in timm's registry: one function a model, each built from the YAML of its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from revnets import NetSpec, SpecError, load_spec
from revnets.spec import dump
from vision.model import RevCol
from vision.vit import resized

MODELS = Path(__file__).parent / "configs" / "models"
"""A YAML for each model; `revnets.build` makes the same net from it."""


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,  # 256, then the central 224
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2212.11696",
        "paper_name": "Reversible Column Networks",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {
        "revcol_tiny.untrained": _cfg(),
        "revcol_small.untrained": _cfg(),
        "revcol_base.untrained": _cfg(),
        "revcol_large.untrained": _cfg(),
        "revcol_xlarge.untrained": _cfg(),
        "revcol_huge.untrained": _cfg(),
        "revcol_vit_small.untrained": _cfg(pool_size=(14, 14)),
        "revcol_vit_base.untrained": _cfg(pool_size=(14, 14)),
        "revcol_vit_small_p14.untrained": _cfg(pool_size=(16, 16)),
        "revcol_vit_base_p14.untrained": _cfg(pool_size=(16, 16)),
        "test_revcol.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        "test_revcol_huge.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        "test_revcol_vit.untrained": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
    }
)


def revise(
    spec: NetSpec,
    *,
    columns: int | None = None,
    dims: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    kernel_size: int | None = None,
    drop_path_rate: float | None = None,
    memory: str | Sequence[str] | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
) -> NetSpec:
    """A spec with other numbers, under timm's names; None leaves one as it is.

    Raises:
        revnets.SpecError: a value cannot be used, or the parts of this net have no such option.
        ValueError: not one value a level.
    """
    data = dump(spec)
    for key, values in (("dim", dims), ("depth", depths)):
        if values is not None:
            if len(values) != len(data["levels"]):
                raise ValueError(f"{key}s = {list(values)}: give {len(data['levels'])} values, one a level")
            for level, value in zip(data["levels"], values, strict=True):
                level[key] = value
    if kernel_size is not None:
        for level in data["levels"]:
            level["kernel_size"] = kernel_size
    stem = {"img_size": img_size, "patch": patch_size}
    data["stem"] |= {key: value for key, value in stem.items() if value is not None}
    net = {"columns": columns, "drop_path": drop_path_rate, "memory": memory}
    data |= {key: value for key, value in net.items() if value is not None}
    return load_spec(data)


REVISED = ("columns", "dims", "depths", "kernel_size", "drop_path_rate", "memory", "img_size", "patch_size")
"""Arguments of `timm.create_model` that go into the spec."""


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RevCol:
    """Build a model of the family; everything that `RevCol` and `revise` take may be given."""
    try:
        spec = revise(load_spec(MODELS / f"{variant}.yaml"), **{key: kwargs.pop(key, None) for key in REVISED})
        return build_model_with_cfg(
            RevCol,
            variant,
            pretrained,
            spec=spec,
            pretrained_filter_fn=fit_positions,
            feature_cfg={"out_indices": tuple(range(len(spec.levels))), "feature_cls": "getter"},
            **kwargs,
        )
    except SpecError as error:
        raise SpecError(variant, error.key, error.problem, error.remedy) from None


def fit_positions(state: dict[str, torch.Tensor], model: RevCol) -> dict[str, torch.Tensor]:
    """Weights of a model for another size of image: position embeddings are interpolated."""
    name = "stem.pos_embed"
    if name in state:
        height, width, _ = model.get_parameter(name).shape
        state = {**state, name: resized(state[name], height, width)}
    return state


@register_model
def revcol_tiny(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-T: 4 columns, 30.5 M parameters."""
    return _create("revcol_tiny", pretrained, **kwargs)


@register_model
def revcol_small(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-S: 8 columns, 60.6 M parameters."""
    return _create("revcol_small", pretrained, **kwargs)


@register_model
def revcol_base(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-B: 16 columns, 138.6 M parameters."""
    return _create("revcol_base", pretrained, **kwargs)


@register_model
def revcol_large(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-L: 8 columns, 273.1 M parameters."""
    return _create("revcol_large", pretrained, **kwargs)


@register_model
def revcol_xlarge(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-XL: 8 columns, 833.8 M parameters."""
    return _create("revcol_xlarge", pretrained, **kwargs)


@register_model
def revcol_huge(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-H: 8 columns, 2157.6 M parameters, with reads from the top level at level 0."""
    return _create("revcol_huge", pretrained, **kwargs)


@register_model
def revcol_vit_small(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-ViT-S as the paper states it: 4 columns, patches of 16, 20.9 M parameters."""
    return _create("revcol_vit_small", pretrained, **kwargs)


@register_model
def revcol_vit_base(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-ViT-B as the paper states it: 4 columns, patches of 16, 89.1 M parameters."""
    return _create("revcol_vit_base", pretrained, **kwargs)


@register_model
def revcol_vit_small_p14(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-ViT-S fitted to the sizes of Table 9: 3 columns, patches of 14, 15.7 M parameters."""
    return _create("revcol_vit_small_p14", pretrained, **kwargs)


@register_model
def revcol_vit_base_p14(pretrained: bool = False, **kwargs: Any) -> RevCol:
    """RevCol-ViT-B fitted to the sizes of Table 9: 3 columns, patches of 14, 66.8 M parameters."""
    return _create("revcol_vit_base_p14", pretrained, **kwargs)


@register_model
def test_revcol(pretrained: bool = False, **kwargs: Any) -> RevCol:  # noqa: PT028 (no test)
    """A toy of the convolutional kind, for tests."""
    return _create("test_revcol", pretrained, **kwargs)


@register_model
def test_revcol_huge(pretrained: bool = False, **kwargs: Any) -> RevCol:  # noqa: PT028 (no test)
    """A toy with the wires of RevCol-H, for tests."""
    return _create("test_revcol_huge", pretrained, **kwargs)


@register_model
def test_revcol_vit(pretrained: bool = False, **kwargs: Any) -> RevCol:  # noqa: PT028 (no test)
    """A toy of the isotropic kind, for tests."""
    return _create("test_revcol_vit", pretrained, **kwargs)
