"""What the kernel lets a mount have once it is there: /sys/class/bdi/MAJOR:MINOR.

Without it a guest that dirties its memory is held back to a fraction of the memory's speed, and reads ahead
128 KiB only. Needs root; docs/architecture.md has the figures.
"""

import errno
import os
from typing import Final

#: KiB read around a fault. Copied into a file when it is opened, so it is set before anything is.
READ_AHEAD_KB: Final = 512
_WANTED: Final = (("read_ahead_kb", str(READ_AHEAD_KB)), ("strict_limit", "0"), ("max_ratio", "100"))


def tune(device: int, wanted: tuple[tuple[str, str], ...] = _WANTED) -> list[str]:
    """Set the limits of the mount whose st_dev is ``device``. Returns those that could not be set, and why.

    A mount that is gone again has nothing to set.
    """
    directory = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}"
    refused = []
    for name, value in wanted:
        try:
            with open(f"{directory}/{name}", "w") as file:
                file.write(value)
        except OSError as exc:
            # strict_limit came with Linux 6.2
            refused.append(f"{name} ({'this kernel lacks it' if exc.errno == errno.ENOENT else 'needs root'})")
    return refused if os.path.isdir(directory) else []
