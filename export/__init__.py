"""Export of checkpoints to bundles of ONNX graphs, and their TensorRT engines."""
