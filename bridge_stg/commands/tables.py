"""A grounding and a bundle as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.chain.results import VIDEO_STAGES, FrameBoxes, Grounding
from bridge_stg.runtime.chain.spans import Span
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.search.occurrences import SearchResult, score_of
from bridge_stg.runtime.video.token_budget import CoarseChoice

if TYPE_CHECKING:
    from bridge_stg.evaluation.run.index_files import IndexedFile

ROWS = 12
CLOCK_NOTES = {
    "frame_rate": "times: not all frames have time stamps; the frame rate stated in the file is used instead",
    "guessed": "times: guessed where the file has no usable time stamps",
}


def result_table(result: Grounding | SearchResult) -> str:
    """Return the table of a grounding; of a search, the ranked occurrences and the table of the best one."""
    if isinstance(result, Grounding):
        return grounding_table(result)
    windows, found = result.windows, result.occurrences
    shots = "1 shot" if windows.shots == 1 else f"{windows.shots} shots"
    parts = f"{windows.count} windows" if windows.count != 1 else "1 window"
    overlap = f" that overlap by {windows.overlap_s:g} s" if windows.count != 1 else ""
    lines = [
        f"  searched {shots} in {parts} of at most {windows.length_s:g} s{overlap}, {windows.absent} of them without "
        "the target; --window whole reads the video at once"
    ]
    if found:
        lines.append(f"  occurrences: {len(found)}, best first; the boxes below are those of the first")
    for rank, one in enumerate(found, 1):
        assert one.span is not None
        lines.append(f"  {rank:3}. {one.span[0]:10.2f} s to {one.span[1]:10.2f} s, score {score_of(one):.3f}")
    head, _, rest = grounding_table(result.best).partition("\n")
    return "\n".join([head, *lines, rest])


def grounding_table(result: Grounding) -> str:
    """Return the span, at most twelve evenly picked boxes, tokens and times."""
    width, height = result.size
    stream = "" if result.stream is None else f", video stream {result.stream}"
    lines = [f'"{result.query}" in {width} × {height} pixels{stream}']
    if result.found and result.span is not None:
        start, end = result.span
        verb = "followed" if result.task == "track" else "found"
        in_image = "image" in (result.task, result.mode)
        lines.append("  found" if in_image else f"  {verb} from {start:.2f} s to {end:.2f} s")
        followed = result.span if result.task == "track" else None
        presence = result.heads == "bridge"
        lines += [] if result.boxes is None else _box_rows(result.boxes, presence=presence, followed=followed)
    else:
        lines += [f"  not in this video (probability {result.scores['absent']:.2f})"]
    lines += [f"  {CLOCK_NOTES[result.clock]}"] if result.clock in CLOCK_NOTES else []
    lines += [_text_line(result)] if result.heads == "text" else []
    tokens = result.tokens
    lines += [
        _coarse_line(result.coarse),
        f"  visual tokens: {tokens['coarse']:.0f} coarse + {tokens['fine']:.0f} fine; "
        f"a dense pass would take {tokens['dense']:.0f}",
        *_seconds_lines(result),
    ]
    return "\n".join(lines)


def grounding_line(name: str, result: Grounding | SearchResult) -> str:
    """Return a result in one line: the name of the video, the query, and the span or the first box."""
    if isinstance(result, SearchResult):
        more = f", and {len(result.occurrences) - 1} more" if len(result.occurrences) > 1 else ""
        return grounding_line(name, result.best) + more
    if not result.found or result.span is None:
        answer = f"not found (probability {result.scores['absent']:.2f})"
    elif result.boxes is not None and "image" in (result.task, result.mode):
        answer = "found at " + ",".join(f"{side:.0f}" for side in result.boxes.boxes[0])
    else:
        answer = f"{result.span[0]:.2f} s to {result.span[1]:.2f} s"
    return f'{name}  "{result.query}"  {answer}'


def index_line(row: IndexedFile) -> str:
    """Return what the index has of one file, or why it has nothing."""
    if row.indexed is None:
        return f"{row.file}: {row.error}"
    found = row.indexed
    how = "was indexed" if found.reused else f"indexed in {row.seconds:.1f} s"
    return f"{row.file}: {found.duration_s:.1f} s of video, {found.nbytes / 1e6:.1f} MB on disk; {how}"


def index_total(rows: Sequence[IndexedFile], folder: Path) -> str:
    """Return the size of all files in the index, per file and per hour of video."""
    found = [row.indexed for row in rows if row.indexed is not None]
    hours, size = sum(one.duration_s for one in found) / 3600, sum(one.nbytes for one in found) / 1e6
    failed = f", {len(rows) - len(found)} failed" if len(found) < len(rows) else ""
    line = f"{len(found)} files in {folder}{failed}: {hours * 3600:.1f} s of video, {size:.1f} MB on disk"
    return f"{line}, {size / hours:.0f} MB per hour" if hours else line


def _seconds_lines(result: Grounding) -> list[str]:
    """Return the seconds of the video's stages, which its queries share, of the call that answered, and of both."""
    lines = {"video": "", "queries": "", "both": ""}
    for stage, seconds in result.timings.items():
        owner = "video" if stage in VIDEO_STAGES else "both" if stage == "total" else "queries"
        lines[owner] += f", {stage} {seconds:.2f}"
    return [f"  seconds, {owner}: {stages[2:]}" for owner, stages in lines.items() if stages]


