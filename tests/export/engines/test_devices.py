from __future__ import annotations

import pytest

from bridge_stg.export.engines.devices import bandwidth, find_device
from bridge_stg.export.engines.targets import PRECISIONS_BY_SM
from bridge_stg.runtime.device.table import DEVICES, Device
from tests.errors import raises

# Sparse int8 TOPS of module and DLA: https://developer.nvidia.com/embedded/jetson-modules
PUBLISHED = {
    "orin-nano-4g": (20, 0), "orin-nano-4g-super": (34, 0), "orin-nano-8g": (40, 0), "orin-nano-8g-super": (67, 0),
    "orin-nx-8g": (70, 20), "orin-nx-8g-super": (117, 40), "orin-nx-16g": (100, 40), "orin-nx-16g-super": (157, 80),
    "agx-orin-32g": (200, 92), "agx-orin-64g": (275, 105),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_orin_modules_have_the_published_peaks(name: str) -> None:
    module, dla = PUBLISHED[name]
    assert 2 * find_device(name).peaks["int8"] / 1e12 + dla == pytest.approx(module, rel=0.025)


def test_rows_are_consistent() -> None:
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        assert 0 < device.kept < device.memory and device.bandwidth > 1e10, device.name
        assert device.sm is not None
        known = next(words for since, words in PRECISIONS_BY_SM if device.sm >= since)
        peaks = {"nvfp4" if precision == "fp4" else precision for precision in device.peaks}
        assert set(known) - {"bf16", "int4"} == peaks, device.name
        assert device.peaks["fp32"] < device.peaks["fp16"] < device.peaks["int8"], device.name


def test_this_processor_is_measured() -> None:
    cpu = find_device("cpu")
    assert isinstance(cpu, Device) and cpu.kind == "cpu"
    assert 1e9 < cpu.bandwidth < 1e13 and 1e9 < cpu.peaks["fp32"] < cpu.peaks["int8"] < 1e15
    assert bandwidth(1, buffer_bytes=2**20, repeats=1) > 1e8


def test_unknown_devices_are_refused() -> None:
    with raises("options.invalid", "orin-mini"):
        find_device("orin-mini")
