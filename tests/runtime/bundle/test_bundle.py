"""Loading a bundle: an undamaged one opens, and every kind of damage is one error with a code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import onnx
import pytest

import bridge_stg.runtime.bundle.bundle as bundle_module
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import SCHEMA_VERSION, canonical_sha256
from bridge_stg.runtime.errors import BundleError
from tests.errors import raises


def edit(path: Path, change: Callable[[dict], None], *, sign: bool = True) -> None:
    """Change the manifest, with a new matching fingerprint if `sign` is set."""
    file = path / "manifest.json"
    values = json.loads(file.read_text())
    change(values)
    if sign:
        values["fingerprint"] = canonical_sha256(values, without="fingerprint")
    file.write_text(json.dumps(values))


def fails(path: Path, code: str, *values: object, **options: str) -> None:
    """Check that a bundle does not load: one paragraph that names the bundle or a file in it, and the values."""
    with raises(code, path, *values, kind=BundleError) as caught:
        Bundle.load(path, **options)
    assert "\n" not in str(caught.value)


def test_an_undamaged_bundle_has_paths_for_its_parts(bundle_path):
    bundle = Bundle.load(bundle_path)
    assert bundle.tokenizer_path.read_text() == "{}"
    assert bundle.graph_path("language_model", "primitive") == bundle_path / "graphs/language_model/primitive.onnx"
    assert [folder.name for folder in bundle.golden_cases()] == ["first"]
    graph = bundle.graph("language_model", "standard")
    assert (graph.opset, graph.cache.update, graph.inputs[0].dims) == (24, "in_place", ("B", "L"))
    assert graph.ranges["L"] == (1, None)
    assert [entry.path for entry in graph.data] == ["graphs/language_model/weights.data"]
    assert Bundle.load(bundle_path, check="all").manifest == bundle.manifest
    assert bundle.manifest.calibration is None and bundle.manifest.verified is False


def test_errors_for_unknown_graphs_and_variants_name_the_known_ones(bundle_path):
    bundle = Bundle.load(bundle_path)
    with raises("bundle.no_graph", "'decoder'", "language_model"):
        bundle.graph("decoder", "standard")
    with raises("bundle.no_graph", "'int8'", "primitive, standard"):
        bundle.graph_path("language_model", "int8")
    edit(bundle_path, lambda m: m.update(files=[]))
    shutil.rmtree(bundle_path / "golden")
    with raises("bundle.missing_file", "tokenizer.json"):
        _ = Bundle.load(bundle_path).tokenizer_path


def test_a_folder_that_is_not_a_bundle(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (tmp_path / "nothing", file):
        fails(path, "bundle.not_found")
    fails(tmp_path, "bundle.not_found", "manifest.json")


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("{", "bundle.unreadable", "JSON"),
        ("[" * 100_000, "bundle.unreadable", "JSON"),
        ("[]", "bundle.schema", "list"),
        ("{}", "bundle.schema", "None"),
        ('{"schema_version": "1"}', "bundle.schema", "'1'"),
        ('{"schema_version": true}', "bundle.schema", "True"),
        (f'{{"schema_version": {SCHEMA_VERSION + 1}}}', "bundle.schema", "newer"),
        (f'{{"schema_version": {SCHEMA_VERSION - 2}}}', "bundle.schema", "older"),
        (f'{{"schema_version": {SCHEMA_VERSION}}}', "bundle.hash_mismatch", "fingerprint"),
    ],
)
def test_a_manifest_that_cannot_be_read(bundle_path, text, code, value):
    (bundle_path / "manifest.json").write_text(text)
    fails(bundle_path, code, "manifest.json", value)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (lambda m: m.pop("spec"), ["spec"]),
        (lambda m: m.update(extra=1), ["extra"]),
        (lambda m: m.update(graphs=[]), ["graphs", "[]", "an object"]),
        (lambda m: m.update(verified=1), ["verified", "1", "true or false"]),
        (lambda m: m["spec"]["vision"].update(patch_size="16"), ["spec.vision.patch_size", '"16"', "an integer"]),
        (lambda m: m["spec"].pop("language"), ["spec.language"]),
        (
            lambda m: m["graphs"]["language_model"]["standard"]["inputs"][0].update(dims=["B", None]),
            ["graphs.language_model.standard.inputs[0].dims[1]", "null", "an integer", "or a string"],
        ),
        (
            lambda m: m["graphs"]["language_model"]["standard"]["inputs"][0].update(dtype="bfloat16"),
            ["inputs[0]", "'input_ids'", "'bfloat16'"],
        ),
        (
            lambda m: m["graphs"]["language_model"]["standard"]["cache"].update(update="concat"),
            ["standard.cache", "'concat'", "in_place, append"],
        ),
        (
            lambda m: m["graphs"]["language_model"]["standard"].update(variant="primitive"),
            ["graphs.language_model.standard", "language_model (primitive)"],
        ),
        (
            lambda m: m["graphs"]["language_model"]["standard"]["data"][0].update(size=1),
            ["weights.data", "listed twice"],
        ),
    ],
)
def test_a_signed_manifest_with_wrong_fields(bundle_path, change, values):
    edit(bundle_path, change)
    fails(bundle_path, "bundle.bad_field", "manifest.json", *values)


LONG = "9" * 5000
WRONG = ("-1", "NaN", "-Infinity", "1e999", "1e30", '"2"', "true", "[]", f'"{"x" * 100_000}"', LONG)
"""JSON values that no number of the spec may have; 0, null and large integers are valid for some."""


def test_every_number_of_the_spec_has_a_range(bundle_path):
    """Read the manifest with each number replaced by each wrong value: an error names the field."""
    file, optional = bundle_path / "manifest.json", ("margin_s", "max_visual_tokens", "tokens_per_second")
    clean = json.loads(file.read_text())
    spec = clean["spec"]
    fields = [
        (part, name, value) for part in spec if isinstance(spec[part], dict) for name, value in spec[part].items()
    ]
    numbers = [(part, name) for part, name, v in fields if name in optional or type(v) in (int, float)]
    assert len(numbers) > 30
    for part, name in numbers:
        text = json.dumps({**clean, "spec": {**spec, part: {**spec[part], name: "@"}}})
        for value in WRONG:
            wrong = text.replace('"@"', value)
            with suppress(ValueError):  # what json refuses has no fingerprint
                fingerprint = canonical_sha256(json.loads(wrong), without="fingerprint")
                wrong = wrong.replace(clean["fingerprint"], fingerprint)
            file.write_text(wrong)
            with pytest.raises(BundleError) as caught:
                Bundle.load(bundle_path)
            assert caught.value.code in ("bundle.bad_field", "bundle.unreadable"), (part, name, value)
            assert name in str(caught.value) or value == LONG, caught.value


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("frames", "coarse_fps", 0),
        ("frames", "max_coarse_groups", 0),
        ("frames", "coarse_min_pixels", 2**27),
        ("vision", "patch_size", 0),
        ("vision", "merge_size", 2**63),
        ("vision", "head_dim", 6),
        ("vision", "image_mean", [0.5, 0.5]),
        ("language", "num_layers", 10**9),
        ("language", "tapped_layers", [99]),
        ("prompt", "query", "Find it."),
        ("prompt", "track", "Track {query}."),
        ("prompt", "time", "{time} {time}"),
        ("prompt", "absent", ""),
        ("span", "presence_threshold", 1.5),
    ],
)
def test_a_value_out_of_range_names_its_field(bundle_path, part, name, value):
    edit(bundle_path, lambda m: m["spec"][part].update({name: value}))
    fails(bundle_path, "bundle.bad_field", f"spec.{part}", name)


def test_an_edited_manifest_without_a_new_fingerprint(bundle_path):
    edit(bundle_path, lambda m: m["spec"]["span"].update(presence_threshold=0.9), sign=False)
    fails(bundle_path, "bundle.hash_mismatch", "manifest.json", "fingerprint")


@pytest.mark.parametrize("file", ["tokenizer.json", "graphs/language_model/weights.data", "golden/first/case.json"])
def test_a_listed_file_that_is_missing_cut_or_changed(bundle_path, file):
    target = bundle_path / file
    content = target.read_bytes()
    target.write_bytes(content[:-1])
    fails(bundle_path, "bundle.hash_mismatch", file, f"{len(content) - 1} bytes", len(content))
    target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fails(bundle_path, "bundle.hash_mismatch", file, "SHA-256")
    target.unlink()
    fails(bundle_path, "bundle.missing_file", file)
    target.mkdir()
    fails(bundle_path, "bundle.missing_file", file, "folder")


def test_large_files_are_hashed_by_verify_only_but_graphs_always(bundle_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "HASHED_BYTES_ON_LOAD", 10)
    weights = bundle_path / "graphs/language_model/weights.data"
    content = weights.read_bytes()
    weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    Bundle.load(bundle_path)
    fails(bundle_path, "bundle.hash_mismatch", "weights.data", check="all")
    weights.write_bytes(content)
    graph = bundle_path / "graphs/language_model/standard.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content.replace(b"TensorScatter", b"TensorScattex"))
    fails(bundle_path, "bundle.hash_mismatch", "standard.onnx")
    with pytest.raises(ValueError, match="check is 'some'"):
        Bundle.load(bundle_path, check="some")


def test_unlisted_files_in_graphs_and_golden_are_named(bundle_path):
    (bundle_path / "graphs/language_model/extra.onnx").write_bytes(b"")
    (bundle_path / "golden/new.npz").write_bytes(b"")
    (bundle_path / "golden/linked").symlink_to(bundle_path)
    names = "golden/linked, golden/new.npz, graphs/language_model/extra.onnx"
    fails(bundle_path, "bundle.unlisted_file", names)


def test_files_in_other_folders_may_change(bundle_path):
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
    edit(bundle_path, lambda m: m["files"][0].update(path=path))
    fails(bundle_path, "bundle.outside_path", "manifest.json", repr(path))
    edit(bundle_path, lambda m: (m["files"].pop(0), m["graphs"]["language_model"]["standard"].update(file=path)))
    fails(bundle_path, "bundle.outside_path", "manifest.json")


def test_a_graph_outside_its_own_folder(bundle_path):
    edit(bundle_path, lambda m: m["graphs"]["language_model"]["standard"].update(file="graphs/other/standard.onnx"))
    fails(bundle_path, "bundle.outside_path", "graphs/other/standard.onnx")


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_that_leads_out(bundle_path, tmp_path, link):
    part = bundle_path / ("tokenizer.json" if link == "file" else "golden")
    os.rename(part, tmp_path / "outside")
    part.symlink_to(tmp_path / "outside")
    fails(bundle_path, "bundle.outside_path", "outside")


def test_links_inside_and_to_the_bundle_work(bundle_path, tmp_path):
    os.rename(bundle_path / "tokenizer.json", bundle_path / "t.json")
    (bundle_path / "tokenizer.json").symlink_to("t.json")
    (tmp_path / "shortcut").symlink_to(bundle_path)
    Bundle.load(tmp_path / "shortcut")
    (bundle_path / "t.json").unlink()
    (bundle_path / "t.json").symlink_to("tokenizer.json")
    with raises("bundle.unreadable", "tokenizer.json"):
        Bundle.load(bundle_path)


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
    fails(bundle_path, "bundle.unlisted_file", "standard.onnx", "'../../../secret'", "listed: weights.data")
    file.write_bytes(b"\xff" * 20)
    edit(bundle_path, sign_the_file)
    fails(bundle_path, "bundle.not_onnx", "standard.onnx")
