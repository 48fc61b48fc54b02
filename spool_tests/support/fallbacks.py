"""
CPython without one of its private modules: each fallback of `chaperone.cpython` by force.

Knows: how to hide a module.  Must not know: what uses it.
"""

import site
import sys

from spool_tests.support.places import ROOT

# A public module needs its core, so it is imported before the core is hidden.
HIDDEN = "import sys, {public}; sys.modules['{private}'] = None\n"
FAKED = """
import json, _json, sys, types
fake = types.ModuleType("_json")
vars(fake).update(vars(_json))
{changed}
sys.modules["_json"] = fake
"""
# As 3.15 asked for `array_hook`, which no earlier decoder had.
HOOK = "fake.make_scanner = lambda context: context.hook_of_a_later_python\n"
ARGUMENTS = "fake.make_scanner = fake.make_encoder = lambda: None\n"
FORCED = {
    "json in Python": "import sys; sys.modules['_json'] = None\n",
    "_json": HIDDEN.format(public="json", private="_json"),
    "_json with a new hook": FAKED.format(changed=HOOK),
    "_json with other arguments": FAKED.format(changed=ARGUMENTS),
    "_signal": HIDDEN.format(public="signal", private="_signal"),
    "_socket": HIDDEN.format(public="socket", private="_socket"),
    "_stat": HIDDEN.format(public="stat", private="_stat"),
    "_ctypes": HIDDEN.format(public="ctypes", private="_ctypes"),
    "posix": HIDDEN.format(public="os, shutil", private="posix"),
}
FORCED["all"] = "".join(FORCED[name] for name in FORCED if " " not in name)


def argv(name=None, code="import chaperone.__main__", python=sys.executable, packages=None):
    """
    Python code, without site, where a fallback is forced.

    Args:
        name (str): Of `FORCED`; None to force nothing.
        packages (str): Where that Python finds attrs and the others; None for where ours does.
    """
    found = site.getsitepackages() if packages is None else [packages]
    places = f"import sys; sys.path += {[ROOT, *found]}\n"
    return [python, "-I", "-S", "-c", FORCED.get(name, "") + places + code]
