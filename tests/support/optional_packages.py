"""Plugin of pytest: skip files and tests that fail because a package of an extra is not installed.

That the library works without extras is tested by tests/packaging/smoke_test.py.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import pytest

OPTIONAL = {
    *("timm", "torchvision", "safetensors", "scipy", "sklearn", "tensorboard", "einops", "PIL"),  # vision
    *("datasets", "webdataset", "pyarrow", "imagehash", "ray", "faster_coco_eval", "pycocotools"),
    *("transformers", "accelerate", "peft", "tokenizers"),  # hf, lm
    *("fairseq", "fairseq_cli", "sacrebleu", "sacremoses", "subword_nmt", "sentencepiece", "regex"),  # nlp
    *("nbclient", "nbformat", "mkdocs"),  # docs
}
"""Import names of the packages that extras add."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Report a file that cannot be imported as skipped."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        _skip(report, collector.path)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report a failing test as skipped if its error names a missing package."""
    report = yield
    if report.failed:
        _skip(report, item.path)
    return report


def _skip(report: pytest.CollectReport | pytest.TestReport, path: Path) -> None:
    named = re.findall(r"No module named '(\w+)|\b(\w+) is not installed", str(report.longrepr))
    missing = [name for pair in named for name in pair if name in OPTIONAL and find_spec(name) is None]
    if missing:
        report.outcome = "skipped"
        report.longrepr = (str(path), 1, f"Skipped: {missing[-1]} is not installed")
