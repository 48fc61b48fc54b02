"""
The command `chaperone`, as `bin/chaperone`, `python -m chaperone` and a scheduler start it; the
last one by this file's path.

Knows: where the package lies, how the process ends.  Must not know: anything else.
"""

import gc
import sys

# A collection among the imports takes 0.8 ms of a start and finds nothing; it is enabled again
# where a process lives on.
gc.disable()

own = __file__.rpartition("/")[0]
if not __package__:
    # Started by path. Without -I the package's own directory would be searched, and its modules
    # taken for the library's.
    sys.path[:] = [path for path in sys.path if path != own]
    sys.path.append(own.rpartition("/")[0])

try:
    from _frozen_importlib_external import SourceFileLoader

    # From its cache: to compile it here would take 0.5 ms of each start.
    loader = SourceFileLoader("chaperone.loader", f"{own}/loader.py")
    code = loader.get_code(loader.name) or ""
    exec(code, {"__name__": loader.name, "__file__": loader.path})
except ImportError:  # another interpreter's, or a later one's: the path finder finds them too
    pass

from chaperone.cli import main  # noqa: E402  found by what stands above
from chaperone.cpython import os  # noqa: E402

# Nothing is left to clean up: all was written by write(2), and an interpreter takes 1.7 ms to take
# itself apart.
os._exit(main.main())
