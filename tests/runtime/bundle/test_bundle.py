"""Loading a bundle: a whole one opens, and every way of being damaged is told in one paragraph."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import bridge_stg.runtime.bundle.bundle as bundle_module
from bridge_stg.runtime.bundle.bundle import Bundle, check_relative, verify
from bridge_stg.runtime.bundle.manifest import SCHEMA_VERSION, canonical_sha256
from bridge_stg.runtime.errors import BundleError


def edit(path: Path, change: Callable[[dict], None], *, sign: bool = True) -> None:
    """Change the manifest, with a fingerprint that fits again unless `sign` is off."""
    file = path / "manifest.json"
    values = json.loads(file.read_text())
    change(values)
    if sign:
        values["fingerprint"] = canonical_sha256(values, without="fingerprint")
    file.write_text(json.dumps(values))


def refusal(path: Path, **options: str) -> str:
    """The message with which a bundle is refused: one paragraph that names the bundle or a file in it."""
    with pytest.raises(BundleError) as caught:
        Bundle.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_a_whole_bundle_says_where_its_parts_are(bundle_path):
    bundle = Bundle.load(bundle_path)
    assert bundle.tokenizer_path.read_text() == "{}"
    assert bundle.graph_path("language_model", "primitive") == bundle_path / "graphs/language_model/primitive.onnx"
    assert [folder.name for folder in bundle.golden_cases()] == ["first"]
    graph = bundle.graph("language_model", "standard")
    assert (graph.opset, graph.cache.update, graph.inputs[0].dims) == (24, "in_place", ("B", "L"))
    assert graph.ranges["L"] == (1, None)
    assert [entry.path for entry in graph.data] == ["graphs/language_model/weights.data"]
    assert verify(bundle_path).manifest == bundle.manifest
    assert bundle.manifest.calibration is None and bundle.manifest.verified is False


def test_unknown_graphs_variants_and_files_are_told_with_the_known_ones(bundle_path):
    bundle = Bundle.load(bundle_path)
    with pytest.raises(BundleError, match=r"no graph 'decoder' in this bundle; it has: language_model"):
        bundle.graph("decoder", "standard")
    with pytest.raises(BundleError, match=r"no variant 'int8'; it has: primitive, standard"):
        bundle.graph_path("language_model", "int8")
    edit(bundle_path, lambda m: m.update(files=[]))
    shutil.rmtree(bundle_path / "golden")
    with pytest.raises(BundleError, match="lists no tokenizer.json"):
        _ = Bundle.load(bundle_path).tokenizer_path


def test_a_folder_that_is_no_bundle(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "does not exist, expected the folder of a bundle" in refusal(tmp_path / "nothing")
    assert "is a file, expected the folder" in refusal(file)
    assert "no manifest.json in this folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "schema_version is None, expected an integer"),
        ('{"schema_version": "1"}', "schema_version is '1', expected an integer"),
        ('{"schema_version": true}', "schema_version is True, expected an integer"),
        (f'{{"schema_version": {SCHEMA_VERSION + 1}}}', "is newer than version .* Upgrade bridge-stg"),
        (f'{{"schema_version": {SCHEMA_VERSION - 1}}}', "is older than version .* Export the checkpoint again"),
        (f'{{"schema_version": {SCHEMA_VERSION}}}', "the fingerprint does not fit the manifest"),
    ],
)
def test_a_manifest_that_cannot_be_read(bundle_path, text, message):
    (bundle_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle_path)
    assert "manifest.json" in refusal(bundle_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("spec"), "field spec is missing"),
        (lambda m: m.update(extra=1), "unknown field extra"),
        (lambda m: m.update(graphs=[]), r"graphs is \[\], expected an object"),
        (lambda m: m.update(verified=1), "verified is 1, expected true or false"),
        (lambda m: m["spec"]["vision"].update(patch_size="16"), 'spec.vision.patch_size is "16", expected an integer'),
        (lambda m: m["spec"].pop("language"), "field spec.language is missing"),
        (
            lambda m: m["graphs"]["language_model"]["standard"]["inputs"][0].update(dims=["B", None]),
            r"graphs.language_model.standard.inputs\[0\].dims\[1\] is null, expected an integer or a string",
        ),
        (
            lambda m: m["graphs"]["language_model"]["standard"]["inputs"][0].update(dtype="bfloat16"),
            r"inputs\[0\]: tensor 'input_ids' has dtype 'bfloat16'; known",
        ),
        (
            lambda m: m["graphs"]["language_model"]["standard"]["cache"].update(update="concat"),
            "standard.cache: the cache's update is 'concat'; known: in_place, append",
        ),
        (
            lambda m: m["graphs"]["language_model"]["standard"].update(variant="primitive"),
            r"graphs.language_model.standard calls itself language_model \(primitive\)",
        ),
        (
            lambda m: m["graphs"]["language_model"]["standard"]["data"][0].update(size=1),
            "weights.data is listed twice, with different sizes",
        ),
    ],
)
def test_a_signed_manifest_of_wrong_types(bundle_path, change, message):
    edit(bundle_path, change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle_path)
    assert "manifest.json" in refusal(bundle_path)


def test_an_edited_manifest_without_a_new_fingerprint(bundle_path):
    edit(bundle_path, lambda m: m["spec"]["span"].update(presence_threshold=0.9), sign=False)
    assert "manifest.json: the fingerprint does not fit the manifest" in refusal(bundle_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "graphs/language_model/weights.data", "golden/first/case.json"])
def test_a_listed_file_that_is_missing_cut_or_changed(bundle_path, file):
    target = bundle_path / file
    content = target.read_bytes()
    target.write_bytes(content[:-1])
    assert f"{file}: {len(content) - 1} bytes, but the manifest says {len(content)}" in refusal(bundle_path)
    target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{file}: its content was changed or damaged" in refusal(bundle_path)
    target.unlink()
    assert f"{file}: is listed in the manifest, but missing" in refusal(bundle_path)
    target.mkdir()
    assert f"{file}: expected a file, found a folder" in refusal(bundle_path)


def test_large_files_are_hashed_by_verify_only_but_graphs_always(bundle_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "HASHED_BYTES_ON_LOAD", 10)
    weights = bundle_path / "graphs/language_model/weights.data"
    content = weights.read_bytes()
    weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    Bundle.load(bundle_path)
    assert "weights.data: its content was changed" in refusal(bundle_path, check="all")
    weights.write_bytes(content)
    graph = bundle_path / "graphs/language_model/standard.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content.replace(b"TensorScatter", b"TensorScattex"))
    assert "standard.onnx: its content was changed" in refusal(bundle_path)
    with pytest.raises(ValueError, match="check is 'some'"):
        Bundle.load(bundle_path, check="some")


def test_unlisted_files_in_graphs_and_golden_are_named(bundle_path):
    (bundle_path / "graphs/language_model/extra.onnx").write_bytes(b"")
    (bundle_path / "golden/new.npz").write_bytes(b"")
    (bundle_path / "golden/linked").symlink_to(bundle_path)
    message = refusal(bundle_path)
    assert "does not list: golden/linked, golden/new.npz, graphs/language_model/extra.onnx. Delete them" in message


def test_other_files_beside_may_come_and_go(bundle_path):
    (bundle_path / "engines").mkdir()
    (bundle_path / "engines/sm_89.engine").write_bytes(b"")
    (bundle_path / "notes.txt").write_text("mine")
    Bundle.load(bundle_path, check="all")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "golden/../../x",
        "./x",
        "a//b",
        "C:/x",
        "c:x",
        "\\\\server\\x",
        "a\\..\\b",
        "a\0",
    ],
)
def test_a_path_that_leaves_the_bundle(bundle_path, path):
    with pytest.raises(ValueError, match="leaves the bundle"):
        check_relative(path)
    edit(bundle_path, lambda m: m["files"][0].update(path=path))
    assert "manifest.json: the path" in refusal(bundle_path)
    edit(bundle_path, lambda m: (m["files"].pop(0), m["graphs"]["language_model"]["standard"].update(file=path)))
    assert "manifest.json: " in refusal(bundle_path)


def test_a_graph_outside_its_own_folder(bundle_path):
    edit(bundle_path, lambda m: m["graphs"]["language_model"]["standard"].update(file="graphs/other/standard.onnx"))
    assert "does not lie in graphs/language_model/" in refusal(bundle_path)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_that_leads_out(bundle_path, tmp_path, link):
    part = bundle_path / ("tokenizer.json" if link == "file" else "golden")
    os.rename(part, tmp_path / "outside")
    part.symlink_to(tmp_path / "outside")
    assert "a link that leads out of the bundle" in refusal(bundle_path)


def test_links_inside_and_to_the_bundle_are_fine(bundle_path, tmp_path):
    os.rename(bundle_path / "tokenizer.json", bundle_path / "t.json")
    (bundle_path / "tokenizer.json").symlink_to("t.json")
    (tmp_path / "shortcut").symlink_to(bundle_path)
    Bundle.load(tmp_path / "shortcut")
    (bundle_path / "t.json").unlink()
    (bundle_path / "t.json").symlink_to("tokenizer.json")
    assert "tokenizer.json" in refusal(bundle_path)


def test_weights_that_the_manifest_does_not_list(bundle_path):
    file = bundle_path / "graphs/language_model/standard.onnx"
    model = onnx.load(file, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../../../secret"
    file.write_bytes(model.SerializeToString())

    def sign_the_file(values: dict) -> None:
        values["graphs"]["language_model"]["standard"].update(
            size=file.stat().st_size, sha256=bundle_module.file_sha256(file)
        )

    edit(bundle_path, sign_the_file)
    message = refusal(bundle_path)
    assert "standard.onnx: takes weights from '../../../secret', which the manifest does not list" in message
    assert "listed: weights.data" in message
    file.write_bytes(b"\xff" * 20)
    edit(bundle_path, sign_the_file)
    assert "standard.onnx: is not an ONNX graph" in refusal(bundle_path)
