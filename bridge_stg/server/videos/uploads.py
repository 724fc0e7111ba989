"""The videos of clients: written to a private folder, probed, identified by random ids, deleted after some time.

A file is identified by the hash of its content: several uploads of the same bytes are one file, which is opened once.
All methods run in the event loop; slow work runs in threads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from bridge_stg.runtime.host.files import temporary_sibling
from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.http.schemas import Video
from bridge_stg.server.metrics import Metrics
from bridge_stg.server.settings import MB, Settings
from bridge_stg.server.videos.isolated import IsolatedMedia
from bridge_stg.server.videos.prefix_cache import OpenVideos
from bridge_stg.server.videos.probe import FileInfo

MOST_NAME = 120


@dataclass(eq=False)
class StoredFile:
    """A file that is deleted when nothing uses it any longer."""

    key: str  # identifies the content
    media: IsolatedMedia  # its path has no suffix, so that only the content decides on the type
    size: int
    info: FileInfo
    ours: bool  # whether the last holder deletes it; files of the media folder are not deleted
    holders: int = 0


@dataclass(eq=False)
class Upload:
    """One client's handle on a file."""

    id: str
    name: str
    file: StoredFile
    used: float = field(default_factory=time.time)


class Incoming:
    """An upload that is being written; `reserve(size, more)` raises ApiError before a piece that does not fit."""

    def __init__(self, path: Path, threads: Executor, reserve: Callable[[int, int], None]) -> None:
        self.path, self.size = path, 0
        self.hash, self._threads, self._reserve = hashlib.sha256(), threads, reserve
        self._file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb", buffering=0)

    async def write(self, piece: bytes) -> None:
        """Append a piece."""
        self._reserve(self.size, len(piece))
        self.size += len(piece)
        await asyncio.get_running_loop().run_in_executor(self._threads, self._append, piece)

    def close(self) -> None:
        """Close the file, and delete it unless it was moved."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _append(self, piece: bytes) -> None:
        self.hash.update(piece)
        self._file.write(piece)


class Store:
    """All files and uploads of one server. A slow probe runs in `probing` and blocks no upload in `writing`."""

    def __init__(
        self, settings: Settings, metrics: Metrics, opened: OpenVideos, *, writing: Executor, probing: Executor
    ) -> None:
        self._temporary = ExitStack()
        self.folder = self._temporary.enter_context(temporary_sibling(Path(tempfile.gettempdir()) / "bridge-stg-serve"))
        self.folder.mkdir(mode=0o700)
        self._settings, self._metrics, self._opened = settings, metrics, opened
        self._writing, self._probing = writing, probing
        self._files: dict[str, StoredFile] = {}
        self._uploads: dict[str, Upload] = {}
        self._incoming: set[Incoming] = set()
        metrics.gauge("videos", "Videos that clients keep.", lambda: len(self._uploads))
        metrics.gauge("stored_bytes", "Bytes of uploads on disk.", lambda: self.stored_bytes)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the folder, unfinished uploads included."""
        incoming = sum(upload.size for upload in list(self._incoming))
        return incoming + sum(file.size for file in list(self._files.values()) if file.ours)

    def get(self, upload_id: str) -> Upload:
        """Return an upload, and extend its expiry time. Raises ApiError 404."""
        upload = self._uploads.get(upload_id)
        if upload is None:
            message = "This video does not exist or has expired; upload it again."
            raise ApiError(404, "server.video_not_found", message)
        upload.used = time.time()
        return upload

    def describe(self, upload: Upload) -> Video:
        """Return the description of an upload for clients."""
        until = datetime.fromtimestamp(upload.used + self._settings.keep_s, timezone.utc)
        info, expires = dataclasses.asdict(upload.file.info), until.isoformat(timespec="seconds")
        return Video(id=upload.id, name=upload.name, **info, expires_at=expires)

    @contextmanager
    def receive(self) -> Iterator[Incoming]:
        """Yield an upload to write to and to `finish`; otherwise its file is deleted. Raises ApiError 413 and 503."""
        self._check_count()
        incoming = Incoming(self.folder / f"incoming-{secrets.token_hex(8)}", self._writing, self._reserve)
        self._incoming.add(incoming)
        try:
            yield incoming
        finally:
            self._incoming.discard(incoming)
            incoming.close()

    async def finish(self, incoming: Incoming, filename: str | None) -> Upload:
        """Probe a written file and make it an upload. Raises ApiError if there is no file, and as `probe` does."""
        if filename is None:
            message = "The form has no file; send the video in a field called `file`."
            raise ApiError(400, "server.no_file", message)
        if not incoming.size:
            raise ApiError(422, "video.empty", "The file is empty (0 bytes); record or copy it again.")
        name, key = display_name(filename), incoming.hash.hexdigest()
        if key not in self._files:
            info = await self._probe(self._media(incoming.path), name)
            if key not in self._files:  # the same bytes may have been uploaded twice at the same time
                path = self.folder / secrets.token_hex(16)
                incoming.path.rename(path)
                self._files[key] = StoredFile(key, self._media(path), incoming.size, info, ours=True)
        return self._add(name, self._files[key])

    async def refer(self, name: str) -> Upload:
        """Make a video of the media folder an upload. Raises ApiError: 404 if it does not exist, and as `probe`."""
        self._check_count()
        path, stat = self._media_path(name)
        key = f"media:{path}:{stat.st_size}:{stat.st_mtime_ns}"
        file = self._files.get(key)
        if file is None:
            media = self._media(path)
            info = await self._probe(media, path.name)
            file = self._files.setdefault(key, StoredFile(key, media, stat.st_size, info, ours=False))
        return self._add(display_name(path.name), file)

    def hold(self, file: StoredFile) -> None:
        """Keep a file until `release` is called."""
        file.holders += 1

    def release(self, file: StoredFile) -> None:
        """End a `hold`; the last one deletes the file."""
        file.holders -= 1
        if file.holders <= 0 and self._files.get(file.key) is file:
            del self._files[file.key]
            self._opened.close(file.key)
            if file.ours:
                Path(file.media.path).unlink(missing_ok=True)

    def remove(self, upload: Upload) -> None:
        """Delete an upload. Can be called repeatedly."""
        if self._uploads.pop(upload.id, None) is not None:
            self.release(upload.file)

    def expired(self, before: float) -> list[Upload]:
        """Return the uploads that were used last before a time."""
        return [upload for upload in self._uploads.values() if upload.used < before]

    def close(self) -> None:
        """Delete everything. Can be called repeatedly, and from any thread."""
        self._uploads.clear()
        self._files.clear()
        self._temporary.close()

    def _check_count(self) -> None:
        if len(self._uploads) >= self._settings.max_videos:
            raise self._full(f"{len(self._uploads)} videos")

    def _reserve(self, size: int, more: int) -> None:
        most = self._settings.max_upload_bytes
        if size + more > most:
            message = f"The file is larger than {most / MB:g} MB, the limit of this server."
            raise ApiError(413, "server.upload_too_large", message)
        if self.stored_bytes + more > self._settings.max_storage_bytes:
            raise self._full(f"{self.stored_bytes / MB:.0f} MB")
        self._metrics.uploaded.inc(more)

    def _full(self, found: str) -> ApiError:
        message = f"This server stores {found} and has no room for more; delete some or try again later."
        return ApiError(503, "server.storage_full", message, retry_after_s=60)

    def _media_path(self, name: str) -> tuple[Path, os.stat_result]:
        if self._settings.media is None:
            raise ApiError(404, "server.no_media_folder", "This server has no media folder; upload the video.")
        root = self._settings.media.resolve()
        with suppress(OSError, ValueError, RuntimeError):  # a missing file, a zero byte, a loop of links
            path = (root / name).resolve(strict=True)
            if name and not Path(name).is_absolute() and path.is_relative_to(root) and path.is_file():
                return path, path.stat()
        raise ApiError(404, "video.not_found", "The media folder of this server has no such file.")

    def _add(self, name: str, file: StoredFile) -> Upload:
        upload = Upload(secrets.token_urlsafe(18), name, file)
        self.hold(file)
        self._uploads[upload.id] = upload
        return upload

    def _media(self, path: Path) -> IsolatedMedia:
        return IsolatedMedia(str(path), self._settings.media_limits)

    async def _probe(self, media: IsolatedMedia, name: str) -> FileInfo:
        return await asyncio.get_running_loop().run_in_executor(self._probing, media.probe, name)


def display_name(filename: str) -> str:
    """Return a client's file name for display: its last part, printable characters only."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in last if letter.isprintable())[-MOST_NAME:] or "video"
