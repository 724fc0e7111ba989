"""The bundle on disk: manifest, graph contracts, model spec, hashes, reports."""
