"""The videos of a server's clients: written to a private folder, probed, known by random ids, deleted in time.

A file is known by the hash of what is in it: several uploads of the same bytes are one file, which is opened once. All
methods run in the event loop; what takes long runs in threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.video.image import DAMAGE
from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.metrics import Metrics
from bridge_stg.server.settings import MIB, Settings
from bridge_stg.server.videos.prefix_cache import OpenVideos
from bridge_stg.server.videos.probe import FileInfo, FileLimits, probe

MOST_NAME = 120


@dataclass(eq=False)
class StoredFile:
    """A file that is there as long as someone holds it.

    Attributes:
        key: what tells its content from others'.
        path: where it lies; without a suffix, so that only its content says what it is.
        size: bytes.
        info: what the probe found.
        ours: whether it is deleted when nobody holds it; files of the media folder are not.
    """

    key: str
    path: str
    size: int
    info: FileInfo
    ours: bool
    holders: int = 0


@dataclass(eq=False)
class Upload:
    """One client's handle on a file."""

    id: str
    name: str
    file: StoredFile
    used: float = field(default_factory=time.time)

    def to_json(self, keep_s: float) -> dict[str, Any]:
        """Return what the client is told."""
        info = self.file.info
        expires = datetime.fromtimestamp(self.used + keep_s, timezone.utc).isoformat(timespec="seconds")
        return {
            "id": self.id,
            "name": self.name,
            "kind": info.kind,
            "media_type": info.media_type,
            "duration_s": info.duration_s,
            "width": info.width,
            "height": info.height,
            "frames": info.frames,
            "expires_at": expires,
        }


