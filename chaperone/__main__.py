"""
The command `chaperone`, as `bin/chaperone`, `python -m chaperone` and a scheduler start it; the
last one by this file's path.

Knows: where the package lies, how the process ends.  Must not know: anything else.
"""

import os
import sys

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
