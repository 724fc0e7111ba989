"""Fit the estimator's efficiencies, compare its times with measured ones, and write the tables of docs/devices.md.

Usage: python benchmarks/gpu/estimates.py [--check]
Measured are published times of TensorRT-Edge-LLM on Jetsons (published.json), and this project's own on a CPU
(benchmarks/results/speed.json). A part of the rows is fitted, the others test the fit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from large.shapes import SHAPES

# isort: split
from bridge_stg.export.engines.devices import find_device
from bridge_stg.export.estimate.estimate import Efficiency, Request, efficiency_of, estimate, seconds_of
from bridge_stg.export.estimate.memory import on_cpu
from bridge_stg.export.estimate.shapes import ModelShape, plain_config, read_shape, shape_of_config
from bridge_stg.export.estimate.work import STORAGE, Storage, Work, language_work, vision_work
from bridge_stg.runtime.device.table import Device
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.memory import gigabytes

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED, SPEED = ROOT / "benchmarks/gpu/published.json", ROOT / "benchmarks/results/speed.json"
PAGE = ROOT / "docs/devices.md"
BOUND = 0.35
"""Largest relative error of a row without a reason."""
FITTED = {"orin": "qwen3-vl-2b", "thor": "qwen3-vl-2b", "cpu": "qwen3_vl_0_5b"}
"""Model whose rows are fitted: on Jetsons those of `edge-llm-0.9.0` without batches, on the CPU those of fp32, int8."""
GROUPS, PATCHES, PAST = 16, 24 * 14, 1498
"""Groups of speed.json's clips, patches of a group, and tokens before a decoded one."""
CHUNK = 1024
CLIP = Request(frames=32, queries=1, size=(224, 384), fine_frames=24)
"""Video and tube of speed.json's requests."""
MODELS = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b", "qwen2.5-vl-3b", "qwen2.5-vl-7b")
MATRIX = (
    "orin-nano-4g", "orin-nano-8g", "orin-nano-8g-super", "orin-nx-8g-super", "orin-nx-16g-super", "agx-orin-32g",
    "agx-orin-64g", "agx-thor", "rtx3060", "rtx4060", "rtx4090", "rtx5090", "l4", "a10", "a100-80g", "h100-80g", "h200",
)  # fmt: skip
DTYPES = ("fp16", "int8", "int4", "fp8", "nvfp4")


@dataclass(frozen=True)
class Row:
    """A measured time.

    Attributes:
        kind: `orin`, `thor` or `cpu`: rows of a kind have the same efficiencies.
        source: where the time is from.
        model, dtype, metric: what was measured: `vision`, `prefill` or `decode`.
        seconds: measured.
        work: counted.
        fitted: whether the efficiencies are fitted on it.
        reason: why the error may be larger than the bound; empty: it may not.
    """

    kind: str
    source: str
    device: Device
    model: str
    dtype: str
    metric: str
    detail: str
    seconds: float
    work: Work
    storage: Storage
    fitted: bool
    reason: str = ""

    @functools.cached_property
    def at_peak(self) -> tuple[float, float]:
        """Seconds for the operations and for the bytes at the device's peaks."""
        return seconds_of(self.work, self.storage, self.device, Efficiency(1.0, 1.0, "peaks"))

    @property
    def estimated(self) -> float:
        """The estimator's seconds."""
        return max(seconds_of(self.work, self.storage, self.device, efficiency_of(self.device)))

    @property
    def error(self) -> float:
        """Relative error of the estimate."""
        return self.estimated / self.seconds - 1


@functools.cache
def shape_of(model: str) -> ModelShape:
    """Return the shape of a model by its name here or in `large.shapes`."""
    return shape_of_config(plain_config(SHAPES[model], "bridge")) if model in SHAPES else read_shape(model)


def peer_storage(dtype: str) -> Storage:
    """Return how TensorRT-Edge-LLM stores a language model: weight-only int8 and int4 (blocks of 128), an fp16 head."""
    weight = {"int4": 0.5 + 2 / 128}.get(dtype, STORAGE[dtype].weight)
    peak = "fp16" if dtype == "int8" else STORAGE[dtype].peak
    return dataclasses.replace(STORAGE[dtype], weight=weight, head=2, peak=peak)


