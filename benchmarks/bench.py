"""Measure the speed of this runtime, torch and other runtimes on the same weights and inputs.

The quick form measures the demo and a 0.5B model at 32 coarse frames; the full form adds 8 and 128 frames, a 2B model,
every peer, and how the cost grows with the input. What says most is measured first; a run that was interrupted, or that
ended after `--minutes`, resumes (`--fresh` starts again). The full form writes benchmarks/results/speed.json, and the
tables and plots of docs/performance.md. `--check` compares the demo's ratios with recorded ones instead.

Usage: python benchmarks/bench.py [--full] [--prepare] [--minutes M] [--model NAME] [--frames 8,32,128] [--peers …]
       python benchmarks/bench.py --check [--update]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from speed.measure import ROWS, Late, Results, key_of, make_inputs, measure, unmeasured
from speed.results.growth import AXES, measure_growth
from speed.results.ratios import FRAMES, MODEL, Limits, best_peer, main_ratios, met, peer_ratios, targets
from speed.results.regression import check_demo
from speed.results.report import fill_in, flat_rows, markdown, plots
from speed.runners import (
    AUTO,
    OURS,
    RunnerError,
    RunnerSpec,
    disk_to_build,
    grouped,
    needs,
    own_runners,
    peer_runners,
    start,
)
from speed.workload.bundles import RUNNING, Model, code_hash, prepare, request_of
from tqdm import tqdm

from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.host.memory import available_bytes

DEMO, LARGE = "demo", "qwen3_vl_2b"
MODELS = (MODEL, DEMO, LARGE)
SIZE = (384, 216)
FOLDER, RESULT, DOCUMENT, IMAGES = (
    Path("build/bench"), Path("benchmarks/results/speed.json"), Path("docs/performance.md"), Path("docs/images"),
)  # fmt: skip
PRECISIONS = ("fp32", "int8", "int4")


class Names(click.ParamType):
    """Comma-separated names."""

    name = "NAME,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split the option's value into names."""
        return value if isinstance(value, tuple) else tuple(filter(None, value.split(",")))


@dataclass(frozen=True)
class Part:
    """What is measured together.

    Attributes:
        kind: `own`: this runtime and torch; `peers`; `compiled`: torch.compile; `growth`; `cold start`.
        model: one of `MODELS`.
        frames: number of coarse frames; 0 if that does not apply.
    """

    kind: str
    model: str
    frames: int = 0


def parts_of(models: Sequence[str], frames: Sequence[int], *, growth: bool, full: bool) -> list[Part]:
    """Return the parts of a run, what says most first."""
    first = [
        Part("own", MODEL, FRAMES),
        Part("peers", MODEL, FRAMES),
        Part("growth", MODEL),
        Part("cold start", DEMO),
        Part("own", DEMO, FRAMES),
        Part("own", LARGE, FRAMES),
        Part("peers", LARGE, FRAMES),
    ]
    more = [Part(kind, model, count) for kind in ("own", "peers", "compiled") for count in frames for model in models]
    found = [part for part in dict.fromkeys((*first, *more)) if part.model in models and part.frames in (0, *frames)]
    absent = {"growth"} if not growth else set()
    absent |= set() if full else {"compiled"}
    kept = [part for part in found if part.kind not in absent]
    # A demo by itself still shows how the cost grows.
    return [*kept, Part("growth", DEMO)] if growth and tuple(models) == (DEMO,) else kept


