"""The backends that run graphs, onnxruntime on CPU and GPU and TensorRT, and the choice of one."""
