"""Build TensorRT engines: targets, profiles, memory, inspection."""
