"""Versions of installed packages."""

from __future__ import annotations

import importlib.metadata

from bridge_stg.runtime.host.packages import installed_version, installed_versions


def test_what_is_installed_here() -> None:
    assert installed_version("numpy") == importlib.metadata.version("numpy")
    assert installed_version("no-such-package") is None
    assert installed_versions(["numpy", "no-such-package"]) == {"numpy": importlib.metadata.version("numpy")}
