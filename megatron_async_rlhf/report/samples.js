"use strict";
/* What policies answered: searched, sorted, and two answers to one prompt beside each other, word by word. */

const AT_ONCE = 20;

function showSamples(target, data) {
  const runs = data.runs.filter((run) => run.samples.length);
  if (!runs.length) {
    target.append(element("p", { class: "faint" }, "These runs have kept no samples (telemetry.samples_per_step)."));
    return;
  }
  const view = { run: runs[0], when: "", search: "", order: "as sampled", count: AT_ONCE };
  const list = element("div"), found = element("span", { class: "faint" });
  const when = element("select", { onchange: (event) => { view.when = event.target.value; again(); } });
  const fillWhen = () => {
    const whens = [...new Set(view.run.samples.map((entry) => whenOf(entry)))];
    when.replaceChildren(...["", ...whens].map((value) => element("option", { value }, value || "any")));
    view.when = "";
  };
  const again = (count = AT_ONCE) => { view.count = count; list.replaceChildren(...listed(view, found, () => again(view.count + AT_ONCE))); };
  target.append(
    element("div", { class: "bar" },
      runs.length > 1 ? element("label", {}, "run", element("select", { onchange: (event) => { view.run = runs[event.target.value]; fillWhen(); again(); } },
        ...runs.map((run, i) => element("option", { value: i }, run.name)))) : null,
      element("label", {}, "when", when),
      element("label", {}, "order", element("select", { onchange: (event) => { view.order = event.target.value; again(); } },
        ...["as sampled", "best reward first", "worst reward first", "largest spread first"].map((order) => element("option", {}, order)))),
      element("label", {}, "search", element("input", { type: "search", oninput: (event) => { view.search = event.target.value.toLowerCase(); again(); } })),
      found),
    list);
  fillWhen();
  again();
}

const whenOf = (entry) => (entry.source === "training" ? entry.when : `held out, ${entry.when}`);
const best = (entry) => Math.max(...entry.rewards);
const worst = (entry) => Math.min(...entry.rewards);
const ORDERS = {
  "best reward first": (a, b) => best(b) - best(a),
  "worst reward first": (a, b) => worst(a) - worst(b),
  "largest spread first": (a, b) => best(b) - worst(b) - (best(a) - worst(a)),
};

function listed(view, found, more) {
  let entries = view.run.samples.filter((entry) => (!view.when || whenOf(entry) === view.when)
    && (!view.search || [entry.prompt, ...entry.completions].some((text) => text.toLowerCase().includes(view.search))));
  if (ORDERS[view.order]) entries = [...entries].sort(ORDERS[view.order]);
  found.textContent = `${entries.length.toLocaleString("en")} prompts`;
  const shown = entries.slice(0, view.count).map((entry) => card(entry, view.run));
  if (entries.length > view.count) shown.push(element("button", { type: "button", onclick: more }, "more"));
  return shown;
}

function card(entry, run) {
  const others = run.samples.filter((one) => one !== entry && one.source === entry.source && one.prompt === entry.prompt);
  const answers = element("div", { class: "answers" });
  const show = (other) => answers.replaceChildren(...entry.completions.map((text, i) => answer(entry, i, other)));
  const beside = others.length ? element("select", { "aria-label": "compare with", onchange: (event) => show(others[event.target.value]) },
    element("option", { value: "" }, "compare with ..."), ...others.map((other, i) => element("option", { value: i }, whenOf(other)))) : null;
  show();
  return element("article", { class: "sample" },
    element("div", { class: "bar" }, element("strong", {}, whenOf(entry)), beside),
    element("pre", { class: "prompt" }, entry.prompt), answers);
}

/** One completion; against the one in its place of another entry, with what was added and what is gone marked. */
function answer(entry, i, other) {
  const parts = Object.entries(entry.scores?.[i] || {}).map(([name, value]) => `${name} ${Number(value.toPrecision(4))}`);
  const facts = [`reward ${Number(entry.rewards[i].toPrecision(4))}`, ...parts,
    entry.versions?.[i]?.length ? `version ${entry.versions[i].join(", ")}` : null, entry.finished?.[i] === false ? "cut off" : null];
  const text = element("pre");
  if (other && other.completions[i] !== undefined) {
    facts.push(`${whenOf(other)}: reward ${Number(other.rewards[i].toPrecision(4))}`);
    for (const [kind, words] of difference(other.completions[i], entry.completions[i]))
      text.append(kind === "same" ? words : element(kind === "added" ? "ins" : "del", {}, words));
  } else text.append(entry.completions[i]);
  return element("div", { class: "answer" }, element("p", { class: "faint" }, facts.filter(Boolean).join(" · ")), text);
}

/** Words of two texts in order: in both, only in the second, only in the first (longest common subsequence). */
function difference(before, after) {
  const a = before.split(/(?<=\s)/), b = after.split(/(?<=\s)/);
  if (a.length * b.length > 4e6) return [["removed", before], ["added", after]];
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--) common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const parts = [];
  const push = (kind, word) => (parts.at(-1)?.[0] === kind ? (parts.at(-1)[1] += word) : parts.push([kind, word]));
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { push("same", b[j]); i++; j++; }
    else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) push("removed", a[i++]);
    else push("added", b[j++]);
  }
  return parts;
}
