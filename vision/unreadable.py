"""Images that cannot be read: replaced and written down, or a reason to stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vision.errors import DataError


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What happens with images that cannot be read.

    Attributes:
        file: gets a line for each; every process of a run has its own. Workers append to it, so it counts for all.
        policy: `skip` or `stop`.
    """

    file: Path | None = None
    policy: str = "skip"

    def note(self, what: str, error: BaseException | str) -> None:
        """Write one down.

        Raises:
            DataError: the policy is to stop.
        """
        reason = " ".join(str(error).split()) or type(error).__name__
        if self.policy == "stop":
            remedy = "Mend or remove it, or let data.unreadable be skip"
            raise DataError(f"{what}: cannot be read ({reason.rstrip('.')}). {remedy}")
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(f"{what}: {reason}\n")

    def count(self) -> int:
        """How many have been written down so far."""
        if self.file is None or not self.file.exists():
            return 0
        with open(self.file, "rb") as file:
            return sum(1 for _ in file)
