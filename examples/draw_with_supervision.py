"""Draw tubes with the annotators of `supervision`, with a colour, label and trace per query.

python examples/draw_with_supervision.py BUNDLE VIDEO OUT.mp4 QUERY...

Needs supervision: pip install -e ".[cpu,examples]". The same `Detections` work with its zones,
counters and trackers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import supervision as sv
from PIL import Image

from bridge_stg.runtime import Grounder, Grounding
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.visualize.annotate import encode_h264
from bridge_stg.runtime.visualize.painter import frame_index


def detections_at(results: list[Grounding], time_s: float) -> sv.Detections:
    """Return the boxes of all queries in the frame at `time_s`; class and tracker id are the query's index."""
    shown = [
        (place, result.boxes, index)
        for place, result in enumerate(results)
        if result.boxes is not None and (index := frame_index(result.boxes, time_s)) is not None
    ]
    if not shown:
        return sv.Detections.empty()
    ids = np.array([place for place, _, _ in shown])
    return sv.Detections(
        xyxy=np.stack([boxes.boxes[index] for _, boxes, index in shown]),
        confidence=np.array([boxes.presence[index] for _, boxes, index in shown]),
        class_id=ids,
        tracker_id=ids,
        data={"query": np.array([results[place].query for place, _, _ in shown])},
    )


def drawn(video: str, results: list[Grounding]) -> Iterator[tuple[float, Any]]:
    """Yield (time in seconds, RGB frame with boxes) for every frame."""
    boxes, labels, traces = sv.BoxAnnotator(), sv.LabelAnnotator(), sv.TraceAnnotator()
    with play(video) as source:
        for time_s, frame in source.frames:
            found = detections_at(results, time_s)
            scene = np.ascontiguousarray(frame[..., ::-1])  # supervision draws on BGR, as OpenCV does
            if len(found):
                texts = [f"{query} {score:.2f}" for query, score in zip(found.data["query"], found.confidence)]
                scene = traces.annotate(boxes.annotate(scene, found), found)
                scene = labels.annotate(scene, found, labels=texts)
            yield time_s, Image.fromarray(np.ascontiguousarray(scene[..., ::-1]))


def main(bundle: str, video: str, out: str, *queries: str) -> None:
    with Grounder.load(bundle) as grounder, grounder.open(video) as opened:
        results = opened.ground_many(queries)
    encode_h264(drawn(video, results), out)  # type: ignore[arg-type]
    for result in results:
        print(f"{result.query}: {'not in this video' if result.span is None else result.span}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
