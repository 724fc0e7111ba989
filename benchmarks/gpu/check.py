"""Check everything that needs an NVIDIA GPU on one, offline and in minutes: `make gpu-check`.

Usage: python benchmarks/gpu/check.py [--bundles DIR] [--wheels DIR] [--out DIR] [--seconds 420] [--pretend]

Starts with Python alone, so it runs in an image that has torch and nothing else; --wheels names a folder with the other
packages, in which a large wheel may lie in parts (`split -b 45M NAME.whl NAME.whl.part-`). Each step is a process with
its own limit of time: one that fails, crashes or hangs is reported, and the next one runs. Writes report.json and
report.html. Exit code: 0 if no step failed, 1 if one did, 2 if there is no GPU or nothing to check it with.
With --pretend the steps run on the tests' stand-ins for CUDA and TensorRT, without a GPU.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bridge_stg.runtime.backends.registry import BACKENDS  # noqa: E402
from bridge_stg.runtime.host.machine import machine  # noqa: E402

DEVICE_STEPS = {"device": 30, "arrays": 30, "resize": 30, "streams": 20, "graphs": 20, "torch": 40, "cupy": 40}
"""Steps of steps.py that need no bundle, with their seconds."""
CHAIN_S, FIRST_S = 60, ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")
COMPILE_S = 90
"""Seconds of a bundle on a backend; those of `FIRST_S` compile it."""
TAIL = 12
"""Lines of a failed step's output that are kept."""


@dataclass(frozen=True)
class Step:
    """A part of the check: arguments of steps.py, and the most seconds that it may take."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


def plan(bundles: Sequence[Path]) -> Iterator[Step]:
    """Yield all steps: the device, then every bundle on the CPU, in eager torch, and on GPU backends, best first."""
    for name, seconds in DEVICE_STEPS.items():
        yield Step(name, (name,), seconds)
    gpu = [backend.name for backend in BACKENDS if backend.on_gpu]
    for backend in ("onnxruntime", "eager-torch", *gpu):
        for bundle in bundles:
            seconds = COMPILE_S if backend in FIRST_S else CHAIN_S
            yield Step(f"{bundle.name} on {backend}", ("chain", str(bundle), backend), seconds)


def install(wheels: Path, site: Path) -> dict[str, Any]:
    """Join wheels that are in parts, and unpack all wheels of a folder into `site`; return the step's result."""
    joined = site.parent / "joined"
    for folder in (site, joined):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for part in sorted(wheels.glob("*.whl.part-*")):
        with (joined / part.name.partition(".part-")[0]).open("ab") as file, part.open("rb") as piece:
            shutil.copyfileobj(piece, file)
    files = [*sorted(wheels.glob("*.whl")), *sorted(joined.glob("*.whl"))]
    if not files:
        return {"status": "failed", "problem": f"{wheels} has no .whl and no .whl.part- file"}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check", "-q"]
    done = subprocess.run([*command, "--target", site, *files], capture_output=True, text=True, check=False)
    shutil.rmtree(joined)
    if done.returncode:
        return {"status": "failed", "problem": _tail(done.stderr)}
    return {"status": "passed", "figures": {"wheels": [file.name for file in files]}}


