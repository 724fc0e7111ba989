"""Run the same queries on every video of a folder; write one Parquet row per video and query, and a plot.

python examples/analytics.py BUNDLE FOLDER tubes.parquet summary.png QUERY...

Needs pyarrow and matplotlib: pip install -e ".[cpu,examples]". For large folders, `bridge-stg infer-many`
runs in many processes and resumes after a stop.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime import BridgeError, Grounder, Grounding

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")


def row_of(video: Path, result: Grounding) -> dict[str, Any]:
    """Return one result as a row of plain columns: time span, positions and distance covered."""
    row: dict[str, Any] = {
        "video": video.name, "query": result.query, "found": result.found, "error": None,
        "absent": float(result.scores["absent"]), "start_s": None, "end_s": None, "presence": None,
        "centre_x": None, "centre_y": None, "path_px": None, "area": None,
    }  # fmt: skip
    if result.span is not None and result.tube is not None:
        boxes = result.tube.boxes
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        sides = boxes[:, 2:] - boxes[:, :2]
        row |= {
            "start_s": result.span[0],
            "end_s": result.span[1],
            "presence": float(result.tube.presence.mean()),
            "centre_x": float(centres[:, 0].mean()),
            "centre_y": float(centres[:, 1].mean()),
            "path_px": float(np.linalg.norm(np.diff(centres, axis=0), axis=1).sum()),
            "area": float(sides.prod(axis=1).mean() / (result.size[0] * result.size[1])),
        }
    return row


def ask(bundle: str, folder: Path, queries: list[str]) -> list[dict[str, Any]]:
    """Return one row per video and query; for an unreadable video the row has the error."""
    rows = []
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    with Grounder.load(bundle) as grounder:
        for video in videos:
            try:
                with grounder.open(video) as opened:
                    rows += [row_of(video, result) for result in opened.ground_many(queries)]
            except BridgeError as error:
                rows += [{"video": video.name, "query": query, "error": str(error)} for query in queries]
    return rows


def write_table(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the rows as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, flags = ("video", "query", "error"), ("found",)
    numbers = ("start_s", "end_s", "absent", "presence", "centre_x", "centre_y", "path_px", "area")
    fields = [*((name, pa.string()) for name in texts), *((name, pa.bool_()) for name in flags)]
    schema = pa.schema([*fields, *((name, pa.float64()) for name in numbers)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out)


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Plot the spans of each query, one line per video, and how often each query was found."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    videos = sorted({row["video"] for row in rows})
    queries = sorted({row["query"] for row in rows})
    height = max(3.0, 0.35 * len(videos))
    figure, (spans, counts) = pyplot.subplots(1, 2, figsize=(11, height), width_ratios=(3, 1), layout="constrained")
    for place, query in enumerate(queries):
        found = [row for row in rows if row["query"] == query and row.get("found")]
        spans.barh(
            [videos.index(row["video"]) + 0.8 * (place + 0.5) / len(queries) - 0.4 for row in found],
            [row["end_s"] - row["start_s"] for row in found],
            left=[row["start_s"] for row in found],
            height=0.7 / len(queries),
            label=query,
        )
        counts.bar(place, len(found))
    spans.set_yticks(range(len(videos)), videos)
    spans.set_xlabel("seconds")
    spans.set_title("when")
    spans.legend(loc="upper right")
    counts.set_xticks(range(len(queries)), queries, rotation=30, ha="right")
    counts.set_title(f"found, of {len(videos)} videos")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def main(bundle: str, folder: str, table: str, picture: str, *queries: str) -> None:
    rows = ask(bundle, Path(folder), list(queries))
    if not rows:
        sys.exit(f"{folder}: no videos ({', '.join(SUFFIXES)}), or no queries")
    write_table(rows, Path(table))
    plot(rows, Path(picture))
    failed = sum(row["error"] is not None for row in rows)
    print(f"{len(rows)} rows, {sum(bool(row.get('found')) for row in rows)} found, {failed} failed: {table}, {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:])
