"""Every reader reports damaged weight files with a one-line error that names the file, in bounded memory."""

from __future__ import annotations

import json
import sys

from tests.support import forked_programs

COUNT = 200
"""Number of files of each kind, with fixed seeds."""

KINDS = {"run", "legacy", "official", "fairseq", "safetensors", "shards"}


def test_damaged_files_of_every_kind(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.read_damaged_weights", str(tmp_path), str(COUNT)]
    done = forked_programs.run(command)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["kind"] for entry in found} == KINDS
    assert [entry["wrong"] for entry in found] == [[]] * len(KINDS)
    for entry in found:
        assert sum(entry["outcomes"].values()) == COUNT
        assert entry["outcomes"]["read"] < 2 * COUNT / 3  # otherwise nothing was damaged; bits of a tensor may differ
