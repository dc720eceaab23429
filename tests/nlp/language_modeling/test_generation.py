"""Generation with and without a cache, with padding, and in every memory mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DynamicCache

from nlp.language_modeling import RevColForCausalLM
from nlp.language_modeling.causal_attention import CausalAttention
from revnets import Memory
from revnets.config.errors import ArgumentError
from tests.support.errors import raises_error
from tests.support.language_models import POSITIONS, WORDS, language_model, text

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 11},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.fixture(scope="module", params=["columns", "midpoint"])
def model(request: pytest.FixtureRequest) -> RevColForCausalLM:
    return language_model(architecture=request.param)


def generated(model: RevColForCausalLM, tokens: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(5)
    found: Any = model.generate(tokens, max_new_tokens=11, pad_token_id=0, **options)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_tokens_with_a_cache_are_those_without(model: RevColForCausalLM, way: str) -> None:
    with_cache, without = (generated(model, text(), use_cache=use, **WAYS[way]) for use in (True, False))
    assert torch.equal(with_cache, without)
    assert len(with_cache.unique()) > 5  # more than one token repeated


def test_a_static_cache_gives_the_same_tokens(model: RevColForCausalLM) -> None:
    static = generated(model, text(), cache_implementation="static", do_sample=False)
    assert torch.equal(static, generated(model, text(), use_cache=False, do_sample=False))


def test_padding_on_the_left_changes_no_token(model: RevColForCausalLM) -> None:
    short, long = text(1, 5, seed=1), text(1, 13, seed=2)
    padded = torch.cat([torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1), long])
    both = generated(model, padded, attention_mask=(padded > 0).long(), do_sample=False)
    assert torch.equal(both[0, 8:], generated(model, short, do_sample=False)[0])
    assert torch.equal(both[1], generated(model, long, do_sample=False)[0])


@torch.no_grad()
def test_a_cache_has_a_pair_of_keys_and_values_for_each_block(model: RevColForCausalLM) -> None:
    cache = model(text(), cache=DynamicCache()).cache
    layers = [module for module in model.modules() if isinstance(module, CausalAttention)]
    assert [layer.layer_idx for layer in layers] == list(range(9))  # 3 columns of 3 levels
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 13, 14)] * 9


@torch.no_grad()
def test_logits_of_one_token_and_a_cache_are_those_of_the_whole_text(model: RevColForCausalLM) -> None:
    tokens = text()
    cache = model(tokens[:, :-1]).cache
    last = model(tokens[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last, model(tokens).logits[:, -1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_token_does_not_depend_on_later_ones(model: RevColForCausalLM) -> None:
    tokens = text()
    changed = torch.cat([tokens[:, :7], text(seed=3)[:, 7:]], 1)
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("memory", [*Memory, {"budget": "24GiB"}])
def test_memory_modes_make_no_difference_to_generation(memory: Any) -> None:
    model, stored = language_model(memory=memory), language_model(memory="store")
    policy = model.model.columns.policy
    assert torch.equal(generated(model, text(), do_sample=False), generated(stored, text(), do_sample=False))
    assert model.model.columns.policy == policy


@pytest.mark.parametrize(
    "options", [{"cache": DynamicCache()}, {"use_cache": True}, {"past_key_values": DynamicCache()}]
)
def test_a_cache_is_refused_where_a_replay_would_fill_it_twice(options: dict[str, Any]) -> None:
    with raises_error(ArgumentError, code="conflicting-values", key="cache"):
        language_model()(text(), **options)


def test_memory_store_fills_a_cache_while_gradients_are_recorded() -> None:
    assert language_model(memory="store")(text(), use_cache=True).cache.get_seq_length() == 13


def test_more_tokens_than_positions_are_refused(model: RevColForCausalLM) -> None:
    with raises_error(ArgumentError, code="too-large", key="input_ids", names=["68", "67"]):
        model(text(1, POSITIONS + 1))
    with raises_error(ArgumentError, code="too-large", key="input_ids"):
        model.generate(text(1, POSITIONS - 1), max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_token_outside_of_the_vocabulary_is_refused(model: RevColForCausalLM) -> None:
    with raises_error(ArgumentError, code="out-of-range", key="input_ids", names=str(WORDS)):
        model(text() + WORDS)


@pytest.mark.parametrize("both", [True, False])
def test_tokens_or_embeddings_are_needed_but_not_both(model: RevColForCausalLM, both: bool) -> None:
    embedded = model.model.embed_tokens(text())
    with raises_error(ArgumentError, code="conflicting-values", key="input_ids"):
        model(**({"input_ids": text(), "inputs_embeds": embedded} if both else {}))


def test_embeddings_give_the_logits_of_their_tokens(model: RevColForCausalLM) -> None:
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(text())).logits, model(text()).logits)


def test_generation_has_no_memory_mode(model: RevColForCausalLM) -> None:
    with raises_error(ArgumentError, code="reserved-key", key="memory"):
        model.generate(text(), memory="exact", max_new_tokens=3)


@pytest.mark.parametrize("key", ["output_attentions", "output_hidden_states"])
def test_outputs_that_columns_do_not_keep_are_refused(model: RevColForCausalLM, key: str) -> None:
    with raises_error(ArgumentError, code="reserved-key", key=key):
        model(text(), **{key: True})


@torch.no_grad()
def test_logits_of_the_last_positions_alone(model: RevColForCausalLM) -> None:
    assert torch.equal(model(text(), logits_to_keep=3).logits, model(text()).logits[:, -3:])
