"""Estimate memory and seconds of a model on a device, from counted operations and bytes; docs/devices.md."""
