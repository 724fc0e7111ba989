"""Synthetic scenes from seeds: coloured sprites that appear, move and leave over photographs.

A `Scene` renders any time at any size: training renders only the sampled frames, and held-out clips are encoded as
video files. Must not know torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bridge_stg.demo.sprites import COLOURS, NAMES, background, jpeg, paste, sprite
from bridge_stg.runtime.chain.boxes import box_cxcywh_to_xyxy

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
DIRECTION_NAMES = tuple(DIRECTIONS)
FRAME_SIZES = ((320, 320), (640, 360), (480, 360), (360, 640))
Look = tuple[int, int, int | None]  # indices of name, colour and direction


@dataclass(frozen=True)
class Thing:
    """One moving sprite. Positions and sizes are fractions of the frame, times seconds from the clip's start."""

    name: int
    colour: int
    direction: int | None  # index into DIRECTION_NAMES, None if it does not move or moves diagonally
    start: float
    end: float
    first: tuple[float, float]
    last: tuple[float, float]
    size: tuple[float, float]
    growth: float
    flipped: bool

    def visible(self, times: np.ndarray) -> np.ndarray:
        """Return bool [n]: whether the thing is in the frame at each time, start inclusive, end exclusive."""
        return (times >= self.start - 1e-6) & (times < self.end - 1e-6)

    def boxes(self, times: np.ndarray) -> np.ndarray:
        """Return boxes [n, 4] cxcywh in 0..1; outside its span, the box at the nearest time within."""
        progress = np.clip((times - self.start) / max(self.end - self.start, 1e-6), 0, 1)[:, None]
        centre = np.asarray(self.first) + (np.asarray(self.last) - np.asarray(self.first)) * progress
        size = np.asarray(self.size) * (1 + (self.growth - 1) * progress)
        return np.concatenate([centre, size], 1).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """A clip before it is rendered."""

    width: int
    height: int
    duration: float
    things: tuple[Thing, ...]
    photo: np.ndarray  # uint8 [h, w, 3], the background
    noise: float
    drift: float  # relative change of brightness over the clip
    jpeg: int | None
    seed: int

    def render(self, times: Sequence[float] | np.ndarray, width: int, height: int) -> np.ndarray:
        """Return frames uint8 [n, height, width, 3] of the scene at each time (seconds)."""
        times = np.asarray(times, np.float64)
        rng = np.random.default_rng((self.seed, width, height))
        photo = np.asarray(Image.fromarray(self.photo).resize((width, height), Image.Resampling.BILINEAR))
        frames = np.repeat(photo[None], len(times), 0)
        for thing in self.things:
            boxes = thing.boxes(times)
            for i in np.flatnonzero(thing.visible(times)):
                paste(frames[i], boxes[i], thing.name, thing.colour, thing.flipped)
        if self.drift:
            gain = 1 + self.drift * (times / max(self.duration, 1e-6) - 0.5)
            tables = np.clip(np.arange(256) * gain[:, None], 0, 255).astype(np.uint8)  # new value of each brightness
            frames = np.stack([table[frame] for table, frame in zip(tables, frames)])
        if self.noise:
            grain = (rng.standard_normal((height, width, 3), dtype=np.float32) * self.noise).astype(np.int16)
            for frame in frames:
                rolled = np.roll(grain, int(rng.integers(height * width * 3)))
                np.copyto(frame, np.clip(frame + rolled, 0, 255).astype(np.uint8))
        if self.jpeg is not None:
            frames = np.stack([jpeg(frame, self.jpeg) for frame in frames])
        return frames

    def boxes_pixels(self, thing: int, times: np.ndarray) -> np.ndarray:
        """Return boxes [n, 4] xyxy in pixels of the scene's own size."""
        boxes: np.ndarray = box_cxcywh_to_xyxy(self.things[thing].boxes(times)) * np.tile([self.width, self.height], 2)
        return boxes

    def first_box(self, thing: int) -> np.ndarray:
        """Return the box [4] xyxy in 0..1 of a thing at its first time."""
        start = np.array([self.things[thing].start])
        box: np.ndarray = self.boxes_pixels(thing, start)[0] / [self.width, self.height, self.width, self.height]
        return box


