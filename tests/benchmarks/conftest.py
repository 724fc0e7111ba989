"""Make `speed` importable, as in the programs of benchmarks/."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

FAKE = """
import sys
sys.path.insert(0, {peers!r})
import os, time
from pathlib import Path
import numpy as np
from protocol import Loaded, PeerError, Work, serve

KIND, LOG = sys.argv[1], Path(sys.argv[2])


def load(model, precision, threads):
    with LOG.open("a") as log:
        log.write(f"load {{KIND}}\\n")
    if KIND == "rejects":
        raise PeerError("this model is\\nnot supported")
    print("a library prints this")

    def decode(inputs):
        def timed():
            with LOG.open("a") as log:
                log.write(f"run {{KIND}}\\n")
            if KIND == "dies":
                sys.stderr.write("Segmentation of some kind\\n")
                sys.stderr.flush()
                os._exit(3)
            if KIND == "raises":
                raise ValueError("no such operator")
            if KIND == "hangs":
                time.sleep(60)
            time.sleep(0.02 if KIND == "slow" else 0.005)
            logits = inputs["step_ids"][:, None] * np.ones((1, 4)) + np.arange(4)
            return {{"logits": logits + (1 if KIND == "slow" else 0)}}
        return Work(timed, tokens=len(inputs["step_ids"]))

    return Loaded({{"decode": decode}}, f"{{precision}}, faked", ("numpy",))


serve(load)
"""


@pytest.fixture
def fake_runner(tmp_path: Path) -> Path:
    """Write a runner program that takes its kind (good, slow, rejects, raises, dies, hangs) and a log file."""
    program = tmp_path / "run_fake.py"
    program.write_text(FAKE.format(peers=str(BENCHMARKS / "speed" / "peers")), encoding="utf-8")
    return program
