"""Measure a model on held-out samples by the metrics of `evaluate`. No torch modules."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.evaluation.run.evaluate import answer, lost_row
from bridge_stg.evaluation.samples import Sample
from bridge_stg.evaluation.scoring import metrics_by_group
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.chain.tasks import TASKS
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.parse import parse_json_file
from bridge_stg.training.data.index import LISTED
from bridge_stg.training.data.sources import read_source, source_name
from bridge_stg.training.folder import VALIDATION
from bridge_stg.training.recipe import Source, Validation

SETTINGS = "validation.json"
COUNTS = ("samples", "failed", "absent")


class Validator:
    """The held-out samples of a training, the same in every process.

    The sources share the samples by their weights; one with fewer leaves its rest to the others. A smaller number of
    samples is a part of a larger one. Samples whose media are missing are left out.

    Attributes:
        validation: the settings.
        seed: seed of the choice.
        samples: the chosen samples in the order of the sources and their files.
        missing: names of media that were not found, per source.
        metric_names: the metrics that the samples have.
    """

    def __init__(self, validation: Validation, seed: int) -> None:
        """Read the annotations, and choose.

        Raises:
            AnnotationError: the annotations of a source cannot be read.
            BridgeError: `evaluation.no_media`, no medium was found; `training.bad_recipe`, the metric that decides
                which checkpoint is the best is not among those of the samples.
        """
        self.validation, self.seed = validation, seed
        self.missing: list[tuple[str, ...]] = []
        found: list[list[Sample]] = []
        self._allow_none: list[bool] = []
        for source in validation.sources:
            dataset = read_source(source)
            samples = dataset.chosen(limit=source.limit)
            found.append([sample for sample in samples if sample.media is not None])
            self.missing.append(tuple(sorted({sample.media_name for sample in samples if sample.media is None})))
            self._allow_none.append(dataset.allow_none)
        if not any(found):
            names = ", ".join(file for source in validation.sources for file in source.annotations) or "no sources"
            message = f"validation ({names}): none of the media was found; correct 'media' of the sources in the recipe"
            raise BridgeError("evaluation.no_media", message)
        counts = divide([source.weight for source in validation.sources], list(map(len, found)), validation.samples)
        self._chosen: list[tuple[int, Sample]] = []
        for number, (samples, count) in enumerate(zip(found, counts)):
            picked = np.random.default_rng([seed, number]).permutation(len(samples))[:count]
            self._chosen += [(number, samples[index]) for index in sorted(picked.tolist())]
        self.samples = tuple(sample for _, sample in self._chosen)
        blank = [lost_row(index, sample, "") | {"absent": 0.0} for index, sample in enumerate(self.samples)]
        self.metric_names = tuple(metrics(blank))
        if validation.metric not in self.metric_names:
            message = f"validation.metric is {validation.metric!r}; the samples have: {', '.join(self.metric_names)}"
            raise BridgeError("training.bad_recipe", message)

    def summary(self) -> str:
        """Return a text with the number of samples, and the media that were not found, for each source."""
        lines = [f"validation: {len(self.samples):,} samples"]
        for source, names in zip(self.validation.sources, self.missing):
            if names:
                more = f" and {len(names) - LISTED:,} more" if names[LISTED:] else ""
                lines.append(
                    f"  {source_name(source)}: {len(names):,} media not found: {', '.join(names[:LISTED])}{more}"
                )
        return "\n".join(lines)

    def validate(
        self, grounder: Any, *, process: int = 0, processes: int = 1,
        progress: Callable[[int, int], Any] | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Answer every `processes`-th sample from the `process`-th on; return a row for each, as `evaluate` writes it.

        `grounder` has `ground`, `span`, `locate` and `track`. A failure is part of its row. `progress` is called as
        progress(done, total) after each sample.
        """
        mine = list(enumerate(self._chosen))[process::processes]
        rows = []
        for done, (index, (source, sample)) in enumerate(mine, 1):
            row = answer(grounder, (index, sample), allow_none=self._allow_none[source])
            rows.append(row | {"source": self.validation.sources[source].dataset})
            if progress is not None:
                progress(done, len(mine))
        return rows

    def write(self, folder: Path, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write the rows of all processes to `folder`/validation/<stage>-<step>.jsonl, beside the settings."""
        path = rows_path(folder, stage, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {"seed": self.seed, "validation": dataclasses.asdict(_absolute(self.validation))}
        lines = [json.dumps(row, ensure_ascii=False) for row in sorted(rows, key=lambda row: row["index"])]
        for file, text in ((path.with_name(SETTINGS), json.dumps(settings)), (path, "\n".join(lines))):
            with replacing(file) as partial:
                partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        return path


def metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the metrics of rows by name, over all sources: m_tIoU, m_vIoU …; for each, a higher value is better.

    Metrics without a value, such as AUROC where no target is present, are left out.
    """
    parts = metrics_by_group(rows)
    values = {name: value for task in TASKS if task in parts for name, value in parts[task].items()}
    return {name: value for name, value in values.items() if name not in COUNTS and math.isfinite(value)}


def divide(weights: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Divide `total` by the weights (Sainte-Laguë's method), at most `sizes`; what one cannot take goes to the others.

    No share is smaller with a larger `total`.
    """
    counts = [0] * len(sizes)
    for _ in range(min(total, sum(sizes))):
        unfilled = [number for number, size in enumerate(sizes) if counts[number] < size]
        counts[min(unfilled, key=lambda number: (counts[number] + 0.5) / weights[number])] += 1
    return counts


def read_settings(folder: Path) -> tuple[Validation, int]:
    """Return the arguments of the validator whose rows are in `folder`/validation.

    Raises BridgeError `training.bad_log` if `Validator.write` did not write them.
    """
    path = folder / VALIDATION / SETTINGS
    try:
        values = parse_json_file(path)
        return from_json(Validation, values["validation"]), int(values["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: is not what a training wrote ({error}); the next validation writes it again"
        raise BridgeError("training.bad_log", message) from error


def rows_path(folder: Path, stage: str, step: int) -> Path:
    """Return the file of the rows of a validation."""
    return folder / VALIDATION / f"{stage}-{step}.jsonl"


def _absolute(validation: Validation) -> Validation:
    def absolute(source: Source) -> Source:
        files = tuple(str(Path(file).absolute()) for file in source.annotations)
        media = None if source.media is None else str(Path(source.media).absolute())
        return dataclasses.replace(source, annotations=files, media=media)

    return dataclasses.replace(validation, sources=tuple(map(absolute, validation.sources)))
