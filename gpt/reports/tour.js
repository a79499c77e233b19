"use strict";
/* The tour: attention maps, the scores of one token, the logit lens, the steps of the cache. */
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** A new element; children are nodes or texts, never HTML. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A style variable of the page as it is now, light or dark. */
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Paint now, and again when the color scheme or the width changes. */
function keepPainted(paint) {
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; paint(); } });
}

/** Buttons of which one is chosen, by a click or, when one has the focus, the arrow keys. */
function choose(buttons, across, picked) {
  const select = (i, focus) => {
    buttons.forEach((button, j) => {
      button.setAttribute("aria-checked", String(i === j));
      button.tabIndex = i === j ? 0 : -1;
    });
    if (focus) buttons[i].focus();
    picked(i);
  };
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across };
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => select(i));
    button.addEventListener("keydown", (event) => {
      if (!(event.key in moves)) return;
      event.preventDefault();
      const next = i + moves[event.key];
      if (next >= 0 && next < buttons.length) select(next, true);
    });
  });
  return select;
}

/** Numbers packed by tour.py: their shape, and `at(i)`, `row(i, n)` in flat order. */
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const at = (i) => packed.low + view.getUint16(2 * i, true) * packed.width / 65535;
  return { shape: packed.shape, at, row: (i, n) => Array.from({ length: n }, (_, j) => at(i + j)) };
}
const [q, k, v, mix, scores, weights] = ["q", "k", "v", "mix", "scores", "weights"].map((name) => unpack(data[name]));
const [L, P, N, H] = q.shape, K = k.shape[1], T = data.prefilled;
const lensProbs = unpack(data.lens.probs);
const picked = { layer: 0, head: 0, token: Math.floor((T - 1) * 2 / 3), key: 0 };

const entry = (map, layer, head, query, key) => map.at(((layer * N + head) * P + query) * P + key);
const exists = (query, key) => query < T ? key < T : key <= query;  // a key read in that call or before
const percent = (p) => p >= 0.001 ? (100 * p).toFixed(1) + " %" : p > 0 ? p.toExponential(0) : "0";
const quote = (i) => `${data.tokens[i][0]} (${i})`;

function chip(text, half, whole, more = "") {
  const node = make("span", { class: `chip${half ? " bytes" : ""}${more}` }, text);
  if (whole) node.title = `part of ${whole}`;
  return node;
}

/** The key with the largest weight for the picked token. */
function strongest() {
  let best = 0;
  const share = (key) => entry(weights, picked.layer, picked.head, picked.token, key);
  for (let key = 1; key <= picked.token; key++) if (share(key) > share(best)) best = key;
  return best;
}

/** The head to begin with: where the picked token gives its largest weight to an earlier token. */
function mostPointed() {
  let best = 0, most = -1;
  for (let i = 0; i < L * N; i++) {
    for (let key = 1; key < picked.token; key++) {
      const share = weights.at((i * P + picked.token) * P + key);
      if (share > most) [best, most] = [i, share];
    }
  }
  return best;
}

/* Tokens */
let pointedKey = null;  // the key under the pointer, when moving there also changes the query
const buttons = data.tokens.map(([text, half, whole], i) => {
  const kind = `chip${half ? " bytes" : ""}${i >= T ? " sampled" : ""}`;
  const node = make("button", { type: "button", role: "radio", class: kind }, text);
  if (whole) node.title = `part of ${whole}`;
  $("tokens").append(node);
  return node;
});
const pickToken = choose(buttons, 1, (i) => {
  const box = $("tokens"), button = buttons[i];  // scroll to it if there are several lines
  box.scrollTop = button.offsetTop - (box.clientHeight - button.offsetHeight) / 2;
  picked.token = i;
  picked.key = pointedKey ?? strongest();
  show();
});

/* Heads */
const thumbs = [];
$("heads").style.gridTemplateColumns = `auto repeat(${N}, minmax(0, 1fr))`;
for (let layer = 0; layer < L; layer++) {
  $("heads").append(make("span", { class: "layer" }, L > 9 ? String(layer + 1) : `layer ${layer + 1}`));
  for (let head = 0; head < N; head++) {
    const label = `layer ${layer + 1}, head ${head + 1}`;
    const canvas = make("canvas", { width: P, height: P });
    const button = make("button", { type: "button", role: "radio", class: "thumb", "aria-label": label, title: label }, canvas);
    $("heads").append(button);
    thumbs.push(button);
  }
}
const pickHead = choose(thumbs, N, (i) => {
  picked.layer = Math.floor(i / N);
  picked.head = i % N;
  picked.key = strongest();
  show();
});

