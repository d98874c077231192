"""The documentation as a site, as `make docs` builds it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)(.*)\n", re.MULTILINE)


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a":
            self.links.extend(values[name] for name in ("href",) if name in values)
        else:
            self.loaded.extend(values[name] for name in ("href", "src", "srcset", "data", "poster") if name in values)


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` calls, of the pages in any folder."""
    [recipe] = re.findall(r"^docs: install\n\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = recipe.replace("build/doctrees", f"{target}.doctrees").replace("-c docs", f"-c {ROOT / 'docs'}").split()
    command[-2:] = [str(source), str(target)]
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("myst_parser", reason="the extra `docs`, which `make install` installs, is not here")
    target = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return target


def pages(site: Path) -> Iterator[tuple[Path, Page]]:
    for file in site.rglob("*.html"):
        yield file.resolve(), Page(file)


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    start = {unquote(link).removesuffix(".html") for link in Page(site / "README.html").links}
    listed = {str(each.relative_to(ROOT)).removesuffix(".md") for each in (ROOT / "docs").glob("*.md")}
    assert listed | {"CHANGELOG", "CONTRIBUTING", "benchmarks/RESULTS", "manifests/README"} <= start
    assert 'url=README.html"' in (site / "index.html").read_text()


def test_every_link_inside_leads_to_a_page_and_an_anchor(site: Path) -> None:
    found = dict(pages(site))
    for file, page in found.items():
        for link in [*page.links, *page.loaded]:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            assert target.is_file(), f"{file.name}: {link}"
            assert not address.fragment or address.fragment in found[target].anchors, f"{file.name}: {link}"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """No font, script, style or picture: the site works without the internet."""
    for file, page in pages(site):
        assert not [each for each in page.loaded if re.match(r"\w+:|//", each)], file.name
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(\w+:)?//", style.read_text()), style.name


def test_a_block_is_shown_in_its_language_whatever_its_mark(site: Path) -> None:
    """`bash not-run: REASON` and `python slow` are highlighted as `bash` and `python`, and the mark is not shown."""
    for page in (ROOT / "docs").glob("*.md"):
        told = [language for language, _ in BLOCK.findall(page.read_text())]
        shown = re.findall(r'<div class="highlight-(\w+) notranslate">', (site / f"docs/{page.stem}.html").read_text())
        assert shown == told, page.name
        assert "not-run:" not in (site / f"docs/{page.stem}.html").read_text()


@pytest.mark.usefixtures("site")
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    """Whether to a page, an anchor here or there, a file or a picture; each is named with its line."""
    links = ["[a](gone.md)", "[a](#gone)", "[a](docs/README.md#gone)", "[a](gone.yaml)", "![a](gone.png)"]
    for name in ("README.md", "docs/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n\n".join(["# A page", *links]) if name == "README.md" else "# Another page\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert {int(line) for line in re.findall(r"/README\.md:(\d+): WARNING: .*gone", done.stderr)} == {3, 5, 7, 9, 11}
