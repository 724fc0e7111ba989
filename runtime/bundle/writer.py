"""Write a bundle atomically: all files go to a temporary sibling folder, which is renamed when it is complete."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import bridge_stg
from bridge_stg.runtime.bundle.bundle import (
    ENGINES,
    GRAPHS,
    MANIFEST,
    REPORTS,
    Bundle,
    check_external_data,
    check_relative,
    file_sha256,
    unlisted_files,
)
from bridge_stg.runtime.bundle.manifest import SCHEMA_VERSION, FileEntry, GraphSpec, Manifest, canonical_sha256
from bridge_stg.runtime.bundle.onnx_file import external_locations
from bridge_stg.runtime.errors import BundleError
from bridge_stg.runtime.host.files import replace_folder, replacing, temporary_sibling
from bridge_stg.runtime.host.parse import parse_json_file


class BundleWriter:
    """Collect a bundle's files in `folder`; `finish` moves it into place. Without `finish`, nothing is left.

    Files may be written directly into `folder` (which avoids a second copy of large weights) or copied by `add_graph`
    and `add_file`; `finish` hashes every file in it. `reports.write_report` works on `folder` too.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path).resolve()  # a link stays; the folder that it points to is replaced
        self.folder = self.path  # inside the block, the temporary folder
        self._stack = ExitStack()
        self._overwrite = overwrite
        self._graphs: dict[str, dict[str, GraphSpec]] = {}

    def __enter__(self) -> BundleWriter:
        """Make the temporary folder. Raises BundleError if the target must not be replaced or cannot be written."""
        self._check_target()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.folder = self._stack.enter_context(temporary_sibling(self.path))
            self.folder.mkdir()
        except OSError as error:
            self._stack.close()
            raise BundleError("output.not_writable", f"{self.path}: {error}. Choose another folder.") from error
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def add_graph(self, graph: GraphSpec, source: str | os.PathLike[str] | None = None) -> Path:
        """Add one variant as graphs/<name>/<variant>.onnx. Return its path in the temporary folder.

        `source` is an .onnx file to copy with its external data files; None: the files are already in place. Raises
        BundleError if it is missing or not ONNX, or a data file of the same name has other content.
        """
        folder = self.folder / GRAPHS / graph.name
        file = folder / f"{graph.variant}.onnx"
        if source is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for location in _data_files(Path(source)):
                data, target = Path(source).parent / location, folder / location
                if not target.exists():
                    shutil.copyfile(data, target)
                elif file_sha256(data) != file_sha256(target):  # another variant's
                    raise BundleError("bundle.data_conflict", f"{data}: another {location} is already in {folder}.")
            shutil.copyfile(source, file)
        if not file.is_file():
            raise BundleError("bundle.missing_file", f"{file}: graph {graph} was added, but its file does not exist.")
        self._graphs.setdefault(graph.name, {})[graph.variant] = graph
        return file

    def add_file(self, relative: str, source: str | os.PathLike[str] | bytes) -> Path:
        """Copy a file, or write bytes, to a path below the bundle. Return its path in the temporary folder."""
        check_relative(relative, where=self.path)
        file = self.folder / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            file.write_bytes(source)
        else:
            shutil.copyfile(source, file)
        return file

    def draft(self, manifest: Manifest) -> Bundle:
        """Return the graphs so far as a bundle without hashes, to run them before `finish`."""
        graphs = {
            name: {v: dataclasses.replace(graph, file=f"{GRAPHS}/{name}/{v}.onnx") for v, graph in variants.items()}
            for name, variants in self._graphs.items()
        }
        return Bundle(self.folder, dataclasses.replace(manifest, graphs=graphs, files=()))

    def finish(self, manifest: Manifest) -> Path:
        """Write the manifest and rename the bundle into place. Return its path.

        The writer fills in `graphs` (those added), `files`, hashes, sizes, versions and the fingerprint. With
        `overwrite`, an older bundle at the path is replaced, including its engines and reports. Raises BundleError if
        graphs/ contains files of no graph, or the target cannot be replaced.
        """
        graphs = {n: {v: self._with_hashes(g) for v, g in sorted(vs.items())} for n, vs in self._graphs.items()}
        paths = sorted(f.relative_to(self.folder).as_posix() for f in self.folder.rglob("*") if f.is_file())
        excluded = (GRAPHS, ENGINES, REPORTS, MANIFEST)
        files = tuple(self._entry(path) for path in paths if PurePosixPath(path).parts[0] not in excluded)
        made_by = bridge_stg.__version__
        manifest = dataclasses.replace(manifest, graphs=graphs, files=files, made_by=made_by)
        if extra := unlisted_files(self.folder, manifest.entries()):
            raise BundleError("bundle.unlisted_file", f"{self.path}: {', '.join(extra)} belongs to no added graph.")
        (self.folder / MANIFEST).write_text(_manifest_text(manifest), encoding="utf-8")
        self._check_target()
        replace_folder(self.folder, self.path)
        return self.path

    def _check_target(self) -> None:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not is_bundle(self.path):
            raise BundleError("output.exists", f"{self.path}: exists and is not a bundle. Choose another folder.")
        if not self._overwrite:
            raise BundleError("output.exists", f"{self.path}: exists. Allow overwriting, or choose another folder.")

    def _with_hashes(self, graph: GraphSpec) -> GraphSpec:
        file = self._entry(f"{GRAPHS}/{graph.name}/{graph.variant}.onnx")
        data = tuple(self._entry(f"{GRAPHS}/{graph.name}/{name}") for name in _data_files(self.folder / file.path))
        graph = dataclasses.replace(graph, file=file.path, size=file.size, sha256=file.sha256, data=data)
        check_external_data(self.folder, graph)
        return graph

    def _entry(self, relative: str) -> FileEntry:
        file = self.folder / relative
        return FileEntry(relative, file.stat().st_size, file_sha256(file))


