"""What is compared: one checkpoint, and the bundles made of it: fp32, int8 (w8a8) and int4 (w4).

Missing ones are made by the same parts as `export` and `calibrate`: of random weights no metric can be judged, so that
nothing is searched. Each step runs in a process of its own, since they take memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speed.workload.clips import calibration_samples

# isort: split
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.spec import ModelSpec

RECIPES = {"int8": "w8a8", "int4": "w4"}
DEMO = Path("assets/demo/checkpoint")


@dataclass(frozen=True)
class Model:
    """A checkpoint and where its bundles lie.

    Attributes:
        name: `demo`, or a key of `shapes.SHAPES`.
        checkpoint: its folder.
        bundles: folder of each precision.
        work: where clips, inputs and half-made things go.
    """

    name: str
    checkpoint: Path
    bundles: dict[str, Path]
    work: Path

    @property
    def spec(self) -> ModelSpec:
        """What the chain knows of the model."""
        return Bundle.load(next(iter(self.bundles.values()))).manifest.spec


def prepare(name: str, folder: Path, precisions: tuple[str, ...], given: dict[str, Path] | None = None) -> Model:
    """Return a model whose checkpoint and bundles are there, making what is missing.

    Args:
        name: see `Model.name`.
        folder: everything is below it, in a folder of the model's name.
        precisions: of `fp32`, `int8` and `int4`.
        given: a checkpoint (`checkpoint`) or bundles (by precision) that exist elsewhere.
    """
    work, given = folder / name, given or {}
    checkpoint = given.get("checkpoint", DEMO if name == "demo" else work / "checkpoint")
    if not (checkpoint / "config.json").is_file():
        from large.shapes import write_checkpoint

        write_checkpoint(name, checkpoint)
    bundles = {precision: given.get(precision, work / precision) for precision in ("fp32", *RECIPES)}
    model = Model(name, checkpoint, {p: bundles[p] for p in precisions}, work)
    for precision in ("fp32", *(p for p in precisions if p != "fp32")):
        if not (bundles[precision] / "manifest.json").is_file():
            make(precision, checkpoint, bundles, work)
    return model


def make(precision: str, checkpoint: Path, bundles: dict[str, Path], work: Path) -> None:
    """Make one bundle in a process of its own."""
    print(f"making {bundles[precision]} ({precision})", file=sys.stderr)
    if precision == "fp32":
        command = ["cli.py", "export", checkpoint, "--out", bundles["fp32"], "--dtype", "fp32", "--overwrite"]
    else:
        command = [__file__, bundles["fp32"], bundles[precision], RECIPES[precision], work]
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=sys.stderr)


def quantize(source: Path, out: Path, recipe: str, work: Path) -> None:
    """Collect statistics of a bundle on two clips (once), and write it by a recipe."""
    import onnx_ir as ir

    from bridge_stg.calibration.collect.collect import collect
    from bridge_stg.calibration.collect.samples import read_samples
    from bridge_stg.calibration.quantize.bundle import quantize_bundle
    from bridge_stg.calibration.quantize.ranges import choose_ranges
    from bridge_stg.calibration.quantize.smooth import choose_smoothing
    from bridge_stg.calibration.recipes import RECIPES as ALL
    from bridge_stg.export.graph.blocks import Matmul, find_matmuls

    bundle, chosen = Bundle.load(source), ALL[recipe]
    samples = read_samples(calibration_samples(work / "calibration", bundle.manifest.spec))
    folder = work / "statistics"
    if folder.is_dir() and stale(folder, bundle):
        shutil.rmtree(folder)
    statistics = collect(bundle, samples, folder=folder, low_memory=True, variant="standard")
    # Random weights have no outliers to move, and ranges that are searched for are no faster: that takes minutes.
    searched = source_is_trained(work)
    smoothing = choose_smoothing(statistics, chosen).vectors if searched else {}
    products: list[Matmul] = []
    for graph, of_graph in chosen.graphs.items():
        if of_graph.activations == "int8":
            products += find_matmuls(ir.load(bundle.graph_path(graph, "standard")), graph)
    ranges = choose_ranges(statistics, products, smoothing=smoothing, method=None if searched else "minmax")
    quantize_bundle(bundle, out, recipe=chosen, ranges=ranges, smoothing=smoothing, overwrite=True)


def source_is_trained(work: Path) -> bool:
    """Tell whether the model's weights mean something: only the demo's do."""
    return work.name == "demo"


def stale(folder: Path, bundle: Bundle) -> bool:
    """Tell whether statistics are of another bundle than this one."""
    file = folder / "collection.json"
    return not file.is_file() or json.loads(file.read_text())["fingerprint"] != bundle.manifest.fingerprint


if __name__ == "__main__":
    source_path, out_path, recipe_name, work_path = sys.argv[1:]
    quantize(Path(source_path), Path(out_path), recipe_name, Path(work_path))
