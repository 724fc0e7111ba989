"""A job's answers drawn into its video: every query in a colour of its own. Rendered once a job, in a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.errors import Interrupted
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.visualize.annotate import encode_h264, frame_index
from bridge_stg.runtime.visualize.canvas import INK, WHITE, Colour, draw_box, fit_text, font, shade
from bridge_stg.server.http.errors import api_error, full
from bridge_stg.server.jobs.job import Job, gone

if TYPE_CHECKING:
    from PIL import Image

COLOURS: tuple[Colour, ...] = (
    (255, 45, 190), (25, 200, 255), (255, 198, 26), (61, 220, 107),
    (255, 122, 31), (169, 139, 255), (47, 224, 200), (255, 90, 90),
)  # fmt: skip
"""The page draws with the same, in the same order."""
MOST_WAITING = 8


class Renderer:
    """Makes annotated videos, each once.

    Args:
        folder: where they are written.
        threads: what renders.
        within_s: what one video may take.
    """

    def __init__(self, folder: Path, threads: Executor, *, within_s: float) -> None:
        self._folder, self._threads, self._within_s = folder, threads, within_s
        self._making: dict[str, asyncio.Future[None]] = {}
        self._wanted: dict[str, int] = {}
        self._closed = False

    async def file(self, job: Job) -> Path:
        """Return a job's annotated video; who stops waiting, as the last one, stops the work.

        Raises:
            ApiError: 404 if the job is deleted meanwhile, 429 if too many are waiting; as of `api_error`.
        """
        path = self._path(job)
        if not path.exists():
            making = self._making.get(job.id)
            if making is None:
                if len(self._making) >= MOST_WAITING:
                    raise full(f"{MOST_WAITING} videos are being drawn already.", 10)
                making = asyncio.get_running_loop().run_in_executor(self._threads, self._render, job, path)
                self._making[job.id] = making
                making.add_done_callback(lambda done: self._made(job.id, done))
            self._wanted[job.id] = self._wanted.get(job.id, 0) + 1
            try:
                await asyncio.shield(making)
            except Exception as error:
                if job.id not in self._wanted:
                    raise gone() from error
                raise api_error(error, path=job.upload.file.path, name=job.upload.name) from error
            finally:
                if job.id in self._wanted:
                    self._wanted[job.id] -= 1
        return path

    def forget(self, job: Job) -> None:
        """Delete a job's video."""
        self._wanted.pop(job.id, None)
        self._path(job).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop what is being drawn."""
        self._closed = True

    def _path(self, job: Job) -> Path:
        return self._folder / f"annotated-{job.id}.mp4"

    def _made(self, job_id: str, done: asyncio.Future[None]) -> None:
        del self._making[job_id]
        done.exception()  # told to whoever waits; nobody may
        if not self._wanted.get(job_id):
            self._wanted.pop(job_id, None)

    def _render(self, job: Job, path: Path) -> None:
        end = time.monotonic() + self._within_s

        def check() -> None:
            if time.monotonic() > end:
                raise Interrupted(f"Drawing this video took more than {self._within_s:g} s.")
            if self._closed or not self._wanted.get(job.id):
                raise Interrupted("nobody waits for this video any more")

        partial = path.with_suffix(".partial.mp4")
        try:
            with play(job.upload.file.path) as source:
                frames = paint(source.frames, job.results, duration_s=job.upload.file.info.duration_s, check=check)
                encode_h264(frames, partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def paint(
    frames: Iterator[tuple[float, np.ndarray]],
    groundings: Sequence[Grounding],
    *,
    duration_s: float,
    check: Callable[[], None],
) -> Iterator[tuple[float, Image.Image]]:
    """Yield (time_s, image) for every frame with the boxes of all groundings, all of the first one's size."""
    from PIL import Image

    size: tuple[int, int] | None = None
    for time_s, frame in frames:
        check()
        image = Image.fromarray(np.ascontiguousarray(frame))
        size = size or image.size
        image = image if image.size == size else image.resize(size)
        _paint_frame(image, time_s, groundings, duration_s)
        yield time_s, image


def _paint_frame(image: Image.Image, time_s: float, groundings: Sequence[Grounding], duration_s: float) -> None:
    from PIL import ImageDraw

    width, height = image.size
    side = min(width, height)
    text_size = max(10, round(side / 26))
    text_font, thickness, lane = font(text_size), max(2, round(side / 110)), max(3, round(side / 90))
    bottom = height - 2 * lane * len(groundings) - lane
    shade(image, (0, max(0, bottom), width, height), 0.65)
    draw = ImageDraw.Draw(image)
    for place, grounding in enumerate(groundings):
        colour = COLOURS[place % len(COLOURS)]
        if grounding.span is not None and duration_s:
            start, end = (round(width * min(max(s / duration_s, 0), 1)) for s in grounding.span)
            top = bottom + lane + 2 * lane * place
            draw.rectangle((start, top, max(start + 1, end), top + lane - 1), fill=colour)
        boxes = grounding.boxes
        index = None if boxes is None else frame_index(boxes, time_s)
        if boxes is None or index is None:
            continue
        box = boxes.boxes[index]
        draw_box(draw, box, image.size, thickness=thickness, dashed=not boxes.visible[index], colour=colour)
        text = fit_text(grounding.query, text_font, width * 0.6)
        left = min(max(0, round(float(box[0]))), max(0, width - round(text_font.getlength(text)) - 8))
        top = max(0, round(float(box[1])) - thickness - text_size - 6)
        draw.rectangle((left, top, left + text_font.getlength(text) + 7, top + text_size + 5), fill=INK)
        draw.text((left + 4, top + 1), text, colour, text_font)
    if duration_s:
        x = round((width - 1) * min(time_s / duration_s, 1))
        draw.rectangle((x - 1, bottom, x + 1, height), fill=WHITE)
        draw.text((width - 4, 2), f"{time_s:.2f} s", WHITE, text_font, anchor="ra", stroke_width=1, stroke_fill=INK)
