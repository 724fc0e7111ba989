"""A bundle as a model to be evaluated."""

from __future__ import annotations

from pathlib import Path

from bridge_stg.evaluation.run.evaluate import Model
from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.grounder import Grounder


def bundle_model(
    path: Path, label: str, *, backend: str = "auto", variant: str | None = None, threads: int | None = None
) -> Model:
    """Return a bundle as a model: it is the same while its fingerprint, engine and variants are.

    Raises:
        BundleError: the folder is no bundle, or is damaged.
        EngineError: nothing here can run it.
    """
    bundle = Bundle.load(path)
    target = choose(bundle, backend=backend, variant=variant)
    identity = {
        "kind": "bundle",
        "fingerprint": bundle.manifest.fingerprint,
        "engine": f"{target.backend} {target.version}",
        "variants": dict(target.variants),
    }
    return Model(label, identity, lambda: Grounder.load(path, backend=backend, variant=variant, threads=threads))
