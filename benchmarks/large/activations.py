"""Fit the model of activation memory (`export/estimate/activations.py`) to figures of TensorRT-RTX's builder.

`measure WIDTH` writes a random checkpoint (seed 0) with the widths of a model, two layers and a vocabulary of 4096,
exports it, repeats the last decoder layer, and compiles the graphs with the profiles of several deployments for SM 86,
which needs no GPU; the builder logs the activation memory of each profile. `demo` is the demo's checkpoint.
`--dtype int8` takes a bundle that `calibrate` made of one in fp32, FOLDER/activations_WIDTH_int8.
`fit` fits some figures, and compares the model with all, of which those of `HELD_OUT` were not fitted. Figures, weights
and errors are in benchmarks/results/activations.json.

Usage: python benchmarks/large/activations.py measure 2b [--layers 28] [--dtype fp32]
       python benchmarks/large/activations.py fit
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
from repeat_layer import deepened
from scipy.optimize import nnls

from bridge_stg.checkpoint.checkpoint import load_config
from bridge_stg.export.engines.compile import compile_graph
from bridge_stg.export.engines.profiles import DRAFT_TOKENS, Deployment, GraphProfiles, profiles_of
from bridge_stg.export.engines.select_builds import load_tensorrt, weight_bytes
from bridge_stg.export.estimate.activations import largest_stage, profile_features, profile_sizes
from bridge_stg.export.estimate.memory import plan_bytes
from bridge_stg.export.estimate.shapes import LANGUAGE, SPATIAL, VISION, ModelShape, shape_of_config
from bridge_stg.export.estimate.work import STORAGE
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import EngineError

RESULT = Path("benchmarks/results/activations.json")
PAGE = Path("docs/engines.md")
MARKS = ("<!-- activations: begin -->", "<!-- activations: end -->")
SM = 86
WIDTHS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "narrow": ({"hidden_size": 512, "intermediate_size": 1536}, {"out_hidden_size": 512}),
    "2b": ({}, {}),
    "4b": (
        {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32}, {"out_hidden_size": 2560},
    ),
}  # fmt: skip
"""Changes of the text and vision configs of Qwen3-VL-2B."""
DEMO, DEMO_CHECKPOINT = "demo", Path("assets/demo/checkpoint")
ENGINE = ("width", "dtype", "layers", "graph", "variant", "for")
VARIANTS = ("standard", "primitive")
TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
DEPLOYMENTS = {
    "8x1": (8, 1), "8x8": (8, 8), "32x1": (32, 1), "32x8": (32, 8), "64x4": (64, 4), "128x2": (128, 2),
    "text": (32, 1), "short": (32, 1),
}  # fmt: skip
"""Frames and queries of the engines. `text` has the decode steps of text heads, `short` has short prefill steps."""
OVERRIDES: Mapping[str, Any] = {
    "text": {LANGUAGE: {"decode": {"L": [1, 1, DRAFT_TOKENS], "K": [1, 1, DRAFT_TOKENS]}}},
    "short": {LANGUAGE: {"prefill": {"L": [1, 64, 128]}}},
}
FRAMES = (
    {}, {"coarse_max_pixels": 256**2, "fine_max_pixels": 512**2, "encoder_chunk_patches": 4096},
    {"coarse_max_pixels": 448**2, "fine_max_pixels": 768**2, "encoder_chunk_patches": 8192},
    {"max_fine_frames": 32}, {"max_fine_frames": 24, "fine_max_pixels": 384**2, "coarse_max_pixels": 256**2},
)  # fmt: skip
"""Changes of the model's frames."""


def backbone_of(width: str, layers: int = 2) -> dict[str, Any]:
    """Return the config of a width with few layers."""
    text, vision = WIDTHS[width]
    values = copy.deepcopy(dict(shapes.SHAPES["qwen3_vl_2b"])) | TOKENS
    values["text_config"] = {**values["text_config"], "num_hidden_layers": layers, "vocab_size": 4096, **text}
    values["vision_config"] = {**values["vision_config"], "depth": 3, "deepstack_visual_indexes": [0, 1, 2], **vision}
    return values


def jobs(bundle: Bundle, width: str, deployments: Sequence[str]) -> Iterator[tuple[str, GraphSpec, GraphProfiles]]:
    """Yield the engines to compile: what they are for, a graph, and its profiles."""
    spec = bundle.manifest.spec
    if width == DEMO:
        for graph in (bundle.graph(name, v) for name in (LANGUAGE, VISION, SPATIAL) for v in VARIANTS):
            yield "default", graph, profiles_of(graph, spec)
        return
    for name in deployments:
        for variant in VARIANTS:
            graph, deployment = bundle.graph(LANGUAGE, variant), Deployment(*DEPLOYMENTS[name])
            yield name, graph, profiles_of(graph, spec, deployment=deployment, overrides=OVERRIDES.get(name))
    for index, changes in enumerate(FRAMES if len(deployments) > 1 else ()):
        changed = dataclasses.replace(spec, frames=dataclasses.replace(spec.frames, **changes))
        for graph in (bundle.graph(name, v) for name in (VISION, SPATIAL) for v in VARIANTS):
            found = profiles_of(graph, changed)
            landscape = {key: sizes for key, sizes in found.profiles.items() if "landscape" in key}
            yield f"frames {index}", graph, GraphProfiles(landscape)


