"""Installed packages: import an optional one at first use, and read versions.

Both import machinery lazily: `importlib.metadata` takes 35 ms, which `--help` and calls without a backend do not need.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from itertools import takewhile
from types import ModuleType

from bridge_stg.runtime.errors import BridgeError


def load_package(module: str, package: str) -> ModuleType:
    """Import a module at first use. Raises BridgeError: the package that holds it is missing or broken."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BridgeError(
            "host.missing_package",
            f"reading videos and images needs the package {package!r}, which cannot be imported ({error}); "
            'install it with: pip install "bridge-stg[cpu]"',
        ) from error


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, by name."""
    return {name: version for name in names if (version := installed_version(name)) is not None}


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "1.32.0rc1" → (1, 32)."""
    return tuple(map(int, takewhile(str.isdigit, version.split("."))))
