"""Rows on their way into a flow: checked, split, batched, read from files and loaders."""
