"""Attention masks of transformers models, which depend on values that a simulated step does not have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnets
from revnets.analysis.memory_scaling import step_bytes
from revnets.analysis.peak_memory import memory_parts
from revnets.memory.simulation import simulate, without_packing

transformers = pytest.importorskip("transformers")

TEXTS, LENGTH = 3, 101


class Network(nn.Module):
    """A small GPT-2 that returns only its logits."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"n_embd": 26, "n_layer": 3, "n_head": 2, "n_positions": LENGTH, "vocab_size": 7, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
        self.model = transformers.GPT2LMHeadModel(config).train()

    def forward(self, words: Tensor, positions: Tensor | None = None) -> Any:
        return self.model(words, position_ids=positions).logits


def words() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(7, (TEXTS, LENGTH))


def test_one_text_per_row_needs_no_mask():
    net = Network()
    revnets.make_reversible(net, blocks="model.transformer.h", memory="store")
    predicted = simulate(net, (words(),))
    parameters, kept, peak = step_bytes(net, words())
    assert (predicted.parameters, predicted.kept, predicted.peak) == (parameters, kept, peak)


def test_peak_parts_contain_no_mask():
    net = Network()
    revnets.make_reversible(net, blocks="model.transformer.h", memory="store")
    (found,) = memory_parts(net, (words(),), optimizer="sgd", modes=("store",)).modes
    held = found.parts["optimizer"] + found.parts["input"]
    assert found.peak - held == simulate(net, (words(),)).peak


def test_position_ids_of_the_caller_may_be_packed():
    net, positions = Network(), torch.arange(LENGTH).expand(TEXTS, -1).contiguous()
    one, several = simulate(net, (words(),)), simulate(net, (words(), positions))
    assert several.kept - one.kept >= TEXTS * LENGTH**2  # one byte per pair of positions


def test_transformers_is_unchanged_afterwards():
    masks = transformers.masking_utils
    original = masks.find_packed_sequence_indices
    simulate(Network(), (words(),))
    assert masks.find_packed_sequence_indices is original


def test_simulations_of_two_threads_may_end_in_any_order():
    masks = transformers.masking_utils
    original = masks.find_packed_sequence_indices
    first, second = without_packing(()), without_packing(())
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        other.submit(second.__exit__, None, None, None).result()
    assert masks.find_packed_sequence_indices is original


def test_other_threads_detect_packed_texts_during_simulation():
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with without_packing(()), ThreadPoolExecutor(1) as other:
        find = transformers.masking_utils.find_packed_sequence_indices
        assert find(packed) is None
        assert torch.equal(other.submit(find, packed).result(), torch.tensor([[0, 0, 0, 1, 1]]))
