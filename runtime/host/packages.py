"""Installed packages: those that only the reading of videos needs, imported at first use, and versions for records."""

from __future__ import annotations

import importlib
import os
import re
import sys
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


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None if there is none.

    The names of the folders that installers leave tell it, in a tenth of the time that `importlib.metadata` takes to be
    imported; that is asked where a name has no version in it, or where packages are imported from an archive.
    """
    wanted = _normalised(distribution)
    doubtful = False
    for entry in sys.path:
        try:
            names = os.listdir(entry or ".")
        except OSError:  # not there, or an archive
            doubtful = doubtful or os.path.isfile(entry)
            continue
        for name in names:
            stem, kind = os.path.splitext(name)
            if kind not in (".dist-info", ".egg-info", ".egg"):
                continue
            found, _, version = stem.partition("-")
            if kind == ".dist-info" and version and _normalised(found) == wanted:
                return version
            doubtful = doubtful or (kind != ".dist-info" and _normalised(found) == wanted)
    return _version_by_metadata(distribution) if doubtful else None


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version_by_metadata(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, by name."""
    found = {name: installed_version(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}
