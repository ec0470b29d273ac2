"""bench/test_speed.py once, untimed, on few rows: it is not part of this suite, and must run when somebody asks."""

import subprocess
import sys

from bench import report


def test_the_speed_tests_run() -> None:
    chosen = ["-k", "simclr-256 and not compile", "--rows", "32"]
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_speed.py", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout and "skipped" not in done.stdout
