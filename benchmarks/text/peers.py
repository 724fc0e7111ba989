"""Compare free answers end to end with transformers, OpenVINO GenAI and llama.cpp, in fp32 and in int8.

The same random model, images and prompt: each group of frames is one image, with its time as text before it. Every
runner is a subprocess; all answer in turn, once to warm up and then `--rounds` times. Seconds run from decoded
images and the prompt's text to the last token; the number of tokens is fixed. Results go to
benchmarks/results/text_peers.json, with the table of docs/performance.md;
rows of precisions that are not measured are kept. Peers are installed on first use as those of
benchmarks/bench.py are, each in its own virtual environment in build/bench/venvs.

Usage: python benchmarks/text/peers.py [--groups 8] [--tokens 97] [--rounds 3] [--precisions fp32,int8] [--peers …]
"""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "large"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import speed
from answers import QUERY, synthetic_images, write_model
from speed.peers.install import REQUIREMENTS, InstallError, install
from speed.runners import PEERS as PROTOCOL
from speed.runners import Runner, RunnerError, RunnerSpec, start

# isort: split
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.prompt import Tokenizer, time_strings
from bridge_stg.runtime.host.machine import describe

HERE, ROOT = Path(__file__).resolve().parent, speed.ROOT
RESULT, DOCUMENT = ROOT / "benchmarks" / "results" / "text_peers.json", ROOT / "docs" / "performance.md"
MARKS = ("<!-- text_peers: begin -->", "<!-- text_peers: end -->")
PEERS = {"openvino_vlm": HERE / "requirements", "llama_cpp": REQUIREMENTS}
"""Folder of the requirements of each peer."""
TIMES = ("seconds", "first_s", "rest_s")


