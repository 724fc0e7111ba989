"""Try a recipe: write its bundle and score it. Finished trials stay on disk with their answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bridge_stg.calibration.collect.samples import CalibrationSet
from bridge_stg.calibration.options import load_arguments
from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.quantize.scales import Scales
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.scoring.scores import Scores, score_model
from bridge_stg.calibration.scoring.subprocess_scores import evaluate_in_subprocess
from bridge_stg.calibration.work_folder import digest, read_json, write_json
from bridge_stg.evaluation.run.evaluate import Model, bundle_model
from bridge_stg.runtime.bundle.bundle import Bundle

FLOAT, QUANTIZED = "float", "int8"
"""Labels of the two bundles."""


@dataclass(frozen=True, eq=False)
class RecipeTrials:
    """Scores recipes on one set of samples.

    Attributes:
        source: the float bundle.
        scales: smoothing and ranges.
        samples: the samples to score on.
        labelled: whether annotations are the ground truth; otherwise the source's own tubes are.
        base: digest of everything that the scales were computed from.
        session: how bundles are loaded, see `Run.load_options`.
        in_subprocess: whether each bundle is evaluated in a subprocess.
    """

    source: Bundle
    scales: Scales
    samples: CalibrationSet
    labelled: bool
    work: Path
    base: str
    session: Mapping[str, Any]
    media: Path | None = None
    in_subprocess: bool = False
    progress: Callable[[str, int, int], Any] | None = None

    def reference(self) -> Scores:
        """Score the source itself."""
        name = digest(self.source.manifest.fingerprint, self.samples.digest, dict(self.session))
        return self.score(self.source.path, FLOAT, self.work / "float" / name)

    def trial(
        self,
        recipe: Recipe,
        reference: Scores,
        *,
        ids: Sequence[str] | None = None,
        stop_above: float | None = None,
        stage: str = "evaluating a quantized bundle",
    ) -> Scores:
        """Quantize with a recipe, score the answers on the samples `ids` (None: all), and delete the bundle."""
        session = dict(self.session)
        key = digest(self.base, recipe.to_dict(), self.samples.digest, self.labelled, ids, stop_above, session)
        folder = self.work / "trials" / key
        score = partial(self.score, folder=folder, reference=reference, ids=ids, stop_above=stop_above, stage=stage)
        finished = folder / "trial.json"
        known = read_json(finished)
        if isinstance(known, dict) and isinstance(known.get("model"), dict):
            return score(Model(QUANTIZED, known["model"], nullcontext), QUANTIZED)
        path = self.make(recipe, folder / "bundle")
        scores = score(path, QUANTIZED)
        model = dict(bundle_model(path, QUANTIZED, **load_arguments(self.session)).identity)
        result = {"model": model, "recipe": recipe.to_dict(), "drop": scores.drop, "changed": scores.changed}
        write_json(finished, result)
        shutil.rmtree(path)
        return scores

    def make(self, recipe: Recipe, path: Path, *, calibration: Mapping[str, Any] | None = None) -> Path:
        """Write the bundle of a recipe, unless it exists; one without `calibration` is not for `verify`."""
        if not (path / "manifest.json").is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            quantize_bundle(
                self.source, path, recipe=recipe, ranges=self.scales.ranges, smoothing=self.scales.smoothing,
                int4=self.scales.int4, calibration=calibration, measure=calibration is not None,
                progress=self.progress,
            )  # fmt: skip
        return path

    def score(
        self,
        bundle: Path | Model,
        label: str,
        folder: Path,
        reference: Scores | None = None,
        *,
        ids: Sequence[str] | None = None,
        stop_above: float | None = None,
        stage: str | None = None,
    ) -> Scores:
        """Score a bundle; a `Model` stands for one whose answers are all in `folder`."""
        fill_rows = None
        if isinstance(bundle, Path) and self.in_subprocess:
            fill_rows = partial(
                evaluate_in_subprocess, bundle=bundle, label=label, samples=self.samples.file, media=self.media,
                ids=ids, folder=folder, options=self.session,
            )  # fmt: skip
        report = self.progress
        name = stage or f"evaluating the {label} bundle"
        return score_model(
            bundle if isinstance(bundle, Model) else bundle_model(bundle, label, **load_arguments(self.session)),
            self.samples.dataset.only(ids),
            folder=folder, reference=reference, labelled=self.labelled, stop_above=stop_above, fill_rows=fill_rows,
            progress=None if report is None else lambda _, done, total: report(name, done, total),
        )  # fmt: skip

    def spread_ids(self, count: int) -> list[str]:
        """Return the ids of at most `count` evenly spaced samples."""
        ids = [sample.id for sample in self.samples.dataset.samples]
        return ids if len(ids) <= count else [ids[place * len(ids) // count] for place in range(count)]
