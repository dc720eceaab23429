"""Launcher variables determine the distributed context, or a one-line error names the wrong variable."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.support import forked_programs
from tests.support.errors import raises_error
from vision.distributed import context
from vision.distributed.context import World, joined, world_of

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, World()),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": " "}, World()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World()),  # a single process needs no address
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}, World(0, 1, 3)),
        ({"RANK": "0"}, World()),
        ({"WORLD_SIZE": "1"}, World()),
        ({"LOCAL_RANK": "2"}, World()),
        (PLACE, World()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **PLACE}, World(3, 4, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", **PLACE}, World(1, 2)),
        # a shell or a batch script inside of an allocation, which nothing has started several times
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, World()),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, World()),
        ({"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2", **PLACE}, World(6, 8, 2)),
        ({"WORLD_SIZE": "1", "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8"}, World()),  # explicitly a single process
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **PLACE},
            World(1, 2, 1),
        ),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, World()),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", **PLACE}, World(1, 2, 1)),
    ],
)
def test_distributed_contexts_of_launchers(variables, world):
    assert world_of(variables) == world


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", **PLACE}, "RANK"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK"),
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x", **PLACE}, "LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, "MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, "MASTER_PORT": "0"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, "MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, "MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR"),
        ({"SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK"),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "MASTER_ADDR"),
    ],
)
def test_invalid_launcher_variables_are_refused(variables, key):
    with raises_error(code="invalid-environment", key=key, source="environment"):
        world_of(variables)


def test_a_rank_beyond_the_gpus_of_the_machine(monkeypatch):
    monkeypatch.setattr(context.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(context.torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", **PLACE}.items():
        monkeypatch.setenv(name, value)
    with raises_error(code="invalid-environment", key="LOCAL_RANK", names=["3", "2"]), joined("cuda"):
        pass


SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3", **PLACE}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}


@pytest.fixture
def gpus(monkeypatch):
    """Makes as many GPUs visible as a test asks for, and returns the list of those that the process takes."""
    chosen = []
    monkeypatch.setattr(context.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(context.torch.cuda, "set_device", chosen.append)
    for name in ("init_process_group", "destroy_process_group", "barrier"):
        monkeypatch.setattr(context.dist, name, lambda *_, **__: None)

    def visible(count: int, **variables: str) -> list[int]:
        monkeypatch.setattr(context.torch.cuda, "device_count", lambda: count)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return chosen

    return visible


@pytest.mark.parametrize("variables", [SRUN, {**SRUN, **BY_HAND}])
@pytest.mark.parametrize(("count", "device"), [(1, 0), (4, 3)])
def test_a_task_of_srun_uses_its_only_visible_gpu(gpus, variables, count, device):
    chosen = gpus(count, **variables)
    with joined("cuda") as world:
        assert (world.rank, world.size, world.local_rank) == (3, 4, device)
    assert chosen == [device]


@pytest.mark.parametrize(
    ("count", "variables"),
    [(2, SRUN), (1, {**BY_HAND, **PLACE}), (1, {**SRUN, **BY_HAND, "SLURM_LOCALID": "0"})],
)
def test_a_process_without_its_own_gpu_is_refused(gpus, count, variables):
    """Too few for the tasks of srun; torchrun alone; a torchrun that is the only task of srun on its machine."""
    gpus(count, **variables)
    with raises_error(code="invalid-environment", key="LOCAL_RANK", names=["3", str(count)]), joined("cuda"):
        pass


def train(tmp_path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["digits", f"output={tmp_path / 'run'}", "epochs=1", "batch_size=700", "model.columns=2", "device=cpu"]
    command = [sys.executable, "-m", "revnets", "train", *words]
    return forked_programs.run(command, env={**os.environ, **variables})


def test_a_port_in_use_is_reported_on_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = train(tmp_path, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert (
        f"error: environment: MASTER_PORT: process 0 of 2 cannot connect to the others at 127.0.0.1:{port}"
        in done.stderr
    )
