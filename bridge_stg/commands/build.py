"""The command `build`: TensorRT engines for named targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import PATH
from bridge_stg.commands.progress import ProgressBar, stage_line


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
    help="List the names for --target.",
)  # fmt: skip
@click.option("--graph", "graphs", multiple=True, help="Build only this graph; repeatable.")
@options.variant_option("the one that fits the target")
@click.option("--precision", help="Required precision of BUNDLE; nothing is converted.")
@click.option("--profiles", type=PATH, help="YAML file with sizes to compile for (docs/engines.md).")
@click.option("--overwrite", "--again", is_flag=True, help="Rebuild existing engines.")
@click.option("--check-memory/--no-check-memory", default=True, help="Whether to stop if memory may not suffice.")
@click.option("--layers", is_flag=True, help="Show fused layers and precision per block.")
def build(bundle: Path, targets: tuple[str, ...], profiles: Path | None, layers: bool, **options: Any) -> None:
    """Compile the graphs of a BUNDLE with TensorRT: on the device, or ahead of time for RTX GPUs."""
    from bridge_stg.export.engines.build import build_engines, engine_line
    from bridge_stg.export.engines.layers import plan_table
    from bridge_stg.export.engines.profiles import read_overrides
    from bridge_stg.runtime.bundle.bundle import Bundle

    overrides = None if profiles is None else read_overrides(profiles)
    with ProgressBar(delay_s=1) as progress:
        entries = build_engines(
            Bundle.load(bundle), targets, overrides=overrides, where=str(profiles), report=progress, say=stage_line,
            **options,
        )  # fmt: skip
    for entry in entries:
        click.echo(engine_line(entry))
        if layers and entry.built.get("layers"):
            click.echo(plan_table(entry.built["layers"]))
    click.echo("Kernels are chosen on the device: this lists what was compiled, not how fast it is.")
