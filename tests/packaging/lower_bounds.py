"""Print the lower bound of each requirement of the runtime, its extras and its tests, as pip's constraints.

Usage: python tests/packaging/lower_bounds.py 3.10 > bounds.txt
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

EXTRAS = ("cpu", "calibrate", "serve")
TESTS = ("httpx", "openapi-spec-validator", "packaging", "pytest", "pytest-xdist")


def lower_bounds(python: str) -> Iterator[str]:
    """Yield `name==version` of every requirement that applies to a Python version such as 3.10."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tests = [text for text in extras["dev"] if Requirement(text).name in TESTS]
    for text in [*project["dependencies"], *(t for extra in EXTRAS for t in extras[extra]), *tests]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
            yield f"{requirement.name}=={bound}"


if __name__ == "__main__":
    print(*lower_bounds(sys.argv[1]), sep="\n")
