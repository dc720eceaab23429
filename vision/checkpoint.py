"""Checkpoints: written in full or not at all, safe to load, and enough to go on as if nothing had happened."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from revnets.files import link, remove_leftovers, replacing

FORMAT = 1
"""Version of the layout. A reader refuses those that it does not know."""

KEYS = ("format", "versions", "config", "progress", "model", "ema", "optimizer", "scaler", "rng")
"""What a checkpoint holds."""


_STEP = re.compile(r"step-(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used: names the file, what is wrong, and what to do."""

    def __init__(self, path: Path | str, problem: str, remedy: str):
        super().__init__(f"{path}: {problem}. {remedy}")


class Checkpoints:
    """The checkpoints of one run: the last `keep` of them as `step-N.pt`, and `best.pt`.

    Args:
        folder: where they lie.
        keep: how many of the last stay. `best.pt` is a second name for one of them or for one that has gone.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def all(self) -> list[Path]:
        """The last checkpoints, oldest first."""
        return sorted((path for path in self.folder.glob("step-*.pt") if _STEP.fullmatch(path.name)), key=step_of)

    def save(self, state: Mapping[str, Any], best: bool = False) -> Path:
        """Write a checkpoint, then drop those beyond `keep`.

        Args:
            state: with the keys `KEYS`; `state["progress"]["step"]` gives the name.
            best: let `best.pt` be this one.

        Raises:
            CheckpointError: it could not be written. Those before it are untouched.
        """
        path = self.folder / f"step-{state['progress']['step']:07d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            with replacing(path) as file:
                torch.save(dict(state), file)
            if best:
                self.name_best(path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            before = self.all()
            kept = f"{before[-1]} is intact" if before else "there is none before it"
            raise CheckpointError(
                path,
                f"cannot be written ({_first_line(error)}); {kept}",
                "Free some space, then go on with resume=auto",
            ) from error
        for old in self.all()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def name_best(self, path: Path) -> None:
        """Let `best.pt` be this checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        link(path, self.best)


def step_of(path: Path) -> int:
    """The number of updates that the name of a checkpoint tells; -1 if it tells none."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint into the memory of the CPU. Nothing in it is executed.

    Raises:
        CheckpointError: no such file, no access, truncated, not one of ours, or it holds more than plain data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(path, "there is no such file", "Check the path") from None
    except IsADirectoryError:
        raise CheckpointError(path, "this is a folder", "Give a .pt file inside of it") from None
    except PermissionError:
        raise CheckpointError(path, "may not be read", "Check its permissions") from None
    except pickle.UnpicklingError:  # its text recommends to execute the file
        raise CheckpointError(
            path, "not a checkpoint, or it holds more than plain data", "Use a file that `revnets train` wrote"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError):
        raise CheckpointError(path, "damaged or cut short", "Use an older checkpoint") from None
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise CheckpointError(
            path,
            f"not a checkpoint of a training run: {', '.join(missing)} missing",
            "Use a file that `revnets train` wrote",
        )
    if state["format"] != FORMAT:
        raise CheckpointError(path, f"layout {state['format']}, but this version reads {FORMAT}", "Use its own version")
    return state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a model.

    Raises:
        CheckpointError: they are those of another model; says where the two part.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            difference = f"it lacks {name}"
        elif weights[name].shape != tensor.shape:
            difference = f"{name} has the shape {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
        else:
            continue
        raise CheckpointError(path, f"of another model: {difference}", "Use its own configuration, or another output")
    if extra := sorted(set(weights) - set(own)):
        raise CheckpointError(
            path, f"of another model: it also has {extra[0]}", "Use its own configuration, or another output"
        )
    model.load_state_dict(weights)


def rng_state() -> dict[str, Any]:
    """The state of all generators that training draws from, as plain data."""
    name, words, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
        "python": (version, torch.tensor(internal), gauss),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put all generators where `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    import platform

    import timm

    import revnets

    return {
        "revnets": revnets.__version__,
        "torch": str(torch.__version__),  # it is a str with a class of its own, which a safe load refuses
        "timm": timm.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
