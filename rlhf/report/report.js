"use strict";
// The parts that all tabs share: elements, numbers, data, theme, tabs. Texts of a run are only ever set as text,
// never as HTML.

const COLOURS = ["#2f6db3", "#d0662f", "#2f9070", "#8a63b8", "#b3891f", "#c2537f", "#5b8a9a", "#7a7a7a",
  "#a8a13a", "#4b4f9c", "#a34d4d", "#3d7d3d"];
const colour = (index) => COLOURS[index % COLOURS.length];
const byId = (id) => document.getElementById(id);

/** Return a new element. attributes may have class, text and listeners such as onclick. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) made.setAttribute(name, value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Return a number with four significant digits. */
function shown(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return value.toPrecision(4);
}

/** Return a text without characters that change the order or the place of others: control codes become visible. */
const visible = (text) =>
  text.replace(/[\u0000-\u0008\u000b-\u001f\u007f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g, (found) => {
    const code = found.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : code === 127 ? "\u2421" : "\u240a".repeat(code < 0x202a) || "\ufffd";
  });

function bytes(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

/** Return the value of a block of data. The text is released, because it is large. */
async function unpacked(id) {
  const block = byId(id);
  const stream = new Blob([bytes(block.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  block.remove();
  return JSON.parse(await new Response(stream).text());
}

const pause = () => new Promise((resolve) => setTimeout(resolve, 0));

// --- theme

const isDark = () => document.documentElement.dataset.theme === "dark";

function startTheme(changed) {
  const asked = matchMedia("(prefers-color-scheme: dark)");
  const set = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    byId("theme").textContent = dark ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", dark ? "use light colours" : "use dark colours");
    changed();
  };
  asked.addEventListener("change", () => set(asked.matches));
  byId("theme").addEventListener("click", () => set(!isDark()));
  set(asked.matches);
}

// --- tabs

function startTabs(opened) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const open = (tab) => {
    for (const other of tabs) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
      byId(other.getAttribute("aria-controls")).hidden = other !== tab;
    }
    opened(tab.getAttribute("aria-controls"));
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => {
      history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
      open(tab);
    });
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = tabs[(i + move + tabs.length) % tabs.length];
      next.focus();
      next.click();
    });
  });
  const named = () => tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? tabs[0];
  addEventListener("hashchange", () => open(named()));
  open(named());
}

async function start() {
  const report = await unpacked("data-runs");
  report.runs.forEach((run, i) => {
    run.colour = colour(i);
    run.hidden = false;
  });
  const charts = new Charts(report.runs);
  showSummary(report, charts);
  showCurves(report, charts);
  showResources(report, charts);
  showConfiguration(report);
  startTheme(() => charts.redraw());
  const opened = new Set();
  startTabs((id) => {
    if (id === "samples" && !opened.has(id)) showSamples(report);
    opened.add(id);
  });
  await charts.settled();
  document.body.dataset.ready = "true";
}

addEventListener("DOMContentLoaded", () => start().catch((error) => {
  console.error(error);
  byId("topics").append(empty("This page could not be shown", `${error}. It needs a browser of 2023 or later.`));
}));
