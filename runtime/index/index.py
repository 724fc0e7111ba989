"""The index of a folder: for each content of a file and each vision encoder, a cache of arrays on disk.

    INDEX/index.json                         the version of the format
    INDEX/<content>/<encoder>/<kind>-<key>   a file of arrays, see `store`

`content` is the file's SHA-256, so a file may be renamed, moved or copied; `encoder` stands for all that changes the
values of a given frame. What changes the choice of frames is in the keys. Nothing in an index needs to be kept: what is
deleted, file by file or as a whole, is computed again. The folder of a content was changed last when it was used last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import bridge_stg
from bridge_stg.runtime.backends.choose import ChosenBackend
from bridge_stg.runtime.bundle.bundle import TOKENIZER, Bundle, file_sha256
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.failures import converting_os_errors
from bridge_stg.runtime.host.files import check_creatable, replacing
from bridge_stg.runtime.host.packages import installed_version
from bridge_stg.runtime.index.store import Arrays, locked, nbytes_of, read_arrays, write_arrays
from bridge_stg.runtime.video.decoder import check_path

FORMAT = {"format": "bridge-stg index", "version": 1}
"""Content of `MARK`; another version is not read."""
MARK = "index.json"
TRIMMED = 0.9
"""Share of the maximum size that is left when videos are deleted, so that it does not happen for each file."""
LIBRARIES = ("av", "pillow", "numpy")
"""Packages whose versions may change the pixels of a frame."""


def encoder_of(bundle: Bundle, target: ChosenBackend) -> dict[str, Any]:
    """Return what changes the visual tokens of a given frame, as plain values: graph, backend, sizes, programs.

    The tokenizer is part of it, since it determines how many frames fit the prompt.
    """
    graph = bundle.graph("vision_encoder", target.variants["vision_encoder"])
    entries, spec = bundle.manifest.entries(), bundle.manifest.spec
    return {
        "graph": [graph.sha256, *(entry.sha256 for entry in graph.data)],
        "variant": graph.variant,
        "precision": graph.precision,
        "backend": [target.backend, target.version, target.device],
        "vision": asdict(spec.vision),
        "frames": asdict(spec.frames),
        "tokenizer": entries[TOKENIZER].sha256 if TOKENIZER in entries else None,
        "programs": [bridge_stg.__version__, *map(installed_version, LIBRARIES)],
    }


class VisualIndex:
    """A folder of caches, shared by any number of threads and processes.

    Args:
        root: the folder; created when something is stored, if it does not exist.
        encoder: what changes the values of a given frame, such as `encoder_of`.
        max_bytes: maximum bytes of the folder, for which the videos used longest ago are deleted; None: no maximum. Of
            several processes that write to one folder, each counts its own bytes until it deletes something.

    Raises:
        BridgeError: `root` is a file, a folder of something else, or cannot be created.
        HostError: the folder cannot be read.
    """

    def __init__(
        self, root: str | os.PathLike[str], encoder: Mapping[str, Any], *, max_bytes: int | None = None
    ) -> None:
        self.root, self._encoder, self._max_bytes = Path(root), _digest(encoder), max_bytes
        self._lock = threading.Lock()
        with converting_os_errors():
            self._check_root()
        self._nbytes = 0 if max_bytes is None else _bytes_below(self.root)

    def _check_root(self) -> None:
        mark, root = self.root / MARK, self.root
        check_creatable(root)
        if not os.path.lexists(root):
            return
        if not root.is_dir():
            raise BridgeError("index.not_an_index", f"{root} is a file; expected the folder of an index, or a new one.")
        # Before the mark: others that create this index now write it first.
        entries = [entry for entry in root.iterdir() if not entry.name.endswith(".partial")]
        found: Any = None
        if mark.exists():
            with suppress(ValueError):
                found = json.loads(mark.read_bytes())
        elif not entries:
            return
        if found != FORMAT:
            what = f"{root} is not an index of this version: its {MARK} is {found!r}, expected {FORMAT!r}"
            raise BridgeError("index.not_an_index", f"{what}. Give a new folder, or delete this one.")

    def cache_of(self, path: str | os.PathLike[str]) -> VisualCache:
        """Return the cache of a file's content, which is read once to hash it.

        Raises OSError if it cannot be read, and BridgeError if a file is in the place of the cache's folder.
        """
        file = Path(path)
        state = _file_state(file)
        content = self.root / file_sha256(file)
        for folder in (content, content / self._encoder):
            if folder.exists() and not folder.is_dir():
                what = f"{folder} is no folder of an index"
                raise BridgeError("index.not_an_index", f"{what}. Delete it, or give a new folder.")
        with suppress(OSError):  # it is new, or this process may only read the index
            os.utime(content)
        return VisualCache(self, content / self._encoder, file, state)

    def create(self) -> None:
        """Create the folder with its mark, if it is new or was deleted. Raises HostError if it cannot be written."""
        if not (self.root / MARK).exists():
            with converting_os_errors():
                self.root.mkdir(parents=True, exist_ok=True)
                with replacing(self.root / MARK) as temporary:
                    temporary.write_text(json.dumps(FORMAT) + "\n")

    def has_room(self, content: Path, nbytes: int) -> bool:
        """Return whether a content may get so many bytes more, and count them; videos used longer ago are deleted."""
        if self._max_bytes is None:
            return True
        with self._lock:
            if self._nbytes + nbytes > self._max_bytes:
                self._nbytes = _bytes_below(self.root)  # others write too, and what is replaced was counted twice
                used = sorted((one for one in self.root.iterdir() if one.is_dir() and one != content), key=_used)
                for folder in used:
                    if self._nbytes + nbytes <= TRIMMED * self._max_bytes:
                        break
                    self._nbytes -= _bytes_below(folder)
                    shutil.rmtree(folder, ignore_errors=True)
            fits = self._nbytes + nbytes <= self._max_bytes
            self._nbytes += nbytes if fits else 0
            return fits


def remove_file(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> int:
    """Delete what the index in `root` has of a file's content, for all encoders, and return its bytes.

    Raises:
        VideoError: the file cannot be read.
    """
    folder = Path(root) / file_sha256(Path(check_path(os.fspath(path))))
    size = _bytes_below(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return size


class VisualCache:
    """What is stored of one file's content for one encoder: arrays by a kind and a key.

    A key has plain values that JSON can express: all that the arrays depend on beyond content and encoder, such as the
    times of the frames. Safe to use from many threads and processes.

    Args:
        index: the index, which is created when something is stored, and says whether it has room.
        folder: where the arrays are: the encoder's folder in that of the content.
        file: the video; if it changes while it is read, nothing more is stored.
        state: size and time of change of `file` before it was hashed.
    """

    def __init__(self, index: VisualIndex, folder: Path, file: Path, state: tuple[int, ...]) -> None:
        self.folder, self._index, self._file, self._state = folder, index, file, state

    def get(self, kind: str, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Return the arrays; None if they are not stored, or were damaged. Raises HostError as `read_arrays` does."""
        return read_arrays(self._path(kind, key))

    def put(self, kind: str, key: Mapping[str, Any], arrays: Arrays) -> None:
        """Store arrays in place of those of the same key, if there is room for them.

        Raises HostError: the disk is full or not writable.
        """
        with suppress(FileNotFoundError):  # the folder, or the video, was deleted in the meantime
            if _file_state(self._file) == self._state and self._index.has_room(self.folder.parent, nbytes_of(arrays)):
                self._index.create()
                write_arrays(self._path(kind, key), arrays)

    def merge(self, kind: str, key: Mapping[str, Any], arrays: Arrays, *, by: str) -> None:
        """Store rows beside those of the same key: the first dim of all arrays counts the rows.

        Rows are sorted by the array `by`; where a value of it is stored already, the new row replaces the old one. Two
        writers wait for each other. Raises HostError as `put` does.
        """
        self._index.create()
        with locked(self.folder):
            old = self.get(kind, key)
            if old is not None:
                kept = ~np.isin(old[by], arrays[by])
                arrays = {name: np.concatenate([old[name][kept], rows]) for name, rows in arrays.items()}
            order = np.argsort(arrays[by])
            self.put(kind, key, {name: rows[order] for name, rows in arrays.items()})

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return _bytes_below(self.folder)

    def _path(self, kind: str, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{kind}-{_digest(key)}"


def _digest(values: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _file_state(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _used(folder: Path) -> float:
    """Return when the folder of a content was used last; 0 if it was deleted."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process may delete or replace it now
            total += path.stat().st_size if path.is_file() else 0
    return total
