# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownMemberType=false
"""What the engine needs of PyTorch that has no public name, in one place. Written for torch 2.7 and later."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeTensor",
    "buffers_of",
    "children_of",
    "draw_key",
    "has_values",
    "intercepted_draws",
    "is_compiled",
    "is_graph_kept",
    "is_transformed",
    "may_read_again",
    "parameters_of",
    "raise_compile_limits",
    "running_node",
    "saving_hook",
    "shared_version",
    "storage_key",
    "tree_leaves",
    "tree_map",
    "without_dynamo",
    "without_transforms",
]

P = ParamSpec("P")
T = TypeVar("T")


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers; writing here puts another tensor in place of one."""
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own parameters. Plain tensors are among them under `functional_call`."""
    return cast("dict[str, Tensor | None]", module._parameters)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own submodules."""
    return module._modules


def has_values(tensor: Tensor) -> bool:
    """Is there something to compute with? Fake tensors and those on the meta device have shapes alone."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share their memory. `Tensor.is_set_to` does not know fake tensors."""
    return tensor.untyped_storage()._cdata


def is_transformed() -> bool:
    """Does something else than autograd's backward look at the operations? Export and torch.func know no hooks."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def without_dynamo(function: Callable[P, T]) -> Callable[P, T]:
    """As torch.compiler.disable, but does not import Dynamo, which takes a second, until it runs."""
    return torch._disable_dynamo()(function)


def raise_compile_limits(least: int) -> None:
    """Let Dynamo compile one function at least so many times. It counts by code, which all cells have in common."""
    limits = cast(Any, torch._dynamo).config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(limits, name, max(getattr(limits, name), least))


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """As that of PyTorch, whose helper is a closure that refers to itself: garbage for the collector in every call."""
    kind = _pytree.SUPPORTED_NODES.get(_pytree._get_node_type(tree))
    if kind is None:
        return function(tree)
    children, context = kind.flatten_fn(tree)
    return kind.unflatten_fn([tree_map(function, child) for child in children], context)


def saving_hook() -> object:
    """The hook that packs what is saved now, if there is one."""
    hooks = cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


@contextmanager
def without_transforms() -> Generator[None]:
    """Leave all transforms of `torch.func`, and the older `vmap` of batched gradients, and return to them.

    Hooks on saved tensors, which these transforms refuse, are allowed in the body.
    """
    autograd = cast(Any, torch._C)._autograd
    refusal = autograd._saved_tensors_hooks_get_disabled_error_message()
    with ExitStack() as stack:
        if refusal is not None:
            autograd._saved_tensors_hooks_enable()
            stack.callback(autograd._saved_tensors_hooks_disable, refusal)
        vmap = torch._C._dispatch_key_parse("VmapMode") if hasattr(torch._C, "_dispatch_key_parse") else None
        if vmap is not None and torch._C._dispatch_tls_is_dispatch_key_included(vmap):
            stack.enter_context(torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(vmap)))
        if torch._C._are_functorch_transforms_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        yield


def is_compiled(module: nn.Module) -> bool:
    """Is the module, as `compile()` leaves it or as `torch.compile` returns it, run by Dynamo?"""
    return module._compiled_call_impl is not None or "_torchdynamo_orig_callable" in vars(module)


def running_node() -> torch.autograd.graph.Node | None:
    """The node of the graph whose backward this thread runs, if it runs one."""
    return cast("torch.autograd.graph.Node | None", torch._C._current_autograd_node())


def may_read_again(node: torch.autograd.graph.Node) -> bool:
    """May the node ask for what it saved more than once in its backward?

    A `torch.autograd.Function` may. PyTorch's own nodes do not, and neither does compiled code, which is a Function but
    lets go of what it saved as it goes.
    """
    return isinstance(node, torch.autograd.function.BackwardCFunction) and not hasattr(
        cast(Any, node)._forward_cls, "_aot_id"
    )


def is_graph_kept() -> bool:
    """May a graph be needed again: is this thread outside of a backward, or in one that keeps its graph?"""
    return running_node() is None or bool(cast(Any, torch._C)._autograd._get_current_graph_task_keep_graph())


_Draw = Callable[[Callable[[torch.Generator], Any]], Any]
_draws = threading.local()


@contextmanager
def intercepted_draws(key: Any, draw: _Draw) -> Generator[None]:
    """Let `draw` carry out the random operations of this thread that use the default generator of the CPU.

    They are redirected by the dispatcher, below Python and for no other operation: by a key that PyTorch keeps for
    tests of modes, which this thread alone includes.

    Args:
        key: from `draw_key`.
        draw: called with the operation, which takes the generator to use.
    """
    before = getattr(_draws, "draw", None)
    with torch._C._IncludeDispatchKeyGuard(key):
        _draws.draw = draw
        try:
            yield
        finally:
            _draws.draw = before


_KEY = "TESTING_ONLY_GenericMode"
_RANDOM = (
    "bernoulli bernoulli_ binomial cauchy_ exponential_ geometric_ log_normal_ multinomial native_dropout normal "
    "normal_ poisson rand rand_like randint randint_like randn randn_like random_ randperm rrelu rrelu_ "
    "rrelu_with_noise rrelu_with_noise_ uniform_ _sample_dirichlet _standard_gamma"
)
"""All others, such as `dropout`, call one of these."""

_NEEDED = "_IncludeDispatchKeyGuard _dispatch_key_parse _dispatch_keyset_full_after _len_torch_dispatch_stack"
"""Names in `torch._C`."""

_libraries: list[torch.library.Library] = []  # a registration lasts as long as its library


@cache
def draw_key() -> Any:
    """The dispatch key, once the random operations have kernels there and all others pass it by.

    The first call is for one thread alone. It gives None, and warns, if this version of PyTorch lacks what is needed.
    """
    try:
        return _registered_draws()
    except (AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"PyTorch {torch.__version__} lacks what noting random draws of one thread needs ({reason}); where several "
            "threads draw random numbers at once, gradients may belong to other numbers than the loss",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _registered_draws() -> Any:
    for name in _NEEDED.split():
        getattr(torch._C, name)
    everything, aten = torch.library.Library("_", "IMPL", _KEY), torch.library.Library("aten", "IMPL", _KEY)
    everything.fallback(torch.library.fallthrough_kernel)
    for name in _RANDOM.split():
        packet = getattr(torch.ops.aten, name)
        for operation in (getattr(packet, overload) for overload in packet.overloads()):
            names = [argument.name for argument in operation._schema.arguments]
            place = names.index("generator") if "generator" in names else None
            aten.impl(operation, partial(_intercept, operation, place), with_keyset=True)
    _libraries.extend((everything, aten))
    return torch._C._dispatch_key_parse(_KEY)


def _intercept(operation: Any, place: int | None, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """The kernel of a random operation; its generator is argument number `place`."""
    run = partial(operation.redispatch, keys & torch._C._dispatch_keyset_full_after(draw_key()))
    tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    given = kwargs.get("generator") if place is None or place >= len(args) else args[place]
    draw = getattr(_draws, "draw", None)
    if draw is None or given not in (None, torch.default_generator) or not _is_on_cpu(tensor, kwargs.get("device")):
        return run(*args, **kwargs)
    if place is not None and tensor is not None:

        def call(generator: torch.Generator) -> Any:
            if place < len(args):
                return run(*args[:place], generator, *args[place + 1 :], **kwargs)
            return run(*args, **{**kwargs, "generator": generator})

        return draw(call)
    if not torch._C._len_torch_dispatch_stack():
        return run(*args, **kwargs)  # what it calls is intercepted
    return draw(partial(_with_default, partial(run, *args, **kwargs)))  # what a mode calls is not


def _is_on_cpu(tensor: Tensor | None, device: Any) -> bool:
    """Does the operation draw numbers of the CPU? Tensors of other types carry out operations of their own."""
    if tensor is None:
        return device is None or torch.device(device).type == "cpu"
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)


def _with_default(operation: Callable[[], Any], generator: torch.Generator) -> Any:
    """Run an operation that takes no generator, as if the one given were the default generator."""
    before = torch.get_rng_state()
    try:
        torch.set_rng_state(generator.get_state())
        result = operation()
        generator.set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
    return result


def shared_version() -> Any:
    """Aliases made below autograd, in a dispatch mode, count versions together with their tensor."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)
