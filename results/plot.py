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


def draw(picture: str, metric: str, runs: dict[str, str]) -> None:
    """A share between 0 and 1 per step, of the runs {file: label}."""
    curves = {}
    for name, label in runs.items():
        lines = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
        curves[label] = [(line["step"], line[metric]) for line in lines if metric in line]
    (HERE / picture).write_text(chart(curves, percent=True) + "\n")


if __name__ == "__main__":
    main()