@click.command()
@click.option("--full", is_flag=True, help="Measure every model, 8, 32 and 128 frames, every peer, and growth.")
@click.option("--prepare", "only_prepare", is_flag=True, help="Make all files and peers that a run needs, and stop.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Start nothing more after this time.")
@click.option("--check", is_flag=True, help="Compare the demo's ratios with the recorded ones; status 1 if worse.")
@click.option("--update", is_flag=True, help="With --check: record the ratios for this CPU.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Model to measure; may be repeated.")
@click.option("--frames", type=Names(), help="Numbers of coarse frames.  [quick: 32; full: 32,8,128]")
@click.option("--rounds", type=click.IntRange(1), help="Measurements per row.  [quick: 2; full: 3; check: 7]")
@click.option("--peers", type=Names(), help="Peers to measure: `all`, `none`, or names.  [quick: none; full: all]")
@click.option("--own", type=Names(), default=",".join(OURS), show_default=True, help="Runners of the chain.")
@click.option("--precisions", type=Names(), default=",".join(PRECISIONS), show_default=True, help="Precisions.")
@click.option("--rows", type=Names(), default=",".join(ROWS), help="Rows to measure; `none`: growth only.")
@click.option("--growth/--no-growth", default=None, help="Vary frames, tube, queries, batch and resolution.")
@click.option("--threads", default=2, show_default=True, help="CPU threads per runner.")
@click.option("--given", multiple=True, help="Existing folders: MODEL.checkpoint=DIR, MODEL.fp32=DIR, …")
@click.option("--fresh-bundles", is_flag=True, help="Make bundles anew, not only those made by other code.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True, help="Folder of generated files."
)
@click.option("--out", type=click.Path(path_type=Path), help=f"Result file.  [quick: in --folder; full: {RESULT}]")
@click.option("--document/--no-document", default=None, help="Write the tables and plots.  [full: yes]")
@click.option("--fresh", is_flag=True, help="Discard all earlier measurements.")
@click.option("--again", is_flag=True, help="Discard earlier measurements of these models and frames.")
def main(full: bool, **options: Any) -> None:
    """Measure, print the ratios, and write them with all underlying figures."""
    began, folder = time.monotonic(), options["folder"]
    if options["check"]:
        model = prepare(DEMO, folder, ("fp32", "int8"), given_of(options, DEMO), fresh=options["fresh_bundles"])
        sys.exit(check_demo(model, rounds=options["rounds"], threads=options["threads"], update=options["update"]))
    models = options["models"] or (MODELS if full else MODELS[:2])
    frames = tuple(map(int, options["frames"] or (("32", "8", "128") if full else ("32",))))
    out = options["out"] or (RESULT if full else folder / "quick.json")
    parts = parts_of(models, frames, growth=full if options["growth"] is None else options["growth"], full=full)
    results = opened_results(folder / f"{'full' if full else 'quick'}_state.json", options, models, frames)
    peers, missing = chosen_peers(options["peers"], full=full, precisions=options["precisions"])
    results.missing = missing
    with tqdm(desc="bench", unit=" steps", disable=None) as bar:

        def progress(text: str) -> None:
            bar.set_description(text)
            bar.update()

        def late() -> bool:
            return options["minutes"] is not None and time.monotonic() - began > 60 * options["minutes"]

        run = Run(options, results, peers, full, progress, late)
        if options["only_prepare"]:
            for part in parts:
                run.prepare_part(part)
            click.echo("\n".join(f"not prepared: {name}: {reason}" for name, reason in results.missing.items()))
            return
        limits_of_now(results, options["threads"], progress)
        for part in parts:
            if not late():
                run.measure_part(part)
        limits_of_now(results, options["threads"], progress)
    for part in parts:
        results.missing |= run.left(part)
    result = gather(results, threads=options["threads"])
    with replacing(out_file(out)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if full if options["document"] is None else options["document"]:
        fill_in(DOCUMENT, markdown(result))
        plots(result, IMAGES, model=MODEL, frames=FRAMES)
    say(result, out)


def given_of(options: Mapping[str, Any], model: str) -> dict[str, Path]:
    """Return the existing folders that were given for a model."""
    given = dict(option.split("=", 1) for option in options["given"])
    return {k.partition(".")[2]: Path(v) for k, v in given.items() if k.startswith(f"{model}.")}


def opened_results(state: Path, options: Mapping[str, Any], models: Sequence[str], frames: Sequence[int]) -> Results:
    """Open the saved results, without those that the options discard and those of other code."""
    code = code_hash(RUNNING)
    if options["fresh"]:
        state.unlink(missing_ok=True)
    results = Results(state)
    if results.rows and results.code != code:
        click.echo("the code has changed since the saved measurements, which are discarded", err=True)
        state.unlink()
        results = Results(state)
    results.code = code
    if options["again"]:
        results.forget(models, frames, growth=options["growth"] is not False)
    return results


class Run:
    """Prepares and measures the parts of a run.

    Args:
        options: the command's options.
        results: receives the measurements.
        peers: runners of the installed peers.
        full: whether this is the full form.
        progress: called with a line of text before each step.
        late: whether the run's time has ended.
    """

    def __init__(
        self, options: Mapping[str, Any], results: Results, peers: Sequence[RunnerSpec], full: bool,
        progress: Callable[[str], None], late: Late,
    ) -> None:  # fmt: skip
        self.options, self.results, self.peers, self.full = options, results, peers, full
        self.progress, self.late = progress, late
        self._models: dict[str, Model] = {}

    def model(self, name: str) -> Model:
        """Return a model whose bundles are made by the present code."""
        if name not in self._models:
            options = self.options
            self.progress(f"{name}: checkpoint and bundles")
            self._models[name] = prepare(
                name, options["folder"], options["precisions"], given_of(options, name), fresh=options["fresh_bundles"]
            )
        return self._models[name]

    def prepare_part(self, part: Part) -> None:
        """Make the files that a part needs."""
        model = self.model(part.model)
        if part.frames:
            self.progress(f"{part.model}: inputs of {part.frames} frames")
            make_inputs(model.checkpoint, model.work, part.frames, SIZE)
        if part.kind == "peers" and part.frames == FRAMES:
            for spec in self.specs(part):
                if spec.name in OURS or self.without_room(spec, model):
                    continue
                self.progress(f"{part.model}: {spec.label}")
                log = model.work / "logs" / f"{model.name}_{spec.label}.log"
                try:
                    start(spec, request_of(model), threads=self.options["threads"], log=log).end()
                except RunnerError as error:
                    self.results.missing[f"{model.name}/{spec.label}"] = str(error)

    def specs(self, part: Part) -> list[RunnerSpec]:
        """Return the runners that a part measures, reference first."""
        own = own_runners(self.options["precisions"], self.options["own"])
        if part.kind == "own":
            return sorted(
                (spec for spec in own if spec.name != "torch_compile"), key=lambda spec: spec.name != "torch_eager"
            )
        if part.kind == "compiled":
            return [spec for spec in own if spec.name == "torch_compile"]
        # The runners of one precision share ours, with which they take turns.
        return sorted(self.peers, key=lambda spec: (*PRECISIONS, AUTO).index(spec.precision))

    def rows(self) -> tuple[str, ...]:
        """Return the rows to measure; text alone is prefilled only to compare peers."""
        skipped = () if self.full or self.peers else ("prefill_text",)
        return tuple(row for row in self.options["rows"] if row not in (*skipped, "none"))

    def rounds(self, part: Part) -> int:
        """Return the number of rounds of a part: long runs vary less."""
        return 1 if part.frames > 32 else self.options["rounds"] or (3 if self.full else 2)

    def without_room(self, spec: RunnerSpec, model: Model) -> bool:
        """Return whether memory or disk do not suffice for a runner, and note it as missing."""
        weights, name = weight_bytes(model), f"{model.name}/{spec.label}"
        ours = [one for one in own_runners(PRECISIONS, ("ours",)) if one.precision == spec.precision]
        beside = sum(needs(one, weights) for one in ours) if spec.name not in OURS else 0.0
        needed, room = needs(spec, weights), room_for_runners()
        if needed + beside > room:
            ours_too = f", and this runtime beside it {beside / 1e9:.0f} GB" if beside else ""
            reason = f"takes about {needed / 1e9:.0f} GB{ours_too}; {room / 1e9:.0f} GB of memory are available"
        elif (disk := disk_to_build(spec, weights, model.work / "peers")) > (
            free := shutil.disk_usage(model.work).free
        ):
            reason = (
                f"its files take about {disk / 1e9:.0f} GB while they are made; {free / 1e9:.0f} GB of disk are free"
            )
        else:
            return False
        self.results.missing[name] = reason
        return True

    def measure_part(self, part: Part) -> None:
        """Measure what of a part has not been measured."""
        model = self.model(part.model)
        if part.kind == "growth":
            return grow(model, self.results, self.options["threads"], self.progress, repeat=1, late=self.late)
        if part.kind == "cold start":
            return cold_start(model, self.results, self.progress, runs=7 if self.full else 3)
        specs = [spec for spec in self.specs(part) if not self.without_room(spec, model)]
        if not specs or not self.rows():
            return None
        inputs = {part.frames: make_inputs(model.checkpoint, model.work, part.frames, SIZE)}
        self.results.facts[f"{part.model}/{part.frames}"] = facts(model, inputs[part.frames])
        anchors = {} if part.kind == "own" else {
            spec.precision: spec for spec in own_runners(self.options["precisions"], ("ours",))
        }  # fmt: skip
        for group in grouped(specs, weight_bytes(model), room_for_runners(), anchors):
            measure(
                request_of(model), group, inputs, self.results, rounds={part.frames: self.rounds(part)},
                threads=self.options["threads"], work=model.work, progress=self.progress, rows=self.rows(),
                late=self.late,
            )  # fmt: skip
        return None

    def left(self, part: Part) -> dict[str, str]:
        """Return what of a part was not measured because the run's time ended."""
        reason, results = "the run's time ended before its turn", self.results
        if part.kind == "growth":
            known = {point["axis"] for point in results.growth}
            return {f"growth with {axis}": reason for axis in AXES if axis not in known and self.late()}
        if part.kind == "cold start":
            return {} if results.cold_start or not self.late() else {"cold start": reason}
        found = {}
        for spec in self.specs(part) if self.rows() else ():
            label = f"{part.model}/{spec.label}"
            rows = unmeasured(results, part.model, part.frames, spec, 1, self.rows())
            absent = label in results.missing or "error" in results.runners.get(label, {})
            if self.late() and not absent and rows != []:
                begun = key_of(part.model, part.frames, spec.label) in results.rows
                what = ", ".join(rows) if begun and rows else "all rows"
                found[f"{label}, {part.frames} frames"] = f"{what}: {reason}"
        return found


def weight_bytes(model: Model) -> int:
    """Return the bytes of a model's checkpoint."""
    return sum(file.stat().st_size for file in model.checkpoint.glob("*.safetensors"))


def room_for_runners() -> float:
    """Return the bytes of memory that runners may take together."""
    return 0.85 * (available_bytes() or 16 * 2**30)


def chosen_peers(
    names: tuple[str, ...] | None, *, full: bool, precisions: tuple[str, ...]
) -> tuple[list[RunnerSpec], dict[str, str]]:
    """Return the runners of the peers, and the reason for each peer that is not available."""
    from speed.peers.install import peers

    wanted = names if names is not None else (("all",) if full else ("none",))
    if wanted == ("none",):
        return [], {}
    return peer_runners(peers() if wanted == ("all",) else wanted, precisions)


def facts(model: Model, inputs: Path) -> dict[str, Any]:
    """Return the backbone's configuration and the input sizes, from which the operations are counted."""
    backbone = json.loads((model.checkpoint / "config.json").read_text(encoding="utf-8"))["backbone"]
    patch = model.spec.vision.patch_size
    with np.load(inputs / "vision.npz") as vision, np.load(inputs / "prefill.npz") as prompt:
        groups, _, height, width, _ = vision["frames"].shape
        sizes = {"groups": groups, "rows": height // patch, "columns": width // patch}
        sizes["length"] = prompt["input_ids"].shape[1]
    return {"vision_config": backbone["vision_config"], "text_config": backbone["text_config"], "sizes": sizes}


def limits_of_now(results: Results, threads: int, progress: Any) -> None:
    """Measure the machine's limits in a subprocess, in the same run as the figures that are compared with them."""
    progress("limits of the machine")
    program = Path(__file__).parent / "speed" / "limits.py"
    done = subprocess.run(
        [sys.executable, str(program), "--threads", str(threads)], check=True, stdout=subprocess.PIPE, text=True
    )
    results.limits.append(json.loads(done.stdout.splitlines()[-1]))
    results.save()


def cold_start(model: Model, results: Results, progress: Any, *, runs: int) -> None:
    """Time whole `infer` processes on a sample clip, from process start to result."""
    path = sorted(Path("assets/demo/clips").glob("*.mp4"))[0]
    query = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    for _ in range(runs):
        for precision in sorted({"fp32", "int8"} & set(model.bundles)):
            if len(results.cold_start.setdefault(precision, [])) >= runs:
                continue
            progress(f"cold start of infer, {precision}")
            command = [sys.executable, "cli.py", "infer", str(path), query, "--bundle", str(model.bundles[precision])]
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results.cold_start[precision].append(round(time.perf_counter() - began, 4))
    results.save()


def grow(model: Model, results: Results, threads: int, progress: Any, *, repeat: int, late: Late) -> None:
    """Measure how the cost of our int8 runner grows with each axis."""
    spec = own_runners(("int8",), ("ours",))[0]
    tokenizer = Tokenizer.from_file(model.bundles["int8"] / "tokenizer.json")
    try:
        runner = start(spec, request_of(model), threads=threads, log=model.work / "logs" / "growth.log")
    except RunnerError as error:
        results.missing["growth"] = str(error)
        return
    try:
        measure_growth(
            runner, model.spec, tokenizer, model.work, results.growth,
            axes=tuple(AXES), repeat=repeat, save=results.save, progress=progress, late=late,
        )  # fmt: skip
    except RunnerError as error:
        results.missing["growth"] = str(error)
    finally:
        runner.end()


def gather(results: Results, *, threads: int) -> dict[str, Any]:
    """Return the result: the ratios, followed by all figures that they are computed from."""
    limits = Limits.best(results.limits)
    machine = describe("onnxruntime", "numpy", "torch", "transformers")
    vnni = bool({"avx512_vnni", "avx_vnni"} & set(machine["flags"]))  # type: ignore[call-overload]
    ratios = main_ratios(results.rows, limits, results.facts, results.growth)
    for precision, seconds in results.cold_start.items():
        ratios[f"cold_start_demo_{precision}_s"] = min(seconds)
    found = {**results.missing}
    for key, runner in results.runners.items():
        if "error" in runner:
            found[key] = runner["error"]
    return {
        "ratios": ratios,
        "targets": targets(limits, vnni=vnni),
        "machine": machine,
        "threads": threads,
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "limits": {"bandwidth": limits.bandwidth, "fp32": limits.fp32, "int8": limits.int8, "samples": results.limits},
        "peers_by_row": peer_ratios(results.rows),
        "best_fp32_by_row": best_peer(results.rows, "fp32"),
        "cold_start_s": results.cold_start,
        "runners": results.runners,
        "missing": found,
        "rows": flat_rows(results.rows, results.runners, results.facts, limits),
        "growth": results.growth,
    }


def out_file(path: Path) -> Path:
    """Create the parent folder of a file and return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def say(result: Mapping[str, Any], out: Path) -> None:
    """Print the machine and the ratios."""
    machine = result["machine"]
    click.echo(f"{machine['cpu']}, {result['threads']} threads, {' '.join(machine['flags'])}")
    for name, value in result["ratios"].items():
        target = result["targets"].get(name)
        wanted = "" if target is None else " ".join(f"{'≥' if k == 'least' else '≤'} {v:g}" for k, v in target.items())
        said = {True: "reached", False: "NOT reached", None: ""}[met(value, target) if target else None]
        click.echo(f"{name:40} {'–' if value is None else format(value, '8.3f')}  {wanted:8} {said}")
    for name, reason in result["missing"].items():
        click.echo(f"not measured: {name}: {reason}")
    click.echo(str(out))


if __name__ == "__main__":
    main()
