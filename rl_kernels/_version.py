"""The package's version, for what is built beside it and for records."""

__version__ = "0.2.0.dev0"
