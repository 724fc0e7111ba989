"""Train on annotated clips by a recipe: data, loss, loop and report."""
