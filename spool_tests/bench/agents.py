"""
Rows about agents: how late a subscriber over TLS hears a line, many runs and many bytes through one
agent, enemies beside a subscriber, and the page in a browser.
"""

import asyncio
import contextlib
import os
import pathlib
import resource
import socket
import ssl
import threading
import time

from chaperone import aio
from chaperone.model.events import Output, Started

from . import lab as labs
from .following import LINES_S, SCALE_LINES_S, SCALE_RUNS, by_asyncio, delays, feeder
from .table import Row

ENEMIES = 300
BYTES = 10_000_000_000
PIECE = b"0123456789abcde\n" * 65_536


@contextlib.contextmanager
def served(lab):
    """An agent with an empty spool, in a place of the lab."""
    from spool_tests.support import agents

    with agents.served(pathlib.Path(lab.directory("agent"))) as agent:
        yield agent


def spool_of(agent):
    """The agent's spool, over TLS, as a scheduler on another host has it."""
    return aio.Spool(agent.spool_url, token_file=agent.token_files["run"], ca=agent.ca)


def by_agent(agent, process, runs, count, begins=lambda: None):
    """As `following.by_asyncio`: seconds from each line's writing until a subscriber holds it."""
    heard = []

    async def listen():
        async with spool_of(agent).follow() as follower:
            seen = 0
            while seen < runs:
                seen += isinstance(await follower.next(labs.TIMEOUT_S), Started)
            while await follower.next(0.3) is not None:
                pass
            begins()
            process.stdin.write(b"go\n")
            process.stdin.flush()
            while len(heard) < count:
                event = await follower.next(labs.TIMEOUT_S)
                if event is None:
                    return
                if isinstance(event, Output):
                    heard.extend(delays(event.data, time.monotonic()))

    asyncio.run(listen())
    return heard


def append(lab, rounds):
    """From the write of a line to a subscriber over TLS, against a follower on this host."""
    row = Row("agent-append", "append to subscriber over TLS, 100 lines/s")
    seconds = 2
    found = {"follower on this host": [], "subscriber over TLS": []}
    for _ in range(min(rounds or 3, 10)):
        spool = lab.directory("spool")
        with feeder(lab, spool, 1, LINES_S, seconds) as process:
            found["follower on this host"] += by_asyncio(lab, spool, process, LINES_S * seconds)
        with served(lab) as agent:
            with feeder(lab, str(agent.spool), 1, LINES_S, seconds) as process:
                found["subscriber over TLS"] += by_agent(agent, process, 1, LINES_S * seconds)
    middle = row.figures_of(found, "ms", 1e3)
    ratio = middle["subscriber over TLS"] / middle["follower on this host"]
    row.claim("p50 / on this host", ratio, "<=", 3)
    return row


def scale(lab, rounds):
    """1,000 live runs that write 5,000 lines a second in all, one subscriber over TLS."""
    row = Row("agent-scale", f"{SCALE_RUNS:,} runs, {SCALE_LINES_S:,} lines/s, over TLS")
    seconds = min(rounds or 5, 30)
    used = []
    with served(lab) as agent:
        pid = agent.process.pid

        def look():
            used.append((labs.cpu_seconds(pid), own_cpu(), time.perf_counter()))

        with feeder(lab, str(agent.spool), SCALE_RUNS, SCALE_LINES_S, seconds) as process:
            heard = by_agent(agent, process, SCALE_RUNS, SCALE_LINES_S * seconds, look)
            look()
    row.figure("line written to line held", heard, "ms", 1e3)
    agent_s, client_s, wall_s = (after - before for before, after in zip(*used, strict=True))
    row.figure("CPU of the agent", [agent_s / wall_s], "% core", 100)
    row.figure("CPU of the subscriber", [client_s / wall_s], "% core", 100)
    row.claim("p99, ms", row.figures[0][4], "<=", 20)
    row.claim("lines lost", SCALE_LINES_S * seconds - len(heard), "<=", 0)
    return row


