"""A model's results on a dataset: a file of JSON lines, to which each finished sample adds one.

The first line identifies the model and the dataset, so that results of others never mix. A run that was stopped is
resumed: a line counts once it is complete, and a truncated last line is dropped.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import lock_file

SCHEMA = 1
START_AGAIN = "Pass --overwrite to start again, or another --out."


class ResultFile:
    """The `rows` of finished samples by id, on disk and in memory. A context manager; one process at a time."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, overwrite: bool = False, kept: tuple[str, ...] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Open a file, or create it. The plain values of `identity` must agree with those in the file.

        `kept` are the fields of large rows to keep in memory. `facts` are written to the first line too, but may
        differ when the file is opened again, such as the program's version. Raises BridgeError if the file has results
        of another run, is damaged, or is being written by another process.
        """
        self.path = path
        self._kept = kept
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file = path.open("r+b")
        try:
            busy = f"{path} is being written by another evaluation. Wait for it, or choose another --out or --shard."
            lock_file(self._file.fileno(), message=busy)  # two writers would write every sample twice
            if overwrite:
                self._file.truncate(0)
            header, rows, end = _parsed(self._file.read(), path)
            self.rows = {name: self._shortened(row) for name, row in rows.items()}
            self._file.truncate(end)
            self._file.seek(end)
            if header is None:
                self._write({"schema": SCHEMA, **(facts or {}), **identity})
            else:
                check_identity(path, header, identity)
        except BaseException:
            self._file.close()
            raise

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a finished sample; it is on disk when this returns."""
        self._write(row)
        self.rows[row["id"]] = self._shortened(row)

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _shortened(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if self._kept is None or name in self._kept}

    def _write(self, values: Mapping[str, Any]) -> None:
        # Bytes of a file name that are not Unicode are escaped as JSON escapes them.
        line = (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            is_there = self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError as error:
            error.filename = str(self.path)
            raise
        if not is_there:
            what = f"{self.path} was removed or replaced while results were written to it; they are lost"
            raise BridgeError("output.not_writable", f"{what}. Run the command again.")


def read_results(path: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of a file that another process may be writing; see `ResultFile` for the errors."""
    header, rows, _ = _parsed(path.read_bytes(), path)
    if header is not None:
        check_identity(path, header, identity)
    return rows


def check_identity(path: Path, header: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise BridgeError if the first line of a file differs from the identity of this run."""
    expected: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, **identity}))
    for name, wanted in flat(expected).items():
        found = flat(header).get(name)
        if found != wanted:
            what = f"{path} has results of another run: its {name} is {found!r}, now it is {wanted!r}. {START_AGAIN}"
            raise BridgeError("evaluation.other_results", what)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _parsed(data: bytes, path: Path) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]], int]:
    """Return the header, the rows by id, and the end of the last complete line in bytes."""
    header: dict[str, Any] | None = None
    rows: dict[str, dict[str, Any]] = {}
    end = 0
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.endswith(b"\n"):
            break
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError) as error:
            if end + len(line) == len(data):
                break  # the last line: a crash may leave its blocks empty
            raise _damaged(path, number, f"is not a result ({error})") from None
        end += len(line)
        if header is None:
            header = value
        elif "id" not in value:
            raise _damaged(path, number, "has no id; expected a result")
        else:
            rows[value["id"]] = value
    return header, rows, end


def _damaged(path: Path, number: int, what: str) -> BridgeError:
    return BridgeError("evaluation.bad_results", f"{path}:{number}: {what}. The file was changed. {START_AGAIN}")
