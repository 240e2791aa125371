"""Layers, tables and the catalog on disk. docs/format.md has the byte-offset tables."""
