"""What a process of trials may not do: take memory without an end."""

import resource
from pathlib import Path


def limit_memory(more: int) -> None:
    """Limit this process to so many bytes beyond those that it has; more is refused."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
