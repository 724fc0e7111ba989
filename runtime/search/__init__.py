"""Search a long video: ground queries in overlapping windows, merge the spans, rank the occurrences."""
