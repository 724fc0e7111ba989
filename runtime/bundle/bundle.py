"""A bundle on disk: read its manifest, check every file it lists, and say where each part lies.

Knows nothing of backends: sessions are opened from a Bundle that has passed these checks.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bridge_stg.runtime.bundle.manifest import SCHEMA_VERSION, FileEntry, GraphSpec, Manifest, canonical_sha256
from bridge_stg.runtime.bundle.onnx_file import external_locations
from bridge_stg.runtime.errors import BundleError
from bridge_stg.runtime.host.cpus import usable_cpus
from bridge_stg.runtime.host.threads import for_each

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
GRAPHS, GOLDEN, ENGINES, REPORTS = "graphs", "golden", "engines", "reports"

HASHED_BYTES_ON_LOAD = 64 * 2**20
"""Files up to this size are hashed on every load; of larger ones only the size is compared, until `verify`."""

_AGAIN = "Copy the bundle again from its source, or export it again."


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked. Get one from `Bundle.load`."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check: str = "sizes") -> Bundle:
        """Open the bundle in a folder.

        Args:
            check: "sizes" hashes files up to 64 MiB and compares the sizes of larger ones; "all" hashes everything.

        Raises:
            BundleError: the folder is no bundle, is damaged or incomplete, has a schema version that this program does
                not know, or points outside itself.
        """
        if check not in ("sizes", "all"):
            raise ValueError(f"check is {check!r}, expected 'sizes' or 'all'")
        root = Path(path)
        manifest = read_manifest(root)
        _check_files(root, manifest, hash_all=check == "all")
        return cls(root, manifest)

    @property
    def tokenizer_path(self) -> Path:
        """Path of tokenizer.json.

        Raises:
            BundleError: the bundle has none.
        """
        if all(entry.path != TOKENIZER for entry in self.manifest.files):
            raise BundleError(f"{self.path}: the manifest lists no {TOKENIZER}. {_AGAIN}")
        return self.path / TOKENIZER

    def graph(self, name: str, variant: str) -> GraphSpec:
        """Return one variant of one graph.

        Raises:
            BundleError: the bundle has no such graph or variant; the message names those it has.
        """
        variants = self.manifest.graphs.get(name)
        if variants is None:
            known = ", ".join(sorted(self.manifest.graphs)) or "none"
            raise BundleError(f"{self.path}: no graph {name!r} in this bundle; it has: {known}.")
        if variant not in variants:
            raise BundleError(
                f"{self.path}: graph {name!r} has no variant {variant!r}; it has: {', '.join(sorted(variants))}."
            )
        return variants[variant]

    def graph_path(self, name: str, variant: str) -> Path:
        """Path of the .onnx file of one variant; its external data lie beside it. Raises as `graph` does."""
        return self.path / self.graph(name, variant).file

    def golden_cases(self) -> list[Path]:
        """Folders of the recorded cases, in order of their names; `golden.read_case` reads one."""
        names = {
            PurePosixPath(entry.path).parts[1] for entry in self.manifest.files if entry.path.startswith("golden/")
        }
        return [self.path / GOLDEN / name for name in sorted(names)]


def verify(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle and hash every byte that its fingerprint covers. Raises BundleError."""
    return Bundle.load(path, check="all")


