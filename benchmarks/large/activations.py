"""Fit the model of activation memory (`export/estimate/activations.py`) to figures of TensorRT-RTX's builder.

`measure WIDTH` writes a random checkpoint (seed 0) with the widths of a model, few layers and a vocabulary of 4096,
exports it in fp16, and compiles its graphs for SM 86, which needs no GPU; the builder logs the activation memory of
each profile.
`fit` fits every second figure, and compares the model with the others, with the widths of `HELD_OUT`, and with other
numbers of layers. Figures, weights and errors are in benchmarks/results/activations.json.

Usage: python benchmarks/large/activations.py measure 2b [--layers 4]; python benchmarks/large/activations.py fit
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import shapes
from scipy.optimize import nnls

from bridge_stg.export.engines.compile import compile_graph
from bridge_stg.export.engines.profiles import GraphProfiles, profiles_of
from bridge_stg.export.engines.select_builds import load_tensorrt
from bridge_stg.export.estimate.activations import largest_stage, profile_features
from bridge_stg.export.estimate.shapes import LANGUAGE, SPATIAL, VISION, ModelShape, shape_of_config
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec

RESULT = Path("benchmarks/results/activations.json")
SM = 86
HELD_OUT = ("4b",)
"""Widths that are never fitted."""
TEXT_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32}
WIDTHS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "2b": ("qwen3_vl_2b", {}, {}),
    "4b": ("qwen3_vl_2b", TEXT_4B, {"out_hidden_size": 2560}),
}
"""Shape of `shapes.SHAPES`, and changes of its text and vision configs."""
TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}


POINTS = [
    {"B": rows, "L": new, "V": visual, "K": outputs, "S": positions}
    for rows, new, visual, outputs, positions in (
        (1, 256, 1025, 8, 2816), (1, 512, 2049, 8, 2816), (8, 16, 2, 8, 2816), (2, 128, 4097, 8, 2816),
        (1, 256, 1025, 8, 5120), (1, 512, 2049, 8, 5120), (8, 16, 2, 8, 5120), (2, 128, 4097, 8, 5120),
        (8, 512, 2049, 8, 2816), (1, 1024, 8193, 8, 9728), (4, 16, 2, 8, 9728), (1, 384, 1537, 1, 1536),
        (8, 1, 2, 1, 4096),
    )
]  # fmt: skip
"""Largest sizes of the profiles of the language model in the variant `primitive`."""
PAIRS = (
    (2816, (1, 512, 2049, 8), (8, 16, 2, 8)), (5120, (1, 256, 1025, 8), (4, 16, 2, 8)),
    (9728, (1, 1024, 8193, 8), (2, 16, 2, 8)), (1536, (8, 512, 2049, 8), (1, 128, 2, 128)),
    (2816, (2, 128, 4097, 8)),
)  # fmt: skip
"""KV capacity, and B, L, V and K of one or two profiles, of `standard`: the builder fails with many at once."""


def backbone_of(width: str, layers: int = 2) -> dict[str, Any]:
    """Return the config of a width with few layers."""
    base, text, vision = WIDTHS[width]
    values = copy.deepcopy(dict(shapes.SHAPES[base])) | TOKENS
    values["text_config"] = {**values["text_config"], "num_hidden_layers": layers, "vocab_size": 4096, **text}
    values["vision_config"] = {**values["vision_config"], "depth": 3, "deepstack_visual_indexes": [0, 1, 2], **vision}
    return values


def jobs(bundle: Bundle) -> Iterator[tuple[GraphSpec, GraphProfiles]]:
    """Yield the engines to compile: a graph and its profiles."""
    spec = bundle.manifest.spec
    frames = spec.frames
    profiles = {str(index): _up_to(point) for index, point in enumerate(POINTS)}
    yield bundle.graph(LANGUAGE, "primitive"), GraphProfiles(profiles)
    for capacity, *pair in PAIRS:
        made = {str(index): _up_to(dict(zip("BLVK", sizes, strict=True))) for index, sizes in enumerate(pair)}
        yield bundle.graph(LANGUAGE, "standard"), GraphProfiles(made, capacity)
    own = (frames.coarse_max_pixels, frames.fine_max_pixels, frames.encoder_chunk_patches)
    for name in (VISION, SPATIAL):
        for variant in ("standard", "primitive"):
            graph, of_sizes = bundle.graph(name, variant), {}
            for coarse, fine, patches in (own, (256**2, 512**2, 4096), (448**2, 768**2, 8192)):
                changed = dataclasses.replace(
                    frames, coarse_max_pixels=coarse, fine_max_pixels=fine, encoder_chunk_patches=patches
                )
                found = profiles_of(graph, dataclasses.replace(spec, frames=changed))
                of_sizes |= {f"{key}_{fine}": sizes for key, sizes in found.profiles.items() if "landscape" in key}
            yield graph, GraphProfiles(of_sizes)


def _up_to(most: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
    return {symbol: (2 if symbol == "V" else 1, size, size) for symbol, size in most.items()}


@click.group()
def main() -> None:
    """Measure and fit activation memory."""


@main.command()
@click.argument("width", type=click.Choice(list(WIDTHS)))
@click.option("--layers", default=2, show_default=True, help="Decoder layers.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/large"), show_default=True)
def measure(width: str, layers: int, folder: Path) -> None:
    """Compile the graphs of a WIDTH, and add their figures to the result."""
    name = f"activations_{width}_{layers}"
    if not (folder / name / "manifest.json").is_file():
        shapes.SHAPES = {**shapes.SHAPES, width: backbone_of(width, layers)}
        shapes.write_checkpoint(width, checkpoint := folder / f"{name}_checkpoint")
        export_bundle(checkpoint, folder / name, variants=("standard", "primitive"), dtype="fp16", verify=False)
    loaded, tensorrt, rows = Bundle.load(folder / name), load_tensorrt("tensorrt_rtx"), []
    for graph, profiles in jobs(loaded):
        path = loaded.graph_path(graph.name, graph.variant)
        made = compile_graph(tensorrt, path, profiles.profiles, capacity=profiles.capacity, sms=(SM,))
        for sizes, found in zip(profiles.profiles.values(), made.activations, strict=True):
            most = {symbol: size[2] for symbol, size in sizes.items()}
            most |= {} if profiles.capacity is None else {"S": profiles.capacity}
            where = {"width": width, "layers": layers, "graph": graph.name, "variant": graph.variant}
            rows.append({**where, "sizes": most, "bytes": found})
    result = read_result()
    result["tensorrt"], result["sm"] = str(tensorrt.__version__), SM
    kept = [row for row in result.get("figures", []) if (row["width"], row["layers"]) != (width, layers)]
    result["figures"] = kept + rows
    write_result(result)


@main.command()
def fit() -> None:
    """Fit the weights, write them with the errors, and print them for `activations.FITTED`."""
    result = read_result()
    result["fitted"], result["errors"] = {}, []
    for graph, variant in dict.fromkeys((row["graph"], row["variant"]) for row in result["figures"]):
        rows = [row for row in result["figures"] if (row["graph"], row["variant"]) == (graph, variant)]
        inside = [row for row in rows if row["width"] not in HELD_OUT and row["layers"] == FITTED_LAYERS]
        stages = []
        for names, belongs in STAGES[f"{graph} {variant}"]:
            stages.append(fitted([row for row in inside[::2] if belongs(row)], names))
        result["fitted"][f"{graph} {variant}"] = stages
        for row in rows:
            found = largest_stage(features_of(row), stages)
            held_out, error = row not in inside[::2], round(found / row["bytes"] - 1, 4)
            result["errors"].append({**row, "predicted": round(found), "error": error, "held_out": held_out})
        key = (graph, variant)
        errors = [e["error"] for e in result["errors"] if (e["graph"], e["variant"]) == key and e["held_out"]]
        worst, mean = max(map(abs, errors), default=0.0), float(np.mean(np.abs(errors))) if errors else 0.0
        click.echo(f"{graph} {variant}: {json.dumps(stages)}")
        click.echo(f"  {len(errors)} figures held out: worst {worst:.1%}, mean {mean:.1%}")
    write_result(result)


Stage = tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool]]
SPATIAL_STAGES: tuple[Stage, ...] = ((("hidden", "constant"), lambda row: True),)
VISION_STAGES: tuple[Stage, ...] = ((("inner", "constant"), lambda row: True),)
STAGES: Mapping[str, tuple[Stage, ...]] = {
    f"{LANGUAGE} primitive": (
        (("inner", "scores", "cache", "constant"), lambda row: row["sizes"]["L"] > 16),
        (("caches", "constant"), lambda row: row["sizes"]["L"] <= 16),
    ),
    f"{LANGUAGE} standard": ((("inner", "repeated", "constant"), lambda row: True),),
    **{f"{VISION} {variant}": VISION_STAGES for variant in ("standard", "primitive")},
    **{f"{SPATIAL} {variant}": SPATIAL_STAGES for variant in ("standard", "primitive")},
}
"""Features of each stage, and the figures that it is fitted to: prefill to attention, decoding to the caches."""
FITTED_LAYERS = 2


def features_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the features of a figure."""
    return profile_features(shape_of(row["width"], row["layers"]), row["graph"], row["sizes"])


def fitted(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Return non-negative weights with the least squared relative error."""
    features = [features_of(row) for row in rows]
    matrix = np.array([[found[name] for name in names] for found in features])
    targets = np.array([row["bytes"] for row in rows], float)
    scale = np.abs(matrix).max(axis=0)
    solution = nnls(matrix / scale / targets[:, None], np.ones(len(rows)))[0] / scale
    return {name: round(float(value), 4) for name, value in zip(names, solution, strict=True) if value > 0}


@functools.cache
def shape_of(width: str, layers: int) -> ModelShape:
    """Return the shape of a width."""
    shapes.SHAPES = {**shapes.SHAPES, width: backbone_of(width, layers)}
    return shape_of_config(shapes.config_of(width))


def read_result() -> dict[str, Any]:
    """Return the result so far."""
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    return found


def write_result(result: Mapping[str, Any]) -> None:
    """Write the result."""
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
