"""
The command `chaperone`, as `bin/chaperone`, `python -m chaperone` and a scheduler start it; the
last one by this file's path.

Knows: where the package lies, how the process ends.  Must not know: anything else.
"""

import gc
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

# A collection among the imports takes 0.8 ms of a start and finds nothing; it is enabled again
# where a process lives on.
gc.disable()

own = __file__.rpartition("/")[0]
if not __package__:
    # Started by path. Without -I the package's own directory would be searched, and its modules
    # taken for the library's.
    sys.path[:] = [path for path in sys.path if path != own]
    sys.path.append(own.rpartition("/")[0])


class OwnModules:
    """
    Finds the package's modules where they are. The path finder, which does so otherwise, lists
    each folder and asks for extension modules first: 1 ms of a start.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """The module of that name; None for a module that is not ours."""
        if name.partition(".")[0] != "chaperone":
            return None
        place = own + name[len("chaperone") :].replace(".", "/")
        for file, places in ((f"{place}.py", None), (f"{place}/__init__.py", [place])):
            loader = SourceFileLoader(name, file)
            try:
                loader.path_stats(file)
            except OSError:
                continue
            return spec_from_file_location(
                name, file, loader=loader, submodule_search_locations=places
            )
        return None


try:
    from _frozen_importlib_external import SourceFileLoader, spec_from_file_location

    sys.meta_path.insert(0, OwnModules)
except ImportError:  # another interpreter's, or a later one's: the path finder finds them too
    pass

from chaperone.cli import main  # noqa: E402  found by what stands above
from chaperone.cpython import os  # noqa: E402

# Nothing is left to clean up: all was written by write(2), and an interpreter takes 1.7 ms to take
# itself apart.
os._exit(main.main())
