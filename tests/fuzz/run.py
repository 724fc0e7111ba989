"""Read damaged inputs one by one and report what none of them may do. Run as a process of its own.

python -m tests.fuzz.run INTACT SEED FIRST END: prints a JSON line before each input, and one for each finding.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.memory import peak_bytes, reset_peak
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import kinds

MOST_S, MOST_BYTES = 30, 2 * 10**9
HEAVY = (
    "bridge_stg.checkpoint.checkpoint", "bridge_stg.calibration.overrides", "bridge_stg.export.engines.profiles",
    "bridge_stg.runtime.parity.verify", "bridge_stg.server.service", "tests.bridge_stg.server.conftest",
)  # fmt: skip
ADDRESSES = 3 * 2**30  # that the process may take besides its modules


def main(intact: str, seed: int, first: int, end: int) -> None:
    """Read the inputs with numbers from `first` to `end` of a seed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    root, chosen = Path(intact), kinds(Path(intact))
    for module in HEAVY:  # their import counts for no input
        importlib.import_module(module)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def say(**values: Any) -> None:
        print(json.dumps(values), file=output, flush=True)

    for number in range(first, end):
        name = list(chosen)[number % len(chosen)]
        say(number=number, kind=name)
        random = np.random.default_rng([seed, number])
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name.partition(":")[0]
            shutil.copytree(root / folder.name, folder)
            files = sorted(path for path in folder.glob(chosen[name].pattern) if path.is_file() and path.stat().st_size)
            changed = files[random.integers(len(files))]
            if number >= len(chosen):  # the first input of each kind stays intact, and must be read
                changed.write_bytes(mutate(changed.read_bytes(), random, changed.suffix))
            reset_peak()
            faulthandler.dump_traceback_later(MOST_S, exit=True)
            try:
                with contextlib.suppress(*[BridgeError] * (number >= len(chosen))):
                    chosen[name].read(folder, random)
            except BaseException:  # noqa: BLE001
                say(number=number, kind=name, file=changed.name, finding=traceback.format_exc()[-3000:])
            faulthandler.cancel_dump_traceback_later()
            if peak_bytes() > MOST_BYTES:
                say(number=number, kind=name, file=changed.name, finding=f"peak of {peak_bytes() / 1e9:.1f} GB")
    output.flush()
    os._exit(0)  # without waiting for a server's threads


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
