"""Commands that are imported when they are asked for, so that one command does not pay for the imports of others."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyCommands(dict[str, click.Command]):
    """What a click group keeps its commands in; those named here are imported on first use.

    Args:
        homes: the module that a command lies in, and its name there: {"build": "bridge_stg.commands.build:build"}.
    """

    def __init__(self, homes: Mapping[str, str]) -> None:
        self._homes = dict(homes)
        super().__init__(dict.fromkeys(homes))  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> click.Command:
        if super().__getitem__(name) is None:
            module, _, attribute = self._homes[name].partition(":")
            self[name] = getattr(importlib.import_module(module), attribute)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a command, or the default if there is none of that name."""
        try:
            return self[name]
        except KeyError:
            return default

    def values(self) -> Any:
        """Return all commands, imported."""
        return {name: self[name] for name in self}.values()

    def items(self) -> Any:
        """Return all names and commands, imported."""
        return {name: self[name] for name in self}.items()
