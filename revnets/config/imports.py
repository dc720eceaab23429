"""Classes and functions by their import path `package.module:name`, from folders of the user."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from revnets.config.errors import nearest


class PartError(ValueError):
    """A name that refers to no component. `remedy` says what to do, `code` is the kind of error."""

    def __init__(self, problem: str, remedy: str, code: str):
        super().__init__(f"{problem}. {remedy}")
        self.problem, self.remedy, self.code = problem, remedy, code


def imported(kind: str, name: str, folders: Sequence[Path] = ()) -> Callable[..., Any]:
    """The class or function `package.module:name`.

    Args:
        kind: what errors call it.
        folders: searched before `sys.path`.

    Raises:
        PartError: there is none, or its module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    try:
        with importable(*folders):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(kind, name, error) from error  # the module is there, but not what it imports
        raise PartError(
            f'{kind} "{name}": there is no module {error.name}',
            "Check its spelling, and that it lies beside the file, in the working directory or on PYTHONPATH",
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
    return factory


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
