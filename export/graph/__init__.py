"""Graph-to-graph passes on exported ONNX graphs."""
