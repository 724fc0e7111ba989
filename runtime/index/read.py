"""Read a video for queries: sample its coarse frames and encode them, or take from an index what it has of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.opened_video import Chain, VideoFacts, check_image
from bridge_stg.runtime.chain.positions import VisualGrid
from bridge_stg.runtime.chain.prompt import Segment, video_budget, video_segment, visual_segment
from bridge_stg.runtime.chain.vision_pass import FineFeatures, coarse_tokens, merged_grid, on_device
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import CallKeywords, Cancel, Limits, Progress
from bridge_stg.runtime.index.coarse import get_coarse, put_coarse
from bridge_stg.runtime.index.fine import StoredMaps
from bridge_stg.runtime.index.index import VisualCache, VisualIndex
from bridge_stg.runtime.video.decoder import check_path
from bridge_stg.runtime.video.file import VideoFile
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.source import CoarseFrames, Openable, VideoSource
from bridge_stg.runtime.video.token_budget import Budget, CoarseChoice

Video: TypeAlias = "str | os.PathLike[str] | np.ndarray | Iterable[tuple[float, np.ndarray]] | Openable"
"""A path of a video or image; an image uint8 [H, W, 3] in RGB; or an iterable of (time in seconds, such an image).

Images of an iterable may be arrays of any library that implements DLPack; if the graphs run on a GPU, images on that
GPU are not copied to the host."""

FINE_TOGETHER = 64
"""Fine frames that `ReadVideo.index` reads and encodes before it stores them; a multiple of the index's blocks."""


class OptionKeywords(CallKeywords, total=False):
    """The keyword arguments of calls that read a video; see `CallOptions`."""

    buffer_frames: int
    max_visual_tokens: int | None
    stream: int | None
    image_only: bool


@dataclass(frozen=True)
class CallOptions:
    """The options of one call that reads a video.

    Attributes:
        deadline_s: seconds after which the call stops; None for no deadline.
        cancel: a `threading.Event`, or a callable that returns True to stop.
        progress: called as progress(stage, done, total); total is None where it is not known.
        buffer_frames: maximum number of frames of an iterable to keep for the spatial pass; others are dropped evenly.
        max_visual_tokens: maximum visual tokens of coarse frames; a longer video is read in smaller frames, then at a
            lower rate (see `Grounding.coarse`). None: the model's own limits.
        stream: index of the video stream to read, counted among all streams of the file; None: the one that FFmpeg
            selects (marked as default, then of the highest bit rate), never a cover picture.
        image_only: whether a video is an error before its frames are decoded, for calls of `locate`.
    """

    deadline_s: float | None = None
    cancel: Cancel | None = None
    progress: Progress | None = None
    buffer_frames: int = 256
    max_visual_tokens: int | None = None
    stream: int | None = None
    image_only: bool = False

    def limits(self) -> Limits:
        """Return the limits of the call, whose clock starts now."""
        return Limits(deadline_s=self.deadline_s, cancel=self.cancel, progress=self.progress)


@dataclass(frozen=True)
class Indexed:
    """What `Grounder.index` stored of a file.

    Attributes:
        duration_s: length of the video in seconds.
        nbytes: bytes on disk of all that is stored of it for this model's vision encoder.
        reused: whether nothing had to be decoded or encoded.
    """

    duration_s: float
    nbytes: int
    reused: bool


@dataclass(frozen=True, eq=False)
class ReadVideo:
    """A video whose coarse frames have been read and encoded.

    Attributes:
        source: the video, which the caller closes.
        coarse: the coarse frames; without pixels if `reused`.
        choice: how they were chosen.
        segment: the video's part of the prompt.
        tokens: visual tokens [1+D, N+1, H] for it.
        cache: the index's cache of the file; None: there is none.
        reused: whether the tokens come from the index.
        features: the feature maps of fine frames, computed when they are needed.
    """

    source: VideoSource
    coarse: CoarseFrames
    choice: CoarseChoice
    segment: Segment
    tokens: Array
    cache: VisualCache | None
    reused: bool
    features: FineFeatures

    @property
    def facts(self) -> VideoFacts:
        """The facts of the opened video."""
        source, coarse = self.source, self.coarse
        return VideoFacts(
            source.name,
            (source.width, source.height),
            source.is_image,
            frame_times=source.frame_times,
            fine_grid=source.fine_grid(),
            sample_times=coarse.times,
            interval_s=coarse.interval_s,
            duration_s=coarse.duration_s,
            choice=self.choice,
            clock=source.clock,
            stream=source.stream,
        )

    def index(self, limits: Limits, *, fine: bool) -> Indexed:
        """Store all fine frames too, if `fine` is set, and return what is stored.

        Raises VideoError if the source is not a video file.
        """
        if self.cache is None or not isinstance(self.source, VideoFile):
            message = f"{self.source.name} is not a video file; only video files are indexed"
            raise VideoError("index.not_a_video", message)
        places = np.arange(len(self.source.fine_grid()) if fine else 0)
        for start in range(0, len(places), FINE_TOGETHER):
            self.features.at(places[start : start + FINE_TOGETHER], limits)
        self.features.clear()
        reused = self.reused and "decode_fine" not in limits.timings
        return Indexed(self.coarse.duration_s, self.cache.nbytes, reused)


