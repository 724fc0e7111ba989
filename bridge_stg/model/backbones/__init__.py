"""The vision-language models that Bridge-STG can stand on: one file a family behind one small interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bridge_stg.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from bridge_stg.model.backbones.interface import Backbone

FAMILIES: tuple[str, ...] = ("qwen3_vl", "qwen2_5_vl")
"""Values of `model_type`, each the name of a module here; the module's `BACKBONE` is its adapter."""


def backbone(values: Mapping[str, Any]) -> Backbone:
    """Return the adapter of a backbone.

    Args:
        values: the backbone's own `config.json`.

    Raises:
        CheckpointError: the architecture is not supported.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        named = f" ({', '.join(map(str, values['architectures']))})" if values.get("architectures") else ""
        raise CheckpointError(
            "checkpoint.unsupported_backbone",
            f"the backbone's model_type is {family!r}{named}; supported: {', '.join(FAMILIES)}. "
            "docs/adapters.md shows how another architecture is added",
        )
    adapter: Backbone = importlib.import_module(f"{__name__}.{family}").BACKBONE
    return adapter
