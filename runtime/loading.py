"""Load a bundle, in an order that keeps several cores busy in a new process.

Files are hashed and sessions are opened without Python's lock, so both begin before the modules that read videos and
answer queries are imported.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.failures import reporting_host_errors

if TYPE_CHECKING:
    from bridge_stg.runtime.grounder import Grounder


@reporting_host_errors()
def load_grounder(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    variant: str | None = None,
    threads: int | None = None,
    wait: bool = True,
    heads: str | None = None,
    index: str | os.PathLike[str] | None = None,
    max_index_bytes: int | None = None,
    **options: Any,
) -> Grounder:
    """Load a bundle; arguments and errors as for `Grounder.load`."""
    from bridge_stg.runtime.bundle.bundle import Bundle
    from bridge_stg.runtime.bundle.spec import chosen_heads

    if max_index_bytes is not None and index is None:
        raise BridgeError("index.missing", "a maximum size is given, but no folder of an index: pass one (--index)")
    bundle = Bundle.load(path)
    spec = bundle.manifest.spec
    chosen_heads(spec, heads)  # a wrong name fails before the sessions are opened
    from bridge_stg.runtime.backends.choose import open_sessions

    sessions = open_sessions(bundle, backend=backend, variant=variant, threads=threads, wait=wait)
    try:
        from bridge_stg.runtime.chain.tokenizer import load_tokenizer
        from bridge_stg.runtime.grounder import Grounder

        tokenizer, kept = load_tokenizer(bundle.tokenizer_path, spec), None
        if index is not None:
            from bridge_stg.runtime.index.index import VisualIndex, encoder_of

            kept = VisualIndex(index, encoder_of(bundle, sessions.target), max_bytes=max_index_bytes)
        return Grounder(
            sessions,
            spec,
            tokenizer,
            heads=heads,
            index=kept,
            verified=bundle.manifest.verified,
            target=sessions.target,
            bundle={"name": bundle.path.resolve().name, "fingerprint": bundle.manifest.fingerprint},
            **options,
        )
    except BaseException:
        sessions.close()
        raise
