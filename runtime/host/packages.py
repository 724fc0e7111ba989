"""Installed packages: import an optional one at first use, and read versions."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType

from bridge_stg.runtime.errors import BridgeError

INFO = re.compile(r"([^-]+)-([^-]+?)(-py[\d.]+)?\.(dist|egg)-info$")
CHECKOUT = Path(__file__).resolve().parents[2]
"""The checkout of an installation with `pip install -e`; elsewhere a folder without pyproject.toml."""


def load_package(module: str, package: str) -> ModuleType:
    """Import a module at first use. Raises BridgeError: the package that holds it is missing or broken."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BridgeError(
            "host.missing_package",
            f"reading videos and images needs the package {package!r}, which cannot be imported ({error}); "
            f"install it with: {install_command('cpu')}",
        ) from error


def install_command(*extras: str, options: str = "") -> str:
    """Return the command that installs the packages of extras of pyproject.toml; without extras, the requirements.

    No package index has this project: a checkout is installed by its path, `.` in the current folder. An installed
    wheel is found by its name, since pip then needs the index only for the other packages.
    """
    bracket = f"[{','.join(extras)}]" if extras else ""
    if not (CHECKOUT / "pyproject.toml").is_file():
        return f'pip install {options}"bridge-stg{bracket}"'
    return f'pip install {options}-e "{"." if Path().samefile(CHECKOUT) else CHECKOUT}{bracket}"'


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    return _installed(tuple(sys.path)).get(re.sub("[-_.]+", "-", distribution).lower())


@lru_cache(maxsize=1)
def _installed(folders: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of all distributions, by the names of the folders that pip writes.

    `importlib.metadata` reads files instead, and takes 12 ms to import.
    """
    versions: dict[str, str] = {}
    for folder in folders:
        with suppress(OSError):  # no folder
            for name in os.listdir(folder or "."):
                if name.endswith((".dist-info", ".egg-info")) and (found := INFO.match(name)):
                    versions.setdefault(re.sub("[-_.]+", "-", found[1]).lower(), found[2])
    return versions


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, by name."""
    return {name: version for name in names if (version := installed_version(name)) is not None}


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "1.32.0rc1" → (1, 32)."""
    return tuple(map(int, takewhile(str.isdigit, version.split("."))))
