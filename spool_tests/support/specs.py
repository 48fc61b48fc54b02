"""
Specs, and how one is refused.
"""

CWD = "/srv/etl"
ARGV = {"argv": ["true"]}

CANONICAL = {
    "id": None,
    "program": {
        "argv": ["true"],
        "cwd": "/srv/etl",
        "env": {},
        "inherit_env": True,
        "stdin": None,
        "umask": None,
        "rlimits": {},
        "merge_stderr": False,
    },
    "remote": None,
    "on_disconnect": "kill",
    "lease": 60,
    "leftovers": "stop",
    "stop": {"signal": "SIGTERM", "grace_period": 60, "to": "all"},
    "timeouts": {"connect": 30, "run": None, "idle": None},
    "output": {"through": "pipe", "max_bytes": None, "on_full": "drop", "timeline": False},
    "durable": False,
    "keep_secrets": True,
    "callback": None,
    "config": None,
    "labels": {},
}
