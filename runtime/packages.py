"""Installed packages: those that only the reading of videos needs, imported at first use, and versions for records."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from types import ModuleType

from bridge_stg.runtime.errors import BridgeError


def load_package(module: str, package: str) -> ModuleType:
    """Import a module at first use.

    Raises:
        BridgeError: the package that holds it is missing or broken.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BridgeError(
            f"reading videos and images needs the package {package!r}, which cannot be imported ({error}); "
            'install it with: pip install "bridge-stg[cpu]"'
        ) from error


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, by name."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
