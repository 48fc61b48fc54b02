"""
What tests of run directories share.
"""

ENDED_FILES = ["spec.json", "status.json", "stderr", "stdout"]
