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
    "renew": None,
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

# `config` with its defaults.
POSTING = {"retry_frequency": 10, "timeout": 86400, "output_buffer": 65536, "output_latency": 1}

# The program.json of the notes that chaperone comes from, value for value.
SEED = {
    "program": {
        "argv": ["/path/to/executable", "arg1", "arg2"],
        "cwd": "/path/to/dir",
        "env": {"VAR1": "value1", "VAR2": "value2"},
        "stdin": None,
    },
    "callback": {
        "url": "https://agenthost:8050/api/v1/agent/PROG-ID",
        "method": "GET",
        "token": "kHJBeIu1r0Xhb9y0FGeDU-sVPPfmoqaMlNSAw0L9ipU",
    },
    "config": {
        "retry_frequency": 10,
        "timeout": 86400,
        "output_buffer": 65536,
        "output_latency": 1,
    },
}