def published_rows() -> Iterator[Row]:
    """Return the rows of published.json."""
    for row in json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"]:
        device, shape, storage = find_device(row["mode"]), shape_of(row["model"]), peer_storage(row["dtype"])
        kind = "thor" if device.sm == 110 else "orin"
        fitted = row["source"] == "edge-llm-0.9.0" and row["model"] == FITTED[kind] and "batch" not in row
        batch, merged = row.get("batch", 1), shape.spec.vision.merge_size**2
        tokens, images = row.get("prefill_tokens", 300) // batch, row.get("vision_tokens", 0) // batch
        past, times = row.get("past", tokens), f"{batch} × " if batch > 1 else ""
        fp16 = STORAGE["fp16"]
        found = {
            "vision": (
                row.get("vision_ms", 0) / 1e3, f"{times}{images} tokens", fp16,
                vision_work(shape, fp16, groups=batch, patches=images * merged),
            ),
            "prefill": (
                row.get("prefill_ms", 0) / 1e3, f"{times}{tokens} tokens", storage,
                language_work(shape, storage, length=tokens, rows=batch),
            ),
            "decode": (
                batch / row["decode_per_s"] if "decode_per_s" in row else 0, f"{times}1 after {past}", storage,
                language_work(shape, storage, length=1, past=past, rows=batch),
            ),
        }  # fmt: skip
        for metric, (seconds, detail, kept, work) in found.items():
            if seconds:
                reason = row.get("reasons", {}).get(metric, "")
                yield Row(
                    kind, row["source"], device, row["model"], row["dtype"], metric, detail, seconds, work, kept,
                    fitted, reason,
                )  # fmt: skip


def measured_rows() -> Iterator[Row]:
    """Return this project's rows on a CPU, of models large enough that kernels, not calls, take the time."""
    device, found = measured_cpu()
    for row in found:
        shape, dtype, metric = shape_of(row["model"]), row["precision"], row["row"]
        storage, vision = on_cpu(STORAGE[dtype]), on_cpu(STORAGE["fp32" if dtype == "fp32" else "int8"])
        works = {
            "vision": (vision_work(shape, vision, groups=GROUPS, patches=PATCHES, calls=GROUPS), 1, vision),
            "prefill": (language_work(shape, storage, length=PAST, calls=math.ceil(PAST / CHUNK)), 1, storage),
            "decode": (language_work(shape, storage, length=1, past=PAST), 16, storage),
        }
        if metric in works:
            work, count, kept = works[metric]
            fitted = row["model"] == FITTED["cpu"] and dtype != "int4"
            detail = {
                "vision": f"{GROUPS * PATCHES // 4} tokens",
                "prefill": f"{PAST} tokens",
                "decode": f"after {PAST}",
            }
            yield Row(
                "cpu", "speed.json", device, row["model"], dtype, metric, detail[metric], row["seconds"] / count, work,
                kept, fitted, "",
            )  # fmt: skip


def rows() -> list[Row]:
    """Return all measured rows."""
    return [*published_rows(), *measured_rows()]


def measured_cpu() -> tuple[Device, list[dict[str, Any]]]:
    """Return the processor of speed.json with its measured limits, and this project's rows, without the demo's."""
    results = json.loads(SPEED.read_text(encoding="utf-8"))
    limits = results["limits"]
    peaks = {"fp32": limits["fp32"], "fp16": limits["fp32"], "int8": limits["int8"]}
    device = Device("cpu", results["machine"]["cpu"], 1, 0, limits["bandwidth"], peaks)
    return device, [row for row in results["rows"] if row["runner"] == "ours" and row["model"] != "demo"]


def fit(found: Sequence[Row]) -> tuple[float, float]:
    """Return the efficiencies with the least squared logarithm of estimated over measured, in steps of 0.01."""
    grid = [step / 100 for step in range(10, 100)]
    times = [(*row.at_peak, row.seconds) for row in found]

    def loss(pair: tuple[float, float]) -> float:
        shares = (max(operations / pair[0], moved / pair[1]) / seconds for operations, moved, seconds in times)
        return sum(math.log(share) ** 2 for share in shares)

    return min(itertools.product(grid, grid), key=loss)


