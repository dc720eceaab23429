"""Train with the `Trainer` of transformers, and with PEFT adapters. `python examples/engines/with_trainer.py`"""

from __future__ import annotations

import tempfile

import transformers
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from workload import ACCUMULATE, LEARNING_RATE, MICRO_BATCH, Samples, main, reversible

WORKLOADS = ("gpt2", "gpt2-lora")


def train(model: nn.Module, samples: Samples, memory: str) -> list[float]:
    model = reversible(model, memory)  # the only new line
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=ACCUMULATE,
            num_train_epochs=1, train_sampling_strategy="sequential", learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch", max_grad_norm=0.0,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=samples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main("trainer", transformers.__version__, train, WORKLOADS)
