"""Where the processes of tests come from: forks of one that has imported what they need, and computed nothing."""

from __future__ import annotations

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(  # what is not installed is passed over
    ["torch.distributed.fsdp", "torch.nn.parallel", "vision.training.trainer",
     "tensorboard.summary.writer.record_writer", "tensorboard.compat.proto.event_pb2",
     "sklearn.datasets", "sklearn.model_selection", "matplotlib.backends.backend_agg",
     "fairseq.models", "fairseq.tasks.translation"]
)  # fmt: skip
