"use strict";
// The tabs of curves, of time and memory, and of the configuration.

// topic -> patterns of its metrics, in the order of the charts. Metrics without a topic are under "More".
const TOPICS = [
  ["Reward and KL", [/^reward$/, /^eval_reward$/, /^kl$/, /^eval_(?!chosen|rejected)[^/]*_reward$/]],
  ["Loss and accuracy", [/^loss$/, /^eval_([^/]*_)?loss$/, /^critic_loss$/, /^accuracy$/, /^eval_([^/]*_)?accuracy$/]],
  ["Entropy and gradient", [/^entropy$/, /^grad_norm$/, /^lr$/, /^critic_grad_norm$/, /^eval_.*entropy$/]],
  ["Lengths", [/^response_tokens$/, /^truncated$/, /^eval_[^/]*(tokens|truncated)$/]],
  ["Mismatch of engine and learner", [/^mismatch/, /^capped$/, /^clipped$/]],
  ["Parts of the reward, and preferences", [/^reward[_/](?!failed)/, /^shaped_reward/, /^margin$/, /^(chosen|rejected)_reward$/, /^eval_.*(margin|chosen_reward|rejected_reward)$/]],
  ["Other held-out metrics", [/^eval_/]],
  ["Speed", [/^tokens_per_second$/, /^time\/step$/]],
];
const MANY = 15; // charts of a topic; more are hidden until the topic is opened
const INCLUDED = ["step", "switch", "reward"]; // seconds that are parts of other phases, or their sum
const PHASES = { rollout: 0, score: 4, learn: 1, publish: 3, evaluate: 2, other: 7 }; // -> number of the colour

const seconds = (value) => value.toFixed(3);
/** Return seconds as h:mm:ss. */
const clock = (value) => `${Math.floor(value / 3600)}:${new Date(1000 * value).toISOString().slice(14, 19)}`;
const last = (values) => values?.findLast((value) => value !== null);
const first = (values) => values?.find((value) => value !== null);
const mean = (values) => {
  const found = (values ?? []).filter((value) => value !== null);
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null;
};
const most = (values) => (values ?? []).reduce((found, value) => (value !== null && (found === null || value > found) ? value : found), null);

function empty(what, why) {
  return element("div", { class: "empty" }, element("strong", { text: what }), element("p", { text: why }));
}

/** Return a table. A column is [title, whether it has numbers]; a cell is a text or an element. */
function table(columns, rows, kind = "") {
  const cell = (tag, content, i) => element(tag, { class: columns[i][1] ? "number" : "", scope: tag === "th" ? "col" : null }, content);
  return element("div", { class: `scroll ${kind}` }, element("table", {},
    element("thead", {}, element("tr", {}, ...columns.map(([title], i) => cell("th", title, i)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((content, i) => cell("td", content ?? "–", i)))))));
}

const swatch = (run) => {
  const made = element("i", { class: "swatch" });
  made.style.background = run.colour;
  return made;
};
const title = (run) => element("span", { class: "run", title: run.folder }, swatch(run), element("b", { text: visible(run.name) }));

// --- curves

function showNotes(report) {
  const notes = report.runs.flatMap((run) => run.remarks.map((remark) => [run, remark]));
  if (report.cut) notes.push([null, `samples: texts of more than ${report.cut.toLocaleString("en")} characters are cut in this page; out/samples has all of them`]);
  if (!notes.length) return;
  const many = report.runs.length > 1;
  byId("notes").append(element("details", { class: "notes", open: notes.length <= 4 },
    element("summary", { text: `${notes.length} note${notes.length > 1 ? "s" : ""} on missing or shortened data` }),
    element("ul", {}, ...notes.map(([run, text]) => element("li", { text: visible(many && run ? `${run.name}: ${text}` : text) })))));
}

function showSummary(report, charts) {
  showNotes(report);
  const columns = [["Run"], ["Mode"], ["Steps", 1], ["Time, h:mm:ss", 1], ["Tokens/s", 1], ["Reward", 1], ["Held out, first", 1], ["Held out, last", 1], ["KL", 1]];
  const rows = report.runs.map((run) => {
    const m = run.metrics, held = m.eval_reward ?? m[Object.keys(m).find((name) => /^eval_.*(reward|loss)$/.test(name))];
    const spent = (m["time/step"] ?? []).reduce((sum, value) => sum + (value ?? 0), 0);
    const done = run.steps.length ? run.steps[run.steps.length - 1] : 0;
    const toggle = element("input", {
      type: "checkbox", checked: true, "aria-label": `show ${visible(run.name)}`,
      onchange: (event) => ((run.hidden = !event.target.checked), charts.update()),
    });
    const known = run.config.steps && !Number(run.config.epochs); // with epochs, the key steps does not count
    const of = known && run.steps.length ? ` of ${Number(run.config.steps).toLocaleString("en")}` : "";
    return [element("label", { class: "run" }, toggle, title(run)), visible(run.mode) || "–", run.steps.length ? `${done.toLocaleString("en")}${of}` : "–",
      spent ? clock(spent) : "–", shown(mean(m.tokens_per_second)), shown(last(m.reward)),
      shown(first(held)), shown(last(held)), shown(last(m.kl))];
  });
  byId("summary").append(table(columns, rows, "summary"), element("p", { class: "made", text: `Written ${report.made}` }));
  for (const mode of new Set(report.runs.flatMap((run) => Object.keys(run.evaluations)))) {
    const evaluated = report.runs.filter((run) => run.evaluations[mode]);
    const names = [...new Set(evaluated.flatMap((run) => Object.keys(run.evaluations[mode])))];
    byId("summary").append(element("h2", { text: `Mode ${visible(mode)}` }), table([["Metric"], ...evaluated.map((run) => [title(run), 1])],
      names.map((name) => [visible(name), ...evaluated.map((run) => shown(run.evaluations[mode][name]))]), "summary"));
  }
}

