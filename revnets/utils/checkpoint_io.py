"""Safe reading of untrusted checkpoints: files of `torch.save` and safetensors, without executing code in them."""

from __future__ import annotations

import argparse
import errno
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

Allowed: TypeAlias = Callable[..., Any] | tuple[Callable[..., Any], str] | str
"""A class or function that a pickle may reference; with a text, the object that replaces the reference of this name.
A text alone is a name of NumPy, which a function of `revnets.utils.numpy_records` replaces."""

TEXTS = {
    "missing-file": ("there is no such file", "Check the path"),
    "not-a-file": ("is a directory", "Give a file"),
    "unreadable-file": ("permission denied", "Check its permissions"),
    "damaged-file": ("damaged or cut short", "Use another copy"),
    "wrong-format": ("not a checkpoint", "Give a file of torch.save or safetensors"),
    "unsafe-file": ("rejected: it contains more than plain data", "Get the file from its authors"),
    "missing-dependency": ("safetensors is not installed", "pip install safetensors"),
}
"""Problem and default hint by error code."""

RECORDS: tuple[Allowed, ...] = (
    argparse.Namespace,
    *("numpy.ndarray", "numpy.dtype"),
    # NumPy 1 and 2 have these two functions in modules of different names.
    *("numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"),
    *("numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"),
)
"""What fairseq checkpoints contain in addition to tensors: options in a Namespace, numbers and arrays of NumPy."""


class CheckpointReadError(RuntimeError):
    """Raised for a file that cannot be read as a checkpoint.

    Attributes:
        path: Path of the file.
        code: Kind of error, a key of `TEXTS`.
        message: What is wrong, without the path.
        hint: Default hint how to fix it.
    """

    def __init__(self, path: Path | str, code: str, message: str = ""):
        self.path, self.code = path, code
        text, self.hint = TEXTS[code]
        self.message = message or text
        super().__init__(f"{path}: {self.message}. {self.hint}")

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes send errors as pickles
        return CheckpointReadError, (self.path, self.code, self.message)


def read_checkpoint(path: Path | str, allowed: Sequence[Allowed] = (), mmap: bool = False) -> Any:
    """Read the content of a checkpoint on the CPU.

    The reader of pickles builds only tensors, plain data and what `allowed` lists.
    `torch.serialization.add_safe_globals` has no effect on it. Tensors must be strided. Sparse, quantized and nested
    tensors are rejected. Sizes are compared with the size of the file before memory is allocated. Containers must
    neither be cyclic nor deeply nested.

    Args:
        path: File of `torch.save`, or of safetensors if it ends in `.safetensors`.
        allowed: Classes and functions that the file may reference. They must be safe to call with any arguments.
        mmap: Whether to map the file into memory and read tensors on first use. Files from before torch 1.6 are read
            completely. If False, checksums of tensors are verified.

    Returns:
        The content, such as a dict of tensors.

    Raises:
        CheckpointReadError: If the file is missing, not a file, not accessible, damaged, not a checkpoint, or contains
            more than plain data and `allowed`.
    """
    from revnets.utils.read_bounds import RejectedError

    path, message = Path(path), ""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # reading a pipe would block
            raise RejectedError(code="not-a-file", message="" if stat.S_ISDIR(mode) else "is not a regular file")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with path.open("rb") as file:
            head = file.read(32)
        return _read_torch_file(path, head, allowed, mmap)
    except CheckpointReadError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        code = "missing-file"
    except PermissionError:
        code = "unreadable-file"
    except Exception as error:  # a damaged file may raise anything
        code, message = _diagnosis(error)
    raise CheckpointReadError(path, code, message) from None  # errors of the readers describe only their internals


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointReadError(path, code="missing-dependency") from None
    from revnets.utils.read_bounds import require_bounded

    content = load_file(path)
    require_bounded(content)
    return content


def _read_torch_file(path: Path, head: bytes, allowed: Sequence[Allowed], mmap: bool) -> Any:
    from revnets.utils.read_bounds import RejectedError
    from revnets.utils.torch_files import LEGACY, PICKLE, ZIP, read_legacy, read_zip

    names = dict(_named(entry) for entry in allowed)
    if head.startswith(ZIP):
        return read_zip(path, names, mmap)
    if head[:1] == PICKLE and LEGACY in head:
        return read_legacy(path, names)
    is_cut = len(head) < 32 and (head[:4] == ZIP[: len(head)] or head[:1] == PICKLE)
    raise RejectedError("damaged-file" if is_cut else "wrong-format", "")


def _named(entry: Allowed) -> tuple[str, Any]:
    if isinstance(entry, str):
        from revnets.utils.numpy_records import MAKERS

        return entry, MAKERS[entry.rpartition(".")[2]]
    if isinstance(entry, tuple):
        return entry[1], entry[0]
    return f"{entry.__module__}.{entry.__qualname__}", entry


def _diagnosis(error: Exception) -> tuple[str, str]:
    """Return the code of an error, and a message if the one in `TEXTS` is too general."""
    from revnets.utils.read_bounds import RejectedError

    if isinstance(error, RejectedError):
        return error.code, error.message
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE):
        return "unreadable-file", f"cannot be read ({error.strerror})"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "unreadable-file", "there is not enough memory to read it"
    return "damaged-file", ""
