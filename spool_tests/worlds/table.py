"""
The worlds that are tried: one row each, as in the table of docs/reliability.rst.

Knows: what each world is made of.  Must not know: what is checked there.
"""

import os
import shutil
import subprocess

from spool_tests.support import fallbacks, pythons, shells
from spool_tests.support.mounts import WITHOUT_PROC, links, mounted, over
from spool_tests.support.world import World


def applets(place, uid, **hidden):
    """busybox in the place of each program that it has."""
    listed = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True)
    named = dict.fromkeys(listed.stdout.split(), "busybox")
    named.pop("busybox", None)
    return over("/usr/bin", links(f"{place}/bin", named | hidden))


def used_up(place, uid):
    """Few open files, and most of them inherited."""
    held = " ".join(f"{fd}</dev/null" for fd in range(3, 10))
    return ("prlimit", "--nofile=24", "/bin/sh", "-c", f'exec {held}; exec "$@"', "sh")


def latin_1(place, uid):
    """A locale of our own making: Debian has none."""
    argv = ["localedef", "-f", "ISO-8859-1", "-i", "en_US", f"{place}/en_US.ISO-8859-1"]
    subprocess.run(argv, capture_output=True, check=False)  # 1: it had to warn
    return ("env", "LC_ALL=en_US.ISO-8859-1", f"LOCPATH={place}")


def of_shells():
    for name in ("dash", "bash", "busybox", "mksh", "zsh"):
        yield World(
            name=f"sh-{name}",
            needs=(name, "unshare"),
            words=lambda place, uid, name=name: shells.in_place_of_sh(name, place),
        )


ROOM = 'mkdir "$0/room"; chmod 755 "$0/room"; '
LOOP = 'truncate -s 320M "$0/image"; mkfs.{0} -q "$0/image"; mount -o loop "$0/image" "$0/room"'
SMALL = 'mount -t tmpfs -o size=64m,mode=755 tmpfs "$0/{}"'
OVERLAY = (
    f'mkdir "$0/under"; {SMALL.format("under")}; cd "$0/under"; mkdir lower upper work; '
    'mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay "$0/room"'
)


def of_filesystems():
    """Each in a mount namespace, and but for tmpfs in a file behind a loop device."""
    for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay"):
        setup = {"tmpfs": SMALL.format("room"), "overlay": OVERLAY}.get(kind, LOOP.format(kind))
        yield World(
            name=kind,
            needs=("unshare", "nsenter", *((f"mkfs.{kind}",) if setup.startswith("trunc") else ())),
            flags=("--mount",),
            setup=ROOM + setup,
            entered=("--mount",),
            room="room",
            more=("full", "read_only"),
            also=(
                "test_inodes_that_ran_out_eat_no_outcome",
                "test_a_spool_that_is_read_only_for_a_while_gets_its_outcome_later",
            ),
            short=kind == "tmpfs",
        )


HIDEPID = mounted("mount -t proc -o hidepid=2 proc /proc")
SUDOERS = {
    "sudo": "",
    "sudo-without-session": "Defaults !use_pty,!pam_session,!pam_setcred\n",
}


def of_raisers():
    """A plain user whose programs become root's."""

    def over_etc(place, uid, **files):
        directory = links(f"{place}/etc", {})
        with open("/etc/passwd") as file:
            files["passwd"] = f"{file.read()}plain:*:{uid}:65534::/:/bin/sh\n"
        for name, text in files.items():
            with open(os.open(f"{directory}/{name}", os.O_CREAT | os.O_WRONLY), "w") as file:
                file.write(text)
            os.chmod(f"{directory}/{name}", 0o644 if name == "passwd" else 0o400)
        return over("/etc", directory)

    for name, more in (("setuid", ()), ("setuid-hidepid", HIDEPID)):

        def setuid(place, uid, more=more):
            shutil.copy("/usr/bin/setpriv", f"{place}/raised")
            os.chmod(f"{place}/raised", 0o4755)
            return more

        yield World(
            name=name,
            also=(
                "test_what_it_may_not_kill_keeps_nobody_waiting_and_is_named",
                "test_program_of_another_uid_is_alive",
            ),
            needs=("setpriv", "unshare"),
            words=setuid,
            user=True,
            raiser="{place}/raised --reuid=0 --regid=0 --clear-groups",
            more=("raised",),
        )
    for name, defaults in SUDOERS.items():
        yield World(
            name=name,
            needs=("setpriv", "sudo", "unshare"),
            words=lambda place, uid, defaults=defaults: over_etc(
                place, uid, sudoers=f"{defaults}plain ALL=(ALL) NOPASSWD: ALL\n"
            ),
            user=True,
            raiser="sudo -n",
            more=("raised",),
        )
    yield World(
        name="doas",
        needs=("setpriv", "doas", "unshare"),
        words=lambda place, uid: over_etc(place, uid, **{"doas.conf": "permit nopass plain\n"}),
        user=True,
        raiser="doas -n",
        more=("raised",),
    )


