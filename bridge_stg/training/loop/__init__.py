"""The loop that trains a stage: steps, saved states, and processes."""
