"""The command `build`: engines of TensorRT for named targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def _show_targets(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from bridge_stg.export.engines.targets import target_table

        click.echo(target_table())
        context.exit()


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, required=True, metavar="NAME", help="See --targets; repeatable.")
@click.option(
    "--targets",
    "list_targets",
    is_flag=True,
    is_eager=True,
    callback=_show_targets,
    expose_value=False,
    help="List them.",
)
@click.option("--graph", "graphs", multiple=True, help="Only this graph; repeatable.")
@click.option("--variant", help="The graphs' dialect; by default the target's.")
@click.option("--precision", help="Refuse a bundle in another one; none is converted here.")
@click.option("--profiles", type=click.Path(path_type=Path), help="YAML: sizes to compile for (docs/engines.md).")
@click.option("--again", is_flag=True, help="Compile engines that are there already.")
@click.option("--check-memory/--no-check-memory", default=True, help="Whether to stop where the estimate does not fit.")
@click.option("--layers", is_flag=True, help="Show, by block, what was fused and in which precision.")
def build(bundle: Path, targets: tuple[str, ...], profiles: Path | None, layers: bool, **options: Any) -> None:
    """Compile the graphs of a BUNDLE with TensorRT: on the device, or ahead of time for RTX GPUs."""
    from bridge_stg.cli import StageProgress
    from bridge_stg.export.engines.build import build_engines, engine_line
    from bridge_stg.export.engines.layers import plan_table
    from bridge_stg.export.engines.profiles import read_overrides
    from bridge_stg.runtime.bundle.bundle import Bundle

    overrides = None if profiles is None else read_overrides(profiles)
    with StageProgress() as progress:
        entries = build_engines(
            Bundle.load(bundle), targets, overrides=overrides, where=str(profiles), report=progress,
            say=lambda line: click.echo(f"  {line}", err=True), **options,
        )  # fmt: skip
    for entry in entries:
        click.echo(engine_line(entry))
        if layers and entry.built.get("layers"):
            click.echo(plan_table(entry.built["layers"]))
    click.echo("Kernels are chosen on the device: this says what was compiled, not how fast it is.")
