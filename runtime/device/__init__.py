"""Device memory: CUDA contexts, arrays, copies, resizing."""
