"""The style sheet of the pages: light and dark, for paper and for wide and narrow screens.

The eight colours of the series are distinguishable with colour blindness on both backgrounds;
series also differ in their markers.
"""

from __future__ import annotations

__all__ = ["CSS", "NUM_STYLES"]

_LIGHT = ("#2a78d6", "#d95f21", "#138a5f", "#4a3aa7", "#c2307a", "#8a6d00", "#006d77", "#a33b32")
_DARK = ("#5ea3f2", "#f08b52", "#35b58a", "#a79df0", "#ee7fb3", "#d3aa2b", "#4cbcc8", "#ea8177")
NUM_STYLES = len(_LIGHT)


def _colours(palette: tuple[str, ...]) -> str:
    return "".join(f"--c{index}:{colour};" for index, colour in enumerate(palette))


_SERIES = "".join(
    f".line.s{i}{{stroke:var(--c{i})}}.mark.s{i},.bar.s{i}{{fill:var(--c{i})}}"
    for i in range(NUM_STYLES)
)

CSS = f"""
:root{{color-scheme:light dark;--ground:#fbfbfa;--card:#fff;--ink:#1c2126;--soft:#59626b;
--line:#dfe2e5;--grid:#e9ebed;--warn:#8a4b00;--warnground:#fff4e2;{_colours(_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--ground:#14171a;--card:#1b1f23;--ink:#e8eaec;
--soft:#a2abb4;--line:#343b42;--grid:#2a3036;--warn:#f3c078;--warnground:#33270f;
{_colours(_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
main{{max-width:1180px;margin:0 auto;padding:28px 20px 60px}}
h1{{font-size:25px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}}
h2{{font-size:18px;margin:38px 0 10px}}
h3{{font-size:15px;margin:22px 0 8px;overflow-wrap:anywhere}}
p{{margin:6px 0;max-width:75ch}}
.soft,figcaption small,.note{{color:var(--soft)}}
.warn{{background:var(--warnground);color:var(--warn);padding:8px 12px;border-radius:6px}}
.tiles{{display:grid;gap:10px;margin:20px 0;
grid-template-columns:repeat(auto-fill,minmax(min(100%,164px),1fr))}}
.tiles>div{{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:10px 13px}}
.tiles dt{{color:var(--soft);font-size:13px}}
.tiles dd{{margin:0;font-size:18px;font-variant-numeric:tabular-nums}}
.tiles dd small{{display:block;font-size:12.5px;color:var(--soft)}}
.figures{{display:grid;gap:14px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}}
figure{{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:12px 12px 6px;max-width:560px;min-width:0;display:flex;flex-direction:column}}
figcaption{{font-weight:600;font-size:14px;overflow-wrap:anywhere}}
figcaption small{{display:block;font-weight:400;font-size:12.5px}}
.legend{{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:4px 0 2px;padding:0;
font-size:12.5px;color:var(--soft)}}
.legend li{{display:flex;align-items:center;gap:5px;overflow-wrap:anywhere;min-width:0}}
.legend svg{{flex:none}}
figure>svg{{display:block;width:100%;height:auto;margin-top:auto}}
svg text{{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}}
svg .grid{{stroke:var(--grid)}} svg .axis{{stroke:var(--line)}}
svg .line{{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}}
svg .mark{{stroke:transparent;stroke-width:9;paint-order:stroke;pointer-events:all}}
{_SERIES}
.scroll{{overflow-x:auto;max-width:100%;margin:10px 0}}
table{{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}}
caption{{text-align:left;color:var(--soft);padding-bottom:4px}}
th,td{{padding:4px 16px 4px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}}
th{{font-weight:600;color:var(--soft);white-space:nowrap;vertical-align:bottom}}
th.number,td.number{{text-align:right;white-space:nowrap}}
.long,.value{{display:inline-block;max-width:44em;overflow-wrap:anywhere}}
.long{{min-width:15em}} .value{{min-width:9em}}
details{{margin:12px 0}} summary{{cursor:pointer;color:var(--soft)}}
code{{font:13px ui-monospace,"DejaVu Sans Mono",monospace;white-space:nowrap}}
@media print{{body{{background:#fff}} figure,.tiles>div{{break-inside:avoid}}}}
"""
