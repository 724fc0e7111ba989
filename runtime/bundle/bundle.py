"""A bundle on disk: read its manifest, check every file that it lists, and return the path of each part.

Knows nothing of backends: sessions are opened from a Bundle that has passed these checks.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import bridge_stg
from bridge_stg.runtime.bundle.manifest import SCHEMA_VERSION, FileEntry, GraphSpec, Manifest, canonical_sha256, migrate
from bridge_stg.runtime.bundle.onnx_file import external_locations
from bridge_stg.runtime.errors import BundleError
from bridge_stg.runtime.host.cpus import usable_cpus
from bridge_stg.runtime.host.parse import parse_json_file
from bridge_stg.runtime.host.threads import for_each

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
GRAPHS, GOLDEN, ENGINES, REPORTS = "graphs", "golden", "engines", "reports"

HASHED_BYTES_ON_LOAD = 64 * 2**20  # larger files are hashed by `verify` only; a load compares their sizes

COPY_AGAIN = "Copy the bundle again from its source, or export it again."


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked. Get one from `Bundle.load`."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check: Literal["sizes", "all"] = "sizes") -> Bundle:
        """Open the bundle in a folder.

        check="sizes" hashes files up to 64 MiB and compares the sizes of larger ones; "all" hashes everything.
        Raises BundleError if the folder is not a bundle, is damaged or incomplete, has an unknown schema version, or
        refers to files outside itself.
        """
        if check not in ("sizes", "all"):
            raise ValueError(f"check is {check!r}, expected 'sizes' or 'all'")
        root = Path(path)
        manifest = read_manifest(root)
        _check_files(root, manifest, hash_all=check == "all")
        return cls(root, manifest)

    @property
    def tokenizer_path(self) -> Path:
        """Path of tokenizer.json. Raises BundleError if the bundle has none."""
        if all(entry.path != TOKENIZER for entry in self.manifest.files):
            raise BundleError("bundle.missing_file", f"{self.path}: the manifest lists no {TOKENIZER}. {COPY_AGAIN}")
        return self.path / TOKENIZER

    def graph(self, name: str, variant: str) -> GraphSpec:
        """Return one variant of one graph. Raises BundleError, naming those that exist, if the bundle has none."""
        variants = self.manifest.graphs.get(name, {})
        if variant not in variants:
            missing = f"variant {variant!r} of graph {name!r}" if variants else f"graph {name!r}"
            names = ", ".join(sorted(variants or self.manifest.graphs)) or "none"
            raise BundleError("bundle.no_graph", f"{self.path}: the bundle has no {missing}; it has: {names}.")
        return variants[variant]

    def graph_path(self, name: str, variant: str) -> Path:
        """Return the path of a variant's .onnx file; its external data files are in the same folder."""
        return self.path / self.graph(name, variant).file

    def golden_cases(self) -> list[Path]:
        """Return the folders of the golden cases, sorted by name; `golden.read_case` reads one."""
        paths = [entry.path for entry in self.manifest.files if entry.path.startswith(f"{GOLDEN}/")]
        return [self.path / GOLDEN / name for name in sorted({PurePosixPath(path).parts[1] for path in paths})]


def read_manifest(root: Path) -> Manifest:
    """Read manifest.json and check its schema version, fingerprint, field types and paths, but no other file.

    A manifest of the schema before this one is migrated in memory.
    """
    file = root / MANIFEST
    if not file.is_file():
        found = f"has no {MANIFEST}" if root.is_dir() else "is a file" if root.exists() else "does not exist"
        raise BundleError("bundle.not_found", f"{root}: {found}; expected the folder that `export` wrote.")
    try:
        values = parse_json_file(file)
    except (OSError, ValueError) as error:
        raise BundleError("bundle.unreadable", f"{file}: cannot be read as JSON ({error}). {COPY_AGAIN}") from error
    _check_schema_version(file, values)
    if values.get("fingerprint") != canonical_sha256(values, without="fingerprint"):
        raise BundleError("bundle.hash_mismatch", f"{file}: does not match its fingerprint. {COPY_AGAIN}")
    try:
        manifest = Manifest.from_dict(migrate(values))
        entries = manifest.entries()
    except ValueError as error:
        raise BundleError("bundle.bad_field", f"{file}: {error}. {COPY_AGAIN}") from error
    for path in entries:
        check_relative(path, where=file)
    for graph in manifest.all_graphs():
        for path in (graph.file, *(entry.path for entry in graph.data)):
            if PurePosixPath(path).parent != PurePosixPath(GRAPHS, graph.name):
                text = f"{file}: the file {path!r} of graph {graph} is not in {GRAPHS}/{graph.name}/. {COPY_AGAIN}"
                raise BundleError("bundle.outside_path", text)
    return manifest


