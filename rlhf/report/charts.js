"use strict";
// Line charts and stacked charts of metrics over steps. A chart is drawn when it comes into view. It gets at most two
// points per pixel, so the number of steps does not matter.

/** Return exponential averages of values, corrected for the start. null stays null. */
function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return Number((sum / norm).toPrecision(6)); // a constant stays constant
  });
}

/** Return the points from step `low` to step `high`: the lowest and the highest of each of `buckets` ranges. */
function decimated(steps, values, low, high, buckets) {
  const inside = [];
  let before = -1, after = -1;
  for (let i = 0; i < steps.length; i++) {
    if (values[i] === null) continue;
    if (steps[i] < low) before = i;
    else if (steps[i] <= high) inside.push(i);
    else if (after < 0) after = i;
  }
  let kept = inside;
  if (inside.length > 2 * buckets) {
    const size = inside.length / buckets;
    kept = [];
    for (let b = 0; b < buckets; b++) {
      const part = inside.slice(Math.floor(b * size), Math.floor((b + 1) * size));
      let least = part[0], most = part[0];
      for (const i of part) {
        if (values[i] < values[least]) least = i;
        if (values[i] > values[most]) most = i;
      }
      kept.push(...(least === most ? [least] : least < most ? [least, most] : [most, least]));
    }
    const last = inside[inside.length - 1];
    if (kept[kept.length - 1] !== last) kept.push(last);
  }
  const ends = [...(before < 0 ? [] : [before]), ...kept, ...(after < 0 ? [] : [after])]; // lines go on to the border
  return { x: ends.map((i) => steps[i]), y: ends.map((i) => values[i]) };
}

/** Return the first and the last step of runs. */
function extent(runs) {
  const ends = runs.flatMap(({ steps }) => (steps.length ? [steps[0], steps[steps.length - 1]] : []));
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  return low < high ? [low, high] : ends.length ? [low - 1, low + 1] : [0, 1];
}

/** Return means of several series in at most `buckets` ranges of steps. null counts as 0. */
function averaged(steps, series, low, high, buckets) {
  const inside = [];
  steps.forEach((step, i) => step >= low && step <= high && inside.push(i));
  const size = Math.max(1, inside.length / buckets);
  const found = { x: [], ...Object.fromEntries(Object.keys(series).map((name) => [name, []])) };
  for (let start = 0; start < inside.length; start += size) {
    const part = inside.slice(Math.floor(start), Math.max(Math.floor(start) + 1, Math.floor(start + size)));
    found.x.push(steps[part[0]]);
    for (const [name, values] of Object.entries(series))
      found[name].push(part.reduce((sum, i) => sum + (values[i] ?? 0), 0) / part.length);
  }
  return found;
}

/** All charts of the page. They share the range of steps, the smoothing and the hidden runs. */
class Charts {
  constructor(runs) {
    this.all = new Map(); // element -> chart
    this.whole = this.window = extent(runs);
    this.smoothing = 0;
    this.waiting = [];
    this.drawing = null;
    this.looked = new Promise((resolve) => { // the observer has reported for the first time
      this.seen = new IntersectionObserver((entries) => (this._see(entries), resolve()));
    });
  }

  /** Add a chart to an element of the page. */
  add(place, chart) {
    this.all.set(place, chart);
    this.seen.observe(place);
  }

  /** Draw all charts that have been in view again, with new colours. */
  redraw() {
    for (const chart of this.all.values()) if (chart.figure) this._enqueue(chart, true);
  }

  /** Give all charts new data: of other steps, other smoothing or other runs. */
  update() {
    for (const chart of this.all.values()) if (chart.figure) chart.fill();
  }

