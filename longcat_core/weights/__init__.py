"""Published checkpoints: tensor names, where each goes, what is wrong with them, files."""
