"""The documentation site: its navigation names every page, and it builds without warnings; the changelog."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bridge_stg

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_navigation_names_every_page_once() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"```{toctree}\n.*?\n\n(.*?)```", text, re.DOTALL)
    named = [page for tree in trees for page in tree.split()]
    assert sorted(named) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_readme_lists_every_page() -> None:
    linked = set(re.findall(r"^\| \[.+?\]\(docs/(\w+)\.md\)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE))
    assert linked == {page.stem for page in DOCS.glob("*.md")} - {"index"}


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released, _, dev = bridge_stg.__version__.partition(".dev")
    assert headings[0] == "[Unreleased]" if dev else headings[0].startswith(f"[{released}] - ")


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    options = ["-q", "-W", "--keep-going", "-d", tmp_path / "cache"]
    command = [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert 'id="bridge_stg.runtime.Grounder.ground"' in page and "infer_many" in page
