"""Runner programs of other runtimes on the same weights, each in its own virtual environment.

A runner imports the peer, numpy, and the modules of this folder by their bare names; never this project's packages.
"""
