"""Trace a checkpoint to ONNX graphs, block by block in bounded memory."""
