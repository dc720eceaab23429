"""Rewired transformers models: training, generation, saving and adapters work as before."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import revnets
from revnets.engine.errors import ArgumentError
from revnets.memory.tracker import kept_bytes
from revnets.pretrained.rewired_sequence import CHECKPOINTING, rewired_sequences
from tests.support.errors import raises_error
from tests.support.transformers_models import (
    FAMILIES,
    GENERATING,
    assert_bits,
    batch,
    network,
    set_memory,
    train_step,
)

pytest.importorskip("transformers")

SUPPORTED = sorted(FAMILIES.keys() - {"mixtral"})


def logits(model: Any) -> Tensor:
    """Compute the logits of a batch in evaluation mode."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(**batch(model)).logits


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", SUPPORTED)
def test_exact_equals_store_bit_for_bit(family):
    """Uses dropout, a mask with padding on both sides, and hidden states in the loss."""
    model = revnets.make_reversible(network(family), 0.3)
    expected = train_step(model, "store")
    outputs, gradients = expected
    assert all(output.isfinite().all() for output in outputs)
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    for memory in ("recompute", "exact"):
        assert_bits(train_step(model, memory), expected)


@pytest.mark.parametrize("family", SUPPORTED)
def test_exact_equals_store_in_bfloat16(family):
    """Uses autocast, and weights in bfloat16."""
    model = revnets.make_reversible(network(family), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits(train_step(model, "exact"), train_step(model, "store"))
    model.to(torch.bfloat16)
    assert_bits(train_step(model, "exact"), train_step(model, "store"))


@pytest.mark.parametrize("family", SUPPORTED)
def test_dropout_takes_part_in_training(family):
    model = revnets.make_reversible(network(family), 0.3)
    (first, *_), _ = train_step(model, "exact")
    (other, *_), _ = train_step(model.eval(), "exact")
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", SUPPORTED)
def test_exact_keeps_less_than_store(family):
    model = revnets.make_reversible(network(family), 0.3)
    kept = {}
    for memory in ("store", "exact"):
        set_memory(model, memory)
        kept[memory] = kept_bytes(model, **batch(model), use_cache=False)
    assert kept["exact"] < 0.7 * kept["store"]


def test_all_stacks_are_found():
    """One stack in a decoder or an encoder, two in a network with both."""
    found = {family: len(rewired_sequences(revnets.make_reversible(network(family)))) for family in SUPPORTED}
    assert found == {"bert": 1, "gpt2": 1, "llama": 1, "gemma2": 1, "t5": 2, "bart": 2}


@pytest.mark.parametrize("switch", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_is_turned_off_with_a_warning(switch, is_reentrant):
    model = revnets.make_reversible(network("llama"), 0.3)
    if not hasattr(model, switch):
        pytest.skip("a method of other releases")
    expected = train_step(model, "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # one of the two is renamed in later releases
        getattr(model, switch)({"use_reentrant": is_reentrant})
    with pytest.warns(UserWarning, match=CHECKPOINTING):
        found = train_step(model, "exact")
    assert_bits(found, expected)


def test_training_with_a_cache_raises():
    model = revnets.make_reversible(network("gpt2"))
    with raises_error(ArgumentError, code="conflicting-values", key="use_cache"):
        model(**batch(model), use_cache=True)
    model(**batch(model), use_cache=False).loss.backward()  # the next pass starts again


# --------------------------------------------------------------------------------------- generation


def generated(model: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Generate seven tokens greedily, and return them with their logits."""
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(do_sample=False, min_new_tokens=7, max_new_tokens=7, **arguments)
    return found.sequences[:, -7:], torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("family", GENERATING)
def test_generation_is_equal_with_and_without_a_cache(family):
    model = revnets.make_reversible(network(family), 0.3).eval()
    prompts = {"input_ids": batch(model)["input_ids"]}
    tokens, scores = generated(model, **prompts, use_cache=True)
    expected_tokens, expected = generated(model, **prompts, use_cache=False)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_generation_in_a_padded_batch_equals_single_prompts(family):
    model = revnets.make_reversible(network(family), 0.3).eval()
    prompts, mask = batch(model)["input_ids"], torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = mask[1, :3] = 0
    tokens, scores = generated(model, input_ids=prompts, attention_mask=mask)
    for row, padding in enumerate((2, 3, 0)):
        expected_tokens, expected = generated(model, input_ids=prompts[row : row + 1, padding:])
        assert torch.equal(tokens[row], expected_tokens[0])
        torch.testing.assert_close(scores[row], expected[0], rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("family", SUPPORTED)
def test_saved_model_equals_the_trained_one(family, tmp_path):
    model = network(family)
    expected = logits(model)
    revnets.make_reversible(model, 0.3).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(revnets.make_reversible(loaded, 0.3)), logits(model))


@pytest.mark.parametrize("family", SUPPORTED)
def test_undo_restores_the_original_network(family):
    model = network(family)
    outputs, names = train_step(model, "store"), list(model.state_dict())
    revnets.make_reversible(model, 0.3)
    assert list(model.state_dict()) == names
    assert not torch.equal(train_step(model, "store")[0][0], outputs[0][0])
    assert_bits(train_step(revnets.undo_reversible(model), "store"), outputs)


def test_tied_weights_stay_tied():
    model = revnets.make_reversible(network("gpt2"))
    for one in (model, copy.deepcopy(model)):
        assert one.lm_head.weight is one.transformer.wte.weight


# --------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_adapters_before_or_after_rewiring(family):
    peft = pytest.importorskip("peft")

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        targets = ["q_proj", "v_proj"] if family == "llama" else ["q", "v"]
        config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, lora_dropout=0.1)
        return peft.get_peft_model(model, config)

    before = revnets.make_reversible(adapted(network(family)), 0.3)
    after = adapted(revnets.make_reversible(network(family), 0.3))
    expected = train_step(before, "store")
    trained = {name for name, gradient in expected[1].items() if gradient is not None}
    assert trained == {name for name in expected[1] if "lora" in name}
    for model in (before, after):
        assert_bits(train_step(model, "exact"), expected)


def test_network_stays_reversible_after_merging_adapters():
    peft = pytest.importorskip("peft")
    model = revnets.make_reversible(network("llama"), 0.3)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert_bits(train_step(merged.requires_grad_(), "exact"), train_step(merged, "store"))


# --------------------------------------------------------------------------------------- unsupported networks


@pytest.mark.parametrize(("family", "options"), [("mixtral", {}), ("bart", {"encoder_layerdrop": 0.1})])
def test_unsupported_networks_are_unchanged(family, options):
    model = network(family, **options)
    expected = logits(model)
    with raises_error(ArgumentError, code="unsupported-block", key="blocks"):
        revnets.make_reversible(model)
    assert rewired_sequences(model) == []
    assert torch.equal(logits(model), expected)
