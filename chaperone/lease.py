"""
Leases: how long a run may live on without its chaperone.

Knows: clocks, and what tells one boot of this host from the next.  Must not know: where a run keeps its files.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def stamp() -> tuple[float, float]:
    """
    Now, as the atime and the mtime that say when the far side was last heard.

    Returns:
        tuple: Seconds since boot, which no step of the wall clock changes, and since the epoch, which a boot does not end.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


def left_s(heard: os.stat_result, spec: dict[str, Any], boot: str | None) -> float:
    """
    How long a run may still live on without its chaperone.

    Args:
        heard (os.stat_result): With the times of `stamp`.
        spec (dict): As in spec.json; anything.
        boot (str): The `boot_id` of its last status.
    Returns:
        float: Seconds; not above 0 when its lease is over, or for a run that ends with its chaperone.
    """
    lease_s = spec.get("lease")
    if spec.get("on_disconnect") != "survive" or not isinstance(lease_s, (int, float)):
        return 0.0
    since_boot, now = stamp()
    # Reading a file may change its atime to the time of day, which is far more than the time since any boot.
    same_boot = boot is not None and boot == boot_id() and heard.st_atime <= since_boot
    return lease_s - (since_boot - heard.st_atime if same_boot else now - heard.st_mtime)


def boot_id() -> str | None:
    """What tells one boot of this host from the next; None where the kernel does not say."""
    try:
        fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY)  # not open(): what that touches is 55 KiB of each warm run
        try:
            return os.read(fd, 64).decode("ascii").strip()
        finally:
            os.close(fd)
    except OSError:
        return None
