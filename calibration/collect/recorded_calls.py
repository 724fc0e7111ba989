"""Record the calls of a bundle's graphs on real clips, as cases that `runtime.parity.compare` replays.

Replaying the same calls in two bundles shows how far their tensors differ and which one is faster.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_stg.calibration.options import load_arguments
from bridge_stg.evaluation.run.evaluate import run_task
from bridge_stg.evaluation.samples import Sample
from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.tokenizer import load_tokenizer
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.host.files import temporary_sibling
from bridge_stg.runtime.parity.golden import write_case
from bridge_stg.runtime.parity.recording import Call, RecordingSession


def record(
    bundle: Bundle,
    samples: Sequence[Sample],
    folder: Path,
    *,
    options: Mapping[str, Any],
    head_options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Evaluate samples and write the calls of all graphs into `folder`/<place>, unless `folder` exists.

    `options` are those of `open_sessions`, `head_options` is `Options.head_options`. The folder appears when it is
    complete. Return the folders of the cases, one per sample that did not fail; if every sample failed, raise
    BridgeError.
    """
    if not folder.is_dir():
        with temporary_sibling(folder) as partial:
            _record(bundle, samples, partial, options, load_arguments(head_options or {}))
            os.replace(partial, folder)
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _record(
    bundle: Bundle, samples: Sequence[Sample], folder: Path, options: Mapping[str, Any], heads: Mapping[str, Any]
) -> None:
    calls: list[Call] = []
    opened = {name: RecordingSession(session, calls) for name, session in open_sessions(bundle, **options).items()}
    failure: Exception | None = None
    tokenizer = load_tokenizer(bundle.tokenizer_path, bundle.manifest.spec)
    with Grounder(opened, bundle.manifest.spec, tokenizer, **heads) as grounder:
        for place, sample in enumerate(samples):
            calls.clear()
            opened["language_model"].capacity = 0
            try:
                run_task(grounder, sample, sample.read_truth(), allow_none=False)
            except BridgeError as error:  # the other samples are still recorded
                failure = error
                continue
            capacity = opened["language_model"].capacity
            write_case(folder / f"{place:03d}", calls, kind="recorded", note=sample.id, cache_capacity=capacity)
    if not folder.is_dir():
        what = f"none of the {len(samples)} samples could be recorded; the last failed with: {failure}"
        raise BridgeError("calibration.all_samples_failed", what)
