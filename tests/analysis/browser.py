"""A page in headless Chromium, without network: what a script reads in it, and what the console says."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without sandbox, because tests may run as root; no name can be resolved, so a page that needs the network fails.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=60000", "--dump-dom",
)  # fmt: skip
# Waits for the page, then evaluates the steps and leaves what they return in the page.
DRIVER = """
<pre id="seen"></pre>
<script>
(async () => {
  for (let i = 0; i < 500 && !document.body.dataset.ready; i++) await new Promise((done) => setTimeout(done, 50));
  const change = (id, value) => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event("change"));
  };
  const texts = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
  document.getElementById("seen").textContent = JSON.stringify(await (async () => { STEPS })());
})();
</script>
"""


def browse(page: Path, steps: str, folder: Path, width: int = 1280, height: int = 1600) -> tuple[Any, list[str]]:
    """Open a copy of the page and evaluate `steps` in it, the body of an asynchronous function.

    Args:
        page: an HTML file.
        steps: JavaScript with `return`; it may use change(id, value) and texts(selector).
        folder: an empty one, for the copy and the browser's profile.

    Returns:
        what the steps return, None without a return; the messages of the browser's console.
    """
    folder.mkdir(parents=True)
    copy = folder / page.name
    copy.write_text(page.read_text().replace("</body>", DRIVER.replace("STEPS", steps) + "</body>"))
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=150, check=True)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(seen[1])) if seen and seen[1] else None, console
