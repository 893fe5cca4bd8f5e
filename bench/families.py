"""Check every family of models/families.py against a real vLLM server, and write the table.

    python bench/families.py [name ...]      raw output: results/families.jsonl, then docs/families.md

One server start per family, about a minute each on two CPU cores. Only the named families are run
again; the table is made from the raw output of all.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RAW = ROOT / "results" / "families.jsonl"

from models.families import FAMILIES, make  # noqa: E402  (needs the path)


def run(name: str) -> list[dict]:
    """The lines of `python -m support.check MODEL --json` for one family."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, name)
        make(name, directory)
        found = subprocess.run([sys.executable, "-m", "support.check", str(directory), "--json"],
                               cwd=ROOT, capture_output=True, text=True, timeout=600)
        lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
        lines[-1]["verdict"] = lines[-1]["verdict"].partition(" (see ")[0]  # a log of this machine
        return lines


def table(records: list[dict]) -> str:
    """A Markdown row per family: largest differences by images, over all weight versions."""
    rows = ["| family | 0 images | 1 image | 2 images | 4 turns, 4 images | prompts shared | verdict |",
            "|---|---|---|---|---|---|---|"]
    for name in FAMILIES:
        mine = [r for r in records if r["model"] == name]
        if not mine:
            continue
        found = [r for r in mine if "max_logprob_difference" in r]
        worst = [max((r["max_logprob_difference"] for r in found if r["images"] == count),
                     default=None) for count in (0, 1, 2)]
        shared = [r["shared_prompts_exact"] for r in mine if "shared_prompts_exact" in r]
        cells = ["-" if w is None else f"{w:.1e}" for w in worst]
        talked = [r["conversations"] for r in mine if "conversations" in r]
        cells.append(talked[-1].split()[-1] if talked else "-")
        rows.append(f"| {name} | {' | '.join(cells)} | "
                    f"{'exact' if shared and all(shared) else 'no'} | {mine[-1]['verdict']} |")
    return "\n".join(rows)


def main(names: list[str]):
    records = [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.exists() else []
    for name in names or FAMILIES:
        print(name, flush=True)
        records = [r for r in records if r["model"] != name] + run(name)
        RAW.write_text("".join(json.dumps(r) + "\n" for r in records))
    page = ROOT / "docs" / "families.md"
    text = re.sub(r"(<!-- families -->\n).*?(\n<!-- end -->)",
                  lambda m: m[1] + table(records) + m[2], page.read_text(), flags=re.S)
    page.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
