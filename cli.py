"""Run the command line from a checkout, installed or not: `python cli.py infer video.mp4 "the red car"`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from bridge_stg.cli import main
    except ModuleNotFoundError as error:  # without click, `doctor` must still list what is missing
        if error.name != "click":
            raise
        if sys.argv[1:2] != ["doctor"]:
            from bridge_stg.runtime.host.packages import install_command

            message = f"The package click is missing: {install_command('cpu')}"
            print(f"Error: {message} [host.missing_package]", file=sys.stderr)
            sys.exit(2)
        from bridge_stg.runtime.backends.doctor import main

    main()
