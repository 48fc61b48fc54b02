"""
The worlds that are tried: one row each, as in the table of docs/reliability.rst.

Knows: what each world is made of.  Must not know: what is checked there.
"""

import subprocess

from spool_tests.support import fallbacks, shells
from spool_tests.support.world import World, links

OVER_USR_BIN = 'mount -t overlay overlay -o "lowerdir=$0:/usr/bin" /usr/bin && exec "$@"'


def mounted(text, place="sh"):
    """Words that run an argv where a mount was made that nothing else sees; `$0` is `place`."""
    return ("unshare", "--mount", "/bin/sh", "-c", f'{text} && exec "$@"', place)


def over(directory, place):
    """Words that run an argv where names of `directory` are those of `place`."""
    return mounted(f'mount -t overlay overlay -o "lowerdir=$0:{directory}" {directory}', place)


def applets(place, **hidden):
    """busybox in the place of each program that it has."""
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True)
    named = dict.fromkeys(listed.stdout.split(), "busybox")
    named.pop("busybox", None)
    return over("/usr/bin", links(f"{place}/bin", named | hidden))


def latin_1(place):
    """A locale of our own making: Debian has none."""
    argv = ["localedef", "-f", "ISO-8859-1", "-i", "en_US", f"{place}/en_US.ISO-8859-1"]
    subprocess.run(argv, capture_output=True, check=False)  # 1: it had to warn
    return ("env", "LC_ALL=en_US.ISO-8859-1", f"LOCPATH={place}")


def of_shells():
    for name in ("dash", "bash", "busybox", "mksh", "zsh"):
        yield World(
            name=f"sh-{name}",
            ambiguous=name == "busybox",  # its shell takes its own awk, whatever PATH has
            needs=(name, "unshare"),
            words=lambda place, name=name: shells.in_place_of_sh(name, place),
        )


NAMESPACE = {"flags": ("--pid", "--fork", "--mount"), "needs": ("unshare", "nsenter")}
OWN_PROC = "mount -t proc proc /proc"
ENDS = "the namespace ends with its PID 1"
HIDE_PROC = "mount -t tmpfs none /proc"

WORLDS = [
    World(
        name="busybox",
        ambiguous=True,
        needs=("busybox", "unshare"),
        words=applets,
        short=True,
    ),
    World(
        name="bare",
        near=None,
        far="cookie",
        ambiguous=True,
        needs=("busybox", "unshare"),
        words=lambda place: applets(place, perl=None, python3=None),
        short=True,
    ),
    *of_shells(),
    World(
        name="pid-1",
        needs=("unshare",),
        words=lambda place: ("unshare", "--pid", "--fork", "--mount-proc"),
        but={"survive": ENDS},
        short=True,
    ),
    World(
        name="pid-1-hosts-proc",
        near="group",
        far="group",
        needs=("unshare",),
        words=lambda place: ("unshare", "--pid", "--fork"),
        but={"survive": ENDS},
    ),
    # Its PID 1 takes no orphan, as `sleep infinity` in many a container.
    World(name="container", setup=OWN_PROC, entered=("--pid", "--mount"), **NAMESPACE),
    World(
        name="hosts-proc",
        near="group",
        far="group",
        entered=("--pid",),
        short=True,
        **NAMESPACE,
    ),
    # We have no number in it: there is not even a /proc/self.
    World(
        name="neighbors-proc",
        near="group",
        far="group",
        setup=OWN_PROC,
        entered=("--mount",),
        **NAMESPACE,
    ),
    World(
        name="no-proc",
        near="group",
        far="group",
        needs=("unshare",),
        words=lambda place: mounted(HIDE_PROC),
        short=True,
    ),
    World(
        name="hidepid",
        needs=("unshare", "setpriv"),
        words=lambda place: mounted("mount -t proc -o hidepid=2 proc /proc"),
        user=True,
        short=True,
    ),
    World(name="nofile", needs=("prlimit",), words=lambda place: ("prlimit", "--nofile=40")),
    World(
        name="nproc",
        needs=("prlimit", "setpriv"),
        limits=("prlimit", "--nproc=40"),
        user=True,
        fill="(while :; do sleep 1000 >{alive} & done) 2>/dev/null; ",
        short=True,
    ),
    World(
        name="locale-latin-1",
        needs=("localedef", "locale-gen"),
        words=latin_1,
    ),
    World(name="locale-c", words=lambda place: ("env", "LC_ALL=C", "LANG=C")),
    World(name="locale-utf-8", words=lambda place: ("env", "LC_ALL=C.UTF-8")),
    *(
        World(
            name="fallback-" + name.replace(" ", "-"),
            far=None,
            command=lambda place, name=name: fallbacks.argv(name),
        )
        for name in fallbacks.FORCED
    ),
]