class VideoReader:
    """Reads videos for the model of a chain.

    Args:
        chain: sessions and rules.
        max_answer_tokens: maximum tokens of an answer of text heads.
        index: where visual tokens of video files are kept; None: nowhere.
        unchanged_tolerance: see `Grounder`.
        feature_budget_bytes: see `Grounder`.
    """

    def __init__(
        self, chain: Chain, *, max_answer_tokens: int, index: VisualIndex | None, unchanged_tolerance: float,
        feature_budget_bytes: int,
    ) -> None:  # fmt: skip
        self._chain, self._index = chain, index
        self._answer_tokens = max_answer_tokens if chain.heads == "text" else 0
        self._unchanged_tolerance, self._feature_budget_bytes = unchanged_tolerance, feature_budget_bytes

    @property
    def _capacity(self) -> int | None:
        """Positions of a fixed KV cache; None: not fixed. Read late, since the session may still be opening."""
        return self._chain.language_model.graph.ranges.get("S", (1, None))[1]

    def read(self, video: Video, spec: ModelSpec, options: CallOptions, limits: Limits) -> ReadVideo:
        """Sample and encode the frames, or take from the index what it has of them.

        `spec` is the model's, with the messages before the video. Raises BridgeError as `Grounder.ground` does.
        """
        chain, requested = self._chain, options.max_visual_tokens
        with limits.stage("decode_video"):
            budget = self.budget(spec, requested)
            cache, found, key = None, None, dict[str, Any]()
            if self._index is not None and isinstance(video, (str, os.PathLike)):
                # All that the choice of coarse frames depends on, and which groups are not encoded again.
                key = {
                    "spec": dataclasses.asdict(spec), "capacity": self._capacity, "answer_tokens": self._answer_tokens,
                    "max_visual_tokens": requested, "stream": options.stream, "unchanged": self._unchanged_tolerance,
                }  # fmt: skip
                video = check_path(os.fspath(video))
                cache = self._index.cache_of(video)
                found = get_coarse(cache, key, video, spec, budget=budget)
            source: VideoSource
            if found is not None:
                source = found[0]
            else:
                device, buffer_frames = chain.vision_encoder.device, options.buffer_frames
                source = open_source(
                    video, spec, buffer_frames=buffer_frames, budget=budget, device=device, stream=options.stream
                )
        try:
            if options.image_only:
                check_image(source.name, is_image=source.is_image)
            with limits.stage("decode_video"):
                coarse, grid = source.coarse(limits), source.fine_grid()
            segment, frames, choice = self._segment(spec, coarse), coarse.frames, coarse.choice
            if source.is_image and chain.heads == "text":
                segment, frames, choice = self._image_prompt(spec, source, choice, limits)
            with limits.stage("vision_coarse"):
                if found is not None:
                    tokens = on_device(found[1], chain.vision_encoder)
                else:
                    tolerance = self._unchanged_tolerance
                    tokens = coarse_tokens(
                        chain.vision_encoder, spec, frames, report=limits.report, tolerance=tolerance
                    )
                    if cache is not None and isinstance(source, VideoFile):
                        put_coarse(cache, key, source, arrays.on_host(tokens))
            features = FineFeatures(
                chain.vision_encoder,
                spec,
                read=lambda places, limits: source.fine(grid[places], limits),
                budget_bytes=self._feature_budget_bytes,
                as_tokens=chain.heads == "text",
                read_ahead=source.fine_size if source.read_ahead else None,
                stored=self._stored_maps(cache, source),
            )
            return ReadVideo(source, coarse, choice, segment, tokens, cache, found is not None, features)
        except BaseException:
            source.close()
            raise

    def budget(self, spec: ModelSpec, max_visual_tokens: int | None) -> Budget:
        """Return the budget of coarse frames, within a fixed KV cache and with room for the answer."""
        return video_budget(
            self._chain.tokenizer, spec, max_visual_tokens, capacity=self._capacity, answer_tokens=self._answer_tokens
        )

    def _stored_maps(self, cache: VisualCache | None, source: VideoSource) -> StoredMaps | None:
        """Return where fine feature maps of a video file are stored; None without an index."""
        if cache is None or not isinstance(source, VideoFile):
            return None
        grid = {"fps": self._chain.spec.frames.fine_fps, "size": source.fine_size, "stream": source.stream}
        return StoredMaps(cache, "fine-tokens" if self._chain.heads == "text" else "fine-maps", grid)

    def _image_prompt(
        self, spec: ModelSpec, source: VideoSource, choice: CoarseChoice, limits: Limits
    ) -> tuple[Segment, Array, CoarseChoice]:
        """Return the family's prompt of an image, the image at fine size as one group of frames, and this size."""
        assert spec.text is not None
        frames = arrays.repeat_new_axis(source.fine([0.0], limits).frames, spec.vision.temporal_patch_size)
        (rows, columns), text = merged_grid(frames, spec), spec.text
        grid = VisualGrid(1, rows, columns)
        segment = visual_segment(self._chain.tokenizer, spec, text.image_head, text.image_token, grid)
        size = frames.shape[-2], frames.shape[-3]
        return segment, frames, dataclasses.replace(choice, size=size, tokens=rows * columns, limited_by=())

    def _segment(self, spec: ModelSpec, coarse: CoarseFrames) -> Segment:
        """Return the video's part of the prompt. Raises VideoError if the model has too few positions for it."""
        grid, most = merged_grid(coarse.frames, spec), spec.language.max_positions
        segment = video_segment(self._chain.tokenizer, spec, coarse.group_times, grid, interval_s=coarse.interval_s)
        if segment.next_position > most:
            message = f"one group of the smallest frames needs {segment.next_position} positions; the model has {most}"
            raise VideoError("video.exceeds_prompt", message)
        return segment
