"""Measure the speed of this runtime, torch and other runtimes on the same weights and inputs.

The quick form measures the demo and a 0.5B model at 32 coarse frames; the full form adds 8 and 128 frames, a 2B model,
every peer, and how the cost grows with the input. An interrupted run resumes (`--fresh` starts again). The full form
writes benchmarks/results/speed.json, the tables of docs/performance.md and its plots.

Usage: python benchmarks/bench.py [--full] [--model NAME] [--frames 8,32,128] [--peers all|none|NAME,…]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from speed.measure import ROWS, Results, make_inputs, measure
from speed.results.growth import AXES, measure_growth
from speed.results.ratios import FRAMES, MODEL, Limits, best_fp32, main_ratios, met, peer_ratios, targets
from speed.results.report import fill_in, flat_rows, markdown, plots
from speed.runners import CHAIN_ROWS, OURS, RunnerError, RunnerSpec, own_runners, peer_runners, start
from speed.workload.bundles import Model, prepare
from tqdm import tqdm

from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.host.memory import available_bytes

MODELS = ("qwen3_vl_0_5b", "demo", "qwen3_vl_2b")
"""Models in the order in which they are measured; the one used for the ratios comes first."""
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


@click.command()
@click.option("--full", is_flag=True, help="Measure every model, 8, 32 and 128 frames, every peer, and growth.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Model to measure; may be repeated.")
@click.option("--frames", type=Names(), help="Numbers of coarse frames.  [quick: 32; full: 32,8,128]")
@click.option("--rounds", type=click.IntRange(1), help="Measurements per row.  [quick: 2; full: 3]")
@click.option("--peers", type=Names(), help="Peers to measure: `all`, `none`, or names.  [quick: none; full: all]")
@click.option("--own", type=Names(), default=",".join(OURS), show_default=True, help="Runners of the chain.")
@click.option("--precisions", type=Names(), default=",".join(PRECISIONS), show_default=True, help="Precisions.")
@click.option("--rows", type=Names(), default=",".join(ROWS), help="Rows to measure; `none`: growth only.")
@click.option("--growth/--no-growth", default=None, help="Vary frames, tube, queries, batch and resolution.")
@click.option("--threads", default=2, show_default=True, help="CPU threads per runner.")
@click.option("--given", multiple=True, help="Existing folders: MODEL.checkpoint=DIR, MODEL.fp32=DIR, …")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True, help="Folder of generated files."
)
@click.option("--out", type=click.Path(path_type=Path), help=f"Result file.  [quick: in --folder; full: {RESULT}]")
@click.option("--document/--no-document", default=None, help="Write the tables and plots.  [full: yes]")
@click.option("--fresh", is_flag=True, help="Discard all earlier measurements.")
@click.option("--again", is_flag=True, help="Discard earlier measurements of these models and frames.")
def main(full: bool, **options: Any) -> None:
    """Measure, print the ratios, and write them with all underlying figures."""
    folder, form = options["folder"], "full" if full else "quick"
    models = options["models"] or (MODELS if full else MODELS[:2])
    frames = tuple(map(int, options["frames"] or (("32", "8", "128") if full else ("32",))))
    rounds = options["rounds"] or (3 if full else 2)
    growth = full if options["growth"] is None else options["growth"]
    out = options["out"] or (RESULT if full else folder / "quick.json")
    document = full if options["document"] is None else options["document"]
    state = folder / f"{form}_state.json"
    if options["fresh"]:
        state.unlink(missing_ok=True)
    results = Results(state)
    if options["again"]:
        results.forget(models, frames, growth=bool(growth))
    given = dict(option.split("=", 1) for option in options["given"])
    peers, missing = chosen_peers(options["peers"], full=full, precisions=options["precisions"])
    results.missing |= missing
    with tqdm(desc="bench", unit=" steps", disable=None) as bar:

        def progress(text: str) -> None:
            bar.set_description(text)
            bar.update()

        for name in models:
            at = {k.partition(".")[2]: Path(v) for k, v in given.items() if k.startswith(f"{name}.")}
            model = prepare(name, folder, options["precisions"], at)
            specs = affordable(own_runners(options["precisions"], options["own"]) + peers, name, full)
            limits_of_now(results, options["threads"], progress)
            for count in frames_of(name, frames) if options["rows"] != ("none",) else ():
                inputs = {count: make_inputs(model.checkpoint, model.work, count, SIZE)}
                results.facts[f"{name}/{count}"] = facts(model, inputs[count])
                skipped = () if full or peers else ("prefill_text",)
                rows = tuple(row for row in options["rows"] if row not in (*skipped, "none"))
                turns = rounds_of(rounds, count)
                measure_in_groups(name, specs, model, inputs, results, turns, options["threads"], progress, rows)
            if name == "demo":
                cold_start(model, results, progress, runs=3 if not full else 7)
            if (growth and name == MODEL) or (growth and models == ("demo",)):
                grow(model, results, options["threads"], progress, repeat=1)
        limits_of_now(results, options["threads"], progress)
    result = gather(results, threads=options["threads"])
    with replacing(out_file(out)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if document:
        fill_in(DOCUMENT, markdown(result))
        plots(result, IMAGES, model=MODEL, frames=FRAMES)
    say(result, out)


def chosen_peers(
    names: tuple[str, ...] | None, *, full: bool, precisions: tuple[str, ...]
) -> tuple[list[RunnerSpec], dict[str, str]]:
    """Return the runners of the peers, and the reason for each peer that is not available."""
    from speed.peers.install import peers

    wanted = names if names is not None else (("all",) if full else ("none",))
    if wanted == ("none",):
        return [], {}
    return peer_runners(peers() if wanted == ("all",) else wanted, precisions)


def affordable(specs: list[RunnerSpec], model: str, full: bool) -> list[RunnerSpec]:
    """Sort the runners, reference first; the quick form leaves out torch_compile, which compiles for minutes."""
    kept = [spec for spec in specs if full or not (spec.name == "torch_compile" and model != "demo")]
    return sorted(kept, key=lambda spec: spec.name != "torch_eager")


def frames_of(model: str, frames: tuple[int, ...]) -> tuple[int, ...]:
    """Return the frame counts to measure a model at; 128 frames of a 2B model would take an hour."""
    return tuple(count for count in frames if not (model == "qwen3_vl_2b" and count > 32))


def rounds_of(rounds: int, frames: int) -> int:
    """Return the number of rounds for a frame count: long runs vary less."""
    return 1 if frames > 32 else rounds


def measure_in_groups(
    name: str,
    specs: list[RunnerSpec],
    model: Model,
    inputs: Mapping[int, Path],
    results: Results,
    rounds: int,
    threads: int,
    progress: Any,
    rows: Sequence[str] = ROWS,
) -> None:
    """Measure as many runners together as memory allows."""
    weights = sum(file.stat().st_size for file in model.checkpoint.glob("*.safetensors"))
    groups = grouped(specs, weights, 0.75 * (available_bytes() or 16 * 2**30))
    model_request = {
        "name": name,
        "checkpoint": str(model.checkpoint.resolve()),
        "folder": str((model.work / "peers").resolve()),
        "bundles": {precision: str(path.resolve()) for precision, path in model.bundles.items()},
    }
    (model.work / "peers").mkdir(parents=True, exist_ok=True)
    for group in groups:
        measure(
            model_request,
            group,
            inputs,
            results,
            rounds=dict.fromkeys(inputs, rounds),
            threads=threads,
            work=model.work,
            progress=progress,
            rows=rows,
        )


def grouped(specs: Sequence[RunnerSpec], weights: int, room: float) -> list[list[RunnerSpec]]:
    """Group the runners so that each group fits in memory; later groups repeat our runner of each precision.

    Args:
        specs: runners, reference first.
        weights: bytes of the bf16 checkpoint.
        room: bytes of memory available to the runners of one group together.
    """
    ours = {spec.precision: spec for spec in specs if spec.name == "ours"}
    kept = tuple(row for row in CHAIN_ROWS if row != "end_to_end")
    groups: list[list[RunnerSpec]] = [[]]

    def added(spec: RunnerSpec) -> list[RunnerSpec]:
        """Return what a runner adds to the last group: itself, and our runner of its precision if that is missing."""
        if len(groups) == 1 or spec.name == "ours" or spec.precision not in ours:
            return [spec]
        anchor = replace(ours[spec.precision], name=f"ours@{len(groups)}", rows=kept)
        return [*([] if anchor in groups[-1] else [anchor]), replace(spec, compared_with=anchor.name)]

    for spec in specs:
        if groups[-1] and sum(needs(one, weights) for one in (*groups[-1], *added(spec))) > room:
            groups.append([])
        groups[-1] += added(spec)
    return groups


def needs(spec: RunnerSpec, weights: int) -> float:
    """Estimate a runner's memory in bytes from the size of the bf16 checkpoint."""
    return {"int8": 1.4, "int4": 1.2}.get(spec.precision, 2.6) * weights + 1e9


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
    bundle = str(model.bundles["fp32"])
    for _ in range(runs):
        progress("cold start of infer")
        began = time.perf_counter()
        command = [sys.executable, "cli.py", "infer", str(path), query, "--bundle", bundle]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results.cold_start.append(round(time.perf_counter() - began, 4))
    results.save()


