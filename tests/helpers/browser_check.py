#!/usr/bin/env python
"""Look at a report in headless Chromium, without network: python tests/helpers/browser_check.py report.html PICTURES

At 1280 and 400 px, light and dark: nothing is wider than the window, no console message, every picture loads. Writes a
screenshot of each into the folder PICTURES, prints what it found, and exits 1 where something is wrong. Needs chromium.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

WIDTHS, SCHEMES, HEIGHT = (1280, 400), {"light": 1, "dark": 0}, 20_000
# Runs in the page: reports what overflows and which pictures are broken, as a line of the console.
MEASURE = """<script>addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const root = document.documentElement, all = [...document.body.querySelectorAll("*")];
  const isWide = one => !one.closest(".scroll") && one.getBoundingClientRect().right > root.clientWidth + 1;
  console.log("MEASURED" + JSON.stringify({
    width: root.clientWidth, height: root.scrollHeight, overflow: root.scrollWidth - root.clientWidth,
    wide: all.filter(isWide).map(one => one.tagName), dark: matchMedia("(prefers-color-scheme:dark)").matches,
    pictures: document.images.length, broken: [...document.images].filter(one => !one.naturalWidth).length,
    text: Math.min(...all.map(one => parseFloat(getComputedStyle(one).fontSize)))}));
}, 300));</script>"""
# A window is at least 500 px wide, a frame may be narrower.
FRAME = '<body style="margin:0"><iframe src="page.html" style="border:0;width:{}px;height:{}px"></iframe>'


def look(page: Path, width: int, scheme: str, picture: Path) -> tuple[dict, list[str]]:
    """What `MEASURE` found, and the other lines of the console."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "page.html")
        copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
        frame = Path(folder, "frame.html")
        frame.write_text(FRAME.format(width, HEIGHT))
        command = [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={folder}/profile", f"--window-size={max(width, 500)},{HEIGHT}", f"--screenshot={picture}",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            "--enable-logging=stderr", "--virtual-time-budget=5000", frame.as_uri(),
        ]  # fmt: skip
        said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False).stderr
    lines = re.findall(r'CONSOLE[^"]*"(.*)", source', said)
    measured = [line for line in lines if line.startswith("MEASURED")]
    if not measured:
        sys.exit(f"Chromium has not measured the page: {said[-2000:]}")
    return json.loads(measured[0].removeprefix("MEASURED")), [line for line in lines if line not in measured]


def main() -> None:
    page, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for width, scheme in product(WIDTHS, SCHEMES):
        picture = folder.resolve() / f"{page.stem}_{width}_{scheme}.png"
        found, console = look(page, width, scheme, picture)
        print(width, scheme, found, console, picture, flush=True)
        right_window = found["width"] == width and found["dark"] == (scheme == "dark")
        failed |= not right_window or bool(console or found["wide"] or found["broken"]) or found["overflow"] > 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
