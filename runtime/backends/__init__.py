"""What runs graphs: onnxruntime on CPU and GPU, TensorRT, and how one is chosen."""
