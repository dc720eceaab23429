"""Renew tests/slow_tests.txt, the list of the tests that `make fast` skips, from the times of a run.

PYTEST_ADDOPTS=--junitxml=times.xml make test
python -m tests.support.list_slow_tests times.xml
PYTEST_ADDOPTS=--junitxml=times.xml make fast
python -m tests.support.list_slow_tests times.xml --add       # for tests that now set up the fixtures of others
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

FILE = Path(__file__).parents[1] / "slow_tests.txt"
SECONDS = 0.8
"""Tests that take longer with any of their parameters, including fixtures, are slow."""


def slow_tests(times: Path) -> set[str]:
    """Return `path::function` of the slow tests in a JUnit file of pytest."""
    longest: defaultdict[str, float] = defaultdict(float)
    for case in ElementTree.parse(times).iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        name = f"{path}::{case.attrib['name'].split('[')[0]}"
        longest[name] = max(longest[name], float(case.attrib["time"]))
    return {name for name, seconds in longest.items() if seconds > SECONDS}


def read_list() -> set[str]:
    """Return the tests in the list."""
    return set(FILE.read_text(encoding="utf-8").split())


def main() -> None:
    parser = argparse.ArgumentParser(description="Renew the list of slow tests.")
    parser.add_argument("times", type=Path, help="JUnit file of pytest")
    parser.add_argument("--add", action="store_true", help="keep the tests in the list")
    arguments = parser.parse_args()
    found = slow_tests(arguments.times) | (read_list() if arguments.add else set())
    FILE.write_text("".join(f"{name}\n" for name in sorted(found)), encoding="utf-8")
    print(f"wrote {FILE}: {len(found)} tests")


if __name__ == "__main__":
    main()
