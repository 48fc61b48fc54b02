"""
The page of an agent: what it is made of, and what a person sees in a real browser. With
CHAPERONE_DOCS=1 its pictures are put into docs/pictures.
"""

import base64
import datetime
import hashlib
import json
import os
import re
import shutil

import httpx
import pytest

from chaperone import Spool
from chaperone.agent.server.page import document
from spool_tests.support.agents import Served, end_all
from spool_tests.support.browser import DESKTOP, PHONE, SMALL, WIDE, Visitor, chromium
from spool_tests.support.places import ROOT
from spool_tests.support.waiting import until

PICTURES = os.path.join(ROOT, "docs", "pictures")
LONG = {"cwd": "/", "argv": ["/bin/sh", "-c", "echo begun; exec sleep 1000"]}


@pytest.mark.once
def test_policy_names_the_style_and_the_script_alone():
    html, headers = document()
    text = html.decode()
    parts = {
        name: re.search(rf"<{name}>(.*)</{name}>", text, re.S)[1] for name in ("style", "script")
    }
    policy = dict(each.split(maxsplit=1) for each in headers["Content-Security-Policy"].split("; "))
    for name, part in parts.items():
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.search(
        r"\son\w+\s*=|\sstyle\s*=|javascript:|https?://", text.split("<script>")[0]
    )
    assert "innerHTML" not in text and "eval(" not in text and "Storage" not in text


def test_page_needs_no_token_and_has_no_data(agent):
    start(agent, "secret-name", LONG)
    answer = httpx.get(agent.url, verify=agent.trust())
    assert answer.status_code == 200 and "secret-name" not in answer.text
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; ")


# -- in a browser

browsing = pytest.mark.tier("page")


@pytest.fixture
def agent(tmp_path):
    agent = Served(tmp_path)
    agent.start()
    yield agent
    if agent.process.poll() is None:
        agent.kill()
    end_all(agent.spool)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser, agent):
    """A function that opens the page; afterwards it asked nothing outside, and had no fault."""
    made = []

    def visiting(*words, **how):
        made.append(Visitor(browser, agent, *words, **how))
        return made[-1]

    yield visiting
    for visitor in made:
        assert (visitor.outside, visitor.faults) == ([], [])
        visitor.close()


def start(agent, run_id, program, **spec):
    return Spool(agent.spool).start({"id": run_id, "program": program, **spec})


def shell(script):
    return {"cwd": "/", "argv": ["/bin/sh", "-c", script]}


def night(agent):
    """What a person finds who is called at night: one run failed, one goes on."""
    labels = {"team": "etl", "dag": "nightly"}
    start(agent, "load-customers", shell("echo reading; exit 0"), labels=labels).wait()
    bad = "echo reading orders; echo 'disk \033[31mfull\033[0m: /data' >&2; exit 3"
    start(agent, "load-orders", shell(bad), labels=labels).wait()
    start(agent, "load-invoices", LONG, labels=labels)
    killed = start(agent, "report", shell("echo half; kill -9 $$"), labels={"team": "bi"})
    killed.wait()


# id, host, hours since its start, hours that it took, exit code
EARLIER = [
    *((f"hourly-{hour}", "db1", hour + 0.6, 0.2 + hour % 3 / 10, 0) for hour in range(6)),
    *((f"sync-{n}", "db2", 0.5 + n * 0.7, 0.15, 1 if n == 5 else 0) for n in range(8)),
    ("backup", "files", 5.2, 3.5, 0),
    ("index", "files", 2.8, 1.9, 2),
]


def earlier(agent):
    """What had ended before that night, on other hosts: copies of a run, at other times."""
    model = start(agent, "model", shell("exit 0"), labels={"team": "ops"})
    model.wait()
    until(lambda: (agent.spool / ".ended/model").is_symlink())
    for run_id, host, ago, took, code in EARLIER:
        shutil.copytree(agent.spool / "model", agent.spool / run_id)
        path = agent.spool / run_id / "status.json"
        begun = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=ago)
        ended = begun + datetime.timedelta(hours=took)
        status = json.loads(path.read_text())
        status |= {"run_id": run_id, "chaperone_host": host, "return_code": code}
        status |= {"status": code << 8, "elapsed": took * 3600}
        status |= dict.fromkeys(("create_time", "start_time"), f"{begun:%FT%T.%fZ}")
        status |= {"end_time": f"{ended:%FT%T.%fZ}"}
        path.write_text(json.dumps(status))
        (agent.spool / ".ended" / run_id).symlink_to(f"../{run_id}")
    model.delete()


