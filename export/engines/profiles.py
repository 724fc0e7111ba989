"""Optimization profiles: the sizes that an engine is compiled for, computed from the manifest or read from YAML.

The vision encoder has a bucket for coarse and one for fine frames, each in landscape and portrait; the language model
a profile for prefill (one row), one for decode (a row per query), and a fixed KV capacity; the spatial decoder a bucket
for few and one for many fine frames. Symbols are those of `contracts`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge_stg.runtime.backends.kv_pool import bucketed
from bridge_stg.runtime.backends.tensorrt.engine_cache import Profiles
from bridge_stg.runtime.bundle.contracts import graphs_of
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.chain.spatial_pass import MAX_ROWS
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.packages import install_command
from bridge_stg.runtime.host.parse import parse_yaml_file

Range = tuple[int, int, int]
Ranges = dict[str, Range]

MAX_FRAMES = 64
"""Default of `Deployment.max_frames`."""
MAX_QUERIES = 8
"""Default of `Deployment.max_queries`."""
PREFILL_TOKENS = 512
"""New tokens of a prefill step: the activation memory grows with them, and longer prompts are fed in several steps."""
DECODE_TOKENS = 16
"""New tokens of a decode step: the chosen one and those that the grammar forces after it."""
DRAFT_TOKENS = 128
"""New tokens of a decode step of text heads, which verifies the draft of a list's next entries."""
ANSWER_TOKENS_PER_FRAME, ANSWER_TOKENS = 64, 4096
"""KV positions for an answer of text heads: an entry per frame, at most the default of `TextOptions.max_tokens`."""
ASPECT = 4
"""Largest aspect ratio of a bucket of frame sizes at its largest area."""
TEXT_TOKENS_PER_GROUP, TEXT_TOKENS = 16, 512
"""KV positions for the time of each group, and for query, answer and bridging queries."""
DERIVED = {"vision_encoder": ("N", "W")}
"""Symbols that are computed from others."""


