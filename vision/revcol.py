"""The RevCol models in timm's registry, one function per model, each built from the YAML file of its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from revnets import NetSpec, SpecError
from revnets.config.errors import ArgumentError
from revnets.config.loader import read_layers
from revnets.config.overrides import apply_overrides
from vision.paths import MODELS as MODELS

if TYPE_CHECKING:
    from vision.models.architecture import RevCol
    from vision.models.vit_blocks import fit_positions as fit_positions

RELEASE = "https://github.com/megvii-research/RevCol/releases/download/checkpoint/"
"""URL of the weights that the authors of the paper published (Apache 2.0), except the largest."""

HUGE = "https://huggingface.co/LarryTsai/RevCol/resolve/main/revcol_models/classification/revcol_huge_megdata_in1k.pth"
"""URL of the largest weights, from the page that their README names."""


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,  # resize to 256, then crop the central 224
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2212.11696",
        "paper_name": "Reversible Column Networks",
        **changes,
    }


def _released(url: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of official weights, whose layout `RevCol.load_pretrained` reads."""
    origin = "https://github.com/megvii-research/RevCol"
    return _cfg(url=url, custom_load=True, license="apache-2.0", origin_url=origin, **changes)


def _square(size: int) -> dict[str, Any]:
    """Return settings for images larger than 224, which are resized to a square without a crop, as in the release."""
    return {
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }


default_cfgs = generate_default_cfgs(
    {
        "revcol_tiny.in1k": _released(RELEASE + "revcol_tiny_1k.pth"),
        "revcol_small.in1k": _released(RELEASE + "revcol_small_1k.pth"),
        "revcol_base.in1k": _released(RELEASE + "revcol_base_1k.pth"),
        "revcol_base.in22k": _released(RELEASE + "revcol_base_22k.pth", num_classes=21841),
        "revcol_base.in22k_ft_in1k": _released(RELEASE + "revcol_base_22k_1kft_224.pth"),
        "revcol_base.in22k_ft_in1k_384": _released(RELEASE + "revcol_base_22k_1kft_384.pth", **_square(384)),
        "revcol_large.in22k_ft_in1k": _released(RELEASE + "revcol_large_22k_1kft_224.pth"),
        "revcol_large.in22k_ft_in1k_384": _released(RELEASE + "revcol_large_22k_1kft_384.pth", **_square(384)),
        "revcol_large.in22k": _released(RELEASE + "revcol_large_22k.pth", num_classes=21841),
        "revcol_xlarge.untrained": _cfg(),  # the release has no weights
        "revcol_huge.megdata_ft_in1k_640": _released(HUGE, **_square(640)),
        "revcol_vit_small.untrained": _cfg(pool_size=(14, 14)),
        "revcol_vit_base.untrained": _cfg(pool_size=(14, 14)),
        "revcol_vit_small_p14.untrained": _cfg(pool_size=(16, 16)),
        "revcol_vit_base_p14.untrained": _cfg(pool_size=(16, 16)),
        "test_revcol.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        "test_revcol_huge.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        "test_revcol_vit.untrained": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
    }
)


def load_variant(
    name: str,
    *,
    columns: int | Mapping[str, int] | None = None,
    dims: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    kernel_size: int | None = None,
    drop_path_rate: float | None = None,
    init: str | None = None,
    memory: str | Sequence[str] | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
) -> NetSpec:
    """Return the spec of a model with changed options, which have timm's names. None keeps a value.

    Raises:
        revnets.SpecError: If a value is invalid, or the components of this network do not have the option.
        ValueError: If a list does not have one value per level.
    """
    layers = read_layers(MODELS / f"{name}.yaml")
    m = len(layers.data["levels"])
    values: dict[str, Any] = {"columns": columns, "drop_path": drop_path_rate, "memory": memory}
    values |= {"init": init, "stem.img_size": img_size, "stem.patch": patch_size}
    for key, of_levels in (("dim", dims), ("depth", depths)):
        if of_levels is not None and len(of_levels) != m:
            raise ArgumentError(
                f"{key}s is {list(of_levels)}, but must have {m} values, one per level", f"{key}s", code="wrong-length"
            )
        values |= {f"levels.{index}.{key}": value for index, value in enumerate(of_levels or ())}
    values |= {f"levels.{index}.kernel_size": kernel_size for index in range(m)}
    apply_overrides(layers, {key: value for key, value in values.items() if value is not None})
    return layers.check(NetSpec)


