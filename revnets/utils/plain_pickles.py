"""Pickles read as data: numbers, text, containers and tensors, within bounds. A pickle may name only a short list.

`torch.load(weights_only=True)` executes no foreign code either, but it allocates what a file declares: a pickle of 60
bytes can ask for 40 GB. Here the size of everything is compared with the size of the file before it is made.
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
"""Of a tensor, where an axis of length 0 counts as 1."""

MAX_ARGUMENTS = 12
"""Of what a pickle calls; torch passes at most 8."""

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
    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


class Storage(NamedTuple):
    """The memory of tensors, as bytes (uint8, 1-D), and the type of its elements."""

    data: Tensor
    dtype: torch.dtype


class PlainUnpickler(pickle._Unpickler):
    """Reads one pickle of protocol 2, as `torch.save` writes it.

    Args:
        file: where the pickle begins.
        allowance: of the file.
        allowed: what the pickle may name beside tensors and plain data, by its name there.
        storage: returns the memory of a persistent id.
    """

    stack: list[Any]  # this and the next are attributes of the base class
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

    # ------------------------------------------------------------------------------------------------ what is named

    def find_class(self, module: str, name: str) -> Any:
        path = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if path not in self.known:
            shown = path.removeprefix("builtins.") if path.isprintable() and len(path) <= MAX_NAME else "something"
            raise RejectedError(code="unsafe-file", message=f"refused, it names {shown}, which is more than plain data")
        return self.known[path]

    def persistent_load(self, pid: Any) -> Storage:
        if self.storage is None or type(pid) is not tuple or pid[0] != "storage":
            raise RejectedError(
                code="unsafe-file", message="refused, it refers to something else than the memory of tensors"
            )
        _, dtype, key, _, count, *view = pid
        if dtype not in _STORAGES.values() or type(key) not in (str, int) or not is_size(count):
            raise ValueError("a storage is described by other types than those of torch")
        return self.storage(dtype, key, count, *view)

    def load_reduce(self) -> None:
        args, maker = self.stack.pop(), self.stack.pop()
        if id(maker) not in self.makers:
            raise RejectedError(code="unsafe-file", message="refused, it calls something else than what makes tensors")
        if type(args) is not tuple or len(args) > MAX_ARGUMENTS:
            raise TypeError("arguments that are no short tuple")
        self.append(maker(*args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict:  # state_dict() notes versions of modules; what others note is not needed
            if isinstance(state, dict) and isinstance(versions := state.get("_metadata"), dict):
                self.allowance.take(500 * len(versions))
                target._metadata = _versions(versions)  # type: ignore[attr-defined]
        elif type(target) is argparse.Namespace:
            self.allowance.take(100 * len(state))
            if not all(type(name) is str for name in state):
                raise TypeError("an option whose name is no text")
            vars(target).update(state)
        elif isinstance(target, (np.ndarray, np.dtype)):
            fill_array(target, state, self.allowance)
        elif isinstance(target, self.classes) and hasattr(target, "__setstate__"):
            target.__setstate__(state)
        else:
            raise RejectedError(code="unsafe-file", message=f"refused, it sets attributes of a {type(target).__name__}")

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
        pickle.NEWOBJ[0]: load_reduce,  # of a class, which makes the same
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise TypeError("items for something that is no list")
        return self.stack[-1]

    def _mapping(self) -> dict[Any, Any]:
        if type(self.stack[-1]) not in (dict, OrderedDict, Counter):
            raise TypeError("items for something that is no mapping")
        return self.stack[-1]

    # -------------------------------------------------------------------------------------------------- what is made

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = False, *_: Any) -> Tensor:
        return self._tensor_of_type(storage, offset, shape, stride, grad, None, storage.dtype)

    def _tensor_of_type(
        self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> Tensor:
        if type(storage) is not Storage or dtype not in _DTYPES.values() or not is_size(offset):
            raise ValueError("a tensor is described by other types than those of torch")
        shape, stride = self._size(shape), self._size(stride)
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if count else -1
        extent = math.prod(max(size, 1) for size in shape)
        if (last + 1) * dtype.itemsize > storage.data.numel() or extent > MAX_ELEMENTS:
            raise RejectedError(code="damaged-file", message="damaged, a tensor is larger than its data")
        self.allowance.take(count * dtype.itemsize)
        tensor = torch.empty(0, dtype=dtype)
        tensor.set_(storage.data.untyped_storage(), offset if count else 0, shape, stride)
        return tensor.requires_grad_(bool(grad))

    def _parameter(self, data: Tensor, grad: bool = True, *_: Any) -> nn.Parameter:
        if type(data) is not Tensor:
            raise TypeError("a parameter that is no tensor")
        return nn.Parameter(data.detach(), requires_grad=bool(grad))

    def _without_attributes(self, maker: Any, kind: Any, args: Any, state: Any) -> Any:
        if kind not in (Tensor, nn.Parameter) or maker not in (self._tensor, self._tensor_of_type, self._parameter):
            raise RejectedError(code="unsafe-file", message="refused, it holds a tensor of a class of its own")
        return maker(*args)

    def _size(self, sizes: Any) -> torch.Size:
        if not is_shape(sizes):
            raise ValueError("a shape has other entries than sizes")
        return torch.Size(sizes)

    def _device(self, kind: Any, *index: Any) -> torch.device:
        if type(kind) is not str or len(kind) > 32:
            raise ValueError("a device of a strange name")
        return torch.device(kind, *index)

    def _complex(self, real: Any, imag: Any) -> complex:
        if type(real) is not float or type(imag) is not float:
            raise TypeError("a complex number of other parts than floats")
        return complex(real, imag)

    def _ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        if type(pairs) not in (list, tuple):
            raise TypeError("a mapping that is made of no list")
        self.allowance.take(200 * len(pairs))
        return OrderedDict((checked_key(key), value) for key, value in pairs)

    def _counter(self, counts: Any = None) -> Counter[Any]:
        counts = {} if counts is None else counts
        if type(counts) is not dict:
            raise TypeError("counts that are no mapping")
        self.allowance.take(200 * len(counts))
        return Counter(counts)

    def _set(self, items: Any = ()) -> set[Any]:
        if type(items) not in (list, tuple):
            raise TypeError("a set that is made of no list")
        self.allowance.take(200 * len(items))
        return {checked_key(item) for item in items}

    def _encoded(self, text: Any, encoding: Any = "latin1") -> bytes:  # how protocol 2 has bytes
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise ValueError("bytes that are no text in latin1")
        self.allowance.take(len(text))
        return text.encode("latin1")


def _versions(metadata: dict[Any, Any]) -> OrderedDict[str, dict[str, int]]:
    """What `state_dict()` notes: a version for each module."""
    versions = OrderedDict()
    for name, entry in metadata.items():
        if type(name) is str and isinstance(entry, dict) and type(entry.get("version")) is int:
            versions[name] = {"version": entry["version"]}
    return versions
