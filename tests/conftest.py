"""One thread, for bit-for-bit comparisons, and the same Hypothesis examples in every run."""

from __future__ import annotations

import ast
import gc
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for child processes, because workers share the cores

import torch
from hypothesis import HealthCheck, settings

from tests.support.list_slow_tests import read_list

pytest_plugins = ["tests.support.components", "tests.support.optional_packages"]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton, so that its kernels run on the CPU

settings.register_profile(
    "default",
    deadline=None,  # the first call of a kernel is slow, and the machine may be busy
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("more", parent=settings.get_profile("default"), derandomize=False, max_examples=500)
settings.load_profile("default")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule files with module fixtures first and each on one worker, and other tests one by one."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def shares(file: str) -> bool:
        """Whether a file defines a module fixture. The scheduling process does not import tests."""
        tree = ast.parse((config.rootpath / file).read_bytes())
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        scopes = (keyword.value for call in calls for keyword in call.keywords if keyword.arg == "scope")
        return any(isinstance(scope, ast.Constant) and scope.value == "module" for scope in scopes)

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if shares(file) else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in `slow_tests.txt`."""
    slow = read_list()
    for item in items:
        if item.nodeid.split("[")[0] in slow:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, which otherwise takes 0.3 s before each memory measurement.

    It also runs less often. With the default thresholds it takes 6 % of all CPU time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def own_modules(tmp_path: Path) -> Iterator[Path]:
    """A directory for modules of a test. They are forgotten afterward, so that names can be reused."""
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/ instead of comparing with it")
