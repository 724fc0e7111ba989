"""Reports carry their own hash, and are outside the bundle's fingerprint."""

from __future__ import annotations

import json

import pytest

from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.reports import read_report, write_report
from bridge_stg.runtime.errors import BundleError


def test_a_report_is_read_back_and_replaced_whole(bundle_path):
    write_report(bundle_path, "parity", {"worst": 1.0})
    path = write_report(bundle_path, "parity", {"worst": 0.5, "shape": (1, 2)}, "<p>page</p>")
    assert read_report(bundle_path, "parity")["shape"] == [1, 2]
    assert sorted(file.name for file in path.parent.iterdir()) == ["parity.html", "parity.json"]
    Bundle.load(bundle_path, check="all")


def test_a_changed_report_is_refused(bundle_path):
    path = write_report(bundle_path, "parity", {"worst": 0.5})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"worst": 0.1}))
    with pytest.raises(BundleError, match=r"parity.json: this report was changed"):
        read_report(bundle_path, "parity")
    path.write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        read_report(bundle_path, "parity")
    with pytest.raises(BundleError, match="speed.json: this report cannot be read"):
        read_report(bundle_path, "speed")


def test_names_and_places_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a report's name"):
        write_report(tmp_path, "../x", {})
    with pytest.raises(BundleError, match="the report 'x' cannot be written"):
        write_report(tmp_path / "nothing", "x", {})
