"use strict";
/** What `packed()` put into the element of this id. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** An element with attributes and children; text is never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/** A colour of page.css, as it is now. */
const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Call `draw` now, and again whenever the theme changes or the element gets another width. */
function redrawn(target, draw) {
  let width = 0;
  // In the next frame: what an observer's own call changes in size, browsers report as an error.
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (target.clientWidth !== width) {
      width = target.clientWidth;
      if (width) draw();
    }
  })).observe(target);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

const COLOURS = ["#1f77b4", "#e07b20", "#2a9d4a", "#d1495b", "#8e6cc0", "#8c6d4f", "#d66bb0", "#7a8288"];
