"""What the site does beside mkdocs: pages from the project's root, links to files that are no pages, public names.

A warning logged here fails ``mkdocs build --strict``.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PUBLIC = ("nsc", "nsc.tracking", "nsc_kernels")
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: Any) -> None:
    """Add the pages that lie in the project's root."""
    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return a page whose links, which are right in the repository, are right on the site.

    A file that is no page of the site is named by its path; what does not exist is left for mkdocs to refuse.
    """
    folder = ROOT if page.file.src_uri in FROM_ROOT else ROOT / "docs"
    pages = {ROOT / source: page for page, source in FROM_ROOT.items()}

    def on_site(link: re.Match) -> str:
        text, target, anchor = link[1], (folder / link[2]).resolve(), link[3] or ""
        if not target.exists():
            return link[0]
        if target in pages:
            return f"[{text}]({pages[target]}{anchor})"
        if target.is_relative_to(ROOT / "docs"):
            return f"[{text}]({target.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        path = f"`{target.relative_to(ROOT).as_posix()}`"
        return path if text in (path, path.strip("`")) else f"{text} ({path})"

    return LINK.sub(on_site, markdown)


def on_post_build(config: Any) -> None:
    """Warn of public names without a docstring, and of those that no page shows."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], allow_inspection=False)
    for package in ("nsc", "nsc_kernels"):
        loader.load(package)
    loader.resolve_aliases(implicit=True)
    shown = "".join(file.read_text(encoding="utf-8") for file in Path(config.site_dir).glob("api*.html"))
    for module in PUBLIC:
        for name, item in public(loader.modules_collection[module], module):
            if not item.has_docstring:
                log.warning(f"{name} ({item.relative_filepath}:{item.lineno}) is public and has no docstring")
            elif not any(f'id="{path}"' in shown for path in (name, item.canonical_path)):
                log.warning(f"{name} is public and on no page of the API")


def public(owner: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Public functions and classes, with the methods and properties of the latter, by the names that users import."""
    for name in owner.exports or [name for name, item in owner.members.items() if item.is_public]:
        item = owner.members[name]
        if item.is_module and name in item.members:  # griffe sees the file of an op, which its function hides
            item = item.members[name]
        documented = item.is_function or item.is_class or "property" in item.labels
        if documented and not name.startswith("__"):
            yield f"{path}.{name}", item
            if item.is_class:
                yield from public(item, f"{path}.{name}")
