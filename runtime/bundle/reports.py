"""Reports in a bundle: JSON with its own hash, and optionally an HTML page.

They are not part of the bundle's fingerprint, so that a report can be added to a bundle that is already in use.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge_stg.runtime.bundle.bundle import REPORTS, check_relative, file_sha256
from bridge_stg.runtime.bundle.manifest import canonical_sha256
from bridge_stg.runtime.errors import BundleError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.parse import parse_json

SCHEMA = 1
"""Version of the format of reports, here and of `evaluate`."""


def write_report(
    bundle_path: str | os.PathLike[str], name: str, values: Mapping[str, Any], html: str | None = None
) -> Path:
    """Write reports/<name>.json (and .html), each atomically. Return the JSON file's path.

    The JSON object gains `schema`, the version of the format, `sha256` over all its other keys, and `html_sha256` if a
    page is given. Raises BundleError if the folder cannot be written.
    """
    folder = Path(bundle_path) / REPORTS
    check_relative(name, where=folder)
    record, texts = {"schema": SCHEMA, **json.loads(json.dumps(values))}, {}
    if html is not None:
        record["html_sha256"] = hashlib.sha256(html.encode()).hexdigest()
        texts["html"] = html
    record["sha256"] = canonical_sha256(record, without="sha256")
    texts["json"] = _text(record)
    try:
        folder.mkdir(exist_ok=True)
        for suffix, text in texts.items():
            with replacing(folder / f"{name}.{suffix}") as partial:
                partial.write_bytes(text.encode())
    except OSError as error:
        raise BundleError("output.not_writable", f"{folder}: report {name!r}: {error}. Is it read-only?") from error
    return folder / f"{name}.json"


def read_report(bundle_path: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Read reports/<name>.json. Raises BundleError if it is missing, is not JSON, or was changed."""
    file = Path(bundle_path) / REPORTS / f"{name}.json"
    try:
        text = file.read_bytes().decode("utf-8")
        record: dict[str, Any] = parse_json(text, finite=False)
    except (OSError, ValueError) as error:
        raise BundleError("bundle.unreadable", f"{file}: cannot be read ({error}). Make the report again.") from error
    intact = isinstance(record, dict) and record.get("sha256") == canonical_sha256(record, without="sha256")
    if not intact or text != _text(record):  # the text too: 1e-05 and 1E-05 are one number
        raise _changed(file)
    return record


def check_reports(bundle_path: str | os.PathLike[str]) -> int:
    """Read every report and page in a bundle and return the number of files. Raises BundleError if one was changed."""
    files = [file for file in (Path(bundle_path) / REPORTS).glob("*") if file.suffix in (".json", ".html")]
    for file in files:
        record = read_report(bundle_path, file.stem)
        if file.suffix == ".html" and file_sha256(file) != record.get("html_sha256"):
            raise _changed(file)
    return len(files)


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _changed(file: Path) -> BundleError:
    return BundleError("bundle.hash_mismatch", f"{file}: was changed after it was written. Make the report again.")
