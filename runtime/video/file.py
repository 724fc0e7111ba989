"""Video files: one pass over all frames for the coarse samples, then exact seeking to the fine frames."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.cpus import usable_cpus
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.memory import trim_heap
from bridge_stg.runtime.host.threads import for_each
from bridge_stg.runtime.video.decoder import Decoder
from bridge_stg.runtime.video.frame import FrameConverter, fingerprint, resize
from bridge_stg.runtime.video.sampling import CoarseSampler, grid_places
from bridge_stg.runtime.video.source import CoarseFrames, Samples, VideoSource
from bridge_stg.runtime.video.token_budget import Budget

KEPT_BYTES = 64 * 2**20  # most bytes of decoded frames to keep for the fine pass, which otherwise decodes them again
RESIZED_TOGETHER = 16  # decoded frames that several threads resize at once
SEEK_GAIN_FRAMES = 16  # a seek must skip more to pay off: it finds a key frame and refills the decoder


@dataclass(frozen=True, eq=False)
class FileFacts:
    """What one pass over a video file found out apart from pixels, enough to seek to its frames later.

    Attributes:
        size: width and height as displayed, in pixels.
        stream: index of the video stream; None if the file has only one.
        clock: where the times come from, one of `decoder.CLOCKS`.
        tolerance_s: see `VideoSource.tolerance_s`.
        duration_s: seconds from the first frame to the end of the last one.
        regular: whether every frame has a time stamp and these increase.
        seekable: whether seeking returns the same frames as reading from the start.
        times: float64 [N], times of all frames in seconds.
        pts: int64 [N], their time stamps in ticks.
        keys: int64 [K], indices of the key frames.
        prints: uint32 [N], checksums of the frames; see `frame.fingerprint`.
    """

    size: tuple[int, int]
    stream: int | None
    clock: str
    tolerance_s: float
    duration_s: float
    regular: bool
    seekable: bool
    times: np.ndarray
    pts: np.ndarray
    keys: np.ndarray
    prints: np.ndarray


class FrameLog:
    """Notes the facts of a video file while all its frames are decoded in order."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._timeline = decoder, decoder.timeline()
        self.tolerance_s = self._timeline.tolerance_s
        self._keys, self._prints = [0], array("I")
        self._size = (0, 0)

    def add(self, frame: Any) -> float:
        """Note the next frame, and return its time in seconds."""
        if not self._timeline.times:
            height, width = self._decoder.converter.size(frame)
            self._size = width, height
        elif frame.key_frame:
            self._keys.append(len(self._timeline.times))
        self._prints.append(fingerprint(frame))
        return self._timeline.add(frame)

    def facts(self) -> FileFacts:
        """Return the facts, after the last frame. Raises VideoError if there was none."""
        decoder, timeline = self._decoder, self._timeline
        if not timeline.times:
            raise decoder.no_frames()
        return FileFacts(
            size=self._size,
            stream=decoder.stream,
            clock=timeline.clock,
            tolerance_s=self.tolerance_s,
            duration_s=timeline.end_s,
            regular=timeline.regular,
            # Without errors and with correct times, a time identifies a frame; otherwise only its index from the start.
            seekable=decoder.seekable and timeline.regular and not decoder.damaged and len(self._keys) > 1,
            times=np.frombuffer(timeline.times, np.float64),
            pts=np.frombuffer(timeline.pts, np.int64),
            keys=np.asarray(self._keys),
            prints=np.frombuffer(self._prints, np.uint32),
        )


