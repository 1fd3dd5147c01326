"""Every measured number of the documentation but Nano's: one script each, results as JSON."""
