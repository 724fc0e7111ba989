"""Quantize a float bundle with calibration samples: `calibrate` is the list of the steps, in their order.

Each step keeps its results in the work folder, so that the same command resumes a killed calibration.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bridge_stg.calibration.collect.collect import INT4_ROWS, collect
from bridge_stg.calibration.collect.recorded_calls import record
from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.inputs import Inputs, read_inputs
from bridge_stg.calibration.options import LOCAL_BACKEND, Options
from bridge_stg.calibration.overrides import write_overrides
from bridge_stg.calibration.quantize.scales import compute_scales
from bridge_stg.calibration.recipes import FLOATING, GraphRecipe, Recipe
from bridge_stg.calibration.report.assemble import assemble
from bridge_stg.calibration.report.report import write_calibration_report
from bridge_stg.calibration.report.result import CalibrationResult
from bridge_stg.calibration.scoring.saturation_test import saturation_test
from bridge_stg.calibration.scoring.scores import Scores
from bridge_stg.calibration.scoring.speed_gate import Gate, graph_bytes, measure_gate
from bridge_stg.calibration.scoring.stage_times import stage_seconds
from bridge_stg.calibration.scoring.subprocess_scores import peak_of
from bridge_stg.calibration.search.float_blocks import Entries, choose_float_blocks, rank_by_sensitivity
from bridge_stg.calibration.search.matmul_errors import matmul_errors
from bridge_stg.calibration.search.trials import FLOAT, QUANTIZED, RecipeTrials
from bridge_stg.calibration.work_folder import digest, read_json, working_in, write_json
from bridge_stg.evaluation.samples import Sample
from bridge_stg.export.graph.blocks import INT4, Matmul, Table, find_matmuls, find_tables
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import graphs_of
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.files import replace_folder, temporary_sibling
from bridge_stg.runtime.parity.compare import Boundary

__all__ = ["Options", "calibrate"]

LARGE_BYTES = 2**30
"""Bundles with more weights are opened one at a time, and evaluated in subprocesses."""

RECORDED, TIMED = 3, 9
"""Number of samples whose calls are recorded for the speed gates, and of clips that stage times are measured on."""


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
    """Quantize a bundle, and measure the effect on time spans, boxes, speed and size.

    Args:
        bundle: folder of a bundle in fp32 or fp16.
        out: folder of the new bundle; it appears when it is complete, or not at all.
        samples: JSON lines whose activations are collected, for ranges and smoothing.
        media: folder of all media; None: the folder of each file of samples.
        select: labelled JSON lines that decide which blocks stay in float. None: `samples`, without their labels.
        evaluate: labelled JSON lines on which the result is scored; not used for decisions.
        own_tubes: whether the bundle's own tubes are the ground truth, for samples without annotations.
        options: all other options.
        overwrite: whether to replace an existing bundle.
        work: folder for intermediate results; None: OUT.calibration.
        progress: called as progress(stage, done, total).

    Returns:
        The result; the report in the bundle has the same content.

    Raises:
        BridgeError: an input is missing or does not fit, no graph gains from INT8, or no trial is within the limits.
    """
    destination = Path(os.fspath(out))
    chosen = options or Options()
    inputs = read_inputs(
        Path(os.fspath(bundle)), destination, samples=samples, options=chosen, media=media, select=select,
        evaluate=evaluate, own_tubes=own_tubes, overwrite=overwrite,
    )  # fmt: skip
    folder = work or destination.parent / f"{destination.name}.calibration"
    with working_in(folder):
        run = Run(inputs, chosen, folder, media, progress or (lambda stage, done, total: None))
        warnings, requested = list(inputs.warnings), inputs.recipe
        saturation = saturation_test()
        if not saturation.passed:
            warnings.append(saturation.sentence)
            requested = requested.with_reduced_range()
        with run.timed("collect"):
            statistics = collect(
                run.source, inputs.calibration, folder=folder / "statistics" / run.statistics_name, seed=chosen.seed,
                threads=chosen.threads, head_options=chosen.head_options, low_memory=run.large, progress=run.progress,
                more_rows=run.more_rows,
            )  # fmt: skip
        entries = quantizable(run.source, statistics.variants)
        with run.timed("ranges"):
            trials = prepare_trials(run, statistics, entries, requested)
        cases = record_calls(run)
        gates = measure_gates(run, trials, requested, cases)
        recipe = without_slow_graphs(requested, gates, graphs_of(run.source.manifest.spec))
        with run.timed("float bundle"):
            reference = trials.reference()
        with run.timed("sensitivity"):
            errors = matmul_errors(statistics, entries.matmuls, recipe, scales=trials.scales, progress=run.progress)
            ranked = rank_by_sensitivity(trials, recipe, entries, errors, reference, count=chosen.confirm)
        with run.timed("choice"):
            choice, tried = choose_float_blocks(trials, recipe, ranked, reference, chosen)
        final = recipe.with_float(*choice.kept)
        selected = trials.trial(final, reference, stop_above=chosen.max_drop)  # the search left its answers on disk
        made = write_bundle(run, trials, final)
        quantized = Bundle.load(made)
        with run.timed("drift"):
            final_gates, drift = replay_calls(run, quantized, final, cases)
        with run.timed("stage times"):
            stages = measure_stages(run, quantized)
        with run.timed("evaluation"):
            evaluation, peaks = evaluate_bundles(run, trials, quantized)
        result = assemble(
            inputs=inputs, options=chosen, bundle=quantized, recipe=final, requested=requested, saturation=saturation,
            gates={**gates, **final_gates}, drift=drift, stages=stages, peaks=peaks, ranked=ranked, choice=choice,
            tried=tried, selected=(reference, selected), evaluation=evaluation, seconds=run.seconds,
            session=run.session, warnings=[*warnings, *statistics.warnings],
        )  # fmt: skip
        write_calibration_report(made, result.to_dict())
        kept = [block for one in final.graphs.values() for block in one.keep_float]
        keep = dict.fromkeys((*inputs.overrides.keep_float, *kept))
        write_overrides(folder / "overrides.yaml", dataclasses.replace(inputs.overrides, keep_float=tuple(keep)))
        with temporary_sibling(destination) as temporary:
            os.rename(made, temporary)
            replace_folder(temporary, destination)
    return result


@dataclass(frozen=True, eq=False)
class Run:
    """The state that all steps of one calibration share, and the seconds per step so far."""

    inputs: Inputs
    options: Options
    work: Path
    media: Path | None
    progress: Callable[[str, int, int], Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def source(self) -> Bundle:
        """The float bundle."""
        return self.inputs.bundle

    @property
    def session(self) -> dict[str, Any]:
        """Options of every session: `backend`, `variant` and `threads`."""
        return {"backend": "auto", "variant": None, "threads": self.options.threads}

    @property
    def load_options(self) -> dict[str, Any]:
        """`session` and `Options.head_options`: how bundles are loaded, as plain values."""
        return {**self.session, **self.options.head_options}

    @property
    def statistics_name(self) -> str:
        """Digest of bundle, samples, seed, head options and numbers of rows."""
        more = [values for values in (self.options.head_options, self.more_rows) if values]
        return digest(self.source.manifest.fingerprint, self.inputs.calibration.digest, self.options.seed, *more)

    @property
    def more_rows(self) -> dict[str, int]:
        """Rows per tensor to collect of graphs with int4 weights."""
        return {name: INT4_ROWS for name, one in self.inputs.recipe.graphs.items() if one.weights == INT4}

    @property
    def large(self) -> bool:
        """Whether memory may be too small for two open bundles."""
        return sum(graph_bytes(self.source, name) for name in graphs_of(self.source.manifest.spec)) > LARGE_BYTES

    def forced(self, graph: str) -> bool:
        """Return whether a graph is quantized without regard to its gate: on request, or only for other backends.

        So are fp8 and nvfp4, which the CPU here only emulates.
        """
        return (
            graph in self.options.force_int8
            or LOCAL_BACKEND not in self.options.backends
            or (self.inputs.recipe.of(graph).weights in FLOATING)
        )

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of the block to those of a step."""
        began = time.monotonic()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + round(time.monotonic() - began, 2)


