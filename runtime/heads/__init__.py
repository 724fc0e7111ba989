"""Heads: compute an answer from the hidden states and tokens of the LLM."""
