"""Record what flows through a bundle's chain on real clips, as cases that `runtime.compare` replays.

The same calls, replayed with two bundles, tell how far their tensors are apart and which one is faster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.run.evaluate import ask
from bridge_stg.evaluation.samples import Sample
from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.parity.golden import write_case
from bridge_stg.runtime.parity.recording import Call, RecordingSession


def record(
    bundle: Bundle, samples: Sequence[Sample], folder: Path, *, allow_none: bool = True, options: Mapping[str, Any]
) -> list[Path]:
    """Ask samples and write every call of every graph into `folder`/<place>, unless they lie there already.

    Args:
        bundle: whose calls and outputs are the reference.
        samples: what to ask; one case each.
        folder: appears when it is complete.
        allow_none: whether "not there" is a possible answer.
        options: `backend`, `variant` and `threads` of `open_sessions`.

    Returns:
        The folders of the cases; those of samples that fail are left out.

    Raises:
        BridgeError: every sample failed.
    """
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _record(bundle, samples, partial, allow_none=allow_none, options=options)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _record(
    bundle: Bundle, samples: Sequence[Sample], folder: Path, *, allow_none: bool, options: Mapping[str, Any]
) -> None:
    calls: list[Call] = []
    opened = {name: RecordingSession(session, calls) for name, session in open_sessions(bundle, **options).items()}
    failure: Exception | None = None
    with Grounder(opened, bundle.manifest.spec, Tokenizer.from_file(bundle.tokenizer_path)) as grounder:
        for place, sample in enumerate(samples):
            calls.clear()
            opened["language_model"].capacity = 0
            try:
                ask(grounder, sample, sample.read_truth(), allow_none=allow_none)
            except BridgeError as error:  # the others are recorded all the same
                failure = error
                continue
            capacity = opened["language_model"].capacity
            write_case(folder / f"{place:03d}", calls, kind="recorded", note=sample.id, cache_capacity=capacity)
    if not folder.is_dir():
        raise BridgeError(f"none of the {len(samples)} samples could be recorded; the last failed with: {failure}")