@click.group()
def main() -> None:
    """Measure and fit activation memory."""


@main.command()
@click.argument("width", type=click.Choice([*WIDTHS, DEMO]))
@click.option("--dtype", type=click.Choice(["fp16", "fp32", "int8"]), default="fp16", show_default=True)
@click.option("--layers", default=2, show_default=True, help="Decoder layers, of which those after the second repeat.")
@click.option("--deployment", "deployments", multiple=True, type=click.Choice(list(DEPLOYMENTS)), help="Default: all.")
@click.option("--graph", "graphs", multiple=True, type=click.Choice(GRAPHS), help="Default: all.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/large"), show_default=True)
def measure(
    width: str, dtype: str, layers: int, deployments: Sequence[str], graphs: Sequence[str], folder: Path
) -> None:  # fmt: skip
    """Compile the graphs of a WIDTH, and add their figures to the result; one deployment: the language model only."""
    name = f"activations_{width}_{dtype}"
    if not (folder / name / "manifest.json").is_file():
        checkpoint = DEMO_CHECKPOINT
        if width != DEMO:
            shapes.SHAPES = {**shapes.SHAPES, width: backbone_of(width)}
            shapes.write_checkpoint(width, checkpoint := folder / f"{name}_checkpoint")
        export_bundle(checkpoint, folder / name, variants=VARIANTS, dtype=dtype, verify=False)
    loaded, tensorrt = Bundle.load(folder / name), load_tensorrt("tensorrt_rtx")
    layers = max(layers, loaded.manifest.spec.language.num_layers)
    for purpose, graph, profiles in jobs(loaded, width, deployments or tuple(DEPLOYMENTS)):
        repeats = layers > loaded.manifest.spec.language.num_layers
        if graph.name not in (graphs or ((LANGUAGE,) if repeats else GRAPHS)):
            continue
        path = loaded.graph_path(graph.name, graph.variant)
        if graph.name == LANGUAGE and repeats:
            path = deepened(path, layers, folder / f"deepened_{width}_{dtype}_{layers}")
        where = {"width": width, "dtype": dtype, "layers": layers, "graph": graph.name, "variant": graph.variant}
        where["for"] = purpose
        try:
            made = compile_graph(tensorrt, path, profiles.profiles, capacity=profiles.capacity, sms=(SM,))
        except EngineError as error:
            click.echo(f"{where}: {error}")
            continue
        engine = {"plan": made.plan.nbytes, "weights": weight_bytes(graph)}
        rows = []
        for key, found in zip(profiles.profiles, made.activations, strict=True):
            usual, most = profile_sizes(profiles.profiles[key], profiles.capacity)
            rows.append({**where, "profile": key, "usual": usual, "sizes": most, "bytes": found, **engine})
        add_rows(rows, where, str(tensorrt.__version__))


def add_rows(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], version: str) -> None:
    """Write figures into the result, in place of those of the same engine."""
    result = read_result()
    result["tensorrt"], result["sm"] = version, SM
    others = [row for row in result.get("figures", []) if any(row[key] != value for key, value in where.items())]
    result["figures"] = [*others, *rows]
    write_result(result)


@main.command()
def fit() -> None:
    """Fit the weights, print them for `activations.FITTED`, and write the errors into the result and the page."""
    result = read_result()
    result["fitted"], result["errors"] = {}, []
    for name, stages in STAGES.items():
        rows = [row for row in result["figures"] if name == f"{row['graph']} {row['variant']} {floats_of(row)}"]
        deep = [row for row in rows if not too_shallow(row)]
        found = [fitted([r for r in deep if not is_held_out(r) and belongs(r)], names)
                 for names, belongs in stages]  # fmt: skip
        result["fitted"][name] = found
        for row in deep:
            predicted = round(largest_stage(features_of(row), found))
            error = {"predicted": predicted, "error": round(predicted / row["bytes"] - 1, 4)}
            about = {key: value for key, value in row.items() if key not in ("usual", "sizes", "plan", "weights")}
            result["errors"].append(about | error | {"held_out": is_held_out(row)})
        click.echo(f'"{name}": {json.dumps(found)},')
    result["plans"] = list(plan_errors(result["figures"]))
    write_result(result)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    table = "\n".join((MARKS[0], *error_table(result), MARKS[1]))
    PAGE.write_text(before + table + rest.partition(MARKS[1])[2], encoding="utf-8")


