"""Import of classes and functions by path (`package.module:name`), also from directories of the user if trusted."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from revnets.config.errors import PartError, SpecError, nearest

ROOT = Path(__file__).resolve().parents[2]
"""Directory in which the packages of this project are installed."""

PACKAGES = ("revnets", "vision", "revnets_nlp" if (ROOT / "revnets_nlp").is_dir() else "nlp")
"""Packages of this project. A wheel installs `nlp` as `revnets_nlp`."""

ALLOW = "If you trust its authors, allow it: --trust, trust=True in Python, REVNETS_TRUST=1 with fairseq"
"""Hint for a configuration that must be trusted."""


def imported(kind: str, name: str, folders: Sequence[Path] = (), trust: bool = True) -> Callable[..., Any]:
    """Import the class or function `package.module:name`.

    Args:
        kind: Name of the object in errors, such as `block`.
        name: Import path.
        folders: Directories searched before `sys.path`, except for modules of this project.
        trust: Whether any module may be imported. If False, only classes that this project defines are returned, and
            other modules are not searched for.

    Returns:
        The class or function.

    Raises:
        PartError: If it does not exist, its module cannot be imported, or it is not trusted.
    """
    module_name, _, attribute = name.partition(":")
    is_own = is_in_project(module_name)
    if not (trust or is_own):
        raise _not_trusted(kind, name)
    if is_own:
        folders = ()  # a package there could shadow one that the module imports
    try:
        with importable(*folders):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(kind, name, error) from error  # the module exists, but not what it imports
        raise PartError(
            f'{kind} "{name}": there is no module {error.name}',
            "Check the spelling. It must be in the directory of the file, in the working directory or on PYTHONPATH",
            code="missing-module",
        ) from error
    except (Exception, SystemExit) as error:  # a module of the user may raise anything
        raise _failed(kind, name, error) from error
    _check_place(kind, name, module, folders)
    factory = getattr(module, attribute, None)
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if factory is None:
        raise PartError(
            f'{kind} "{name}": module {module_name} has no "{attribute}"',
            nearest(attribute, public, "It has") if public else "It has no classes",
            code="unknown-component",
        )
    if not callable(factory):
        raise PartError(
            f'{kind} "{name}": {attribute} is of type {type(factory).__name__}, not a class',
            nearest(attribute, public, "Classes and functions of the module are") if public else "Name a class",
            code="invalid-component",
        )
    if not (trust or is_in_project(getattr(factory, "__module__", None) or "")):
        raise _not_trusted(kind, name)  # a module of this project imports it but does not define it
    return factory


def is_in_project(module_name: str) -> bool:
    """Whether a module belongs to this project, not to another package of the same name. Imports nothing."""
    package = module_name.partition(".")[0]
    if package not in PACKAGES:
        return False
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec in sys.modules
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == ROOT / package


def foreign_file(source: str, key: str) -> SpecError:
    """Return the error for an untrusted configuration that names another file at `key`."""
    return SpecError(source, key, "the key names another file, which is not trusted", ALLOW, code="not-trusted")


@contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Context manager in which modules in these directories can be imported, also by each other."""
    added = [str(folder) for folder in dict.fromkeys(folders) if str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _not_trusted(kind: str, name: str) -> PartError:
    problem = f'{kind} "{name}" is neither registered nor a class of this project, so it is not trusted'
    return PartError(problem, ALLOW, code="not-trusted")


def _failed(kind: str, name: str, error: BaseException) -> PartError:
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f" in {Path(lines[-1].filename).name}, line {lines[-1].lineno}" if len(lines) > 1 else ""
    return PartError(
        f'{kind} "{name}": importing the module fails with {type(error).__name__}: {error}{where}',
        "Fix the module so that it can be imported",
        code="import-failed",
    )


def _check_place(kind: str, name: str, module: ModuleType, folders: Sequence[Path]) -> None:
    """Check that the imported module is the one in `folders`, not another one of the same name that is loaded."""
    top = module.__name__.partition(".")[0]
    loaded = getattr(sys.modules.get(top), "__file__", None)
    for folder in folders:
        for file in (folder / top / "__init__.py", folder / f"{top}.py"):
            if file.exists():
                if loaded is None or Path(loaded).resolve() != file.resolve():
                    raise PartError(
                        f'{kind} "{name}": another module {top} is already loaded ({loaded or "built in"})',
                        f"Rename {file}",
                        code="name-clash",
                    )
                return
