"""Time after which a process of a test counts as hanging, far beyond what a busy machine needs."""

from __future__ import annotations

HANG = 1500
"""Seconds, below the limit of a test in pyproject.toml, so that the test reports which process hangs."""
