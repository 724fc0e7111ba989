"""Check all annotations and media before a training, and list the clips with their lengths."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import AnnotationError, VideoError
from bridge_stg.runtime.host.cpus import usable_cpus
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.training.data.checks import check_sample
from bridge_stg.training.data.media import Medium, read_medium
from bridge_stg.training.data.micro_batch import Skipped
from bridge_stg.training.data.sources import OWN, Clip, source_name
from bridge_stg.training.recipe import Source

LISTED = 3  # media and faults that the summary names for each source


@dataclass(frozen=True)
class ClipSize:
    """The lengths of a clip that determine its time and memory.

    Attributes:
        medium: what is known of its medium.
        groups: groups of coarse frames at the model's own rate.
        tokens: visual tokens of these, at most the spec's `max_visual_tokens`.
        fine_frames: frames of its fine grid.
        fine_tokens: visual tokens of one fine frame.
    """

    medium: Medium
    groups: int
    tokens: int
    fine_frames: int
    fine_tokens: int


@dataclass(frozen=True, eq=False)
class Index:
    """The clips of a training that can be used.

    Attributes:
        names: names of the sources, in the order of the recipe.
        weights: their weights.
        clips: clips with at least one query, in the order of the sources.
        sizes: size of each clip.
        missing: by source, the media that were not found.
        broken: by source, the media that cannot be opened, or have no valid query.
        faults: by source, the queries of published datasets that are left out, with the place of each.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    clips: tuple[Clip, ...]
    sizes: tuple[ClipSize, ...]
    missing: tuple[tuple[Skipped, ...], ...]
    broken: tuple[tuple[Skipped, ...], ...]
    faults: tuple[tuple[Skipped, ...], ...]

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """All media that are missing or broken."""
        return tuple(one for by_source in (self.missing, self.broken) for found in by_source for one in found)

    @property
    def digest(self) -> str:
        """SHA-256 of what a mixture depends on: the clips in their order, with their queries."""
        values = [
            (clip.source, clip.name, clip.part, [(sample.id, sample.task, sample.query) for sample in clip.queries])
            for clip in self.clips
        ]
        return hashlib.sha256(json.dumps([values, self.weights]).encode()).hexdigest()

    def summary(self) -> str:
        """Return a text with the number of clips and queries of each source, and what is missing."""
        clips = Counter(clip.source for clip in self.clips)
        queries: Counter[int] = Counter()
        for clip in self.clips:
            queries[clip.source] += len(clip.queries)
        lines = []
        for number, name in enumerate(self.names):
            lines.append(f"{name}: {clips[number]:,} clips, {queries[number]:,} queries")
            for found, what in (
                (self.missing[number], "media not found"), (self.broken[number], "media cannot be used"),
                (self.faults[number], "queries left out"),
            ):  # fmt: skip
                if found:
                    lines.append(f"  {len(found):,} {what}:")
                    lines += [f"    {one.media}: {one.reason}" for one in found[:LISTED]]
                    lines += [f"    … and {len(found) - LISTED:,} more"] if len(found) > LISTED else []
        return "\n".join(lines)


def check_clips(
    clips: Sequence[Clip], sources: Sequence[Source], spec: ModelSpec, *, max_broken: float = 0.0,
    progress: Callable[[int, int], object] | None = None,
) -> Index:  # fmt: skip
    """Open every medium without decoding all of it, and check every query, span and box against it.

    Args:
        clips: the clips of the sources.
        sources: the sources of the recipe.
        spec: rules of the model's frames and prompt.
        max_broken: share of clips, over all sources, whose media may be missing or broken.
        progress: called as progress(done, total) after each clip.

    Raises:
        AnnotationError: a query of the user's own annotations is invalid, more clips than `max_broken` are missing or
            broken, or a source has no clip.
    """
    missing: list[list[Skipped]] = [[] for _ in sources]
    broken: list[list[Skipped]] = [[] for _ in sources]
    faults: list[list[Skipped]] = [[] for _ in sources]
    used: list[Clip] = []
    sizes: list[ClipSize] = []
    with ThreadPoolExecutor(usable_cpus(), thread_name_prefix="bridge-stg-index") as executor:
        results = executor.map(lambda clip: _checked(clip, spec), clips)
        try:
            for done, (clip, found) in enumerate(zip(clips, results), 1):
                faults[clip.source] += found.faults
                if found.size is not None:
                    used.append(found.clip)
                    sizes.append(found.size)
                else:
                    (missing if clip.media is None else broken)[clip.source].append(Skipped(clip.name, found.reason))
                if progress is not None:
                    progress(done, len(clips))
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    index = Index(
        names=tuple(map(source_name, sources)), weights=tuple(source.weight for source in sources), clips=tuple(used),
        sizes=tuple(sizes), missing=tuple(map(tuple, missing)), broken=tuple(map(tuple, broken)),
        faults=tuple(map(tuple, faults)),
    )  # fmt: skip
    check_share(index.skipped, len(clips), max_broken, code=_code(index))
    for number, name in enumerate(index.names):
        if not any(clip.source == number for clip in used):
            raise AnnotationError("annotation.no_media", f"{name}: no clip can be used; give another --media")
    return index