def grow(model: Model, results: Results, threads: int, progress: Any, *, repeat: int) -> None:
    """Measure how the cost of our int8 runner grows with each axis."""
    spec = own_runners(("int8",), ("ours",))[0]
    model_request = {
        "name": model.name, "checkpoint": str(model.checkpoint), "folder": str(model.work / "peers"),
        "bundles": {precision: str(path) for precision, path in model.bundles.items()},
    }  # fmt: skip
    try:
        runner = start(spec, model_request, threads=threads, log=model.work / "logs" / "growth.log")
    except RunnerError as error:
        results.missing["growth"] = str(error)
        return
    try:
        tokenizer = Tokenizer.from_file(model.bundles["int8"] / "tokenizer.json")
        measure_growth(
            runner, model.spec, tokenizer, model.work, results.growth,
            axes=tuple(AXES), repeat=repeat, save=results.save, progress=progress,
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
    fact = results.facts.get(f"{MODEL}/{FRAMES}")
    ratios: dict[str, Any] = {}
    if fact is not None:
        ratios = main_ratios(results.rows, limits, fact["text_config"], fact["sizes"]["length"])
    if results.cold_start:
        ratios["cold_start_demo_s"] = min(results.cold_start)
    found = {**results.missing}
    for key, runner in results.runners.items():
        if "error" in runner:
            found[key] = runner["error"]
    return {
        "ratios": ratios,
        "targets": {**targets(limits, vnni=vnni), "cold_start_demo_s": {"most": 1.0}},
        "machine": machine,
        "threads": threads,
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "limits": {"bandwidth": limits.bandwidth, "fp32": limits.fp32, "int8": limits.int8, "samples": results.limits},
        "peers_by_row": peer_ratios(results.rows),
        "best_fp32_by_row": best_fp32(results.rows),
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
