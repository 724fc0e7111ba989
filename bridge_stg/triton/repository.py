"""Write a model repository for Triton Inference Server: the bundle, a Python model that runs it, and its config.pbtxt.

The folder is complete but for Python packages: Triton's Python must have bridge-stg and an engine installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bridge_stg.runtime.backends.registry import BACKENDS
from bridge_stg.runtime.bundle.bundle import MANIFEST, REPORTS, Bundle
from bridge_stg.runtime.errors import BundleError, EngineError
from bridge_stg.triton.model import BOX_COLUMNS

KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
CONFIG, MODEL, VERSION, BUNDLE = "config.pbtxt", "model.py", "1", "bundle"

SOURCE = '''"""What Triton's Python backend loads. The package bridge-stg, which does the work, must be installed."""

from pathlib import Path

import triton_python_backend_utils as pb_utils

from bridge_stg.triton.model import GroundingModel


class TritonPythonModel(GroundingModel):
    """Grounds queries in videos; see docs/deployment.md of bridge-stg for inputs and outputs."""

    utils = pb_utils
    folder = Path(__file__).resolve().parent
'''


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        name: of the model.
        backend, variant: as of `Grounder.load`.
        media: the folder on the server that VIDEO names files in; None: videos come as VIDEO_BYTES only.
        max_batch: the most queries in one batch.
        queue_delay_us: how long a query waits for others to share its batch.
        instances: processes, each with the model loaded once.
        kind: `cpu`, `gpu` (one set of instances a GPU) or `auto`: Triton's choice.
        open_videos: videos that stay open between batches, an instance.
        deadline_s: seconds after which a call gives up; None: never.
    """

    name: str = "bridge_stg"
    backend: str = "auto"
    variant: str | None = None
    media: str | None = None
    max_batch: int = 16
    queue_delay_us: int = 5000
    instances: int = 1
    kind: str = "auto"
    open_videos: int = 4
    deadline_s: float | None = None


def write_repository(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    serving: Serving | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write <out>/<name>/config.pbtxt, 1/model.py and 1/bundle/. Return the model's folder.

    Other models in the repository stay as they are.

    Args:
        bundle: the bundle; its engines come along, its reports stay behind.
        out: the repository, made if it is not there.
        overwrite: whether to replace a model of the same name.

    Raises:
        BundleError: the bundle is damaged or lacks the variant, the name is none that Triton takes, or a model of this
            name is there.
        EngineError: the backend is unknown.
    """
    serving = serving or Serving()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", serving.name):
        raise BundleError(f"{serving.name!r} is no name of a model: use letters, digits, dots, dashes and underscores.")
    loaded, repository = Bundle.load(bundle), Path(out)
    source, target = loaded.path, repository / serving.name
    backends = ("auto", *(backend.name for backend in BACKENDS))
    if serving.backend not in backends:
        raise EngineError(f"backend {serving.backend!r} is unknown; known: {', '.join(backends)}.")
    variants = sorted({graph.variant for graph in loaded.manifest.all_graphs()})
    if serving.variant is not None and serving.variant not in variants:
        raise BundleError(f"{source}: no graph has the variant {serving.variant!r}; there are: {', '.join(variants)}.")
    if repository.resolve().is_relative_to(source.resolve()):
        raise BundleError(f"{repository} lies in the bundle {source}; choose a folder of its own.")
    if target.exists() and not (overwrite and _is_ours(target)):
        why = "give --overwrite to replace it, or another --name" if _is_ours(target) else "choose another --name"
        raise BundleError(f"{target} is there already: {why}.")
    partial = repository / f".{serving.name}.partial{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        folder = partial / VERSION
        shutil.copytree(source, folder / BUNDLE, ignore=_reports(source))
        (folder / MODEL).write_text(SOURCE, encoding="utf-8")
        (partial / CONFIG).write_text(model_config(serving), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def model_config(serving: Serving) -> str:
    """Return config.pbtxt: a ModelConfig of Triton's model_config.proto in protobuf's text format."""
    parameters = {
        "bundle": BUNDLE,
        "backend": serving.backend,
        "variant": serving.variant or "",
        "media": serving.media or "",
        "open_videos": str(serving.open_videos),
        "deadline_s": str(serving.deadline_s or 0),
    }
    lines = [
        f"name: {_quoted(serving.name)}",
        'backend: "python"',
        f"max_batch_size: {serving.max_batch}",
        "# Queries that come within this time share a batch; those on one video share its reading and encoding.",
        f"dynamic_batching {{ max_queue_delay_microseconds: {serving.queue_delay_us} }}",
        "# Give either a path below the media folder, or the file itself.",
        _tensor("input", "VIDEO", "TYPE_STRING", "1", optional=True),
        _tensor("input", "VIDEO_BYTES", "TYPE_STRING", "1", optional=True),
        _tensor("input", "QUERY", "TYPE_STRING", "1"),
        "# Whether `not in this video` is a possible answer; true if it is not given.",
        _tensor("input", "ALLOW_NONE", "TYPE_BOOL", "1", optional=True),
        "# The whole answer as JSON, and its parts as tensors; what is not there is NaN.",
        _tensor("output", "RESULT", "TYPE_STRING", "1"),
        _tensor("output", "FOUND", "TYPE_BOOL", "1"),
        _tensor("output", "SPAN", "TYPE_FP32", "2"),
        f"# {', '.join(BOX_COLUMNS)}",
        _tensor("output", "BOXES", "TYPE_FP32", f"-1, {len(BOX_COLUMNS)}"),
        f"instance_group [ {{ count: {serving.instances} kind: {KINDS[serving.kind]} }} ]",
    ]
    lines += [
        f"parameters {{ key: {_quoted(name)} value {{ string_value: {_quoted(value)} }} }}"
        for name, value in parameters.items()
    ]
    return "\n".join(lines) + "\n"


def _tensor(side: str, name: str, dtype: str, dims: str, *, optional: bool = False) -> str:
    more = " optional: true" if optional else ""
    return f"{side} [ {{ name: {_quoted(name)} data_type: {dtype} dims: [ {dims} ]{more} }} ]"


def _quoted(text: str) -> str:
    """A string of protobuf's text format; JSON's escapes are among those that it knows."""
    return json.dumps(text, ensure_ascii=False)


def _is_ours(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / VERSION / BUNDLE / MANIFEST).is_file()


def _reports(source: Path) -> Callable[[str, list[str]], list[str]]:
    """For copytree: leave the reports of a bundle behind."""
    return lambda folder, names: [REPORTS] if Path(folder) == source and REPORTS in names else []
