"""The laws behind ``pyroflows.testing``, which is where to call them from."""
