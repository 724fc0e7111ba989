"""The model in torch: vision encoder, LLM, bridging, spatial decoder."""
