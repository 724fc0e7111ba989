"""From measured times to tables, ratios and plots."""
