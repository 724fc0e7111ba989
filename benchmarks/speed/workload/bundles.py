"""Make the checkpoint and bundles to compare: fp32, int8 (w8a8) and int4 (w4).

Bundles that are missing, or were made by other code, are made with the parts of `export` and `calibrate`, without a
search, since no metric can be evaluated with random weights. Each step runs in a subprocess to free its memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from speed.workload.clips import calibration_samples

# isort: split
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.spec import ModelSpec

RECIPES = {"int8": "w8a8", "int4": "w4"}
DEMO = Path("assets/demo/checkpoint")
EXPORTING = ("export", "runtime/bundle", "bridge_stg/checkpoint", "bridge_stg/model")
"""Folders of the code that an fp32 bundle depends on."""
QUANTIZING = (*EXPORTING, "calibration")
RUNNING = (*QUANTIZING, "runtime")
"""Folders of the code that measurements depend on."""


@dataclass(frozen=True)
class Model:
    """A checkpoint and its bundles.

    Attributes:
        name: `demo`, or a key of `shapes.SHAPES`.
        checkpoint: folder of the checkpoint.
        bundles: bundle folder by precision.
        work: folder for clips, inputs and intermediate files.
    """

    name: str
    checkpoint: Path
    bundles: dict[str, Path]
    work: Path

    @property
    def spec(self) -> ModelSpec:
        """The model's specification, read from a bundle."""
        return Bundle.load(next(iter(self.bundles.values()))).manifest.spec


def request_of(model: Model) -> dict[str, Any]:
    """Return the model of the protocol's `load` request; the folder that it names is made."""
    (model.work / "peers").mkdir(parents=True, exist_ok=True)
    return {
        "name": model.name,
        "checkpoint": str(model.checkpoint.resolve()),
        "folder": str((model.work / "peers").resolve()),
        "bundles": {precision: str(path.resolve()) for precision, path in model.bundles.items()},
    }


def code_hash(folders: Sequence[str]) -> str:
    """Return a hash of all Python files below folders of the project."""
    hashed = hashlib.sha256()
    for folder in folders:
        for file in sorted(Path(folder).rglob("*.py")):
            hashed.update(str(file).encode() + b"\0" + file.read_bytes())
    return hashed.hexdigest()[:16]


def prepare(
    name: str,
    folder: Path,
    precisions: tuple[str, ...],
    given: dict[str, Path] | None = None,
    *,
    fresh: bool = False,
) -> Model:
    """Return a model, making its checkpoint if it is missing, and bundles that are missing or made by other code.

    Args:
        name: see `Model.name`.
        folder: parent of the model's folder, which has the model's name.
        precisions: any of `fp32`, `int8` and `int4`.
        given: existing checkpoint (key `checkpoint`) and bundles (keys are precisions) in other places, which are used
            as they are.
        fresh: make all bundles anew.
    """
    work, given = folder / name, given or {}
    checkpoint = given.get("checkpoint", DEMO if name == "demo" else work / "checkpoint")
    if not (checkpoint / "config.json").is_file():
        from large.shapes import write_checkpoint

        write_checkpoint(name, checkpoint)
    bundles = {precision: given.get(precision, work / precision) for precision in ("fp32", *RECIPES)}
    model = Model(name, checkpoint, {p: bundles[p] for p in precisions}, work)
    for precision in ("fp32", *(p for p in precisions if p != "fp32")):
        stamp, code = work / f"{precision}.code", code_hash(EXPORTING if precision == "fp32" else QUANTIZING)
        made = stamp.read_text(encoding="utf-8") if stamp.is_file() else None
        present = (bundles[precision] / "manifest.json").is_file()
        if not present or (precision not in given and (fresh or made != code)):
            make(precision, checkpoint, bundles, work)
            stamp.write_text(code, encoding="utf-8")
    return model


def make(precision: str, checkpoint: Path, bundles: dict[str, Path], work: Path) -> None:
    """Make one bundle in a subprocess."""
    print(f"making {bundles[precision]} ({precision})", file=sys.stderr)
    if precision == "fp32":
        # Every row is compared with torch when it is measured.
        options = ("--dtype", "fp32", "--overwrite", "--no-verify")
        command = ["cli.py", "export", checkpoint, "--out", bundles["fp32"], *options]
    else:
        command = [__file__, bundles["fp32"], bundles[precision], RECIPES[precision], work]
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=sys.stderr)


def quantize(source: Path, out: Path, recipe: str, work: Path) -> None:
    """Collect statistics of a bundle on two clips, once, and write the bundle quantized by a recipe."""
    import onnx_ir as ir

    from bridge_stg.calibration.collect.collect import collect
    from bridge_stg.calibration.collect.samples import read_samples
    from bridge_stg.calibration.quantize.bundle import quantize_bundle
    from bridge_stg.calibration.quantize.ranges import choose_ranges
    from bridge_stg.calibration.quantize.smooth import choose_smoothing
    from bridge_stg.calibration.recipes import RECIPES as ALL
    from bridge_stg.export.graph.blocks import Matmul, find_matmuls

    bundle = Bundle.load(source)
    graphs = {name: part for name, part in ALL[recipe].graphs.items() if name in bundle.manifest.graphs}
    chosen = dataclasses.replace(ALL[recipe], graphs=graphs)  # a plain model has no spatial decoder
    samples = read_samples(calibration_samples(work / "calibration", bundle.manifest.spec))
    folder = work / "statistics"
    if folder.is_dir() and stale(folder, bundle):
        shutil.rmtree(folder)
    statistics = collect(bundle, samples, folder=folder, low_memory=True, variant="standard")
    # Random weights have no outliers to smooth, and a search of ranges takes minutes without changing the speed.
    searched = source_is_trained(work)
    smoothing = choose_smoothing(statistics, chosen).vectors if searched else {}
    matmuls: list[Matmul] = []
    for graph, of_graph in chosen.graphs.items():
        if of_graph.activations == "int8":
            matmuls += find_matmuls(ir.load(bundle.graph_path(graph, "standard")), graph)
    ranges = choose_ranges(statistics, matmuls, smoothing=smoothing, method=None if searched else "minmax")
    quantize_bundle(bundle, out, recipe=chosen, ranges=ranges, smoothing=smoothing, overwrite=True)


def source_is_trained(work: Path) -> bool:
    """Return whether the model's weights are trained, which is true only for the demo."""
    return work.name == "demo"


def stale(folder: Path, bundle: Bundle) -> bool:
    """Return whether stored statistics belong to another bundle."""
    file = folder / "collection.json"
    return not file.is_file() or json.loads(file.read_text())["fingerprint"] != bundle.manifest.fingerprint


if __name__ == "__main__":
    source_path, out_path, recipe_name, work_path = sys.argv[1:]
    quantize(Path(source_path), Path(out_path), recipe_name, Path(work_path))
