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
    draw("colors.svg", "eval/reward", COLORS)
    draw("grid.svg", "eval/success", GRID)
    draw_forks("forks.svg", "eval/accuracy")


def draw(picture: str, metric: str, runs: dict[str, str]) -> None:
    """A share between 0 and 1 per step, of the runs {file: label}."""
    curves = {}
    for name, label in runs.items():
        curves[label] = [(line["step"], line[metric]) for line in lines_of(name) if metric in line]
    (HERE / picture).write_text(chart(curves, percent=True) + "\n")


def draw_forks(picture: str, metric: str) -> None:
    """The same of the runs of forks, which share a file."""
    curves = {}
    for line in lines_of("forks"):
        if metric in line:
            curves.setdefault(line["fork"], []).append((line["step"], line[metric]))
    (HERE / picture).write_text(chart(curves, percent=True) + "\n")


def lines_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