def _check_schema_version(file: Path, values: Any) -> None:
    version = values.get("schema_version") if isinstance(values, dict) else None
    if type(version) is not int:
        found = f"schema_version {version!r}" if isinstance(values, dict) else type(values).__name__
        raise BundleError("bundle.schema", f"{file}: found {found}, expected a schema version (integer). {COPY_AGAIN}")
    if version not in (SCHEMA_VERSION - 1, SCHEMA_VERSION):
        if version > SCHEMA_VERSION:
            made_by = values.get("made_by") or "a newer version"
            hint = f"it was made by bridge-stg {made_by}, this is {bridge_stg.__version__}: upgrade"
        else:
            hint = "it is older: migrate it with the versions between, or export the checkpoint again"
        text = f"{file}: schema version {version}, expected {SCHEMA_VERSION - 1} or {SCHEMA_VERSION}; {hint}."
        raise BundleError("bundle.schema", text)


def check_relative(path: str, *, where: Path) -> None:
    """Raise BundleError for a path that leaves the bundle's folder on any operating system."""
    if any(part in ("", ".", "..") for part in path.split("/")) or any(mark in path for mark in "\\:\0"):
        raise BundleError("bundle.outside_path", f"{where}: {path!r} is not a path below the bundle. {COPY_AGAIN}")


def _check_files(root: Path, manifest: Manifest, *, hash_all: bool) -> None:
    entries = manifest.entries()
    graphs = {graph.file for graph in manifest.all_graphs()}  # always hashed: a graph decides what runs

    inside = root.resolve()

    def check(entry: FileEntry) -> None:
        hash_it = hash_all or entry.path in graphs or entry.size <= HASHED_BYTES_ON_LOAD
        _check_file(root, inside, entry, hash_it=hash_it)

    for_each(check, entries.values(), threads=usable_cpus())
    for graph in manifest.all_graphs():
        check_external_data(root, graph)
    if extra := unlisted_files(root, entries):
        names = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise BundleError("bundle.unlisted_file", f"{root}: the manifest does not list {names}. Delete these files.")


def _check_file(root: Path, inside: Path, entry: FileEntry, *, hash_it: bool) -> None:
    """Compare one file with its entry: its real path is below `inside`, size and (if `hash_it`) content."""
    file = root / entry.path
    try:
        if not file.resolve(strict=True).is_relative_to(inside):
            raise BundleError("bundle.outside_path", f"{file}: links out of the bundle, to {file.resolve()}.")
        if not file.is_file():
            raise BundleError("bundle.missing_file", f"{file}: expected a file, found a folder. {COPY_AGAIN}")
        if (size := file.stat().st_size) != entry.size:
            raise BundleError("bundle.hash_mismatch", f"{file}: {size} bytes, expected {entry.size}. {COPY_AGAIN}")
        if hash_it and (found := file_sha256(file)) != entry.sha256:
            text = f"{file}: changed or damaged: SHA-256 {found[:12]}…, expected {entry.sha256[:12]}…. {COPY_AGAIN}"
            raise BundleError("bundle.hash_mismatch", text)
    except FileNotFoundError as error:
        raise BundleError("bundle.missing_file", f"{file}: is listed but missing. {COPY_AGAIN}") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise BundleError("bundle.unreadable", f"{file}: cannot be read ({error}). {COPY_AGAIN}") from error


def check_external_data(root: Path, graph: GraphSpec) -> None:
    """Raise BundleError if a graph's .onnx file reads weights from files that the manifest does not list for it."""
    file = root / graph.file
    listed = {PurePosixPath(entry.path).name for entry in graph.data}
    if unlisted := sorted(external_locations(file) - listed):
        text = f"{file}: reads weights from a file that the manifest does not list: {unlisted[0]!r}"
        raise BundleError("bundle.unlisted_file", f"{text} (listed: {', '.join(sorted(listed)) or 'none'}).")


def unlisted_files(root: Path, listed: dict[str, FileEntry]) -> list[str]:
    """Return files and linked folders below graphs/ and golden/ that are not in `listed`, sorted."""
    paths = (path for top in (GRAPHS, GOLDEN) for path in (root / top).rglob("*"))
    files = {path.relative_to(root).as_posix() for path in paths if path.is_symlink() or not path.is_dir()}
    return sorted(files - listed.keys())


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file as a hex string, reading 4 MiB at a time."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        block = bytearray(min(os.fstat(stream.fileno()).st_size, 2**22))
        while count := stream.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
