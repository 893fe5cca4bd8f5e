"""Draw the curves of the README, results/*.svg, from the metrics of the runs in results/*.jsonl.

    python results/plot.py
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from support.charts import chart

COLORS = {"colors-seed-0": "seed 0", "colors-seed-1": "seed 1", "colors-seed-2": "seed 2",
          "colors-cold": "colder base model"}
GRID = {"grid-seed-0": "seed 0", "grid-seed-1": "seed 1", "grid-seed-2": "seed 2",
        "grid-blind": "later pictures gray"}


def main():
    draw("colors.svg", "eval/reward", {label: lines_of(name) for name, label in COLORS.items()})
    draw("grid.svg", "eval/success", {label: lines_of(name) for name, label in GRID.items()})
    forks = {}  # they share a file
    for line in lines_of("forks"):
        forks.setdefault(line["fork"], []).append(line)
    draw("forks.svg", "eval/accuracy", forks)


def draw(picture: str, metric: str, runs: dict[str, list[dict]]) -> None:
    """A share between 0 and 1 per step, of the runs {label: lines of metrics}."""
    curves = {label: [(line["step"], line[metric]) for line in lines if metric in line]
              for label, lines in runs.items()}
    (HERE / picture).write_text(chart(curves, percent=True) + "\n")


def lines_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
