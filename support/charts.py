"""Curves and bars as inline SVG: for the report of a run, and for the README's pictures."""
import html
import math

COLORS = ("#1b6ca8", "#2a9d8f", "#e09f3e", "#b0413e")  # of the curves of a chart, in turn
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 20, 40              # around the curves, in pixels
LETTER, LINE = 7, 16                                   # width and height of text, about
BAR, BAR_HEIGHT = 80, 14

Points = list[tuple[int, float | None]]  # (step, value); None where it is not finite


def chart(curves: dict[str, Points], title: str = "", log: bool = False, percent: bool = False,
          width: int = 640, height: int = 320) -> str:
    """An SVG of the curves, by label, over the steps; the legend says the last value of each.

    The axis begins at 0, so that small changes look small; with `percent` it is 0 to 100 %. A
    logarithmic one has no place for values that are not positive: there the curve has a gap, as it
    has where a value is None.
    """
    if log:
        curves = {label: logarithms(points) for label, points in curves.items()}
    values = [value for points in curves.values() for _, value in points if value is not None]
    if log:
        low, high = math.floor(min(values, default=0)), math.ceil(max(values, default=1))
        levels = range(low, max(high, low + 1) + 1, max(1, math.ceil((high - low) / 4)))
    else:
        bounds = (0, 1) if percent else (min([0, *values]), max([0, *values]))
        levels = ticks(*bounds)
    last = max((step for points in curves.values() for step, _ in points), default=0) or 1

    def name(value: float) -> str:
        if percent:
            return f"{100 * value:.3g}%"
        return f"{10 ** value:.2g}" if log else f"{value:.3g}"

    words, rows = legend(curves, name, title, width)
    top = TOP + LINE * rows + 4

    def x(step: float) -> float:
        return round(LEFT + step / last * (width - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - levels[0]) / (levels[-1] - levels[0])
        return round(height - BOTTOM - share * (height - BOTTOM - top), 1)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>', *words]
    for level in levels:
        parts.append(f'<path d="M{LEFT} {y(level)}H{width - RIGHT}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end">'
                     f'{name(level)}</text>')
    for step in ticks(0, last):
        if step <= last and step == int(step):
            parts.append(f'<text x="{x(step)}" y="{height - 20}" text-anchor="middle">'
                         f'{step:.0f}</text>')
    parts.append(f'<text x="{width / 2:g}" y="{height - 4}" text-anchor="middle">step</text>')
    for number, points in enumerate(curves.values()):
        color = COLORS[number % len(COLORS)]
        for segment in segments(thinned(points)):
            path = " ".join(f"{x(step)},{y(value)}" for step, value in segment)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" '
                         'stroke-width="2"/>')
            if len(points) <= 12 or len(segment) == 1:  # a line of one point is not seen
                parts += [f'<circle cx="{x(step)}" cy="{y(value)}" r="3" fill="{color}"/>'
                          for step, value in segment]
    return "\n".join([*parts, "</svg>"])


def legend(curves: dict[str, Points], name, title: str, width: int) -> tuple[list[str], int]:
    """The title and, in the color of each curve, its label and last value; (texts, lines)."""
    texts, row = [], 0
    if title:
        texts.append(f'<text x="{LEFT}" y="{TOP - 4}" font-weight="bold">{html.escape(title)}'
                     '</text>')
        row = 1
    left = LEFT
    for number, (label, points) in enumerate(curves.items()):
        finite = [value for _, value in points if value is not None]
        words = f"{label}: {name(finite[-1])}" if finite else f"{label}: no finite value"
        if left > LEFT and left + LETTER * len(words) > width:
            left, row = LEFT, row + 1
        texts.append(f'<text x="{left}" y="{TOP - 4 + LINE * row}" '
                     f'fill="{COLORS[number % len(COLORS)]}">{html.escape(words)}</text>')
        left += LETTER * len(words) + 2 * LETTER
    return texts, row


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the first at most low, the last at least high.

    >>> ticks(0, 0.98)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= span / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def logarithms(points: Points) -> Points:
    return [(step, math.log10(value) if value is not None and value > 0 else None)
            for step, value in points]


def thinned(points: Points, most: int = 600) -> Points:
    """At most so many points: of neighbours the lowest and the highest, and whether one is None."""
    size = math.ceil(3 * len(points) / most)
    if len(points) <= most:
        return points
    kept = []
    for start in range(0, len(points), size):
        neighbours = points[start:start + size]
        finite = [point for point in neighbours if point[1] is not None]
        if finite:
            by_value = sorted(finite, key=lambda point: point[1])
            kept += sorted({by_value[0], by_value[-1]})
        if len(finite) < len(neighbours):
            kept.append((neighbours[-1][0], None))
    return kept


def segments(points: Points) -> list[Points]:
    """The stretches of points between those that are None."""
    found = [[]]
    for step, value in points:
        if value is None:
            found.append([])
        else:
            found[-1].append((step, value))
    return [segment for segment in found if segment]


def bar(value: float | None, low: float, high: float, colors: tuple[str, str]) -> str:
    """An SVG of a bar from 0 to the value on an axis from low <= 0 to high >= 0, and its number.

    It has the first color if the value is below 0, else the second.
    """
    if value is None:
        return "not finite"
    scale = BAR / ((high - low) or 1)
    zero, end = -low * scale, (value - low) * scale
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{BAR + 50}" height="{BAR_HEIGHT}" '
            'font-family="sans-serif" font-size="12">'
            f'<rect x="{min(zero, end):.1f}" width="{abs(end - zero):.1f}" height="{BAR_HEIGHT}" '
            f'fill="{colors[value >= 0]}"/>'
            f'<path d="M{zero:.1f} 0V{BAR_HEIGHT}" stroke="#888"/>'
            f'<text x="{BAR + 6}" y="11">{value:.3g}</text></svg>')
