"""Train in two processes with accelerate. `torchrun --nproc-per-node 2 examples/engines/with_accelerate.py`"""

from __future__ import annotations

import accelerate
from accelerate import Accelerator
from torch import nn
from workload import Samples, main, micro_batches, optimizer_of, reversible

WORKLOADS = ("gpt2", "gpt2-lora", "columns")


def train(model: nn.Module, samples: Samples, memory: str) -> list[float]:
    accelerator = Accelerator(cpu=True)
    model = reversible(model, memory)  # the only new line
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), micro_batches(samples))
    losses: list[float] = []
    for batch in loader:  # every second micro-batch, per process
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


if __name__ == "__main__":
    main("accelerate", accelerate.__version__, train, WORKLOADS)
