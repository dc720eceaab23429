"""The configuration of intermediate supervision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from revnets.config.errors import ArgumentError, problem
from revnets.config.loader import Strict

Weights = Annotated[
    float | tuple[float, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "constant": lambda x: 1.0,
}
"""How the weight of reconstruction falls along the heads, from x = 0 at the first to 1 at the last."""


RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "constant": lambda x: 1.0,
}
"""How the weight of classification rises."""


class Stop(NamedTuple):
    """A column at whose end losses are taken."""

    column: int  # from 0
    alpha: float  # weight of reconstruction; 0: no decoder
    beta: float  # weight of classification; 0: no classifier


class SupervisionConfig(Strict):
    """Where the heads stand and what their losses weigh; the defaults are the paper's."""

    heads: int = Field(default=4, ge=1)  # columns with losses, the last one among them
    alpha: Weights = 3.0  # of reconstruction: the first head's, or one weight a head
    beta: Weights = 0.7  # of classification: what it rises to before the last head, which has 1; or one weight a head
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # the way of single weights along the heads
    decoder: Literal["auto", "staged", "single"] = "auto"  # auto: staged for at most 1000 classes

    @model_validator(mode="after")
    def _usable(self) -> Self:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 0:
                raise problem(f"{value} has a weight below 0", "Give weights of at least 0", name, code="out-of-range")
            if isinstance(value, tuple) and len(value) != self.heads:
                raise problem(
                    f"{len(value)} weights for {self.heads} heads",
                    "Give one number, or one a head",
                    name,
                    code="wrong-length",
                )
        if isinstance(self.beta, tuple) and self.beta[-1] == 0:
            raise problem(
                "the last weight is 0, so nothing would train the model's classifier",
                "Give more",
                "beta",
                code="out-of-range",
            )
        return self

    def stops(self, columns: int) -> list[Stop]:
        """The heads of a net with this many columns, from the first to the last.

        They stand at even distances, the last one at the last column. A net with fewer columns than heads has one at
        each.

        Raises:
            ValueError: weights are given head by head, but the net has fewer columns than that.
        """
        heads = min(self.heads, columns)
        alphas, betas = self.alpha, self.beta
        if not isinstance(alphas, tuple):
            alphas = *(alphas * FALLS[self.schedule](head / (heads - 1)) for head in range(heads - 1)), 0.0
        if not isinstance(betas, tuple):
            betas = *(betas * RISES[self.schedule]((head + 1) / heads) for head in range(heads - 1)), 1.0
        if not len(alphas) == len(betas) == heads:
            raise ArgumentError(
                f"weights for {self.heads} heads, but the net has {columns} columns. Give one number",
                "heads",
                code="wrong-length",
            )
        ends = [(2 * columns * (head + 1) + heads) // (2 * heads) for head in range(heads)]
        return [Stop(end - 1, alpha, beta) for end, alpha, beta in zip(ends, alphas, betas, strict=True)]