def quantizable(bundle: Bundle, variants: Mapping[str, str]) -> Entries:
    """Return the matmuls and tables of all graphs."""
    matmuls: list[Matmul] = []
    tables: list[Table] = []
    for name in bundle.manifest.graphs:
        model = ir.load(bundle.graph_path(name, variants[name]))
        matmuls += find_matmuls(model, name)
        tables += find_tables(model, name)
    return Entries(matmuls, tables)


def prepare_trials(run: Run, statistics: Statistics, entries: Entries, requested: Recipe) -> RecipeTrials:
    """Compute the scales that all recipes share, and return the trials that use them."""
    overrides = run.inputs.overrides
    decided = {"methods": dict(overrides.methods), "smoothing": dict(overrides.smoothing)}
    base = digest(run.statistics_name, requested.to_dict(), run.options.method, decided)
    scales = compute_scales(
        statistics, [matmul for matmul in entries.matmuls if requested.of(matmul.graph).activations != "float"],
        requested,
        folder=run.work / "scales" / base, method=run.options.method, overrides=overrides, progress=run.progress,
    )  # fmt: skip
    return RecipeTrials(
        source=run.source, scales=scales, samples=run.inputs.selection, labelled=run.inputs.selection_labelled,
        work=run.work, base=base, session=run.load_options, media=run.media, in_subprocess=run.large,
        progress=run.progress,
    )  # fmt: skip


