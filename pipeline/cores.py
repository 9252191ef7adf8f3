"""How many CPU cores there are."""

import os


def available_cores() -> int:
    """What a container or a scheduler granted this process, where that is known, else the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
