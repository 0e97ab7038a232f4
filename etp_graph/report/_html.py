"""Parts of the HTML report: elements with escaped text, charts as inline SVG, and the style sheet."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

LIGHT = {
    "paper": "#ffffff", "ink": "#1f2933", "soft": "#52606d", "rule": "#8592a0", "track": "#d9e0e8",
    "mark": "#1d5fa8", "gone": "#b4540a",
}  # fmt: skip

DARK = {
    "paper": "#14181d", "ink": "#e6eaef", "soft": "#a9b5c1", "rule": "#7b8894", "track": "#333d48",
    "mark": "#6cb0f5", "gone": "#f0a35e",
}  # fmt: skip
"""Colours by role. Against the paper, texts have a contrast of 4.5, marks and rules of 3 (WCAG 2.2, AA)."""

_RULES = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}h2{font-size:1.15rem;margin-top:2.2rem}h3{font-size:1rem}
p{max-width:42rem}.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.75rem;margin:1rem 0;padding:0}
.tiles div{border:1px solid var(--rule);border-radius:.5rem;padding:.6rem .8rem}
.tiles dt{font-size:.85rem;color:var(--soft)}.tiles dd{margin:0;font-size:1.3rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .8rem .35rem 0;text-align:right;border-bottom:1px solid var(--track);white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-weight:600;font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr));gap:1rem}
figure{margin:0}figcaption{font-size:.85rem;overflow-wrap:anywhere}svg{display:block;width:100%}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg .axis{stroke:var(--rule);stroke-width:1}
svg .grid{stroke:var(--track);stroke-width:1}svg .line{stroke:var(--mark);stroke-width:2;fill:none}
svg .mark{fill:var(--mark)}svg .track{fill:var(--track);stroke:var(--rule);stroke-width:1}
svg .gone{fill:none;stroke:var(--gone);stroke-width:1.5}
ol.widths{list-style:none;margin:0;padding:0}.widths li{padding:.25rem 0}
.widths span{display:flex;justify-content:space-between;gap:1rem;font-size:.85rem}
.widths b{font-weight:400;font-family:ui-monospace,monospace;overflow-wrap:anywhere}
.widths i{font-style:normal;color:var(--soft);text-align:right}
details{margin-top:2rem}
dl.facts{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.2rem 1rem;font-size:.85rem}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
"""


class Html(str):
    """Text that is HTML already. :func:`element` escapes every other text."""

    __slots__ = ()


def style() -> Html:
    """Return the style sheet, with light and dark colours that follow the setting of the reader's system."""
    light, dark = (";".join(f"--{name}:{value}" for name, value in each.items()) for each in (LIGHT, DARK))
    roots = f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return element("style", Html(roots + _RULES))


def element(tag: str, *children: str, **attributes: object) -> Html:
    """Return ``<tag attributes>children</tag>``.

    In attribute names ``_`` becomes ``-``, and a final ``_`` is dropped (``class_``).
    """
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for k, v in attributes.items())
    return Html(f"<{tag}{given}>{joined(children)}</{tag}>")


def joined(children: Iterable[str]) -> Html:
    """Join the children; escape those that are not :class:`Html`."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table that scrolls sideways on narrow pages. The first cell of a row is its heading."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [element("tr", element("th", row[0], scope="row"), *(element("td", c) for c in row[1:])) for row in rows]
    whole = element("table", element("thead", top), element("tbody", *body))
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label="stages")


def bar(before: float, after: float, widest: float, *, label: str) -> Html:
    """Return a bar of width ``before``, filled up to ``after``. ``widest`` is the value of a bar of full width."""
    whole, kept = (100 * n / widest if widest else 0.0 for n in (before, after))
    shapes = [element("rect", y="0.5", height=9, width=f"{width:.2f}%", class_=cls)
              for width, cls in ((whole, "track"), (kept, "mark"))]  # fmt: skip
    return element("svg", element("title", label), *shapes, height=10, role="img")


_LEFT, _RIGHT, _TOP, _BOTTOM, _W, _H = 46, 8, 10, 22, 300, 170


def _x(share: float) -> float:
    return round(_LEFT + share * (_W - _LEFT - _RIGHT), 1)


def _y(share: float) -> float:
    return round(_H - _BOTTOM - share * (_H - _TOP - _BOTTOM), 1)


def _shares(values: Sequence[float], low: float, high: float) -> list[float]:
    return [(value - low) / (high - low) for value in values]


def _range(values: Sequence[float], *, zero: bool) -> tuple[float, float]:
    """Return the ends of an axis that holds all values, and zero if ``zero``; the ends always differ."""
    low, high = min(values), max(values)
    low = min(0.0, low) if zero else low
    if high <= low:
        return low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    return (low, high) if zero else (low - 0.05 * (high - low), high + 0.05 * (high - low))


def _frame(low: float, high: float, below: Iterable[Html], text: str) -> list[Html]:
    """Return the title, three horizontal lines with their values, and the elements ``below`` the axis."""
    parts = [element("title", text)]
    for share in (0.0, 0.5, 1.0):
        cls = "axis" if share == 0 else "grid"
        parts.append(element("line", x1=_LEFT, x2=_W - _RIGHT, y1=_y(share), y2=_y(share), class_=cls))
        value = short(low + share * (high - low))
        parts.append(element("text", value, x=_LEFT - 5, y=_y(share) + 4, text_anchor="end"))
    return [*parts, *below]


def short(value: float) -> str:
    """Format a number with three digits: ``0.913``, ``41.6k``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _figure(parts: Iterable[Html], caption: str) -> Html:
    drawing = element("svg", *parts, viewBox=f"0 0 {_W} {_H}", role="img")
    return element("figure", element("figcaption", caption), drawing)


def line_chart(letters: Sequence[str], values: Sequence[float], *, caption: str, zero: bool = False) -> Html:
    """Draw a value for each stage, connected by a line; ``letters`` label the stages below the axis."""
    low, high = _range(values, zero=zero)
    places = [(i + 0.5) / len(values) for i in range(len(values))]
    below = [element("text", t, x=_x(p), y=_H - 6, text_anchor="middle") for t, p in zip(letters, places, strict=True)]
    points = [(_x(p), _y(s)) for p, s in zip(places, _shares(values, low, high), strict=True)]
    text = f"{caption}: " + ", ".join(f"{t} {short(v)}" for t, v in zip(letters, values, strict=True))
    line = element("polyline", points=" ".join(f"{x},{y}" for x, y in points), class_="line")
    dots = [element("circle", cx=x, cy=y, r=3.5, class_="mark") for x, y in points]
    return _figure([*_frame(low, high, below, text), line, *dots], caption)


def scatter(x: Sequence[float], y: Sequence[float], filled: Sequence[bool], *, caption: str) -> Html:
    """Draw points with ``x`` in [0, 1]: dots where ``filled`` is true, else rings."""
    low, high = _range(y, zero=True)
    ends = [(0.0, "0", "start"), (0.5, "distance", "middle"), (1.0, "1", "end")]
    below = [element("text", text, x=_x(at), y=_H - 6, text_anchor=anchor) for at, text, anchor in ends]
    text = f"{caption}: {sum(filled)} of {len(x)} units stayed, norms from {short(min(y))} to {short(max(y))}"
    dots = [
        element("circle", cx=_x(min(max(a, 0.0), 1.0)), cy=_y(b), r=3, class_="mark" if kept else "gone")
        for a, b, kept in zip(x, _shares(y, low, high), filled, strict=True)
    ]
    return _figure([*_frame(low, high, below, text), *dots], caption)
