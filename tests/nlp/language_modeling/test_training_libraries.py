"""The language model with Hugging Face's Trainer, accelerate, PEFT, and EleutherAI's lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

pytest.importorskip("transformers")

from nlp.language_modeling import RevColForCausalLM
from nlp.language_modeling.text_tokenizers import byte_tokenizer
from tests.support.language_models import language_model, text


class Texts(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = text(1, 13, seed=index)[0]
        return {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens)}


def trained(model: RevColForCausalLM, folder: Path) -> tuple[RevColForCausalLM, list[dict[str, float]]]:
    """Train for two updates of two batches with Hugging Face's Trainer, which uses accelerate."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2, use_cpu=True,
        eval_strategy="steps", eval_steps=2, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts())
    trainer.train()
    return model, trainer.state.log_history


def test_the_trainer_trains_in_exact_as_in_store(tmp_path: Path) -> None:
    stored, log = trained(language_model(memory="store"), tmp_path / "store")
    exact, _ = trained(language_model(memory="exact"), tmp_path / "exact")
    assert all(map(torch.equal, stored.parameters(), exact.parameters()))
    assert not torch.equal(stored.lm_head.weight, language_model().lm_head.weight)
    assert {"loss", "eval_loss"} <= {key for line in log for key in line}


def test_the_trainer_keeps_a_memory_budget(tmp_path: Path) -> None:
    stored, _ = trained(language_model(memory="store"), tmp_path / "store")
    model, _ = trained(language_model(memory={"budget": "exact"}), tmp_path / "budget")
    columns: Any = model.model.columns
    assert columns.budget is None
    assert 0 < len(columns.stored) < len(columns.flat())
    assert all(map(torch.equal, stored.parameters(), model.parameters()))


def test_lm_eval_scores_a_folder_as_the_model_does(tmp_path: Path) -> None:
    """lm-eval is an optional requirement; 0.4.13 passes."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = language_model(vocab_size=257)
    model.save_pretrained(tmp_path)
    scorer = huggingface.HFLM(pretrained=str(tmp_path), device="cpu", batch_size=2)
    pairs = [("To be", " or not"), ("To be, that is", " the question")]
    requests = [instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (score, _), (context, continuation) in zip(scorer.loglikelihood(requests), pairs, strict=True):
        tokens = torch.tensor([tokenizer(context + continuation).input_ids])
        with torch.no_grad():
            likely = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
        assert score == pytest.approx(likely[-len(continuation) :].sum().item(), rel=1e-4)
    request = instance("generate_until", {}, ("To", {"until": ["|"], "max_gen_toks": 5}), 0)
    (generated,) = scorer.generate_until([request])
    assert isinstance(generated, str)


def test_low_rank_adapters_learn_in_exact_as_in_store() -> None:
    peft = pytest.importorskip("peft")
    found = []
    for memory in ("store", "exact"):
        base = language_model(memory=memory)
        options = {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 3, "init_lora_weights": False}
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).train()
        model(input_ids=text(), labels=text()).loss.backward()
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        assert len(trainable) == 9 * 3 * 2
        found.append([weight.grad for weight in trainable])
        tokens = model.eval().generate(input_ids=text(), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert tokens.shape == (2, 16)
    assert all(map(torch.equal, *found))
    assert all(gradient.any() for gradient in found[0])