  /** Show only these steps in all charts. With all steps, each chart shows those of its own runs. */
  zoom(low, high) {
    if (!(low < high) || (low === this.window[0] && high === this.window[1])) return;
    this.window = low <= this.whole[0] && high >= this.whole[1] ? this.whole : [low, high];
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.update();
      this.zoomed?.(low, high);
    }, 30);
  }

  /** Wait until all charts in view are drawn. */
  async settled() {
    if (this.all.size) await this.looked;
    await this.drawing;
  }

  _see(entries) {
    for (const entry of entries) {
      const chart = this.all.get(entry.target);
      if (!entry.isIntersecting || chart.asked) continue;
      chart.asked = true;
      this._enqueue(chart);
    }
  }

  _enqueue(chart) {
    if (!this.waiting.includes(chart)) this.waiting.push(chart);
    this.drawing ??= this._drain().finally(() => (this.drawing = null));
  }

  async _drain() {
    const drawn = []; // a chart is complete some frames after draw(), and the next one need not wait for that
    while (this.waiting.length) {
      const chart = this.waiting.shift();
      drawn.push(chart.draw().catch((error) => {
        console.error(error);
        chart.place.replaceChildren(element("p", { class: "hint", text: "This chart could not be drawn." }));
      }));
      await pause(); // the page answers between two charts
    }
    await Promise.all(drawn);
  }
}

/** The common parts of a figure: axes, grid, zoom and theme. */
class Chart {
  constructor(charts, place, runs, height) {
    Object.assign(this, { charts, place, height, asked: false, figure: null, bounds: {}, span: extent(runs) });
    place.style.minHeight = `${height}px`;
    place.addEventListener("dblclick", () => charts.zoom(...charts.whole));
  }

  /** Draw the chart, after an earlier call has done so with other colours. */
  draw() {
    this.drawn = (this.drawn ?? Promise.resolve()).catch(() => {}).then(() => this._draw());
    return this.drawn;
  }

  async _draw() {
    const dark = isDark();
    const [text, line] = dark ? ["#9aa3ae", "#2c333c"] : ["#5d6672", "#e6e8eb"];
    const [low, high] = this.steps;
    const range = new Bokeh.Range1d({ start: low, end: high });
    const figure = Bokeh.Plotting.figure({
      height: this.height, sizing_mode: "stretch_width", x_range: range, y_range: new Bokeh.DataRange1d(this.bounds),
      tools: [], toolbar_location: null, background_fill_color: null, border_fill_color: null,
      outline_line_color: null, min_border_right: 12, min_border_left: 48, lod_threshold: null,
    });
    for (const axis of [...figure.below, ...figure.left])
      axis.setv({
        major_label_text_color: text, major_label_text_font_size: "11px", major_label_text_font: FONT,
        axis_line_color: line, major_tick_line_color: line, minor_tick_line_color: null,
      });
    figure.below[0].setv({ formatter: new Bokeh.BasicTickFormatter({ use_scientific: false }) });
    for (const grid of figure.center) grid.setv({ grid_line_color: line });
    const box = new Bokeh.BoxZoomTool({ dimensions: "width" });
    box.overlay.setv({ fill_color: "#5b8def", fill_alpha: 0.15, line_color: "#5b8def", line_dash: [], line_alpha: 0.6 });
    figure.add_tools(box);
    figure.toolbar.setv({ active_drag: box });
    Object.assign(this, { figure, range });
    this.plot(figure);
    this.fill();
    const zoomed = () => this.filling || this.charts.zoom(range.start, range.end);
    range.properties.start.change.connect(zoomed);
    range.properties.end.change.connect(zoomed);
    this.view?.remove();
    this.place.replaceChildren();
    this.view = await Bokeh.Plotting.show(figure, this.place);
  }

  get buckets() {
    return Math.max(100, Math.round(this.place.clientWidth || 400));
  }

  /** The first and the last step in view. */
  get steps() {
    if (this.charts.window !== this.charts.whole) return this.charts.window;
    const [low, high] = this.span, margin = 0.015 * (high - low);
    return [low - margin, high + margin];
  }

  /** Move to the steps in view, and return them. */
  frame() {
    const [low, high] = this.steps;
    this.filling = true; // the change of the range is not one of the user
    if (this.range.start !== low || this.range.end !== high) this.range.setv({ start: low, end: high });
    this.filling = false;
    return [low, high];
  }
}

