"""make_reversible does not import optional packages."""

from __future__ import annotations

import subprocess
import sys

from tests.support.timeouts import HANG

PROGRAM = """
import sys
import torch
import revnets, revnets.pretrained
layers = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(6, 2, 7), 3, enable_nested_tensor=False)
revnets.make_reversible(layers)(torch.randn(2, 5, 6)).sum().backward()
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"transformers", "accelerate", "peft", "timm", "lightning_fabric", "safetensors"}))
"""


def test_no_optional_package_is_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