@browsing
def test_night_is_done_by_keyboard_alone(agent, visit):
    night(agent)
    see = visit(SMALL)
    see.enter()
    see.sees("#rows", "load-orders")
    see.tab_to("state")
    see.page.keyboard.type("failed")  # which run failed?
    see.sees("#count", "2 of 4 runs")
    see.tab_to("load-orders")
    keep(see, "night-1-which-failed")
    see.page.keyboard.press("Enter")
    see.sees("#words", "Failed with exit code 3.")  # why?
    see.sees("#streams", "disk full: /data")  # what was its last output?
    assert see.focus() == "run-title"
    keep(see, "night-2-why")
    see.page.keyboard.press("Shift+Tab")  # All runs
    see.page.keyboard.press("Enter")
    see.sees("#rows", "load-orders")
    assert see.focus() == "load-orders"
    while see.focus() != "state":
        see.page.keyboard.press("Shift+Tab")
    see.page.keyboard.type("live")
    see.tab_to("load-invoices")
    see.page.keyboard.press("Enter")
    see.tab_to("stop")  # stop the other one
    see.page.keyboard.press("Enter")
    see.page.wait_for_selector("dialog[open]")
    see.tab_to("yes")
    keep(see, "night-3-stop-the-other")
    see.page.keyboard.press("Enter")
    see.sees("#words", "A stop was requested by runner")
    see.sees("#words", "Ended by signal SIGTERM.")
    keep(see, "night-4-stopped")
    assert Spool(agent.spool)["load-invoices"].status().stop["by"] == "runner"


@browsing
def test_kill_for_memory_is_said_in_words(agent, visit):
    start(agent, "report", shell("kill -9 $$")).wait()
    path = agent.spool / "report/status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"oom": True}))  # as of the kernel
    see = visit()
    see.enter()
    see.open("report")
    see.sees("#words", "Ended by signal SIGKILL.")
    see.sees("#words", "The kernel counted an out-of-memory kill in its cgroup")


@browsing
def test_line_appears_while_the_run_goes_on(agent, visit):
    gate = agent.place / "gate"
    os.mkfifo(gate)
    start(agent, "talker", shell(f"echo first; while read line; do echo got $line; done <{gate}"))
    see = visit()
    see.enter()
    see.open("talker")
    see.sees("#streams", "first")
    with open(gate, "w") as file:
        for number in range(3):
            print(f"word-{number}", file=file, flush=True)
            see.sees("#streams", f"got word-{number}")
    see.sees("#words", "Ended well, with exit code 0.")


@browsing
def test_run_that_starts_later_appears_and_its_end_too(agent, visit):
    see = visit()
    see.enter()
    run = start(agent, "later", LONG)
    see.sees("#rows", "later")
    see.sees("#rows .state", "running")
    run.kill(by="ops")
    see.sees("#rows .outcome", "SIGKILL (request)")


ATTACKS = (
    "<img src=x onerror=alert(1)>",
    "</pre><script>alert(2)</script>",
    "<svg onload=alert(3)>",
    "javascript:alert(4)",
    "\033]8;;javascript:alert(5)\033\\link\033]8;;\033\\",
    "\033[38;5;<b>m bold?",
    "\u202etxt.exe",
    "&lt;b&gt;",
)


@browsing
def test_nothing_that_a_program_wrote_is_markup(agent, visit):
    text = "\n".join(ATTACKS)
    labels = {f"label-{number}": attack.strip("\033") for number, attack in enumerate(ATTACKS)}
    labels = {name: value for name, value in labels.items() if value.isprintable()}
    labels['"><b>x'] = "</option><script>alert(6)</script>"
    run = start(agent, "attack", {"argv": ["/usr/bin/printf", "%s", text]}, labels=labels)
    run.wait()
    run_id = "..%2f<b>"  # no valid id, in the address
    see = visit()
    see.enter()
    see.page.select_option("#group", '="><b>x')
    see.open("attack")
    see.sees("#streams", "<img src=x onerror=alert(1)>")
    see.sees("#streams", "</pre><script>alert(2)</script>")
    see.sees("#streams", "\\u202etxt.exe")
    see.page.click("summary")
    assert see.page.locator("#streams img, #streams svg, #streams script, #streams b").count() == 0
    assert see.page.locator("#list b, #list script, #rows b, #picture b").count() == 0
    see.page.goto(f"{agent.url}#/etl/{run_id}")
    see.page.goto(f"{agent.url}#/etl/%3Cimg%20src=x%20onerror=alert(7)%3E")


