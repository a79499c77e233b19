/* The report: values read off curves by pointer or arrow keys, runs switched off and on. */

const tell = (value) => {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};
const hidden = new Set();

/** Index of the value in ascending `x` that is nearest to `step`. */
function nearest(x, step) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] < step) low = middle; else high = middle;
  }
  return step - x[low] < x[high] - step ? low : high;
}

function readOff(frame, share) {
  const panel = data[frame.dataset.panel];
  const step = Math.max(0, Math.min(1, share)) * panel.last;
  const shown = panel.curves.filter((curve) => !hidden.has(curve.run));
  if (!shown.length) return;
  const at = shown[0].x[nearest(shown[0].x, step)];
  frame.querySelector(".cross").setAttribute("d", `M${Math.round(at / panel.last * 10000)} 0V10000`);
  const tip = frame.parentElement.querySelector(".tip");
  tip.replaceChildren(`step ${at.toLocaleString("en")}`);
  for (const curve of shown) {
    const i = nearest(curve.x, at);
    const far = Math.abs(curve.x[i] - at) > panel.last / 50 ? ` (at ${curve.x[i].toLocaleString("en")})` : "";
    const swatch = make("span", { class: "swatch", style: `background:var(--run-${curve.run % 8})` });
    tip.append(" ", swatch, curve.label ? curve.label + " " : "", make("b", {}, tell(curve.y[i])), far);
  }
  frame.dataset.at = String(at / panel.last);
}

for (const frame of document.querySelectorAll(".frame")) {
  frame.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    readOff(frame, (event.clientX - box.left) / box.width);
  });
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -0.01, ArrowRight: 0.01, Home: -1, End: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const panel = data[frame.dataset.panel];
    const x = panel.curves.find((curve) => !hidden.has(curve.run))?.x ?? [0];
    const from = Number(frame.dataset.at ?? 1);
    const i = nearest(x, from * panel.last);
    const by = Math.sign(move) * Math.max(1, Math.round(Math.abs(move) * x.length));
    readOff(frame, x[Math.max(0, Math.min(x.length - 1, i + by))] / panel.last);
  });
}

for (const box of document.querySelectorAll(".legend input")) {
  box.addEventListener("change", () => {
    const run = Number(box.dataset.run);
    if (box.checked) hidden.delete(run); else hidden.add(run);
    for (const part of document.querySelectorAll(`svg [data-run="${run}"]`)) {
      part.classList.toggle("away", !box.checked);
    }
  });
}
