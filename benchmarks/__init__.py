"""Every figure in the README: one script each, results as JSON."""
