"""Reports of suspects: a table, a Parquet file of all pairs, and a list of keys to exclude from training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from revnets.utils.atomic_files import replacing
from vision.near_duplicates.suspects import Suspect

SHOWN = 12
"""Pairs in the table."""


def suspects_table(suspects: Sequence[Suspect]) -> Table:
    """A table of the most certain pairs."""
    table = Table(title=f"{len(suspects)} suspected near-duplicates", title_justify="left")
    for heading in ("image", "against"):
        table.add_column(heading, overflow="fold")
    for heading in ("label distance", "bits of 256", "correlation", "cosine"):
        table.add_column(heading, justify="right")
    for suspect in suspects[:SHOWN]:
        bits = "" if suspect.bits is None else str(suspect.bits)
        scores = (suspect.correlation, suspect.cosine)
        texts = ("" if score is None else f"{score:.3f}" for score in scores)
        table.add_row(suspect.key, suspect.against, f"{suspect.distance:.3f}", bits, *texts)
    if len(suspects) > SHOWN:
        table.caption = f"and {len(suspects) - SHOWN} more"
    return table


def write_suspects(suspects: Sequence[Suspect], path: Path) -> Path:
    """Write all pairs as Parquet, and next to it a list of the images' keys. Either works as `exclude` of a run.

    Returns:
        The path of the list of keys, which can be edited by hand.

    Raises:
        OSError: If a file cannot be written, for lack of space or permission. Its `filename` is the path.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"distance": pa.float32(), "bits": pa.int16(), "correlation": pa.float32(), "cosine": pa.float32()}
    fields = [(name, kinds.get(name, pa.string())) for name in Suspect._fields]
    table = pa.Table.from_pylist([suspect._asdict() for suspect in suspects], pa.schema(fields))
    with replacing(path) as file:
        pq.write_table(table, file)
    keys = path.with_suffix(".txt")
    with replacing(keys, "w") as file:
        file.writelines(f"{key}\n" for key in sorted({suspect.key for suspect in suspects}))
    return keys
