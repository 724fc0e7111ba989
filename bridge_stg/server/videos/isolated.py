"""Read the files of clients in subprocesses, so that a damaged or malicious file cannot harm the server.

The server receives plain arrays. A file whose subprocess crashes, hangs or needs too much memory is rejected.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import EngineError, VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.memory import gigabytes
from bridge_stg.runtime.host.packages import load_package
from bridge_stg.runtime.host.worker import ENDED, Worker
from bridge_stg.runtime.live.source import TimesFrom
from bridge_stg.runtime.search.reader import AllFrames, FileReader, FileSource
from bridge_stg.runtime.video.decoder import Decoder, check_path, limit_frames
from bridge_stg.runtime.video.file import FileFacts, FrameLog, VideoFile
from bridge_stg.runtime.video.image import DAMAGE, StillImage, read_image
from bridge_stg.runtime.video.open import check_no_stream
from bridge_stg.runtime.video.playback import Playback, play
from bridge_stg.runtime.video.sampling import CoarseSampler
from bridge_stg.runtime.video.source import Samples, VideoSource
from bridge_stg.runtime.video.stream import FrameStream
from bridge_stg.runtime.video.token_budget import Budget
from bridge_stg.server.http.errors import ApiError, api_error, logger
from bridge_stg.server.settings import MediaLimits
from bridge_stg.server.videos.probe import FileInfo, probe
from bridge_stg.server.videos.stills import still

LAST = 2
"""Frames at the end of a file whose pixels a sampler may still need after the last one was read."""


def preload() -> None:
    """Import the packages that workers need, once, in their template."""
    load_package("av", "av")
    load_package("PIL.ImageOps", "pillow")
    load_package("PIL.Image", "pillow").init()


@dataclass(frozen=True)
class IsolatedMedia:
    """A file that only subprocesses read.

    Every method raises VideoError, also if its subprocess ends (`video.decoder_failed`), and EngineError if the machine
    cannot start one.
    """

    path: str
    limits: MediaLimits
    stream: int | None = None  # see `CallOptions`

    def probe(self, name: str) -> FileInfo:
        """Inspect the file, called `name` in messages. Raises ApiError as `probe.probe` does."""
        try:
            with closing(self.start()) as worker:
                found = self.call(worker, "probe", name)
        except VideoError as error:
            raise api_error(error, path=self.path, name=name) from error
        if "status" in found:
            raise ApiError(**found)
        return FileInfo(**found)

    def still(self, info: FileInfo, time_s: float) -> tuple[bytes, float]:
        """Return the frame displayed at a time; see `stills.still`."""
        with closing(self.start()) as worker:
            jpeg, at = self.call(worker, "still", info, time_s)
        return bytes(jpeg), at

    @contextmanager
    def play(self) -> Iterator[Playback]:
        """Play the file; see `playback.play`."""
        with closing(self.start()) as worker:
            found = self.call(worker, "play")
            frames = _Frames(self, worker)
            pictures = ((time_s, partial(np.asarray, rgb)) for time_s, rgb in frames)
            yield Playback(pictures, last_end_s=lambda: frames.end_s, **found)

    def live(self, length_s: float) -> FileSource:
        """Return the video as the source of a search; frames that are not sampled stay in the subprocess."""
        times_from, reader = TimesFrom(), IsolatedReader(self)

        def frames(stop: threading.Event) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
            facts = yield from reader.frames(stop)
            if facts is not None:
                times_from.clock, times_from.stream = facts.clock, facts.stream

        return FileSource(self.path, False, frames, length_s, times_from, reader)

    def open_source(self, spec: ModelSpec, *, buffer_frames: int, budget: Budget) -> VideoSource:
        """Open the file for a Grounder; see `open.open_source`."""
        worker, found = self.open(spec, budget)
        if "size" in found:
            return _IsolatedFile(self, worker, spec, budget, size=found["size"], stream=found["stream"])
        frames = _Frames(self, worker)
        if not found["is_image"]:
            return FrameStream(frames, spec, buffer_frames=buffer_frames, budget=budget, name=self.path)
        with closing(worker):
            return StillImage(next(iter(frames))[1], spec, budget=budget, name=self.path)

    def open(self, spec: ModelSpec, budget: Budget) -> tuple[Worker, dict[str, Any]]:
        """Return a worker that has opened the file, with the `size` (width, height) of a video, or `is_image`."""
        worker = self.start()
        try:
            # The part of the budget for text is needed when samples are grouped, which happens in this process.
            known = {name: getattr(budget, name) for name in ("visual_tokens", "positions", "capacity")}
            return worker, self.call(worker, "open", spec, known)
        except BaseException:
            worker.close()
            raise

    def call(self, worker: Worker, method: str, *arguments: Any, limits: Limits | None = None) -> Any:
        """Call a method of `_Reader` in a worker. Raises VideoError also if the worker ends."""
        try:
            return worker.call(method, *arguments, limits=limits)
        except EngineError as error:
            if error.code != ENDED:
                raise
            logger.warning("%s: %s", self.path, error)
            most = gigabytes(self.limits.decode_bytes)
            message = f"{self.path} cannot be decoded: {error}; it may use at most {most}. Convert it to H.264 again"
            raise VideoError("video.decoder_failed", message) from error

    def start(self) -> Worker:
        """Start a worker."""
        given = self.path, self.limits, self.stream
        return Worker(f"{__name__}:_Reader", *given, memory_bytes=self.limits.decode_bytes)


class IsolatedReader(FileReader):
    """Reads a file in workers."""

    def __init__(self, media: IsolatedMedia) -> None:
        super().__init__(media.path, media.stream)
        self._media = media
        self._worker: Worker | None = None  # that seeks in the file

    def frames(self, stop: threading.Event) -> AllFrames:
        """Yield all frames; see `FileReader.frames`."""
        call = self._media.call
        with closing(self._media.start()) as worker:
            call(worker, "log")
            last: deque[Callable[[], np.ndarray]] = deque(maxlen=LAST)
            while (found := call(worker, "next_frame")) is not None:
                if stop.is_set():
                    return None
                number, time_s = found
                last.append(cache(partial(call, worker, "picture", number)))
                yield time_s, last[-1]
            for picture in last:
                picture()  # the reader may still sample it when the worker has ended
            facts = call(worker, "facts")
            return FileFacts(**{**facts, "size": tuple(facts["size"])})

    def pictures(
        self, facts: FileFacts, spec: ModelSpec, indices: np.ndarray, size: tuple[int, int], limits: Limits
    ) -> np.ndarray:
        """Return frames by index; see `FileReader.pictures`."""
        if self._worker is None or self._worker.ended:
            self._worker = self._media.start()
            self._media.call(self._worker, "know", spec, facts)
        found: np.ndarray = self._media.call(self._worker, "pictures", indices, size, limits=limits)
        return found

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()


class _Frames:
    """All frames of a worker as (time in seconds, RGB frame), to be read once; `end_s` is the end of the last one."""

    def __init__(self, media: IsolatedMedia, worker: Worker) -> None:
        self._media, self._worker, self.end_s = media, worker, None

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        with closing(self._worker) as worker:
            while (found := self._media.call(worker, "frame")) is not None:
                yield found[0], found[1]
            self.end_s = self._media.call(worker, "end")


class _IsolatedFile(VideoSource):
    """A `VideoFile` in a worker; if it has ended, another one is started."""

    read_ahead = True

    def __init__(
        self, media: IsolatedMedia, worker: Worker, spec: ModelSpec, budget: Budget, *, size: tuple[int, int],
        stream: int | None,
    ) -> None:  # fmt: skip
        self._media, self._worker, self._budget, self._closed, self.stream = media, worker, budget, False, stream
        super().__init__(spec, width=size[0], height=size[1], name=media.path, budget=budget)

    def close(self) -> None:
        """End the worker; frames can no longer be read from it."""
        self._closed = True
        self._worker.close()

    def _scan(self, limits: Limits) -> CoarseSampler:
        found = self._call("scan", limits)
        self._times, self._duration_s, self.tolerance_s = found["times"], found["duration_s"], found["tolerance_s"]
        self.clock, sampler = found["clock"], self._sampler()
        sampler.resume([found["frames"][place] for place in found["places"]], found["stride"])
        return sampler

    def _fetch(self, times: np.ndarray, limits: Limits) -> Samples:
        return Samples(**self._call("fine", limits, times))

    def _call(self, method: str, limits: Limits, *arguments: Any) -> Any:
        if self._closed:
            raise VideoError("video.closed", f"{self.name} is closed; open it again to read frames from it")
        if self._worker.ended:
            self._worker, _ = self._media.open(self._spec, self._budget)
        return self._media.call(self._worker, method, *arguments, limits=limits)


class _Reader:
    """Reads one file in a worker."""

    def __init__(self, path: str, limits: MediaLimits, stream: int | None) -> None:
        self._path, self._limits, self._stream, self._stack = path, limits, stream, ExitStack()
        self._frames: Iterator[tuple[float, np.ndarray]] = iter(())
        self._file: VideoFile | None = None
        limit_frames(limits.max_pixels)
        pillow = load_package("PIL.Image", "pillow")
        pillow.__dict__["MAX_IMAGE_PIXELS"] = (limits.max_pixels + 1) // 2  # Pillow rejects more than twice as many
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)

    def probe(self, _: Limits, name: str) -> Any:
        try:
            return probe(self._path, name, self._limits)
        except DAMAGE:
            found = ApiError(422, "video.unreadable", f"{name} cannot be read as a video or image.")
        except ApiError as error:
            found = error
        return {"status": found.status_code, "code": found.code, "message": found.detail}

    def still(self, _: Limits, info: FileInfo, time_s: float) -> Any:
        return still(self._path, info, time_s, self._stream)

    def play(self, _: Limits) -> Any:
        source = self._stack.enter_context(play(self._path, self._stream))
        self._source, self._frames = source, source.frames
        return {"duration_s": source.duration_s, "is_image": source.is_image}

    def frame(self, _: Limits) -> Any:
        return next(self._frames, None)

    def log(self, _: Limits) -> Any:
        """Begin to read all frames by `next_frame`, after which there are `facts`."""
        decoder = self._stack.enter_context(closing(Decoder(self._path, self._stream)))
        self._log = FrameLog(decoder)
        read = ((self._log.add(frame), partial(decoder.converter.rgb, frame)) for frame in decoder.frames())
        self._pictures = enumerate(read)
        self._shown: dict[int, Any] = {}

    def next_frame(self, _: Limits) -> Any:
        """Return number and time of the next frame, whose `picture` is there until the second one after it."""
        found = next(self._pictures, None)
        if found is None:
            return None
        number, (time_s, picture) = found
        self._shown.pop(number - 3, None)
        self._shown[number] = picture
        return number, time_s

    def picture(self, _: Limits, number: int) -> Any:
        return self._shown[number]()

    def end(self, _: Limits) -> Any:
        return self._source.last_end_s()

    def facts(self, _: Limits) -> Any:
        return self._log.facts()

    def know(self, _: Limits, spec: ModelSpec, facts: FileFacts) -> Any:
        self._file = VideoFile(self._path, spec, known=(facts, None))

    def pictures(self, limits: Limits, indices: np.ndarray, size: tuple[int, int]) -> Any:
        assert self._file is not None
        return self._file.pictures(indices, size, limits)

    def open(self, limits: Limits, spec: ModelSpec, budget: dict[str, Any]) -> Any:
        if read_image(check_path(self._path)) is not None:
            check_no_stream(self._stream, self._path)
            return self.play(limits)
        self._file = VideoFile(self._path, spec, budget=Budget(**budget), stream=self._stream)
        return {"size": [self._file.width, self._file.height], "stream": self._file.stream}

    def scan(self, limits: Limits) -> Any:
        file = self._file
        assert file is not None
        samples = file.samples(limits)
        items, samples.items = samples.items, []
        frames = {id(item): item for item in items}  # a frame shown for long is sampled repeatedly
        places = {key: place for place, key in enumerate(frames)}
        return {
            "frames": list(frames.values()),
            "places": [places[id(item)] for item in items],
            "stride": samples.stride,
            "times": file.frame_times,
            "clock": file.clock,
            "duration_s": file.duration_s,
            "tolerance_s": file.tolerance_s,
        }

    def fine(self, limits: Limits, times: np.ndarray) -> Any:
        assert self._file is not None
        return self._file.fine(times, limits)
