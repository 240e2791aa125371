"""A file system that keeps the RAM of virtual machines as files."""

__version__ = "0.1.0"
