"""The commands `build` and `estimate`: TensorRT engines, and the memory and time that a model needs on a device."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, PATH
from bridge_stg.commands.progress import ProgressBar, stage_line
from bridge_stg.runtime.errors import BridgeError

BUILD_ONLY = ("graphs", "precision", "overwrite", "check_memory", "layers")
DRY_RUN_ONLY = ("dtype", "heads", "figures", "as_json")
"""Names of the options of `build` that are only for compiling, and only for a dry run."""

if TYPE_CHECKING:
    from bridge_stg.export.engines.profiles import Deployment


def _show_targets(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from bridge_stg.export.engines.targets import target_table

        click.echo(target_table())
        context.exit()


@click.command()
@options.bundle_argument
@click.option("--target", "targets", multiple=True, required=True, metavar="NAME", help="See --targets; repeatable.")
@click.option(
    "--targets", "list_targets", is_flag=True, is_eager=True, callback=_show_targets, expose_value=False,
    help="List the names for --target, and exit.",
)  # fmt: skip
@click.option("--graph", "graphs", multiple=True, help="Build only this graph; repeatable.")
@options.variant_option("the one that fits the target")
@click.option("--precision", help="Required precision of BUNDLE; nothing is converted.")
@click.option(
    "--max-frames", type=COUNT, default=64, show_default=True, help="Coarse frames per video that the engines take."
)
@click.option(
    "--max-queries", type=COUNT,
    help="Queries that the engines decode together; default: 8, of which --dry-run counts one.",
)  # fmt: skip
@click.option("--profiles", type=PATH, help="YAML file with sizes to compile for (docs/engines.md).")
@click.option("--overwrite", "--again", is_flag=True, help="Rebuild existing engines.")
@click.option(
    "--check-memory/--no-check-memory", default=True, show_default=True,
    help="Whether to stop if memory may not suffice.",
)  # fmt: skip
@click.option("--layers", is_flag=True, help="Show fused layers and precision per block.")
@click.option(
    "--dry-run", is_flag=True,
    help="Compile nothing, and count the memory on each target; BUNDLE may be a MODEL as in `estimate`. The exit code "
    "is 3 if something does not fit.",
)  # fmt: skip
@click.option(
    "--dtype", metavar="NAME", help="With --dry-run: precision of a model that is not a bundle; default: fp16."
)
@options.heads_option
@click.option(
    "--figures", type=click.Choice(["auto", "builder", "model"]), default="auto", show_default=True,
    help="With --dry-run: where activation memory is from, TensorRT-RTX's builder or a fitted model; auto: the builder "
    "if it is installed.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print one JSON object instead of text.")
def build(
    *, bundle: Path, targets: tuple[str, ...], max_frames: int, max_queries: int | None, profiles: Path | None,
    layers: bool, dry_run: bool, dtype: str | None, heads: str | None, figures: str, as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Compile the graphs of a BUNDLE with TensorRT: on the device, or ahead of time for RTX GPUs."""
    from bridge_stg.export.engines.profiles import MAX_QUERIES, Deployment

    check_options(dry_run=dry_run)
    deployment = Deployment(max_frames, max_queries or MAX_QUERIES)
    if dry_run:
        return _dry_run(
            str(bundle), targets, deployment, queries=max_queries or 1,
            dtype=dtype, heads=heads, variant=options["variant"], profiles=profiles, figures=figures, as_json=as_json,
        )  # fmt: skip
    from bridge_stg.export.engines.build import build_engines, engine_line
    from bridge_stg.export.engines.layers import plan_table
    from bridge_stg.export.engines.profiles import read_overrides
    from bridge_stg.export.estimate.dry_run import activations_of
    from bridge_stg.runtime.bundle.bundle import Bundle

    overrides, loaded = None if profiles is None else read_overrides(profiles), Bundle.load(bundle)
    with ProgressBar(delay_s=1) as progress:
        entries = build_engines(
            loaded, targets, deployment=deployment, overrides=overrides, where=str(profiles),
            activations=activations_of(loaded), report=progress, say=stage_line, **options,
        )  # fmt: skip
    for entry in entries:
        click.echo(engine_line(entry))
        if layers and entry.built.get("layers"):
            click.echo(plan_table(entry.built["layers"]))
    click.echo("Kernels are chosen on the device: this lists what was compiled, not how fast it is.")
    return 0