function showCurves(report, charts) {
  const names = [...new Set(report.runs.flatMap((run) => Object.keys(run.metrics)))];
  const shownNames = names.filter((name) => !name.startsWith("memory/") && (!name.startsWith("time/") || name === "time/step"));
  const left = new Set(shownNames);
  startControls(charts);
  byId("controls").hidden = !shownNames.length;
  if (!shownNames.length) byId("topics").append(empty("No curves", "metrics.jsonl has no values. A training run writes a line after each step."));
  for (const [topic, patterns] of TOPICS) {
    const found = patterns.flatMap((pattern) => shownNames.filter((name) => left.has(name) && pattern.test(name) && left.delete(name)));
    if (!found.length) continue;
    const heading = found.length > MANY ? `${topic}: ${found.length} metrics` : topic;
    const parts = [element(found.length > MANY ? "summary" : "h2", { text: heading }), grid(found, report, charts)];
    byId("topics").append(...(found.length > MANY ? [element("details", { class: "more" }, ...parts)] : parts));
  }
  if (!left.size) return;
  const more = element("details", { class: "more" }, element("summary", { text: `More: ${left.size} metrics` }));
  more.append(grid([...left].sort(), report, charts));
  byId("topics").append(more);
}

/** Return a grid with a card per metric. */
function grid(names, report, charts) {
  return element("div", { class: "grid" }, ...names.map((name) => {
    const runs = report.runs.filter((run) => run.metrics[name]);
    const place = element("div", { class: "plot", role: "img", "aria-label": `${visible(name)} over the steps` });
    charts.add(place, new LineChart(charts, place, name, runs));
    const values = runs.slice(0, 8).map((run) => element("span", { title: visible(run.name) }, swatch(run), shown(last(run.metrics[name]))));
    return element("figure", {}, element("figcaption", {}, element("b", { text: visible(name) }), element("span", { class: "last" }, ...values)), place);
  }));
}

function startControls(charts) {
  const [from, to, smoothing] = ["from", "to", "smoothing"].map(byId);
  const [least, greatest] = charts.whole;
  charts.zoomed = (low, high) => ([from.value, to.value] = [Math.round(Math.max(low, least)), Math.round(Math.min(high, greatest))]);
  charts.zoomed(...charts.window);
  const typed = () => charts.zoom(Number(from.value), Number(to.value));
  from.addEventListener("change", typed);
  to.addEventListener("change", typed);
  byId("reset").addEventListener("click", () => charts.zoom(...charts.whole));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  let timer;
  smoothing.addEventListener("input", () => {
    charts.smoothing = Number(smoothing.value);
    smoothing.nextElementSibling.textContent = charts.smoothing.toFixed(2);
    clearTimeout(timer);
    timer = setTimeout(() => charts.update(), 30);
  });
}

// --- time and memory

function showResources(report, charts) {
  const place = byId("resources");
  place.append(element("h2", { text: "Seconds by phase" }));
  const timed = report.runs.filter((run) => run.metrics["time/step"]);
  if (!timed.length) place.append(empty("No times", "metrics.jsonl has no metric time/step."));
  for (const run of timed) place.append(timesOf(run, charts));
  place.append(element("h2", { text: "Memory: measured and predicted" }));
  for (const run of report.runs) place.append(memoryOf(run));
  const names = [...new Set(report.runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => name.startsWith("memory/"));
  if (names.length) place.append(element("h2", { text: "GiB over the steps" }), grid(names, report, charts));
}

function timesOf(run, charts) {
  const series = {};
  for (const [name, values] of Object.entries(run.metrics)) {
    const phase = name.startsWith("time/") ? name.slice(5) : "";
    if (phase && !INCLUDED.includes(phase)) series[phase] = values;
  }
  series.other = run.metrics["time/step"].map((whole, i) =>
    Math.max(0, (whole ?? 0) - Object.values(series).reduce((sum, values) => sum + (values[i] ?? 0), 0)));
  const hues = Object.keys(series).map((phase, i) => colour(PHASES[phase] ?? 5 + i));
  const plot = element("div", { class: "plot", role: "img", "aria-label": "seconds by phase over the steps" });
  charts.add(plot, new StackChart(charts, plot, run, series, hues));
  const count = run.steps.filter((_, i) => run.metrics["time/step"][i] !== null).length;
  const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);
  const whole = sum(run.metrics["time/step"]);
  const rows = Object.entries(series).map(([phase, values], i) =>
    [element("span", { class: "run" }, swatch({ colour: hues[i] }), visible(phase)), seconds(sum(values) / count), `${((100 * sum(values)) / whole).toFixed(1)} %`]);
  rows.push([element("b", { text: "step" }), seconds(whole / count), "100.0 %"]);
  for (const phase of ["switch", "reward"]) {
    const values = run.metrics[`time/${phase}`];
    if (values) rows.push([element("span", { class: "included", text: `${phase} (within the phases)` }), seconds(sum(values) / count), `${((100 * sum(values)) / whole).toFixed(1)} %`]);
  }
  return element("div", { class: "pair card" }, element("div", {}, element("h3", {}, title(run)), plot),
    table([["Phase"], ["Seconds per step", 1], ["Share", 1]], rows));
}

