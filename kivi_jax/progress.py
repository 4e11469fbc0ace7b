"""When progress bars are shown."""

import sys


def progress_disabled() -> bool | None:
    """tqdm's `disable`. None shows a bar on terminals only, which takes a stderr for granted; without one, True."""
    return True if sys.stderr is None else None
