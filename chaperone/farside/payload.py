"""
What is sent to the far side.

Knows: sh text, bytes.  Must not know: processes, sockets, the clock, how the bytes get there.
"""

from __future__ import annotations

import os

from ..errors import StartError
from ..model import spec as specs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

READY = b"chaperone-ready-1\n"
# The one command that passes through every login shell, fish and csh too: no `!`, backslash,
# newline or quote within its quotes. Nothing is sent before the ready word is read, so that no
# startup file can eat or see the payload.
CONSTANT = ("/bin/sh", "-c", 'echo chaperone-ready-1 >&2; IFS= read -r l && eval "$l"')
# prctl acts on the process that calls it: so S becomes perl, or python, which makes itself a
# subreaper, asks whether it is one, and becomes S again; what is to be read is still in the pipe.
# On the way the signals that a startup file has ignored get their defaults, as no shell can do it.
# /usr/bin: what stands first in PATH may be a wrapper that takes its time. Not where PERL5OPT has
# perl load something. perl takes 2 ms, python 20 to 40. What they say (of a locale) is not for us.
# perl has no prctl, but its number, by the machine in the ELF header of perl itself; Config.pm
# would say it too, in 4 ms. s390x's header is big-endian.
_NEXT = 'IFS= read -r l||exit 97;eval "$l"'
_AGAIN = f"exec 2>&9 9>&-;{_NEXT}"
_PERL = (
    "eval{$SIG{$_}=DEFAULT for keys%SIG;open F,q(/proc/self/exe);read F,$_,20;"
    "%n=(62,157,183,167,243,167,258,167,3,172,40,172,5632,172,21,171);"
    "$n=$n{$m=unpack q(v),substr$_,18};$n=0 if$^O ne linux||$m==62&&2>ord substr$_,4;"
    "$r=pack q(i),0;$n&&!syscall($n,36,1,0,0,0)&&syscall($n,37,$r,0,0,0);"
    "$k=1 if unpack q(i),$r};exec{$s=shift}$s,q(-c),qq(reaper=$k;).shift"
)
_PYTHON = (
    r'k="";exec("try:\n import _signal as s\n for n in 1,2,3,10,12,13,14,15,17,25:'
    r"s.signal(n,s.SIG_DFL)\n import ctypes;r=ctypes.c_int();c=ctypes.CDLL(None).prctl\n "
    r"c(36,1,0,0,0);"
    r"c(37,ctypes.byref(r),0,0,0);k=r.value or k\nexcept Exception:0"
    r'");import os,sys;_,s,t=sys.argv;os.execvp(s,[s,"-c","reaper=%s;"%k+t])'
)
_ARGUMENTS = f"\"$0\" '{_AGAIN}' 9>&2 2>/dev/null"
REAPER = (
    'unset -v reaper;if [ ! "$PERL5OPT" ]&&[ -x /usr/bin/perl ];then '
    f"exec /usr/bin/perl -e '{_PERL}' {_ARGUMENTS};elif [ -x /usr/bin/python3 ];then "
    f"exec /usr/bin/python3 -I -S -c '{_PYTHON}' {_ARGUMENTS};fi;{_NEXT}\n"
)
WORD_BYTES = 131_072  # MAX_ARG_STRLEN of execve(2) where a page has 4 KiB
NO_HURRY_S = 10.0  # a lease is looked at this often at most


def _text(name: str) -> str:
    """A file of sh without its comments and indentation, which are for a reader of the file."""
    with open(f"{os.path.dirname(__file__)}/{name}", encoding="ascii") as file:
        lines = [line.strip() for line in file]
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("#"))


# Read now: when a run ends, the package may be gone.
SUPERVISOR = _text("sh/members.sh") + _text("sh/cgroup.sh") + _text("supervisor.sh")


def quoted(value: str | bytes) -> bytes:
    """One word of sh; every byte but NUL survives."""
    value = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    return b"'" + value.replace(b"'", b"'\\''") + b"'"


