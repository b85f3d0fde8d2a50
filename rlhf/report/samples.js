"use strict";
// The browser of samples: a list of all samples that match, and the chosen one with its siblings.

const ROW = 58; // height of a row of the list in pixels
const ORDERS = {
  "Step, newest first": (a, b) => b.step - a.step || a.order - b.order,
  "Step, oldest first": (a, b) => a.step - b.step || a.order - b.order,
  "Reward, highest first": (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity) || a.order - b.order,
  "Reward, lowest first": (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity) || a.order - b.order,
  "Longest first": (a, b) => (b.tokens ?? 0) - (a.tokens ?? 0) || a.order - b.order,
};

async function showSamples(report) {
  const place = byId("samples");
  place.append(element("p", { class: "hint", text: "Reading the samples …" }));
  await pause();
  const packed = await unpacked("data-samples");
  const all = packed.flatMap(({ prompts, samples }, i) => samples.map((sample) =>
    Object.assign(sample, { run: report.runs[i], prompt: prompts[sample.prompt], key: [i, sample.use, sample.set, sample.step, sample.group].join(" ") })));
  all.forEach((sample, order) => (sample.order = order));
  place.replaceChildren();
  if (!all.length) return place.append(empty("No samples", "out/samples has no complete file. Modes without an engine (sft, reward, dpo) keep no samples; log.samples=0 keeps none either."));
  new SampleBrowser(report, all, place);
  document.body.dataset.samples = all.length;
}

class SampleBrowser {
  constructor(report, all, place) {
    this.all = all;
    this.found = all;
    this.at = 0;
    this.groups = Map.groupBy ? Map.groupBy(all, (sample) => sample.key) : grouped(all);
    this.count = element("span", { class: "hint", "aria-live": "polite" });
    this.inner = element("div", { class: "rows" });
    this.list = element("div", { class: "list", tabindex: 0, role: "listbox", "aria-label": "samples", id: "list" }, this.inner);
    this.detail = element("div", { class: "detail", "aria-live": "polite" });
    place.append(this._filters(report), element("div", { class: "browser" }, this.list, this.detail));
    this.list.addEventListener("scroll", () => this._rows());
    this.list.addEventListener("keydown", (event) => this._key(event));
    new ResizeObserver(() => this._rows()).observe(this.list);
    this.filter();
  }

  _filters(report) {
    const choice = (name, options) => element("select", { "aria-label": name, onchange: () => this.filter() },
      ...options.map(([value, text]) => element("option", { value, text })));
    const without = report.runs.filter((run) => !this.all.some((sample) => sample.run === run)).map((run) => visible(run.name));
    const uses = [...new Set(this.all.map((sample) => sample.use))];
    this.run = choice("run", [["", "All runs"], ...report.runs.map((run, i) => [i, visible(run.name)])]);
    this.use = choice("use", [["", "Training and held-out"], ...uses.map((use) => [use, visible({ train: "Training", evaluate: "Held-out" }[use] ?? use)])]);
    const sets = [...new Set(this.all.map((sample) => sample.set))].sort();
    this.set = choice("set", [["", "All data sets"], ...sets.filter((set) => set).map((set) => [set, visible(set)])]);
    this.order = choice("order", Object.keys(ORDERS).map((name) => [name, name]));
    this.runs = report.runs;
    const steps = [...new Set(this.all.map((sample) => sample.step))].sort((a, b) => a - b);
    this.step = element("input", { type: "number", placeholder: "all", "aria-label": "step", list: "steps", min: steps[0], max: steps[steps.length - 1], oninput: () => this.filter() });
    const known = element("datalist", { id: "steps" }, ...steps.slice(0, 2000).map((step) => element("option", { value: step })));
    this.word = element("input", { type: "search", placeholder: "Search prompts and responses", "aria-label": "search prompts and responses", id: "search", oninput: () => this.filter() });
    return element("div", { class: "bar" }, this.word, element("label", {}, "Step ", this.step), known,
      report.runs.length > 1 ? this.run : null, uses.length > 1 ? this.use : null, sets.length > 1 ? this.set : null, this.order, this.count,
      without.length ? element("span", { class: "hint", text: `Without samples: ${without.join(", ")}` }) : null);
  }

