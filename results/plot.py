"""Draw the curves of the README, results/*.svg, from the metrics of the runs in results/*.jsonl.

    python results/plot.py
"""
import json
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 50, 40
COLORS = [("colors-seed-0", "#1b6ca8", "seed 0"), ("colors-seed-1", "#2a9d8f", "seed 1"),
          ("colors-seed-2", "#e09f3e", "seed 2"), ("colors-cold", "#b0413e", "colder base model")]
GRID = [("grid-seed-0", "#1b6ca8", "seed 0"), ("grid-seed-1", "#2a9d8f", "seed 1"),
        ("grid-seed-2", "#e09f3e", "seed 2"), ("grid-blind", "#b0413e", "later pictures gray")]


def main():
    draw("colors.svg", "eval/reward", COLORS)
    draw("grid.svg", "eval/success", GRID)


def draw(picture: str, metric: str, runs: list[tuple[str, str, str]]) -> None:
    """A share between 0 and 1 per step, of the runs (file, color, label)."""
    curves = []
    for name, color, label in runs:
        lines = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
        curves.append((color, label, [(line["step"], line[metric]) for line in lines
                                      if metric in line]))
    last = max(step for *_, points in curves for step, _ in points)

    def x(step):
        return LEFT + step / last * (WIDTH - LEFT - 20)

    def y(share):
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - 20)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             'font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{LEFT} {y(tick)}H{WIDTH - 20}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{tick:.0%}</text>')
    for step in range(0, last + 1, 20):
        parts.append(f'<text x="{x(step)}" y="{HEIGHT - 20}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    for i, (color, label, points) in enumerate(curves):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
                     f'<text x="{WIDTH - 150}" y="{HEIGHT - 115 + 16 * i}" fill="{color}">'
                     f'{label}: {points[-1][1]:.1%}</text>')
    (HERE / picture).write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
