"""The machine: CPUs, memory, threads, files, packages, subprocesses, call limits."""
