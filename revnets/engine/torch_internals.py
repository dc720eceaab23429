# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownMemberType=false
"""All private PyTorch APIs that the engine uses, for torch 2.8 and later."""

from __future__ import annotations

import sys
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
    "fsdp_casts",
    "has_autocast",
    "has_values",
    "intercepted_draws",
    "is_compiled",
    "is_graph_kept",
    "is_transformed",
    "may_read_again",
    "modules_of",
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
    """Return the module's own buffers. Writing to the dictionary replaces a buffer."""
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own parameters. Under `functional_call` some are plain tensors."""
    return cast("dict[str, Tensor | None]", module._parameters)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's own submodules."""
    return module._modules


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Like `module.modules()`, but faster, without names. Not cached, because modules may change between passes."""
    seen = {module: None}
    for parent in (modules := [module]):
        for child in children_of(parent).values():
            if child is not None and child not in seen:
                seen[child] = None
                modules.append(child)
    return modules


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor holds values, unlike fake tensors and tensors on the meta device."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def storage_key(tensor: Tensor) -> int:
    """Return a key that is equal for tensors sharing memory. `Tensor.is_set_to` does not support fake tensors."""
    return tensor.untyped_storage()._cdata


def is_transformed() -> bool:
    """Whether export, tracing or torch.func is active, which do not support hooks on saved tensors."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def without_dynamo(function: Callable[P, T]) -> Callable[P, T]:
    """Like torch.compiler.disable, but imports Dynamo, which takes a second, only when the function runs."""
    return torch._disable_dynamo()(function)


def raise_compile_limits(least: int) -> None:
    """Let Dynamo compile one function at least `least` times. It counts per code object, which cells share."""
    limits = cast(Any, torch._dynamo).config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(limits, name, max(getattr(limits, name), least))


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Like `tree_map` of PyTorch, but without its self-referential closure, which the collector must free."""
    kind = _pytree.SUPPORTED_NODES.get(_pytree._get_node_type(tree))
    if kind is None:
        return function(tree)
    children, context = kind.flatten_fn(tree)
    return kind.unflatten_fn([tree_map(function, child) for child in children], context)


def saving_hook() -> object:
    """Return the pack hook for saved tensors that is active now, or None."""
    hooks = cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


_AUTOCAST = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta")}
"""Whether the most common device types have autocast. Dynamo cannot trace the question in PyTorch 2.8."""


def has_autocast(kind: str) -> bool:
    """Whether a device type has autocast; some, such as "meta", have none."""
    return _AUTOCAST[kind] if kind in _AUTOCAST else torch.amp.is_autocast_available(kind)


@contextmanager
def without_transforms() -> Generator[None]:
    """Suspend all transforms of `torch.func` and the legacy `vmap` of batched gradients.

    The body may use hooks on saved tensors, which these transforms disable.
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
    """Whether Dynamo runs the module, after `module.compile()` or as the result of `torch.compile`."""
    return module._compiled_call_impl is not None or "_torchdynamo_orig_callable" in vars(module)


def running_node() -> torch.autograd.graph.Node | None:
    """Return the node of the graph whose backward this thread runs, or None."""
    return cast("torch.autograd.graph.Node | None", torch._C._current_autograd_node())


def may_read_again(node: torch.autograd.graph.Node) -> bool:
    """Whether the node may read its saved tensors more than once in its backward.

    A `torch.autograd.Function` may. Built-in nodes do not, and neither does compiled code, which is a Function but
    frees its saved tensors on first use.
    """
    return isinstance(node, torch.autograd.function.BackwardCFunction) and not hasattr(
        cast(Any, node)._forward_cls, "_aot_id"
    )


def is_graph_kept() -> bool:
    """Whether a graph may be needed again: no backward runs in this thread, or one that retains the graph."""
    return running_node() is None or bool(cast(Any, torch._C)._autograd._get_current_graph_task_keep_graph())


_Draw = Callable[[Callable[[torch.Generator], Any]], Any]
_draws = threading.local()


@contextmanager
def intercepted_draws(key: Any, draw: _Draw) -> Generator[None]:
    """Let `draw` execute the random operations of this thread that use the default generator of the CPU.

    The dispatcher redirects these operations and no others, through a dispatch key that PyTorch reserves for tests and
    that only this thread includes.

    Args:
        key: From `draw_key`.
        draw: Called with the operation, which takes the generator to use.
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
"""Other random operations, such as `dropout`, call one of these."""

_NEEDED = "_IncludeDispatchKeyGuard _dispatch_key_parse _dispatch_keyset_full_after _len_torch_dispatch_stack"
"""Names in `torch._C`."""

_libraries: list[torch.library.Library] = []  # a registration lasts as long as its library


@cache
def draw_key() -> Any:
    """Register kernels for the random operations at the dispatch key, and return the key.

    The first call is not thread-safe. Returns None, with a warning, if this version of PyTorch lacks a private API.
    """
    try:
        return _registered_draws()
    except (AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"PyTorch {torch.__version__} does not support recording the random numbers of a single thread ({reason}). "
            "If several threads draw random numbers at once, gradients may use other numbers than the loss",
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
    """Run the kernel of a random operation whose generator is argument number `place`."""
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
        return run(*args, **kwargs)  # the operations that it calls are intercepted
    return draw(partial(_with_default, partial(run, *args, **kwargs)))  # inside a dispatch mode they are not


def _is_on_cpu(tensor: Tensor | None, device: Any) -> bool:
    """Whether the operation draws numbers on the CPU. Tensor subclasses run their own operations."""
    if tensor is None:
        return device is None or torch.device(device).type == "cpu"
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)


def _with_default(operation: Callable[[], Any], generator: torch.Generator) -> Any:
    """Run an operation that takes no generator with `generator` as the default one."""
    before = torch.get_rng_state()
    try:
        torch.set_rng_state(generator.get_state())
        result = operation()
        generator.set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
    return result


def shared_version() -> Any:
    """Return a guard under which aliases created in a dispatch mode share the version counter of their tensor."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)


@contextmanager
def fsdp_casts(modules: list[nn.Module]) -> Generator[None]:
    """Cast inputs and outputs of these modules as their `MixedPrecisionPolicy` does in forward.

    Up to PyTorch 2.12, FSDP2 omits these casts while backward recomputes a module. Of modules that are sharded as a
    group (`fully_shard([...])`), it casts the inputs of the first and the output of the last.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    if fsdp is None or hasattr(fsdp.FSDPState, "_cast_forward_inputs"):
        yield
        return
    with ExitStack() as stack:
        for module in modules:
            if (state := fsdp._get_module_fsdp_state(module)) is None:
                continue
            policy = state._mp_policy
            if policy.cast_forward_inputs and policy.param_dtype and module is state._modules[0]:
                hook = partial(_cast_inputs, partial(fsdp._cast_fp_tensor, policy.param_dtype))
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if policy.output_dtype and module is state._modules[-1]:
                hook = partial(_cast_output, partial(fsdp._cast_fp_tensor, policy.output_dtype))
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def _cast_inputs(convert: Callable[[Any], Any], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tree_map(convert, args), tree_map(convert, kwargs)


def _cast_output(convert: Callable[[Any], Any], module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map(convert, output)
