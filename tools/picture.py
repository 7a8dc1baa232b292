"""Pictures of a page in a real browser, to look at and for docs/images. Needs Chromium (Debian: apt-get install chromium).

python tools/picture.py demo-int4.report.html docs/images/report.png --height 1500
python tools/picture.py demo-int4.report.html dark.png --dark
python tools/picture.py demo-int4.report.html telephone.png --width 390 --height 3000
python tools/picture.py demo-int4.report.html paper.pdf
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def picture(page: Path, out: Path, width: int, top: int, height: int, *, dark: bool) -> None:
    """Draw `page` at a width in pixels, so many pixels of it below `top`; a PDF is printed whole."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as folder:
        # A window has a least width; a frame within it has none.
        frame = Path(folder, "frame.html")
        style = f"width:{width}px;height:{top + height}px;margin-top:-{top}px;border:0"
        frame.write_text(f'<body style="margin:0"><iframe style="{style}" src="{page.resolve().as_uri()}"></iframe>')
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        if dark:
            command.append("--blink-settings=preferredColorScheme=0")
        if out.suffix == ".pdf":
            command += ["--no-pdf-header-footer", f"--print-to-pdf={out.resolve()}", page.resolve().as_uri()]
        else:
            command += [f"--window-size={width},{height}", f"--screenshot={out.resolve()}", frame.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1060)
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--height", type=int, default=1400)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    picture(given.page, given.out, given.width, given.top, given.height, dark=given.dark)
