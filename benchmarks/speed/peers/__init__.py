"""Other runtimes on the same weights: one runner program each, in a virtual environment of its own.

A runner imports the peer, numpy, and the modules beside it by their bare names; never this project's packages.
"""
