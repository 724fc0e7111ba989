"""The chain of graphs: vision pass, decode loop, spatial pass, and the host code between them."""
