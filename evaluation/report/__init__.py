"""The evaluation report: page and pictures."""
