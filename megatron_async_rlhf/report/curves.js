"use strict";
/* Curves of metrics over steps or over time, any number of runs in each, with uPlot. */

const FIRST_CHOICE = ["reward", "held-out reward", "kl_to_reference", "response_length", "reward_margin", "entropy", "loss", "held-out loss", "staleness/mean"];
const PANELS = 6;

function showCurves(target, data) {
  const view = { x: "step", smoothing: 1 };
  for (const run of data.runs) run.secondsOf = new Map(run.steps.map((step, i) => [step, run.seconds[i]]));
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  const chosen = [...FIRST_CHOICE.filter((name) => names.includes(name)), ...names].filter((n, i, all) => all.indexOf(n) === i).slice(0, PANELS);
  const grid = element("div", { class: "panels" });
  const panels = chosen.map((name) => curvePanel(grid, data, names, name, view));
  const again = () => panels.forEach((panel) => panel());
  const over = element("select", { onchange: (event) => { view.x = event.target.value; again(); } },
    ...[["step", "steps"], ["seconds", "seconds of the RL loop"]].map(([value, label]) => element("option", { value }, label)));
  const smoothing = element("select", { onchange: (event) => { view.smoothing = Number(event.target.value); again(); } },
    ...[1, 5, 10, 20, 50, 100].map((n) => element("option", { value: n }, n === 1 ? "none" : `mean of ${n} steps`)));
  target.append(
    element("div", { class: "bar" }, element("label", {}, "over", over), element("label", {}, "smoothing", smoothing),
      element("span", { class: "faint" }, "Drag over a part to enlarge it, double-click for the whole.")),
    grid);
}

/** A panel with a choice of metric; returns what draws it again. */
function curvePanel(grid, data, names, first, view) {
  const plot = element("div", { class: "plot" });
  const meaning = element("p", { class: "faint meaning" });
  const choice = element("select", { "aria-label": "metric", onchange: () => draw() },
    ...names.map((name) => element("option", { value: name, selected: name === first }, name)));
  grid.append(element("section", { class: "panel" }, choice, plot, meaning));
  let chart = null;
  function draw() {
    const metric = choice.value;
    const [unit, about] = data.meanings[metric] || ["", ""];
    meaning.textContent = [unit && unit !== "-" ? `${unit}: ` : "", about].join("");
    chart?.destroy();
    plot.replaceChildren();
    const columns = data.runs.map((run) => curve(run, metric, view));
    const joined = uPlot.join(columns);
    const axis = { stroke: themed("--faint"), grid: { stroke: themed("--line"), width: 1 }, ticks: { stroke: themed("--line"), width: 1 } };
    chart = new uPlot({
      width: Math.max(160, plot.clientWidth), height: 220,
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 34 }, { ...axis, size: 62, values: (_, ticks) => ticks.map(shown) }],
      cursor: { drag: { x: true, y: false } },
      legend: { live: true },
      series: [
        { label: view.x, value: (_, v) => shown(v) },
        ...data.runs.map((run, i) => ({
          label: run.name, stroke: COLOURS[i % COLOURS.length], width: 1.5, spanGaps: true,
          points: { show: columns[i][0].length < 40 }, value: (_, v) => shown(v),
        })),
      ],
    }, joined, plot);
  }
  redrawn(plot, draw);
  return draw;
}

/** Places and values of a run's metric, smoothed. */
function curve(run, metric, view) {
  const points = run.curves[metric] || { step: [], value: [] }, steps = points.step || run.steps;
  const places = view.x === "step" ? steps : steps.map((step) => (step ? run.secondsOf.get(step) : 0));
  const values = view.smoothing > 1 && steps.length > 40 ? movingMean(points.value, view.smoothing) : points.value;
  return [places, values];
}

/** Over the last n known values of each place. */
function movingMean(values, n) {
  const last = [];
  let sum = 0;
  return values.map((value) => {
    if (value == null) return null;
    last.push(value);
    sum += value;
    if (last.length > n) sum -= last.shift();
    return sum / last.length;
  });
}

const shown = (value) => (value == null ? "–" : Number(value.toPrecision(5)).toString());
