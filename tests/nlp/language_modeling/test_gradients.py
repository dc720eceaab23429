"""Gradients of a language model: memory modes, chunked loss and intermediate supervision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from nlp.language_modeling import RevColForCausalLM, RevColLMConfig
from nlp.language_modeling.loss import IGNORED, chunked_loss, shifted
from tests.support.counters import Kept
from tests.support.language_models import WORDS, language_model, text


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def loss_of(model: RevColForCausalLM, **options: Any) -> Tensor:
    torch.manual_seed(7)  # dropout
    return model.train()(text(), labels=text(), **options).loss


@pytest.mark.parametrize("architecture", ["columns", "midpoint"])
def test_exact_gradients_are_those_of_store(architecture: str) -> None:
    options = {"architecture": architecture, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    found = []
    for memory in ("store", "exact"):
        model = language_model(memory=memory, **options)
        found.append(gradients(model, loss_of(model, attention_mask=torch.ones_like(text()))))
    assert all(map(torch.equal, *found))


def test_the_midpoint_rule_computes_its_formula() -> None:
    model = language_model(architecture="midpoint", columns=1, levels=2, depth=2).model
    states = [model.embed_tokens(text())]
    blocks = [cell.function.block if index > 1 else cell.function for index, cell in enumerate(model.columns.flat())]
    context = {"rotation": None, "mask": None, "cache": None}
    states.append(blocks[1](states[0], **context))
    for block in blocks[2:]:
        states.append(states[-2] + block(states[-1], **context) - states[-1])
    found = model.columns(states[0], **context)
    assert len(states) == 5
    torch.testing.assert_close(found[-1], states[-1], rtol=1e-5, atol=1e-5)


def test_a_token_that_pads_learns_where_it_is_text() -> None:
    model = language_model(tie_word_embeddings=False, pad_token_id=WORDS - 1)
    tokens = text()
    tokens[0, 3] = WORDS - 1
    (found,) = torch.autograd.grad(model(tokens, labels=tokens).loss, [model.model.embed_tokens.weight])
    assert model.model.embed_tokens.weight[-1].all()
    assert found[-1].any()


def test_the_loss_is_that_of_the_logits() -> None:
    model = language_model()
    tokens = text()
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, IGNORED)
    logits = model(tokens).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(model(tokens, labels=labels).loss, plain)


@pytest.mark.parametrize("chunk", [1, 7, 26])
def test_gradients_of_a_loss_in_chunks_are_those_of_the_plain_loss(chunk: int) -> None:
    hidden = torch.randn(26, 11, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(11, 31, bias=False, dtype=torch.float64)
    targets = torch.randint(31, (26,)).masked_fill(torch.arange(26) % 5 == 0, IGNORED)

    def plain(states: Tensor, *_: Any) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, ignore_index=IGNORED, reduction="sum")

    found, wanted = (
        torch.autograd.grad(loss, [hidden, head.weight])
        for loss in (chunked_loss(hidden, head, targets, chunk), plain(hidden))
    )
    # Rows of the first gradient come from one chunk each; the second is summed in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if chunk == 26:
        assert all(map(torch.equal, found, wanted))


def test_no_logits_of_a_whole_batch_are_in_memory() -> None:
    words, chunk = 5003, 13
    model = language_model(vocab_size=words, columns=1, loss_chunk=chunk).train()
    tokens = text(5)

    def peak() -> int:
        with Kept(peak=True) as kept:
            model(tokens, labels=tokens).loss.backward()
        model.zero_grad()
        return kept.highest

    logits = 4 * words  # bytes per token in float32
    in_chunks = peak()
    model.config.loss_chunk = tokens.numel()
    at_once = peak()
    # Three tensors: logits, softmax and gradient.
    assert in_chunks < 3.5 * chunk * logits + 2**20
    assert at_once - in_chunks > 2 * (tokens.numel() - chunk) * logits


def test_training_gives_no_logits_and_evaluation_does() -> None:
    model = language_model()
    assert model.train()(text(), labels=text()).logits is None
    assert model.eval()(text(), labels=text()).logits.shape == (2, 13, WORDS)
    assert model(text(), labels=text(), skip_logits=True).logits is None


def test_the_loss_of_accumulated_batches_is_divided_by_their_tokens() -> None:
    model = language_model().train()
    mean = loss_of(model)
    torch.testing.assert_close(loss_of(model, num_items_in_batch=torch.tensor(48)), mean * 24 / 48)


def test_supervised_columns_add_their_losses() -> None:
    model = language_model(supervised_columns=[0, 1], supervision_weight=0.25).train()
    targets = shifted(text()).flatten()
    outputs = model.model(text(), supervised=True)

    def mean_loss(states: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(states).flatten(0, 1), targets, ignore_index=IGNORED)

    early = sum(mean_loss(states) for states in outputs.hidden_states)
    torch.testing.assert_close(loss_of(model), mean_loss(outputs.last_hidden_state) + 0.25 * early)
    assert len(outputs.hidden_states) == 2


def test_a_supervised_column_reads_nothing_that_later_ones_compute() -> None:
    model = language_model(supervised_columns=[0])
    columns = model.model.columns
    parameters = [parameter for cells in columns.cells[1:] for parameter in cells.parameters()]
    states = model.model(text(), supervised=True).hidden_states[0]
    found = torch.autograd.grad(states.sum(), parameters, allow_unused=True)
    assert all(gradient is None for gradient in found)


def test_supervision_is_for_training_alone() -> None:
    plain, supervised = language_model(), language_model(supervised_columns=[0])
    supervised.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(text(), labels=text()).loss, supervised(text(), labels=text()).loss)


def test_initial_weights_at_the_end_of_a_branch_are_smaller() -> None:
    model = RevColForCausalLM(RevColLMConfig(vocab_size=WORDS, hidden_size=128, columns=2, levels=4))
    spreads = {
        name: torch.cat([weight.flatten() for key, weight in model.named_parameters() if name in key]).std()
        for name in ("q_proj", "o_proj", "down_proj")
    }
    expected = {"q_proj": 0.02, "o_proj": 0.02 / 4, "down_proj": 0.02 / 4}  # 8 blocks of 2 branches
    torch.testing.assert_close(
        spreads, {key: torch.tensor(value) for key, value in expected.items()}, rtol=0.02, atol=0
    )
    gains = [weight for name, weight in model.named_parameters() if ".gain." in name]
    assert len(gains) == 4
    assert all((gain == 1).all() for gain in gains)
