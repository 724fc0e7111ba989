"""A bundle is written completely or not at all, and replaces only other bundles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import Manifest
from bridge_stg.runtime.bundle.reports import write_report
from bridge_stg.runtime.bundle.writer import BundleWriter
from tests.errors import raises


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, spec, text: str = "{}", **options: bool) -> Path:
    with BundleWriter(target, **options) as writer:
        writer.add_file("tokenizer.json", text.encode())
        return writer.finish(Manifest(spec=spec))


def test_variants_share_equal_weights_and_the_manifest_lists_all(bundle_path):
    assert names(bundle_path / "graphs/language_model") == ["primitive.onnx", "standard.onnx", "weights.data"]
    manifest = Bundle.load(bundle_path).manifest
    assert sorted(entry.path for entry in manifest.files) == [
        "golden/first/case.json", "golden/first/language_model_0.npz", "tokenizer.json",
    ]  # fmt: skip
    standard, primitive = manifest.all_graphs()[::-1]
    assert standard.data == primitive.data and standard.sha256 != primitive.sha256
    assert names(bundle_path.parent) == ["bundle"]


def test_weights_of_the_same_name_with_other_content_are_an_error(tmp_path, language_models, model_spec):
    other = tmp_path / "other"
    other.mkdir()
    graph = language_models["primitive"]
    (other / "model.onnx").write_bytes(graph.path.read_bytes())
    (other / "weights.data").write_bytes(bytes(graph.path.with_name("weights.data").stat().st_size))
    with raises("bundle.data_conflict", "weights.data"):
        with BundleWriter(tmp_path / "bundle") as writer:
            writer.add_graph(language_models["standard"].spec, language_models["standard"].path)
            writer.add_graph(graph.spec, other / "model.onnx")
    assert names(tmp_path) == ["other"]


def test_files_may_be_written_in_place(tmp_path, language_models, model_spec):
    graph = language_models["standard"]
    with BundleWriter(tmp_path / "bundle") as writer:
        with raises("bundle.missing_file", "standard.onnx", "language_model (standard)"):
            writer.add_graph(graph.spec)
        folder = writer.folder / "graphs/language_model"
        folder.mkdir(parents=True)
        (folder / "standard.onnx").write_bytes(graph.path.read_bytes())
        (folder / "weights.data").write_bytes(graph.path.with_name("weights.data").read_bytes())
        writer.add_graph(graph.spec)
        write_report(writer.folder, "parity", {"passed": True})
        writer.finish(Manifest(spec=model_spec, verified=True))
    manifest = Bundle.load(tmp_path / "bundle", check="all").manifest
    assert manifest.verified and manifest.files == () and manifest.spec == model_spec
    assert names(tmp_path / "bundle/reports") == ["parity.json"]


def test_files_of_no_graph_in_graphs_are_an_error(tmp_path, model_spec):
    with raises("bundle.unlisted_file", "graphs/x/old.data"):
        with BundleWriter(tmp_path / "bundle") as writer:
            writer.add_file("graphs/x/old.data", b"")
            writer.finish(Manifest(spec=model_spec))
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        with BundleWriter(tmp_path / "bundle") as writer:
            writer.add_file("tokenizer.json", b"{}")
            assert names(tmp_path) == [writer.folder.parents[1].name]
            raise error
    assert names(tmp_path) == []


def test_a_block_without_finish_leaves_nothing(tmp_path):
    with BundleWriter(tmp_path / "deep" / "bundle") as writer:
        writer.add_file("tokenizer.json", b"{}")
        with raises("bundle.outside_path", "'../x'"):
            writer.add_file("../x", b"")
    assert names(tmp_path / "deep") == []


def test_permissions_of_the_bundle_follow_the_umask(tmp_path, model_spec):
    before = os.umask(0o022)
    try:
        assert write(tmp_path / "bundle", model_spec).stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


def test_an_older_bundle_is_replaced_only_on_request(tmp_path, model_spec):
    target = write(tmp_path / "bundle", model_spec, "old")
    with raises("output.exists", target):
        write(target, model_spec, "new")
    assert (target / "tokenizer.json").read_text() == "old"
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link", model_spec, "new", overwrite=True)
    assert (target / "tokenizer.json").read_text() == "new"
    assert names(tmp_path) == ["bundle", "link"]
    Bundle.load(target, check="all")


def test_a_failed_rename_restores_the_old_bundle(tmp_path, model_spec, monkeypatch):
    target = write(tmp_path / "bundle", model_spec, "old")
    rename = os.rename

    def fail_on_the_new_one(source, destination):
        if Path(source).parent.name == "new":
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_on_the_new_one)
    with pytest.raises(KeyboardInterrupt):
        write(target, model_spec, "new", overwrite=True)
    assert names(tmp_path) == ["bundle"] and (target / "tokenizer.json").read_text() == "old"


def test_an_empty_folder_is_replaced(tmp_path, model_spec):
    (tmp_path / "bundle").mkdir()
    Bundle.load(write(tmp_path / "bundle", model_spec), check="all")
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("manifest", [None, "{", '{"name": "extension"}'])
def test_other_folders_and_files_are_never_replaced(tmp_path, model_spec, overwrite, manifest):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "me.jpg").write_bytes(b"x")
    if manifest:
        (folder / "manifest.json").write_text(manifest)
    for target in (folder, folder / "me.jpg"):
        with raises("output.exists", target, "not a bundle"):
            write(target, model_spec, overwrite=overwrite)
    assert (folder / "me.jpg").read_bytes() == b"x" and names(tmp_path) == ["photos"]


def test_a_folder_that_cannot_be_made(tmp_path, model_spec):
    (tmp_path / "file").write_text("")
    with raises("output.not_writable"):
        write(tmp_path / "file" / "bundle", model_spec)
