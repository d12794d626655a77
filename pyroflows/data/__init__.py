"""Training data: rows checked, split and batched, from memory, files and loaders."""