def of_pythons():
    for minor in range(10, 16):
        yield World(
            name=f"python-3.{minor}",
            far=None,
            words=lambda place, uid, minor=minor: pythons.words(minor),
            command=lambda place, minor=minor: pythons.command(minor),
        )


NAMESPACE = {"flags": ("--pid", "--fork", "--mount"), "needs": ("unshare", "nsenter")}
OWN_PROC = "mount -t proc proc /proc"
ENDS = "the namespace ends with its PID 1"

WORLDS = [
    World(
        name="busybox",
        also=(
            "test_kernel_tracks_where_all_tools_are_busybox",
            "test_busybox_awk_that_lies_is_found_out",
        ),
        needs=("busybox", "unshare"),
        words=applets,
        short=True,
    ),
    World(
        name="bare",
        also=("test_cookie_finds_what_left_the_group_where_the_kernel_does_not",),
        near=None,
        far="cookie",
        needs=("busybox", "unshare"),
        words=lambda place, uid: applets(place, uid, perl=None, python3=None),
        short=True,
    ),
    *of_shells(),
    World(
        name="pid-1",
        also=(
            "test_as_pid_1_it_reaps_what_others_leave",
            "test_as_pid_1_it_kills_what_is_left",
        ),
        needs=("unshare",),
        words=lambda place, uid: ("unshare", "--pid", "--fork", "--mount-proc"),
        but={"survive": ENDS},
        short=True,
    ),
    World(
        name="pid-1-hosts-proc",
        also=("test_proc_of_another_pid_namespace_is_not_believed",),
        near="group",
        far="group",
        needs=("unshare",),
        words=lambda place, uid: ("unshare", "--pid", "--fork"),
        but={"survive": ENDS},
    ),
    # Its PID 1 reaps no orphan, as `sleep infinity` in many containers.
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
        also=(
            "test_without_proc_the_group_is_killed",
            "test_host_without_proc_still_ends_the_group_and_says_what_it_can_not_know",
        ),
        near="group",
        far="group",
        needs=("unshare",),
        words=lambda place, uid: WITHOUT_PROC,
        short=True,
    ),
    World(
        name="hidepid",
        needs=("unshare", "setpriv"),
        words=lambda place, uid: HIDEPID,
        user=True,
        short=True,
    ),
    *of_raisers(),
    World(
        name="nofile",
        also=("test_a_limit_on_open_files_is_told_or_does_no_harm",),
        needs=("prlimit",),
        words=used_up,
    ),
    World(
        name="nproc",
        also=("test_guard_needs_no_process_more",),
        needs=("prlimit", "setpriv"),
        limits=("prlimit", "--nproc=40"),
        user=True,
        fill="(while :; do sleep 1000 >{alive} & done) 2>/dev/null; ",
        short=True,
    ),
    World(
        name="locale-latin-1",
        also=("test_words_are_utf8_whatever_the_locale",),
        needs=("localedef", "locale-gen"),
        words=latin_1,
    ),
    World(name="locale-c", words=lambda place, uid: ("env", "LC_ALL=C", "LANG=C")),
    World(name="locale-utf-8", words=lambda place, uid: ("env", "LC_ALL=C.UTF-8")),
    *of_filesystems(),
    *of_pythons(),
    World(
        name="debian-sid",
        words=lambda place, uid: pythons.chroot(),
        command=lambda place: pythons.command(14),
    ),
    World(
        name="busybox-sid",
        words=lambda place, uid: pythons.chroot("busybox"),
        command=lambda place: pythons.command(14),
    ),
    *(
        World(
            name="fallback-" + name.replace(" ", "-"),
            also=("test_whole_run_is_the_same_with_a_fallback",),
            far=None,
            command=lambda place, name=name: fallbacks.argv(name),
        )
        for name in fallbacks.FORCED
    ),
]
