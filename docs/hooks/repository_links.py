"""Hook of mkdocs: show root files of the repository as pages, and resolve links to files outside of docs/.

Pages link to files of the repository by relative paths, which work in a checkout and on GitHub. On the site, links to
the files of `ROOT_PAGES` lead to their pages, and other links to the repository at `repo_url`.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks.repository_links")

ROOT_PAGES = {
    "CHANGELOG.md": "development/changelog.md",
    "CODE_OF_CONDUCT.md": "development/code-of-conduct.md",
    "CONTRIBUTING.md": "development/contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "development/security.md",
}
"""Root files and the pages that show them. The landing page is written for the site and stands for the README."""

LINK = re.compile(r"(?<=\]\()(?!\w+:|#|<)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", flags=re.MULTILINE | re.DOTALL)


def on_files(files: Any, *, config: Any) -> Any:
    """Add a page for each root file of `ROOT_PAGES` that docs/ does not have."""
    root = Path(config.config_file_path).parent
    for name, page in ROOT_PAGES.items():
        if files.get_file_from_path(page) is None:
            content = (root / name).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=resolved(content, root, Path(), page, config.repo_url)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Resolve the links of a page that lead out of docs/."""
    if page.file.abs_src_path is None or page.file.generated_by:
        return markdown
    root = Path(config.config_file_path).parent
    folder = Path("docs") / posixpath.dirname(page.file.src_uri)
    return resolved(markdown, root, folder, page.file.src_uri, config.repo_url)


def resolved(markdown: str, root: Path, folder: Path, page: str, repository: str) -> str:
    """Replace links to files outside of docs/.

    Args:
        markdown: the text of a file.
        root: the directory of the repository.
        folder: the directory of the file, relative to `root`.
        page: the page that shows the file, relative to docs/.
        repository: the address of the repository.

    Returns:
        The text with links for the site. Links in code blocks stay as they are.
    """

    def replace(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match["path"])).as_posix()
        anchor = match["anchor"] or ""
        if target in ROOT_PAGES:
            target = f"docs/{ROOT_PAGES[target]}"
        if target.startswith("docs/notebooks/"):
            target = str(Path(target).with_suffix(".md"))  # the page that shows the notebook
        if target.startswith("docs/"):
            return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".") + anchor
        if not (root / target).exists():
            log.warning(f"{page}: link to {match['path']}, which does not exist")
        kind = "tree" if (root / target).is_dir() else "blob"
        return f"{repository}/{kind}/main/{target}{anchor}"

    return _outside_of_code(markdown, lambda text: LINK.sub(replace, text))


def _outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the text between fenced code blocks."""
    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [change(markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*pieces, change(markdown[end:])])