def fits(found: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return the fitted efficiencies of each kind."""
    return {kind: fit([row for row in found if row.kind == kind and row.fitted]) for kind in FITTED}


def error_table(found: Sequence[Row]) -> str:
    """Return the table of all rows with their errors, in Markdown."""
    lines = [
        "| device | model | precision | what | measured | estimated | error | |", "|---|---|---|---|---|---|---|---|"
    ]  # fmt: skip
    notes: dict[str, int] = {}
    for row in found:
        mark = "fitted" if row.fitted else ""
        if abs(row.error) > BOUND:
            mark = f"reason {notes.setdefault(row.reason, len(notes) + 1)}"
        title = row.device.name if row.kind != "cpu" else "CPU, 2 threads"
        lines.append(
            f"| {title} | {row.model} | {row.dtype} | {row.metric}, {row.detail} | {1e3 * row.seconds:.1f} ms | "
            f"{1e3 * row.estimated:.1f} ms | {row.error:+.0%} | {mark} |"
        )
    held = [abs(row.error) for row in found if not row.fitted]
    within = [error for error in held if error <= BOUND]
    single = [abs(row.error) <= BOUND for row in found if not row.fitted and "×" not in row.detail]
    lines += ["", f"Of {len(held)} rows that are not fitted, {len(within)} are within {BOUND:.0%}, with a mean error "
              f"of {sum(within) / len(within):.0%}; of those of one sequence {sum(single)} of {len(single)}. The "
              "others have a reason."]  # fmt: skip
    lines += ["", *(f"Reason {number}: {reason}." for reason, number in notes.items())]
    return "\n".join(lines)


def whole_requests() -> str:
    """Return the table of whole requests on the CPU, time and memory, in Markdown."""
    lines = ["| model | precision | seconds measured | estimated | error | memory measured | estimated | error |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    device, found = measured_cpu()
    for row in found:
        if row["row"] == "end_to_end":
            one = estimate(shape_of(row["model"]), device, CLIP, dtype=row["precision"])
            cells = [row["model"], row["precision"], f"{row['seconds']:.1f} s", f"{one.seconds:.1f} s"]
            cells += [f"{one.seconds / row['seconds'] - 1:+.0%}", gigabytes(row["peak_bytes"]), gigabytes(one.needed)]
            lines.append(f"| {' | '.join(cells)} | {one.needed / row['peak_bytes'] - 1:+.0%} |")
    return "\n".join(lines)


def matrix(model: str) -> str:
    """Return the table of devices and precisions of a model with text heads, in Markdown."""
    shape = shape_of(model)
    lines = [f"| {model} | " + " | ".join(DTYPES) + " |", "|---|" + "---|" * len(DTYPES)]
    for name in MATRIX:
        lines.append(f"| {name} | " + " | ".join(_cell(shape, find_device(name), dtype) for dtype in DTYPES) + " |")
    return "\n".join(lines)


def _cell(shape: ModelShape, device: Device, dtype: str) -> str:
    try:
        found = estimate(shape, device, Request(), dtype=dtype)
    except EngineError:
        return "–"
    if not found.fits:
        return f"no: {gigabytes(found.needed)} of {gigabytes(found.usable)}"
    tight = "tight: " if found.verdict == "tight" else ""
    return f"{tight}{gigabytes(found.needed)}, {found.seconds:.1f} s, {1 / found.token_s:.0f} tokens/s"


def walk() -> str:
    """Return the estimates of the walk-through, as the command prints them."""
    device, shape = find_device("orin-nano-8g"), shape_of("qwen3-vl-2b")
    found = (estimate(shape, device, Request(), dtype=dtype) for dtype in ("fp16", "int8", "int4"))
    return "\n".join(["```text", *(one.table() for one in found), "```"])


def sections() -> Mapping[str, str]:
    """Return the generated parts of docs/devices.md by name."""
    return {
        "errors": error_table(rows()),
        "requests": whole_requests(),
        "walk": walk(),
        "matrix": "\n\n".join(matrix(model) for model in MODELS),
    }


def filled(page: str) -> str:
    """Return the page with its generated parts, each between `<!-- name: begin -->` and `<!-- name: end -->`."""
    for name, text in sections().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit code 1 if the page is out of date.")
def main(check: bool) -> None:
    """Print the fits and write the tables."""
    for kind, pair in fits(rows()).items():
        click.echo(f"{kind}: compute {pair[0]:.2f}, memory {pair[1]:.2f}")
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if check:
        sys.exit(new != page)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
