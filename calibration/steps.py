"""The steps of one calibration, in their order; each keeps what it found in the work folder."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bridge_stg.calibration.collect.collect import collect
from bridge_stg.calibration.collect.recorded_calls import record
from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.inputs import Inputs
from bridge_stg.calibration.judge.saturation_test import saturation_test
from bridge_stg.calibration.judge.speed_gate import Gate, graph_bytes, measure_gate
from bridge_stg.calibration.judge.stage_times import stage_seconds
from bridge_stg.calibration.options import HERE, Options
from bridge_stg.calibration.quantize.scales import prepare
from bridge_stg.calibration.recipes import GraphRecipe, Overrides, Recipe
from bridge_stg.calibration.report.assemble import Findings, Pair, assemble
from bridge_stg.calibration.report.result import CalibrationResult
from bridge_stg.calibration.search.float_blocks import Entries, chosen_blocks, ranked_blocks
from bridge_stg.calibration.search.matmul_errors import product_errors
from bridge_stg.calibration.search.trials import FLOAT, INTEGERS, RecipeTrials, on, peak_of
from bridge_stg.calibration.work_folder import digest, read_json, write_json
from bridge_stg.evaluation.samples import Sample
from bridge_stg.export.graph.blocks import INT8, Matmul, Table, find_matmuls, find_tables
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.parity.compare import Boundary

LARGE_BYTES = 2**30
"""Bundles with more weights are opened one at a time, and asked in processes of their own."""

RECORDED, TIMED = 3, 9
"""Samples whose calls are recorded for the gates, and that stage times are taken on."""


class Steps:
    """One calibration.

    Args:
        inputs: what was given, checked.
        options: what was told.
        overrides: what a person decided.
        recipe: that is asked for, overrides applied.
        work: the folder of the work.
        media: the folder of the media, as it was given.
        progress: called as progress(stage, done, total).
    """

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        overrides: Overrides,
        recipe: Recipe,
        *,
        work: Path,
        media: Path | None = None,
        progress: Callable[[str, int, int], Any] | None = None,
    ) -> None:
        self.inputs, self.options, self.overrides, self.asked = inputs, options, overrides, recipe
        self.work, self.media, self.source = work, media, inputs.bundle
        self.progress = progress or (lambda stage, done, total: None)
        self.large = sum(graph_bytes(self.source, name) for name in GRAPHS) > LARGE_BYTES
        self.engine: dict[str, Any] = {"backend": "auto", "variant": None, "threads": options.threads}
        self.seconds: dict[str, float] = {}

    def all(self, warned: Sequence[str] = ()) -> tuple[CalibrationResult, Path]:
        """Do every step. Return what was found, and the finished bundle in the work folder."""
        tested = saturation_test()
        if not tested.passed:
            warned = [*warned, tested.sentence]
            self.asked = _reduced(self.asked)
        statistics, trials, entries = self._prepared()
        cases = self._recorded()
        gates = self._gates(trials, cases)
        recipe = self._gated(gates)
        with self._timed("float bundle"):
            reference = trials.reference()
        with self._timed("sensitivity"):
            products = [entry for entry in entries.in_integers(recipe) if isinstance(entry, Matmul)]
            errors = product_errors(
                statistics, products, recipe, ranges=trials.prepared.ranges, smoothing=trials.prepared.smoothing,
                progress=self.progress,
            )  # fmt: skip
            ranked = ranked_blocks(trials, recipe, entries, errors, reference, count=self.options.confirm)
        with self._timed("choice"):
            choice, tried = chosen_blocks(trials, recipe, ranked, reference, self.options)
        final = recipe.with_float(*choice.kept)
        judged = trials.trial(final, reference, stop_above=self.options.max_drop)  # as the search left it on disk
        path = self._made(trials, final)
        bundle = Bundle.load(path)
        with self._timed("drift"):
            measured, drift = self._measured(bundle, final, cases)
        with self._timed("stage times"):
            stages = self._stages(path)
        with self._timed("evaluation"):
            evaluation, peaks = self._evaluated(trials, path)
        findings = Findings(
            inputs=self.inputs, options=self.options, bundle=bundle, recipe=final, asked=self.asked,
            self_test=tested, gates={**gates, **measured}, drift=drift, stages=stages, peaks=peaks, ranked=ranked,
            choice=choice, tried=tried, judged=(reference, judged), evaluation=evaluation, seconds=self.seconds,
            engine=self.engine, warnings=(*self.inputs.warnings, *statistics.warnings, *warned),
        )  # fmt: skip
        return assemble(findings), path

    def _prepared(self) -> tuple[Statistics, RecipeTrials, Entries]:
        """Collect statistics; find smoothing and ranges."""
        asked = self.inputs.calibration
        name = digest(self.source.manifest.fingerprint, asked.digest, self.options.seed)
        with self._timed("collect"):
            statistics = collect(
                self.source, asked, folder=self.work / "statistics" / name, seed=self.options.seed,
                threads=self.options.threads, lean=self.large, progress=self.progress,
            )  # fmt: skip
        entries = bundle_entries(self.source, statistics.variants)
        decided = {"methods": dict(self.overrides.methods), "smoothing": dict(self.overrides.smoothing)}
        base = digest(name, self.asked.to_dict(), self.options.method, decided)
        with self._timed("ranges"):
            quantized = [product for product in entries.products if self.asked.of(product.graph).quantizes]
            prepared = prepare(
                statistics, quantized, self.asked, folder=self.work / "prepared" / base,
                method=self.options.method, overrides=self.overrides, progress=self.progress,
            )  # fmt: skip
        trials = RecipeTrials(
            self.source, prepared, self.inputs.chosen_on, self.inputs.choice_labelled, self.work, base, self.engine,
            self.media, self.large, self.progress,
        )  # fmt: skip
        return statistics, trials, entries

    def _recorded(self) -> list[Path]:
        """Record what flows through the chain on a few samples, each of another medium."""
        picked: dict[Path | None, Sample] = {}
        for sample in self.inputs.calibration.dataset.samples:
            if sample.task in ("tube", "span"):
                picked.setdefault(sample.media, sample)
        samples = (list(picked.values()) or list(self.inputs.calibration.dataset.samples))[:RECORDED]
        name = digest(self.source.manifest.fingerprint, self.inputs.calibration.digest, [s.id for s in samples])
        self.progress("recording calls", 0, len(samples))
        (self.work / "recorded").mkdir(exist_ok=True)
        return record(self.source, samples, self.work / "recorded" / name, allow_none=False, options=self.engine)

    def _gates(self, trials: RecipeTrials, cases: Sequence[Path]) -> dict[str, Gate]:
        """Measure each graph that is asked for in integers, with all of its blocks in integers."""
        name = digest(trials.base, [case.name for case in cases], self.engine)
        kept = self.work / "gates" / f"{name}.json"
        known = read_json(kept)
        if known is None:
            with self._timed("gates"):
                folder = self.work / "gates" / name
                bundle = Bundle.load(trials.make(self.asked, folder / "bundle"))
                gates, _ = self._measured(bundle, self.asked, cases)
            write_json(kept, {name: dataclasses.asdict(gate) for name, gate in gates.items()})
            shutil.rmtree(folder)
            known = read_json(kept)
        return {name: dataclasses.replace(Gate(**gate), forced=self._forced(name)) for name, gate in known.items()}

    def _gated(self, gates: Mapping[str, Gate]) -> Recipe:
        """Return the recipe without the graphs that gain nothing. Raises BridgeError where none is left."""
        shut = {name: GraphRecipe() for name, gate in gates.items() if not gate.open}
        recipe = dataclasses.replace(self.asked, graphs={**self.asked.graphs, **shut})
        if not any(recipe.of(name).quantizes for name in GRAPHS):
            found = "; ".join(f"{name}: {gate.why}" for name, gate in gates.items()) or "the recipe is float throughout"
            raise BridgeError(
                f"no graph gains from {self.asked.name} on this machine, so no bundle was written. {found}. Give "
                "--force-int8 GRAPH to have it all the same"
            )
        return recipe

    def _measured(
        self, bundle: Bundle, recipe: Recipe, cases: Sequence[Path]
    ) -> tuple[dict[str, Gate], list[Boundary]]:
        """Replay the recorded calls in both bundles, graph by graph."""
        gates, drift = {}, []
        graphs = [name for name in GRAPHS if recipe.of(name).quantizes]
        for done, name in enumerate(graphs):
            self.progress("timing graphs", done, len(graphs))
            gates[name], found = measure_gate(
                name, self.source, bundle, cases, options=self.engine, side_by_side=not self.large,
                forced=self._forced(name),
            )  # fmt: skip
            drift += found
        return gates, drift

    def _forced(self, graph: str) -> bool:
        """Whether a graph is quantized whatever is measured here: asked for, or meant for other machines alone."""
        return graph in self.options.force_int8 or HERE not in self.options.targets

    def _made(self, trials: RecipeTrials, recipe: Recipe) -> Path:
        """Write the bundle of the choice, its samples in its manifest."""
        about = {
            "samples": self.inputs.calibration.to_dict(),
            "select": None if self.inputs.select is None else self.inputs.select.sha256,
            "source": self.source.manifest.fingerprint,
            "method": self.options.method or "least error",
            "seed": self.options.seed,
            "max_drop": self.options.max_drop,
            "max_changed": self.options.max_changed,
        }
        folder = self.work / "final" / digest(trials.base, recipe.to_dict(), about)
        return trials.make(recipe, folder / "bundle", calibration=about)

    def _stages(self, path: Path) -> dict[str, Any]:
        clips = [sample for sample in self.inputs.chosen_on.dataset.samples if sample.task in ("tube", "span")][:TIMED]
        bundles = {FLOAT: self.source.path, INTEGERS: path}
        self.progress("timing clips", 0, len(clips))
        return stage_seconds(bundles, clips, options=self.engine, side_by_side=not self.large)

    def _evaluated(self, trials: RecipeTrials, path: Path) -> tuple[Pair | None, dict[str, int | None]]:
        """Judge both bundles on the samples that nothing was chosen by."""
        asked = self.inputs.evaluate
        if asked is None:
            return None, {FLOAT: None, INTEGERS: None}
        judges = on(trials, asked, labelled=not self.inputs.own_tubes)
        folders = {
            label: self.work / "evaluation" / digest(bundle.manifest.fingerprint, asked.digest, self.engine)
            for label, bundle in ((FLOAT, self.source), (INTEGERS, Bundle.load(path)))
        }
        before = judges.judge_final(self.source.path, FLOAT, folders[FLOAT], None)
        after = judges.judge_final(path, INTEGERS, folders[INTEGERS], before)
        return (before, after), {label: peak_of(folder) for label, folder in folders.items()}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + round(time.monotonic() - began, 2)


def bundle_entries(bundle: Bundle, variants: Mapping[str, str]) -> Entries:
    """Return the products and tables of all graphs."""
    products: list[Matmul] = []
    tables: list[Table] = []
    for name in bundle.manifest.graphs:
        model = ir.load(bundle.graph_path(name, variants[name]))
        products += find_matmuls(model, name)
        tables += find_tables(model, name)
    return Entries(products, tables)


def _reduced(recipe: Recipe) -> Recipe:
    """Return the recipe with weights that a saturating CPU can multiply."""
    for name, chosen in recipe.graphs.items():
        if chosen.activations == INT8:
            recipe = recipe.replace(name, reduced_range=True)
    return recipe
