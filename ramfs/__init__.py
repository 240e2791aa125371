"""A file system that keeps the RAM of virtual machines as files."""

import os

__version__ = "0.1.0"

# Before anything imports numpy: its BLAS starts a thread for each further processor, which spins for a tenth of a
# second in every process that starts, and nothing here multiplies matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