function memoryOf(run) {
  const { host, ...measured } = Object.fromEntries(Object.entries(run.metrics).filter(([name]) => name.startsWith("memory/"))
    .map(([name, values]) => [name.slice(7), most(values)]));
  const phases = [...new Set([...Object.keys(run.ledger), ...Object.keys(measured)])];
  const names = [...new Set(Object.values(run.ledger).flatMap((parts) => Object.keys(parts)))];
  const sum = (phase) => Object.values(run.ledger[phase] ?? {}).reduce((total, gib) => total + gib, 0);
  const largest = Math.max(...phases.map((phase) => Math.max(sum(phase), measured[phase] ?? 0)), 1e-9);
  const rows = phases.map((phase) => {
    const predicted = sum(phase), peak = measured[phase];
    const both = predicted && peak !== undefined;
    return [visible(phase), predicted ? predicted.toFixed(2) : "–", peak === undefined ? "–" : peak.toFixed(2),
      both ? `${(100 * (predicted / peak - 1)).toFixed(1)} %` : "–", bars(run.ledger[phase] ?? {}, names, peak, largest)];
  });
  const notes = [
    host === undefined ? "" : `The process of a rank has used ${host.toFixed(2)} GiB of host memory at the fullest step (mean over ranks).`,
    Object.keys(measured).length ? "" : "The memory of phases is measured on a GPU only.",
    Object.keys(run.ledger).length ? "" : "ledger.json is missing, so nothing is predicted.",
  ];
  return element("div", { class: "card" }, element("h3", {}, title(run)),
    phases.length ? table([["Phase"], ["Predicted GiB", 1], ["Measured GiB", 1], ["Difference", 1], ["Predicted, by part; the line is the measured peak"]], rows) : null,
    element("p", { class: "legend" }, ...names.map((name, i) => element("span", {}, swatch({ colour: colour(i) }), visible(name)))),
    element("p", { class: "hint", text: notes.filter((note) => note).join(" ") }));
}

/** Return a bar with a segment per part of a phase, and a line at the measured peak. */
function bars(parts, names, peak, largest) {
  const bar = element("div", { class: "bars" });
  for (const [name, gib] of Object.entries(parts)) {
    const segment = element("span", { title: `${visible(name)}: ${gib.toFixed(2)} GiB` });
    segment.style.width = `${(100 * gib) / largest}%`;
    segment.style.background = colour(names.indexOf(name));
    bar.append(segment);
  }
  if (peak !== undefined) {
    const mark = element("em", { title: `measured: ${peak.toFixed(2)} GiB` });
    mark.style.left = `${(100 * peak) / largest}%`;
    bar.append(mark);
  }
  return bar;
}

// --- configuration

function showConfiguration(report) {
  const place = byId("configuration"), runs = report.runs.filter((run) => Object.keys(run.config).length);
  if (!runs.length) return place.append(empty("No configuration", "config.toml is missing or damaged."));
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const differs = (key) => runs.some((run) => run.config[key] !== runs[0].config[key]);
  const many = runs.length > 1, apart = keys.filter(differs).length;
  const only = element("input", { type: "checkbox", id: "only", checked: many && apart > 0 });
  const search = element("input", { type: "search", placeholder: "Find a key or value", "aria-label": "find a key or value" });
  const shownRows = element("div");
  const show = () => {
    const word = search.value.toLowerCase();
    const rows = keys.filter((key) => (!only.checked || differs(key)) &&
      (!word || key.toLowerCase().includes(word) || runs.some((run) => (run.config[key] ?? "").toLowerCase().includes(word))));
    const cells = rows.map((key) => [element("code", { class: "key", text: visible(key) }), ...runs.map((run) =>
      element("code", { class: many && differs(key) ? "differs" : "", text: visible(run.config[key] ?? "–") || "\u201c\u201d" }))]);
    shownRows.replaceChildren(rows.length ? table([["Key"], ...runs.map((run) => [title(run)])], cells, "configuration")
      : empty("No key", "No key or value has this text."));
  };
  only.addEventListener("change", show);
  search.addEventListener("input", show);
  const bar = element("div", { class: "bar" }, search);
  if (many) bar.append(element("label", {}, only, `Only the ${apart} keys that differ`));
  place.append(bar, shownRows);
  show();
}
