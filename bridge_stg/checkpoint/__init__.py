"""Checkpoints on disk: safetensors, LoRA adapters, initialization from public weights."""