class VideoFile(VideoSource):
    """A video file, decoded once; fine frames beyond `KEPT_BYTES` again. Raises VideoError if it cannot be read.

    `known` is what an earlier pass over the same file found out, and its coarse frames, if they are needed; the file is
    then opened when a frame is read, and not decoded as a whole.
    """

    read_ahead = True

    def __init__(
        self,
        path: str,
        spec: ModelSpec,
        *,
        budget: Budget | None = None,
        stream: int | None = None,
        known: tuple[FileFacts, CoarseFrames | None] | None = None,
    ) -> None:
        self.kept = KeptFrames(spec.frames.fine_fps, KEPT_BYTES)
        self.seekable = self._closed = False  # seekable: seeking returns the same frames as reading from the start
        self._converter: FrameConverter | None = None
        self._decoder: Decoder | None = None
        self._frames: Iterator[Any] | None = None
        if known is not None:
            facts, coarse = known
            super().__init__(spec, width=facts.size[0], height=facts.size[1], name=path, budget=budget)
            self._use(facts)
            if coarse is not None:
                self._coarse, self._samples = coarse, self._sampler()
            return
        self._decoder = self._open(path, stream)
        try:
            self._frames = self._decoder.frames()
            first = next(self._frames, None)
            if first is None:
                raise self._decoder.no_frames()
            self._converter = self._decoder.converter
            height, width = self._converter.size(first)
            super().__init__(spec, width=width, height=height, name=path, budget=budget)
        except BaseException:
            self._decoder.close()
            raise
        self._frames = chain([first], self._frames)
        self.stream = self._decoder.stream

    @property
    def facts(self) -> FileFacts:
        """What the pass over the file found out; reads the video if necessary."""
        self.samples()
        return self._facts

    def _use(self, facts: FileFacts) -> None:
        self._facts, self._times, self._duration_s = facts, facts.times, facts.duration_s
        self.stream, self.clock, self.tolerance_s = facts.stream, facts.clock, facts.tolerance_s
        self.seekable = facts.seekable  # until a seek shows another frame

    def _open(self, path: str, stream: int | None) -> Decoder:
        return Decoder(path, stream)

    def close(self) -> None:
        """Close the file; frames can no longer be read from it."""
        self._closed, self._frames = True, None
        self.kept.clear()
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        trim_heap()  # freed frames would stay in the heaps of threads: hundreds of megabytes

    def _scan(self, limits: Limits) -> CoarseSampler:
        sampler = self._read_all(None, limits)
        if sampler.undersized:  # the file is shorter than its header says
            sampler = self._read_all(self._duration_s, limits)
        return sampler

    def _read_all(self, length_s: float | None, limits: Limits) -> CoarseSampler:
        """Decode the whole video once; `length_s` is its length, if it is known better than from the file's header."""
        if self._decoder is None or self._frames is None:  # an earlier pass was interrupted
            self._frames = self._reopen().frames()
        decoder, frames = self._decoder, self._frames
        assert decoder is not None
        self._frames, last = None, None
        self.kept = kept = KeptFrames(self._spec.frames.fine_fps, KEPT_BYTES)
        assert self._converter is not None
        log, sampler = FrameLog(decoder), self._sampler(length_s or decoder.duration_s)
        self.tolerance_s, batch = log.tolerance_s, _Batch(sampler, self._converter)

        def keep(index: int, until: float) -> None:
            batch.offer(last, until - self.tolerance_s)
            kept.offer(index, last, until - self.tolerance_s)

        index, time = -1, 0.0
        for index, frame in enumerate(frames):
            time = log.add(frame)
            if last is not None:
                keep(index - 1, time)
            last = frame
            limits.report(time, decoder.duration_s)
        self._use(log.facts())
        keep(index, max(self._duration_s, time + 2 * self.tolerance_s))
        batch.fill()
        return sampler

    def _fetch(self, times: np.ndarray, limits: Limits) -> Samples:
        indices = np.maximum(np.searchsorted(self._times, times + self.tolerance_s, side="right") - 1, 0)
        return Samples(frames=self.pictures(indices, self.fine_size, limits), times=self._times[indices])

    def pictures(self, indices: np.ndarray, size: tuple[int, int], limits: Limits) -> np.ndarray:
        """Return the frames with these indices [N ≥ 1], any order, uint8 [N, *size, 3], of a file that has been read.

        `size` is (height, width) in pixels. Raises VideoError if the file changed, or is closed.
        """
        wanted, places = np.unique(indices, return_inverse=True)
        frames = np.empty((len(wanted), *size, 3), np.uint8)

        def put(numbered: tuple[int, Any]) -> None:
            assert self._converter is not None  # since a frame was decoded
            frames[numbered[0]] = resize(self._converter.rgb(numbered[1]), size)

        numbered = enumerate(self._frames_at(wanted, limits))
        while some := list(islice(numbered, RESIZED_TOGETHER)):
            for_each(put, some, threads=usable_cpus())
        return frames[places.reshape(-1)]

    def _frames_at(self, wanted: np.ndarray, limits: Limits) -> Iterator[Any]:
        """Yield the decoded frames with these increasing indices, each from the nearest key frame before it."""
        walk: Iterator[tuple[int, Any]] | None = None
        at = -1
        for index in wanted:
            if (kept := self.kept.frames.get(int(index))) is not None:
                limits.check()
                yield kept
                continue
            key = self._facts.keys[np.searchsorted(self._facts.keys, index, side="right") - 1]
            if walk is None or (self.seekable and key > at + SEEK_GAIN_FRAMES):
                walk = self._walk_to(int(index), limits)
            while True:
                at, frame = next((item for item in walk if item[0] >= index), (-1, None))
                if not self.seekable or (at == index and self._facts.prints[at] == fingerprint(frame)):
                    break
                # Seeking returns other frames than reading from the start: do not seek in this file again.
                self.seekable = False
                walk = self._walk_to(int(index), limits)
            if at != index:
                text = f"{self.name} changed: its frame at {self._times[index]:.3f} s cannot be decoded; open it again"
                raise VideoError("video.changed", text)
            yield frame

    def _walk_to(self, index: int, limits: Limits) -> Iterator[tuple[int, Any]]:
        """Return (index, frame) pairs from a key frame at or before `index`, or from the start."""
        place, step = int(np.searchsorted(self._facts.keys, index, side="right")) - 1, 1
        while self.seekable and place > 0:
            decoder = self._decoder or self._reopen()
            walk = self._numbered(decoder.frames_from(int(self._facts.pts[self._facts.keys[place]])), limits, seek=True)
            first = next(walk, None)
            if first is not None and first[0] <= index:
                return chain([first], walk)
            place, step = place - step, 2 * step  # the seek landed late, as in containers without an index
        return self._numbered(self._reopen().frames(), limits, seek=False)

    def _numbered(self, frames: Iterator[Any], limits: Limits, *, seek: bool) -> Iterator[tuple[int, Any]]:
        """Number frames as in the whole video. After a seek, frames before the first key frame are skipped."""
        pts, trusted = self._facts.pts, not seek
        for count, frame in enumerate(frames):
            limits.check()
            index = count
            if self._facts.regular:
                index = -1 if frame.pts is None else int(np.searchsorted(pts, frame.pts))
                if not 0 <= index < len(pts) or pts[index] != frame.pts:
                    continue
            trusted = trusted or frame.key_frame
            if trusted:
                yield index, frame

    def _reopen(self) -> Decoder:
        if self._closed:
            raise VideoError("video.closed", f"{self.name} is closed; open it again to read frames from it")
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None
        self._decoder = self._open(self.name, self.stream)
        self._converter = self._converter or self._decoder.converter
        return self._decoder


