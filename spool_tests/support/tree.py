"""
A program that makes a tree of processes which are hard to find, to stop and to kill.

`python -I -S tree.py ORACLE GO RAISE NODE`: each process appends `pid start-time` to ORACLE, its
parent the same of it, and `planted` once it is as it is to stay. The first one exits with 3 when
GO, a FIFO beside ORACLE, is opened. RAISE is a setpriv that is root's. NODE is [steps, last word,
child nodes].

Knows: fork, prctl, what ordinary programs do to hide.  Must not know: chaperone.
"""

import _signal as signal
import _thread
import ctypes
import os
import sys
import time

PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 4, 15, 36  # linux/prctl.h
EXIT = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine)  # of one thread alone
ORACLE, GO, RAISE, NODE = sys.argv[1:] if __name__ == "__main__" else [""] * 4
NOBODY = 65_534
GENERATIONS, PAUSE_S = 40, 0.004
SAY = 'say() { read -r x <"/proc/$1/stat" && set -- "$1" ${x##*")"} && echo "$1 ${21}" >&"$out"; }'
libc = ctypes.CDLL(None)


def say(pid):
    """Write down a process, this one or a child, before anything else can happen to it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            started = file.read().rpartition(b")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):  # it has ended, and its parent ignores that
        return
    os.write(out, b"%d %b\n" % (pid, started))


def forked():
    """As os.fork: both write down the child."""
    pid = os.fork()
    say(pid or os.getpid())
    return pid


def live(steps, last_word, children, is_first=False):
    for step in steps:
        STEPS[step]()
    for child in children:
        if not forked():
            live(*child)
    os.write(out, b"planted\n")
    wait_for_go() if is_first else LAST[last_word]()


def wait_for_go():
    with open(os.path.basename(GO), "rb"):  # whoever it is by now may not go its whole path
        os._exit(3)


def sleep(*_):
    while True:
        time.sleep(1000)


# -- what it does to itself


def again():
    if forked():
        os._exit(0)


def ignore():
    for number in (1, 2, 3, 10, 12, 13, 14, 15):
        signal.signal(number, signal.SIG_IGN)


def answer_with_a_fork():
    def answer(number, frame):
        if not forked():
            ignore()
            sleep()

    for number in (1, 2, 15):
        signal.signal(number, answer)


def overwrite_title():
    """As setproctitle does it: over the arguments, and over the environment behind them."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[48])  # proc(5): arg_start, env_end
    if start:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, b"kworker/0:1", 11)


def drop_to_nobody():
    if os.geteuid() == 0:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def start_agent():
    """ssh-agent makes a daemon of itself, that no debugger and no environ can look into."""
    ours, theirs = os.pipe()
    if not os.fork():
        os.dup2(theirs, 1)
        run("ssh-agent", "-s", "-a", f"agent.{os.getpid()}")
    os.close(theirs)
    with open(ours, "rb") as file:
        said = file.read()
    os.wait()
    say(int(said.partition(b"AGENT_PID=")[2].partition(b";")[0]))


def run(*argv, env=os.environ):
    """Become another program."""
    os.execvpe(argv[0], argv, env)


STEPS = {
    "again": again,
    "agent": start_agent,
    "answer": answer_with_a_fork,
    "dumpable": lambda: libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0),
    "group": lambda: os.getpid() == os.getsid(0) or os.setpgid(0, 0),
    "ignore": ignore,
    "name": lambda: libc.prctl(PR_SET_NAME, b"sshd) Z 1 2"),
    "nobody": drop_to_nobody,
    "session": lambda: os.getpid() == os.getpgrp() or os.setsid(),
    "subreaper": lambda: libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0),
    "title": overwrite_title,
}

# -- what it is in the end


def stop():
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


def hand_on():
    """Each generation has a child and ends; the last one stays."""
    for _ in range(GENERATIONS):
        time.sleep(PAUSE_S)
        again()
    sleep()


def lose_first_thread():
    _thread.start_new_thread(sleep, ())
    if EXIT:
        libc.syscall(EXIT, 0)
    sleep()


def close_all():
    os.closerange(0, 64)
    sleep()


def shell():
    """One that no signal ends, and its child."""
    trap = 'trap "" HUP INT TERM; sleep 1000 & say $!; while :; do wait; sleep 1; done'
    run("sh", "-c", f"out={out}; {SAY}; {trap}")


def raise_to_root():
    """What a plain user may start and may not kill, with children that it may."""
    ids = ("--reuid=0", "--regid=0", "--clear-groups")
    below = "[['session'], 'sleep', [[['nobody', 'session'], 'sleep', []]]]"
    run(RAISE, *ids, sys.executable, "-I", "-S", __file__, ORACLE, "", RAISE, below)


LAST = {
    "agent": lambda: run("ssh-agent", "-D", "-a", f"agent.{os.getpid()}"),
    "bare": lambda: run("sleep", "1000", env={}),
    "closed": close_all,
    "end": lambda: os._exit(0),
    "hand on": hand_on,
    "perl": lambda: run("perl", "-e", '$0 = "(sd-pam)"; sleep 1000 while 1'),
    "raised": raise_to_root,
    "shell": shell,
    "sleep": sleep,
    "stop": stop,
    "thread": lose_first_thread,
}

if __name__ == "__main__":
    out = os.open(ORACLE, os.O_WRONLY | os.O_APPEND)
    os.set_inheritable(out, True)
    os.chdir(os.path.dirname(ORACLE))  # an agent's socket may not have a long name
    say(os.getpid())
    live(*eval(NODE), is_first=bool(GO))
