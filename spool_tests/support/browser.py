"""
A browser that looks at an agent's page: Debian's chromium, driven by Playwright.

Knows: Playwright, axe-core.  Must not know: what the page shows.
"""

import contextlib
import os
import shutil

from spool_tests.support.agents import TOKENS
from spool_tests.support.waiting import need

DESKTOP, PHONE, WIDE = (1280, 900), (360, 740), (3840, 2160)
SMALL = (1024, 560)


@contextlib.contextmanager
def chromium():
    """The browser; no other one is downloaded."""
    need("chromium")
    path = shutil.which("chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox of the browser does not work as root; it only loads pages of this test.
        words = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=words)
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """
    A page of an agent in a window of its own.

    Attributes:
        page: Playwright's.
        outside (list): URLs that it asked for and that are not the agent's.
        faults (list): What the browser complained about: errors, broken policies, dialogs.
    """

    def __init__(self, browser, agent, size=DESKTOP, scheme="light"):
        # The certificate is by the tests' own authority, which the browser does not know.
        self._context = browser.new_context(
            ignore_https_errors=True,
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
        )
        self._context.set_default_timeout(300_000)  # what takes longer hangs
        self.page = self._context.new_page()
        self.agent = agent
        self.outside, self.faults = [], []
        self.page.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._complained)
        self.page.on("dialog", lambda dialog: (self.faults.append("dialog"), dialog.dismiss()))

    def _asked(self, request):
        if not request.url.startswith((self.agent.url, "data:")):
            self.outside.append(request.url)

    def _complained(self, message):
        # A request that failed is no fault of the page: tests end agents and refuse tokens.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def enter(self, right="run"):
        """Open the page, and give it a token by the keyboard."""
        self.page.goto(self.agent.url)
        self.page.keyboard.type(TOKENS[right])
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#health:has-text('Live')")

    def open(self, run_id):
        """Click on a run in the list."""
        self.page.locator("#rows a").get_by_text(run_id, exact=True).click()

    def sees(self, selector, text):
        """Wait until an element has a text."""
        self.page.wait_for_function(
            "([selector, text]) => [...document.querySelectorAll(selector)]"
            ".some((each) => each.textContent.includes(text))",
            arg=[selector, text],
        )

    def focus(self):
        """What has the focus: its id, or its text."""
        return self.page.evaluate("document.activeElement.id || document.activeElement.textContent")

    def tab_to(self, wanted):
        """Press Tab until an element with that id or text has the focus."""
        for _ in range(60):
            if self.focus() == wanted:
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"no {wanted!r} in 60 presses of Tab; now at {self.focus()!r}")

    def violations(self):
        """What axe-core finds: [(rule, elements)]."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]

    def width(self):
        """How wide the document is: more than the window means that it scrolls sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth")

    def close(self):
        self._context.close()
