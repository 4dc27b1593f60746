"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const xy = new Uint16Array(bytes(data.xy));
const codes = {};
for (const name of ["cluster", "zone", "pack", "layer"]) codes[name] = new Int16Array(bytes(data[name]));
const count = xy.length / 2;
const groups = {
  cluster: data.clusters.map((c, i) => ({ name: String(c.label), colour: data.clusterColours[i], note: c.note, share: c.share })),
  zone: data.zones.map((z) => ({ name: z.name, colour: z.colour, note: z.meaning })),
  pack: data.packs.map((p) => ({ name: p.name, colour: p.colour, note: "" })),
  layer: data.layers.map((l) => ({ name: l.name, colour: l.colour, note: "" })),
};
const canvas = document.getElementById("map");
const select = document.getElementById("by");
const legend = document.getElementById("legend");
const place = document.getElementById("point");
document.getElementById("title").textContent = data.about.title;
document.getElementById("about").textContent = data.about.text;
if (data.packs.length) select.add(new Option("probe pack", "pack"));
if (data.layers.length > 1) select.add(new Option("layer", "layer"));
let by = "cluster";
let alone = null; // the one group that is shown
let view = { x: 0, y: 0, zoom: 1 };

function scale() {
  return (Math.min(canvas.clientWidth, canvas.clientHeight) - 24) / 65535;
}
function toScreen(i) {
  const s = scale() * view.zoom;
  return [(xy[2 * i] - 32767) * s + canvas.clientWidth / 2 + view.x, (32767 - xy[2 * i + 1]) * s + canvas.clientHeight / 2 + view.y];
}
function draw() {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
  const side = Math.max(1.6, Math.min(5, 2 * Math.sqrt(view.zoom)));
  for (const inFront of [false, true]) {
    for (let i = 0; i < count; i++) {
      const code = codes[by][i];
      const lit = alone === null ? code >= 0 : code === alone;
      if (lit !== inFront) continue;
      const [x, y] = toScreen(i);
      context.fillStyle = lit && code >= 0 ? groups[by][code].colour : data.noise;
      context.fillRect(x - side / 2, y - side / 2, side, side);
    }
  }
}
function cell(row, text, kind) {
  const one = row.insertCell();
  one.textContent = text;
  if (kind) one.className = kind;
  return one;
}
function fillLegend() {
  legend.replaceChildren();
  const head = legend.createTHead().insertRow();
  for (const title of [by, "share", ""]) {
    const one = document.createElement("th");
    one.textContent = title;
    head.append(one);
  }
  const body = legend.createTBody();
  const tally = new Map();
  for (const code of codes[by]) tally.set(code, (tally.get(code) || 0) + 1);
  const all = groups[by].map((g, i) => [i, g]);
  all.push([-1, { name: by === "cluster" ? "none" : "other", colour: data.noise, note: "" }]);
  for (const [code, group] of all) {
    const n = tally.get(code) || 0;
    if (!n && code < 0) continue;
    const row = body.insertRow();
    row.className = code === alone ? "pick alone" : "pick";
    row.tabIndex = 0;
    const name = cell(row, "");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.setProperty("background", group.colour);
    name.append(swatch, group.name);
    const share = group.share === undefined ? n / count : group.share;
    cell(row, (100 * share).toFixed(1) + "%", "number");
    cell(row, group.note || "");
    const pick = () => { alone = alone === code ? null : code; fillLegend(); draw(); };
    row.addEventListener("click", pick);
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") pick(); });
  }
}
function near(event) {
  const box = canvas.getBoundingClientRect();
  let best = -1, closest = 100;
  for (let i = 0; i < count; i++) {
    const [x, y] = toScreen(i);
    const d = (x - event.clientX + box.left) ** 2 + (y - event.clientY + box.top) ** 2;
    if (d < closest) { closest = d; best = i; }
  }
  return best;
}
function tell(i) {
  const name = (what) => (codes[what][i] < 0 ? "none" : groups[what][codes[what][i]].name);
  place.textContent = i < 0 ? "" : `${data.keys[i]}\ncluster ${name("cluster")}, zone ${name("zone")}` +
    (data.packs.length ? `, pack ${name("pack")}` : "") + (data.layers.length > 1 ? `, layer ${name("layer")}` : "");
}
let held = null;
canvas.addEventListener("pointerdown", (event) => { held = event; canvas.setPointerCapture(event.pointerId); });
canvas.addEventListener("pointerup", () => { held = null; });
canvas.addEventListener("pointermove", (event) => {
  if (!held) return tell(near(event));
  view.x += event.clientX - held.clientX;
  view.y += event.clientY - held.clientY;
  held = event;
  draw();
});
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const factor = Math.exp(-event.deltaY / 400);
  const box = canvas.getBoundingClientRect();
  const x = event.clientX - box.left - canvas.clientWidth / 2, y = event.clientY - box.top - canvas.clientHeight / 2;
  const zoom = Math.min(200, Math.max(0.5, view.zoom * factor));
  view = { x: x - ((x - view.x) * zoom) / view.zoom, y: y - ((y - view.y) * zoom) / view.zoom, zoom };
  draw();
}, { passive: false });
document.getElementById("reset").addEventListener("click", () => { view = { x: 0, y: 0, zoom: 1 }; alone = null; fillLegend(); draw(); });
select.addEventListener("change", () => { by = select.value; alone = null; fillLegend(); draw(); });
window.addEventListener("resize", draw);
fillLegend();
draw();
