"""Reports carry their own hash, and are outside the bundle's fingerprint."""

from __future__ import annotations

import json

import pytest

from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.reports import check_reports, read_report, write_report
from bridge_stg.runtime.errors import BundleError
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


def test_every_flipped_bit_in_reports_is_noticed(bundle_path):
    path = write_report(bundle_path, "parity", {"worst": 1e-05, "mean": 0.30000000000000004}, "<p>é</p>")
    write_report(bundle_path, "export", {"seconds": 1})
    assert check_reports(bundle_path) == 3
    for file in (path, path.with_suffix(".html")):
        intact = file.read_bytes()
        for place in range(8 * len(intact)):
            damaged = bytearray(intact)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(BundleError, match=file.stem) as caught:
                check_reports(bundle_path)
            assert caught.value.code in ("bundle.hash_mismatch", "bundle.unreadable")
        file.write_bytes(intact)
    path.unlink()
    with raises("bundle.unreadable", "parity.json"):  # the page's hash is gone
        check_reports(bundle_path)
