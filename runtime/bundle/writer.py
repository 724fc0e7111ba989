"""Write a bundle so that it is never half there: everything goes to a temporary sibling, renamed when complete."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from bridge_stg.runtime.bundle.bundle import (
    ENGINES,
    GRAPHS,
    MANIFEST,
    REPORTS,
    check_external_data,
    check_relative,
    file_sha256,
    unlisted_files,
)
from bridge_stg.runtime.bundle.manifest import FileEntry, GraphSpec, Manifest, canonical_sha256
from bridge_stg.runtime.bundle.onnx_file import external_locations
from bridge_stg.runtime.errors import BundleError
from bridge_stg.runtime.host.files import replace_folder


class BundleWriter:
    """Collect a bundle's files in `folder`, then `finish` puts it in place. Without `finish`, nothing is left.

    Files may be written straight into `folder` (large weights need no second copy) or copied there by `add_graph` and
    `add_file`; `finish` hashes all that is there. `reports.write_report` works on `folder` too.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path).resolve()  # through a link: the folder itself is swapped, not the link
        self.folder = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial"
        self._overwrite = overwrite
        self._graphs: dict[str, dict[str, GraphSpec]] = {}

    def __enter__(self) -> BundleWriter:
        """Make the temporary folder.

        Raises:
            BundleError: the target exists and must not be replaced, or its parent cannot be written.
        """
        self._check_target()
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise BundleError(f"{self.path}: no folder can be made there ({error}). Choose another place.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what is unfinished, whatever ended the block."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_graph(self, graph: GraphSpec, source: str | os.PathLike[str] | None = None) -> Path:
        """Add one variant: graphs/<name>/<variant>.onnx. Return its path in the temporary folder.

        Args:
            source: an .onnx file to copy, with the external data files that it names; None: it lies in place already.

        Raises:
            BundleError: the file is missing or no ONNX graph, or a data file of the same name has other bytes.
        """
        folder = self.folder / GRAPHS / graph.name
        file = folder / f"{graph.variant}.onnx"
        if source is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for location in sorted(_locations(Path(source))):
                self._share(Path(source).parent / location, folder / location)
            shutil.copyfile(source, file)
        if not file.is_file():
            raise BundleError(f"{file}: graph {graph} was added, but its file is not there.")
        self._graphs.setdefault(graph.name, {})[graph.variant] = graph
        return file

    def add_file(self, relative: str, source: str | os.PathLike[str] | bytes) -> Path:
        """Copy a file, or write bytes, to a path below the bundle. Return its path in the temporary folder.

        Raises:
            ValueError: the path leaves the bundle.
        """
        check_relative(relative)
        file = self.folder / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            file.write_bytes(source)
        else:
            shutil.copyfile(source, file)
        return file

    def finish(self, manifest: Manifest) -> Path:
        """Write the manifest and rename the bundle into place. Return its path.

        The writer fills in `graphs` (those added), `files`, hashes, sizes and the fingerprint. An older bundle at the
        path is replaced with its engines and reports, when `overwrite` was given.

        Raises:
            BundleError: graphs/ holds files of no graph, or the target cannot be replaced.
        """
        graphs = {n: {v: self._with_hashes(g) for v, g in sorted(vs.items())} for n, vs in self._graphs.items()}
        manifest = dataclasses.replace(manifest, graphs=graphs, files=self._other_files())
        entries = manifest.entries()
        if extra := unlisted_files(self.folder, entries):
            raise BundleError(f"{self.path}: {', '.join(extra)} belongs to no graph that was added.")
        values = json.loads(json.dumps(manifest.to_dict()))  # tuples become lists, as when it is read again
        values["fingerprint"] = canonical_sha256(values, without="fingerprint")
        (self.folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        self._swap()
        return self.path

    def _check_target(self) -> None:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not is_bundle(self.path):
            raise BundleError(f"{self.path}: exists and is not a bundle, so it is not replaced. Choose another folder.")
        if not self._overwrite:
            raise BundleError(
                f"{self.path}: a bundle is there already. Ask for it to be overwritten, or choose another folder."
            )

    def _share(self, source: Path, target: Path) -> None:
        if not target.exists():
            shutil.copyfile(source, target)
        elif file_sha256(source) != file_sha256(target):
            raise BundleError(f"{source}: another data file named {target.name} is in this graph's folder already.")

    def _with_hashes(self, graph: GraphSpec) -> GraphSpec:
        file = self._entry(f"{GRAPHS}/{graph.name}/{graph.variant}.onnx")
        locations = _locations(self.folder / file.path)
        data = tuple(self._entry(f"{GRAPHS}/{graph.name}/{location}") for location in sorted(locations))
        graph = dataclasses.replace(graph, file=file.path, size=file.size, sha256=file.sha256, data=data)
        check_external_data(self.folder, graph)
        return graph

    def _other_files(self) -> tuple[FileEntry, ...]:
        paths = sorted(f.relative_to(self.folder).as_posix() for f in self.folder.rglob("*") if f.is_file())
        apart = (GRAPHS, ENGINES, REPORTS, MANIFEST)
        return tuple(self._entry(path) for path in paths if PurePosixPath(path).parts[0] not in apart)

    def _entry(self, relative: str) -> FileEntry:
        file = self.folder / relative
        return FileEntry(relative, file.stat().st_size, file_sha256(file))

    def _swap(self) -> None:
        self._check_target()
        replace_folder(self.folder, self.path, aside=self.folder.with_suffix(".old"))


def is_bundle(path: Path) -> bool:
    """Tell whether a folder holds a manifest with a schema version and a fingerprint, of whatever version."""
    try:
        values: Any = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"schema_version", "fingerprint"} <= set(values)


def _locations(file: Path) -> set[str]:
    try:
        locations = external_locations(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: is not an ONNX graph ({error}).") from error
    for location in locations:
        if "/" in location or "\\" in location or location in ("", ".", ".."):
            raise BundleError(f"{file}: its external data {location!r} must be a plain file name beside it.")
    return locations
