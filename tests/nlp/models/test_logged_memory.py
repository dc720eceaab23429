"""Log line of `fairseq-train` about the memory of its encoder."""

from __future__ import annotations

import logging
import re

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from revnets.memory.tracker import kept_bytes
from tests.support.fairseq import build, sample


def megabytes(caplog, **given: object) -> tuple[float, float]:
    """Return the logged megabytes of the model and of `store`, after two training forwards."""
    caplog.clear()
    model = build(**given).train()
    with caplog.at_level(logging.INFO, "nlp.models.memory_budget"):
        model(**sample())
        model(**sample((5, 4)))
    (line,) = [record.getMessage() for record in caplog.records if "encoder saves" in record.getMessage()]
    assert "3 sentences of 11 tokens" in line
    return tuple(float(number) for number in re.findall(r"([\d.]+) MB", line))


def test_the_logged_bytes_are_those_saved(caplog):
    given = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 4096, "dropout": 0.0}
    for mode in ("exact", "store"):
        encoder = build(revcol_memory=mode, **given).train().encoder
        words, lengths = (sample()[key] for key in ("src_tokens", "src_lengths"))
        measured = kept_bytes(encoder, words, lengths) / 1e6
        kept, store = megabytes(caplog, revcol_memory=mode, **given)
        assert kept == pytest.approx(measured, abs=0.1)
        assert (kept == store) == (mode == "store")
    assert store > 4


def test_the_line_changes_no_gradient(caplog):
    gradients = []
    for level in (logging.INFO, logging.WARNING):
        model = build(dropout=0.3).train()
        torch.manual_seed(1)
        with caplog.at_level(level, "nlp.models.memory_budget"):
            model(**sample())[0].sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