REVISED = ("columns", "dims", "depths", "kernel_size", "drop_path_rate", "init", "memory", "img_size", "patch_size")
"""Arguments of `timm.create_model` that change the spec."""

ARGUMENTS = (*REVISED, "num_classes", "in_chans", "global_pool", "drop_rate", "head_init_scale")
"""All arguments of `timm.create_model` for a RevCol."""


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RevCol:
    """Build a RevCol. All arguments of `RevCol` and `load_variant` are supported."""
    from vision.models.architecture import RevCol  # runs of other models do not need it

    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if overlay.get("file") or overlay.get("url"):
        overlay.setdefault("custom_load", True)  # `load_pretrained` reads official files and ours
    stride = kwargs.pop("output_stride", None)
    try:
        spec = load_variant(variant, **{key: kwargs.pop(key, None) for key in REVISED})
        _require_stride(variant, spec, stride)
        return build_model_with_cfg(
            RevCol,
            variant,
            pretrained,
            pretrained_cfg_overlay=overlay,
            spec=spec,
            pretrained_filter_fn=_fitted,
            feature_cfg={"out_indices": tuple(range(len(spec.levels))), "feature_cls": "getter"},
            **kwargs,
        )
    except SpecError as error:
        raise SpecError(variant, error.key, error.problem, error.remedy, error.code) from None


def _require_stride(variant: str, spec: NetSpec, stride: int | None) -> None:
    """Require `output_stride` to be that of the coarsest level, because fusions need each level at half the size.

    Raises:
        revnets.SpecError: If the stride is another one.
    """
    own = spec.stem.options.get("patch", 4) * spec.reductions()[-1]
    if stride not in (None, own):
        problem = f"{stride}, but the levels of a column have fixed strides, the coarsest {own}"
        hint = f"Use {own}, or a decoder that needs no other stride, such as UPerNet or FPN"
        raise SpecError(variant, "output_stride", problem, hint, code="invalid-value")


def _fitted(content: Mapping[str, Any], model: RevCol) -> dict[str, Tensor]:
    """Adapt the weights of a file to a model. The import happens only if there is a file."""
    from vision.weights.pretrained import checkpoint_filter_fn

    return checkpoint_filter_fn(content, model)


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
    """RevCol-H: 8 columns, 2157.6 M parameters, with inputs from the top level at level 0."""
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
    """A small convolutional model for tests."""
    return _create("test_revcol", pretrained, **kwargs)


@register_model
def test_revcol_huge(pretrained: bool = False, **kwargs: Any) -> RevCol:  # noqa: PT028 (no test)
    """A small model with the connections of RevCol-H for tests."""
    return _create("test_revcol_huge", pretrained, **kwargs)


@register_model
def test_revcol_vit(pretrained: bool = False, **kwargs: Any) -> RevCol:  # noqa: PT028 (no test)
    """A small isotropic model for tests."""
    return _create("test_revcol_vit", pretrained, **kwargs)


def variants() -> list[str]:
    """Return the names of all RevCol models, without the tags of their weights."""
    return list(dict.fromkeys(name.split(".")[0] for name in default_cfgs))


def names() -> list[str]:
    """Return the names of all timm models. Commands refuse those without reversible columns."""
    return timm.list_models()


def create(name: str, **options: Any) -> nn.Module:
    """Build a timm model with newly initialized weights; options as for `timm.create_model`."""
    return timm.create_model(name, **options)


def __getattr__(name: str) -> Any:
    if name == "fit_positions":
        from vision.models.vit_blocks import fit_positions

        return fit_positions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