const shade = (weight) => Math.sqrt(weight);  // faint shares stay visible
function paintThumbs() {
  const rgb = style("--accent-rgb").split(",").map(Number);
  thumbs.forEach((button, i) => {
    const canvas = button.firstChild, context = canvas.getContext("2d");
    const image = context.createImageData(P, P);
    for (let cell = 0; cell < P * P; cell++) {
      const alpha = Math.round(255 * shade(weights.at(i * P * P + cell)));
      image.data.set([...rgb, alpha], 4 * cell);
    }
    context.putImageData(image, 0, 0);
  });
}

/* The large map */
const map = $("map");
let place = { left: 0, top: 0, size: 1 };
function paintMap() {
  const ratio = devicePixelRatio || 1, width = map.parentElement.clientWidth;
  const label = Math.min(110, width * 0.28);
  let size = (width - label - 2) / P;
  const labels = size >= 9;
  if (!labels) size = (width - 2) / P;
  size = Math.min(size, 44);
  place = { left: labels ? label : 0, top: labels ? label * 0.8 : 0, size };
  const height = place.top + size * P + 2;
  map.width = Math.round(width * ratio);
  map.height = Math.round(height * ratio);
  map.style.height = `${height}px`;
  const pen = map.getContext("2d");
  pen.scale(ratio, ratio);
  const { left, top } = place, rgb = style("--accent-rgb");
  pen.fillStyle = style("--raised");
  pen.fillRect(left, top, size * P, size * P);
  for (let query = 0; query < P; query++) {
    for (let key = 0; key <= query; key++) {
      pen.fillStyle = style2(rgb, entry(weights, picked.layer, picked.head, query, key));
      pen.fillRect(left + key * size, top + query * size, size - (size > 8 ? 1 : 0), size - (size > 8 ? 1 : 0));
    }
  }
  pen.strokeStyle = style("--warm");
  if (P > T) {  // below this line: decode steps
    pen.setLineDash([4, 3]);
    pen.strokeRect(left, top + T * size, size * P, 0);
    pen.setLineDash([]);
  }
  pen.strokeStyle = style("--ink");
  pen.strokeRect(left, top + picked.token * size, size * (picked.token + 1), size);
  pen.lineWidth = 2;
  pen.strokeRect(left + picked.key * size, top + picked.token * size, size, size);
  if (labels) paintLabels(pen, label, size);
}
const style2 = (rgb, weight) => `rgba(${rgb}, ${shade(weight).toFixed(3)})`;

function paintLabels(pen, room, size) {
  pen.font = `${Math.min(12, size * 0.85)}px ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace`;
  pen.textBaseline = "middle";
  const clip = (text, most) => text.length > most ? text.slice(0, most - 1) + "…" : text;
  for (let i = 0; i < P; i++) {
    pen.fillStyle = style(i === picked.token ? "--ink" : "--soft");
    pen.textAlign = "right";
    pen.fillText(clip(data.tokens[i][0], 14), place.left - 5, place.top + (i + 0.5) * size, room - 6);
    pen.fillStyle = style(i === picked.key ? "--ink" : "--soft");
    pen.save();
    pen.translate(place.left + (i + 0.5) * size, place.top - 5);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "left";
    pen.fillText(clip(data.tokens[i][0], 12), 0, 0, place.top - 6);
    pen.restore();
  }
}

function sayCell() {
  const { layer, head, token, key } = picked;
  const share = percent(entry(weights, layer, head, token, key));
  $("cell").textContent = `Layer ${layer + 1}, head ${head + 1}: ${quote(token)} gives ${share} of its attention to ${quote(key)}.`;
  $("parts").textContent = P > T ? "Rows below the dashed line were read by decode steps, one at a time." : "";
}

function cellAt(event) {
  const box = map.getBoundingClientRect();
  const key = Math.floor((event.clientX - box.left - place.left) / place.size);
  const token = Math.floor((event.clientY - box.top - place.top) / place.size);
  return token >= 0 && token < P && key >= 0 && key <= token ? { token, key } : null;
}
function moveTo(cell) {
  if (!cell || (cell.token === picked.token && cell.key === picked.key)) return;
  const other = cell.token !== picked.token;
  picked.key = pointedKey = cell.key;
  if (other) pickToken(cell.token); else { paintMap(); sayCell(); markKey(); }
  pointedKey = null;
}
map.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") moveTo(cellAt(event)); });
map.addEventListener("pointerdown", (event) => moveTo(cellAt(event)));
map.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!move) return;
  event.preventDefault();
  const token = Math.max(0, Math.min(P - 1, picked.token + move[0]));
  moveTo({ token, key: Math.max(0, Math.min(token, picked.key + move[1])) });
});

