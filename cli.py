"""Run the command line from a checkout, installed or not: `python cli.py infer video.mp4 "the red car"`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from bridge_stg.cli import main
    except ModuleNotFoundError as error:  # on a bare machine, `doctor` must still say what is missing
        if error.name != "click":
            raise
        if sys.argv[1:2] != ["doctor"]:
            print(
                'Error: the package click is missing. Install what the command line needs: pip install ".[cpu]"',
                file=sys.stderr,
            )
            sys.exit(2)
        from bridge_stg.runtime.backends.doctor import main

    main()