def check_share(skipped: Sequence[Skipped], total: int, most: float, *, code: str = "annotation.broken_media") -> None:
    """Raise AnnotationError if more than the share `most` of `total` clips was skipped; it names the first."""
    if len(skipped) > most * total:
        first = f"{skipped[0].media}: {skipped[0].reason}"
        found = f"{len(skipped):,} of {total:,} clips cannot be used, more than `max_broken` {most:g}"
        raise AnnotationError(code, f"{found}. The first is {first}")


def _code(index: Index) -> str:
    return "annotation.missing_media" if any(index.missing) else "annotation.broken_media"


@dataclass(frozen=True, eq=False)
class _Checked:
    clip: Clip
    size: ClipSize | None = None
    reason: str = ""
    faults: tuple[Skipped, ...] = ()


def _checked(clip: Clip, spec: ModelSpec) -> _Checked:
    if clip.media is None:
        return _Checked(clip, reason=f"is missing, which {clip.queries[0].where} needs; choose another folder of media")
    try:
        medium = read_medium(clip)
        size = _size(medium, spec)
    except (VideoError, OSError) as error:
        return _Checked(clip, reason=str(error))
    queries, faults = [], []
    for sample in clip.queries:
        try:
            check_sample(sample, medium, spec, strict=clip.dataset == OWN)
        except AnnotationError as error:
            if clip.dataset == OWN:
                raise
            faults.append(Skipped(sample.where, str(error)))
        else:
            queries.append(sample)
    if not queries:
        return _Checked(clip, reason=f"has no valid query: {faults[0].reason}", faults=tuple(faults))
    return _Checked(replace(clip, queries=tuple(queries)), size, faults=tuple(faults))


def _size(medium: Medium, spec: ModelSpec) -> ClipSize:
    """Return the size of a clip; one of unknown length counts as the longest."""
    frames, vision = spec.frames, spec.vision
    width, height = medium.size
    cell = (vision.patch_size * vision.merge_size) ** 2
    coarse, fine = (h * w // cell for h, w in frame_sizes(height, width, spec))
    if medium.kind == "image":
        groups = fine_frames = 1
    elif medium.duration_s is None:
        groups, fine_frames = frames.max_coarse_groups, frames.max_fine_frames
    else:
        groups = math.ceil(medium.duration_s * frames.coarse_fps / vision.temporal_patch_size)
        groups = max(1, min(groups, frames.max_coarse_groups))
        fine_frames = max(1, math.ceil(medium.duration_s * frames.fine_fps))
    tokens = min(groups * coarse, frames.max_visual_tokens or groups * coarse)
    return ClipSize(medium, groups, tokens, fine_frames, fine)


def lengths(index: Index, *, fine_frames: int, max_visual_tokens: int | None) -> np.ndarray:
    """Return the visual tokens of each clip, int64 [N]: coarse and fine frames as a training uses them."""
    most = max_visual_tokens or np.iinfo(np.int64).max
    return np.array(
        [min(size.tokens, most) + min(size.fine_frames, fine_frames) * size.fine_tokens for size in index.sizes],
        np.int64,
    )
