"""Train in two pipeline stages. `torchrun --nproc-per-node 2 examples/engines/with_pipeline.py`"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.data import DataLoader
from workload import ACCUMULATE, MICRO_BATCH, Classifier, Samples, main, optimizer_of, reversible

WORKLOADS = ("columns",)


def mean_loss(scores: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores, labels) / ACCUMULATE


def train(model: nn.Module, samples: Samples, memory: str) -> list[float]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    net = cast(Any, cast(Classifier, reversible(model, memory)).net)
    part = net.columns.split(size, stem=net.stem, head=net.head)[rank]  # the only new line
    stage = PipelineStage(part, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, ACCUMULATE, loss_fn=mean_loss, scale_grads=False)
    optimizer = optimizer_of(part)
    found: list[Tensor] = []
    for batch in DataLoader(samples, batch_size=ACCUMULATE * MICRO_BATCH):
        losses: list[Tensor] = []
        inputs = [batch["x"]] if part.is_first else []
        options = {"target": batch["labels"], "losses": losses} if part.is_last else {}
        schedule.step(*inputs, **options)
        optimizer.step()
        optimizer.zero_grad()
        found.append(sum((loss.detach() for loss in losses), torch.zeros(())))
    total = torch.stack(found)
    dist.broadcast(total, src=size - 1)
    return total.tolist()


if __name__ == "__main__":
    main("pipeline", torch.__version__, train, WORKLOADS)