/* The scores of one query */
/** Numbers as a strip of colours: one hue below zero, another above. */
function strip(values, most) {
  const canvas = make("canvas", { class: "strip", width: values.length, height: 1, role: "img" });
  canvas.setAttribute("aria-label", values.map((x) => x.toFixed(2)).join(" "));
  canvas.style.width = `${innerWidth < 480 ? 48 : Math.max(90, Math.min(3 * values.length, 200))}px`;
  const image = canvas.getContext("2d").createImageData(values.length, 1);
  const cold = style("--accent-rgb").split(",").map(Number), warm = style("--warm-rgb").split(",").map(Number);
  values.forEach((x, i) => image.data.set([...(x < 0 ? cold : warm), Math.round(255 * shade(Math.min(1, Math.abs(x) / most)))], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
const largest = (...lists) => lists.flat().reduce((most, x) => Math.max(most, Math.abs(x)), 1e-6);

function showScores() {
  const { layer, head, token } = picked, kvHead = Math.floor(head / data.groups);
  const vectors = (array, s) => array.row(((layer * K + kvHead) * P + s) * H, H);
  const query = q.row(((layer * P + token) * N + head) * H, H);
  const slots = Array.from({ length: P }, (_, s) => s).filter((s) => exists(token, s));
  const keys = slots.map((s) => vectors(k, s)), values = slots.map((s) => vectors(v, s));
  const most = { k: largest(...keys), v: largest(...values) };
  $("question").textContent = `Layer ${layer + 1}, head ${head + 1}: where does ${quote(token)} look?`;
  $("query").replaceChildren(make("p", {}, `the query q of ${quote(token)}, ${H} numbers: `), strip(query, largest(query)));
  const names = ["token", "key k", "q·k", "q·k / √H", "after mask", "softmax", "value v"];
  const head_ = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  const rows = [];
  for (const s of slots) {
    const raw = entry(scores, layer, head, token, s), seen = s <= token;
    const scaled = raw / Math.sqrt(H), share = entry(weights, layer, head, token, s);
    const bar = make("span", { class: "bar", style: `width:${((innerWidth < 480 ? 2 : 6) * share).toFixed(2)}em` });
    const cells = [chip(...data.tokens[s]), strip(keys[s], most.k), raw.toFixed(2), scaled.toFixed(2),
      seen ? scaled.toFixed(2) : "−∞", seen ? make("span", {}, bar, percent(share)) : "0", strip(values[s], most.v)];
    const kind = !seen ? "hidden" : s === token ? "self" : "";
    rows.push(make("tr", { class: kind, "data-key": s }, ...cells.map((cell) => make("td", { class: "cell" }, cell))));
  }
  $("scores").replaceChildren(make("table", {}, make("thead", {}, head_), make("tbody", {}, ...rows)));
  $("answer").replaceChildren(make("p", {}, `the output of this head for ${quote(token)}: the sum of the values, weighted by softmax: `),
    strip(mix.row(((layer * P + token) * N + head) * H, H), most.v));
  markKey();
}
function markKey() {
  for (const row of $("scores").querySelectorAll("tbody tr")) {
    row.style.outline = Number(row.dataset.key) === picked.key ? "1px solid var(--accent)" : "";
  }
}

/* The logit lens */
function showLens() {
  const [rows, , top] = lensProbs.shape, next = data.following[picked.token];
  $("predicts").textContent = `What follows ${quote(picked.token)}? It was ${data.words[next][0]}.`;
  const names = ["after", ...Array.from({ length: top }, (_, i) => i ? `${i + 1}.` : "likeliest")];
  const body = [];
  for (let i = rows - 1; i >= 0; i--) {
    const layer = data.lens.layers[i];
    const cells = [make("td", {}, layer ? `layer ${layer}` : "embedding")];
    for (let j = 0; j < top; j++) {
      const id = data.lens.ids[i][picked.token][j], p = lensProbs.at((i * P + picked.token) * top + j);
      const cell = make("td", {}, chip(...data.words[id]), " ", make("small", {}, percent(p)));
      cell.style.background = `rgba(var(--accent-rgb), ${(0.6 * p).toFixed(3)})`;
      if (id === next) cell.style.boxShadow = "inset 0 0 0 2px var(--warm)";
      cells.push(cell);
    }
    body.push(make("tr", {}, ...cells));
  }
  const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  $("lens").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

/* Prefill and decode */
const steps = [...document.querySelectorAll(".step")];
const stepButtons = steps.map((step) => {
  const button = make("button", { type: "button", role: "radio" }, step.dataset.name);
  $("steps").append(button);
  return button;
});
const pickStep = choose(stepButtons, 1, (i) => steps.forEach((step, j) => step.classList.toggle("away", i !== j)));

function show() {
  const { layer, head, token } = picked;
  $("picked").textContent = `Shown below: ${quote(token)}, layer ${layer + 1}, head ${head + 1}. Click a token, or move with the arrow keys.`;
  paintMap();
  sayCell();
  showScores();
  showLens();
}
pickHead(mostPointed());
pickToken(picked.token);
pickStep(0);
keepPainted(() => { paintThumbs(); show(); });
