"""Knows how to draw the report's figures as SVG text that fits light and dark pages; knows nothing of runs or files.

Every series differs in colour (Okabe and Ito 2008) and also in dash, marker or a number beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, cast

Point = tuple[float, float]

FIGURE_STYLE = """<style>
.bm-figure {--c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8578c; --c4: #b37400; display: block; width: 100%;
  height: auto; font: 12px system-ui, sans-serif; fill: currentColor; overflow: visible;}
@media (prefers-color-scheme: dark) {.bm-figure {--c0: #56b4e9; --c1: #f0803c; --c2: #2cc295; --c3: #e3a0c6;
  --c4: #e69f00;}}
.bm-figure .grid {stroke: currentColor; stroke-opacity: .14;}
.bm-figure .axis {stroke: currentColor; stroke-opacity: .45;}
.bm-figure .soft {fill-opacity: .75;} .bm-figure .head {font-weight: 600;}
.bm-figure .halo text {paint-order: stroke; stroke: var(--paper, Canvas); stroke-width: 4px; stroke-linejoin: round;}
.bm-figure .line {fill: none; stroke-width: 1.8; stroke-linejoin: round;}
.bm-figure .other {fill: none; stroke: currentColor; stroke-opacity: .2;}
.bm-figure .s0 {stroke: var(--c0);} .bm-figure .s1 {stroke: var(--c1); stroke-dasharray: 7 3;}
.bm-figure .s2 {stroke: var(--c2); stroke-dasharray: 2 3;}
.bm-figure .s3 {stroke: var(--c3); stroke-dasharray: 9 3 2 3;}
.bm-figure .s4 {stroke: var(--c4); stroke-dasharray: 4 2;} .bm-figure .f0 {fill: var(--c0);}
.bm-figure .f1 {fill: var(--c1);} .bm-figure .f2 {fill: var(--c2);}
.bm-figure .f3 {fill: var(--c3);} .bm-figure .f4 {fill: var(--c4);}
.bm-figure .cell {fill: var(--c0);} .bm-figure .best {fill: none; stroke: currentColor; stroke-width: 2.5;}
.bm-figures {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.4rem 2rem;}
</style>"""
STYLES = 5  # series that get a colour and a dash of their own


@dataclass(frozen=True, slots=True)
class Series:
    """A line: ``label`` stands at its end; ``style`` 0 to 4 picks colour and dash, None draws it in the background."""

    label: str
    points: Sequence[Point]
    style: int | None = None


def line_chart(title: str, series: Sequence[Series], *, x_label: str) -> str:
    """Lines over a shared x axis, each with its label at its end."""
    width, height, left, right, top, bottom = 440, 260, 48, 34, 28, 38
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    x_ticks, y_ticks = nice_ticks(0, max(xs)), nice_ticks(min(ys), max(ys))
    to_x = _scale(0, max(xs), left, width - right)
    to_y = _scale(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), height - bottom, top)
    body = [_text(left, 12, title, "head")]
    for tick in y_ticks:
        body.append(_rule("grid", left, to_y(tick), width - right, to_y(tick)))
        body.append(_text(left - 6, to_y(tick) + 4, f"{tick:g}", "soft", "end"))
    for tick in x_ticks:
        if tick <= max(xs) and tick == int(tick):
            body.append(_text(to_x(tick), height - bottom + 16, f"{tick:g}", "soft", "middle"))
    body.append(_rule("axis", left, height - bottom, width - right, height - bottom))
    body.append(_text((left + width - right) / 2, height - 4, x_label, "soft", "middle"))
    ends: list[list] = []
    for line in sorted(series, key=lambda line: -math.inf if line.style is None else -line.style):
        path = " ".join(f"{to_x(x)},{to_y(y)}" for x, y in line.points)
        if line.style is None:
            body.append(f'<polyline class="other" points="{path}"/>')
            continue
        body.append(f'<polyline class="line s{line.style}" points="{path}"/>')
        dots: Sequence[Point] = line.points if len(line.points) <= 40 else []
        body += [f'<circle class="f{line.style}" cx="{to_x(x)}" cy="{to_y(y)}" r="2.6"/>' for x, y in dots]
        ends.append([to_y(line.points[-1][1]), to_x(line.points[-1][0]), line])
    for (_, x, line), y in zip(*_spread(ends, height - bottom), strict=True):
        body.append(_text(x + 6, y + 4, line.label, f"f{line.style} head"))
    shown = ", ".join(f"{end[2].label} ends at {end[2].points[-1][1]:.3g}" for end in ends)
    return _svg(width, height, f"{title} against {x_label}: {shown}.", body, widest=600)


def dot_plot(
    rows: Sequence[tuple[str, Mapping[str, float], Point | None]], marks: Sequence[str], *, title: str
) -> str:
    """One row a run: a shape for each named value, and the interval of the first as a bar."""
    width, row, left, right, top = 460, 30, 146, 16, 56
    height = top + row * len(rows) + 30
    values = [value for _, named, _ in rows for value in named.values()]
    values += [edge for *_, interval in rows if interval for edge in interval]
    ticks = nice_ticks(min(values), max(values), 5)
    to_x = _scale(min(ticks[0], min(values)), max(ticks[-1], max(values)), left, width - right)
    body, x = [_text(0, 12, title, "head")], 0
    for number, name in enumerate(marks):
        body.append(_mark(number, x + 6, 34))
        body.append(_text(x + 17, 38, name))
        x += 30 + 7 * len(name)
    for tick in ticks:
        body.append(_rule("grid", to_x(tick), top - 6, to_x(tick), height - 24))
        body.append(_text(to_x(tick), height - 8, f"{tick:g}", "soft", "middle"))
    for number, (label, named, interval) in enumerate(rows):
        y = top + row * number + 6
        body.append(_text(left - 14, y + 4, label, anchor="end"))
        if interval:
            low, high = map(to_x, interval)
            body.append(_rule("axis", low, y, high, y))
            body += [_rule("axis", end, y - 4, end, y + 4) for end in (low, high)]
        for style, name in reversed(list(enumerate(marks))):
            if name in named:  # each a little lower, so that equal values stay visible
                tooltip = f"{label}, {name}: {named[name]:.4f}"
                body.append(_mark(style, to_x(named[name]), y + 5 * style, tooltip))
    text = f"{title}: {len(rows)} rows; the numbers are in the table of ranked runs."
    return _svg(width, height, text, body, 340, 700)


def heat_map(
    x_name: str, y_name: str, cells: Mapping[tuple[float, float], Sequence[float]], *, score: str
) -> str:
    """Mean score of the runs in each cell of a two-parameter grid; darker is higher, the best cell is framed."""
    xs, ys = sorted({x for x, _ in cells}), sorted({y for _, y in cells}, reverse=True)
    means = {key: sum(values) / len(values) for key, values in cells.items()}
    low, high = min(means.values()), max(means.values())
    left, top, wide, tall = 84, 52, 76, 42
    width, height = left + wide * len(xs) + 8, top + tall * len(ys) + 40
    best = max(means, key=lambda key: means[key])
    body = [_text(0, 12, f"{score}, mean of each cell", "head"), _text(0, 38, y_name, "soft")]
    for column, x in enumerate(xs):
        body.append(_text(left + wide * (column + 0.5), height - 22, f"{x:g}", "soft", "middle"))
    for line, y in enumerate(ys):
        body.append(_text(left - 10, top + tall * (line + 0.5) + 4, f"{y:g}", "soft", "end"))
        for column, x in enumerate(xs):
            if (x, y) not in means:
                continue
            share = (means[x, y] - low) / (high - low) if high > low else 1.0
            place = f'x="{left + wide * column + 1}" y="{top + tall * line + 1}" rx="3"'
            place += f' width="{wide - 2}" height="{tall - 2}"'
            body.append(f'<rect class="cell" {place} fill-opacity="{0.06 + 0.6 * share:.3f}"/>')
            if (x, y) == best:
                body.append(f'<rect class="best" {place}/>')
            count = len(cells[x, y])
            label = f"{means[x, y]:.3f}" + (f" ({count})" if count > 1 else "")
            middle = left + wide * (column + 0.5)
            body.append(_text(middle, top + tall * (line + 0.5) + 4, label, anchor="middle"))
    body.append(_text(left + wide * len(xs) / 2, height - 4, x_name, "soft", "middle"))
    text = f"Heat map: best mean {score} {means[best]:.3f} at {x_name} {best[0]:g} and {y_name} {best[1]:g}."
    return _svg(width, height, text, body, 0.85 * width)


def parallel_coordinates(
    axes: Mapping[str, Sequence[float | str]], scores: Sequence[float], *, score: str
) -> str:
    """A line a run through its parameters' values to its score; the five best stand out and carry their rank.

    Args:
        axes: for each parameter its values (numbers, or names), one a run, in the order of ``scores``.
        scores: of the runs, best first.
    """
    step, top, bottom, left = max(124, min(200, 840 // len(axes))), 44, 330, 70
    positions: dict[str, list[Point]] = {}
    body: list[str] = []
    for number, (name, values) in enumerate({**axes, score: scores}.items()):
        x = left + step * number
        place, ticks = _axis(values, bottom, top, logarithmic=name != score)
        # Runs that share a value are fanned out around it, so that lines on top of each other can be told apart.
        fan = [0.0 if name == score else 14 * (0.618 * rank % 1 - 0.5) for rank in range(len(values))]
        positions[name] = [(x, round(place(value) + off, 1)) for value, off in zip(values, fan, strict=True)]
        body.append(_rule("axis", x, top, x, bottom))
        body.append(_text(x, 24 if number % 2 else 10, name, "head", "middle"))
        names = [tick[-14:] if isinstance(tick, str) else f"{tick:g}" for tick in ticks]
        labels = zip(names, ticks, strict=True)
        body += [_text(x - 7, place(tick) + 4, label, "soft", "end") for label, tick in labels]
    lines = list(zip(*positions.values(), strict=True))
    width = left + step * len(axes) + 60
    drawn = []
    for rank, line in reversed(list(enumerate(lines))):
        path = " ".join(f"{x},{y}" for x, y in line)
        if rank < STYLES:
            title = f"<title>rank {rank + 1}: {scores[rank]:.4f}</title>"
            drawn.append(f'<polyline class="line s{rank}" points="{path}">{title}</polyline>')
        else:
            drawn.append(f'<polyline points="{path}"/>')
    faint = max(0.04, min(0.3, 15 / len(lines)))
    drawn.insert(0, f'<g class="other" style="stroke-opacity:{faint:.3f}">')
    drawn.insert(max(1, len(lines) - STYLES + 1), "</g>")
    ends = [[line[-1][1], line[-1][0], rank] for rank, line in enumerate(lines[:STYLES])]
    for (_, x, rank), y in zip(*_spread(ends, bottom), strict=True):
        drawn.append(_text(x + 8, y + 4, f"{rank + 1}", f"f{rank} head"))
    text = f"Parallel coordinates of {len(scores)} runs over {', '.join(axes)}; best {score} {scores[0]:.3f}."
    return _svg(width, bottom + 12, text, [*drawn, '<g class="halo">', *body, "</g>"], 0.8 * width)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that span ``low`` to ``high``.

    >>> nice_ticks(0.02, 0.79)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    size = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= span / count * 0.999)
    return [round(index * size, 12) for index in range(math.floor(low / size), math.ceil(high / size) + 1)]


def _axis(
    values: Sequence[float | str], bottom: float, top: float, *, logarithmic: bool
) -> tuple[Callable[[Any], float], list[Any]]:
    """The place of each value on a vertical axis (by category, logarithmic over a decade, or linear), and ticks."""
    distinct = set(values)
    if any(isinstance(value, str) for value in distinct):
        names = sorted(cast(set[str], distinct))
        slot = _scale(-0.5, len(names) - 0.5, bottom, top)
        return (lambda value: slot(names.index(value))), names
    numbers = cast(set[float], distinct)
    low, high = min(numbers), max(numbers)
    if logarithmic and low > 0 and high / low >= 10:
        slot = _scale(math.log(low), math.log(high), bottom - 8, top + 8)
        place = lambda value: slot(math.log(value))  # noqa: E731
    else:
        place = _scale(low, high, bottom - 8, top + 8)
    ticks = sorted(numbers) if len(numbers) <= 8 else [t for t in nice_ticks(low, high) if low <= t <= high]
    kept: list[float] = []
    for tick in ticks:  # no two labels on top of each other
        if not kept or abs(place(tick) - place(kept[-1])) >= 12:
            kept.append(tick)
    return place, kept


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def _spread(ends: list[list], limit: float, gap: float = 13.0) -> tuple[list[list], list[float]]:
    """Labels' heights in ascending order, moved apart so that none covers another."""
    ordered = sorted(ends, key=lambda end: end[0])
    heights: list[float] = []
    for index, end in enumerate(ordered):
        room = limit - gap * (len(ordered) - 1 - index)
        heights.append(max(min(end[0], room), heights[-1] + gap if heights else 0))
    return ordered, heights


def _mark(style: int, x: float, y: float, title: str = "") -> str:
    shapes = ["M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0", "M-4,-4h8v8h-8z", "M0,-5l5,5l-5,5l-5,-5z"]
    shapes += ["M0,-5l5,9h-10z", "M0,5l5,-9h-10z"]
    tooltip = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="f{style}" transform="translate({x},{y})" d="{shapes[style]}">{tooltip}</path>'


def _rule(classes: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{classes}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def _text(x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{classes}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(
    width: float, height: float, text: str, body: Sequence[str], narrowest: float = 0.0, widest: float = 0.0
) -> str:
    # Below ``narrowest`` the text would be too small to read: the box around the figure scrolls instead.
    size = f"max-width:{widest or width:g}px" + (f";min-width:{narrowest:g}px" if narrowest else "")
    label = escape(text, quote=True)
    return (
        f'<svg class="bm-figure" role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}" style="{size}">'
        f"{''.join(body)}</svg>"
    )
