"""Headless Chromium, for tests that look at a page as a reader does. No driver: its own command line is enough."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to open pages with")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever is asked for, by a page or by Chromium itself, goes nowhere
)  # fmt: skip
OWN = "not an origin"  # initiator of Chromium's own requests, in its network log


def run(url, *flags):
    """Open a page in a fresh profile.

    Returns:
        (str, list of str, list of str): what Chromium prints, console messages, and addresses that the page asked of
        the network.
    """
    with tempfile.TemporaryDirectory() as profile:
        traffic = Path(profile) / "traffic.json"
        where = [f"--user-data-dir={profile}/profile", f"--log-net-log={traffic}", "--enable-logging=stderr", "--v=0"]
        done = subprocess.run(
            [CHROMIUM, *QUIET, *where, *flags, url], capture_output=True, text=True, timeout=90, check=True
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        events = json.loads(traffic.read_text())["events"]
    asked = {
        each["url"]
        for each in (event.get("params", {}) for event in events)
        if each.get("initiator", OWN) != OWN and re.match(r"(https?|wss?|ftp):", each["url"])
    }
    return done.stdout, console, sorted(asked)


def open_page(path, *flags):
    """(DOM as HTML, console messages, addresses asked of the network) of a file, once its scripts are done."""
    return run(Path(path).resolve().as_uri(), "--virtual-time-budget=2000", "--dump-dom", *flags)


def measure(path, expression, width=360, *flags):
    """Value of a JavaScript expression about a file shown ``width`` pixels wide.

    In it ``page`` is the file's document, and ``style`` its ``getComputedStyle``. The file may forbid scripts: the
    expression runs in a page around it.
    """
    frame = f"""<!DOCTYPE html><iframe width="{width}" height="800" style="border:0" src="{Path(path).name}"></iframe>
<pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, style = (each) => frame.contentWindow.getComputedStyle(each);
  document.querySelector("pre").textContent = JSON.stringify({expression});
}};
</script>"""
    outer = Path(path).with_name("frame.html")
    outer.write_text(frame)
    try:
        text, _, _ = open_page(outer, "--allow-file-access-from-files", *flags)
    finally:
        outer.unlink()
    return json.loads(re.search(r"<pre>(.*?)</pre>", text, re.S)[1])
