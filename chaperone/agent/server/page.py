"""
The page of an agent: one document with its style and script, and the policy that allows only these.

Knows: the parts of the page.  Must not know: runs, tokens, HTTP.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources

PARTS = ("agent", "words", "ansi", "timeline", "list", "run", "main")  # of the script, in order


@functools.cache
def document() -> tuple[bytes, dict[str, str]]:
    """
    The page as it is sent.

    Returns:
        tuple: (HTML in UTF-8, its headers). The Content-Security-Policy names the hashes of the one
            style and the one script, so nothing that a program wrote can run; the page may connect
            to its own agent alone.
    """
    style = _part("page.css")
    # One scope: nothing of it is a global name.
    script = "".join(
        ['"use strict";\n(() => {\n', *(_part(f"{name}.js") for name in PARTS), "})();"]
    )
    html = _part("page.html").replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )
    return html.encode(), {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _part(name: str) -> str:
    return (resources.files("chaperone.agent") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