def read_manifest(root: Path) -> Manifest:
    """Read and check manifest.json alone: JSON, schema version, fingerprint, types, paths.

    Raises:
        BundleError: any of these is wrong.
    """
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise BundleError(f"{root}: {found}, expected the folder of a bundle (made by `export`).")
    file = root / MANIFEST
    if not file.is_file():
        raise BundleError(
            f"{root}: no {MANIFEST} in this folder, so it is not a bundle. Give the folder that `export` wrote."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: cannot be read as JSON ({error}). {_AGAIN}") from error
    _check_schema_version(file, values)
    if values.get("fingerprint") != canonical_sha256(values, without="fingerprint"):
        raise BundleError(
            f"{file}: the fingerprint does not fit the manifest, so it was changed after the export. {_AGAIN}"
        )
    try:
        manifest = Manifest.from_dict(values)
        entries = manifest.entries()
        for entry in entries.values():
            check_relative(entry.path)
        for graph in manifest.all_graphs():
            _check_graph_folder(graph)
    except ValueError as error:
        raise BundleError(f"{file}: {error}. {_AGAIN}") from error
    return manifest


def _check_schema_version(file: Path, values: Any) -> None:
    if not isinstance(values, dict):
        raise BundleError(f"{file}: expected a JSON object, found {type(values).__name__}. {_AGAIN}")
    version = values.get("schema_version")
    if type(version) is not int:
        raise BundleError(f"{file}: schema_version is {version!r}, expected an integer. {_AGAIN}")
    if version == SCHEMA_VERSION:
        return
    advice = "Upgrade bridge-stg" if version > SCHEMA_VERSION else "Export the checkpoint again with this bridge-stg"
    age = "newer" if version > SCHEMA_VERSION else "older"
    raise BundleError(
        f"{file}: schema version {version} is {age} than version {SCHEMA_VERSION}, which this program reads. {advice}."
    )


def check_relative(path: str) -> None:
    """Refuse a manifest path that is not plainly below the bundle's folder on every operating system.

    Raises:
        ValueError: it is empty, absolute, has `..`, a drive letter or a backslash.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(mark in path for mark in "\\:\0"):
        raise ValueError(f"the path {path!r} leaves the bundle, or is not a plain relative path")


def _check_graph_folder(graph: GraphSpec) -> None:
    folder = f"{GRAPHS}/{graph.name}"
    for path in (graph.file, *(entry.path for entry in graph.data)):
        if str(PurePosixPath(path).parent) != folder:
            raise ValueError(f"the file {path!r} of graph {graph} does not lie in {folder}/")


def _check_files(root: Path, manifest: Manifest, *, hash_all: bool) -> None:
    entries = manifest.entries()
    for_each(
        lambda entry: check_file(root, entry, hash_it=hash_all or entry.size <= HASHED_BYTES_ON_LOAD),
        entries.values(),
        threads=usable_cpus(),
    )
    for graph in manifest.all_graphs():  # these are always hashed: a graph decides what runs
        entry = entries[graph.file]
        if entry.size > HASHED_BYTES_ON_LOAD and not hash_all:
            check_file(root, entry, hash_it=True)
        check_external_data(root, graph)
    extra = unlisted_files(root, entries)
    if extra:
        names = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise BundleError(f"{root}: files that the manifest does not list: {names}. Delete them, or export again.")


def check_file(root: Path, entry: FileEntry, *, hash_it: bool) -> None:
    """Compare one file with its entry.

    Raises:
        BundleError: it is missing, lies outside the bundle through a link, or has another size or hash.
    """
    file = root / entry.path
    try:
        if not file.resolve(strict=True).is_relative_to(root.resolve()):
            raise BundleError(f"{file}: a link that leads out of the bundle, to {file.resolve()}. {_AGAIN}")
        if not file.is_file():
            raise BundleError(f"{file}: expected a file, found a folder. {_AGAIN}")
        size = file.stat().st_size
        if size != entry.size:
            raise BundleError(f"{file}: {size} bytes, but the manifest says {entry.size}. {_AGAIN}")
        if hash_it and (found := file_sha256(file)) != entry.sha256:
            raise BundleError(
                f"{file}: its content was changed or damaged: SHA-256 {found[:12]}…, the manifest says "
                f"{entry.sha256[:12]}…. {_AGAIN}"
            )
    except FileNotFoundError as error:
        raise BundleError(f"{file}: is listed in the manifest, but missing. {_AGAIN}") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise BundleError(f"{file}: cannot be read ({error}). {_AGAIN}") from error


def check_external_data(root: Path, graph: GraphSpec) -> None:
    """Compare the data files that a graph's .onnx file points at with those that the manifest lists for it.

    Raises:
        BundleError: it points at others, so a backend would open a file that nobody checked.
    """
    file = root / graph.file
    try:
        locations = external_locations(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: is not an ONNX graph ({error}). {_AGAIN}") from error
    listed = {PurePosixPath(entry.path).name for entry in graph.data}
    unlisted = sorted(locations - listed)
    if unlisted:
        raise BundleError(
            f"{file}: takes weights from {unlisted[0]!r}, which the manifest does not list as a data file of this "
            f"graph (listed: {', '.join(sorted(listed)) or 'none'}). {_AGAIN}"
        )


def unlisted_files(root: Path, listed: dict[str, FileEntry]) -> list[str]:
    """Return files and linked folders below graphs/ and golden/ that are not in `listed`, sorted."""
    extra = []
    for top in (GRAPHS, GOLDEN):
        for folder, folders, files in os.walk(root / top):
            linked = [name for name in folders if (Path(folder) / name).is_symlink()]
            for name in (*files, *linked):
                path = (Path(folder) / name).relative_to(root).as_posix()
                if path not in listed:
                    extra.append(path)
    return sorted(extra)


def file_sha256(file: Path) -> str:
    """Hash a file of any size, a mebibyte at a time."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