def own_cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def transfer(lab, rounds):
    """10 GB of one run through an agent: how fast, and how large the agent became."""
    row = Row("agent-bytes", "10 GB of a run through an agent")
    from spool_tests.support.writer import Writer

    with served(lab) as agent:
        writer = Writer(str(agent.spool), "big").running()
        fd = writer.run.streams["stdout"]
        for _ in range(BYTES // len(PIECE)):
            os.write(fd, PIECE)
        size = os.fstat(fd).st_size
        before, began_s = peak_kib(agent.process.pid), labs.cpu_seconds(agent.process.pid)

        async def read():
            count = 0
            async for data in spool_of(agent)["big"].tail("stdout"):
                count += len(data)
                if count == size:
                    return

        begun = time.perf_counter()
        asyncio.run(asyncio.wait_for(read(), 600))
        seconds = time.perf_counter() - begun
        cpu_s = labs.cpu_seconds(agent.process.pid) - began_s
        row.figure("read by a client", [size / 1e6 / seconds], "MB/s")
        row.figure("CPU of the agent a GB", [cpu_s / size * 1e9], "s")
        row.figure("the agent's memory before", [before / 1024], "MiB")
        row.figure("the agent's memory at its most", [peak_kib(agent.process.pid) / 1024], "MiB")
        row.claim("memory, MiB", row.figures[-1][3], "<=", 60)
        os.truncate(os.path.join(str(agent.spool), "big", "stdout"), 0)
    return row


def peak_kib(pid):
    """The most memory that a process had (VmHWM)."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def enemy(lab, rounds):
    """
    A subscriber beside 300 connections that are silent, send a byte a second, or read nothing.
    """
    row = Row("agent-enemy", f"a subscriber beside {ENEMIES} enemies")
    seconds = min(rounds or 5, 30)
    found = {}
    with served(lab) as agent:
        for label, count in (("alone", 0), (f"beside {ENEMIES} enemies", ENEMIES)):
            for name in os.listdir(agent.spool):
                if name.startswith("run-"):
                    os.rename(agent.spool / name, lab.new("done"))
                    os.unlink(agent.spool / ".running" / name)
            with contextlib.ExitStack() as stack:
                process = stack.enter_context(feeder(lab, str(agent.spool), 1, LINES_S, seconds))
                # The subscriber is there before its enemies: they share its address, and an agent
                # has room for so many connections of one.
                found[label] = by_agent(
                    agent,
                    process,
                    1,
                    LINES_S * seconds,
                    lambda stack=stack, count=count: stack.enter_context(enemies(agent, count)),
                )
        row.figures_of(found, "ms", 1e3)
        row.figure("the agent's memory at its most", [peak_kib(agent.process.pid) / 1024], "MiB")
    alone, beside = (figure[4] for figure in row.figures[:2])
    row.claim("p99 beside / alone", beside / alone, "<=", 2)
    row.claim("lines lost", LINES_S * seconds - len(found[f"beside {ENEMIES} enemies"]), "<=", 0)
    row.claim("memory, MiB", row.figures[2][3], "<=", 64)
    return row


@contextlib.contextmanager
def enemies(agent, count):
    """Connections that come again as often as the agent closes them."""
    address = agent.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=str(agent.ca))
    over = threading.Event()

    def attack(kind):
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(address, 5) as sock:
                if kind == 1:
                    sock = context.wrap_socket(sock, server_hostname=address[0])
                for char in b"GET /api/v1 HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100:
                    if over.wait(1):
                        return
                    if kind != 2:
                        sock.send(bytes([char]))
            over.wait(0.5)

    threads = [threading.Thread(target=attack, args=(number % 3,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def page(lab, rounds):
    """From the write of a line to the frame of a browser that shows it."""
    row = Row("page", "write to screen, in a browser on this host")
    try:
        import playwright  # noqa: F401

        from spool_tests.support import browser as browsers
    except ImportError:
        row.note("Playwright is not installed: bin/bench page brings it when it is asked for alone")
        return row
    if not labs.has("chromium"):
        row.note("no chromium is here: apt-get install chromium")
        return row
    count = min(rounds or 60, 300)
    gate = lab.new("gate")
    os.mkfifo(gate)
    with served(lab) as agent, browsers.chromium() as browser:
        script = 'while read line; do echo "$line"; done <"$0"'
        spec = {"id": "talker", "program": {"cwd": "/", "argv": ["/bin/sh", "-c", script, gate]}}
        spool_by_path(agent).start(spec)
        see = browsers.Visitor(browser, agent)
        see.enter()
        see.sees("#rows", "talker")
        see.open("talker")
        see.sees("#words", "Running.")
        # When a frame has been painted after the text changed, on the clock of this host.
        see.page.evaluate(
            "() => { window.delays = []; let seen = 0; new MutationObserver(() =>"
            " requestAnimationFrame(() => setTimeout(() => {"
            " const lines = document.querySelector('#streams pre').textContent.trim().split('\\n');"
            " for (const line of lines.slice(seen)) window.delays.push(Date.now() - Number(line));"
            " seen = lines.length; }))).observe(document.querySelector('#streams'),"
            " {childList: true, subtree: true}); }"
        )
        with open(gate, "w") as file:
            for number in range(count):
                print(f"{time.time() * 1e3:.3f}", file=file, flush=True)
                see.page.wait_for_function("(seen) => window.delays.length > seen", arg=number)
                time.sleep(0.05)
        found = see.page.evaluate("window.delays")
        see.close()
    row.figure("line written to line on the screen", found, "ms")
    row.claim("median, ms", row.figures[0][3], "<=", 200)
    return row


def spool_by_path(agent):
    import chaperone

    return chaperone.Spool(agent.spool)
