"""Packages that only the reading of videos needs, imported at first use: `import bridge_stg.runtime` stays fast."""

from __future__ import annotations

import importlib
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
