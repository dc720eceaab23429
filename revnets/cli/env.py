"""The command `env`: what a bug report says about the environment. No probe of it ends the command."""

from __future__ import annotations

import contextlib
import io
import json as json_format
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from pathlib import Path
from typing import Any

import torch

import revnets
from revnets.config.errors import first_line, printable
from revnets.utils.format import size

PACKAGES = {
    "torch": (),
    "torchvision": (),
    "triton": ("pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"),
    "numpy": (),
    "einops": (),
    "timm": (),
    "transformers": (),
    "accelerate": (),
    "peft": (),
    "safetensors": (),
    "datasets": (),
    "fairseq": ("ve-fairseq",),
    "sentencepiece": (),
    "sacrebleu": (),
    "pydantic": (),
    "typer": (),
}
"""Modules whose versions are reported, and other distributions than that of the same name that contain them."""

GROUPS = ("revnets.commands", "revnets.analyses", "revnets.models")

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET", "TRANSFORMERS_OFFLINE", "PYTHONHASHSEED")
VARIABLES += ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "CUBLAS_WORKSPACE_CONFIG", "ROCR_VISIBLE_DEVICES")
PREFIXES = ("CUDA_", "HIP_", "NCCL_", "GLOO_", "PYTORCH_", "REVNETS_", "TORCH_", "TORCHINDUCTOR_")
SECRET = re.compile("auth|cred|key|pass|secret|token|://[^/]*@", re.IGNORECASE)
"""A variable whose name or value contains this is reported without its value."""

IMPORT_TIMEOUT = 300
"""Seconds after which the import of a package counts as failed."""

_BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")


def print_environment(json: bool, imports: bool) -> None:
    """Print the environment as Markdown tables, or as JSON.

    Args:
        json: Print one JSON object.
        imports: Also import every package, each in its own process, and report the failures.
    """
    found = environment()
    if imports:
        found["imports"] = probed(lambda: import_errors([name for name, text in found["packages"].items() if text]))
    print(json_format.dumps(found, indent=2) if json else markdown(found))


def environment() -> dict[str, Any]:
    """Return the environment as JSON data: sections by name. A probe that fails is replaced by `error: ...`."""
    return {
        "system": {
            "revnets": probed(_revnets),
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "platform": probed(platform.platform),
            "cpu": probed(_cpu),
            "memory": probed(_memory),
        },
        "torch": {
            "version": str(torch.__version__),
            "cuda build": probed(lambda: torch.version.cuda),
            "rocm build": probed(lambda: torch.version.hip),
            "cudnn": probed(torch.backends.cudnn.version),
            "driver": probed(_driver),
            "devices": probed(_devices),
            "distributed backends": probed(_backends),
        },
        "packages": {name: probed(_installed, name, *others) for name, others in PACKAGES.items()},
        "extras": probed(missing_by_extra),
        "entry points": probed(_loads),
        "variables": probed(_variables),
    }


def probed(probe: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a probe, or `error: ...` if it raises."""
    try:
        return probe(*arguments)
    except (Exception, SystemExit) as error:
        return f"error: {_described(error)}"


def _described(error: BaseException) -> str:
    """The class and the first line of an error, without the name of the home directory."""
    return _shareable(f"{type(error).__name__}: {first_line(error)}")


def _shareable(text: str) -> str:
    """A text on one line of at most 300 characters, with `~` for the home directory."""
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = text.replace(home, "~")
    return printable(text if len(text) <= 300 else text[:297] + "...")


def _revnets() -> str:
    """The version, with a note if the installed distribution has another one, is editable or is absent."""
    notes = []
    try:
        installed = distribution("revnets")
        if installed.version != revnets.__version__:
            notes.append(f"metadata of {installed.version}")
        origin = json_format.loads(installed.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            notes.append("editable")
    except PackageNotFoundError:
        notes.append("not installed")
    return revnets.__version__ + (f" ({', '.join(notes)})" if notes else "")


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": os.cpu_count(),
        "usable cores": usable,
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "capability": probed(lambda: torch.backends.cpu.get_cpu_capability()),
    }


def _memory() -> dict[str, int | None]:
    """Bytes of the machine, those available, and the limit of the control group; None where it is unknown."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    available = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    return {
        "total": total,
        "available": 1024 * int(available[1]) if available else None,
        "limit": int(limit) if limit.isdecimal() else None,
    }


def _text(file: str) -> str:
    """The content of a file of the system, or nothing."""
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _driver() -> str | None:
    """The version of NVIDIA's kernel module on Linux."""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _text("/proc/driver/nvidia/version"))
    return match[1] if match else None


def _devices() -> list[Any]:
    """GPUs that torch can use, and other accelerators by name."""
    if torch.cuda.is_available():
        return [probed(_gpu, index) for index in range(torch.cuda.device_count())]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return []
    return [accelerator.type] * torch.accelerator.device_count()


