"""Classes and functions by their import path `package.module:name`, from folders of the user if they are trusted."""

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
"""The folder in which the packages of this project are installed."""

PACKAGES = ("revnets", "vision", "revnets_nlp" if (ROOT / "revnets_nlp").is_dir() else "nlp")
"""Packages of this project; a wheel installs `nlp` as `revnets_nlp`."""

ALLOW = "If you trust its authors, allow it: --trust, trust=True in Python, REVNETS_TRUST=1 with fairseq"
"""What to do about a configuration that is not trusted and needs to be."""


def imported(kind: str, name: str, folders: Sequence[Path] = (), trust: bool = True) -> Callable[..., Any]:
    """The class or function `package.module:name`.

    Args:
        kind: what errors call it.
        folders: searched before `sys.path`, except for the modules of this project.
        trust: may any module be imported? Otherwise only classes that this project defines are given, and the module
            of another name is not even looked for.

    Raises:
        PartError: there is none, its module cannot be imported, or it is not trusted.
    """
    module_name, _, attribute = name.partition(":")
    is_own = is_in_project(module_name)
    if not (trust or is_own):
        raise _not_trusted(kind, name)
    if is_own:
        folders = ()  # in which another package might have the name of one that the module imports
    try:
        with importable(*folders):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(kind, name, error) from error  # the module is there, but not what it imports
        raise PartError(
            f'{kind} "{name}": there is no module {error.name}',
            "Check its spelling, and that it is in the folder of the file, in the working directory or on PYTHONPATH",
            code="missing-module",
        ) from error
    except (Exception, SystemExit) as error:  # whatever a user's module raises while it is imported
        raise _failed(kind, name, error) from error
    _check_place(kind, name, module, folders)
    factory = getattr(module, attribute, None)
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if factory is None:
        raise PartError(
            f'{kind} "{name}": module {module_name} has no "{attribute}"',
            nearest(attribute, public, "It has") if public else "It has no classes at all",
            code="unknown-component",
        )
    if not callable(factory):
        raise PartError(
            f'{kind} "{name}": {attribute} is of type {type(factory).__name__}, not a class',
            nearest(attribute, public, "Classes and functions of the module are") if public else "Name a class",
            code="invalid-component",
        )
    if not (trust or is_in_project(getattr(factory, "__module__", None) or "")):
        raise _not_trusted(kind, name)  # a module of this project has only imported it
    return factory


def is_in_project(module_name: str) -> bool:
    """Does a module belong to this project, and not to another package of the same name? Nothing is imported."""
    package = module_name.partition(".")[0]
    if package not in PACKAGES:
        return False
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module that was put into sys.modules by hand
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == ROOT / package


def foreign_file(source: str, key: str) -> SpecError:
    """The error for a configuration that is not trusted and names another file at `key`."""
    return SpecError(source, key, "it names another file, which is not trusted", ALLOW, code="not-trusted")


@contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Let modules that lie in these folders be imported, also by each other."""
    added = [str(folder) for folder in dict.fromkeys(folders) if str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _not_trusted(kind: str, name: str) -> PartError:
    problem = f'{kind} "{name}" is neither registered nor a class of this project, and code of others is not trusted'
    return PartError(problem, ALLOW, code="not-trusted")


def _failed(kind: str, name: str, error: BaseException) -> PartError:
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f" in {Path(lines[-1].filename).name}, line {lines[-1].lineno}" if len(lines) > 1 else ""
    return PartError(
        f'{kind} "{name}": importing the module fails with {type(error).__name__}: {error}{where}',
        "Make `import` of it work first",
        code="import-failed",
    )


def _check_place(kind: str, name: str, module: ModuleType, folders: Sequence[Path]) -> None:
    """A module of that name beside the file must be the one that was imported, not another that came earlier."""
    top = module.__name__.partition(".")[0]
    loaded = getattr(sys.modules.get(top), "__file__", None)
    for folder in folders:
        for file in (folder / top / "__init__.py", folder / f"{top}.py"):
            if file.exists():
                if loaded is None or Path(loaded).resolve() != file.resolve():
                    raise PartError(
                        f'{kind} "{name}": another module {top} is loaded already ({loaded or "built in"})',
                        f"Rename {file}",
                        code="name-clash",
                    )
                return
