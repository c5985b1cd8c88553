"""Style and script of the picture page, inline parts of one HTML file."""

STYLE = """
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1f2328; --soft: #626a73; --line: #e3e0d8; --bar: #d5dde5; --hit: #8fb8a0;
  --good: #17683a; --part: #80580a; --bad: #ab2c22;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, Charter, "Source Serif 4", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1d2024; --ink: #e6e4df; --soft: #9aa1a9; --line: #32363c; --bar: #39434e; --hit: #3c6b50;
    --good: #79c99a; --part: #ddb260; --bad: #f0948a;
  }
  .curves img { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 var(--sans); }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 44px; }
h1 { font: 500 32px/1.2 var(--serif); letter-spacing: -0.01em; margin: 0; text-wrap: balance; }
.subtitle { color: var(--soft); margin: 8px 0 0; max-width: 68ch; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 28px 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 13px; padding-bottom: 6px; }
th, td { padding: 4px 0 4px 28px; text-align: right; font-weight: 400; white-space: nowrap; }
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--soft); font-size: 13px; line-height: 1.25;
  white-space: normal; max-width: 15ch; border-bottom: 1px solid var(--line); vertical-align: bottom; }
td:nth-child(3) { font-weight: 650; }
.count { color: var(--soft); }
tr.block > * { border-top: 1px solid var(--line); padding-top: 8px; }
tr:has(+ tr.block) > * { padding-bottom: 8px; }
.curves { margin: 32px 0 0; overflow-x: auto; }
.curves img { display: block; width: 100%; min-width: 640px; max-width: 900px; height: auto; border-radius: 6px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 32px 0 0; padding: 12px 0;
  position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); z-index: 1; }
.controls > * { font: inherit; font-size: 14px; color: var(--ink); background: var(--card);
  height: 34px; padding: 0 12px;
  border: 1px solid var(--line); border-radius: 6px; }
.controls button { cursor: pointer; }
.controls button span { color: var(--soft); font-variant-numeric: tabular-nums; }
.controls button[aria-pressed="true"] { background: var(--ink); color: var(--paper); border-color: var(--ink); }
.controls button[aria-pressed="true"] span { color: inherit; }
.controls input { flex: 1 1 150px; min-width: 120px; max-width: 260px; }
.controls output { border: 0; background: none; color: var(--soft);
  line-height: 34px; padding: 0 4px; margin-left: auto; }
:focus-visible { outline: 2px solid #4a86b8; outline-offset: 2px; }
.note, .empty { color: var(--soft); font-size: 13px; margin: 12px 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 18px; margin: 18px 0 60px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; display: flex;
  flex-direction: column; }
article[hidden] { display: none; }
article img { display: block; width: 100%; height: auto; aspect-ratio: 1;
  object-fit: contain; background: var(--line); }
.crisp { image-rendering: pixelated; }
.body { padding: 12px 16px 12px; display: flex; flex-direction: column; flex: 1; }
.mark { margin: 0; font-size: 13px; font-weight: 650; }
.right .mark { color: var(--good); } .partly .mark { color: var(--part); } .wrong .mark { color: var(--bad); }
h2 { font: 500 18px/1.3 var(--serif); margin: 2px 0 10px; overflow-wrap: anywhere; text-wrap: pretty; }
ol { list-style: none; margin: 0 0 10px; padding: 0; font-size: 13px; }
li { position: relative; display: flex; justify-content: space-between; gap: 8px;
  padding: 2px 7px; margin-bottom: 2px; }
li span, li small { position: relative; z-index: 1; }
li span { overflow-wrap: anywhere; }
li i { position: absolute; inset: 0 auto 0 0; width: calc(0.75 * var(--share)); /* a full bar ends before the note */
  min-width: 2px; background: var(--bar); border-radius: 3px; }
li.hit i { background: var(--hit); }
li.hit span { font-weight: 650; }
li small { font-size: inherit; font-variant-numeric: tabular-nums; white-space: nowrap; }
.truth { margin: auto 0 0; font-size: 13px; overflow-wrap: anywhere; }
.said::before { content: "people say "; color: var(--soft); }
.truth span, .tags { color: var(--soft); }
.tags { margin: 2px 0 0; font-size: 12px; }
article.scored { border-top-width: 3px; }
.scored.right { border-top-color: var(--good); } .scored.partly { border-top-color: var(--part); }
.scored.wrong { border-top-color: var(--bad); }
.answer { margin: 0 0 6px; font-weight: 650; overflow-wrap: anywhere; }
.answer span { font-weight: 400; color: var(--soft); }
.answer.other { font-weight: 400; font-size: 13px; }
.answer ~ .truth { padding-top: 4px; }
.texts th, .texts td { text-align: left; white-space: normal; vertical-align: top; font-weight: 400;
  max-width: 46ch; overflow-wrap: anywhere; }
.texts th { overflow-wrap: normal; }
.texts th:first-child { white-space: nowrap; color: var(--soft); }
@media (max-width: 560px) {
  header, main { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; }
  h1 { font-size: 26px; }
  table { font-size: 13px; }
  th, td { padding-left: 9px; }
  thead th { font-size: 11px; max-width: 9ch; }
  .controls { position: static; }
  .cards { grid-template-columns: 1fr; }
}
@media print { .controls { display: none; } article { break-inside: avoid; } }
"""

SCRIPT = """
(() => {
  const cards = [...document.querySelectorAll("article")];
  const buttons = [...document.querySelectorAll("button[data-verdict]")];
  const find = (id) => document.getElementById(id);
  const valueOf = (id) => (find(id) ? find(id).value : "");
  let wanted = "";
  const update = () => {
    const words = valueOf("search").toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      const data = card.dataset;
      const fits = (!wanted || data.verdict === wanted) && (!valueOf("type") || data.type === valueOf("type"))
        && (!valueOf("kind") || data.kind === valueOf("kind")) && words.every((word) => data.text.includes(word));
      card.hidden = !fits;
      shown += fits;
    }
    find("shown").textContent = shown === cards.length ? `${shown} shown` : `${shown} of ${cards.length} shown`;
    document.querySelector(".empty").hidden = shown > 0;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      wanted = button.dataset.verdict;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      update();
    });
  }
  for (const id of ["type", "kind", "search"]) if (find(id)) find(id).addEventListener("input", update);
})();
"""
