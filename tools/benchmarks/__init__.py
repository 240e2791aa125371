"""The benchmark behind tools/bench: ramfs and its peers, in turns, in one run."""