def record_calls(run: Run) -> list[Path]:
    """Record the calls of all graphs on a few samples, each with another video."""
    samples = run.inputs.calibration.dataset.samples
    picked: dict[Path | None, Sample] = {}
    for sample in samples:
        if sample.task in ("tube", "span"):
            picked.setdefault(sample.media, sample)
    recorded = (list(picked.values()) or list(samples))[:RECORDED]
    ids = [sample.id for sample in recorded]
    name = digest(run.statistics_name, ids)
    run.progress("recording calls", 0, len(recorded))
    (run.work / "recorded").mkdir(exist_ok=True)
    return record(
        run.source, recorded, run.work / "recorded" / name, options=run.session, head_options=run.options.head_options
    )


def measure_gates(run: Run, trials: RecipeTrials, requested: Recipe, cases: Sequence[Path]) -> dict[str, Gate]:
    """Measure each graph that is to be quantized, with all of its blocks quantized."""
    folder = run.work / "gates" / digest(trials.base, [case.name for case in cases], run.session)
    file = folder.with_suffix(".json")
    known: Mapping[str, Gate] | None = read_json(file, Mapping[str, Gate])
    if known is None:
        with run.timed("gates"):
            bundle = Bundle.load(trials.make(requested, folder / "bundle"))
            known, _ = replay_calls(run, bundle, requested, cases)
        write_json(file, {name: dataclasses.asdict(gate) for name, gate in known.items()})
        shutil.rmtree(folder)
    return {name: dataclasses.replace(gate, forced=run.forced(name)) for name, gate in known.items()}


def without_slow_graphs(requested: Recipe, gates: Mapping[str, Gate], graphs: Sequence[str]) -> Recipe:
    """Return the recipe with graphs in float that gain nothing. Raises BridgeError if none of `graphs` gains."""
    closed = {name: GraphRecipe() for name, gate in gates.items() if not gate.open}
    recipe = dataclasses.replace(requested, graphs={**requested.graphs, **closed})
    if not any(recipe.of(name).quantizes for name in graphs):
        found = "; ".join(f"{name}: {gate.why}" for name, gate in gates.items()) or "the recipe keeps all in float"
        message = f"no graph gains from {requested.name} here ({found}); pass --force-int8 GRAPH to quantize it anyway"
        raise BridgeError("calibration.no_gain", message)
    return recipe


def write_bundle(run: Run, trials: RecipeTrials, recipe: Recipe) -> Path:
    """Write the final bundle into the work folder, with the samples in its manifest."""
    inputs, options = run.inputs, run.options
    about = {
        "samples": inputs.calibration.to_dict(),
        "select": None if inputs.select is None else inputs.select.sha256,
        "source": run.source.manifest.fingerprint,
        "method": options.method or "least error",
        "seed": options.seed,
        "max_drop": options.max_drop,
        "max_changed": options.max_changed,
    }
    folder = run.work / "final" / digest(trials.base, recipe.to_dict(), about)
    return trials.make(recipe, folder / "bundle", calibration=about)


def replay_calls(
    run: Run, bundle: Bundle, recipe: Recipe, cases: Sequence[Path]
) -> tuple[dict[str, Gate], list[Boundary]]:
    """Replay the recorded calls in both bundles, graph by graph. Return the gates, and the drift of the outputs."""
    gates, drift = {}, []
    graphs = [name for name in graphs_of(bundle.manifest.spec) if recipe.of(name).quantizes]
    for done, name in enumerate(graphs):
        run.progress("timing graphs", done, len(graphs))
        gates[name], found = measure_gate(
            name, run.source, bundle, cases, options=run.session, side_by_side=not run.large, forced=run.forced(name)
        )
        drift += found
    return gates, drift


def measure_stages(run: Run, bundle: Bundle) -> dict[str, Any]:
    """Measure the seconds of each stage on the same clips in both bundles."""
    clips = [sample for sample in run.inputs.selection.dataset.samples if sample.task in ("tube", "span")][:TIMED]
    run.progress("timing clips", 0, len(clips))
    bundles = {FLOAT: run.source.path, QUANTIZED: bundle.path}
    return stage_seconds(bundles, clips, options=run.load_options, side_by_side=not run.large)


def evaluate_bundles(
    run: Run, trials: RecipeTrials, bundle: Bundle
) -> tuple[tuple[Scores, Scores] | None, dict[str, int | None]]:
    """Score both bundles on the evaluation samples. Return the scores, and the peak memory by label."""
    inputs = run.inputs
    if inputs.evaluate is None:
        return None, {FLOAT: None, QUANTIZED: None}
    final = dataclasses.replace(trials, samples=inputs.evaluate, labelled=not inputs.own_tubes)
    folders = {
        label: run.work / "evaluation" / digest(one.manifest.fingerprint, inputs.evaluate.digest, run.load_options)
        for label, one in ((FLOAT, run.source), (QUANTIZED, bundle))
    }
    before = final.score(run.source.path, FLOAT, folders[FLOAT])
    after = final.score(bundle.path, QUANTIZED, folders[QUANTIZED], before)
    return (before, after), {label: peak_of(folder) for label, folder in folders.items()}