def _gpu(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    capability = f"{found.major}.{found.minor}"
    return {"name": found.name, "memory": found.total_memory, "compute capability": capability}


def _backends() -> list[str]:
    """Backends of torch.distributed that this build of torch contains and can load."""
    if not torch.distributed.is_available():
        return []
    return [name for name in _BACKENDS if getattr(torch.distributed, f"is_{name}_available", bool)()]


def _installed(module: str, *others: str) -> str | None:
    """The version of the distribution with a module, read from its metadata; None if there is none."""
    for name in (module, *others):
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
            return found if name == module else f"{found} ({name})"
    return None


def missing_by_extra() -> dict[str, list[str]]:
    """Return what each extra of the distribution `revnets` lacks: requirements with the installed version, if any."""
    found = distribution("revnets")
    extras = sorted(found.metadata.get_all("Provides-Extra") or [])
    return {extra: sorted(set(_lacking("revnets", extra, set()))) for extra in extras}


def _lacking(name: str, extra: str, seen: set[tuple[str, str]]) -> Iterable[str]:
    """The requirements of an extra of a distribution that are not met, with those of extras that it requires."""
    from packaging.requirements import Requirement

    if (name, extra) in seen:
        return
    seen.add((name, extra))
    for text in distribution(name).requires or []:
        required = Requirement(text)
        if required.marker is None or not required.marker.evaluate({"extra": extra}):
            continue
        if required.marker.evaluate({"extra": ""}):  # a requirement of the distribution itself
            continue
        required.marker = None
        try:
            present = version(required.name)
        except PackageNotFoundError:
            yield str(required)
            continue
        if not required.specifier.contains(present, prereleases=True):
            yield f"{required} ({present} is installed)"
        for inner in required.extras:
            yield from _lacking(required.name, inner, seen)


def _loads() -> list[dict[str, str | None]]:
    """Every entry point of the groups that revnets reads, with the error of its import."""
    found = []
    for group in GROUPS:
        for entry in entry_points(group=group):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                error = probed(lambda entry=entry: entry.load() and None)
            owner = entry.dist.name if entry.dist else None
            found.append(
                {"group": group, "name": entry.name, "target": entry.value, "distribution": owner, "error": error}
            )
    return found


def _variables() -> dict[str, str]:
    """Environment variables that change how torch, CUDA or revnets run; a secret without its value."""
    ours = (name for name in sorted(os.environ) if name in VARIABLES or name.startswith(PREFIXES))
    values = {name: os.environ[name] for name in ours if name != "TORCHINDUCTOR_CACHE_DIR"}  # torch sets that itself
    return {
        name: "(set)" if SECRET.search(name) or SECRET.search(value) else _shareable(value)
        for name, value in values.items()
    }


def import_errors(modules: Sequence[str]) -> dict[str, str | None]:
    """Import each module in its own process; return the last line of its error, or None if it imports."""
    from rich.console import Console

    from revnets.cli.output import tracked

    with tracked(modules, "importing packages", Console(stderr=True)) as items:
        return {name: probed(_import_error, name) for name in items}


def _import_error(module: str) -> str | None:
    command = [sys.executable, "-P", "-W", "ignore", "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"not imported within {IMPORT_TIMEOUT} s"
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    if done.returncode == 0:
        return None
    return _shareable(done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}")


def markdown(found: Mapping[str, Any]) -> str:
    """Return the environment as Markdown tables whose columns are aligned, for a terminal and for an issue."""
    imports = found.get("imports")
    packages = [(name, _cell(text or "not installed")) for name, text in found["packages"].items()]
    if isinstance(imports, Mapping):
        packages = [(*row, _status(imports[row[0]], "yes") if row[0] in imports else "-") for row in packages]
    torch_rows = [(name, _cell(value)) for name, value in found["torch"].items() if name != "devices"]
    tables = [
        _table(("system", "value"), [(name, _cell(value)) for name, value in found["system"].items()]),
        _table(("torch", "value"), [*torch_rows, *_device_rows(found["torch"]["devices"])]),
        _table(("package", "version", "imports")[: len(packages[0])], packages),
        _section(found["extras"], ("extra", "status"), _extra_rows),
        _section(found["entry points"], ("group", "name", "target", "loads"), _entry_rows),
        _section(found["variables"], ("variable", "value"), lambda rows: [(n, _code(v)) for n, v in rows.items()]),
    ]
    return "\n\n".join(tables)


def _section(found: Any, headings: Sequence[str], rows: Callable[[Any], Iterable[Sequence[str]]]) -> str:
    """A table, or its one error."""
    if isinstance(found, str):
        return _table(headings[:1], [(_code(found),)])
    return _table(headings, list(rows(found)) or [("none", *[""] * (len(headings) - 1))])


def _extra_rows(found: Mapping[str, Sequence[str]]) -> Iterable[Sequence[str]]:
    return [(name, f"lacks {', '.join(missing)}" if missing else "complete") for name, missing in found.items()]


def _entry_rows(found: Iterable[Mapping[str, str | None]]) -> Iterable[Sequence[str]]:
    for entry in found:
        owner = "" if entry["distribution"] == "revnets" else f" ({entry['distribution']})"
        yield str(entry["group"]), f"{entry['name']}{owner}", str(entry["target"]), _status(entry["error"], "yes")


def _device_rows(found: Any) -> list[tuple[str, str]]:
    if isinstance(found, list) and found:
        return [(f"device {index}", _cell(device)) for index, device in enumerate(found)]
    return [("devices", _cell(found))]


def _status(error: str | None, good: str) -> str:
    return good if error is None else _code(error)


def _cell(value: Any) -> str:
    """A value as the text of a cell: numbers of bytes with their unit, lists and mappings with commas."""
    if isinstance(value, Mapping):
        known = {name: item for name, item in value.items() if item is not None}
        return ", ".join(f"{name} {size(item) if name in _BYTES else item}" for name, item in known.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    return "none" if value is None else _code(value) if str(value).startswith("error: ") else str(value)


_BYTES = ("total", "available", "limit", "memory")


def _code(text: str) -> str:
    """A text that Markdown shows as it is."""
    return "`" + text.replace("`", "'") + "`"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [tuple(cell.replace("|", "\\|") for cell in row) for row in (headings, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(headings))]
    lines.insert(1, tuple("-" * width for width in widths))
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