@browsing
def test_colours_of_a_terminal_are_colours(agent, visit):
    start(agent, "colours", {"argv": ["/usr/bin/printf", "a\\033[1;31mred\\033[0m b\\033[2Kc"]})
    see = visit()
    see.enter()
    see.open("colours")
    see.sees("#streams", "ared bc")
    assert see.page.locator("#streams .b.f1").inner_text() == "red"


@browsing
def test_lost_agent_is_named_and_found_again(agent, visit):
    night(agent)
    see = visit()
    see.enter()
    agent.kill()
    see.sees("#health.bad", "The agent does not answer")
    agent.start()
    see.sees("#health:not(.bad)", "Live")
    start(agent, "after", shell("exit 0"))
    see.sees("#rows", "after")


@browsing
def test_wrong_token_is_refused_and_a_look_token_has_no_buttons(agent, visit):
    night(agent)
    see = visit()
    see.page.goto(agent.url)
    see.page.keyboard.type("wrong")
    see.page.keyboard.press("Enter")
    see.sees("#login-error", "The agent refuses this token.")
    see.enter("look")
    see.open("load-invoices")
    see.sees("#words", "Running.")
    assert not see.page.locator("#stop").is_visible()


@browsing
def test_ten_thousand_runs_and_a_hundred_megabytes_freeze_nothing(agent, visit):
    from spool_tests.bench.following import make_ended

    make_ended(str(agent.spool), 10_000)
    start(agent, "big", {"argv": ["/bin/sh", "-c", "yes 0123456789 | head -c 100000000"]}).wait()
    see = visit()
    see.enter()
    see.sees("#count", "10001 runs")
    assert see.page.locator("#rows tr").count() == 200
    see.page.fill("#text", "ended-77")
    see.sees("#count", "111 of 10001 runs")
    see.page.fill("#text", "big")
    # The longest time without a frame, as a person feels a page that is frozen.
    see.page.evaluate(
        "() => { let last = performance.now(); window.longest = 0; const beat = (now) => {"
        " window.longest = Math.max(window.longest, now - last); last = now;"
        " requestAnimationFrame(beat); }; requestAnimationFrame(beat); }"
    )
    see.open("big")
    see.sees("#stdout-title", "stdout")
    see.sees("#streams pre", "0123456789")
    kept = length_of_stdout(see)
    assert kept <= 300_000
    see.page.click("text=Earlier stdout")
    until(lambda: length_of_stdout(see) > kept)


def length_of_stdout(see):
    """Characters of stdout in the page."""
    return see.page.evaluate("document.querySelector('#streams pre').textContent.length")


@browsing
def test_flood_that_is_watched_keeps_the_last_part(agent, visit):
    gate = agent.place / "gate"
    os.mkfifo(gate)
    flood = "yes 0123456789 | head -c 30000000; echo; echo the end"
    start(agent, "flood", shell(f"read go <{gate}; {flood}; read go <{gate}"))
    see = visit()
    see.enter()
    see.open("flood")
    see.sees("#words", "Running.")
    gate.write_text("go\n")
    see.sees("#streams pre", "the end")
    assert length_of_stdout(see) <= 300_000
    gate.write_text("go\n")
    see.sees("#words", "Ended well")


@browsing
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, WIDE], ids=["desktop", "phone", "4K"])
def test_page_is_for_everybody(agent, visit, size, scheme):
    earlier(agent)
    night(agent)
    see = visit(size, scheme)
    see.page.goto(agent.url)
    assert see.violations() == []
    assert see.width() <= size[0]
    see.enter()
    see.sees("#rows", "load-orders")
    see.sees("#picture", "")
    time_of_frame(see)
    assert see.violations() == []
    assert see.width() <= size[0]
    keep(see, f"runs-{size[0]}-{scheme}")
    see.open("load-orders")
    see.sees("#streams", "disk full: /data")
    see.page.click("summary")
    assert see.violations() == []
    assert see.width() <= size[0]
    keep(see, f"run-{size[0]}-{scheme}")
    see.page.click("#back")
    see.open("load-invoices")
    see.page.click("#kill")
    assert see.violations() == []
    see.page.keyboard.press("Escape")


def time_of_frame(see):
    """Wait until the picture is drawn."""
    see.page.wait_for_selector("#picture svg rect")


KEPT = {"runs-1280-light", "run-1280-dark", "runs-360-light", "run-360-dark", "runs-1280-dark"}
KEPT |= {"night-1-which-failed", "night-2-why", "night-3-stop-the-other", "night-4-stopped"}


def keep(see, name):
    """Keep a picture for the docs, where that is asked for."""
    if name in KEPT and os.environ.get("CHAPERONE_DOCS"):
        path = os.path.join(PICTURES, f"page-{name}.png")
        see.page.screenshot(path=path, full_page=name.startswith("run-"))