class Store:
    """All files and uploads of one server.

    Args:
        opened: where videos are kept open; told of files that go.
        writing, probing: threads for each; a file that takes long to probe holds up no upload.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, opened: OpenVideos, *, writing: Executor, probing: Executor
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bridge-stg-serve-"))
        self._settings, self._metrics, self._opened = settings, metrics, opened
        self._writing, self._probing = writing, probing
        self._limits = FileLimits(settings.max_pixels, settings.max_duration_s)
        self._files: dict[str, StoredFile] = {}
        self._uploads: dict[str, Upload] = {}
        self._incoming_bytes = 0
        metrics.gauge("videos", "Videos that clients hold.", lambda: len(self._uploads))
        metrics.gauge("stored_bytes", "Bytes of uploads on disk.", lambda: self.stored_bytes)

    @property
    def stored_bytes(self) -> int:
        """What lies in the folder, unfinished uploads included."""
        return self._incoming_bytes + sum(file.size for file in list(self._files.values()) if file.ours)

    def get(self, upload_id: str) -> Upload:
        """Return an upload, and let it stay for another while. Raises ApiError 404."""
        upload = self._uploads.get(upload_id)
        if upload is None:
            raise ApiError(404, "no_video", "There is no such video here (any more); upload it again.")
        upload.used = time.time()
        return upload

    def receive(self) -> Incoming:
        """Begin an upload; a context manager. Raises ApiError 503 if too many videos are kept."""
        self._check_count()
        return Incoming(self)

    async def refer(self, name: str) -> Upload:
        """Take a video of the media folder. Raises ApiError: 404 if it is not there, and as `probe` does."""
        self._check_count()
        path, about = self._media_path(name)
        key = f"media:{path}:{about.st_size}:{about.st_mtime_ns}"
        file = self._files.get(key)
        if file is None:
            info = await self._probe(str(path), path.name)
            file = self._files.setdefault(key, StoredFile(key, str(path), about.st_size, info, ours=False))
        return self._add(shown_name(path.name), file)

    def hold(self, file: StoredFile) -> None:
        """Keep a file until `release`."""
        file.holders += 1

    def release(self, file: StoredFile) -> None:
        """Let go of a file; the last one deletes it."""
        file.holders -= 1
        if file.holders <= 0 and self._files.get(file.key) is file:
            del self._files[file.key]
            self._opened.close(file.key)
            if file.ours:
                Path(file.path).unlink(missing_ok=True)

    def remove(self, upload: Upload) -> None:
        """Forget an upload. May be called again."""
        if self._uploads.pop(upload.id, None) is not None:
            self.release(upload.file)

    def expired(self) -> list[Upload]:
        """Return the uploads whose time is up."""
        before = time.time() - self._settings.keep_s
        return [upload for upload in self._uploads.values() if upload.used < before]

    def close(self) -> None:
        """Delete everything. May be called again, and from any thread."""
        self._uploads.clear()
        self._files.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_count(self) -> None:
        if len(self._uploads) >= self._settings.max_videos:
            raise self._no_room(f"{len(self._uploads)} videos")

    def _no_room(self, what: str) -> ApiError:
        return ApiError(
            503, "storage", f"This server holds {what} and takes no more now; delete some or wait.", retry_after_s=60
        )

    def _media_path(self, name: str) -> tuple[Path, os.stat_result]:
        missing = ApiError(404, "no_source", "This server has no media file of that name.")
        if self._settings.media is None:
            raise ApiError(404, "no_media", "This server has no media folder; upload the video.")
        root = self._settings.media.resolve()
        try:
            if not name or "\0" in name or Path(name).is_absolute():
                raise missing
            path = (root / name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise missing from None
        if not path.is_relative_to(root) or not path.is_file():
            raise missing
        return path, path.stat()

    def _add(self, name: str, file: StoredFile) -> Upload:
        upload = Upload(secrets.token_urlsafe(18), name, file)
        self.hold(file)
        self._uploads[upload.id] = upload
        return upload

    async def _probe(self, path: str, name: str) -> FileInfo:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._probing, probe, path, name, self._limits)
        except (VideoError, *DAMAGE) as error:
            raise ApiError(422, "video", f"{name} cannot be read as a video or picture.") from error


class Incoming:
    """An upload on its way: write pieces, then `finish`. Leaving the block without that removes what was written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.folder / f"incoming-{secrets.token_hex(8)}"
        self._hash = hashlib.sha256()
        self._size = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Incoming:
        self._file = os.fdopen(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb", buffering=0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    async def write(self, piece: bytes) -> None:
        """Append a piece. Raises ApiError: 413 if the file grows too large, 503 if the disk's share is full."""
        store, most = self._store, self._store._settings.max_upload_bytes
        if self._size + len(piece) > most:
            raise ApiError(413, "size", f"The file is larger than the {most / MIB:g} MiB that this server takes.")
        if store.stored_bytes + len(piece) > store._settings.max_storage_bytes:
            raise store._no_room(f"{store.stored_bytes / MIB:.0f} MiB")
        self._size += len(piece)
        store._incoming_bytes += len(piece)
        store._metrics.uploaded.inc(len(piece))
        await asyncio.get_running_loop().run_in_executor(store._writing, self._append, piece)

    def _append(self, piece: bytes) -> None:
        assert self._file is not None
        self._hash.update(piece)
        self._file.write(piece)

    async def finish(self, filename: str | None) -> Upload:
        """Probe what was written, and make it an upload.

        Raises:
            ApiError: there was no file, or it is empty; or as of `probe`.
        """
        store = self._store
        if filename is None:
            raise ApiError(400, "no_file", "The form holds no file; send the video in a field called `file`.")
        if not self._size:
            raise ApiError(422, "empty", "The file is empty (0 bytes); record or copy it again.")
        name = shown_name(filename)
        key = self._hash.hexdigest()
        if key not in store._files:
            info = await store._probe(str(self._path), name)
            if key not in store._files:  # the same bytes may have come twice at a time
                path = store.folder / secrets.token_hex(16)
                self._path.rename(path)
                store._files[key] = StoredFile(key, str(path), self._size, info, ours=True)
        upload = store._add(name, store._files[key])
        self._end()
        return upload

    def _end(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self._store._incoming_bytes -= self._size
        self._path.unlink(missing_ok=True)


def shown_name(filename: str) -> str:
    """Return a client's file name as it may be shown: its last part, without what is no letter."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in last if letter.isprintable())[-MOST_NAME:] or "video"
