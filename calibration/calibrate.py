"""From a bundle in float and samples to a quantized bundle with its report.

Collect → smooth and find ranges → gate each graph → rank the blocks → choose those that stay in float → judge. A killed
calibration goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge_stg.calibration.inputs import check_targets, read_inputs
from bridge_stg.calibration.options import Options, asked_recipe, recipe_names
from bridge_stg.calibration.recipes import Overrides, read_overrides, write_overrides
from bridge_stg.calibration.report.report import write_calibration_report
from bridge_stg.calibration.report.result import CalibrationResult
from bridge_stg.calibration.steps import Steps
from bridge_stg.calibration.work_folder import working_in
from bridge_stg.runtime.host.files import replace_folder

__all__ = ["Options", "calibrate"]

OVERRIDES = "overrides.yaml"


def calibrate(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    samples: Path,
    media: Path | None = None,
    select: Path | None = None,
    evaluate: Path | None = None,
    own_tubes: bool = False,
    options: Options | None = None,
    overwrite: bool = False,
    work: Path | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> CalibrationResult:
    """Quantize a bundle by what flows through it, and say what that costs in time spans and boxes.

    Args:
        bundle: in fp32 or fp16.
        out: the new bundle's folder; appears when it is complete, or not at all.
        samples: JSON lines; they decide the ranges of activations.
        media: the folder of all media; None: that of each file.
        select: labelled JSON lines; they decide which blocks stay in float. None: the samples, without labels.
        evaluate: labelled JSON lines that judge the result, and that nothing is chosen by.
        own_tubes: whether the bundle's own tubes are the truth, where nobody has annotated.
        options: what else is asked for.
        overwrite: whether to replace a bundle that is there.
        work: the folder of the work; None: OUT.calibration.
        progress: called as progress(stage, done, total).

    Returns:
        What was found; the report in the bundle holds it too.

    Raises:
        BridgeError: an input is missing or does not fit, nothing gains from INT8, or the limit cannot be held.
    """
    chosen = options or Options()
    target = Path(os.fspath(out))
    inputs = read_inputs(
        Path(os.fspath(bundle)), target, samples=samples, media=media, select=select, evaluate=evaluate,
        own_tubes=own_tubes, overwrite=overwrite,
    )  # fmt: skip
    overrides = Overrides() if chosen.overrides is None else read_overrides(chosen.overrides)
    recipe = asked_recipe(chosen, overrides, inputs.bundle)
    warned = check_targets(inputs.bundle, recipe_names(recipe), chosen.targets)
    folder = work or target.parent / f"{target.name}.calibration"
    with working_in(folder):
        steps = Steps(inputs, chosen, overrides, recipe, work=folder, media=media, progress=progress)
        result, made = steps.all(warned)
        write_calibration_report(made, result.to_dict())
        kept = [block for blocks in result.recipe["kept"].values() for block in blocks]
        decided = dataclasses.replace(overrides, keep_float=tuple(dict.fromkeys((*overrides.keep_float, *kept))))
        write_overrides(folder / OVERRIDES, decided)
        replace_folder(made, target, aside=target.with_name(f".{target.name}.old{os.getpid()}"))
    return result
