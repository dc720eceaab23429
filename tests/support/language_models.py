"""Tiny language models with prime sizes, and texts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nlp.language_modeling import RevColForCausalLM, RevColLMConfig

WORDS, LENGTH, POSITIONS = 61, 13, 67


def language_config(**options: Any) -> RevColLMConfig:
    """Return the configuration of three columns of three levels with grouped queries."""
    sizes = {
        "hidden_size": 28,
        "columns": 3,
        "levels": 3,
        "intermediate_size": 37,
        "max_position_embeddings": POSITIONS,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return RevColLMConfig(**{"vocab_size": WORDS, **sizes, **heads, **options})


def language_model(**options: Any) -> RevColForCausalLM:
    """Return a model with large weights, so that its most likely tokens differ clearly."""
    torch.manual_seed(0)
    model = RevColForCausalLM(language_config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def text(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Return tokens other than 0, which is padding."""
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
