"""Where absent pages come from: the protocol of a source, its implementations, and what wraps them."""
