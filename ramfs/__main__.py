"""``python -m ramfs``."""

import sys

from ramfs.cli import main

sys.exit(main())
