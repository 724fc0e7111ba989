"""Installed packages: import an optional one at first use, and read versions.

Both import machinery lazily: `importlib.metadata` takes 35 ms, which `--help` and calls without a backend do not need.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from types import ModuleType

from bridge_stg.runtime.errors import BridgeError

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