const FONT = "ui-sans-serif, system-ui, sans-serif";

/** A metric of several runs over the steps. With smoothing, the values themselves are thin lines behind it. */
class LineChart extends Chart {
  constructor(charts, place, metric, runs) {
    super(charts, place, runs, 190);
    Object.assign(this, { metric, runs });
  }

  plot(figure) {
    this.lines = this.runs.map((run) => {
      const source = () => new Bokeh.ColumnDataSource({ data: { x: [], y: [] } });
      const [raw, main] = [source(), source()];
      const behind = figure.line({ field: "x" }, { field: "y" }, { source: raw, color: run.colour, line_width: 1, line_alpha: 0.35 });
      const line = figure.line({ field: "x" }, { field: "y" }, { source: main, color: run.colour, line_width: 1.75, line_join: "round" });
      const points = figure.scatter({ field: "x" }, { field: "y" }, { source: main, color: run.colour, size: 4.5, line_color: null });
      return { run, raw, main, renderers: [behind, line, points] };
    });
    figure.add_tools(...this.lines.map(({ run, renderers }, i) => new Bokeh.HoverTool({
      renderers: [renderers[1]], mode: "vline", line_policy: "nearest", attachment: i % 2 ? "left" : "right",
      tooltips: [["step", "@x{0}"], [visible(run.name).slice(-40), "@y{%.5g}"]], formatters: { "@y": "printf" },
    })));
  }

  fill() {
    const [low, high] = this.frame(), weight = this.charts.smoothing;
    for (const { run, raw, main, renderers } of this.lines) {
      const values = run.metrics[this.metric];
      const own = decimated(run.steps, values, low, high, this.buckets);
      const line = weight ? decimated(run.steps, smoothed(values, weight), low, high, this.buckets) : own;
      raw.data = weight ? own : { x: [], y: [] };
      main.data = line;
      if (line.y.length) this.figure.y_range.default_span = Math.abs(line.y[0]) || 1; // the height of a constant curve
      for (const renderer of renderers) renderer.visible = !run.hidden;
      renderers[2].visible = !run.hidden && line.x.length <= 40;
    }
  }
}

/** The seconds of a run by phase, stacked, over the steps. */
class StackChart extends Chart {
  constructor(charts, place, run, series, colours) {
    super(charts, place, [run], 240);
    Object.assign(this, { run, series, colours, bounds: { start: 0 } });
  }

  plot(figure) {
    const all = Object.keys(this.series);
    const source = (names) => new Bokeh.ColumnDataSource({ data: Object.fromEntries(["x", ...names].map((name) => [name, []])) });
    this.areas = source(all.flatMap((name) => [name, `below ${name}`]));
    this.total = source(["top", ...all]); // not the source of the areas: the tooltip would select points of them
    all.forEach((name, i) => figure.varea({ field: "x" }, { field: `below ${name}` }, { field: name },
      { source: this.areas, fill_color: this.colours[i], fill_alpha: 0.85 }));
    const top = figure.line({ field: "x" }, { field: "top" }, { source: this.total, line_alpha: 0 });
    figure.add_tools(new Bokeh.HoverTool({
      renderers: [top], mode: "vline", line_policy: "nearest", formatters: Object.fromEntries(all.map((name) => [`@{${name}}`, "printf"])),
      tooltips: [["step", "@x{0}"], ...all.map((name) => [visible(name), `@{${name}}{%.3f}`]).reverse()],
    }));
  }

  fill() {
    const found = averaged(this.run.steps, this.series, ...this.frame(), Math.round(this.buckets / 3));
    const areas = { x: found.x };
    let top = found.x.map(() => 0);
    for (const name of Object.keys(this.series)) {
      areas[`below ${name}`] = top;
      top = areas[name] = found[name].map((value, i) => value + areas[`below ${name}`][i]);
    }
    this.areas.data = areas;
    this.total.data = { ...found, top };
  }
}