def make_scene(
    rng: np.random.Generator, *, split: str = "train", still: bool = False, frame_rate: float | None = None,
    size: tuple[int, int] | None = None, duration: float | None = None, twins: float = 0.3, from_start: float = 0.0,
) -> Scene:  # fmt: skip
    """Draw a scene: 2 to 4 things, spans of 15–60 % of the clip, boxes of 1–10 % of its area.

    Args:
        rng: generator of all random choices.
        split: `train` or `held_out`; their backgrounds are disjoint.
        still: a single image; everything is visible and nothing moves.
        frame_rate: frames per second that spans are rounded to; None: not rounded.
        size: (width, height) in pixels; drawn from FRAME_SIZES if None.
        duration: seconds; 6–12 if None.
        twins: share of clips with a moving first thing in which the second differs in direction only.
        from_start: probability that a thing is present from the start; if above 0, the first thing always is.
    """
    width, height = size or FRAME_SIZES[rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
    duration = 0.0 if still else duration or float(rng.integers(12, 25)) / 2
    looks = _pick_looks(rng, int(rng.choice([2, 3, 4], p=[0.5, 0.35, 0.15])), still, twins)
    things: list[Thing] = []
    while len(things) < 2:
        things = []
        for look in looks:
            for _ in range(20):
                thing = _make_thing(rng, look, (width, height), duration, frame_rate)
                if from_start and (not things or rng.random() < from_start):
                    thing = dataclasses.replace(thing, start=0.0, end=thing.end - thing.start)
                if not any(_overlap(thing, other) > 0.3 for other in things):
                    things.append(thing)
                    break
    photo = background(rng, split, width / height)
    clean = rng.random() < 0.4
    return Scene(
        width, height, duration, tuple(things), photo,
        noise=0.0 if rng.random() < 0.5 else float(rng.uniform(1, 6)),
        drift=0.0 if still or rng.random() < 0.6 else float(rng.uniform(-0.3, 0.3)),
        jpeg=None if clean or split != "train" else int(rng.integers(35, 90)),
        seed=int(rng.integers(2**31)),
    )  # fmt: skip


def write_clip(scene: Scene, path: Path | str, *, frame_rate: float = 8.0, crf: int = 23) -> np.ndarray:
    """Encode the scene as an H.264 mp4 at `frame_rate` and return its frame times [n] in seconds."""
    import av

    times = np.arange(max(1, round(scene.duration * frame_rate))) / frame_rate
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(frame_rate))
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        for start in range(0, len(times), 16):
            for image in scene.render(times[start : start + 16], scene.width, scene.height):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return times


def _pick_looks(rng: np.random.Generator, count: int, still: bool, twins: float) -> list[Look]:
    """Return the look of each thing; most seconds share a trait with the first."""
    first = (int(rng.integers(len(NAMES))), int(rng.integers(len(COLOURS))), _direction(rng, still))
    looks = [first]
    twin = not still and first[2] is not None and rng.random() < twins
    while len(looks) < count:
        name, colour, direction = int(rng.integers(len(NAMES))), int(rng.integers(len(COLOURS))), _direction(rng, still)
        if len(looks) == 1:
            draw = rng.random()
            if twin:
                others = [d for d in range(len(DIRECTIONS)) if d != first[2]]
                looks.append((first[0], first[1], int(rng.choice(others))))
                continue
            if draw < 1 / 3:
                name = first[0]
            elif draw < 2 / 3:
                colour = first[1]
        if (name, colour) not in {look[:2] for look in looks}:
            looks.append((name, colour, direction))
    return looks


def _direction(rng: np.random.Generator, still: bool) -> int | None:
    return int(rng.integers(4)) if not still and rng.random() < 0.7 else None


def _make_thing(
    rng: np.random.Generator, look: Look, frame: tuple[int, int], duration: float, frame_rate: float | None
) -> Thing:
    """Draw size, span and path of a thing; a still image has duration 0."""
    name, colour, direction = look
    (width, height), still = frame, duration == 0
    aspect = sprite(name, colour, False, 0, 0).width / sprite(name, colour, False, 0, 0).height
    growth = 1.0 if still or rng.random() < 0.5 else float(rng.uniform(0.7, 1.4))
    side = float(rng.uniform(0.11, 0.30)) / max(1.0, growth) ** 0.5
    side = min(max(side, 0.102 / min(1.0, growth)), 0.315 / max(1.0, growth))
    pixels = side * (width * height) ** 0.5
    size = (min(pixels * aspect**0.5 / width, 0.6), min(pixels / aspect**0.5 / height, 0.6))
    start, end = 0.0, 1e-3
    if not still:
        length = float(rng.uniform(0.15, 0.6)) * duration
        start = float(rng.uniform(0, duration - length))
        end = start + length
        if frame_rate is not None:
            start, end = round(start * frame_rate) / frame_rate, round(end * frame_rate) / frame_rate
    half = np.asarray(size) / 2 * max(growth, 1.0)
    low, high = half, 1 - half
    first = rng.uniform(low, high)
    last = first.copy()
    if direction is not None:
        along = np.asarray(DIRECTIONS[DIRECTION_NAMES[direction]])
        axis = int(np.abs(along).argmax())
        travel = float(rng.uniform(0.25, 0.55)) * (high - low)[axis] + 0.05
        room = max((high - low)[axis] - travel, 0.0)
        begin = low[axis] + float(rng.uniform(0, room))
        ends = (begin, min(begin + travel, high[axis]))
        first[axis], last[axis] = ends if along[axis] > 0 else ends[::-1]
        other = 1 - axis
        last[other] = np.clip(first[other] + rng.uniform(-0.2, 0.2) * travel, low[other], high[other])
    elif not still and rng.random() < 0.3:
        slant = rng.choice([-1, 1], 2) * rng.uniform(0.12, 0.25)
        last = np.clip(first + slant, low, high)
    return Thing(
        name, colour, direction, start, end, (float(first[0]), float(first[1])), (float(last[0]), float(last[1])),
        (float(size[0]), float(size[1])), growth, bool(rng.random() < 0.5),
    )  # fmt: skip


def _overlap(a: Thing, b: Thing) -> float:
    """Return the largest covered share of the smaller box while both are visible."""
    times = np.linspace(max(a.start, b.start), min(a.end, b.end), 9)
    if times[-1] < times[0]:
        return 0.0
    boxes = np.stack([a.boxes(times), b.boxes(times)])
    corners, smaller = box_cxcywh_to_xyxy(boxes), boxes[..., 2:].prod(-1).min(0)
    shared = np.clip(corners[..., 2:].min(0) - corners[..., :2].max(0), 0, None).prod(1)
    return float((shared / smaller).max())
