"""Reports carry their own hash, and are outside the bundle's fingerprint."""

from __future__ import annotations

import json

from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.reports import read_report, write_report
from tests.errors import raises


def test_a_report_is_read_back_and_replaced_whole(bundle_path):
    write_report(bundle_path, "parity", {"worst": 1.0})
    path = write_report(bundle_path, "parity", {"worst": 0.5, "shape": (1, 2)}, "<p>page</p>")
    assert read_report(bundle_path, "parity")["shape"] == [1, 2]
    assert sorted(file.name for file in path.parent.iterdir()) == ["parity.html", "parity.json"]
    Bundle.load(bundle_path, check="all")


def test_a_changed_report_is_an_error(bundle_path):
    path = write_report(bundle_path, "parity", {"worst": 0.5})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"worst": 0.1}))
    with raises("bundle.hash_mismatch", "parity.json"):
        read_report(bundle_path, "parity")
    path.write_text("{")
    with raises("bundle.unreadable", "parity.json"):
        read_report(bundle_path, "parity")
    with raises("bundle.unreadable", "speed.json"):
        read_report(bundle_path, "speed")


def test_names_and_folders_that_are_rejected(tmp_path):
    with raises("bundle.outside_path", "'../x'"):
        write_report(tmp_path, "../x", {})
    with raises("output.not_writable", "'x'"):
        write_report(tmp_path / "nothing", "x", {})