  /** Show the samples that match all filters. The search pauses often, and a newer search ends it. */
  async filter() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const word = this.word.value.toLowerCase(), step = this.step.value, use = this.use.value, set = this.set.value;
    const run = this.run.value === "" ? null : this.runs[Number(this.run.value)];
    const found = [];
    let began = performance.now();
    for (const sample of this.all) {
      if (run && sample.run !== run) continue;
      if (use && sample.use !== use) continue;
      if (set && sample.set !== set) continue;
      if (step !== "" && sample.step !== Number(step)) continue;
      if (word && !sample.prompt.toLowerCase().includes(word) && !sample.turns.some(([, text]) => text.toLowerCase().includes(word))) continue;
      found.push(sample);
      if (performance.now() - began > 6) {
        await pause();
        if (turn !== this.turn) return;
        began = performance.now();
      }
    }
    this.found = found.sort(ORDERS[this.order.value]);
    this.count.textContent = `${found.length.toLocaleString("en")} of ${this.all.length.toLocaleString("en")} samples`;
    this.inner.style.height = `${found.length * ROW}px`;
    this.list.scrollTop = 0;
    this.choose(0);
  }

  choose(index) {
    this.at = Math.max(0, Math.min(index, this.found.length - 1));
    const top = this.at * ROW, { scrollTop, clientHeight } = this.list;
    if (top < scrollTop) this.list.scrollTop = top;
    else if (top + ROW > scrollTop + clientHeight) this.list.scrollTop = top + ROW - clientHeight;
    this._rows();
    this._detail();
  }

  _key(event) {
    const page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.found.length, End: this.found.length }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    this.choose(this.at + move);
  }

  /** Put only the rows in view into the page. */
  _rows() {
    const top = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 3);
    const end = Math.min(this.found.length, top + Math.ceil(this.list.clientHeight / ROW) + 6);
    this.inner.replaceChildren(...this.found.slice(top, end).map((sample, i) => this._row(sample, top + i)));
    this.list.setAttribute("aria-activedescendant", this.found.length ? `row-${this.at}` : "");
  }

  _row(sample, index) {
    const text = sample.turns.map(([, content]) => content).join(" ");
    const row = element("div", { class: "row", role: "option", id: `row-${index}`, "aria-selected": index === this.at, onclick: () => this.choose(index) },
      reward(sample), element("div", {},
        element("div", { class: "line", dir: "auto", text: visible(text.slice(0, 160)).replace(/\s+/g, " ") || "(no text)" }),
        element("div", { class: "line under" }, this.runs.length > 1 ? swatch(sample.run) : "", `step ${sample.step}`, element("span", { dir: "auto", text: visible(sample.prompt.slice(0, 120)).replace(/\s+/g, " ") }))));
    row.style.top = `${index * ROW}px`;
    return row;
  }

  _detail() {
    const sample = this.found[this.at];
    if (!sample) return this.detail.replaceChildren(empty("No sample", "No sample matches: change the search or the filters."));
    const group = [...this.groups.get(sample.key)].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
    const kind = { train: "training", evaluate: "held-out" }[sample.use] ?? sample.use;
    const facts = [`step ${sample.step}`, visible(kind), sample.set ? visible(sample.set) : null, sample.row === null ? null : `row ${sample.row} of the data`, `${group.length} response${group.length > 1 ? "s" : ""} of this group`];
    this.detail.replaceChildren(
      element("div", { class: "facts" }, this.runs.length > 1 ? title(sample.run) : null, facts.filter((fact) => fact).join(" · ")),
      element("h3", { text: "Prompt" }), element("div", { class: "text prompt", dir: "auto", text: visible(sample.prompt) }),
      element("h3", { text: group.length > 1 ? "Responses, highest reward first" : "Response" }),
      element("div", { class: "siblings" }, ...group.map((other) => this._card(other, other === sample && group.length > 1))));
  }

  _card(sample, chosen) {
    const facts = [["advantage", sample.advantage], ["rule", sample.rule], ["score", sample.score], ...Object.entries(sample.parts), ["tokens", sample.tokens]]
      .filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => [visible(name), shown(value)]);
    if (sample.versions.length) facts.push(["weights of step", sample.versions.join(", ")]);
    if (sample.finish) facts.push(["ended by", visible(sample.finish === "length" ? "the length limit" : "a stop")]);
    for (const [name, value] of Object.entries(sample.more ?? {})) facts.push([visible(name), visible(value)]);
    const turns = sample.turns.map(([role, text]) => element("div", { class: `turn ${role === "assistant" ? "" : "answer"}` },
      sample.turns.length > 1 ? element("span", { class: "role", text: visible(role) }) : null,
      element("div", { class: "text", dir: "auto", text: visible(text) || "(no text)" })));
    return element("article", { class: chosen ? "chosen" : "" }, element("header", {}, reward(sample), chosen ? element("span", { class: "hint", text: "chosen" }) : null),
      ...turns, element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", { text: name }), element("dd", { text: value })])));
  }
}

function grouped(all) {
  const groups = new Map();
  for (const sample of all) groups.set(sample.key, [...(groups.get(sample.key) ?? []), sample]);
  return groups;
}

function reward(sample) {
  const kind = sample.failed ? "failed" : sample.reward === null ? "none" : sample.advantage > 0 ? "good" : sample.advantage < 0 ? "bad" : "";
  return element("span", { class: `reward ${kind}`, title: "reward", text: sample.failed ? "failed" : shown(sample.reward) });
}
