"""Models that another library builds, in the key `model` of a training run: `{timm: name}` and `{hf: type}`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from revnets.config.errors import nearest, problem, what


class LibraryModel(BaseModel):
    """A model of another library. All keys except its name are arguments of the model."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TimmModel(LibraryModel):
    """A model of timm's registry, which includes the RevCol family."""

    timm: str

    @field_validator("timm")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm

        if not timm.is_model(name):
            raise problem(
                f"timm has no model {name!r}", nearest(name, timm.list_models(), "It has"), code="unknown-model"
            )
        return name


class TransformersModel(LibraryModel):
    """A language model of transformers by its type, such as gpt2, with arguments of its configuration."""

    hf: str


LIBRARIES = {"timm": (TimmModel, "revcol_tiny"), "hf": (TransformersModel, "gpt2")}
"""Model classes by the key that holds the model's name, each with an example."""


def read_model(value: Any, info: ValidationInfo) -> Any:
    """Validate the key `model`: a path that `load_config` has read, a model of a library, or a specification."""
    if isinstance(value, str):
        return (info.context or {}).get("net", value)
    library = next((key for key in LIBRARIES if isinstance(value, dict) and key in value), None)
    if library is None:
        return value
    kind, example = LIBRARIES[library]
    if not isinstance(value[library], str):
        hint = f"Give the name of a model, such as {example}"
        raise problem(what(value[library]), hint, library, code="wrong-type")
    return kind(**value)
