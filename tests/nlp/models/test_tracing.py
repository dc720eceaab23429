"""`torch.jit.trace` and `torch.jit.script` of the encoder as fairseq builds it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from tests.support.fairseq import build, sample


class Encoded(nn.Module):
    """Returns only the encoder's output, as a tensor."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return self.encoder(words, lengths)["encoder_out"][0]


def test_a_traced_encoder_gives_the_same_states():
    encoder = build().eval().encoder
    words, lengths = (sample()[key] for key in ("src_tokens", "src_lengths"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates tracing and warns about branches on shapes
        traced = torch.jit.trace(Encoded(encoder), (words, lengths))
        torch.testing.assert_close(traced(words, lengths), Encoded(encoder)(words, lengths))


def test_a_beam_search_still_reorders_sentences():
    encoder = build().eval().encoder
    words, lengths = (sample()[key] for key in ("src_tokens", "src_lengths"))
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        found = encoder.reorder_encoder_out(encoder(words, lengths), order)
        expected = encoder(words, lengths)["encoder_out"][0]
    assert torch.equal(found["encoder_out"][0], expected[:, order])


def test_the_encoder_cannot_be_scripted():
    """See docs/guides/translation-model.md: columns pass keyword arguments to their blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.jit.frontend.NotSupportedError):
            torch.jit.script(build().eval().encoder)
