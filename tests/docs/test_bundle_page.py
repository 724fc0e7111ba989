"""docs/bundle.md against the code: its tables are the dataclasses' fields, and its program reads a real bundle."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bridge_stg.runtime.backends.tensorrt import engine_cache
from bridge_stg.runtime.bundle import manifest, spec
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.parity import golden

PAGE = Path(__file__).parents[2] / "docs" / "bundle.md"
DESCRIBED = {
    kind.__name__: kind
    for kind in (
        manifest.Manifest, manifest.GraphSpec, manifest.TensorSpec, manifest.CacheSpec, manifest.FileEntry,
        spec.ModelSpec, spec.VisionSpec, spec.LanguageSpec, spec.FramesSpec, spec.PromptSpec, spec.SpanSpec,
        spec.TextSpec, spec.KnowsSpec,
        golden.Tolerance, engine_cache.EngineEntry, engine_cache.EngineKey,
    )
} | {"case.json": golden.CaseFile}  # fmt: skip
Row = tuple[str, str, str]
"""Name, type and default of a field."""


def described() -> dict[str, list[Row]]:
    """The tables of the page by the heading above them."""
    found: dict[str, list[Row]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#+ `(.+)`$", line):
            heading = match[1]
        elif match := re.match(r"\| `(\w+)` \| ([^|]+) \| ((?:\\\||[^|])*)\| .+ \|$", line):
            if heading in DESCRIBED:
                found.setdefault(heading, []).append((match[1], match[2], match[3].strip().replace("\\|", "|")))
        elif line.startswith("## "):
            heading = ""
    return found


def in_words(kind: Any) -> str:
    """A field's annotation as the page writes it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else in_words(part) for part in args)
    if origin is tuple:
        return f"list of {in_words(args[0])}" if args[-1] is ... else f"list [{', '.join(map(in_words, args))}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "object" if args[1] is Any else f"object of {in_words(args[1])}"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}.get(kind) or kind.__name__


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return ""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "its defaults" if dataclasses.is_dataclass(value) else f"`{json.dumps(value, ensure_ascii=False)}`"


def test_every_described_class_has_its_table() -> None:
    assert set(described()) == set(DESCRIBED)


@pytest.mark.parametrize("name", list(DESCRIBED))
def test_fields_are_those_of_the_class(name: str) -> None:
    kind = DESCRIBED[name]
    hints = typing.get_type_hints(kind)
    expected = [(field.name, in_words(hints[field.name]), default_of(field)) for field in dataclasses.fields(kind)]
    assert sorted(described()[name]) == sorted(expected)


def test_fields_are_those_of_a_real_bundle(exported: Bundle) -> None:
    tables = {name: {row[0] for row in rows} for name, rows in described().items()}
    values = json.loads((exported.path / "manifest.json").read_text())
    graph = values["graphs"]["language_model"]["standard"]
    assert set(values) == tables["Manifest"] and set(values["spec"]) == tables["ModelSpec"]
    assert set(graph) == tables["GraphSpec"] and set(graph["cache"]) == tables["CacheSpec"]
    assert set(graph["inputs"][0]) == tables["TensorSpec"] and set(graph["data"][0]) == tables["FileEntry"]
    for section, fields in values["spec"].items():
        if isinstance(fields, dict):
            assert set(fields) == tables[f"{section.capitalize()}Spec"]
    tops = {path.name for path in exported.path.iterdir()}
    assert tops <= {"manifest.json", "tokenizer.json", "graphs", "golden", "engines", "reports"}


def test_the_page_names_the_version_and_every_variant(exported: Bundle) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"`schema_version` is {manifest.SCHEMA_VERSION}." in text
    for graph in exported.manifest.all_graphs():
        assert f"| `{graph.variant}` | opset {graph.opset}" in text


def test_its_program_reads_a_bundle_without_the_package(exported: Bundle, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    blocked = "import sys\nfor name in ('bridge_stg', 'torch', 'onnx'): sys.modules[name] = None\n"
    (tmp_path / "read.py").write_text(blocked + program, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "read.py"), str(exported.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    differences = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(differences) == 2 and max(differences) < 1e-3
