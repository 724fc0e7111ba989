"""SDR pictures as other displays encode them: PQ and HLG with BT.2020 primaries, and clips of them.

The formulas are those of ITU-R BT.2100-2 (tables 4 and 5), BT.2087 (primaries) and BT.2408 (white at 203 cd/m²).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WHITE, PEAK = 203.0, 1000.0  # cd/m²
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
LUMA = np.array([0.2627, 0.6780, 0.0593])
TRANSFERS = {"pq": 16, "hlg": 18}  # ISO/IEC 23091-2
BT2020 = 9


def pq(light: np.ndarray) -> np.ndarray:
    """Return the PQ signal, 0..1, for light in cd/m²."""
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light: np.ndarray) -> np.ndarray:
    """Return the HLG signal, 0..1, for light in cd/m² on a display with a peak of 1000 cd/m² (gamma 1.2)."""
    luma = (light @ LUMA)[..., None] / PEAK
    scene = light / PEAK * np.maximum(luma, 1e-9) ** ((1 - 1.2) / 1.2)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def to_hdr(rgb: np.ndarray, transfer: str) -> av.VideoFrame:
    """Return a picture, uint8 [H, W, 3] in BT.709, as an HDR frame of 10 bits whose white is 203 cd/m²."""
    light = (rgb / 255.0) ** 2.4 @ TO_BT2020.T * WHITE
    signal = (pq if transfer == "pq" else hlg)(light)
    luma = signal @ LUMA
    blue, red = (signal[..., 2] - luma) / 1.8814, (signal[..., 0] - luma) / 1.4746
    planes = [64 + 876 * luma, 512 + 896 * blue, 512 + 896 * red]
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], "yuv444p10le")
    for plane, values in zip(frame.planes, planes):
        rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        rows[:, : plane.width] = values.round().clip(0, 1023)
        plane.update(rows.tobytes())
    frame.color_trc, frame.color_primaries, frame.colorspace = TRANSFERS[transfer], BT2020, BT2020
    return frame


def write_hdr(path: Path, pictures: Sequence[np.ndarray], transfer: str, *, rate: int) -> Path:
    """Write pictures as an HDR clip, as phones do: 10 bits, H.265."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx265", rate=rate, options={"crf": "8", "x265-params": "log-level=error"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p10le"
        codec = stream.codec_context
        codec.color_trc, codec.color_primaries, codec.colorspace = TRANSFERS[transfer], BT2020, BT2020
        for index, picture in enumerate(pictures):
            frame = to_hdr(picture, transfer).reformat(format="yuv420p10le", threads=1)
            frame.pts, frame.time_base = index, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path