class _Batch:
    """Frames for a sampler, which several threads resize at once."""

    def __init__(self, sampler: CoarseSampler, converter: FrameConverter) -> None:
        self._sampler, self._converter = sampler, converter
        self._waiting: list[tuple[Any, float]] = []
        self._places = 0

    def offer(self, frame: Any, until: float) -> None:
        """Add a frame that is shown up to `until` seconds, if it is shown at a point of the sampler's grid."""
        sampler, before = self._sampler, self._places
        self._places = max(before, grid_places(until, sampler.rate, sampler.stride) - len(sampler.items))
        if self._places > before:
            self._waiting.append((frame, until))
        if len(self._waiting) == RESIZED_TOGETHER:
            self.fill()

    def fill(self) -> None:
        """Fill the sampler with the waiting frames."""
        sampler, made = self._sampler, {}

        def make(place: int) -> np.ndarray:
            size = sampler.size  # it shrinks if the video is longer than expected
            if (place, size) not in made:
                made[place, size] = resize(self._converter.rgb(self._waiting[place][0]), size)
            return made[place, size]

        for_each(make, range(len(self._waiting)), threads=usable_cpus())
        for place, (_, until) in enumerate(self._waiting):
            sampler.fill(until, partial(make, place))
        self._waiting, self._places = [], 0


class KeptFrames:
    """Decoded frames of the fine grid of `rate` frames per second: all, or none if they do not fit the budget."""

    def __init__(self, rate: float, budget_bytes: int) -> None:
        self.frames: dict[int, Any] = {}
        self._rate, self._left = rate, budget_bytes
        self._next = 0

    def offer(self, index: int, frame: Any, until: float) -> None:
        """Keep a frame that is shown up to `until` seconds, if a free grid point is before that."""
        if self._left < 0 or self._next / self._rate >= until:
            return
        self._next = grid_places(until, self._rate)
        self._left -= sum(plane.buffer_size for plane in frame.planes)
        self.frames[index] = frame
        if self._left < 0:
            self.frames.clear()

    def clear(self) -> None:
        """Drop all frames, and keep no more."""
        self.frames.clear()
        self._left = -1
