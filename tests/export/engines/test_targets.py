"""The table of targets, and what each supports."""

from __future__ import annotations

import pytest

from bridge_stg.export.engines.targets import (
    TARGETS,
    check_installed,
    check_precision,
    find_target,
    target_table,
    this_target,
)
from bridge_stg.runtime.errors import EngineError
from tests.errors import raises


def test_the_table_names_each_target_once() -> None:
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names)
    assert {"rtx-ampere", "rtx-ada", "rtx-blackwell", "orin-jp6", "orin-jp7", "thor", "h100"} <= set(names)
    table = target_table()
    assert all(table.count(f"\n{name} ") == 1 for name in (*names, "this"))


def test_the_variant_follows_from_the_version() -> None:
    assert find_target("orin-jp6").variant == "primitive" and find_target("orin-jp7").variant == "standard"
    for target in TARGETS:
        if target.family == "tensorrt":
            assert (target.variant == "primitive") == (target.before <= (10, 15))
    for version, variant in (
        ("10.3.0", "primitive"),
        ("10.14.1", "primitive"),
        ("10.15.1", "standard"),
        ("11.4", "standard"),
    ):
        assert this_target(family="tensorrt", version=version, sm=87, memory=None).variant == variant
    assert this_target(family="tensorrt_rtx", version="1.7.1", sm=89, memory=None).variant == "standard"


@pytest.mark.parametrize(
    ("name", "lacks"), [("orin-jp6", "fp8"), ("rtx-ampere", "fp8"), ("a100", "fp8"), ("rtx-ada", "nvfp4")]
)
def test_a_missing_precision(name: str, lacks: str) -> None:
    target = find_target(name)
    with raises("engine.unsupported_precision", name, lacks, ", ".join(target.precisions), kind=EngineError):
        check_precision(target, lacks)
    for precision in target.precisions:
        check_precision(target, f"{precision} and more words")


@pytest.mark.parametrize(("sm", "has"), [(75, False), (87, False), (89, True), (90, True), (120, True)])
def test_precisions_of_this_machine_follow_from_its_gpu(sm: int, has: bool) -> None:
    target = this_target(family="tensorrt", version="10.15.1", sm=sm, memory=8 * 10**9)
    assert ("fp8" in target.precisions) == has
    assert ("nvfp4" in target.precisions) == (sm >= 100)
    assert target.sms == (sm,) and target.memory == int(7.2e9)


def test_an_unknown_target_is_rejected_with_the_known_ones() -> None:
    with raises("options.invalid", "'xavier'", "this", "orin-jp6", kind=EngineError):
        find_target("xavier")


def test_the_installed_version_must_fit() -> None:
    with raises("engine.wrong_version", "orin-jp6", "10.0 to below 10.15", "10.15.1", kind=EngineError):
        check_installed(find_target("orin-jp6"), version="10.15.1", sm=87)
    with raises("engine.wrong_version", "below 2", "1.1.0", kind=EngineError):
        check_installed(find_target("rtx-ada"), version="1.1.0", sm=None)


def test_tensorrt_compiles_on_the_device_alone() -> None:
    assert check_installed(find_target("thor"), version="10.15.1", sm=110).sms == (110,)
    assert check_installed(find_target("rtx-ada"), version="1.7.1.116", sm=None).sms == (89,)
    for sm, here in ((None, "no GPU"), (86, "SM 86")):
        with raises("engine.no_device", "h100", "SM 90", here, "rtx-ampere", kind=EngineError):
            check_installed(find_target("h100"), version="11.0.1", sm=sm)


def test_tensorrt_rtx_does_not_run_on_turing() -> None:
    with raises("engine.unsupported_device", "SM 75", kind=EngineError):
        this_target(family="tensorrt_rtx", version="1.7.1", sm=75, memory=None)
    assert "fp32" in this_target(family="tensorrt", version="10.15.1", sm=75, memory=None).precisions
