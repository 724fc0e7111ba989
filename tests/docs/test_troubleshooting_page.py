"""docs/troubleshooting.md lists every error code of the code, and no other; links in the documentation exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = ("bridge_stg", "calibration", "evaluation", "export", "runtime")
AREAS = (
    "annotation", "bundle", "calibration", "call", "checkpoint", "engine", "evaluation", "export", "host", "index",
    "live", "options", "output", "query", "search", "server", "training", "video",
)  # fmt: skip
CODE = re.compile(rf"({'|'.join(AREAS)})\.[a-z0-9_]+")
NOT_CODES = {
    "engine.json",
    "engine.plan",
    "calibration.html",
    "index.html",
    "index.json",
    "live.events",
    "live.stats",
    "live.watch",
    "search.occurrences",
    "search.options",
}
"""Texts that look like a code but are file or module names."""


def documented() -> set[str]:
    """Return the codes in the first column of the page's tables."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {code for row in rows for code in re.findall(r"`([a-z]+\.[a-z0-9_]+)`", row.split(" | ")[0])}


def raised() -> set[str]:
    """Return the string constants of the code that are error codes."""
    files = {file.resolve() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if CODE.fullmatch(text)} - NOT_CODES


def test_every_code_is_documented() -> None:
    codes = raised()
    assert len(codes) > 100 and not codes - documented()


def test_every_documented_code_exists() -> None:
    assert not documented() - raised()


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, heading = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in anchors(linked), f"{page.name} links to {target}, which has no such heading"


def test_architecture_names_existing_files() -> None:
    rows = re.findall(r"^\| .+ \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.MULTILINE)
    paths = [path for row in rows for path in re.findall(r"`([a-z_0-9./]+)`", row)]
    assert len(paths) > 25 and not [path for path in paths if not (ROOT / path).exists()]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
