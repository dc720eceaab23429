"""Plugin of pytest: skip test files whose imports need a package of an extra that is not installed."""

from __future__ import annotations

import re
from collections.abc import Generator

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
    """Report a file as skipped if a package of an extra is missing, instead of as failed."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        missing = re.findall(r"No module named '(\w+)", str(report.longrepr))
        if missing and missing[-1] in OPTIONAL:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f"Skipped: {missing[-1]} is not installed")
    return report
