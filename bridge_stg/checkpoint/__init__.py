"""Checkpoints on disk: safetensors files, LoRA adapters, and initialization from public weights."""
