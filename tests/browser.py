"""Chromium for the test of the page: where it is, and, run as a program (`make test`), how it is had.

a path in OUTBOX_TEST_CHROMIUM → this machine's own → Playwright's → a sentence that says what to do
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.servers import ServerUnavailable

VARIABLE = "OUTBOX_TEST_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REMEDY = (
    f"No Chromium for the tests: install one (apt-get install chromium, playwright install chromium) or set {VARIABLE}"
)

ARGUMENTS = ["--no-sandbox"] if os.geteuid() == 0 else []
"""Chromium refuses to run as root with its sandbox. The tests show it nothing but our own page."""


def chromium() -> str:
    """The path of one. Raises ServerUnavailable where there is none."""
    named = os.environ.get(VARIABLE)
    if found := named or next(filter(None, map(shutil.which, NAMES)), None):
        return found
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    if Path(path).exists():
        return path
    raise ServerUnavailable(REMEDY)


def main() -> None:
    """Have one: by apt-get, which root may ask, else from Playwright. A machine that gets none skips those tests, or,
    in CI, fails them."""
    try:
        chromium()
    except ServerUnavailable:
        commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
        if os.geteuid() == 0 and shutil.which("apt-get"):
            install = ["apt-get", "install", "--yes", "--quiet=2", "--no-install-recommends", "chromium"]
            commands[:0] = [["apt-get", "update", "--quiet=2"], install]
        for command in commands:
            subprocess.run(command, check=False)
            if any(map(shutil.which, NAMES)):
                return


if __name__ == "__main__":
    main()
