"use strict";
/* What every process did when: a lane each, drawn on a canvas, with the share of the visible time in which it did nothing. */

const ROW = 18, GAP = 4, RULER = 24;

function showTimeline(target, data) {
  const runs = data.runs.filter((run) => run.timeline);
  if (!runs.length) {
    target.append(element("p", { class: "faint" }, "None of these runs has a timeline yet; it is written when a run ends."));
    return;
  }
  const canvas = element("canvas", { tabindex: 0, "aria-label": "timeline" });
  const legend = element("p", { class: "bar faint" });
  const about = element("p", { class: "faint about" }, "Point at a slice to see what it was.");
  let state = timelineOf(runs[0].timeline);
  const choice = element("select", { "aria-label": "run", onchange: (event) => { state = timelineOf(runs[event.target.value].timeline); draw(); } },
    ...runs.map((run, i) => element("option", { value: i }, run.name)));
  const zoom = (factor, at = 0.5) => {
    const [from, to] = state.view, place = from + at * (to - from), span = Math.min(state.end, Math.max(20, (to - from) * factor));
    const start = Math.min(Math.max(0, place - at * span), state.end - span);
    state.view = [start, start + span];
    draw();
  };
  const shift = (share) => {
    const span = state.view[1] - state.view[0], start = Math.min(Math.max(0, state.view[0] + share * span), state.end - span);
    state.view = [start, start + span];
    draw();
  };
  const button = (label, name, act) => element("button", { type: "button", "aria-label": name, onclick: act }, label);
  target.append(
    element("div", { class: "bar" }, runs.length > 1 ? choice : null,
      button("+", "enlarge", () => zoom(0.5)), button("−", "shrink", () => zoom(2)),
      button("←", "earlier", () => shift(-0.5)), button("→", "later", () => shift(0.5)),
      button("training", "training", () => { state.view = state.loop; draw(); }),
      button("whole run", "whole run", () => { state.view = [0, state.end]; draw(); }),
      element("span", { class: "faint" }, "Wheel: enlarge. Drag: move. Grey numbers: the share of the visible time in which a lane did nothing.")),
    legend, canvas, about);
  const draw = () => {
    legend.replaceChildren(...state.kinds.map((kind, i) => element("span", {},
      element("i", { class: "swatch", style: `background: ${COLOURS[i % COLOURS.length]}` }), kind)));
    drawTimeline(canvas, state);
  };
  redrawn(canvas, draw);

  let dragged = null;
  const left = () => labelWidth(canvas);
  const share = (event) => Math.max(0, (event.offsetX - left()) / (canvas.clientWidth - left()));
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8, share(event)); }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { dragged = event.offsetX; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { dragged = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (dragged !== null) {
      shift((dragged - event.offsetX) / (canvas.clientWidth - left()));
      dragged = event.offsetX;
    }
    about.textContent = sliceAt(state, canvas, event.offsetX, event.offsetY) || "Point at a slice to see what it was.";
  });
  canvas.addEventListener("keydown", (event) => {
    const act = { "+": () => zoom(0.5), "-": () => zoom(2), ArrowLeft: () => shift(-0.2), ArrowRight: () => shift(0.2) }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
}

/** Columns made absolute: begin and end of every slice in ticks, how deep it is in others, and the rows of each lane. */
function timelineOf(timeline) {
  if (timeline.ready) return timeline.ready;
  let end = 1, top = RULER;
  const lanes = timeline.lanes.map((lane) => {
    const count = lane.kind.length, from = new Float64Array(count), to = new Float64Array(count), depth = new Uint8Array(count);
    const around = [];
    let at = 0, deepest = 0, longest = 0;
    for (let i = 0; i < count; i++) {
      at += lane.gap[i];
      from[i] = at;
      to[i] = at + lane.ticks[i];
      while (around.length && around[around.length - 1] <= at) around.pop();
      depth[i] = around.length;
      around.push(to[i]);
      deepest = Math.max(deepest, depth[i]);
      longest = Math.max(longest, lane.ticks[i]);
      end = Math.max(end, to[i]);
    }
    const place = { ...lane, from, to, depth, longest, top, height: (deepest + 1) * ROW };
    top += place.height + GAP;
    return place;
  });
  const loop = timeline.loop[1] > timeline.loop[0] ? timeline.loop : [0, end];
  timeline.ready = { lanes, kinds: timeline.kinds, tick: timeline.tick_us / 1e6, end, height: top, loop, view: loop };
  return timeline.ready;
}

const labelWidth = (canvas) => (canvas.clientWidth < 600 ? 92 : 190);

function drawTimeline(canvas, state) {
  const width = canvas.clientWidth, height = state.height, left = labelWidth(canvas), scale = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d"), [from, to] = state.view, perTick = (width - left) / (to - from);
  pen.scale(scale, scale);
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  drawRuler(pen, state, left, width, height, perTick);
  for (const lane of state.lanes) {
    pen.fillStyle = themed("--panel");
    pen.fillRect(left, lane.top, width - left, lane.height);
    const busy = drawLane(pen, lane, from, to, left, perTick);
    pen.fillStyle = themed("--ink");
    const name = lane.name === lane.process ? lane.name : `${lane.process} ${lane.name}`;
    pen.fillText(fitting(pen, name, left - 46), 0, lane.top + lane.height / 2);
    pen.fillStyle = themed("--faint");
    pen.textAlign = "right";
    pen.fillText(`${Math.round(100 * (1 - busy / (to - from)))} %`, left - 6, lane.top + lane.height / 2);
    pen.textAlign = "left";
  }
}

/** The visible slices; returns the ticks in which the lane did anything. */
function drawLane(pen, lane, from, to, left, perTick) {
  let busy = 0, until = from;
  const drawn = [];  // of each depth: the pixel up to which it is drawn
  for (let i = firstAfter(lane.from, from - lane.longest); i < lane.from.length && lane.from[i] < to; i++) {
    if (lane.to[i] <= from) continue;
    const start = Math.max(from, lane.from[i]), end = Math.min(to, lane.to[i]);
    if (end > until) { busy += end - Math.max(start, until); until = end; }
    const x = left + (start - from) * perTick, wide = Math.max(1, (end - start) * perTick), row = lane.depth[i];
    if (x + wide <= (drawn[row] ?? -1)) continue;  // nothing of it would be seen
    drawn[row] = x + wide;
    pen.fillStyle = COLOURS[lane.kind[i] % COLOURS.length];
    pen.fillRect(x, lane.top + row * ROW + 1, wide > 3 ? wide - 0.5 : wide, ROW - 2);
  }
  return busy;
}

function drawRuler(pen, state, left, width, height, perTick) {
  const [from, to] = state.view, seconds = (to - from) * state.tick;
  const rough = seconds / Math.max(2, (width - left) / 90), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  pen.strokeStyle = themed("--line");
  pen.fillStyle = themed("--faint");
  for (let at = Math.ceil((from * state.tick) / step) * step; at <= to * state.tick; at += step) {
    const x = left + (at / state.tick - from) * perTick;
    pen.beginPath();
    pen.moveTo(x, RULER - 6);
    pen.lineTo(x, height);
    pen.stroke();
    const label = `${Number(at.toPrecision(6))} s`;
    if (x + pen.measureText(label).width < width) pen.fillText(label, x, 9);
  }
}

/** What the pointer is on, in words. */
function sliceAt(state, canvas, x, y) {
  const left = labelWidth(canvas), [from, to] = state.view, at = from + ((x - left) / (canvas.clientWidth - left)) * (to - from);
  const lane = state.lanes.find((one) => y >= one.top && y < one.top + one.height);
  if (!lane || x < left) return "";
  const row = Math.floor((y - lane.top) / ROW), near = (to - from) / (canvas.clientWidth - left);
  let found = -1;
  for (let i = firstAfter(lane.from, at - lane.longest - near); i < lane.from.length && lane.from[i] <= at + near; i++)
    if (lane.depth[i] === row && lane.to[i] >= at - near) found = i;
  if (found < 0) return "";
  const seconds = (ticks) => (ticks * state.tick).toFixed(3);
  const name = [state.kinds[lane.kind[found]], lane.number[found]].filter(Boolean).join(" ");
  return [`${lane.process}: ${name}`, `${seconds(lane.to[found] - lane.from[found])} s from ${seconds(lane.from[found])} s on`, lane.about[found]].filter(Boolean).join(", ");
}

/** The first place in a rising column whose value is at least this. */
function firstAfter(column, value) {
  let low = 0, high = column.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (column[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

function fitting(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  while (text && pen.measureText(`${text}…`).width > width) text = text.slice(0, -1);
  return `${text}…`;
}
