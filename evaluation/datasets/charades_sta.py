"""Charades-STA: temporal grounding of sentences in indoor videos (Gao et al., TALL, arXiv 1705.02101).

File: charades_sta_test.txt, linked from github.com/jiyanggao/TALL, whose README gives the format of a line:
`[video name] [start time] [end time]##[sentence]`, as in `AO8RW 0.0 6.9##a person is putting a book on a shelf.`
The videos are those of Charades (`AO8RW.mp4`). Times are seconds. Some ends are after the end of the video, some at or
before their start (2D-TAN's loader drops such lines); all are kept as published, as TALL's own code does, and no answer
can score on an empty span.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bridge_stg.evaluation.datasets.fields import digest, fault, numbered_lines, parse_number
from bridge_stg.evaluation.media import MediaFolder
from bridge_stg.evaluation.samples import Dataset, Sample, span_truth


def read_charades_sta(annotations: Sequence[Path], media: Path, *, split: str | None = None) -> Dataset:
    """Return the sentences of a file; all targets are present. Raises AnnotationError if a line is invalid."""
    path, folder = annotations[0], MediaFolder(media)
    samples = []
    for where, line in numbered_lines(path):
        video, span, sentence = _parse(where, line)
        samples.append(
            Sample(
                id=where.rpartition(":")[2], task="span", media=folder.find(f"{video}.mp4"), media_name=f"{video}.mp4",
                query=sentence, read_truth=partial(span_truth, span), where=where,
            )
        )  # fmt: skip
    if not samples:
        raise fault(path, "has no lines", code="annotation.empty")
    return Dataset("charades-sta", path.stem, tuple(samples), digest(path))


def _parse(where: str, line: str) -> tuple[str, tuple[float, float], str]:
    head, _, sentence = line.strip().partition("##")
    parts = head.split()
    if len(parts) != 3 or not sentence.strip():
        what = f"is {line[:60]!r}; expected `VIDEO start end##sentence`"
        raise fault(where, what, code="annotation.bad_line")
    start, end = (parse_number(where, text, f"the {name} time") for name, text in zip(("start", "end"), parts[1:]))
    return parts[0], (start, end), sentence.strip()
