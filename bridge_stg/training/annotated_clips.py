"""Read a user's annotations as clips for training, and check them against the media before training starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bridge_stg.evaluation.datasets.jsonl import Annotation, read_annotations
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.prompt import check_query
from bridge_stg.runtime.errors import AnnotationError, QueryError
from bridge_stg.runtime.video.open import open_source
from bridge_stg.training.clip_batches import Clip


def read_clips(annotations: Path, media: Path) -> list[Clip]:
    """Return the annotated media with their queries, in the order of the file; the span of an image is 0 to 1."""
    if not media.is_dir():
        message = f"{media}: no such folder; expected the folder that the annotations' paths are relative to"
        raise AnnotationError("annotation.no_media_folder", message)
    by_media: dict[str, list[Annotation]] = {}
    for annotation in read_annotations(annotations):
        present = annotation.task == "image" and annotation.present
        query = replace(annotation, span=(0.0, 1.0)) if present else annotation
        by_media.setdefault(annotation.media, []).append(query)
    missing = [found[0] for name, found in by_media.items() if not (media / name).is_file()]
    if missing:
        more = f", and {len(missing) - 1} more media are missing" if len(missing) > 1 else ""
        message = f"{missing[0].where}: {media / missing[0].media} is not a file{more}; choose another --media"
        raise AnnotationError("annotation.missing_media", message)
    return [Clip(media / name, tuple(found)) for name, found in by_media.items()]


def check_clips(clips: Iterable[Clip], spec: ModelSpec) -> None:
    """Check queries and boxes against the media, without decoding all frames. Raises AnnotationError."""
    for clip in clips:
        with open_source(clip.path, spec) as source:
            width, height = source.width, source.height
        for query in clip.queries:
            try:
                check_query(spec.prompt, query.query)
            except QueryError as error:
                raise AnnotationError("annotation.bad_field", f"{query.where}: the field 'query': {error}") from None
            boxes = query.boxes
            outside = (boxes[:, 2:] <= 0).any(1) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
            if outside.any():
                box = [round(float(side), 1) for side in boxes[outside.argmax()]]
                found = f"{query.where}: the field 'boxes': {box} is outside of {clip.path} ({width} × {height} pixels)"
                raise AnnotationError("annotation.bad_field", f"{found}; expected left, top, right, bottom in pixels")
