"""What a calibration is given, checked before anything is computed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge_stg.calibration.collect.samples import CalibrationSet, overlap, read_samples, warnings_of
from bridge_stg.export.engines.support import REFUSED, require, support
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.writer import is_bundle
from bridge_stg.runtime.errors import BridgeError, BundleError, EngineError

SPARE_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Inputs:
    """Bundle and samples.

    Attributes:
        bundle: in float.
        calibration: what flows through the chain.
        select: what the choice of blocks goes by; None: the calibration samples.
        evaluate: what judges the result; None: nothing does.
        own_tubes: whether the bundle's own tubes are the truth, not annotations.
        warnings: what a person should know of the samples.
    """

    bundle: Bundle
    calibration: CalibrationSet
    select: CalibrationSet | None
    evaluate: CalibrationSet | None
    own_tubes: bool
    warnings: tuple[str, ...]

    @property
    def chosen_on(self) -> CalibrationSet:
        """The samples that the choice goes by."""
        return self.select if self.select is not None else self.calibration

    @property
    def choice_labelled(self) -> bool:
        """Whether annotations decide the choice."""
        return self.select is not None and not self.own_tubes


def read_inputs(
    bundle: Path,
    out: Path,
    *,
    samples: Path,
    media: Path | None = None,
    select: Path | None = None,
    evaluate: Path | None = None,
    own_tubes: bool = False,
    overwrite: bool = False,
) -> Inputs:
    """Read and check everything; see `calibrate`.

    Raises:
        BridgeError: something is missing, does not fit, or would spoil the figures.
    """
    require_packages()
    source = Bundle.load(bundle)
    _check_source(source)
    _check_out(source, out, overwrite=overwrite)
    sets = read_sets(samples, media=media, select=select, evaluate=evaluate, own_tubes=own_tubes)
    found = warnings_of(sets["calibration"], {name: one for name, one in sets.items() if name != "calibration"})
    if select is None:
        found.append(
            "no --select was given: the choice of blocks went by the calibration samples, against the float bundle's "
            "own tubes"
        )
    elif own_tubes:
        found.append("nobody's annotations were used: the float bundle's own tubes are the truth")
    return Inputs(source, sets["calibration"], sets.get("select"), sets.get("evaluation"), own_tubes, tuple(found))


def read_sets(
    samples: Path,
    *,
    media: Path | None = None,
    select: Path | None = None,
    evaluate: Path | None = None,
    own_tubes: bool = False,
) -> dict[str, CalibrationSet]:
    """Read the files of samples that are given, as `calibration`, `select` and `evaluation`.

    Raises:
        BridgeError: a file is missing, has no labels where they are needed, or two share what they must not.
    """
    sets = {"calibration": _read(samples, media, "--samples")}
    for name, file in (("select", select), ("evaluation", evaluate)):
        if file is not None:
            sets[name] = _read(file, media, "--select" if name == "select" else "--evaluate")
            if not sets[name].labelled and not own_tubes:
                raise BridgeError(
                    f"{file}: not every line has labels (span, boxes), and without them nobody knows what is right. "
                    "Add them, or give --own-tubes to judge against the float bundle's own answers"
                )
    both = [sets[name].entries for name in ("select", "evaluation") if name in sets]
    if len(both) == 2 and (shared := overlap(*both)):
        raise BridgeError(
            f"{select} and {evaluate} share {len(shared)} samples or their media, the first {shared[0]!r}: what the "
            "choice was made on cannot judge it. Give other clips to one of them"
        )
    return sets


def require_packages() -> None:
    """Raise BridgeError with how to install it if a package is missing; imports none of them."""
    if missing := [package for package in ("onnx", "onnx_ir", "onnxruntime", "yaml") if not _installed(package)]:
        extra = "calibrate,cpu" if "onnxruntime" in missing else "calibrate"
        raise BridgeError(
            f'calibrate needs the package {missing[0]}, which is not installed: pip install "bridge-stg[{extra}]"'
        )


def check_targets(bundle: Bundle, recipes: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return what to tell of targets on which a recipe falls back, or that take some variants only.

    Args:
        bundle: that is quantized.
        recipes: `w8a8`, `w8`, `w4`, `kv8`.
        targets: names of `support.TARGETS`.

    Raises:
        EngineError: a target refuses a recipe in every variant of the bundle.
    """
    told: dict[str, None] = {}
    graphs = bundle.manifest.all_graphs()
    dtype = "fp16" if graphs[0].precision == "fp16" else "fp32"
    for target in targets:
        for recipe in recipes:
            variants = list(dict.fromkeys(graph.variant for graph in graphs))
            able = [name for name in variants if support(target, recipe, name, dtype).verdict != REFUSED]
            if not able:
                require(target, recipe, variants[0], dtype)
            told |= {sentence: None for name in able if (sentence := require(target, recipe, name, dtype))}
            if able and len(able) < len(variants):
                told[f"{target} takes {recipe} in the variant {' or '.join(able)} only."] = None
    return list(told)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _read(file: Path, media: Path | None, option: str) -> CalibrationSet:
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "does not exist"
        raise BridgeError(f"{option} {file} {found}; expected a file of JSON lines (docs/annotations.md).")
    return read_samples(file, media)


def _check_source(source: Bundle) -> None:
    quantized = [graph for graph in source.manifest.all_graphs() if graph.precision.split()[0] in ("int8", "int4")]
    if quantized or source.manifest.calibration is not None:
        what = f"graph {quantized[0]} is {quantized[0].precision}" if quantized else "its manifest names a calibration"
        raise BundleError(
            f"{source.path}: is quantized already ({what}); give the bundle in fp32 or fp16 it was made of."
        )
    for graph in source.manifest.all_graphs():
        if graph.precision not in ("fp32", "fp16"):
            raise BundleError(
                f"{source.path}: graph {graph} is {graph.precision}; calibrate takes fp32 and fp16. Export the "
                "checkpoint with --dtype fp32 or fp16"
            )


def _check_out(source: Bundle, out: Path, *, overwrite: bool) -> None:
    if out.resolve() == source.path.resolve():
        raise BundleError(f"{out}: is the bundle itself; give another --out.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not is_bundle(out):
            raise BundleError(f"{out}: exists and is not a bundle, so it is not replaced. Give another --out.")
        if not overwrite:
            raise BundleError(f"{out} is there already. Give --overwrite to replace it, or another --out.")
    folder = next(path for path in (out, *out.resolve().parents) if path.exists())
    weights = sum(entry.size for entry in source.manifest.entries().values())
    needed, free = 2 * weights + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise EngineError(
            f"{out}: the calibration needs {needed / 1e9:.1f} GB of disk there, and {free / 1e9:.1f} GB are free; make "
            "room, or give another --out"
        )