def fifths(seconds: float) -> int:
    """A grace as the far side counts it, never shorter."""
    return int(-(-seconds * 5 // 1))


def signal_word(signum: int) -> str:
    """As kill(1) takes it on every host: real-time signals have names in some shells only."""
    name = specs.signal_name_of(signum)
    return name[3:] if name in specs.SIGNALS and not name.startswith("SIGRT") else str(signum)


def tick_s(lease_s: float) -> int:
    """
    How often the far side looks at its lease, in seconds: the lease ends late by no more than this.
    """
    return int(max(1, min(NO_HURRY_S / 2, lease_s // 4)))


def settings(spec: dict[str, Any], nonce: str, cookie: str, life: str, **more: object) -> bytes:
    """
    The assignments that come before the supervisor's text.

    Args:
        spec (dict): Canonical.
        nonce (str): Random; before every record.
        cookie (str): Random; in the environment of everything that belongs to the run.
        life (str): kill, survive or attach.
        more: `dir`, `out_offset`, `err_offset`, `stdin_size`, `stdin_name`, `program`.
    """
    lease = spec["lease"]
    values: dict[str, object] = {
        "nonce": nonce,
        "cookie": cookie,
        "life": life,
        "lease": int(-(-lease // 1)),
        "tick": tick_s(lease),
        "grace": fifths(spec["stop"]["grace_period"]),
        "dir": "",
        "out_offset": 0,
        "err_offset": 0,
        "stdin_size": 0,
        "stdin_name": "",
        "program": b"",
        **more,
    }
    # A login environment may hold such a name, exported: unset, so that ours don't go on to the
    # program.
    lines = [b"unset -v " + " ".join(values).encode()]
    for name, value in values.items():
        home = name == "dir" and isinstance(value, str) and value.startswith("~/")
        text = (
            _home(spec) + b"/" + quoted(str(value)[2:])
            if home
            else quoted(value if isinstance(value, bytes) else str(value))
        )
        lines.append(name.encode() + b"=" + text)
    return b"\n".join(lines) + b"\n"


def _home(spec: dict[str, Any]) -> bytes:
    """
    A home directory as a word of sh.

    A login sets HOME; here a service may have none, and who adopts its run from a terminal has one:
    both have to mean the same place.
    """
    if spec["remote"] and spec["remote"]["hops"]:
        return b"${HOME:-/}"
    from pwd import getpwuid  # 0.1 ms that only a run here that survives is asked for

    try:
        return b"${HOME:-" + quoted(getpwuid(os.geteuid()).pw_dir) + b"}"
    except KeyError:
        return b"${HOME:-/}"


def payload(assigned: bytes, end: str, life: str, size: str | None = None) -> bytes:
    """
    All that goes to the far side once it is ready, but for the program's standard input.

    Args:
        assigned (bytes): From `settings`.
        end (str): Random; a line that is in no text. Without it nothing of the payload is run: it
            was cut.
        life (str): As for `settings`.
        size (str): Where it is only shown: what is there in place of the size.
    Returns:
        bytes: The far side evaluates the first line; it, or one after it, reads the others.
    """
    text = assigned + SUPERVISOR.encode()
    first = "" if life == "attach" else REAPER
    reader = _reader(size or str(len(text)), end)
    return (first + reader).encode() + text + end.encode() + b"\n"


def _reader(size: str, end: str) -> str:
    """
    The line that reads the others, whose size in bytes it knows, and the last one. By dd in one
    piece, because the shell's `read` takes a system call for each byte; line by line where there is
    no dd that knows fullblock, which then has read nothing.
    """
    return (
        f"unset -v s t nl;s=$(dd bs={size} count=1 iflag=fullblock 2>/dev/null);IFS= read -r t;"
        '[ "$s" ]||{ nl=$(echo x;echo x);nl=${nl#x};nl=${nl%x};'
        f'while [ "$t" != {end} ];do s=$s$t$nl;IFS= read -r t||exit 97;done;}};'
        f'[ "$t" = {end} ]||exit 97;eval "$s"\n'
    )


def directory(spec: dict[str, Any], cookie: str) -> str:
    """
    Where the far side keeps a run that survives; a path without a leading slash is below the user's
    home directory.
    """
    path = (
        f"{(spec['remote'] or {}).get('remote_dir') or '~/.chaperone'}/{spec['id']}.{cookie[-8:]}"
    )
    return path if path.startswith(("/", "~/")) else f"~/{path}"


class Words:
    """
    The random words of a payload.

    Args:
        nonce (str): As for `settings`.
        cookie (str): All of it; its first half marks the run's processes, and its end is the end of
            the run's directory.
        end (str): As for `payload`.
        name (str): Of the file that holds the program's standard input, for a moment.
    """

    def __init__(self, nonce: str, cookie: str, end: str, name: str) -> None:
        self.nonce, self.cookie, self.end, self.name = nonce, cookie, end, name


def sent(
    spec: dict[str, Any],
    life: str,
    words: Words,
    *,
    umask: int | None,
    stdin_size: int | str = 0,
    offsets: tuple[int, int] = (0, 0),
    size: str | None = None,
) -> bytes:
    """
    The payload for one connection of a run.

    Args:
        spec (dict): Canonical.
        life (str): As for `settings`.
        umask (int): For a program without hops; None for the login's.
        stdin_size (int): In bytes, of the program's standard input; a text where it is only shown.
        offsets (tuple): Of stdout and stderr, from where to go on; for `attach` alone.
        size (str): As for `payload`.
    Raises:
        StartError: If no shell could start the program.
    """
    _check(spec["program"])
    more: dict[str, object] = {
        "dir": directory(spec, words.cookie) if spec["on_disconnect"] == "survive" else ""
    }
    cookie = words.cookie[:16]
    if life == "attach":
        more.update(out_offset=offsets[0], err_offset=offsets[1])
    else:
        marks = {"CHAPERONE_RUN_ID": spec["id"], "CHAPERONE_COOKIE": cookie}
        far = bool(spec["remote"] and spec["remote"]["hops"])
        more["program"] = program_text(spec["program"], marks, far, None if far else umask)
        more.update(stdin_size=stdin_size, stdin_name=words.name)
    return payload(settings(spec, words.nonce, cookie, life, **more), words.end, life, size)


def _check(program: dict[str, Any]) -> None:
    """
    The kernel's limit of one word, with its NUL: beyond it no command of the shell would run, and
    each would fail in its own way.
    """
    words = {f"program.argv[{number}]": word for number, word in enumerate(program["argv"])}
    env = program["env"].items()
    words |= {f"program.env[{name!r}]": f"{name}={value}" for name, value in env}
    for name, word in words.items():
        if (size := len(word.encode("utf-8", "surrogateescape")) + 1) > WORD_BYTES:
            raise StartError(
                "spawn",
                f"unable to run {program['argv'][0]!r}: {name} takes {size} bytes,"
                f" and a shell can pass on no more than {WORD_BYTES}",
            )


def shown(spec: dict[str, Any], umask: int) -> bytes:
    """
    What is sent to the far side for a run of a spec, for a user who wants to read it first.

    Args:
        spec (dict): Canonical.
        umask (int): As for `sent`.
    Returns:
        bytes: With NONCE, COOKIE, RUN_ID, NAME and END in place of random words, BYTES in place of
            its size, and without the values of the environment.
    """
    program = {
        **spec["program"],
        "env": dict.fromkeys(spec["program"]["env"], "(a value that is not shown)"),
    }
    stdin = program["stdin"]
    size: Any = len(os.fsencode(stdin)) if isinstance(stdin, str) else "SIZE" if stdin else 0
    spec = {**spec, "program": program, "id": spec["id"] or "RUN_ID"}
    life = "survive" if spec["on_disconnect"] == "survive" else "kill"
    words = Words(nonce="NONCE", cookie="COOKIE", end="@END", name="NAME")
    return sent(spec, life, words, umask=umask, stdin_size=size, size="BYTES")


# -- the program's own text: what its shell does before it becomes the program

_FIND = b"""c_fits() {
[ -f "$1" ] || return 1
[ -x "$1" ] || { c_why=permission; return 1; }
case $(dd if="$1" bs=2 count=1) in
'#!')
IFS= read -r c_line <"$1"
c_line=${c_line#??}; c_line=${c_line#"${c_line%%[! ]*}"}; c_line=${c_line%%[ 	]*}
[ -x "$c_line" ] || { c_why=interpreter; return 1; } ;;
esac
}
c_why=notfound
c_found=
case $1 in
*/*) c_fits "$1" && c_found=1 ;;
*) set -f; IFS=:
for c_dir in ${PATH-/usr/local/bin:/usr/bin:/bin}; do
c_fits "${c_dir:-.}/$1" && c_found=${c_dir:-.}/$1 && break
done
unset IFS; set +f
[ "$c_found" ] && [ ! "${PATH+set}" ] && { shift; set -- "$c_found" "$@"; } ;;
esac
[ "$c_found" ] || c_fail $c_why
"""

# Shells answer a failed exec in different ways: dash, busybox and mksh run the trap, bash goes on.
# zsh and ksh93 exit without a message; there perl runs the program, if the host has it. A shell
# keeps open, with close-on-exec, each fd that it has to restore after a command. So 7 and 8 are
# ours again after a failed exec, and closed after one that worked. R waits for the end of 8, the
# pipe that this text came from. mksh restores nothing for a trap, but what its exec opens is closed
# by the next exec. The text is in braces, so that the shell reads all of it before R reads from
# that pipe. Numbers are quoted because an IFS of the spec may contain digits.
_EXEC = b"""{
c_out=7
case $ZSH_VERSION$KSH_VERSION in
'') ;;
*MIRBSD*) exec 9>&7; c_out=9 ;;
*) [ -x /usr/bin/perl ] && [ ! "$PERL5OPT" ] && c_out= ;;
esac
[ -e /proc/self/fd/0 ] && exec 8>/proc/self/fd/0
echo "$$ $PPID" >&7
[ "$c_out" ] || set -- /usr/bin/perl -e 'open F,">&=7";open G,">&=8";exec{$ARGV[0]}@ARGV;
syswrite F,"0 exec\n"' "$@"
[ "$c_out" ] || exec "$@" <&6 >&5 2>&%s 4>&- 5>&- 6<&-
trap 'echo 0 exec >&$c_out' EXIT
shopt -s execfail
{ exec "$@"; } <&6 >&5 2>&%s 4>&- 5>&- 6<&- 7>&- 8>&-
exit
}"""

# ulimit's letter (the second one is what dash and busybox call it), and the size of its unit in
# bytes or pieces.
_LIMITS = {
    "as": ("v", 1024),
    "core": ("c", 512),
    "cpu": ("t", 1),
    "data": ("d", 1024),
    "fsize": ("f", 512),
    "memlock": ("l", 1024),
    "nofile": ("n", 1),
    "nproc": ("u p", 1),
    "rss": ("m", 1024),
    "stack": ("s", 1024),
}


def program_text(
    program: dict[str, Any], marks: dict[str, str], far: bool, umask: int | None = None
) -> bytes:
    """
    The sh text that becomes the program.

    Args:
        program (dict): `spec["program"]`, canonical.
        marks (dict): CHAPERONE_RUN_ID and CHAPERONE_COOKIE.
        far (bool): Whether it runs behind a hop; there no cwd means home.
        umask (int): If the spec names none; None for the login's.
    Returns:
        bytes: Standard input of an sh. Descriptors: 4, 5 and 6 become stderr, stdout and stdin; one
            line goes to 7, a pid and its parent's, or `0 WHY`; where the exec then fails `0 exec`
            is another one.
    """
    lines = [b"exec 2>/dev/null", b'c_fail() { echo "0 $1" >&7; exit 125; }']
    mask = (
        program["umask"]
        if program["umask"] is not None
        else None
        if umask is None
        else f"{umask:03o}"
    )
    if mask is not None:
        lines.append(b"umask " + mask.encode())
    cwd = program["cwd"]
    if cwd is not None:
        there = cwd if cwd.startswith("/") else "./" + cwd
        lines.append(b"CDPATH= cd " + quoted(there) + b" || c_fail cwd")
    elif far:
        lines.append(b'CDPATH= cd "${HOME:-/}" || cd /')
    if program["inherit_env"] is not True:
        lines.append(_unset_but(program["inherit_env"] or []))
    exports = {
        name: b"export " + name.encode() + b"=" + quoted(value)
        for name, value in {**program["env"], **marks}.items()
    }
    late = [
        exports.pop(name) for name in list(exports) if name == "IFS" or name.startswith("c_")
    ]  # the search has such names of its own
    lines += exports.values()
    lines.append(b"set -- " + b" ".join(quoted(word) for word in program["argv"]))
    lines.append(_FIND)
    lines += late
    lines += [_limit(name, *ends) for name, ends in program["rlimits"].items()]
    lines.append(_EXEC.replace(b"%s", b"5" if program["merge_stderr"] else b"4"))
    return b"\n".join(lines)  # the last newline is `spill`'s: R would read a second one


def _unset_but(kept: list[str]) -> bytes:
    """
    By names alone: `env -i NAME=VALUE` would show the values in ps. `command` keeps a read-only
    name from ending the shell.
    """
    names = b"".join(name.encode() + b"|" for name in kept if name.isidentifier()) + b"''"
    listed = b"$(env | sed -n 's/^\\([A-Za-z_][A-Za-z_0-9]*\\)=.*/\\1/p')"
    text = (
        b"for c_name in "
        + listed
        + b"; do case $c_name in "
        + names
        + b") ;; *) command unset $c_name ;; esac; done\n"
    )
    return text.rstrip()


def _limit(name: str, soft: int | None, hard: int | None) -> bytes:
    letters, unit = _LIMITS[name]
    ends = ["unlimited" if end is None else str(-(-end // unit)) for end in (soft, hard)]
    tries = []
    for letter in letters.split():
        # The soft one first, as a hard limit below the soft one is refused; the other way round
        # where both rise.
        tries.append(f"{{ ulimit -S{letter} {ends[0]} && ulimit -H{letter} {ends[1]}; }}")
        tries.append(f"{{ ulimit -H{letter} {ends[1]} && ulimit -S{letter} {ends[0]}; }}")
    return " || ".join([*tries, f"c_fail rlimits.{name}"]).encode()