def check_options(*, dry_run: bool) -> None:
    """Raise BridgeError for an option of `build` that has no effect with, or without, --dry-run."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name in (BUILD_ONLY if dry_run else DRY_RUN_ONLY):
            what = "has no effect with --dry-run; leave one out." if dry_run else "needs --dry-run; add it."
            raise BridgeError("options.conflict", f"{option.opts[0]} {what}")


def _dry_run(
    model: str, targets: Sequence[str], deployment: Deployment, *, queries: int, dtype: str | None, heads: str | None,
    variant: str | None, profiles: Path | None, figures: str, as_json: bool,
) -> int:  # fmt: skip
    """Print the memory that a model's engines need on each target; return 3 if one does not fit, else 0."""
    from bridge_stg.export.engines.profiles import read_overrides
    from bridge_stg.export.engines.support import ONNXRUNTIME_ONLY, VARIANTS
    from bridge_stg.export.estimate.builder_figures import BuilderFigures
    from bridge_stg.export.estimate.dry_run import device_of, dry_run
    from bridge_stg.export.estimate.memory import check_dtype
    from bridge_stg.export.estimate.shapes import read_shape
    from bridge_stg.runtime.bundle.bundle import MANIFEST, Bundle
    from bridge_stg.runtime.chain.results import SCHEMA
    from bridge_stg.runtime.errors import EngineError

    if "cpu" in targets:  # before it is measured
        raise BridgeError("options.invalid", "--target cpu: TensorRT compiles engines for GPUs; see `estimate`.")
    check_dtype(dtype)
    devices, overrides = [device_of(name) for name in targets], None if profiles is None else read_overrides(profiles)
    bundle = Bundle.load(model) if (Path(model) / MANIFEST).is_file() else None
    if bundle is not None and dtype is not None:
        raise BridgeError("options.conflict", f"--dtype {dtype}: {model} is a bundle, which has its precisions.")
    if figures == "builder" and bundle is None:
        raise BridgeError("options.conflict", f"--figures builder: {model} is not a bundle, so it has no graphs.")
    if variant in ONNXRUNTIME_ONLY or (bundle is None and variant not in (None, *VARIANTS)):
        built = " or ".join(name for name in VARIANTS if name not in ONNXRUNTIME_ONLY)
        raise BridgeError("options.invalid", f"--variant {variant}: TensorRT compiles the variant {built}.")
    shape, builder = read_shape(model, heads=heads), None
    if figures != "model" and bundle is not None:
        try:
            builder = BuilderFigures(say=stage_line)
        except EngineError:
            if figures == "builder":
                raise
    found = [
        dry_run(
            shape, device, deployment, queries=queries, bundle=bundle, dtype=dtype, variant=variant,
            overrides=overrides, where=str(profiles), builder=builder,
        )
        for device in devices
    ]  # fmt: skip
    if as_json:
        document = {"schema": SCHEMA, "model": model, "dry_runs": [one.to_json() for one in found]}
        click.echo(json.dumps(document, indent=1))
    else:
        click.echo("\n".join(one.table() for one in found))
    return 0 if all(one.fits for one in found) else 3


def _video_size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    """Convert width and height such as `1280x720` to (height, width)."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", value)
    if found is None:
        raise click.BadParameter(f"{value!r}: expected width and height in pixels, such as 1280x720.")
    return int(found[2]), int(found[1])


def _show_devices(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from bridge_stg.export.engines.devices import device_table

        click.echo(device_table())
        context.exit()


@click.command()
@click.argument("model")
@click.option("--target", "targets", multiple=True, required=True, metavar="NAME", help="See --targets; repeatable.")
@click.option(
    "--targets", "list_targets", is_flag=True, is_eager=True, callback=_show_devices, expose_value=False,
    help="List the names for --target, and exit.",
)  # fmt: skip
@click.option("--frames", type=COUNT, default=32, show_default=True, help="Coarse frames of the video.")
@click.option("--queries", type=COUNT, default=1, show_default=True, help="Queries that run together.")
@click.option("--fine-frames", type=COUNT, help="Fine frames of all tubes; default: as many as --frames.")
@click.option(
    "--video-size", "size", metavar="WxH", default="1280x720", show_default=True, callback=_video_size,
    help="Size of the video in pixels.",
)  # fmt: skip
@click.option(
    "--dtype", "dtypes", multiple=True, metavar="NAME",
    help="Precision: fp32, fp16, bf16, int8, int4, fp8 or nvfp4; repeatable; default: that of a bundle, else fp16.",
)  # fmt: skip
@options.heads_option
@options.json_option
def estimate(
    *, model: str, targets: tuple[str, ...], dtypes: tuple[str, ...], heads: str | None, as_json: bool, **video: Any
) -> None:  # fmt: skip
    """Estimate the memory and the seconds per stage of MODEL on devices, without its weights.

    MODEL is a checkpoint, a downloaded Qwen-VL folder or its config.json, a bundle, or a name: qwen3-vl-2b,
    qwen3-vl-4b, qwen3-vl-8b, qwen2.5-vl-3b, qwen2.5-vl-7b. The target `cpu` is this machine, measured now.
    docs/devices.md has the errors of the estimates.
    """
    from bridge_stg.export.engines.devices import CPU, find_device
    from bridge_stg.export.estimate.estimate import Request
    from bridge_stg.export.estimate.estimate import estimate as estimated
    from bridge_stg.export.estimate.memory import check_dtype
    from bridge_stg.export.estimate.shapes import read_shape
    from bridge_stg.runtime.chain.results import SCHEMA

    # Everything that may be wrong is checked before seconds are spent on imports and on measuring this machine.
    for dtype in dtypes:
        check_dtype(dtype)
    found_devices = {name: find_device(name) for name in targets if name != CPU}
    shape = read_shape(model, heads=heads)
    devices = [found_devices.get(name) or find_device(name) for name in dict.fromkeys(targets)]
    found = [
        estimated(shape, device, Request(**video), dtype=dtype) for device in devices for dtype in dtypes or (None,)
    ]
    if as_json:
        document = {"schema": SCHEMA, "model": model, **video, "estimates": [one.to_json() for one in found]}
        document["size"] = {"width": video["size"][1], "height": video["size"][0]}
        click.echo(json.dumps(document, indent=1))
        return
    click.echo("\n".join(one.table() for one in found))
