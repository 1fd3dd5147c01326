"""Parts of both engine packages: an engine with its versions, hooks, options, diagnosis."""
