"""A model's results on a dataset: a file of JSON lines, to which each finished sample adds one.

The first line identifies the model and the dataset, so that results of others never mix. A run that was stopped is
resumed: a line counts once it is complete, and a truncated last line is dropped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import LineFile, read_lines

SCHEMA = 1
START_AGAIN = "Pass --overwrite to start again, or another --out."


class ResultFile(LineFile):
    """The `rows` of finished samples by id, on disk and in memory."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, overwrite: bool = False, kept: tuple[str, ...] | None = None,
        facts: Mapping[str, Any] | None = None, row_kind: Any = None,
    ) -> None:  # fmt: skip
        """Open a file, or create it. The plain values of `identity` must agree with those in the file.

        `kept` are the fields of large rows to keep in memory. `facts` are written to the first line too, but may
        differ when the file is opened again, such as the program's version. `row_kind` is the type of rows, see
        `from_json`; fields that it lacks are not checked. Raises BridgeError if the file has results
        of another run, is damaged, or is being written by another process.
        """
        self._kept = kept
        path.parent.mkdir(parents=True, exist_ok=True)
        busy = f"{path} is being written by another evaluation. Wait for it, or choose another --out or --shard."
        super().__init__(path, in_use=busy, overwrite=overwrite)  # two writers would write every sample twice
        try:
            with _naming_damage():
                header, rows = self.read({"schema": SCHEMA, **(facts or {}), **identity})
                check_identity(path, header, identity, ignored=facts or ())
                self.rows = {name: self._shortened(row) for name, row in _with_ids(rows, path, row_kind)}
        except BaseException:
            self.close()
            raise

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append finished samples; they are on disk when this returns."""
        for row in rows:
            self.append(row)
            self.rows[row["id"]] = self._shortened(row)

    def _shortened(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if self._kept is None or name in self._kept}


def read_results(path: Path, identity: Mapping[str, Any], row_kind: Any = None) -> dict[str, dict[str, Any]]:
    """Return the rows of a file that another process may be writing; see `ResultFile` for arguments and errors."""
    with _naming_damage():
        lines = read_lines(path)
        if (header := next(lines, None)) is None:
            return {}
        check_identity(path, header, identity)
        return dict(_with_ids(lines, path, row_kind))


def check_identity(
    path: Path, header: Mapping[str, Any], identity: Mapping[str, Any], *, ignored: Collection[str] = ()
) -> None:
    """Raise BridgeError if the first line of a file differs from the identity of this run.

    A value that only one of them has differs too, unless it is null or its name is in `ignored`.
    """
    expected = flat(json.loads(json.dumps({"schema": SCHEMA, **identity})))
    known = flat({name: value for name, value in header.items() if name not in ignored})
    for name in expected | known:
        found, wanted = known.get(name), expected.get(name)
        if found != wanted:
            what = f"{path} has results of another run: its {name} is {found!r}, now it is {wanted!r}. {START_AGAIN}"
            raise BridgeError("evaluation.other_results", what)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _with_ids(rows: Iterable[dict[str, Any]], path: Path, kind: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, 2):
        if not isinstance(row.get("id"), str):
            raise ValueError(f"{path}:{number}: has no id; expected a result")
        if kind is not None:
            known = [field.name for field in dataclasses.fields(kind)]
            try:
                from_json(kind, {name: row[name] for name in known if name in row})
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
        yield row["id"], row


@contextmanager
def _naming_damage() -> Iterator[None]:
    """Raise BridgeError for a line that cannot be read."""
    try:
        yield
    except ValueError as error:
        raise BridgeError("evaluation.bad_results", f"{error}. The file was changed. {START_AGAIN}") from None
