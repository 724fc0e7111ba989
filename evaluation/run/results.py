"""A model's results on a benchmark: a file of JSON lines that grows by one line a finished sample.

The first line says what was evaluated. A killed run goes on where it was: a line counts once it is whole, and a
truncated last line is dropped. Results of another model, or of other annotations, never mix.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import hold

SCHEMA = 1
AGAIN = "Give --overwrite to start again, or another --out."


class ResultFile:
    """Rows by sample id, on disk and in memory. A context manager; one process at a time.

    Attributes:
        rows: the finished samples, by id.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, overwrite: bool = False, kept: tuple[str, ...] | None = None
    ) -> None:
        """Open a file, or make it.

        Args:
            path: the file.
            identity: plain values that say what was evaluated; all must agree with those in the file.
            overwrite: whether to drop what the file holds.
            kept: the fields that `rows` keep in memory, where rows are large; None: all of them.

        Raises:
            BridgeError: the file holds results of something else, is damaged, or is being written by another process.
        """
        self.path = path
        self._kept = kept
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._file = path.open("r+b")
        try:
            busy = f"{path} is being written by another evaluation. Wait for it, or give another --out or --shard."
            hold(self._file.fileno(), otherwise=busy)  # two that append would write every sample twice
            if overwrite:
                self._file.truncate(0)
            header, rows, end = _parsed(self._file.read(), path)
            self.rows = {name: self._shortened(row) for name, row in rows.items()}
            self._file.truncate(end)
            self._file.seek(end)
            if header is None:
                self._write({"schema": SCHEMA, **identity})
            else:
                check_identity(path, header, identity)
        except BaseException:
            self._file.close()
            raise

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a finished sample; it is on disk when this returns."""
        self._write(row)
        self.rows[row["id"]] = self._shortened(row)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _shortened(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if self._kept is None or name in self._kept}

    def _write(self, values: Mapping[str, Any]) -> None:
        # Names of files need not be Unicode; what stands for their other bytes is escaped as JSON escapes it.
        line = (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise


def read_results(path: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of a file that another process may be writing.

    Raises:
        BridgeError: it holds results of something else, or is damaged.
    """
    header, rows, _ = _parsed(path.read_bytes(), path)
    if header is not None:
        check_identity(path, header, identity)
    return rows


def check_identity(path: Path, header: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Compare what a file says it holds with what is to be evaluated.

    Raises:
        BridgeError: they differ; the message names the first difference.
    """
    expected: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, **identity}))
    for name, wanted in flat(expected).items():
        found = flat(header).get(name)
        if found != wanted:
            raise BridgeError(
                f"{path} holds results of something else: its {name} is {found!r}, now it is {wanted!r}. {AGAIN}"
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _parsed(data: bytes, path: Path) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]], int]:
    """Return the header, the rows by id, and the byte behind the last whole line."""
    header: dict[str, Any] | None = None
    rows: dict[str, dict[str, Any]] = {}
    end = 0
    for number, value, after in _lines(data, path):
        if header is None:
            header = value
        elif "id" not in value:
            raise BridgeError(f"{path}:{number}: has no id; expected a result. The file was changed. {AGAIN}")
        else:
            rows[value["id"]] = value
        end = after
    return header, rows, end


def _lines(data: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    start = 0
    number = 0
    while (stop := data.find(b"\n", start)) >= 0:
        number += 1
        try:
            value = json.loads(data[start:stop])
            if not isinstance(value, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            if data.find(b"\n", stop + 1) < 0 and stop + 1 == len(data):
                return  # the last line: a crash may leave its blocks empty
            raise BridgeError(f"{path}:{number}: is no result ({error}). The file was changed. {AGAIN}") from None
        yield number, value, stop + 1
        start = stop + 1
