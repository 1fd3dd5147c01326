"""Published checkpoints: names of tensors, load plans, audits, files."""
