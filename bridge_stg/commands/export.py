"""The commands about one bundle: `export`, `inspect` and `verify`; and `doctor`, about the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.calibrate import calibrate_bundle, check_int8, float_bundle
from bridge_stg.commands.infer import UNVERIFIED
from bridge_stg.commands.options import DTYPES, PATH
from bridge_stg.commands.progress import ProgressBar, note_untrained, stage_line
from bridge_stg.runtime.errors import BridgeError

VARIANTS = ("standard", "primitive")


@click.command()
@click.argument("checkpoint", type=PATH)
@options.out_option("the bundle")
@options.overwrite_option("bundle")
@click.option(
    "--variant", "variants", multiple=True, type=click.Choice(VARIANTS),
    help="Variant of the graphs to write; repeatable; default: both.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Dtype of the matmuls.")
@options.adapter_option
@click.option("--verify/--no-verify", default=True, show_default=True, help="Whether to compare the graphs with torch.")
@click.option("--int8", is_flag=True, help="Calibrate the bundle too, as `calibrate` does; needs --samples.")
@options.sample_options(required=False)
def export(
    *, checkpoint: Path, out: Path, overwrite: bool, variants: tuple[str, ...], dtype: str, adapter: str | None,
    verify: bool, int8: bool, **given: Any,
) -> None:  # fmt: skip
    """Turn a CHECKPOINT folder into a verified bundle that runs without torch."""
    check_int8(int8, dtype, given)
    if out.exists() and not overwrite:
        raise BridgeError("output.exists", f"{out} already exists. Pass --overwrite to replace it, or another --out.")
    from bridge_stg.export.export_bundle import export_bundle
    from bridge_stg.export.parity.parity import parity_table
    from bridge_stg.runtime.bundle.bundle import read_manifest

    options: dict[str, Any] = {
        "variants": variants or VARIANTS, "dtype": dtype, "adapter": adapter, "verify": verify, "progress": stage_line,
    }  # fmt: skip
    if int8:
        with float_bundle(out, given) as path:
            made = export_bundle(checkpoint, path, overwrite=True, **options)  # an interrupted call may have left it
            click.echo(parity_table(made) if verify else UNVERIFIED)
            click.echo(calibrate_bundle(made, out, overwrite=overwrite, **given))
            note_untrained(read_manifest(made).spec, out)
        return
    made = export_bundle(checkpoint, out, overwrite=overwrite, **options)
    click.echo(f"{parity_table(made) if verify else UNVERIFIED}\n{made} is complete.")
    note_untrained(read_manifest(made).spec, made)


@click.command()
@options.bundle_argument
def inspect(bundle: Path) -> None:
    """Show what is in a BUNDLE: model, graphs, variants, tensors."""
    from bridge_stg.commands.tables import bundle_table
    from bridge_stg.runtime.bundle.bundle import Bundle

    loaded = Bundle.load(bundle)
    click.echo(bundle_table(loaded))
    note_untrained(loaded.manifest.spec, bundle)


@click.command()
@options.bundle_argument
def migrate(bundle: Path) -> None:
    """Rewrite the manifest of a BUNDLE of the previous format in place, in the format of this version.

    Such a bundle runs without this too, but not with the format after this one. Other files of the bundle stay.
    """
    from bridge_stg.runtime.bundle.manifest import SCHEMA_VERSION
    from bridge_stg.runtime.bundle.writer import migrate_bundle

    done = "now has" if migrate_bundle(bundle) else "already has"
    click.echo(f"{bundle} {done} schema version {SCHEMA_VERSION}")


@click.command()
@options.bundle_argument
@options.backend_options(variant="every one that runs here")
@click.option("--bisect", is_flag=True, help="Name the block in which the first deviation begins; needs onnx.")
@click.option(
    "--against", type=PATH, help="With --bisect: a correct bundle of this model; default: another variant of BUNDLE."
)
def verify(bundle: Path, bisect: bool, against: Path | None, **options: Any) -> None:
    """Hash every file of a BUNDLE and replay its golden cases on this machine.

    With --bisect, temporary engines are built for a TensorRT backend.
    """
    options["report"] = click.echo
    if bisect:
        from bridge_stg.export.engines.bisect_engines import engine_maker
        from bridge_stg.export.parity.bisect import verify_and_bisect

        with ProgressBar(delay_s=1) as progress:
            verify_and_bisect(bundle, against=against, prepare=engine_maker(report=progress, say=stage_line), **options)
        return
    if against is not None:
        raise BridgeError("options.conflict", "--against needs --bisect; add it.")
    from bridge_stg.runtime.parity.verify import verify_bundle

    verify_bundle(bundle, **options)


@click.command()
@options.json_option
def doctor(as_json: bool) -> None:
    """Show devices, drivers and memory of this machine, and what each backend still needs."""
    from bridge_stg.runtime.backends.doctor import diagnose, format_diagnosis

    diagnosis = diagnose()
    click.echo(json.dumps(diagnosis.to_json(), indent=1) if as_json else format_diagnosis(diagnosis))
