"""A person's annotations as clips to train on, checked against the media before any work is done."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bridge_stg.evaluation.datasets.jsonl import Annotation, read_annotations
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.prompt import check_query
from bridge_stg.runtime.errors import AnnotationError, QueryError
from bridge_stg.runtime.video.open import open_source
from bridge_stg.training.clip_batches import Clip, ClipQuestion


def read_clips(annotations: Path, media: Path) -> list[Clip]:
    """Return the annotated media with their questions, in the order of the file.

    Raises:
        AnnotationError: the annotations cannot be read, or media are missing.
    """
    if not media.is_dir():
        raise AnnotationError(
            "annotation.no_media_folder",
            f"{media}: no such folder; expected the folder that the annotations' paths start from",
        )
    by_media: dict[str, list[Annotation]] = {}
    for annotation in read_annotations(annotations):
        by_media.setdefault(annotation.media, []).append(annotation)
    missing = [found[0] for name, found in by_media.items() if not (media / name).is_file()]
    if missing:
        more = f", and {len(missing) - 1} more media are missing" if len(missing) > 1 else ""
        raise AnnotationError(
            "annotation.missing_media",
            f"{missing[0].where}: {media / missing[0].media} is no file{more}; give another --media",
        )
    return [Clip(media / name, tuple(map(question_of, found))) for name, found in by_media.items()]


def question_of(annotation: Annotation) -> ClipQuestion:
    """Return an annotation as a question; that of an image has a span that holds its only frame."""
    a = annotation
    span = (0.0, 1.0) if a.task == "image" and a.present else a.span
    return ClipQuestion(a.where, a.query, span, a.times, a.boxes, track=a.task == "track")


def check_clips(clips: Iterable[Clip], spec: ModelSpec) -> None:
    """Open every medium and check what can be checked without reading all of it.

    Raises:
        AnnotationError: a query cannot be asked, or a box lies outside of its picture.
        VideoError: a medium cannot be read.
    """
    for clip in clips:
        with open_source(clip.path, spec) as source:
            width, height = source.width, source.height
        for question in clip.questions:
            try:
                check_query(spec.prompt, question.query)
            except QueryError as error:
                raise AnnotationError("annotation.bad_field", f"{question.where}: the field 'query': {error}") from None
            boxes = question.boxes
            outside = (boxes[:, 2:] <= 0).any(1) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
            if outside.any():
                box = [round(float(side), 1) for side in boxes[outside.argmax()]]
                raise AnnotationError(
                    "annotation.bad_field",
                    f"{question.where}: the field 'boxes' holds {box}, which lies outside of {clip.path} of {width} × "
                    f"{height} pixels; expected left, top, right, bottom in pixels",
                )
