"""Curves as plain SVG: no script, no fonts, no network."""

import math
from collections.abc import Callable, Iterable, Mapping
from html import escape

Points = list[tuple[float, float]]


def format_number(value: float) -> str:
    """A number in at most three significant digits where it is small, with thousands separated where it is large."""
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line_chart(title: str, series: Mapping[str, Points], ordered: bool = False, log_scale: bool = True) -> str:
    """An SVG of curves over clips; the vertical axis is logarithmic where the values span it."""
    series = {label: points for label, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    log_scale = log_scale and min(ys) > 0 and max(ys) > 4 * min(ys)
    place: Callable[[float], float] = math.log10 if log_scale else float
    low, high = (place(min(ys)), place(max(ys))) if log_scale else _whole(min(0.0, min(ys)), max(ys))
    span_x, span_y = max(xs) - min(xs) or 1.0, high - low or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return 46 + 500 * (x - min(xs)) / span_x, 196 - 180 * (place(y) - low) / span_y

    marks = ""
    for tick in _log_ticks(low, high) if log_scale else _ticks(low, high):
        y = at(min(xs), tick)[1]
        marks += f"<path class=grid d='M46 {y:.1f}H546' /><text x=40 y={y + 4:.1f} text-anchor=end>{_short(tick)}</text>"
    for tick in _ticks(min(xs), max(xs)):
        marks += f"<text x={at(tick, ys[0])[0]:.1f} y=214 text-anchor=middle>{_short(tick)}</text>"
    legend = ""
    for number, (label, points) in enumerate(series.items()):
        share = 100 * number / max(1, len(series) - 1)
        colour = f"color-mix(in oklab,var(--late) {share:.0f}%,var(--early))" if ordered else f"var(--s{number % 6})"
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in points))
        shape = f"<path d='M{path}' />" if len(points) > 1 else "<circle cx={:.1f} cy={:.1f} r=3 />".format(*at(*points[0]))
        marks += f"<g class=line style='--c:{colour}'>{shape}<title>{escape(label)}</title></g>"
        legend += f"<li style='--c:{colour}'>{escape(label)} <b>{format_number(points[-1][1])}</b></li>"
    name = escape(title)
    return (
        f"<figure class=chart><figcaption>{name}</figcaption><div class=scroll>"
        f"<svg viewBox='0 0 560 236' role=img aria-label='{name}'>{marks}<text x=546 y=232 text-anchor=end>clips</text>"
        f"</svg></div><ul class=legend>{legend}</ul></figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) or 1))
    step = next(step * part for part in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * part) <= 6)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _whole(low: float, high: float) -> tuple[float, float]:
    """The range up to the next tick, so that the highest point has one above it."""
    ticks = _ticks(low, high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return low, (math.ceil(high / step - 1e-9) * step) or 1.0


def _log_ticks(low: float, high: float) -> list[float]:
    parts: Iterable[int] = (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [part * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for part in parts]
    return [tick for tick in ticks if low - 1e-9 <= math.log10(tick) <= high + 1e-9]


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
