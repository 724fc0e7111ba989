"""The report of a training: its curves and the pictures of validations, as an HTML page."""
