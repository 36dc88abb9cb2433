"""Every link of the documents leads to a file or a heading that is there, in the repository and on the site."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(#[^)\s]*)?\)")


def links(page: Path) -> list[tuple[str, str]]:
    """Return path and anchor of every link in a page that is not to another host."""
    return LINK.findall(re.sub("`[^`\n]*`", "", FENCED.sub("", page.read_text())))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings that a repository's viewer and mkdocs make alike."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    viewer = {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
    site = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip()) for heading in plain}
    return viewer & site


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    wrong = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            wrong.append(path)
        elif anchor and anchor[1:] not in anchors(target):
            wrong.append(path + anchor)
    assert not wrong, f"{page.name} has links that lead nowhere: {wrong}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_page_is_in_the_menu_of_the_site_and_linked_from_another(page):
    assert page.name in (ROOT / "mkdocs.yml").read_text()
    others = [other for other in PAGES if other != page]
    assert any((other.parent / path).resolve() == page for other in others for path, _ in links(other) if path)


def test_the_first_page_asks_no_other_host_for_a_picture():
    assert not re.findall(r"!\[[^]]*\]\(https?:|<img", (ROOT / "README.md").read_text())


def test_faults_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`: 3\n\n[a](other.md#x) [b](https://a.b/c) `[c](d.md)`\n\n```\n[e](f.md)\n# no\n```\n")
    assert links(page) == [("other.md", "#x")]
    assert anchors(page) == {"one-two-3"}


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="optional: pip install 'megatron-hdpo[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "megatron_hdpo" in (tmp_path / "index.html").read_text()
    assert "advantages_T" in (tmp_path / "api" / "objectives.html").read_text()
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html") if page.name != "404.html"}
    foreign = r'<(?:script|img|link)[^>]+(?:src|href)="https?://'
    assert not [page.name for page, text in pages.items() if re.search(foreign, text)]
    assert not [f"{page.relative_to(tmp_path)}: {link}" for page, text in pages.items() for link in _dead(page, text)]


def _dead(page: Path, text: str) -> list[str]:
    """Return the links and pictures of a built page that lead to no file of the site."""
    found = re.findall(r'<(?:a|img)[^>]+(?:src|href)="(?!https?:|mailto:|#)([^"#]+)', text)
    return [link for link in found if not (page.parent / unquote(link)).exists()]