def error_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the errors of held-out figures, of the demo's engines, and of all plans, in Markdown."""
    yield "| graph | variant | precision | figures | largest error | mean | demo | plans | largest error |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for kind in dict.fromkeys((row["graph"], row["variant"], row["dtype"]) for row in result["errors"]):
        same, plans = (
            [row for row in result[part] if (row["graph"], row["variant"], row["dtype"]) == kind]
            for part in ("errors", "plans")
        )
        held_out = [abs(row["error"]) for row in same if row["held_out"] and row["width"] != DEMO]
        demo = [row for row in same if row["width"] == DEMO]
        predicted, found = (max(row[key] for row in demo) for key in ("predicted", "bytes"))
        cells = [f"`{kind[0]}`", f"`{kind[1]}`", kind[2], str(len(held_out) or "")]
        cells += [f"{max(held_out):.1%}", f"{np.mean(held_out):.1%}"] if held_out else ["", ""]
        cells += [f"{predicted / found - 1:+.1%}", str(len(plans)), f"{max(abs(row['error']) for row in plans):.1%}"]
        yield f"| {' | '.join(cells)} |".replace("%", " %")


def plan_errors(figures: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the size of each engine's plan, and what is counted for it."""
    engines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in figures:
        if "plan" in row:
            engines.setdefault(tuple(row[key] for key in ENGINE), []).append(row)
    for where, rows in engines.items():
        about, row = dict(zip(ENGINE, where, strict=True)), rows[0]
        shape, storage = shape_of(row["width"], row["layers"]), STORAGE[row["dtype"]]
        counted = plan_bytes(shape, row["graph"], storage, row["weights"], weight_only=False, profiles=len(rows))
        sizes = {"weights": row["weights"], "bytes": row["plan"], "predicted": counted}
        yield about | {"profiles": len(rows)} | sizes | {"error": round(counted / row["plan"] - 1, 4)}


def too_shallow(row: Mapping[str, Any]) -> bool:
    """Return whether the keys of a figure's few layers are not what the builder copies in a deep model.

    It copies the keys of all layers or of all but one, which is no matter in a model of 28 layers.
    """
    return bool(row["graph"] == LANGUAGE and row["variant"] == "primitive" and decodes(row) and row["layers"] < 8)


def is_held_out(row: Mapping[str, Any]) -> bool:
    """Return whether a figure is not fitted."""
    return any(row[key] in values for key, values in HELD_OUT.items())


def floats_of(row: Mapping[str, Any]) -> str:
    """Return the floats between the matmuls of a figure's graph."""
    return "fp16" if row["dtype"] == "fp16" else "fp32"


def decodes(row: Mapping[str, Any]) -> bool:
    """Return whether a figure is of decoding."""
    return bool(row["profile"] == "decode")


def prefills(row: Mapping[str, Any]) -> bool:
    """Return whether a figure is of prefill."""
    return bool(row["profile"] == "prefill")


def anything(row: Mapping[str, Any]) -> bool:
    """Return true."""
    return True


def without_cache(row: Mapping[str, Any]) -> bool:
    """Return whether a figure is of a prefill whose MLP takes more than its short cache."""
    return not decodes(row) and bool(row["sizes"]["S"] < 2048)


HELD_OUT: Mapping[str, Sequence[Any]] = {
    "width": ("4b", DEMO), "layers": (36,), "for": ("frames 1", "frames 2", "frames 4")
}  # fmt: skip
"""Figures that are not fitted: other widths, another depth, and other sizes of frames."""
Stage = tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool]]
STAGES: Mapping[str, tuple[Stage, ...]] = {
    f"{LANGUAGE} primitive fp16": ((("inner", "query", "scores"), prefills), (("keys", "constant"), decodes)),
    f"{LANGUAGE} standard fp16": (
        (("inner", "query"), without_cache),
        (("inner", "query", "repeated", "mask", "constant"), lambda row: not without_cache(row)),
    ),
    f"{LANGUAGE} primitive fp32": ((("query", "scores", "repeated"), prefills), (("keys",), decodes)),
    f"{LANGUAGE} standard fp32": ((("scores", "repeated"), prefills), (("scores", "repeated", "constant"), decodes)),
    **{f"{VISION} {variant} fp16": ((("inner", "constant"), anything),) for variant in VARIANTS},
    **{f"{VISION} {variant} fp32": ((("inner", "scores"), anything),) for variant in VARIANTS},
    **{f"{SPATIAL} {variant} {dtype}": ((("hidden", "few", "constant"), anything),)
       for variant in VARIANTS for dtype in ("fp16", "fp32")},
}  # fmt: skip
"""Features of each stage, and the figures that it is fitted to."""


def features_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the features of a figure."""
    item = 2 if floats_of(row) == "fp16" else 4
    return profile_features(shape_of(row["width"], row["layers"]), row["graph"], row["sizes"], row["usual"], item)


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
    if width == DEMO:
        return shape_of_config(load_config(DEMO_CHECKPOINT))
    shapes.SHAPES = {**shapes.SHAPES, width: backbone_of(width, layers)}
    return shape_of_config(shapes.config_of(width))


def read_result() -> dict[str, Any]:
    """Return the result so far."""
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    return found


def write_result(result: Mapping[str, Any]) -> None:
    """Write the result, with a line per row."""
    parts = []
    for key, value in result.items():
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value) if isinstance(value, list) else ""
        parts.append(f" {json.dumps(key)}: " + (f"[\n{rows}\n ]" if rows else json.dumps(value)))
    RESULT.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
