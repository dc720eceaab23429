"""Reading checkpoints that others have made: files of `torch.save` and of safetensors. Nothing in them is executed."""

from __future__ import annotations

import argparse
import pickle
import re
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch._weights_only_unpickler as restricted

Allowed: TypeAlias = Callable[..., Any] | tuple[Callable[..., Any], str]
"""A class or function that a pickle may name; with a text, one that is taken where the pickle has this name."""

TEXTS = {
    "missing-file": ("there is no such file", "Check the path"),
    "not-a-file": ("is a folder", "Give a file"),
    "unreadable-file": ("may not be read", "Check its permissions"),
    "damaged-file": ("damaged or cut short", "Use another copy"),
    "wrong-format": ("not a checkpoint", "Give a file of torch.save or safetensors"),
    "unsafe-file": ("refused, it holds more than plain data", "Get the file from its authors"),
    "missing-dependency": ("safetensors is not installed", "pip install safetensors"),
}
"""What is wrong with a file, by the code of the failure, and what helps if the caller knows nothing better."""

_NUMBERS = [np.float32(0), np.float64(0), np.int32(0), np.int64(0)]

RECORDS: tuple[Allowed, ...] = (
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(type(number.dtype) for number in _NUMBERS),
    # NumPy 1 and 2 have these two functions in modules of different names.
    *(
        (value.__reduce__()[0], f"{module}.multiarray.{name}")  # type: ignore[misc]
        for value, name in ((np.zeros(0), "_reconstruct"), (_NUMBERS[0], "scalar"))
        for module in ("numpy.core", "numpy._core")
    ),
)
"""Options as a Namespace, and numbers and arrays of NumPy: what fairseq's checkpoints hold beside tensors."""

# What files of torch.save begin with: a zip, or before torch 1.6 a pickle of this number.
_ZIP, _PICKLE, _LEGACY = b"PK\x03\x04", b"\x80", (0x1950A86A20F9469CFC6C).to_bytes(10, "little")

_allowed: ContextVar[dict[str, Any] | None] = ContextVar("allowed", default=None)
_installing = threading.Lock()


class CheckpointReadError(RuntimeError):
    """A file that cannot be read as a checkpoint.

    Attributes:
        path: of the file.
        code: the kind of failure, a key of `TEXTS`.
        message: what is wrong, without the path.
        hint: what helps, if the caller knows nothing better.
    """

    def __init__(self, path: Path | str, code: str, message: str = ""):
        self.path, self.code = path, code
        text, self.hint = TEXTS[code]
        self.message = message or text
        super().__init__(f"{path}: {self.message}. {self.hint}")

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders
        return CheckpointReadError, (self.path, self.code, self.message)


def read_checkpoint(path: Path | str, allowed: Sequence[Allowed] = (), mmap: bool = False) -> Any:
    """What a checkpoint holds, on the CPU.

    A pickle is read by torch's restricted reader (`weights_only=True`): it builds tensors and plain data, and besides
    them only what `allowed` names. What `torch.serialization.add_safe_globals` has allowed in this process has no
    effect here, and is not changed.

    Args:
        path: a file of `torch.save`, or of safetensors if it ends in `.safetensors`.
        allowed: classes and functions that this file may name.
        mmap: map the file into memory and read tensors when they are used; files of the format before torch 1.6 are
            read whole.

    Raises:
        CheckpointReadError: the file is missing, a folder, not permitted, damaged, not a checkpoint, or it names
            something that is not allowed.
    """
    path, head, message = Path(path), b"", ""
    try:
        if path.is_dir():
            raise IsADirectoryError
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with path.open("rb") as file:
            head = file.read(32)
        return _read_pickle(path, allowed, mmap and head.startswith(_ZIP))
    except CheckpointReadError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        code = "missing-file"
    except IsADirectoryError:
        code = "not-a-file"
    except PermissionError:
        code = "unreadable-file"
    except Exception as error:  # a damaged file may raise anything
        code, message = _diagnosis(error, head)
    # Errors of torch recommend to switch its protection off: they are not chained.
    raise CheckpointReadError(path, code, message) from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointReadError(path, code="missing-dependency") from None
    return load_file(path)


def _read_pickle(path: Path, allowed: Sequence[Allowed], mmap: bool) -> Any:
    _install()
    token = _allowed.set(dict(_named(entry) for entry in allowed))
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    finally:
        _allowed.reset(token)


def _named(entry: Allowed) -> tuple[str, Any]:
    if isinstance(entry, tuple):
        return entry[1], entry[0]
    return f"{entry.__module__}.{entry.__qualname__}", entry


def _install() -> None:
    """Let torch's restricted reader ask for the names of one call, in the thread of this call, before its own list.

    torch has one list for the process, `safe_globals` edits it while other threads read, and on leaving removes what
    they have allowed as well. Here the function that looks the list up gives way to one that answers the same to
    everybody, except during `read_checkpoint` in its own context. Were torch to look elsewhere, nothing more than plain
    data would be read: the change fails on the safe side.
    """
    with _installing:
        lookup = restricted._get_user_allowed_globals
        if getattr(lookup, "is_scoped", False):
            return

        def scoped() -> dict[str, Any]:
            own = _allowed.get()
            return lookup() if own is None else own

        scoped.is_scoped = True  # type: ignore[attr-defined]
        restricted._get_user_allowed_globals = scoped


def _diagnosis(error: Exception, head: bytes) -> tuple[str, str]:
    """The code of a failure, and what is wrong if `TEXTS` is too general.

    Args:
        head: the first 32 bytes of the file, none of one of safetensors.
    """
    # Text may begin with a letter that is an opcode of pickles: what it "names" is nothing.
    is_pickle = isinstance(error, pickle.UnpicklingError) and (head.startswith(_ZIP) or head[:1] == _PICKLE)
    if is_pickle and (named := re.search(r"GLOBAL (\S+)", str(error))):
        return "unsafe-file", f"refused, it names {named[1]}, which is more than plain data"
    if "TorchScript" in str(error):
        return "unsafe-file", "refused, it is a program of TorchScript, which is more than plain data"
    if len(head) < 32 and (head[:4] == _ZIP[: len(head)] or head[:1] == _PICKLE):
        return "damaged-file", ""
    if not head.startswith(_ZIP) and not (head[:1] == _PICKLE and _LEGACY in head):
        return "wrong-format", ""
    code = "unsafe-file" if is_pickle else "damaged-file"
    return code, ""
