"""What a word of a command line names: a file, folder, pattern, address, camera, or standard input (`-`)."""

from __future__ import annotations

import glob
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from bridge_stg.evaluation.media import IMAGES, VIDEOS, files_in
from bridge_stg.evaluation.sources.reading import Reading
from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.host.limits import Limits

if TYPE_CHECKING:
    from PIL import Image

STDIN = "-"


@dataclass(frozen=True)
class Source:
    """One video or image.

    Attributes:
        word: what was written on the command line, or the path of a file in a folder or of a pattern.
        kind: `file`, `address` (http, https), `live` (a camera or stream) or `stdin`.
        listed: whether a folder or a pattern names it.
    """

    word: str
    kind: str = "file"
    listed: bool = False

    @property
    def name(self) -> str:
        """The word, without the password of an address."""
        if self.kind not in ("address", "live"):
            return self.word
        from bridge_stg.runtime.live.source import shown_address

        return shown_address(self.word)

    @contextmanager
    def open(self, reading: Reading, limits: Limits) -> Iterator[str]:
        """Yield the path of the file: itself, or a temporary copy of what is downloaded, recorded or piped in.

        Raises:
            VideoError: the source cannot be read; errors from inside the block name the source, not its copy.
            Interrupted: the deadline passed.
        """
        if self.kind == "file":
            yield self.word
            return
        from bridge_stg.evaluation.sources.download import copy, download  # HTTP: not for a file

        name = "standard input" if self.kind == "stdin" else self.name
        with tempfile.TemporaryDirectory(prefix="bridge-stg-") as folder:
            suffix = re.search(r"\.\w{1,8}\Z", self.word.partition("?")[0], re.ASCII)
            path = Path(folder) / f"video{suffix[0] if suffix and self.kind == 'address' else ''}"
            try:
                if self.kind == "address":
                    download(self.word, path, name=name, reading=reading, limits=limits)
                elif self.kind == "live":
                    _record(self.word, path, reading, limits)
                else:
                    copy(_stdin(), path, name=name, max_bytes=reading.max_bytes, limits=limits)
                yield str(path)
            except BridgeError as error:
                raise type(error)(error.code, error.message.replace(str(path), name)) from None


def find_sources(words: Sequence[str], *, images: bool = False) -> list[Source]:
    """Return the sources that words name, each once; a folder's files are its videos, or images, at any depth.

    Raises:
        VideoError: a folder has no videos, a pattern matches no file, or an address is of an unknown protocol.
    """
    suffixes = IMAGES if images else VIDEOS
    return list(dict.fromkeys(source for word in words for source in _named(word, suffixes)))


def is_address(word: str) -> bool:
    """Return whether a word is the http or https address of a file."""
    return re.match(r"https?://", word, re.IGNORECASE) is not None


def _named(word: str, suffixes: tuple[str, ...]) -> list[Source]:
    if word == STDIN:
        return [Source(word, "stdin")]
    if is_address(word):
        return [Source(word, "address")]
    is_stream = re.match(r"[a-z][a-z0-9+.-]*://", word, re.IGNORECASE) is not None
    if is_stream or (re.fullmatch(r"\d{1,3}|/dev/video\d+", word, re.ASCII) and not Path(word).is_file()):
        from bridge_stg.runtime.live.source import open_live

        open_live(word)  # an unknown protocol is an error
        return [Source(word, "live")]
    if os.path.isdir(word):
        files = [str(file) for file in files_in(Path(word), suffixes)]
        if not files:
            text = f"{word}: no file in this folder is a video or image that can be queried"
            raise VideoError("video.not_found", f"{text}; expected {', '.join(suffixes)}")
    elif glob.has_magic(word) and not os.path.lexists(word):
        files = [file for file in sorted(glob.glob(word, recursive=True)) if os.path.isfile(file)]
        if not files:
            raise VideoError("video.not_found", f"{word}: no file matches this pattern (in {os.getcwd()})")
    else:
        return [Source(word)]
    return [Source(file, listed=True) for file in files]


def _stdin() -> IO[bytes]:
    if sys.stdin.isatty():
        text = "the source - is standard input, which is a terminal; pipe a video into it, or name a file"
        raise BridgeError("options.invalid", text)
    return sys.stdin.buffer


def _record(word: str, path: Path, reading: Reading, limits: Limits) -> None:
    """Write the first seconds of a camera or live stream as H.264."""
    from PIL import Image

    from bridge_stg.runtime.live.source import open_live
    from bridge_stg.runtime.visualize.annotate import encode_h264

    def recorded() -> Iterator[tuple[float, Image.Image]]:
        for time_s, picture in frames:
            limits.report(min(time_s, reading.seconds), reading.seconds)
            if time_s > reading.seconds:
                return
            yield time_s, Image.fromarray(picture())

    frames = open_live(word, timeout_s=reading.stall_s).frames(threading.Event())
    with limits.stage("record"), closing(frames):  # type: ignore[type-var]
        encode_h264(recorded(), path)
