"""Write the rows of a run as a Parquet table, from its JSON lines. Needs pyarrow, of the extra `parquet`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge_stg.runtime.host.files import replacing

ROWS = 256
"""Rows per row group: a row may have hundreds of boxes."""


def answer_schema() -> Any:
    """Return the columns: those of `Grounding.to_json`, and `id`, `index`, `video`, `first_box`, `error`.

    `error` is null where answered; `score`, `occurrences` and `windows` of `SearchResult.to_json` where a video was not
    searched; `first_box` for other tasks than `track`.
    """
    import pyarrow as pa

    def boxes(*flags: str) -> Any:
        fields = [("time_s", pa.float64()), ("box", pa.list_(pa.float32())), ("presence", pa.float32())]
        return pa.list_(pa.struct([*fields, *((name, pa.bool_()) for name in flags)]))

    def numbers(*names: str) -> Any:
        return pa.struct([(name, pa.float64()) for name in names])

    size = pa.struct([("width", pa.int32()), ("height", pa.int32())])
    coarse = [("fps", pa.float64()), ("size", size), ("groups", pa.int32()), ("tokens", pa.int64())]
    coarse += [("max_visual_tokens", pa.int64()), ("limited_by", pa.list_(pa.string()))]
    span, scores = numbers("start_s", "end_s"), numbers("absent", "answer", "presence")
    occurrence = [
        ("score", pa.float64()), ("span", span), ("named_span", span), ("answer", pa.string()), ("scores", scores),
        ("tube", boxes("visible")), ("boxes", boxes("visible", "interpolated")),
    ]  # fmt: skip
    return pa.schema(
        [
            ("id", pa.string()), ("index", pa.int64()), ("video", pa.string()), ("task", pa.string()),
            ("query", pa.string()), ("first_box", pa.list_(pa.float64())), ("error", pa.string()),
            ("schema", pa.int32()), ("found", pa.bool_()),
            ("span", span), ("named_span", span), ("answer", pa.string()), ("size", size), ("scores", scores),
            ("tube", boxes("visible")), ("boxes", boxes("visible", "interpolated")), ("coarse", pa.struct(coarse)),
            ("clock", pa.string()), ("stream", pa.int32()), ("unknown_words", pa.list_(pa.string())),
            ("heads", pa.string()), ("mode", pa.string()), ("decoding", pa.map_(pa.string(), pa.int64())),
            ("tokens", numbers("coarse", "fine", "dense", "ratio")), ("timings_s", pa.map_(pa.string(), pa.float64())),
            ("score", pa.float64()), ("occurrences", pa.list_(pa.struct(occurrence))),
            ("windows", numbers("count", "length_s", "overlap_s", "absent", "shots")),
        ]
    )  # fmt: skip


def write_parquet(lines: Path, ids: Sequence[str], out: Path) -> None:
    """Write the rows with these ids, in this order, as a complete file or not at all.

    `lines` has them as JSON lines after a header; if two rows have one id, the last counts.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    places: dict[str, int] = {}
    schema = answer_schema()
    with lines.open("rb") as file:
        file.readline()
        place = file.tell()
        for line in iter(file.readline, b""):
            places[json.loads(line)["id"]] = place
            place = file.tell()
        with replacing(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(ids), ROWS):
                rows = []
                for name in ids[start : start + ROWS]:
                    file.seek(places[name])
                    # Parquet does not accept surrogates.
                    row: dict[str, Any] = json.loads(file.readline())
                    row |= {k: v.encode(errors="replace").decode() for k, v in row.items() if isinstance(v, str)}
                    maps = (name for name in ("decoding", "timings_s") if name in row)
                    rows.append(row | {name: list(row[name].items()) for name in maps})
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
