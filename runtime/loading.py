"""Load a bundle in a new process, in an order that keeps two cores busy."""

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
    heads: str | None = None,
    max_index_bytes: int | None = None,
    **options: Any,
) -> Grounder:
    """Load a bundle as `Grounder.load` with `wait=False`; arguments and errors are the same.

    Files are hashed and sessions are opened without Python's lock. So both begin before the modules are imported that
    read videos and answer queries.
    """
    from bridge_stg.runtime.bundle.bundle import Bundle
    from bridge_stg.runtime.bundle.spec import chosen_heads

    if max_index_bytes is not None and options.get("index") is None:
        raise BridgeError("index.missing", "a maximum size is given, but no folder of an index: pass one (--index)")
    bundle = Bundle.load(path)
    chosen_heads(bundle.manifest.spec, heads)  # a wrong name fails before the sessions are opened
    from bridge_stg.runtime.backends.choose import open_sessions

    sessions = open_sessions(bundle, backend=backend, variant=variant, threads=threads, wait=False)
    from bridge_stg.runtime.grounder import Grounder

    return Grounder.from_sessions(bundle, sessions, heads=heads, max_index_bytes=max_index_bytes, **options)
