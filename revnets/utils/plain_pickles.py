"""Unpickler for plain data: numbers, text, containers and tensors within bounds, and a short list of other names.

`torch.load(weights_only=True)` does not execute foreign code either, but allocates what a file declares: a pickle of
60 bytes can allocate 40 GB. This reader compares all sizes with the size of the file before it allocates memory.
"""

from __future__ import annotations

import argparse
import math
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from revnets.utils.numpy_records import fill_array
from revnets.utils.read_bounds import MAX_NAME, Allowance, RejectedError, checked_key, is_shape, is_size

MAX_ELEMENTS = 2**48
"""Largest number of elements of a tensor. An axis of length 0 counts as 1."""

MAX_ARGUMENTS = 12
"""Largest number of arguments of a call in a pickle. torch passes at most 8."""

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.storage.UntypedStorage": torch.uint8,
}
_DTYPES = {
    str(dtype): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


class File(Protocol):
    """The methods of a file that an unpickler needs."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


class Storage(NamedTuple):
    """The memory of tensors as bytes (uint8, 1-D), and the dtype of its elements."""

    data: Tensor
    dtype: torch.dtype


class PlainUnpickler(pickle._Unpickler):
    """Reads one pickle of protocol 2, as written by `torch.save`.

    Args:
        file: File at the position of the pickle.
        allowance: Memory that the file may still allocate.
        allowed: Objects that the pickle may reference in addition to tensors and plain data, by name in the pickle.
        storage: Function that returns the memory of a persistent id.
    """

    stack: list[Any]  # an attribute of the base class, like the next one
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (
            *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.BINPERSID),
            *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.LONG1),
            *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINUNICODE, pickle.SHORT_BINSTRING),
            *(pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE),
            *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        )
    }

    def __init__(
        self,
        file: File,
        allowance: Allowance,
        allowed: Mapping[str, Any],
        storage: Callable[..., Storage] | None = None,
    ):
        super().__init__(file, encoding="utf-8")  # pyright: ignore[reportArgumentType]
        self.allowance, self.storage = allowance, storage
        self.classes = tuple(kind for kind in allowed.values() if isinstance(kind, type))
        makers: dict[str, Any] = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_type,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
            "torch._tensor._rebuild_from_type_v2": self._without_attributes,
            "torch.Size": self._size,
            "torch.device": self._device,
            "collections.OrderedDict": self._ordered,
            "collections.Counter": self._counter,
            "builtins.set": self._set,
            "builtins.complex": self._complex,
            "_codecs.encode": self._encoded,
        }
        makers |= {name: self._ordered if kind is OrderedDict else kind for name, kind in allowed.items()}
        self.known = {"torch.Tensor": Tensor, "torch.nn.parameter.Parameter": nn.Parameter, **_STORAGES, **_DTYPES}
        self.known |= makers
        self.makers = {id(maker) for maker in makers.values() if callable(maker)}

    # --------------------------------------------------------------------------------------- references and opcodes

    def find_class(self, module: str, name: str) -> Any:
        """Return the object of a reference.

        Raises:
            RejectedError: If the reference is not allowed.
        """
        path = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if path not in self.known:
            shown = path.removeprefix("builtins.") if path.isprintable() and len(path) <= MAX_NAME else "something"
            raise RejectedError(code="unsafe-file", message=f"rejected: it names {shown}, which is not plain data")
        return self.known[path]

    def persistent_load(self, pid: Any) -> Storage:
        """Return the memory of a persistent id."""
        if self.storage is None or type(pid) is not tuple or pid[0] != "storage":
            raise RejectedError(
                code="unsafe-file", message="rejected: it refers to something other than the memory of tensors"
            )
        _, dtype, key, _, count, *view = pid
        if dtype not in _STORAGES.values() or type(key) not in (str, int) or not is_size(count):
            raise ValueError("invalid description of a storage")
        return self.storage(dtype, key, count, *view)

    def load_reduce(self) -> None:
        args, maker = self.stack.pop(), self.stack.pop()
        if id(maker) not in self.makers:
            raise RejectedError(code="unsafe-file", message="rejected: it calls a function that is not allowed")
        if type(args) is not tuple or len(args) > MAX_ARGUMENTS:
            raise TypeError("the arguments of a call are not a short tuple")
        self.append(maker(*args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict:  # state_dict() stores versions of modules there; other attributes are ignored
            if isinstance(state, dict) and isinstance(versions := state.get("_metadata"), dict):
                self.allowance.take(500 * len(versions))
                target._metadata = _versions(versions)  # type: ignore[attr-defined]
        elif type(target) is argparse.Namespace:
            self.allowance.take(100 * len(state))
            if not all(type(name) is str for name in state):
                raise TypeError("the name of an option is not text")
            vars(target).update(state)
        elif isinstance(target, (np.ndarray, np.dtype)):
            fill_array(target, state, self.allowance)
        elif isinstance(target, self.classes) and hasattr(target, "__setstate__"):
            target.__setstate__(state)
        else:
            kind = type(target).__name__
            raise RejectedError(code="unsafe-file", message=f"rejected: it sets attributes of an object of type {kind}")

    def load_append(self) -> None:
        item = self.stack.pop()
        self._list().append(item)

    def load_appends(self) -> None:
        items = self.pop_mark()  # pyright: ignore[reportAttributeAccessIssue]
        self._list().extend(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._mapping()[checked_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()  # pyright: ignore[reportAttributeAccessIssue]
        mapping = self._mapping()
        for key, value in zip(items[::2], items[1::2], strict=True):
            mapping[checked_key(key)] = value

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,  # calls a class, with the same effect
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise TypeError("items for an object that is not a list")
        return self.stack[-1]

    def _mapping(self) -> dict[Any, Any]:
        if type(self.stack[-1]) not in (dict, OrderedDict, Counter):
            raise TypeError("items for an object that is not a mapping")
        return self.stack[-1]

    # ------------------------------------------------------------------------------------- replacements of functions

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = False, *_: Any) -> Tensor:
        return self._tensor_of_type(storage, offset, shape, stride, grad, None, storage.dtype)

    def _tensor_of_type(
        self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> Tensor:
        if type(storage) is not Storage or dtype not in _DTYPES.values() or not is_size(offset):
            raise ValueError("invalid description of a tensor")
        shape, stride = self._size(shape), self._size(stride)
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if count else -1
        extent = math.prod(max(size, 1) for size in shape)
        if (last + 1) * dtype.itemsize > storage.data.numel() or extent > MAX_ELEMENTS:
            raise RejectedError(code="damaged-file", message="damaged: a tensor is larger than its data")
        self.allowance.take(count * dtype.itemsize)
        tensor = torch.empty(0, dtype=dtype)
        tensor.set_(storage.data.untyped_storage(), offset if count else 0, shape, stride)
        return tensor.requires_grad_(bool(grad))

    def _parameter(self, data: Tensor, grad: bool = True, *_: Any) -> nn.Parameter:
        if type(data) is not Tensor:
            raise TypeError("a parameter is not a tensor")
        return nn.Parameter(data.detach(), requires_grad=bool(grad))

    def _without_attributes(self, maker: Any, kind: Any, args: Any, state: Any) -> Any:
        if kind not in (Tensor, nn.Parameter) or maker not in (self._tensor, self._tensor_of_type, self._parameter):
            raise RejectedError(code="unsafe-file", message="rejected: it contains a tensor of a custom class")
        return maker(*args)

    def _size(self, sizes: Any) -> torch.Size:
        if not is_shape(sizes):
            raise ValueError("a shape contains values that are not sizes")
        return torch.Size(sizes)

    def _device(self, kind: Any, *index: Any) -> torch.device:
        if type(kind) is not str or len(kind) > 32:
            raise ValueError("invalid name of a device")
        return torch.device(kind, *index)

    def _complex(self, real: Any, imag: Any) -> complex:
        if type(real) is not float or type(imag) is not float:
            raise TypeError("a part of a complex number is not a float")
        return complex(real, imag)

    def _ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        if type(pairs) not in (list, tuple):
            raise TypeError("the items of a mapping are not a list")
        self.allowance.take(200 * len(pairs))
        return OrderedDict((checked_key(key), value) for key, value in pairs)

    def _counter(self, counts: Any = None) -> Counter[Any]:
        counts = {} if counts is None else counts
        if type(counts) is not dict:
            raise TypeError("counts are not a mapping")
        self.allowance.take(200 * len(counts))
        return Counter(counts)

    def _set(self, items: Any = ()) -> set[Any]:
        if type(items) not in (list, tuple):
            raise TypeError("the items of a set are not a list")
        self.allowance.take(200 * len(items))
        return {checked_key(item) for item in items}

    def _encoded(self, text: Any, encoding: Any = "latin1") -> bytes:  # protocol 2 encodes bytes this way
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise ValueError("bytes are not encoded in latin1")
        self.allowance.take(len(text))
        return text.encode("latin1")


def _versions(metadata: dict[Any, Any]) -> OrderedDict[str, dict[str, int]]:
    """Return the versions of modules in the metadata of a `state_dict()`."""
    versions = OrderedDict()
    for name, entry in metadata.items():
        if type(name) is str and isinstance(entry, dict) and type(entry.get("version")) is int:
            versions[name] = {"version": entry["version"]}
    return versions
