"""Compile both families, with bridge and with text heads, in every precision for every target of TensorRT-RTX.

Usage: python -m benchmarks.gpu.engines [MODEL ...] [--out FILE] [--folder DIR] [--table]. Needs `[rtx,export]` and no
GPU. Models are tiny and random: which kernels a plan has does not depend on the weights. Every engine is built as
`build` does it, but with one profile per graph (the language model: all of its profiles). A graph that is refused
leaves the error's code and text. A run that was stopped continues where it was. --table prints the table of
docs/engines.md from the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge_stg.calibration.quantize.ranges import TensorRange
    from bridge_stg.runtime.bundle.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/engines.json"

from bridge_stg.calibration.options import RECIPE_NAMES  # noqa: E402
from bridge_stg.export.engines.layers import plan_summary  # noqa: E402
from bridge_stg.export.engines.targets import ahead_of_time  # noqa: E402

MODELS = ("qwen3_vl", "qwen3_vl text", "qwen2_5_vl", "qwen2_5_vl text")
FLOATS = ("fp32", "fp16", "bf16")
KV8 = "w8a8-kv8"
SOURCES = ("fp16", "fp32")
"""Float bundles that recipes quantize."""
PRECISIONS = (*FLOATS, *(f"{recipe} of {source}" for source in SOURCES for recipe in (*RECIPE_NAMES, KV8)))
VARIANTS = ("standard", "primitive")

Row = tuple[str, ...]
"""Model, precision, graph, variant and target."""
Engine = Mapping[str, Any]
"""Layers of an engine (`products` and `attention` by word), or `refused` (code of the error) and `reason`."""


def make_checkpoint(model: str, folder: Path) -> None:
    """Write the tiny checkpoint of one of `MODELS`."""
    from bridge_stg.checkpoint.checkpoint import save_checkpoint
    from bridge_stg.demo.tiny_model import write_demo_tokenizer
    from tests.bridge_stg.checkpoint.plain_folders import make_plain_folder
    from tests.export.conftest import random_model, tiny_config, tiny_windowed_config

    family, _, heads = model.partition(" ")
    if heads:
        make_plain_folder(folder, family, layers=3)
        return
    tokenizer = folder.with_name("tokenizer.json")
    write_demo_tokenizer(tokenizer)
    save_checkpoint(
        random_model({"qwen3_vl": tiny_config, "qwen2_5_vl": tiny_windowed_config}[family]()), folder, tokenizer
    )


def make_bundle(model: str, precision: str, folder: Path) -> Path:
    """Return the bundle of a model in one of `PRECISIONS`, made if it is missing."""
    from bridge_stg.calibration.quantize.bundle import quantize_bundle
    from bridge_stg.calibration.recipes import INT8, RECIPES
    from bridge_stg.export.export_bundle import export_bundle
    from bridge_stg.runtime.bundle.bundle import Bundle

    name = model.replace(" ", "_")
    out = folder / f"{name}-{precision.replace(' ', '_')}"
    if (out / "manifest.json").is_file():
        return out
    recipe_name, _, source_name = precision.partition(" of ")
    if not source_name:
        checkpoint = folder / f"{name}-checkpoint"
        if not checkpoint.exists():
            make_checkpoint(model, checkpoint)
        return export_bundle(checkpoint, out, dtype=precision, verify=False)
    source = Bundle.load(make_bundle(model, source_name, folder))
    recipe = RECIPES["w8a8" if recipe_name == KV8 else recipe_name]
    if recipe_name == KV8:
        recipe = recipe.replace("language_model", cache=INT8)
    graphs = {graph: one for graph, one in recipe.graphs.items() if graph in source.manifest.graphs}
    recipe = dataclasses.replace(recipe, graphs=graphs)
    return quantize_bundle(source, out, recipe=recipe, ranges=equal_ranges(source), variants=VARIANTS, measure=False)


def equal_ranges(bundle: Bundle) -> dict[str, dict[str, TensorRange]]:
    """Return the same range for every activation and cache buffer of a bundle."""
    import onnx_ir as ir

    from bridge_stg.calibration.quantize.ranges import TensorRange
    from bridge_stg.export.graph.blocks import find_matmuls

    found = {}
    for name, variants in bundle.manifest.graphs.items():
        cache = variants["standard"].cache
        nodes = [matmul.node for matmul in find_matmuls(ir.load(bundle.graph_path(name, "standard")), name)]
        nodes += cache.past_names if cache is not None else ()
        found[name] = dict.fromkeys(nodes, TensorRange(2.0**-5, "minmax", 127 / 2**5, 0.0))
    return found


def compile_one(path: Path, graph: str, variant: str, target: str) -> Engine:
    """Return the layers of one engine, or the code and reason of its refusal."""
    from bridge_stg.export.engines.build import build_engines
    from bridge_stg.export.engines.profiles import GraphProfiles, profiles_of
    from bridge_stg.runtime.bundle.bundle import Bundle
    from bridge_stg.runtime.errors import BridgeError

    bundle = Bundle.load(path)
    made = profiles_of(bundle.graph(graph, variant), bundle.manifest.spec)
    kept = list(made.profiles.items())[: None if graph == "language_model" else 1]
    try:
        (entry,) = build_engines(
            bundle, [target], graphs=[graph], variant=variant, check_memory=False,
            exact_profiles={graph: GraphProfiles(dict(kept), made.capacity)},
        )  # fmt: skip
    except BridgeError as error:
        return {"refused": error.code, "reason": str(error).replace(f"{path}/", "")}
    return plan_summary(entry.built["layers"])


def measure(models: Sequence[str], out: Path, folder: Path) -> None:
    """Compile what is not in the results yet, and write them after every bundle."""
    from bridge_stg.runtime.bundle.bundle import Bundle
    from bridge_stg.runtime.host.packages import installed_versions

    engines = read_engines(out) if out.is_file() else {}
    packages = installed_versions(("tensorrt-rtx-cu13-bindings", "onnx"))
    compiled: dict[tuple[str, ...], Engine] = {}
    for model, precision in itertools.product(models, PRECISIONS):
        path = make_bundle(model, precision, folder)
        words: Counter[str] = Counter()
        for graph in Bundle.load(path).manifest.all_graphs():
            if graph.variant not in VARIANTS:
                continue
            for target in ahead_of_time():
                row = (model, precision, graph.name, graph.variant, target)
                key = (target, graph.sha256, *(file.sha256 for file in graph.data))
                if row not in engines:  # recipes share graphs
                    engines[row] = compiled.get(key) or compile_one(path, graph.name, graph.variant, target)
                compiled[key] = engines[row]
                words[engines[row].get("refused", "compiled")] += 1
        lines = ",\n".join(f"  {json.dumps([*row, engine], ensure_ascii=False)}" for row, engine in engines.items())
        text = f'{{\n "packages": {json.dumps(packages)},\n "engines": [\n{lines}\n ]\n}}\n'
        out.write_text(text, encoding="utf-8")
        print(f"{model}, {precision}: {dict(words)}", flush=True)


def read_engines(file: Path) -> dict[Row, Engine]:
    """Return the results of a file."""
    return {(*row,): engine for *row, engine in json.loads(file.read_bytes())["engines"]}


def table(engines: Mapping[Row, Engine]) -> str:
    """Return the table of docs/engines.md: kernels per precision and target, over all models and both variants."""
    head = ("precision", "targets", "vision encoder", "language model", "attention, standard", "attention, primitive")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for precision in PRECISIONS:
        rows: dict[tuple[str, ...], list[str]] = {}
        for target in ahead_of_time():
            found: dict[tuple[str, str], list[Engine]] = {}
            for (_, of, graph, variant, on), engine in engines.items():
                if (of, on) == (precision, target):
                    found.setdefault((graph, variant), []).append(engine)
            cells = [
                _cell([one for variant in VARIANTS for one in found.get((graph, variant), ())], "products")
                for graph in ("vision_encoder", "language_model")
            ]
            cells += [_cell(found.get(("language_model", variant), ()), "attention") for variant in VARIANTS]
            rows.setdefault((*cells,), []).append(f"`{target}`")
        lines += [f"| {precision} | {', '.join(targets)} | {' | '.join(cells)} |" for cells, targets in rows.items()]
    return "\n".join(lines)


def _cell(results: Iterable[Engine], group: str) -> str:
    """Return the share of each word of a group, and the errors of graphs that are refused."""
    counts: Counter[str] = Counter()
    for one in results:
        counts.update([f"`{one['refused']}`"] if "refused" in one else one.get(group, {}))
    return ", ".join(word if word.startswith("`") else f"{count} {word}" for word, count in counts.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"of {MODELS}; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/engines", help="folder of checkpoints and bundles")
    parser.add_argument("--table", action="store_true", help="compile nothing; print the table")
    options = parser.parse_args()
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        measure(options.models, options.out, options.folder)
    print(table(read_engines(options.out)))


if __name__ == "__main__":
    sys.exit(main())
