"""Heads: what turns the hidden states and tokens of the LLM into an answer."""
