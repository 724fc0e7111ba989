"""Check everything that needs an NVIDIA GPU on one, offline and in minutes: `make gpu-check`.

Usage: python benchmarks/gpu/check.py [--bundles DIR] [--wheels DIR] [--out DIR] [--seconds 420] [--pretend]

Starts with Python alone, so it runs in an image that has torch and nothing else; --wheels names a folder with the other
packages, in which a large wheel may lie in parts (`split -b 50M NAME.whl NAME.whl.part-`). Each step is a process with
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
    """Yield all steps: the device first, then every bundle on the CPU, in eager torch, and on every GPU backend."""
    for name, seconds in DEVICE_STEPS.items():
        yield Step(name, (name,), seconds)
    gpu = [backend.name for backend in BACKENDS if backend.on_gpu]
    for backend in ("onnxruntime", "eager-torch", *reversed(gpu)):
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
    """Return the report as a page: a row per step, with its figures."""
    rows = []
    for name, result in report["steps"].items():
        figures = "" if "figures" not in result else json.dumps(result["figures"], indent=1, ensure_ascii=False)
        cells = (name, result["status"], f"{result.get('seconds', 0):.1f} s", result.get("problem", ""))
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        details = f"<details><summary>figures</summary><pre>{html.escape(figures)}</pre></details>" if figures else ""
        rows.append(f'<tr class="{result["status"].split()[0]}">{line}<td>{details}</td></tr>')
    devices = ", ".join(f"{device['name']} (SM {device['sm']})" for device in report["machine"]["devices"])
    where = "stand-ins for CUDA and TensorRT, not a GPU" if report["pretended"] else devices or "no GPU"
    style = (
        "body{font:15px system-ui;margin:2em}td,th{text-align:left;vertical-align:top;padding:.3em 1em}"
        ".passed td:nth-child(2){color:#176b2c}.failed td:nth-child(2){color:#b3151c}td{white-space:pre-wrap}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>GPU check</title><style>{style}</style>'
        f"<h1>GPU check</h1><p>On {html.escape(where)}, in {report['seconds']} s.</p><table>"
        f"<tr><th>step<th>result<th>time<th>problem<th></tr>{''.join(rows)}</table></html>\n"
    )


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
