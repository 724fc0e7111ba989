"""docs/troubleshooting.md against the code: every message that it quotes is one that the code can write."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = ("bridge_stg", "calibration", "evaluation", "export", "runtime")
GAP = "…"


def quoted() -> list[str]:
    """The messages: first cells of the tables, and what stands in backticks with a gap in the text."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| `(.+?)`(?: \(\d+\))? \| ", line):
            found.append(match[1])
        elif not line.startswith("|"):
            found += [text for text in re.findall(r"`([^`]+)`", line) if GAP in text and len(text) > 20]
    return found


@cache
def messages() -> list[str]:
    """Every text of the code, what is filled in as a gap."""
    found = []
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else GAP for p in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def written_by(text: str) -> list[str]:
    """The code's texts that hold the parts of a quotation in its order."""
    parts = [re.escape(part) for part in text.split(GAP) if part.strip(" .:;,")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return [message for message in messages() if pattern.search(message)]


def test_something_is_quoted() -> None:
    assert len(quoted()) > 50 and not written_by("the fingerprint does fit …: all is well")


@pytest.mark.parametrize("text", quoted())
def test_the_code_writes_it(text: str) -> None:
    assert written_by(text), f"no text of the code reads {text!r}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")) + [ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, heading = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in anchors(there), f"{page.name} links to {target}, which has no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
