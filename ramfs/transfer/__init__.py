"""Snapshots on their way to another mount: what ``ramfs send`` writes and ``ramfs receive`` reads."""
