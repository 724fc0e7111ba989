"""List what `make gpu-test` checks, and whether this machine can run it; needs only Python.

Usage: python benchmarks/gpu/check.py [--wheels DIR]. Lists every test with the marker `gpu` and the benchmark; exits
with 0 if the machine has a GPU, otherwise prints what is missing and exits with 2.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


from bridge_stg.runtime.host.machine import Machine, machine  # noqa: E402

BENCHMARK = (
    "benchmarks/gpu/stages.py: seconds per stage and parity at every boundary, for every backend of this machine"
)


def gpu_tests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file::test, description) of every test with the marker `gpu`, on the test, its class or its module."""
    for file in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        whole = any(isinstance(node, ast.Assign) and _names(node.targets) & {"pytestmark"} and _marks(node.value)
                    for node in tree.body)  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(map(_marks, node.decorator_list)):
                yield from ((f"{file.name}::{test.name}", _words(test)) for test in _tests(node.body))
        for test in _tests(tree.body):
            if whole or any(map(_marks, test.decorator_list)):
                yield f"{file.name}::{test.name}", _words(test)


def _tests(body: Sequence[ast.stmt]) -> list[ast.FunctionDef]:
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def _names(targets: Sequence[ast.expr]) -> set[str]:
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _marks(node: ast.AST) -> bool:
    """Return whether an expression contains `….mark.gpu`."""
    return any(
        isinstance(part, ast.Attribute) and part.attr == "gpu" and getattr(part.value, "attr", "") == "mark"
        for part in ast.walk(node)
    )


def _words(test: ast.FunctionDef) -> str:
    return (ast.get_docstring(test) or test.name.removeprefix("test_").replace("_", " ")).splitlines()[0]


def missing(found: Machine, wheels: Path | None) -> list[str]:
    """Return what the tests need and this machine lacks."""
    lacks = []
    if not found.devices:
        lacks.append(f"an NVIDIA GPU with its driver: {found.device_problem}")
    if wheels is not None and not list(wheels.glob("*.whl")):
        lacks.append(
            f"wheels in WHEELS={wheels}: no .whl file found. Build them on a machine with a network and the same "
            f"Python and processor: pip wheel -w {wheels} -c constraints.txt '.[dev,tensorrt]' setuptools"
        )
    return lacks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, help="folder to install from instead of an index")
    options = parser.parse_args(arguments)
    print("make gpu-test checks on a machine with an NVIDIA GPU:")
    for name, words in gpu_tests(ROOT / "tests"):
        print(f"  {name}: {words}")
    print(f"  {BENCHMARK}")
    found = machine()
    lacks = missing(found, options.wheels)
    for item in lacks:
        print(f"missing: {item}", file=sys.stderr)
    if lacks:
        print("Nothing was checked. `python cli.py doctor` says more about this machine.", file=sys.stderr)
        return 2
    print("here: " + ", ".join(f"{device.name} (SM {device.sm})" for device in found.devices))
    return 0


if __name__ == "__main__":
    sys.exit(main())
