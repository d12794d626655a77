"""The version, in one place that every file may read."""

__version__ = "0.1.0"
