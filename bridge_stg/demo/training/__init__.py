"""The demo's training: its recipe, and the batches and losses of the stages for bridge heads."""
