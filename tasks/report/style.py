"""The page's style sheet: one column that widens, light and dark, nothing loaded from elsewhere."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0; --sheet: #f4f6f8;
  --bar: #3d6ea5; --median: #b3261e; --bad: #a3221b; --bad-sheet: #fcecea; --good: #1d6b3a;
  --p0: #3d6ea5; --p1: #c9772b; --p2: #4f8f5b; --p3: #8a5aa3; --p4: #a8484f; --p5: #7a6a55;
  --p6: #4a8f99; --p7: #6b7280;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e4e8ec; --soft: #9aa5b1; --line: #333a42; --sheet: #1e2329;
    --bar: #6fa3dc; --median: #ff8f84; --bad: #ff9c92; --bad-sheet: #33201f; --good: #7fce9a;
    --p0: #6fa3dc; --p1: #e3a05c; --p2: #7dbd88; --p3: #b98bd0; --p4: #d97b81; --p5: #b3a28a;
    --p6: #78bcc6; --p7: #9aa1ac;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
}
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 4px; }
h3, h2.small { font-size: 1rem; margin: 0 0 8px; }
h2.small { margin-top: 20px; }
p { margin: 0 0 12px; max-width: 72ch; }
section { border-top: 1px solid var(--line); margin-top: 32px; padding-top: 20px; }
a { color: inherit; text-underline-offset: 3px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 12px 0 0;
  padding: 0; }
code, pre, .mono { font-family: var(--mono); font-size: .875em; }
code, .mono { overflow-wrap: anywhere; }
pre { background: var(--sheet); padding: 12px 14px; border-radius: 6px; overflow-x: auto;
  margin: 0 0 16px; line-height: 1.45; }
.lead { font-size: 1.0625rem; max-width: none; }
.soft { color: var(--soft); }
.state { font-weight: 600; }
.state.good { color: var(--good); }
.state.bad { color: var(--bad); }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr));
  gap: 12px 24px; margin: 20px 0 0; }
dl.facts div { min-width: 0; }
dl.facts .wide { grid-column: span 2; }
dt { color: var(--soft); font-size: .875rem; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
dd.wide { font-size: .8125rem; }
dd.big { font-size: 1.375rem; line-height: 1.3; }
.groups { display: grid; gap: 28px; margin-top: 16px; }
.pairs { --side: 128px; display: grid; gap: 18px 14px;
  grid-template-columns: repeat(auto-fill, minmax(calc(2 * var(--side) + 2px), 1fr)); }
.pairs.large { --side: min(174px, calc(50vw - 17px)); }
figure { margin: 0; min-width: 0; }
.pair { display: flex; gap: 2px; }
.pair > * { width: var(--side); height: var(--side); flex: none; display: block;
  background: var(--sheet); object-fit: contain; }
.pair img { image-rendering: pixelated; }
.large .pair img { image-rendering: auto; }
.pair .none { display: grid; place-items: center; color: var(--soft); font-size: .8125rem; }
main:has(#smooth:checked) .pair img { image-rendering: auto; }
.sheet { margin-top: 12px; }
.sheet td, .sheet th { padding: 0 2px 2px 0; border: 0; vertical-align: middle; }
.sheet thead th { padding: 0 4px 4px 0; vertical-align: bottom; white-space: normal; width: 98px; }
.sheet th.key { max-width: 150px; white-space: normal; font-weight: 400; padding-right: 10px; }
.sheet img { display: block; image-rendering: pixelated; background: var(--sheet);
  object-fit: contain; }
.sheet.smooth img, main:has(#smooth:checked) .sheet img { image-rendering: auto; }
figcaption { font-size: .8125rem; line-height: 1.4; margin-top: 4px;
  max-width: calc(2 * var(--side) + 2px);
  display: flex; gap: 10px; justify-content: space-between; }
figcaption .key { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0; }
figcaption .value { font-variant-numeric: tabular-nums; white-space: nowrap; }
label { display: inline-flex; gap: 8px; align-items: center; font-size: .9375rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr));
  gap: 28px; margin-top: 16px; }
.chart { min-width: 0; }
.plot { padding: 6px 6px 22px 48px; }
svg { display: block; overflow: visible; }
svg.stacked { margin: 0 0 12px; border-radius: 4px; overflow: hidden; }
.axis-label { margin: 0; max-width: none; color: var(--soft); font-size: .8125rem; }
.axis-label.x { text-align: right; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .bar { fill: var(--bar); }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg line.median { stroke: var(--median); stroke-width: 2; }
svg text.median { fill: var(--median); stroke: var(--paper); stroke-width: 4px;
  paint-order: stroke; }
svg line.pause { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
svg text.pause { stroke: var(--paper); stroke-width: 4px; paint-order: stroke; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9375rem; min-width: min(100%, 420px); }
th, td { text-align: left; vertical-align: top; padding: 6px 20px 6px 0;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: .875rem; white-space: nowrap; }
th code, td:not(.reason) > code { white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.reason { min-width: 240px; max-width: 640px; overflow-wrap: anywhere; }
td.key { max-width: 320px; min-width: 120px; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px;
  margin-right: 8px; background: currentColor; }
.part-0 { color: var(--p0); } .part-1 { color: var(--p1); } .part-2 { color: var(--p2); }
.part-3 { color: var(--p3); } .part-4 { color: var(--p4); } .part-5 { color: var(--p5); }
.part-6 { color: var(--p6); } .part-7 { color: var(--p7); }
.stacked rect { fill: currentColor; }
footer { padding: 32px 16px 40px; color: var(--soft); font-size: .875rem; }
@media (max-width: 620px) {
  dl.facts { grid-template-columns: 1fr 1fr; gap: 12px 16px; }
  dl.facts .wide { grid-column: 1 / -1; }
}
@media print { nav, label { display: none; } section { break-inside: avoid-page; } }
"""
