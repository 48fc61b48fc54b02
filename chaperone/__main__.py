"""
The command `chaperone`, as `bin/chaperone`, `python -m chaperone` and a scheduler start it; the
last one by this file's path.

Knows: where the package lies, how the process ends.  Must not know: anything else.
"""

import gc
import os
import sys

# A collection among the imports takes 0.8 ms of a start and finds nothing; it is enabled again
# where a process lives on.
gc.disable()

if not __package__:
    # Started by path. Without -I the package's own directory would be searched, and its modules
    # taken for the library's.
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != own]
    sys.path.append(os.path.dirname(own))

from chaperone.cli import main  # noqa: E402  found by what stands above

# Nothing is left to clean up: all was written by write(2), and an interpreter takes 1.7 ms to take
# itself apart.
os._exit(main.main())
