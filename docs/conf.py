"""The site of the documentation, by Sphinx: ``make docs``. Its pages are the repository's Markdown, as it stands."""

import re
from pathlib import Path

from sphinx.application import Sphinx

import vcf_batch

ROOT = Path(__file__).parents[1]

project = "vcf-batch"
release = vcf_batch.__version__
html_title = f"vcf-batch {release}"

extensions = ["myst_parser"]
myst_heading_anchors = 6
myst_disable_syntax = ["myst_role", "myst_line_comment", "myst_target", "myst_block_break"]  # text on a code host
smartquotes = False  # they make a dash of an option's two

root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "manifests/README.md", "benchmarks/*.md", "vcf_batch/tiny/weights/README.md"]
exclude_patterns = [".*", "build", "dist", "out", "tests"]

html_theme = "alabaster"
html_theme_options = {
    "description": "Image datasets from prompts and reference images, on Ray",
    "body_min_width": "0",
    "code_font_size": "0.8em",
    "fixed_sidebar": True,
    "font_family": "system-ui, sans-serif",
    "font_size": "16px",
    "page_width": "1280px",
    "sidebar_width": "260px",
}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_use_index = False


def _navigation() -> dict[str, list[str]]:
    """Pages by the rows of the table in docs/README.md. A page is in the first row that names it."""
    rows: dict[str, list[str]] = {}
    listed: set[str] = set()
    for caption, cell in re.findall(r"^\| (\w.*?) \| (.*) \|$", (ROOT / "docs/README.md").read_text(), re.MULTILINE):
        links = re.findall(r"\]\(([^)#]+)\.md[^)]*\)", cell)
        pages = dict.fromkeys(str((ROOT / "docs" / link).resolve().relative_to(ROOT)) for link in links)
        rows[caption] = [page for page in pages if page not in listed]
        listed.update(pages)
    rows["the project"] = ["docs/README", "CHANGELOG", "CONTRIBUTING", "SECURITY", "vcf_batch/tiny/weights/README"]
    return rows


def _add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the start page the tables of contents that the theme's sidebar shows, and a code host would not."""
    if docname == root_doc:
        app.env.note_dependency(ROOT / "docs/README.md")
        for caption, pages in _navigation().items():
            listed = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def _add_index(app: Sphinx, exception: Exception | None) -> None:
    """Let the folder's address lead to the start page."""
    if exception is None:
        page = '<!DOCTYPE html>\n<title>vcf-batch</title>\n<meta http-equiv="refresh" content="0; url=README.html">\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _add_index)
