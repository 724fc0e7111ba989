"""Write a model repository for Triton Inference Server: the bundle, a Python model that runs it, and its config.pbtxt.

The folder is complete except for Python packages: Triton's Python must have bridge-stg and an engine installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from bridge_stg.runtime.backends.registry import BACKENDS
from bridge_stg.runtime.bundle.bundle import MANIFEST, REPORTS, Bundle
from bridge_stg.runtime.bundle.spec import chosen_heads
from bridge_stg.runtime.errors import BridgeError, BundleError, EngineError
from bridge_stg.runtime.heads.options import TextOptions
from bridge_stg.runtime.host.files import replace_folder, temporary_sibling
from bridge_stg.triton.model import BOX_COLUMNS

KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
CONFIG, MODEL, VERSION, BUNDLE = "config.pbtxt", "model.py", "1", "bundle"


@dataclass(frozen=True)
class Serving:
    """Options of a served model."""

    name: str = "bridge_stg"
    backend: str = "auto"  # backend and variant as for `Grounder.load`
    variant: str | None = None
    media: str | None = None  # folder on the server whose files VIDEO names, None for VIDEO_BYTES only
    max_batch: int = 16  # queries in one batch
    queue_delay_us: int = 5000  # microseconds that a query waits for others to share its batch
    instances: int = 1  # processes, each of which loads the model
    kind: str = "auto"  # `cpu`, `gpu` (one set of instances per GPU) or `auto` for Triton's choice
    open_videos: int = 4  # videos per instance that stay open between batches, so that they are read once
    heads: str | None = None  # heads and text as for `Grounder.load`
    text: TextOptions = field(default_factory=TextOptions)
    deadline_s: float | None = None  # seconds after which a call stops, None for never


def write_repository(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    serving: Serving | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write <out>/<name>/config.pbtxt, 1/model.py and 1/bundle/, and return the model's folder.

    Other models of the repository are kept, one of the same name only without `overwrite`. The engines of the bundle
    are copied, its reports are not. Raises BridgeError if the bundle is damaged or lacks the variant or the heads, the
    backend is unknown, Triton does not accept the name, or a model of this name exists.
    """
    serving = serving or Serving()
    loaded, repository = Bundle.load(bundle), Path(out)
    source, target = loaded.path, repository / serving.name
    _check(serving, loaded)
    if repository.resolve().is_relative_to(source.resolve()):
        raise BridgeError("output.is_input", f"{repository} is inside the bundle {source}; choose another folder.")
    ours = (target / CONFIG).is_file() and (target / VERSION / BUNDLE / MANIFEST).is_file()
    if target.exists() and not (overwrite and ours):
        advice = "pass --overwrite to replace it, or another --name" if ours else "choose another --name"
        raise BridgeError("output.exists", f"{target} already exists: {advice}.")
    repository.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(target) as partial:
        partial.mkdir()
        folder = partial / VERSION
        shutil.copytree(source, folder / BUNDLE, ignore=lambda path, _: [REPORTS] if Path(path) == source else [])
        (folder / MODEL).write_text(_template(MODEL).render(), encoding="utf-8")
        (partial / CONFIG).write_text(model_config(serving), encoding="utf-8")
        replace_folder(partial, target)
    return target


def _check(serving: Serving, bundle: Bundle) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", serving.name):
        raise BridgeError("options.invalid", f"--name {serving.name!r}: expected letters, digits, '.', '-' and '_'.")
    backends = ("auto", *(backend.name for backend in BACKENDS))
    if serving.backend not in backends:
        raise EngineError("engine.unknown_backend", f"backend {serving.backend!r}: expected {', '.join(backends)}.")
    variants = sorted({graph.variant for graph in bundle.manifest.all_graphs()})
    if serving.variant is not None and serving.variant not in variants:
        message = f"{bundle.path}: no graph has the variant {serving.variant!r}; known: {', '.join(variants)}."
        raise BundleError("bundle.no_variant", message)
    chosen_heads(bundle.manifest.spec, serving.heads)


def model_config(serving: Serving) -> str:
    """Return config.pbtxt: a ModelConfig of Triton's model_config.proto in protobuf's text format."""
    parameters = {
        "bundle": BUNDLE,
        "backend": serving.backend,
        "variant": serving.variant or "",
        "media": serving.media or "",
        "heads": serving.heads or "",
        "mode": serving.text.mode,
        "grammar": "true" if serving.text.grammar else "false",
        "max_tokens": str(serving.text.max_tokens),
        "open_videos": str(serving.open_videos),
        "deadline_s": str(serving.deadline_s or 0),
    }
    kind = KINDS[serving.kind]
    return _template(CONFIG).render(serving=serving, parameters=parameters, kind=kind, columns=BOX_COLUMNS)


def _template(name: str) -> Template:
    """Return a template of this folder; `quote` writes a string of protobuf, which accepts JSON's escapes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.get_template(f"{name}.j2")
