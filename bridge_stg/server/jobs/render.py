"""Draw the answers of a job into its video, one colour per query. Rendered once per job, in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.visualize.annotate import encode_h264, frame_index, paint_frames
from bridge_stg.runtime.visualize.canvas import INK, WHITE, Colour, draw_box, fit_text, font, shade
from bridge_stg.server.http.errors import api_error, busy
from bridge_stg.server.jobs.job import Job, job_not_found

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

COLOURS: tuple[Colour, ...] = (
    (255, 45, 190), (25, 200, 255), (255, 198, 26), (61, 220, 107),
    (255, 122, 31), (169, 139, 255), (47, 224, 200), (255, 90, 90),
)  # fmt: skip
"""Colours of the queries; the page uses the same, in the same order."""
MOST_WAITING = 8


class Renderer:
    """Renders annotated videos in `threads`, each once, within `within_s` seconds per video."""

    def __init__(self, folder: Path, threads: Executor, *, within_s: float) -> None:
        self._folder, self._threads, self._within_s = folder, threads, within_s
        self._rendering: dict[str, asyncio.Future[None]] = {}
        self._waiting: dict[str, int] = {}  # number of requests per job
        self._closed = False

    async def file(self, job: Job) -> Path:
        """Return a job's annotated video. Rendering stops when the last request for it ends. Raises ApiError."""
        path = self._path(job)
        if path.exists():
            return path
        rendering = self._rendering.get(job.id) or self._start(job, path)
        self._waiting[job.id] = self._waiting.get(job.id, 0) + 1
        try:
            await asyncio.shield(rendering)
        except Exception as error:
            if job.id not in self._waiting:
                raise job_not_found() from error
            raise api_error(error, path=job.upload.file.media.path, name=job.upload.name) from error
        finally:
            if job.id in self._waiting:
                self._waiting[job.id] -= 1
        return path

    def forget(self, job: Job) -> None:
        """Delete a job's video."""
        self._waiting.pop(job.id, None)
        self._path(job).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop rendering."""
        self._closed = True

    def _path(self, job: Job) -> Path:
        return self._folder / f"annotated-{job.id}.mp4"

    def _start(self, job: Job, path: Path) -> asyncio.Future[None]:
        if len(self._rendering) >= MOST_WAITING:
            raise busy(f"{MOST_WAITING} videos are being drawn already.", 10)
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._render, job, path)
        self._rendering[job.id] = future
        future.add_done_callback(lambda done: self._rendered(job.id, done))
        return future

    def _rendered(self, job_id: str, done: asyncio.Future[None]) -> None:
        del self._rendering[job_id]
        done.exception()  # marks it as retrieved: nobody may wait any more
        if not self._waiting.get(job_id):
            self._waiting.pop(job_id, None)

    def _render(self, job: Job, path: Path) -> None:
        limits = Limits(deadline_s=self._within_s, cancel=lambda: self._closed or not self._waiting.get(job.id))
        media, duration_s = replace(job.upload.file.media, stream=job.stream), job.upload.file.info.duration_s
        with media.play() as source, replacing(path) as temporary:
            painted = paint_frames(
                source, lambda size: _Painter(size, job.results, duration_s), progress=lambda *_: limits.check()
            )
            encode_h264(painted, temporary, source.last_end_s)


class _Painter:
    """Draws the spans as lanes at the bottom of frames of one size, the boxes with their queries, and the time."""

    def __init__(self, size: tuple[int, int], groundings: Sequence[Grounding], duration_s: float) -> None:
        self.size, self.groundings, self.duration_s = size, groundings, duration_s
        side = min(size)
        self.text_size, self.thickness = max(10, round(side / 26)), max(2, round(side / 110))
        self.lane = max(3, round(side / 90))
        self.font = font(self.text_size)
        self.bottom = size[1] - 2 * self.lane * len(groundings) - self.lane

    def paint(self, image: Image.Image, time_s: float) -> None:
        """Draw on the frame at `time_s`, in place."""
        from PIL import ImageDraw

        width, height = self.size
        shade(image, (0, max(0, self.bottom), width, height), 0.65)
        draw = ImageDraw.Draw(image)
        for place, grounding in enumerate(self.groundings):
            colour = COLOURS[place % len(COLOURS)]
            if grounding.span is not None and self.duration_s:
                start, end = (round(width * min(max(s / self.duration_s, 0), 1)) for s in grounding.span)
                top = self.bottom + self.lane + 2 * self.lane * place
                draw.rectangle((start, top, max(start + 1, end), top + self.lane - 1), fill=colour)
            index = None if grounding.boxes is None else frame_index(grounding.boxes, time_s)
            if index is not None:
                self._paint_box(draw, grounding, index, colour)
        if self.duration_s:
            x = round((width - 1) * min(time_s / self.duration_s, 1))
            draw.rectangle((x - 1, self.bottom, x + 1, height), fill=WHITE)
            style: dict[str, Any] = {"anchor": "ra", "stroke_width": 1, "stroke_fill": INK}
            draw.text((width - 4, 2), f"{time_s:.2f} s", WHITE, self.font, **style)

    def _paint_box(self, draw: ImageDraw.ImageDraw, grounding: Grounding, index: int, colour: Colour) -> None:
        assert grounding.boxes is not None
        box, dashed = grounding.boxes.boxes[index].tolist(), not grounding.boxes.visible[index]
        draw_box(draw, box, self.size, thickness=self.thickness, dashed=dashed, colour=colour)
        text = fit_text(grounding.query, self.font, self.size[0] * 0.6)
        width = self.font.getlength(text)
        left = min(max(0, round(box[0])), max(0, self.size[0] - round(width) - 8))
        top = max(0, round(box[1]) - self.thickness - self.text_size - 6)
        draw.rectangle((left, top, left + width + 7, top + self.text_size + 5), fill=INK)
        draw.text((left + 4, top + 1), text, colour, self.font)
