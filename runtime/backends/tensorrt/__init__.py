"""The TensorRT backend: engines, their caches, CUDA graphs."""
