"""Train with plain PyTorch. `python examples/engines/with_torch.py`"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from workload import ACCUMULATE, Samples, main, micro_batches, optimizer_of, reversible

WORKLOADS = ("gpt2", "gpt2-lora", "columns")


def train(model: nn.Module, samples: Samples, memory: str) -> list[float]:
    model = reversible(model, memory)  # the only new line
    optimizer = optimizer_of(model)
    losses: list[Tensor] = []
    for number, batch in enumerate(micro_batches(samples), start=1):
        loss = model(**batch)["loss"] / ACCUMULATE
        loss.backward()
        losses.append(loss.detach())
        if number % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses).view(-1, ACCUMULATE).sum(dim=1).tolist()


if __name__ == "__main__":
    main("torch", torch.__version__, train, WORKLOADS)
