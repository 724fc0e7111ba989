"""The command `calibrate`, and what `export --int8` shares with it. Runs without torch, on the device too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from bridge_stg.commands.options import THREADS

RECIPES = ("w8a8", "w8", "w4")
GRAPH_RECIPES = ("float", *RECIPES)
METHODS = ("minmax", "percentile", "entropy", "mse")
TARGETS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt-10", "tensorrt-11", "tensorrt-rtx")
GRAPHS = {"vision": "vision_encoder", "language": "language_model", "spatial": "spatial_decoder"}
PATH = click.Path(path_type=Path)

Command = Callable[..., Any]


def sample_options(*, required: bool) -> Callable[[Command], Command]:
    """Return a decorator that adds the options by which samples are given."""
    options = [
        click.option("--samples", type=PATH, required=required, help="JSON lines that flow through the chain."),
        click.option("--media", type=PATH, help="The folder of their media; default: that of each file."),
        click.option("--select", type=PATH, help="Labelled JSON lines that decide which blocks stay in float."),
        click.option(
            "--evaluate",
            "judged",
            type=PATH,
            help="Labelled JSON lines that judge the result alone.",
        ),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def check_int8(int8: bool, dtype: str, given: Mapping[str, Path | None]) -> None:
    """Refuse options of `export` that do not go together. Raises click.UsageError."""
    named = [f"--{'evaluate' if name == 'judged' else name}" for name, value in given.items() if value is not None]
    if named and not int8:
        raise click.UsageError(f"{named[0]} belongs to a calibration; add --int8, or leave it out.")
    if int8 and given["samples"] is None:
        raise click.UsageError("--int8 needs --samples: JSON lines of what the model will be asked.")
    if int8 and dtype == "bf16":
        raise click.UsageError("--int8 takes --dtype fp32 or fp16, not bf16.")


@contextlib.contextmanager
def float_bundle(out: Path, given: Mapping[str, Any]) -> Iterator[Path]:
    """Give the folder of the float bundle that `export --int8` calibrates, and remove it in the end.

    Raises:
        BridgeError: the samples will not do; better now than after the export.
    """
    import shutil

    from bridge_stg.calibration.inputs import read_sets, require_packages

    require_packages()
    read_sets(given["samples"], media=given["media"], select=given["select"], evaluate=given["judged"])
    path = out.with_name(f".{out.name}.float")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@click.command()
@click.argument("bundle", type=PATH)
@sample_options(required=True)
@click.option("--out", type=PATH, required=True, help="The new bundle: a folder to be made.")
@click.option("--recipe", type=click.Choice(RECIPES), default="w8a8", show_default=True, help="Of the language model.")
@click.option("--vision", type=click.Choice(GRAPH_RECIPES), help="Of the vision encoder; default: as the recipe says.")
@click.option("--language", type=click.Choice(GRAPH_RECIPES), help="Of the language model; default: the recipe.")
@click.option("--spatial", type=click.Choice(GRAPH_RECIPES), help="Of the spatial decoder; default: float.")
@click.option("--kv8", is_flag=True, help="Keep keys and values in int8.")
@click.option("--method", type=click.Choice(METHODS), help="Of all ranges; default: the one of least error, a tensor.")
@click.option("--overrides", type=PATH, help="YAML: blocks in float, methods, smoothing strengths.")
@click.option(
    "--max-drop", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, metavar="POINTS",
    help="What m_tIoU and m_vIoU may lose on --select.",
)  # fmt: skip
@click.option(
    "--max-changed", type=click.FloatRange(min=0, min_open=True), default=3.0, show_default=True, metavar="PERCENT",
    help="How many answers may change there.",
)  # fmt: skip
@click.option("--own-tubes", is_flag=True, help="Take the float bundle's own tubes for the truth, not annotations.")
@click.option(
    "--force-int8", multiple=True, type=click.Choice(list(GRAPHS.values())), metavar="GRAPH",
    help="Quantize this graph even if it gains nothing here; repeatable.",
)  # fmt: skip
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(TARGETS), help="What it is for; default: onnxruntime-cpu."
)
@click.option("--confirm", type=click.IntRange(min=0), default=6, show_default=True, help="Blocks judged alone.")
@click.option("--max-trials", type=click.IntRange(min=2), default=24, show_default=True, help="Of the choice.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=THREADS, help="CPU threads; by default the engine decides.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there already.")
def calibrate(bundle: Path, out: Path, **options: Any) -> None:
    """Make an INT8 bundle of a float BUNDLE, and say what that costs in time spans and boxes.

    Blocks that INT8 would ruin stay in float. The work lies in OUT.calibration: after a kill, the same command goes on.
    """
    click.echo(calibrate_bundle(bundle, out, **options))


def calibrate_bundle(
    bundle: Path,
    out: Path,
    *,
    samples: Path,
    media: Path | None = None,
    select: Path | None = None,
    judged: Path | None = None,
    own_tubes: bool = False,
    overwrite: bool = False,
    kv8: bool = False,
    targets: tuple[str, ...] = (),
    **options: Any,
) -> str:
    """Calibrate, and return the text that the command ends with. Options are those of the command."""
    from bridge_stg.calibration.inputs import require_packages

    require_packages()
    from bridge_stg.calibration.calibrate import Options, calibrate
    from bridge_stg.calibration.report.report import table_text

    graphs: Mapping[str, str] = {
        graph: name for option, graph in GRAPHS.items() if (name := options.pop(option, None)) is not None
    }
    chosen = Options(graphs=graphs, int8_cache=kv8, targets=targets or TARGETS[:1], **options)
    with StepProgress() as progress:
        found = calibrate(
            bundle, out, samples=samples, media=media, select=select, evaluate=judged, own_tubes=own_tubes,
            options=chosen, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    work = out.with_name(f"{out.name}.calibration")
    return (
        f"{table_text(found.to_dict())}\n\n{out} is complete; its report is {out / 'reports' / 'calibration.html'}.\n"
        f"{work / 'overrides.yaml'} holds the choice, to be edited and handed back with --overrides; the rest of "
        f"{work} may be deleted."
    )


class StepProgress:
    """A bar on stderr for each step; a line a step where stderr is no terminal."""

    def __init__(self) -> None:
        self.stage = ""
        self.bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        import sys

        from tqdm import tqdm

        if stage != self.stage:
            self.close()
            self.stage = stage
            if sys.stderr.isatty():
                self.bar = tqdm(desc=stage, total=total, initial=done, leave=False)
            else:
                click.echo(f"  {stage}", err=True)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
