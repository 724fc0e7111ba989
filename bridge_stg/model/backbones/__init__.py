"""The supported backbones: one file per family of vision-language models, all with the same small interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bridge_stg.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from bridge_stg.model.backbones.interface import Backbone

FAMILIES: tuple[str, ...] = ("qwen3_vl", "qwen2_5_vl")
"""Supported values of `model_type`. Each is a module of this package whose `BACKBONE` is the adapter."""


def backbone(values: Mapping[str, Any]) -> Backbone:
    """Return the adapter for the values of a backbone's `config.json`; raise CheckpointError if unsupported."""
    family = values.get("model_type")
    if family not in FAMILIES:
        named = f" ({', '.join(map(str, values['architectures']))})" if values.get("architectures") else ""
        message = f"the backbone's model_type is {family!r}{named}; supported: {', '.join(FAMILIES)}"
        raise CheckpointError("checkpoint.unsupported_backbone", f"{message}. docs/adapters.md explains how to add one")
    adapter: Backbone = importlib.import_module(f"{__name__}.{family}").BACKBONE
    return adapter
