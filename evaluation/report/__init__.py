"""The report of an evaluation: JSON, HTML page and pictures of samples; templates that other reports share."""
