"""Process context of tests: forks of a process that has imported their modules and computed nothing."""

from __future__ import annotations

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(  # modules that are not installed are skipped
    ["torch.distributed.fsdp", "torch.nn.parallel", "vision.training.trainer",
     "tensorboard.summary.writer.record_writer", "tensorboard.compat.proto.event_pb2",
     "sklearn.datasets", "sklearn.model_selection", "matplotlib.backends.backend_agg",
     "fairseq.models", "fairseq.tasks.translation"]
)  # fmt: skip
