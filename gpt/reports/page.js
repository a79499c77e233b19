"use strict";
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

/** Call `draw` now, and whenever the colours or the width change. */
function whenever(draw) {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
}

/** Buttons of which one is chosen: by a click, or the arrow keys once one has the focus. */
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
