"""Manual decisions of a calibration: blocks in float, methods, smoothing strengths. Read from and written to YAML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bridge_stg.calibration.options import METHODS
from bridge_stg.calibration.recipes import graph_of
from bridge_stg.export.graph.blocks import block_of
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.parse import parse_yaml_file


@dataclass(frozen=True)
class Overrides:
    """Decisions that take precedence over what is measured.

    Attributes:
        keep_float: blocks that stay in float.
        methods: block or matmul (`module/Operator`) → one of `METHODS`.
        smoothing: block or matmul → migration strength, 0 (none) … 1.
    """

    keep_float: tuple[str, ...] = ()
    methods: Mapping[str, str] = field(default_factory=dict)
    smoothing: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All names of blocks and matmuls."""
        return (*self.keep_float, *self.methods, *self.smoothing)

    def method_of(self, node: str) -> str | None:
        """Return the method that is set for a matmul or for its block."""
        return self.methods.get(node, self.methods.get(block_of(node)))

    def strength_of(self, node: str) -> float | None:
        """Return the migration strength that is set for a matmul or for its block."""
        return self.smoothing.get(node, self.smoothing.get(block_of(node)))


_HEADER = f"""\
# Overrides of a calibration. Edit this file and pass it on: calibrate … --overrides THIS_FILE
#   keep_float: blocks that stay in float
#   methods:    range of the activations of a block or matmul: {", ".join(METHODS)}
#   smoothing:  migration strength of a block or matmul, 0 (none) to 1
"""


def write_overrides(path: str | os.PathLike[str], overrides: Overrides) -> None:
    """Write overrides as commented YAML."""
    values = {
        "keep_float": list(overrides.keep_float),
        "methods": dict(overrides.methods),
        "smoothing": {name: float(strength) for name, strength in overrides.smoothing.items()},
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    Path(path).write_text(_HEADER + text, encoding="utf-8")


def read_overrides(path: str | os.PathLike[str]) -> Overrides:
    """Read overrides from a YAML file. Raises BridgeError for unreadable YAML, unknown names, or bad strengths."""
    file = Path(path)
    try:
        values = parse_yaml_file(file)
    except (OSError, ValueError) as error:
        raise _error(file, f"cannot be read as YAML ({error}).") from error
    values = {} if values is None else values
    known = [f.name for f in dataclasses.fields(Overrides)]
    if not isinstance(values, dict) or set(values) - set(known):
        found = ", ".join(map(repr, set(values) - set(known))) if isinstance(values, dict) else type(values).__name__
        raise _error(file, f"found {found}; expected a mapping with the keys {', '.join(known)}.")
    keep = [] if values.get("keep_float") is None else values["keep_float"]
    if not isinstance(keep, list) or not all(isinstance(block, str) for block in keep) or len(set(keep)) < len(keep):
        raise _error(file, f"keep_float is {keep!r}; expected a list of different block names.")
    for block in keep:
        try:
            graph_of(block)
        except BridgeError as error:
            raise BridgeError(error.code, f"{file}: {error.message}") from error
    methods, smoothing = (_mapping(file, key, values.get(key)) for key in ("methods", "smoothing"))
    for name, method in methods.items():
        if method not in METHODS:
            raise _error(file, f"methods: {name} is {method!r}; expected one of: {', '.join(METHODS)}.")
    for name, strength in smoothing.items():
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
            raise _error(file, f"smoothing: {name} is {strength!r}; expected a number from 0 to 1.")
    return Overrides(tuple(keep), methods, {name: float(strength) for name, strength in smoothing.items()})


def _mapping(file: Path, key: str, values: Any) -> dict[str, Any]:
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise _error(file, f"{key} is {values!r}; expected a mapping from names of blocks or matmuls.")
    return values


def _error(file: Path, problem: str) -> BridgeError:
    return BridgeError("calibration.bad_overrides", f"{file}: {problem}")
