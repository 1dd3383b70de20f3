"""The style sheet of the pages: light and dark, for paper and for wide and narrow screens.

The eight colours of the series differ for normal sight, protanopia and deuteranopia, on both
backgrounds (``tests/report/test_style.py`` has the numbers); series also differ in their markers.
The steps of a heat map differ in lightness, so that they need no hue.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CSS", "DARK", "HEAT_STEPS", "LIGHT", "NUM_STYLES", "Palette"]


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of series, steps of a heat map from low to high, and what lies behind them."""

    series: tuple[str, ...]
    heat: tuple[str, ...]
    ground: str
    card: str
    ink: str
    soft: str

    @property
    def css(self) -> str:
        named = {"ground": self.ground, "card": self.card, "ink": self.ink, "soft": self.soft}
        named |= {f"c{index}": colour for index, colour in enumerate(self.series)}
        named |= {f"h{index}": colour for index, colour in enumerate(self.heat)}
        return "".join(f"--{name}:{colour};" for name, colour in named.items())


LIGHT = Palette(
    series=("#347ee5", "#da6307", "#006241", "#05106f", "#ba3486", "#674900", "#3898be", "#540000"),
    heat=("#eaf2fb", "#cfe1f5", "#aecdec", "#86b4e0", "#5c97d1", "#3a78ba", "#1f589b", "#0b3670"),
    ground="#fbfbfa",
    card="#ffffff",
    ink="#1c2126",
    soft="#59626b",
)
DARK = Palette(
    series=("#6fbbf9", "#db7527", "#2fc596", "#566ff9", "#fff5de", "#e8d44d", "#a7e3f0", "#be4955"),
    heat=("#1c2937", "#223d57", "#2b547c", "#386d9f", "#4f88bd", "#71a5d5", "#9ec5ea", "#d6e9fb"),
    ground="#14171a",
    card="#1b1f23",
    ink="#e8eaec",
    soft="#a2abb4",
)
NUM_STYLES, HEAT_STEPS = len(LIGHT.series), len(LIGHT.heat)

_SERIES = "".join(
    f".line.s{i}{{stroke:var(--c{i})}}.mark.s{i},.bar.s{i}{{fill:var(--c{i})}}"
    for i in range(NUM_STYLES)
) + "".join(f".heat.h{i}{{fill:var(--h{i})}}" for i in range(HEAT_STEPS))

CSS = f"""
:root{{color-scheme:light dark;--line:#dfe2e5;--grid:#e9ebed;--warn:#8a4b00;
--warnground:#fff4e2;{LIGHT.css}}}
@media screen and (prefers-color-scheme:dark){{:root{{--line:#343b42;--grid:#2a3036;
--warn:#f3c078;--warnground:#33270f;{DARK.css}}}}}
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
.figures{{display:grid;gap:14px;margin:0 0 14px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}}
figure{{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:12px 12px 6px;max-width:470px;min-width:0;display:flex;flex-direction:column}}
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
.unseen{{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}}
th,td{{padding:4px 16px 4px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}}
thead th{{font-weight:600;color:var(--soft);white-space:nowrap;vertical-align:bottom}}
thead th.number{{white-space:normal;min-width:5em}}
tbody th{{font-weight:400}} tbody th.words{{min-width:7.5em}}
th.number,td.number{{text-align:right;white-space:nowrap}}
.long,.value{{display:inline-block;max-width:44em;overflow-wrap:anywhere}}
.long{{min-width:15em}} .value{{min-width:9em}}
details{{margin:12px 0}} summary{{cursor:pointer;color:var(--soft)}}
code{{font:13px ui-monospace,"DejaVu Sans Mono",monospace;white-space:nowrap}}
.keys{{display:flex;gap:0;list-style:none;margin:4px 0 6px;padding:0;font-size:11.5px;
color:var(--soft);flex-wrap:wrap;align-items:center}}
.keys li{{display:flex;align-items:center;gap:4px;margin-right:8px}}
.keys svg{{flex:none}} svg .frame{{fill:none;stroke:var(--line)}}
svg .asked{{fill:var(--line)}} svg .group{{fill:var(--grid);stroke:var(--card)}}
svg .group.odd{{fill:var(--line)}} svg .ink{{fill:var(--ink)}}
.sample{{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:10px 13px;margin:12px 0}}
.sample h3{{margin:0 0 6px}}
.sample dl{{display:grid;gap:10px;margin:8px 0 0;
grid-template-columns:repeat(auto-fit,minmax(min(100%,220px),1fr))}}
.sample dt{{color:var(--soft);font-size:12.5px}}
.sample dd,.sample p{{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}}
.sample .right{{border-left:3px solid var(--c2);padding-left:8px}}
@media print{{body{{background:#fff;font-size:12px}} main{{max-width:none;padding:0}}
figure,.tiles>div,.sample,tr{{break-inside:avoid}} h2,summary{{break-after:avoid}}
.scroll{{overflow:visible}} table{{font-size:9.5px}} code{{font-size:8.5px}}
th,td{{padding-right:8px}}
th.number,td.number,thead th{{white-space:normal}}
details::details-content{{content-visibility:visible;display:block}}}}
"""
