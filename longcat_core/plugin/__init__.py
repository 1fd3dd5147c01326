"""What both engine packages are made of: an engine, its hooks, its options, a diagnosis."""