def run(step: Step, seconds: float, options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Run one step for at most `seconds`; return its result, with the key `status`."""
    file = options.out / "steps" / f"{step.name.replace(' ', '-')}.json"
    command = [sys.executable, "-m", "benchmarks.gpu.steps", *step.arguments, "--out", str(file)]
    command += ["--pretend"] if options.pretend else []
    output = file.with_suffix(".txt")
    with output.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"status": "failed", "problem": f"ended after {seconds:.0f} s, its limit"}
    if not file.is_file():
        words = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"status": "failed", "problem": f"{words}: {_tail(output.read_text(errors='replace'))}"}
    result: dict[str, Any] = json.loads(file.read_bytes())
    return result


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TAIL:])


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Run all steps, within the time that is left to each; return the report."""
    begun, steps = time.monotonic(), {}
    shutil.rmtree(options.out / "steps", ignore_errors=True)
    (options.out / "steps").mkdir(parents=True)
    environment = dict(os.environ)
    if options.wheels is not None:
        site = options.out / "site"
        steps["wheels"] = install(options.wheels, site)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        _say("wheels", steps["wheels"])
    found = machine()
    bundles = sorted(path.parent for path in options.bundles.glob("*/manifest.json"))
    for step in plan(bundles):
        left = options.seconds - (time.monotonic() - begun)
        start = time.monotonic()
        if not (found.devices or options.pretend):
            steps[step.name] = {"status": "left out", "problem": f"no NVIDIA GPU: {found.device_problem}"}
        elif left < 1:
            steps[step.name] = {"status": "left out", "problem": f"the {options.seconds:.0f} s of --seconds were over"}
        else:
            limit = left if options.pretend else min(step.seconds, left)  # a stand-in is slow
            steps[step.name] = run(step, limit, options, environment)
        steps[step.name]["seconds"] = round(time.monotonic() - start, 2)
        _say(step.name, steps[step.name])
    return {
        "pretended": options.pretend, "bundles": [bundle.name for bundle in bundles], "machine": asdict(found),
        "seconds": round(time.monotonic() - begun, 1), "steps": steps,
    }  # fmt: skip


def _say(name: str, result: dict[str, Any]) -> None:
    problem = result.get("problem", "")
    print(f"{result['status']:9} {name:36} {problem.splitlines()[-1] if problem else ''}".rstrip(), flush=True)


def page(report: dict[str, Any]) -> str:
    """Return the report as a page: a row per step, the chains beside each other, and all figures."""
    steps: dict[str, dict[str, Any]] = report["steps"]
    devices = ", ".join(f"{device['name']} (SM {device['sm']})" for device in report["machine"]["devices"])
    where = "stand-ins for CUDA and TensorRT, not a GPU" if report["pretended"] else devices or "no GPU"
    results = [(name, step["status"], f"{step.get('seconds', 0):.1f}", step.get("problem", ""))
               for name, step in steps.items()]  # fmt: skip
    chains = {name: step["figures"] for name, step in steps.items() if "parity" in step.get("figures", {})}
    stages = list(dict.fromkeys(stage for figures in chains.values() for stage in figures["seconds"]))
    rows = [
        (name, f"{max(figures['parity']['worst'].values()):.1e}", *_beside(figures),
         _number(figures, "device_mebibytes"), *(_number(figures["seconds"], stage) for stage in stages))
        for name, figures in chains.items()
    ]  # fmt: skip
    figures = {name: step["figures"] for name, step in steps.items() if "figures" in step}
    style = (
        "body{font:15px system-ui;margin:2em}table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;"
        "padding:.25em .8em;white-space:pre-wrap;border-bottom:1px solid #ddd}"
        ".passed{color:#176b2c}.failed{color:#b3151c}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>GPU check</title><style>{style}</style>'
        f"<h1>GPU check</h1><p>On {html.escape(where)}, in {report['seconds']} s.</p>"
        f"{_table(('step', 'result', 'seconds', 'problem'), results)}<h2>Chains</h2>"
        "<p>Largest relative error of the golden cases; the clip's answer beside the CPU's; seconds by stage.</p>"
        f"{_table(('bundle and backend', 'error', 'same answer', 'least IoU', 'device MiB', *stages), rows)}"
        f"<details><summary>All figures</summary><pre>{html.escape(json.dumps(figures, indent=1))}</pre></details>"
        "</html>\n"
    )


def _beside(figures: dict[str, Any]) -> tuple[str, str]:
    found = figures.get("beside_the_cpu")
    return ("", "") if found is None else ("yes" if found["same_answer"] else "no", f"{found['least_iou']:.4f}")


def _number(figures: dict[str, Any], name: str) -> str:
    return "" if name not in figures else f"{figures[name]:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], kind: str) -> str:
        marked = (f' class="{cell}"' if cell in ("passed", "failed") else "" for cell in row)
        return "".join(f"<{kind}{mark}>{html.escape(cell)}</{kind}>" for mark, cell in zip(marked, row, strict=True))

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{lines}</table>"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, write the report, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    folder = ROOT / "build/gpu-check"
    parser.add_argument("--bundles", type=Path, default=folder / "bundles", help="folder of bundles")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install, some of them in parts")
    parser.add_argument("--out", type=Path, default=folder, help="folder of the report")
    parser.add_argument("--seconds", type=float, default=420, help="most seconds of all steps together")
    parser.add_argument("--pretend", action="store_true", help="on stand-ins, without a GPU")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, Path):
            setattr(options, name, value.resolve())
    if not 0 < options.seconds < float("inf"):
        parser.error(f"--seconds {options.seconds:g}: expected more than 0")
    for name in ("bundles", "wheels", "out"):
        if (path := getattr(options, name)) is not None and path.exists() and not path.is_dir():
            parser.error(f"--{name} {path}: is a file, expected a folder")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be created: {error}")
    report = check(options)
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.out / "report.html").write_text(page(report), encoding="utf-8")
    results = [result["status"] for result in report["steps"].values()]
    counts = ", ".join(f"{results.count(status)} {status}" for status in ("passed", "failed", "left out"))
    print(f"{counts}; wrote {options.out / 'report.json'} and report.html")
    if not report["bundles"]:
        print(
            f"no bundle in {options.bundles}: make gpu-check-bundle makes them, on a machine with torch",
            file=sys.stderr,
        )
    if not (report["machine"]["devices"] or options.pretend):
        print(f"Nothing was checked on a GPU: {report['machine']['device_problem']}.", file=sys.stderr)
        return 2
    return 1 if "failed" in results else 0 if report["bundles"] else 2


if __name__ == "__main__":
    sys.exit(main())
