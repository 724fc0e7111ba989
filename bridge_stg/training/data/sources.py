"""Read the sources of a recipe, which are datasets of evaluation/, as clips: a medium with all its queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge_stg.evaluation.datasets.registry import read_dataset
from bridge_stg.evaluation.samples import Dataset, Sample
from bridge_stg.training.recipe import Source

OWN = "jsonl"
"""The dataset whose faults are the user's own, so that they stop the training instead of being left out."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A video, an image, a folder of frames or a part of a video, with its queries.

    Attributes:
        source: number of its source in the recipe.
        dataset: name of the source's dataset.
        media: its path; None if it was not found.
        name: the path, or the name by which the medium was searched for.
        queries: samples of this medium with the same part and stream.
        part: start and end in seconds of the part of the video to use; None for all of it.
        frame_rate: frames per second of a folder of frames.
        stream: video stream of the file to use; None: the first.
    """

    source: int
    dataset: str
    media: Path | None
    name: str
    queries: tuple[Sample, ...]
    part: tuple[float, float] | None = None
    frame_rate: float | None = None
    stream: int | None = None


def source_name(source: Source) -> str:
    """Return how messages call a source: its dataset and first annotation file."""
    return f"{source.dataset} ({source.annotations[0] if source.annotations else 'no annotations'})"


def read_source(source: Source) -> Dataset:
    """Return all samples of a source. Raises AnnotationError."""
    media = None if source.media is None else Path(source.media)
    return read_dataset(source.dataset, [*map(Path, source.annotations)], media, split=source.split)


def read_clips(sources: Sequence[Source]) -> list[Clip]:
    """Return the clips of all sources, in the order of their files. Raises AnnotationError."""
    clips = []
    for number, source in enumerate(sources):
        by_clip: dict[tuple[object, ...], list[Sample]] = {}
        for sample in read_source(source).chosen(limit=source.limit):
            key = (sample.media, sample.media_name, sample.clip, sample.frame_rate, sample.stream)
            by_clip.setdefault(key, []).append(sample)
        clips += [
            Clip(
                number, source.dataset, first.media, str(first.media or first.media_name), tuple(queries),
                part=first.clip, frame_rate=first.frame_rate, stream=first.stream,
            )
            for queries in by_clip.values()
            for first in queries[:1]
        ]  # fmt: skip
    return clips
