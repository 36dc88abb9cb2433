"""A hook of mkdocs: builds the site from files that also read well in the repository.

    mkdocs build --strict

README.md is the first page. A file or folder outside docs/ that a page links to becomes a page of the site, so every
link leads somewhere without a network. The API reference has one page for each room of the package.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2", re.MULTILINE | re.DOTALL)
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml"}
COPIED = {".png", ".svg"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the menu: the pages of the API reference, one for each room."""
    config.nav = [*(config.nav or []), {"API": ["api/index.md", *(f"api/{room}.md" for room in rooms())]}]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/: README, linked files and folders of the repository, API reference."""
    for source in _linked(list(PAGES) + [f"docs/{file.src_uri}" for file in files.documentation_pages()]):
        if files.get_file_from_path(site_path(source)) is None:
            files.append(_file(config, source))
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=_api_page(room)))
    files.append(File.generated(config, "api/index.md", content=_api_index()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page, which are relative to its file in the repository, to pages of the site."""
    origins = {site_path(source): source for source in PAGES}
    here = page.file.src_uri
    origin = origins.get(here, here.removeprefix("repository/").removesuffix("index.md"))
    if here not in origins and not here.startswith("repository/"):
        origin = f"docs/{here}"
    return "".join(
        part if FENCED.match(part) else LINK.sub(lambda match: _moved(match, origin, here), part)
        for part in _parts(markdown)
    )


def rooms() -> list[str]:
    """Return the rooms of the package that have something to import: its folders, by name."""
    return sorted(path.parent.name for path in (ROOT / "megatron_hdpo").glob("*/__init__.py"))


def targets(source: str, markdown: str) -> Iterator[tuple[str, str]]:
    """Yield the path in the repository, and the anchor, of each relative link outside of fenced code."""
    for part in _parts(markdown):
        if not FENCED.match(part):
            for path, anchor in LINK.findall(part):
                yield resolve(source, path), anchor


def resolve(source: str, link: str) -> str:
    """Return the path in the repository to which a link in the file `source` leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def site_path(source: str) -> str:
    """Return the path below the site's sources of a file or folder of the repository."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    if (ROOT / source).is_dir():
        return f"repository/{source}/index.md"
    if PurePosixPath(source).suffix in {".md", *COPIED}:
        return f"repository/{source}"
    return f"repository/{source}.md"


def _parts(markdown: str) -> list[str]:
    """Cut a page into fenced blocks of code, which stay as they are, and the text between them."""
    parts, end = [], 0
    for block in FENCED.finditer(markdown):
        parts += [markdown[end : block.start()], block.group()]
        end = block.end()
    return [*parts, markdown[end:]]


def _moved(match: re.Match[str], origin: str, here: str) -> str:
    path, anchor = match.groups()
    if here.startswith("api/") or not (ROOT / resolve(origin, path)).exists():
        return match.group()  # mkdocs itself says what is wrong
    return posixpath.relpath(site_path(resolve(origin, path)), posixpath.dirname(here) or ".") + (anchor or "")


def _linked(sources: list[str]) -> Iterator[str]:
    """Yield the given files, and what they link to, directly or through other files."""
    seen = set(sources)
    while sources:
        source = sources.pop()
        yield source
        for target in _leads_to(source):
            if target not in seen and (ROOT / target).exists():
                seen.add(target)
                sources.append(target)


def _leads_to(source: str) -> list[str]:
    path = ROOT / source
    if path.is_dir():
        return [f"{source}/{child.name}" for child in _children(path) if child.is_file()]
    if path.suffix != ".md":
        return []
    return [target for target, _ in targets(source, path.read_text(encoding="utf-8"))]


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith((".", "__pycache__")))


def _file(config: MkDocsConfig, source: str) -> File:
    """Return the file of the site for a file or folder of the repository."""
    path, target = ROOT / source, site_path(source)
    if path.suffix in {".md", *COPIED}:
        return File.generated(config, target, abs_src_path=str(path))
    if path.is_dir():
        lines = [
            f"- [{child.name}]({child.name})" if child.is_file() else f"- {child.name}/" for child in _children(path)
        ]
        return File.generated(config, target, content="\n".join([f"# {source}", "", *lines]))
    code = path.read_text(encoding="utf-8")
    block = f"````{LANGUAGES.get(path.suffix, 'text')}\n{code.rstrip()}\n````\n"
    return File.generated(config, target, content=f"# {source}\n\n{block}")


def _api_index() -> str:
    rows = [f"- [`megatron_hdpo.{room}`]({room}.md)" for room in rooms()]
    return "\n".join(["# API reference", "", "One page for each room; made from the docstrings.", "", *rows])


def _api_page(room: str) -> str:
    return f"# {room}\n\n::: megatron_hdpo.{room}\n"
