"""Versions of installed packages, read from the names of folders, agree with what the metadata say."""

from __future__ import annotations

import importlib.metadata
import sys
import zipfile
from pathlib import Path

import pytest

from bridge_stg.runtime.host.packages import installed_version, installed_versions


def test_what_is_installed_here() -> None:
    names = {entry.metadata["Name"] for entry in importlib.metadata.distributions()}
    assert {"numpy", "onnxruntime"} <= {name.lower() for name in names}
    for name in names:
        assert installed_version(name) == importlib.metadata.version(name), name
    assert installed_version("no-such-package") is None
    assert installed_versions(["numpy", "no-such-package"]) == {"numpy": importlib.metadata.version("numpy")}


def test_names_are_normalised_and_the_first_folder_of_the_path_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, made in (("a", "My_Pack.age-1.2+cu12.dist-info"), ("b", "my_pack_age-3.0.dist-info")):
        (tmp_path / folder / made).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "missing"), str(tmp_path / "a"), str(tmp_path / "b")])
    assert installed_version("my-pack.age") == "1.2+cu12"
    assert installed_version("my-pack") is None


def test_older_forms_and_archives_are_asked_by_their_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.egg-info").mkdir()
    (tmp_path / "old.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: old\nVersion: 0.7\n")
    archive = tmp_path / "zipped.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("packed-2.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: packed\nVersion: 2.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(archive)])
    importlib.invalidate_caches()
    assert (installed_version("old"), installed_version("packed"), installed_version("other")) == ("0.7", "2.0", None)
