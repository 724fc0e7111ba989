"""Write train_report.html from the files of a training: its log, its skipped media and its validations.

No torch modules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.report.pictures import TRUE, colour_of
from bridge_stg.evaluation.report.render import render
from bridge_stg.evaluation.report.report import case_values
from bridge_stg.evaluation.run.results import flat
from bridge_stg.evaluation.scoring import MAIN
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.parse import parse_json, parse_json_file
from bridge_stg.training.folder import LOG, REPORT, RUN, SKIPPED
from bridge_stg.training.report.curves import Curve, Point, curve
from bridge_stg.training.validation import Validator, read_settings, rows_path

LINE_FIELDS = ("stage", "step", "seconds")
"""Fields that lines of the log have in addition to figures."""
PICTURES = 12


@dataclass(frozen=True)
class ValidationMetrics:
    """The metrics of one validation by name."""

    stage: str
    step: int
    metrics: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.stage}, step {self.step:,}"


@dataclass
class StageLog:
    """What the log has of a stage.

    Attributes:
        figures: points by the name of the figure.
        validations: in the order of their steps.
        step: the last step.
        seconds: duration up to it.
    """

    figures: dict[str, list[Point]] = field(default_factory=dict)
    validations: list[ValidationMetrics] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0


@dataclass
class Log:
    """The content of log.jsonl: stages in their order, (name, description) of each event, number of damaged lines."""

    stages: dict[str, StageLog] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    damaged: int = 0

    @property
    def validations(self) -> list[ValidationMetrics]:
        """The validations of all stages."""
        return [one for stage in self.stages.values() for one in stage.validations]


def write_report(folder: Path, *, validator: Validator | None = None) -> Path:
    """Write `folder`/train_report.html, completely or not at all, and return it.

    `folder` is `OUT-training`. Without `validator`, that of the validations in the folder is read again. What cannot
    be read, such as a line that a crash cut off, is left out, and the page says so.

    Raises BridgeError `training.no_log` if the folder has no log.
    """
    log, warnings = read_log(folder), []
    if log.damaged:
        warnings.append(f"{log.damaged} lines of {LOG} cannot be read.")
    cases: list[dict[str, Any]] = []
    metric, best, newest = "", None, None
    if log.validations:
        newest = log.validations[-1]
        try:
            settings = (validator.validation, validator.seed) if validator else read_settings(folder)
            metric = settings[0].metric
            validator = validator or Validator(*settings)
        except (BridgeError, OSError) as error:
            warnings.append(f"There are no pictures: {error}")
        best = best_of(log.validations, metric) if metric else newest
        if validator is not None:
            cases = _cases(folder, validator, best, newest)
    skipped, _ = _lines(folder / SKIPPED)
    labels = _labels(best, newest)
    colours = [("truth", TRUE), *((label, colour_of(number)) for number, label in enumerate(labels))]
    page = render(
        "training/report/page.html.j2", name=folder.name, warnings=warnings,
        stages=[(name, stage, *_charts(stage, best)) for name, stage in log.stages.items()],
        metric=metric, first=next(iter(log.validations), None), best=best, newest=newest,
        cases=cases, colours=[(label, f"rgb{colour}") for label, colour in colours],
        events=log.events, event_counts=Counter(event for event, _ in log.events),
        skipped=skipped, reasons=Counter(str(line.get("reason", "")) for line in skipped),
        missing=[name for names in (validator.missing if validator else ()) for name in names], run=_run(folder),
    )  # fmt: skip
    with replacing(folder / REPORT) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
    return folder / REPORT


def read_log(folder: Path) -> Log:
    """Read log.jsonl of a training, which may still be running.

    A resumed training repeats steps since the state that it resumed from: later lines replace earlier ones.
    Raises BridgeError `training.no_log` if it does not exist.
    """
    path = folder / LOG
    if not path.is_file():
        message = f"{folder}: has no {LOG}; expected the folder OUT-training that `train --out OUT` writes"
        raise BridgeError("training.no_log", message)
    lines, damaged = _lines(path)
    log = Log(damaged=damaged)
    for line in lines:
        name, step, seconds = line.get("stage"), line.get("step"), line.get("seconds", 0)
        measured = line.get("validation")
        if (
            not isinstance(name, str) or type(step) is not int or not _number(seconds)
            or not isinstance(measured, (dict, type(None)))
        ):  # fmt: skip
            log.damaged += 1
            continue
        stage = log.stages.setdefault(name, StageLog())
        if "event" in line:
            text = ", ".join(f"{key}: {value}" for key, value in line.items() if key not in (*LINE_FIELDS, "event"))
            log.events.append((str(line["event"]), f"{name}, step {step:,}{text and f' ({text})'}"))
        elif measured is not None:
            stage.validations = [one for one in stage.validations if one.step < step]
            found = {key: float(value) for key, value in measured.items() if _number(value)}
            stage.validations.append(ValidationMetrics(name, step, found))
        else:
            stage.step, stage.seconds = step, seconds
            for key, points in stage.figures.items():
                stage.figures[key] = [point for point in points if point[0] < step] if points[-1][0] >= step else points
            for key, value in line.items():
                if key not in LINE_FIELDS and _number(value):
                    stage.figures.setdefault(key, []).append((step, float(value)))
    return log


def best_of(validations: Sequence[ValidationMetrics], metric: str) -> ValidationMetrics:
    """Return the earliest validation with the largest value of the metric; a value that is not finite is the least."""

    def value(one: ValidationMetrics) -> float:
        found = one.metrics.get(metric, math.nan)
        return found if math.isfinite(found) else -math.inf

    return max(validations, key=value)


def _charts(stage: StageLog, best: ValidationMetrics | None) -> tuple[list[Curve], list[Curve]]:
    """Return the curves of the metrics of validations, and of the figures of the training."""
    names = dict.fromkeys(name for one in stage.validations for name in one.metrics)
    measured = [
        curve(name, [(one.step, one.metrics[name]) for one in stage.validations if name in one.metrics], marks=True,
              best=best.step if best in stage.validations and best is not None else None)
        for name in names
    ]  # fmt: skip
    order = sorted(stage.figures, key=lambda name: name.startswith("learning_rate"))  # stable: these come last
    return measured, [curve(name, stage.figures[name]) for name in order]


def _labels(best: ValidationMetrics | None, newest: ValidationMetrics | None) -> list[str]:
    if best is None:
        return []
    return [f"best and newest ({best})"] if best is newest else [f"best ({best})", f"newest ({newest})"]


def _cases(
    folder: Path, validator: Validator, best: ValidationMetrics, newest: ValidationMetrics
) -> list[dict[str, Any]]:
    """Return samples with the answers of the best and the newest model: of each task, from the lowest score up."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for label, one in zip(_labels(best, newest), (best, newest)):
        lines, _ = _lines(rows_path(folder, one.stage, one.step))
        rows[label] = {row["index"]: row for row in lines if _is_row(row, len(validator.samples))}
    latest = list(rows.values())[-1]
    scores = {index: row["scores"].get(MAIN[row["task"]]) for index, row in latest.items()}
    tasks: dict[str, list[int]] = {}
    for index in sorted((i for i, score in scores.items() if _number(score)), key=lambda i: (scores[i], i)):
        tasks.setdefault(latest[index]["task"], []).append(index)
    cases = []
    for indices in tasks.values():
        count = min(len(indices), max(1, PICTURES // len(tasks)))
        for place in range(count):
            index = indices[round(place * (len(indices) - 1) / max(1, count - 1))]
            found = {label: known[index] for label, known in rows.items() if index in known}
            values = {label: row["scores"].get(MAIN[row["task"]]) for label, row in found.items()}
            cases.append(case_values(validator.samples[index], found, {"scores": values}))
    return cases


def _is_row(row: Mapping[str, Any], samples: int) -> bool:
    index = row.get("index")
    known = type(index) is int and 0 <= index < samples
    return known and row.get("task") in MAIN and isinstance(row.get("scores"), dict)


def _run(folder: Path) -> dict[str, Any]:
    """Return the values of run.json under dotted names; none if it cannot be read."""
    try:
        found = parse_json_file(folder / RUN)
    except (OSError, ValueError):
        return {}
    return flat(found) if isinstance(found, dict) else {}


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file of JSON lines, and the number of other lines; a last one may be unfinished.

    A file that does not exist has none.
    """
    found, damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            value = parse_json(line, finite=False)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            damaged += 1
    return found, damaged


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