def _text_line(result: Grounding) -> str:
    """Return how text heads wrote the answer."""
    counts = result.decoding
    details = [f"{counts['forced']} forced"] if counts["forced"] else []
    details += [f"{counts['accepted']} of {counts['drafted']} drafted accepted"] if counts["drafted"] else []
    line = f"  text answer: mode {result.mode}, {counts['tokens']} tokens in {counts['calls']} language-model calls"
    line += f" ({', '.join(details)})" if details else ""
    return line + ("; cut by --max-tokens" if counts["truncated"] else "")


def _coarse_line(coarse: CoarseChoice) -> str:
    """Return the frames and tokens that the language model got, and what limited them."""
    budget = f" of {coarse.max_visual_tokens}" if coarse.max_visual_tokens is not None else ""
    limited = f"; limited by {', '.join(coarse.limited_by)}" if coarse.limited_by else ""
    groups = f"{coarse.groups} group{'' if coarse.groups == 1 else 's'}"
    return (
        f"  coarse frames: {coarse.fps:.4g} per second at {coarse.size[0]} × {coarse.size[1]} pixels, {groups}, "
        f"{coarse.tokens}{budget} tokens{limited}"
    )


def _box_rows(boxes: FrameBoxes, *, presence: bool, followed: Span | None) -> list[str]:
    """Return a table of at most `ROWS` boxes.

    Args:
        boxes: boxes of frames.
        presence: whether the heads compute it, for a column.
        followed: span of a track, which has boxes outside it too.
    """
    rows = [f"  {'time':>7}  {'left':>6} {'top':>6} {'right':>6} {'bottom':>6}{'  presence' * presence}"]
    for i in np.linspace(0, len(boxes) - 1, min(ROWS, len(boxes))).round().astype(int):
        left, top, right, bottom = boxes.boxes[i]
        flags = ["interpolated"] * bool(boxes.interpolated[i]) + ["low presence"] * (not boxes.visible[i])
        if followed is not None and not followed[0] <= boxes.times[i] < followed[1]:
            flags = ["not followed: the last box"]
        row = f"  {boxes.times[i]:7.2f}  {left:6.0f} {top:6.0f} {right:6.0f} {bottom:6.0f}"
        row += f"  {boxes.presence[i]:8.2f}" * presence
        rows.append(f"{row}  {', '.join(flags)}".rstrip())
    if len(boxes) > ROWS:
        rows.append(f"  ({ROWS} of {len(boxes)} frames; --json writes all)")
    return rows


def bundle_table(bundle: Bundle) -> str:
    """Return the content of a bundle: model, rules, and every variant of every graph with its tensors."""
    manifest = bundle.manifest
    spec = manifest.spec
    made_with = {"bridge-stg": manifest.made_by, **manifest.tools}
    facts = {
        "bundle": Path(bundle.path),
        "fingerprint": manifest.fingerprint,
        "model": ", ".join(f"{name} {value}" for name, value in manifest.model.items()),
        "made with": ", ".join(f"{name} {value}" for name, value in made_with.items()),
        "parity": "measured, within the tolerances" if manifest.verified else "not measured: unverified (--no-verify)",
        "knows": spec.knows.summary if spec.knows else "not stated",
        "quantized": "no" if manifest.calibration is None else "yes, see calibration in manifest.json",
        "heads": "bridge" + (", or text" if spec.text else "") if spec.heads == "bridge" else "text",
        "frames": f"{spec.frames.coarse_fps:g} per second coarse (up to {spec.frames.coarse_max_pixels} pixels), "
        f"{spec.frames.fine_fps:g} fine (up to {spec.frames.fine_max_pixels})",
        "size": f"{sum(entry.size for entry in manifest.entries().values()) / 1e6:.1f} MB",
        "runs here": _target_line(bundle),
    }
    lines = [f"{name:12} {value}" for name, value in facts.items()]
    for variants in manifest.graphs.values():
        for graph in variants.values():
            lines += ["", *_graph_lines(graph)]
    return "\n".join(lines)


def _target_line(bundle: Bundle) -> str:
    """Return the backend that `auto` chooses on this machine, and why."""
    try:
        return str(choose(bundle))
    except EngineError as error:
        return f"no: {error}"


def _graph_lines(graph: GraphSpec) -> list[str]:
    size = (graph.size + sum(entry.size for entry in graph.data)) / 1e6
    cache = "" if graph.cache is None else f", cache {graph.cache.update}"
    head = f"{graph.name} / {graph.variant}: opset {graph.opset}, {graph.precision}{cache}, {size:.1f} MB"
    hidden = set() if graph.cache is None else {*graph.cache.past_names, *graph.cache.written_names}
    lines = [head]
    for arrow, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
        lines += [f"  {arrow} {tensor}" for tensor in tensors if tensor.name not in hidden]
    if graph.cache is not None:
        count = len(graph.cache.past_names)
        lines.append(
            f"  and {count} cache buffers {graph.cache.dtype} [B, {graph.cache.kv_heads}, S, {graph.cache.head_dim}]"
        )
    if graph.ranges:
        spans = (f"{dim} {low}–{'' if high is None else high}" for dim, (low, high) in graph.ranges.items())
        lines.append("  dims " + ", ".join(spans))
    return lines