@click.command()
@click.option("--shape", default="qwen3_vl_0_5b", show_default=True)
@click.option("--groups", default=8, show_default=True, help="Groups of frames, each an image.")
@click.option("--tokens", default=97, show_default=True, help="Tokens of every answer.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--precisions", default="fp32,int8", show_default=True)
@click.option("--peers", default=",".join(PEERS), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/text"), show_default=True)
def main(
    shape: str, groups: int, tokens: int, rounds: int, threads: int, precisions: str, peers: str, folder: Path
) -> None:
    """Make the model and its bundles if they are missing, measure, and write the results and the table."""
    checkpoint, bundles = folder / shape, {"fp32": folder / f"{shape}_bundle", "int8": folder / f"{shape}_int8"}
    prepare(shape, checkpoint, bundles, folder / f"{shape}_calibration")
    inputs = folder / "peers.npz"
    prompt_tokens = write_inputs(inputs, bundles["fp32"], groups, tokens)
    model = {"name": shape, "checkpoint": str(checkpoint), "folder": str(folder / "peers")}
    model |= {"bundles": {name: str(path) for name, path in bundles.items()}}  # type: ignore[dict-item]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, PROTOCOL)))  # of the runners
    commands = {name: (sys.executable, program("own"), name) for name in ("ours", "transformers")}
    rows: dict[str, dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else {}
    for name in filter(None, peers.split(",")):
        try:
            commands[name] = (str(install(name, requirements=PEERS[name])), program(name))
        except InstallError as error:
            rows[name] = {"error": str(error)}
    for precision in precisions.split(","):
        chosen = [name for name in commands if (name, precision) != ("transformers", "int8")]
        specs = [RunnerSpec(name, precision, commands[name]) for name in chosen]
        rows |= measure(specs, model, inputs, rounds=rounds, threads=threads, logs=folder / "peers")
    result = {
        "shape": shape, "images": groups, "prompt_tokens": prompt_tokens, "tokens": tokens, "rounds": rounds,
        "threads": threads, "ratios": ratios(rows), "rows": rows,
        "machine": describe("torch", "transformers", "onnxruntime", "numpy"),
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    before, after = DOCUMENT.read_text(encoding="utf-8").split(MARKS[0])
    text = f"{before}{MARKS[0]}\n{table(result)}\n{MARKS[1]}{after.split(MARKS[1])[1]}"
    DOCUMENT.write_text(text, encoding="utf-8")
    click.echo(json.dumps(result["ratios"], indent=2))


def program(name: str) -> str:
    """Return the path of a runner."""
    return str(HERE / "runners" / f"run_{name}.py")


def prepare(shape: str, checkpoint: Path, bundles: Mapping[str, Path], calibration: Path) -> None:
    """Write the random model, export it, and quantize it with the recipe w8a8, as far as these are missing."""
    if not (checkpoint / "config.json").is_file():
        write_model(shape, checkpoint)
    export = ["cli.py", "export", checkpoint, "--out", bundles["fp32"], "--no-verify", "--variant", "standard"]
    quantize = ["benchmarks/speed/workload/bundles.py", bundles["fp32"], bundles["int8"], "w8a8", calibration]
    for name, command in (("fp32", export), ("int8", quantize)):
        if not (bundles[name] / "manifest.json").is_file():
            paths = [argument.resolve() if isinstance(argument, Path) else argument for argument in command]
            subprocess.run([sys.executable, *map(str, paths)], check=True, cwd=ROOT, stdout=sys.stderr)


def write_inputs(file: Path, bundle: Path, groups: int, tokens: int) -> int:
    """Write the images and the prompt, as text and as ids; return the number of its tokens."""
    opened = Bundle.load(bundle)
    spec, tokenizer = opened.manifest.spec, Tokenizer.from_file(opened.tokenizer_path)
    assert spec.text is not None
    images = synthetic_images(groups)
    message = spec.text.tube.replace("{query}", QUERY)
    times = time_strings(np.arange(groups) + 0.25, spec.prompt)
    shown = "".join(f"{time}<image>" for time in times)
    prompt = spec.prompt.head + shown + spec.text.video_turn.replace("{message}", message)
    visual = "<|video_pad|>" * (images.shape[1] * images.shape[2] // 32**2)
    ids = tokenizer.encode(prompt.replace("<image>", f"<|vision_start|>{visual}<|vision_end|>"))
    np.savez(file, images=images, prompt=prompt, message=message, tokens=tokens, input_ids=np.array(ids)[None])
    return len(ids)


def measure(
    specs: Sequence[RunnerSpec], model: Mapping[str, Any], inputs: Path, *, rounds: int, threads: int, logs: Path
) -> dict[str, dict[str, Any]]:
    """Start all runners, let each answer once, then in turn; return their rows by label."""
    rows: dict[str, dict[str, Any]] = {}
    runners: list[Runner] = []
    output = logs / "answer.npz"
    request = {"do": "run", "row": "answer", "inputs": str(inputs), "repeat": 1, "outputs": str(output)}
    for spec in specs:
        try:
            runner = start(spec, model, threads=threads, log=logs / f"{spec.label}.log")
            runner.ask(request, timeout_s=1800)
        except RunnerError as error:
            rows[spec.label] = {"error": str(error)}
            continue
        runners.append(runner)
        loaded = {key: runner.loaded[key] for key in ("precision", "versions", "load_s")}
        rows[spec.label] = loaded | {name: [] for name in (*TIMES, "cpu_seconds", "other_cpu_s")}
    click.echo(f"timing {', '.join(runner.spec.label for runner in runners)}", err=True)
    for _ in range(rounds):
        for runner in runners:
            row, busy = rows[runner.spec.label], busy_s()
            answer = runner.ask(request, timeout_s=1800)
            row["seconds"] += answer["seconds"]
            row["cpu_seconds"] += answer["cpu_seconds"]
            row["other_cpu_s"].append(round(busy_s() - busy - answer["cpu_seconds"][0], 2))
            row["peak_bytes"] = answer["peak_bytes"]
            with np.load(output) as made:
                row["ids"] = " ".join(map(str, made["ids"]))
                row["first_s"].append(float(made["first_s"]))
                row["rest_s"].append(float(made["rest_s"]))
    click.echo("timed", err=True)
    for runner in runners:
        runner.end()
    return rows


def busy_s() -> float:
    """Return the CPU seconds of all processes since the machine started."""
    user, nice, system = Path("/proc/stat").read_text(encoding="utf-8").split()[1:4]
    return (int(user) + int(nice) + int(system)) / 100


def equal_ids(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how many of an answer's first ids equal those of transformers in fp32."""
    reference = rows.get("transformers_fp32", {}).get("ids", "").split()
    return str([*map(operator.eq, row["ids"].split(), reference), False].index(False)) if reference else "–"


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return each peer's median seconds divided by those of our bundle in the same precision."""
    found = {}
    for label, row in rows.items():
        mine = rows.get(f"ours_{label.rpartition('_')[2]}", row)
        if mine is not row and "error" not in {*row, *mine}:
            measured = (*TIMES, "cpu_seconds")
            found[label] = {name: round(median(row[name]) / median(mine[name]), 3) for name in measured}
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| runner | end to end, s | first token, s | decode, tokens/s "
        "| ÷ ours: end to end, first token, decode, CPU seconds | equal ids | peak memory |",
        "|---|--:|--:|--:|---|--:|--:|",
    ]
    for label, row in result["rows"].items():
        name = " ".join(label.rsplit("_", 1))
        if "error" in row:
            lines.append(f"| {name} | not measured: {row['error']} | | | | | |")
            continue
        total, first, rest = (median(row[key]) for key in TIMES)
        compared = ", ".join(f"{value:.2f}" for value in result["ratios"].get(label, {}).values()) or "–"
        lines.append(
            f"| {name} | {total:.2f} | {first:.2f} | {(result['tokens'] - 1) / rest:.1f} | {compared} "
            f"| {equal_ids(row, result['rows'])} of {result['tokens']} | {row['peak_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
