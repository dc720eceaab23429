"""Initial weights of a run, from files, other runs or timm, fitted to the model of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from revnets.config.errors import nearest
from revnets.models.net import Net
from vision.checkpoints import reader
from vision.config.learning import PretrainedConfig
from vision.distributed.context import World
from vision.errors import CheckpointError, comparable, first_line
from vision.models.architecture import RevCol
from vision.weights.files import read, tensors_in
from vision.weights.kernel_padding import fit_kernels
from vision.weights.official_names import MismatchError, check
from vision.weights.pretrained import checkpoint_filter_fn


def begin(model: nn.Module, config: PretrainedConfig, classes: Sequence[str], world: World | None = None) -> str:
    """Load pretrained weights into a new model.

    All weights except the classifier must be present and fit. Heads of intermediate supervision are ignored. Kernels of
    a RevCol that are smaller than the model's are padded (`vision.weights.kernel_padding`); the first convolution and
    position embeddings are adapted as in timm.

    Args:
        model: Of the run.
        config: The key `pretrained` of the run.
        classes: Of the data, in the order of the model's scores. Empty if the model is a backbone.
        world: The processes of the run. The first one downloads weights.

    Returns:
        A description of the loaded weights.

    Raises:
        CheckpointError: If the weights do not exist, are damaged, or are of another model.
    """
    content, name = find_pretrained(config.source, world or World())
    given = tensors_in(content, config.weights, name)
    state = fitted(given, model, name)
    names = class_names_in(content)
    heads = classifiers(model)
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(heads)}
    is_kept = (
        config.head == "auto"
        and (names is None or list(map(comparable, names)) == list(map(comparable, classes)))
        and all(key in state and state[key].shape == tensor.shape for key, tensor in own.items())
    )
    if not is_kept:
        state = {key: tensor for key, tensor in state.items() if key not in own}
        _scale_classifier(model, config.head_init_scale)
    model.load_state_dict(state, strict=False)
    head = "its classifier" if is_kept else f"a new classifier for {len(classes)} classes"
    end = f" and {head}" if classes else ""
    return f"{config.weights} weights of {name}{end}{_about_kernels(given, model)}"


def find_pretrained(source: str, world: World) -> tuple[Mapping[str, Any], str]:
    """Read a file, a sharded checkpoint, the best checkpoint of a run, or the weights of a timm model.

    Returns:
        The content, and the path or name that it was read from.

    Raises:
        CheckpointError: If the source does not exist or is damaged.
    """
    path = Path(source)
    if path.is_dir():
        path = reader.in_run(path)
        content = reader.read(path) if path.is_dir() else read(path)
    elif path.exists():
        content = read(path)
    elif timm.is_model_pretrained(source):
        world.by_main(lambda: None if world.size == 1 else _fetched(source).clear())  # into the cache, once
        return _fetched(source), source
    else:
        hint = nearest(
            source, timm.list_pretrained("revcol*"), "Give a file, the directory of a run, or a model such as"
        )
        raise CheckpointError(source, "there is no such file", hint, code="missing-file")
    if not isinstance(content, Mapping):
        raise CheckpointError(path, "not a dict of weights", "Give a checkpoint of RevCol")
    return content, str(path)


def class_names_in(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names in a checkpoint of `revnets train`; None in other files."""
    names = content.get("classes")
    return tuple(names) if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) else None


def _fetched(name: str) -> dict[str, Tensor]:
    """Download the pretrained weights of a timm model."""
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # no network, no space on the disk, or the file was removed
        problem = f"it cannot be downloaded ({first_line(error)})"
        hint = "Download the file by hand (docs/guides/pretrained-weights.md), and give its path"
        raise CheckpointError(name, problem, hint, code="download-failed") from None


def fitted(given: Mapping[str, Tensor], model: nn.Module, path: str) -> dict[str, Tensor]:
    """Weights of a file under the names and in the shapes of a model. The classifier may have another shape.

    Raises:
        CheckpointError: If the weights are those of another model.
    """
    own, heads = model.state_dict(), classifiers(model)
    try:
        state = fit_kernels(dict(given), own)
        if isinstance(model, RevCol):
            has_head = any(key.startswith(("cls", *heads)) for key in state)
            state = checkpoint_filter_fn(state, model)
            if not has_head:
                state = {key: tensor for key, tensor in state.items() if not key.startswith(heads)}
        state = _with_channels(state, model)
        expected = {key: tuple(tensor.shape) for key, tensor in own.items() if not key.startswith(heads)}
        rest = {key: tensor for key, tensor in state.items() if not key.startswith(heads)}
        check(expected, rest)
    except MismatchError as error:
        first, more = error.problems[0], len(error.problems) - 1
        problem = f"not the weights of {name_of(model)}: {first}" + (f", and {more} more" if more else "")
        raise CheckpointError(
            path, problem, "Give a file of this model, or set `model` to the file's model", code="weights-mismatch"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(path, error.problem, error.remedy, error.code) from None
    return state


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of a model's classifier."""
    if isinstance(model, (RevCol, Net)):
        return ("head.",)
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def name_of(model: nn.Module) -> str:
    """The name of a model in timm."""
    return getattr(model, "pretrained_cfg", {}).get("architecture") or "this model"


def _with_channels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapt the first convolution to the model's number of image channels, as in timm."""
    first = getattr(model, "pretrained_cfg", {}).get("first_conv") or "stem.conv"
    name, own = f"{first}.weight", dict(model.named_parameters()).get(f"{first}.weight")
    given = state.get(name)
    if own is None or given is None or given.dim() != 4 or given.shape[1] == own.shape[1]:
        return state
    return {**state, name: adapt_input_conv(own.shape[1], given, base_chans=given.shape[1])}


@torch.no_grad()
def _scale_classifier(model: nn.Module, scale: float) -> None:
    if isinstance(model, Net):
        layers = [layer for layer in (model.head or nn.Identity()).modules() if isinstance(layer, nn.Linear)][-1:]
    else:
        layers = [model.get_classifier()]  # pyright: ignore[reportCallIssue]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.mul_(scale)


def _about_kernels(given: Mapping[str, Tensor], model: nn.Module) -> str:
    def sizes(tensors: Mapping[str, Tensor]) -> set[int]:
        names = (key for key in tensors if ".blocks." in key and key.endswith("dwconv.weight"))
        return {tensors[key].shape[-1] for key in names if not key.startswith("decoder")}

    before, now = sizes(given), sizes(model.state_dict())
    return "" if before == now else f"; kernels of {_listed(before)} padded to {_listed(now)}"


def _listed(sizes: set[int]) -> str:
    return " and ".join(map(str, sorted(sizes)))
