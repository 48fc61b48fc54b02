"""
Words before an argv that run it where something else is mounted, seen by nothing else; as root.

Knows: unshare(1), mount(8).  Must not know: what is run.
"""

import os


def mounted(text, place="sh"):
    """Words that run an argv where a sh text has mounted something; `$0` in it is `place`."""
    return ("unshare", "--mount", "/bin/sh", "-c", f'{text} && exec "$@"', place)


WITHOUT_PROC = mounted("mount -t tmpfs none /proc")


def over(directory, place):
    """Words that run an argv where names in `directory` are those in `place`."""
    return mounted(f'mount -t overlay overlay -o "lowerdir=$0:{directory}" {directory}', place)


def links(directory, targets):
    """A directory of symlinks, made: {name: target}; None hides a name where it is laid over."""
    os.makedirs(directory, exist_ok=True)
    os.chmod(directory, 0o755)
    for name, target in targets.items():
        path = os.path.join(directory, name)
        if target is None:
            os.mknod(path, 0o020000, os.makedev(0, 0))
        else:
            os.symlink(target, path)
    return directory
