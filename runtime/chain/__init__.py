"""The chain of graphs: vision pass, decode loop, spatial pass, and what stands between them."""