@dataclass(frozen=True)
class Deployment:
    """What engines are built to serve.

    Attributes:
        max_frames: coarse frames per video; a longer one is read at a lower rate or in smaller frames.
        max_queries: queries that are decoded together; each has a row of the KV cache.
        capacity: KV positions per row; None: by `max_frames`.
    """

    max_frames: int = MAX_FRAMES
    max_queries: int = MAX_QUERIES
    capacity: int | None = None

    def groups(self, spec: ModelSpec) -> int:
        """Return the groups of coarse frames per video, at most the model's own limit."""
        return min(spec.frames.max_coarse_groups, -(-self.max_frames // spec.vision.temporal_patch_size))

    def frames(self, spec: ModelSpec) -> int:
        """Return the coarse frames per video, at most the model's own limit."""
        return min(self.max_frames, spec.frames.max_coarse_groups * spec.vision.temporal_patch_size)

    def visual_tokens(self, spec: ModelSpec) -> int:
        """Return the visual tokens per video."""
        side = spec.vision.patch_size * spec.vision.merge_size
        tokens = self.groups(spec) * (spec.frames.coarse_max_pixels // side**2)
        return tokens if spec.frames.max_visual_tokens is None else min(tokens, spec.frames.max_visual_tokens)

    def positions(self, spec: ModelSpec) -> int:
        """Return the KV positions of a row: a multiple of the cache's bucket unless `capacity` is set."""
        if self.capacity is not None:
            return self.capacity
        tokens = self.visual_tokens(spec) + self.groups(spec) * TEXT_TOKENS_PER_GROUP + TEXT_TOKENS
        if spec.heads == "text":
            tokens += min(ANSWER_TOKENS, ANSWER_TOKENS_PER_FRAME * self.max_frames)
        return bucketed(min(tokens, spec.language.max_positions))


@dataclass(frozen=True)
class GraphProfiles:
    """Profiles of one graph by name, and KV positions of a cache that is updated in place (None: it has none)."""

    profiles: Profiles
    capacity: int | None = None


def default_profiles(graph: GraphSpec, spec: ModelSpec, deployment: Deployment | None = None) -> GraphProfiles:
    """Return profiles for every size that the chain uses a graph with in a deployment."""
    deployment = deployment or Deployment()
    if graph.name == "vision_encoder":
        return GraphProfiles(_vision_profiles(spec))
    if graph.name == "spatial_decoder":
        return GraphProfiles(_spatial_profiles(spec))
    capacity = deployment.positions(spec)
    profiles = _language_profiles(spec, deployment)
    if graph.cache is not None and graph.cache.update == "append":
        # With a free size, engines copy the whole cache before the first layer: docs/engines.md, dry run.
        return GraphProfiles({name: {**ranges, "S": (capacity,) * 3} for name, ranges in profiles.items()})
    # TensorRT-RTX 1.7 cannot compile the cache update of decode steps for one row only.
    least, usual, rows = profiles["decode"]["B"]
    profiles["decode"]["B"] = (least, usual, max(2, rows))
    return GraphProfiles(profiles, capacity)


def _language_profiles(spec: ModelSpec, deployment: Deployment) -> dict[str, Ranges]:
    text, capacity = spec.heads == "text", deployment.positions(spec)
    prefill, decode = min(PREFILL_TOKENS, capacity), min(DRAFT_TOKENS if text else DECODE_TOKENS, capacity)
    outputs: Range = (1, 1, decode if text else max(1, spec.language.num_bridging_queries))
    visual = max(2, deployment.visual_tokens(spec) + 1)
    return {
        "prefill": {
            "B": (1, 1, 1), "L": (1, max(1, prefill // 2), prefill), "K": outputs,
            "V": (2, max(2, visual // 2), visual),
        },
        "decode": {"B": (1, 1, deployment.max_queries), "L": (1, 1, decode), "K": outputs, "V": (2, 2, 2)},
    }  # fmt: skip


def _vision_profiles(spec: ModelSpec) -> dict[str, Ranges]:
    """Return buckets by increasing area, each for as many groups as the chain encodes at once at that area.

    Of smaller frames the chain puts more groups into a call, which the runtime runs in parts.
    """
    frames, profiles = spec.frames, {}
    areas = {"coarse": frames.coarse_max_pixels, "fine": frames.fine_max_pixels}
    smaller, patch_area = 0, spec.vision.patch_size**2
    for name, area in sorted(areas.items(), key=lambda item: item[1]):
        if area == smaller:
            continue
        groups = min(frames.encoder_chunk_groups, frames.encoder_chunk_patches // max(1, area // patch_area))
        for shape, (height, width) in _sides(spec, area).items():
            profiles[f"{name}_{shape}"] = _with_tables(
                spec, {"G": (1, max(1, groups), max(1, groups)), "height": height, "width": width}
            )
        smaller = area
    return profiles


def _spatial_profiles(spec: ModelSpec) -> dict[str, Ranges]:
    most, patch = spec.frames.max_fine_frames, spec.vision.patch_size
    profiles = {}
    for frames in sorted({max(1, most // 4), most}):
        for shape, sides in _sides(spec, max(spec.frames.fine_max_pixels, spec.frames.coarse_max_pixels)).items():
            h, w = (_ordered(tuple(size // patch for size in side)) for side in sides)
            profiles[f"frames_{frames}_{shape}"] = {"B": (1, 1, MAX_ROWS), "F": (1, frames, frames), "h": h, "w": w}
    return profiles


def _sides(spec: ModelSpec, area: int) -> dict[str, tuple[Range, Range]]:
    """Return the ranges of (height, width) of landscape and portrait frames of at most `area` pixels."""
    side = spec.vision.patch_size * spec.vision.merge_size
    short, long = (side * math.ceil(math.sqrt(area * aspect) / side) for aspect in (1, ASPECT))
    usual_long = max(side, side * round(math.sqrt(area * 16 / 9) / side))
    usual_short = max(side, side * round(math.sqrt(area * 9 / 16) / side))
    landscape = (_ordered((side, usual_short, short)), _ordered((side, usual_long, long)))
    return {"landscape": landscape, "portrait": landscape[::-1]}


def _with_tables(spec: ModelSpec, ranges: Mapping[str, Range]) -> Ranges:
    """Add the symbols that are computed from height and width: patches N, windows W."""
    counts: dict[str, list[int]] = {"N": [], **({"W": []} if spec.vision.window_patches else {})}
    for place in range(3):
        rows, columns = (ranges[name][place] // spec.vision.patch_size for name in ("height", "width"))
        counts["N"].append(rows * columns)
        if "W" in counts:
            counts["W"].append(len(vision_tables(spec.vision, rows, columns)["window_index"]))
    return {**ranges, **{name: _ordered(tuple(values)) for name, values in counts.items()}}


def _ordered(sizes: tuple[int, ...]) -> Range:
    least, usual, largest = sizes
    return least, max(least, min(usual, largest)), max(least, largest)


def read_overrides(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file with `capacity`, and the ranges of symbols by graph and profile; see docs/engines.md.

    Raises EngineError if the file cannot be read, is not a mapping, or has an unknown key.
    """
    try:
        values = parse_yaml_file(path)
    except ImportError as error:
        message = f"pyyaml cannot be imported ({error}). Install it: {install_command('calibrate')}"
        raise EngineError("host.missing_package", message) from error
    except (OSError, ValueError) as error:
        raise _bad(f"{path}: cannot be read as YAML ({error})") from error
    known = ("capacity", "vision_encoder", "language_model", "spatial_decoder")
    unknown = [key for key in values if key not in known] if isinstance(values, dict) else []
    if not isinstance(values, dict) or not values or unknown:
        found = f"the key {unknown[0]!r}" if unknown else "nothing" if values is None else repr(values)
        raise _bad(f"{path}: found {found}, expected a mapping with {', '.join(known)}")
    return values


def _bad(message: str) -> EngineError:
    return EngineError("engine.bad_profile", message)


def profiles_of(
    graph: GraphSpec,
    spec: ModelSpec,
    *,
    deployment: Deployment | None = None,
    overrides: Mapping[str, Any] | None = None,
    where: str = "--profiles",
) -> GraphProfiles:
    """Return the profiles of a graph: those of a deployment with the overrides of a file, named `where` in messages.

    Symbols of an existing profile are replaced one by one; null removes the profile; a new profile needs every symbol.
    Raises EngineError if a range is invalid, a symbol is unknown or missing, no profile remains, or the file has a
    graph that the model lacks.
    """
    overrides, deployment = overrides or {}, deployment or Deployment()
    _check_sections(spec, overrides, where)
    if "capacity" in overrides:
        deployment = dataclasses.replace(deployment, capacity=overrides["capacity"])
    defaults, given = default_profiles(graph, spec, deployment), overrides.get(graph.name, {})
    profiles = {name: dict(ranges) for name, ranges in defaults.profiles.items()}
    free = tuple(next(iter(profiles.values())))
    for name, ranges in given.items():
        place = f"{where}: {graph.name}.{name}"
        if not isinstance(name, str) or (ranges is None and name not in defaults.profiles):
            raise _bad(f"{place} is not a profile; known: {', '.join(defaults.profiles)}")
        if ranges is None:
            del profiles[name]
            continue
        changed = profiles.get(name, {}) | _read_ranges(graph, ranges, free, place)
        missing = [s for s in free if s not in changed and s not in DERIVED.get(graph.name, ())]
        if missing:
            known = ", ".join(defaults.profiles)
            raise _bad(f"{place} is a new profile without a range of {', '.join(missing)}; existing: {known}")
        if defaults.capacity is not None and changed["L"][2] > defaults.capacity:
            raise _bad(f"{place}.L goes up to {changed['L'][2]}, and the KV cache has {defaults.capacity} positions")
        profiles[name] = _checked_sizes(spec, changed, place) if graph.name == "vision_encoder" else changed
    if not profiles:
        raise _bad(f"{where}: no profile of {graph.name} remains; keep one")
    return GraphProfiles(profiles, defaults.capacity)


def _check_sections(spec: ModelSpec, overrides: Mapping[str, Any], where: str) -> None:
    graphs, most = graphs_of(spec), spec.language.max_positions
    for name, value in overrides.items():
        if name == "capacity":
            if type(value) is not int or not 1 <= value <= most:
                raise _bad(f"{where}: capacity is {value!r}, expected 1 to {most} positions")
        elif name not in graphs:
            raise _bad(f"{where}: this model has no graph {name}; it has {', '.join(graphs)}")
        elif not isinstance(value, Mapping) or not value:
            raise _bad(f"{where}: {name} is {value!r}, expected profiles by name")


def _read_ranges(graph: GraphSpec, given: Any, free: tuple[str, ...], place: str) -> Ranges:
    derived = DERIVED.get(graph.name, ())
    symbols = [symbol for symbol in free if symbol not in derived]
    if not isinstance(given, Mapping) or not given or any(symbol not in symbols for symbol in given):
        raise _bad(f"{place} is {given!r}, expected ranges of {', '.join(symbols)}")
    ranges = {}
    for symbol, sizes in given.items():
        listed = [sizes] * 3 if type(sizes) is int else sizes
        if not isinstance(listed, list) or len(listed) != 3 or any(type(size) is not int for size in listed):
            raise _bad(f"{place}.{symbol} is {sizes!r}, expected [min, opt, max] or one number")
        least, usual, largest = listed
        low, high = graph.ranges.get(symbol, (1, None))
        if not low <= least <= usual <= largest or (high is not None and largest > high):
            bound = f"{low} or more" if high is None else f"{low} to {high}"
            raise _bad(f"{place}.{symbol} is {sizes!r}, expected increasing sizes of {bound}")
        ranges[symbol] = (least, usual, largest)
    return ranges


def _checked_sizes(spec: ModelSpec, ranges: Ranges, place: str) -> Ranges:
    side = spec.vision.patch_size * spec.vision.merge_size
    if wrong := next((size for symbol in ("height", "width") for size in ranges[symbol] if size % side), None):
        raise _bad(f"{place} has {wrong} pixels, expected multiples of {side}")
    return _with_tables(spec, ranges)
