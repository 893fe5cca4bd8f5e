"""Pictures of reports for the README, by a headless Chromium: results/report-*.png and groups.

    python results/screenshots.py outputs/colors outputs/grid

results/colors-groups.png shows two groups of the first run side by side, chosen by rule: the first
prompt of the first step and the first prompt of the last one.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from support.report import HEAD, ROOM, group_paths, group_section, logged_steps, write

SIDE_BY_SIDE = '<div style="display: flex; gap: 40px"><div>%s</div><div>%s</div></div>'


def main():
    folders = [Path(name) for name in sys.argv[1:]]
    for folder in folders:
        shoot(write(folder), HERE / f"report-{folder.name}.png", 1000, 1560)
    groups(folders[0], HERE / f"{folders[0].name}-groups.png")


def groups(folder: Path, picture: Path) -> None:
    steps = logged_steps(folder)
    sections = [group_section(group_paths(folder, step)[0], ROOM) for step in (steps[0], steps[-1])]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "groups.html")
        path.write_text(HEAD % "groups" + SIDE_BY_SIDE % tuple(sections))
        shoot(path, picture, 1100, 2000)


def shoot(page: Path, picture: Path, width: int, height: int) -> None:
    """The upper part of a page, as a PNG of 256 colors, without the white around it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    subprocess.run([browser, "--headless", *as_root, "--hide-scrollbars",
                    f"--window-size={width},{height}", f"--screenshot={picture}",
                    page.resolve().as_uri()], check=True, timeout=60, stderr=subprocess.DEVNULL)
    image = Image.open(picture).convert("RGB")
    left, top, right, bottom = ImageChops.invert(image).getbbox()
    image = image.crop((left - 8, top - 8, min(width, right + 8), min(height, bottom + 8)))
    image.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main()
