"""The command `calibrate`, and what `export --int8` shares with it. Runs without torch, on the device too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bridge_stg.calibration.options import (
    GRAPH_OPTIONS,
    GRAPH_RECIPE_NAMES,
    METHODS,
    RECIPE_NAMES,
    Options,
    require_packages,
)
from bridge_stg.commands import options
from bridge_stg.commands.options import PATH, Count, Number
from bridge_stg.commands.progress import ProgressBar, note_untrained
from bridge_stg.export.engines.support import BACKENDS
from bridge_stg.runtime.errors import BridgeError

recipe_type = click.Choice(GRAPH_RECIPE_NAMES)


def check_int8(int8: bool, dtype: str, given: Mapping[str, Path | None]) -> None:
    """Raise BridgeError if `export` is given calibration options without --int8, or --int8 without what it needs."""
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if named and not int8:
        raise BridgeError("options.conflict", f"{named[0]} applies to calibration only; add --int8, or omit it.")
    if int8 and given["samples"] is None:
        raise BridgeError("options.missing", "--int8 needs --samples: JSON lines with typical queries.")
    if int8 and dtype == "bf16":
        raise BridgeError("options.conflict", "--int8 takes --dtype fp32 or fp16, not bf16.")


@contextlib.contextmanager
def float_bundle(out: Path, given: Mapping[str, Any]) -> Iterator[Path]:
    """Check the samples, yield a temporary folder for the float bundle of `export --int8`, and remove it afterwards."""
    import shutil

    require_packages()
    from bridge_stg.calibration.inputs import read_sets

    read_sets(given["samples"], media=given["media"], select=given["select"], evaluate=given["evaluate"])
    path = out.with_name(f".{out.name}.float")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@click.command()
@options.bundle_argument
@options.sample_options(required=True)
@options.out_option("the new bundle")
@click.option(
    "--recipe",
    type=click.Choice(RECIPE_NAMES),
    default="w8a8",
    show_default=True,
    help="Quantization recipe (docs/calibration.md).",
)
@click.option("--vision", type=recipe_type, help="Recipe of the vision encoder; default: from --recipe.")
@click.option("--language", type=recipe_type, help="Recipe of the language model; default: from --recipe.")
@click.option("--spatial", type=recipe_type, help="Recipe of the spatial decoder; default: float.")
@click.option("--kv8", is_flag=True, help="Store keys and values in int8.")
@click.option(
    "--decode-form/--no-decode-form", default=None,
    help="Store the language model's weights once more, for decoding on CPU; default: if they exceed 64 MB.",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(METHODS),
    help="Method for the ranges of all activations; default: the best per tensor.",
)  # fmt: skip
@click.option("--overrides", type=PATH, help="YAML: blocks in float, methods, smoothing strengths.")
@click.option(
    "--max-drop", type=Number(min=0, min_open=True), default=1.0, show_default=True, metavar="POINTS",
    help="Largest allowed loss of m_tIoU and m_vIoU on --select.",
)  # fmt: skip
@click.option(
    "--max-changed", type=Number(min=0, min_open=True), default=3.0, show_default=True, metavar="PERCENT",
    help="Largest share of answers that may change on --select.",
)  # fmt: skip
@click.option("--own-tubes", is_flag=True, help="Compare with the float bundle's own tubes, not with annotations.")
@click.option(
    "--force-int8", multiple=True, type=click.Choice(list(GRAPH_OPTIONS.values())), metavar="GRAPH",
    help="Quantize this graph even if that is not faster here; repeatable.",
)  # fmt: skip
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(BACKENDS),
    help="Backend that the bundle is for; default: onnxruntime-cpu; repeatable.",
)  # fmt: skip
@click.option("--confirm", type=Count(min=0), default=6, show_default=True, help="Blocks to score one by one.")
@click.option("--max-trials", type=Count(min=2), default=24, show_default=True, help="Maximum search trials.")
@options.text_options
@options.seed_option
@options.threads_option
@options.overwrite_option("bundle")
def calibrate(bundle: Path, out: Path, **given: Any) -> None:
    """Quantize a float BUNDLE to int8, int4, fp8 or nvfp4, and report the loss of accuracy in spans and boxes.

    Sensitive blocks stay in float. Intermediate results are in OUT.calibration: the same command resumes.
    """
    from bridge_stg.runtime.bundle.bundle import read_manifest

    heads, text = options.pop_head_options(given).values()
    changed = {name: value for name, value in asdict(text).items() if value != getattr(type(text)(), name)}
    note_untrained(read_manifest(bundle).spec, bundle, heads=heads)
    click.echo(calibrate_bundle(bundle, out, heads=heads, text=changed, **given))


def calibrate_bundle(bundle: Path, out: Path, *, kv8: bool = False, targets: tuple[str, ...] = (), **given: Any) -> str:
    """Calibrate with the options of the command, and return the text that it prints at the end."""
    require_packages()
    from bridge_stg.calibration.calibrate import calibrate
    from bridge_stg.calibration.report.report import table_text

    graphs = {graph: name for option, graph in GRAPH_OPTIONS.items() if (name := given.pop(option, None)) is not None}
    inputs = ("samples", "media", "select", "evaluate", "own_tubes", "overwrite")
    files = {name: given.pop(name) for name in inputs if name in given}
    options = Options(graphs=graphs, int8_cache=kv8, backends=targets or BACKENDS[:1], **given)
    with ProgressBar(lines=True) as progress:
        report = calibrate(bundle, out, options=options, progress=progress, **files)
    work = out.with_name(f"{out.name}.calibration")
    return (
        f"{table_text(report.to_dict())}\n\n{out} is complete; its report is {out / 'reports' / 'calibration.html'}.\n"
        f"{work / 'overrides.yaml'} lists the float blocks, to edit and pass with --overrides; the rest of {work} may "
        "be deleted."
    )
