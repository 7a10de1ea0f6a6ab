"""Pages of the site that lie in the project's folder, where GitHub looks for them: README, CONTRIBUTING and others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}


def for_site(text: str) -> str:
    """The page with links as they are from the folder docs."""

    def link(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        from_docs = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        return f"]({PAGES.get(path, from_docs)}{anchor})"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", link, text)


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it knows all files."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=for_site((root / source).read_text())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs for each page: links to files of the project that are no pages keep their text alone."""
    docs = Path(config.docs_dir).resolve()
    folder = docs / Path(page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        return found[1] if target.exists() and docs not in target.parents else found[0]

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#\s]+)\)", link, markdown)
