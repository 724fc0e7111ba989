"""Search for a recipe: sensitivity, blocks kept in float, trials."""
