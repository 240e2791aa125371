"""Counts of what the daemon did, cheap enough for the hot path: plain integer attributes."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Since the mount began. Bytes where the name says so, requests elsewhere."""

    reads: int = 0
    read_bytes: int = 0
    reads_ahead: int = 0
    """of these, those that were for what a guest has not asked for yet (fuse/working_sets.py)"""
    read_ahead_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    shared_ranges: int = 0
    shared_bytes: int = 0
    punched_ranges: int = 0
    punched_bytes: int = 0
    snapshots: int = 0
    clones: int = 0
    syncs: int = 0
    errors: int = 0
    garbage_passes: int = 0
    dropped_pages: int = 0
