"""Hook of mkdocs: show each notebook of docs/notebooks as a page.

Notebooks are stored without outputs. `mkdocs build` executes them and shows what they print and draw. `mkdocs serve`
and builds with NOTEBOOKS=skip in the environment show their cells only, which is faster.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_executes = False


def on_startup(*, command: str, dirty: bool) -> None:
    """Execute notebooks only where the site is built."""
    global _executes
    _executes = command != "serve" and os.environ.get("NOTEBOOKS") != "skip"


def on_files(files: Any, *, config: Any) -> Any:
    """Add a page for each notebook."""
    root = Path(config.config_file_path).parent
    for path in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        content = "\n\n".join(page(path, root))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def page(path: Path, root: Path) -> Iterator[str]:
    """The cells of a notebook as Markdown: text, code blocks, and outputs if it is executed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    if _executes:
        from nbclient import NotebookClient

        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(root)}}).execute()
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            yield f"```python\n{cell.source}\n```"
            if text := "".join(each.text for each in cell.outputs if each.get("name") == "stdout"):
                yield _block(text)
            yield from (shown(each) for each in cell.outputs if "data" in each)
        else:
            yield cell.source
        if number == 0:
            yield f"[Download the notebook]({path.name}){{ .md-button }}"


def shown(output: Any) -> str:
    """A result or a figure as Markdown."""
    if "image/png" in output.data:
        encoded = re.sub(r"\s", "", output.data["image/png"])
        return f"![Figure](data:image/png;base64,{encoded})"
    return _block(output.data["text/plain"])


def _block(text: str) -> str:
    return f'```text title="Output"\n{text.rstrip()}\n```'