def migrate_bundle(path: str | os.PathLike[str]) -> bool:
    """Rewrite the manifest of a bundle of the schema before this one, in place; no other file changes.

    The fingerprint changes, because it covers the manifest. Returns False if the bundle has this schema already. Raises
    BundleError if the bundle cannot be loaded, or its folder cannot be written.
    """
    bundle = Bundle.load(path)
    if bundle.manifest.schema_version == SCHEMA_VERSION:
        return False
    try:
        with replacing(bundle.path / MANIFEST) as temporary:
            temporary.write_text(_manifest_text(bundle.manifest), encoding="utf-8")
    except OSError as error:
        text = f"{bundle.path / MANIFEST}: {error}. Copy the bundle to a folder that can be written."
        raise BundleError("output.not_writable", text) from error
    return True


def _manifest_text(manifest: Manifest) -> str:
    """Return the JSON text of a manifest, with this schema's version and a new fingerprint."""
    manifest = dataclasses.replace(manifest, schema_version=SCHEMA_VERSION)
    values = json.loads(json.dumps(dataclasses.asdict(manifest)))  # as a reader gets them: tuples become lists
    values["fingerprint"] = canonical_sha256(values, without="fingerprint")
    return json.dumps(values, indent=1) + "\n"


def is_bundle(path: Path) -> bool:
    """Return whether a folder contains a manifest with a schema version and a fingerprint, of any version."""
    try:
        values = parse_json_file(path / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"schema_version", "fingerprint"} <= set(values)


def _data_files(file: Path) -> list[str]:
    """Return the names of a graph's external data files, which must be in the same folder, sorted."""
    locations = sorted(external_locations(file))
    for location in locations:
        if "/" in location or "\\" in location or location in ("", ".", ".."):
            raise BundleError("bundle.outside_path", f"{file}: its data file {location!r} is not in the same folder.")
    return locations
