"""Make a bundle of a recipe and judge it: once, since every finished trial is kept on disk with its answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bridge_stg.calibration.collect.samples import CalibrationSet
from bridge_stg.calibration.judge.judge import Judgement, judge
from bridge_stg.calibration.judge.subprocess_judge import PEAK, judge_in_subprocess
from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.quantize.scales import Scales
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.work_folder import digest, read_json, write_json
from bridge_stg.evaluation.run.evaluate import Model, bundle_model
from bridge_stg.runtime.bundle.bundle import Bundle

Progress = Callable[[str, int, int], Any]
FLOAT, INTEGERS = "float", "int8"


@dataclass(frozen=True, eq=False)
class RecipeTrials:
    """Judges recipes on one set of samples.

    Attributes:
        source: the bundle in float.
        prepared: smoothing and ranges.
        samples: what is asked.
        labelled: whether annotations count; otherwise the source's own tubes are the truth.
        work: the folder of the work.
        base: names everything that the prepared values were made from.
        options: `backend`, `variant` and `threads`.
        media: the folder of the media, as it was given.
        apart: whether bundles are asked in processes of their own.
        progress: called as progress(stage, done, total).
    """

    source: Bundle
    prepared: Scales
    samples: CalibrationSet
    labelled: bool
    work: Path
    base: str
    options: Mapping[str, Any]
    media: Path | None = None
    apart: bool = False
    progress: Progress | None = None

    def reference(self) -> Judgement:
        """Judge the source itself."""
        asked = digest(self.source.manifest.fingerprint, self.samples.digest, dict(self.options))
        folder = self.work / "float" / asked
        return self._judge(self.source.path, FLOAT, folder, None, None, None, stage="asking the float bundle")

    def trial(
        self,
        recipe: Recipe,
        reference: Judgement,
        *,
        chosen: Sequence[str] | None = None,
        stop_above: float | None = None,
        stage: str = "asking a quantized bundle",
    ) -> Judgement:
        """Quantize with a recipe and judge the answers; the bundle is removed again.

        Args:
            recipe: what is in integers.
            reference: the judgement of the source.
            chosen: ids of the samples that are asked; None: all.
            stop_above: see `judge`.
            stage: what progress calls it.
        """
        ids = None if chosen is None else list(chosen)
        key = digest(
            self.base, recipe.to_dict(), self.samples.digest, self.labelled, ids, stop_above, dict(self.options)
        )
        folder = self.work / "trials" / key
        finished = folder / "trial.json"
        identity = read_json(finished)
        if identity is not None:
            known = Model(INTEGERS, identity["model"], _gone)
            return self._judge(None, INTEGERS, folder, reference, ids, stop_above, stage=stage, model=known)
        path = self.make(recipe, folder / "bundle")
        judged = self._judge(path, INTEGERS, folder, reference, ids, stop_above, stage=stage)
        model = dict(bundle_model(path, INTEGERS, **self.options).identity)
        write_json(
            finished, {"model": model, "recipe": recipe.to_dict(), "drop": judged.drop, "changed": judged.changed}
        )
        shutil.rmtree(path)
        return judged

    def make(self, recipe: Recipe, path: Path, *, calibration: Mapping[str, Any] | None = None) -> Path:
        """Write the bundle of a recipe, unless it is there from before."""
        if not (path / "manifest.json").is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            quantize_bundle(
                self.source,
                path,
                recipe=recipe,
                ranges=self.prepared.ranges,
                smoothing=self.prepared.smoothing,
                calibration=calibration,
                progress=self.progress,
            )
        return path

    def judge_final(self, path: Path, label: str, folder: Path, reference: Judgement | None) -> Judgement:
        """Judge a bundle that stays, on all samples."""
        return self._judge(path, label, folder, reference, None, None, stage=f"judging the {label} bundle")

    def _judge(
        self,
        path: Path | None,
        label: str,
        folder: Path,
        reference: Judgement | None,
        ids: list[str] | None,
        stop_above: float | None,
        *,
        stage: str,
        model: Model | None = None,
    ) -> Judgement:
        known = model
        if known is None:
            assert path is not None
            known = bundle_model(path, label, **self.options)
        ask = None
        if self.apart and model is None and path is not None:
            ask = partial(
                _ask, path, label, samples=self.samples.file, media=self.media, chosen=ids, folder=folder,
                options=self.options,
            )  # fmt: skip
        report = self.progress
        return judge(
            known,
            self.samples.dataset.only(ids),
            folder=folder,
            reference=reference,
            labelled=self.labelled,
            stop_above=stop_above,
            ask=ask,
            progress=None if report is None else lambda _, done, total: report(stage, done, total),
        )


def peak_of(folder: Path) -> int | None:
    """Return the most memory that the process held that asked a bundle apart; None where it was not asked so."""
    try:
        peak: int = json.loads((folder / PEAK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return peak


def subset(trials: RecipeTrials, count: int) -> list[str]:
    """Return ids of so many samples, evenly over all."""
    ids = [sample.id for sample in trials.samples.dataset.samples]
    return ids if len(ids) <= count else [ids[place * len(ids) // count] for place in range(count)]


def on(trials: RecipeTrials, samples: CalibrationSet, *, labelled: bool) -> RecipeTrials:
    """Return the same trials on other samples."""
    return dataclasses.replace(trials, samples=samples, labelled=labelled)


def _ask(bundle: Path, label: str, limit: int | None, **options: Any) -> None:
    judge_in_subprocess(bundle, label, limit=limit, **options)


def _gone() -> AbstractContextManager[Any]:
    raise AssertionError("a finished trial is asked nothing")
