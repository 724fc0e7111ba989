"""Record what a user of the command line sees, and compare two records: a restructuring must not change them.

    python benchmarks/behaviour record --root . --python .venv/bin/python --out now.json
    python benchmarks/behaviour compare before.json now.json

A record holds, for every command on the demo and for many misuses: the exit code, whether there was a traceback, the
names of the files that were written, hashes of binary files, and JSON with floats rounded and times and paths left
out. `compare` exits with 1 if any of these differ, or a step of the first record is not in the second. Texts for people
are listed as `wording` if they differ; they do not fail. Only the standard library is imported here, so that any
checkout can be recorded with its own Python.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compare import compare
from recorder import record


def main() -> int:
    """Read the arguments, and record or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run every command and write what was seen")
    recording.add_argument("--root", type=Path, required=True, help="the checkout")
    recording.add_argument("--python", type=Path, required=True, help="an interpreter that it is installed for")
    recording.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    recording.add_argument("--bundle", type=Path, help="what `make demo` exported; without it, it is exported here")
    recording.add_argument("--slow", action="store_true", help="more exports and a training too: some five minutes")
    comparing = commands.add_parser("compare", help="say how two records differ")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        return compare(options.first, options.second)
    record(options.root, options.python, options.out, options.bundle, options.slow)
    return 0


if __name__ == "__main__":
    sys.exit(main())
