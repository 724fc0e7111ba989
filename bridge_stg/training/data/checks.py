"""Check a query and its truth against its medium; errors name the place of the annotation where its reader knows it."""

from __future__ import annotations

from bridge_stg.evaluation.samples import Sample, Truth
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.prompt import check_query
from bridge_stg.runtime.errors import AnnotationError, BridgeError, QueryError
from bridge_stg.training.data.media import Medium


def check_sample(sample: Sample, medium: Medium, spec: ModelSpec, *, strict: bool) -> None:
    """Check a query and its truth against its medium.

    Raises AnnotationError with the place of the annotation. `strict`: for a box outside of the frame; otherwise only if
    all boxes are.
    """
    try:
        check_query(spec.prompt, sample.query)
        truth = sample.read_truth()
    except QueryError as error:
        raise _fault(sample, "query", str(error)) from None
    except AnnotationError:
        raise
    except BridgeError as error:
        raise AnnotationError("annotation.bad_file", f"{sample.where}: {error}") from None
    if truth.span is not None and truth.span[1] <= truth.span[0]:
        raise _fault(sample, "span", f"{truth.span[0]:g} to {truth.span[1]:g} s has no duration")
    if medium.kind != "image" and medium.duration_s is not None:
        check_span(sample, truth.span, medium.duration_s)
    _check_boxes(sample, truth, medium.size, strict=strict)
    if sample.task == "track" and len(truth.times) > 1 and truth.inside.sum() < 2:
        raise _fault(sample, "boxes", "only the first frame has one; choose a split with boxes of all frames")


def check_span(sample: Sample, span: tuple[float, float] | None, duration_s: float) -> None:
    """Raise AnnotationError if a span begins after the end of the video."""
    if span is not None and span[0] >= duration_s:
        found = f"begins at {span[0]:g} s, but the video is {duration_s:.2f} s long"
        raise _fault(sample, "span", f"{found}; expected seconds from its first frame")


def _check_boxes(sample: Sample, truth: Truth, size: tuple[int, int], *, strict: bool) -> None:
    boxes = truth.boxes[truth.inside]
    width, height = truth.size or size
    outside = (boxes[:, 2:] <= 0).any(1) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
    outside |= (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if outside.any() if strict else (len(boxes) and outside.all()):
        box = [round(float(side), 1) for side in boxes[outside.argmax()]]
        where = f"{box} is outside of {sample.media} ({width} × {height} pixels)"
        raise _fault(sample, "boxes", f"{where}; expected left, top, right, bottom in pixels")


def _fault(sample: Sample, field: str, what: str) -> AnnotationError:
    return AnnotationError("annotation.bad_field", f"{sample.where}: the field {field!r}: {what}")
