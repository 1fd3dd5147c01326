"""Fast implementations of one operation each; each names the reference that it must equal."""
