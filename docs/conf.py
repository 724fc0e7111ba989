"""Configuration of the documentation site, which `make docs` builds with Sphinx."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bridge_stg

project = "bridge-stg"
release = version = bridge_stg.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
exclude_patterns = ["conf.py"]

myst_heading_anchors = 5  # links to headings are those of the repository's pages
myst_fence_as_directive = ["mermaid"]
suppress_warnings = ["misc.highlighting_failure"]  # commands with … are no valid program of any language

default_role = "code"  # docstrings put names in single backticks
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"bridge-stg {release}"


def name_files(text: str) -> str:
    """Write links to files that are not part of the site as paths in the repository."""

    def name(link: re.Match[str]) -> str:
        shown, path = link.group("text").strip("`"), link.group("path")
        return f"`{path}`" if path.startswith(shown) or path.endswith(shown) else f"{link.group('text')} (`{path}`)"

    folders = "assets|benchmarks|containers|examples|[A-Z]+(?!\\w)"
    return re.sub(rf"(?<!!)\[(?P<text>[^\]]+)\]\((?:\.\./)?(?P<path>(?:{folders})[^)]*)\)", name, text)


def setup(app: Any) -> None:
    """Apply `name_files` to every page, and to the README that the first page includes."""

    def read(app: Any, page: str, source: list[str]) -> None:
        source[0] = name_files(source[0])

    def include(app: Any, file: Path, page: str, source: list[str]) -> None:
        source[0] = name_files(source[0])

    app.connect("source-read", read)
    app.connect("include-read", include)
