"""Run a bundle over many samples, on one or many devices, with resumable results."""
