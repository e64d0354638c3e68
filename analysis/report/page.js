"use strict";
// Charts, the sortable table and the comparison of two runs. `data` and `plotly` are gzip in base64: see page.py.

const at = (id) => document.getElementById(id);
let data;

/** The text of a compressed script element. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(at(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

/** A new element with text, never with markup: names come from result files. */
function element(kind, text, options = {}) {
  return Object.assign(document.createElement(kind), { textContent: text }, options);
}

/** Offer these choices; the chosen one stays if it is among them. Returns whether the choice is a new one. */
function fill(select, choices) {
  const before = select.value;
  select.replaceChildren(...choices.map(([value, text]) => element("option", text, { value })));
  const stays = choices.some(([value]) => String(value) === before);
  if (stays) select.value = before;
  return !stays;
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isDark = () => style("--paper") === "#0d1117"; // as in page.css
const unique = (values) => [...new Set(values)];

// ------------------------------------------------------------------------------------------------------------- table

function sortBy(head) {
  const column = head.cellIndex;
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const body = at("rows").tBodies[0];
  const order = (one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === "" || b === "") return (a === "") - (b === ""); // rows without a number stay last
    const difference = Number(a) - Number(b);
    return sign * (Number.isNaN(difference) ? a.localeCompare(b) : difference);
  };
  body.append(...[...body.rows].sort(order));
}

function filterRows() {
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of at("rows").tBodies[0].rows) {
    const cells = [...row.cells].map((cell) => cell.textContent.toLowerCase());
    // a number has to be the budget, so that "3" does not fit every row with a 3 somewhere
    row.hidden = !words.every((word) => (isNaN(word) ? cells.some((cell) => cell.includes(word)) : cells[1] === word));
  }
}

// ------------------------------------------------------------------------------------------------------------ charts

function layout(more) {
  const axis = { gridcolor: style("--line"), linecolor: style("--line"), zeroline: false, automargin: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: style("--paper"), plot_bgcolor: style("--paper"),
    font: { color: style("--ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 60, r: 10, t: 30, b: 45 },
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", maxheight: 1e4 },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

const TICK = 22; // characters of a layer's name below the heat map
const OPTIONS = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

/** Black, the color of a free method, is white on a dark page. */
const visible = (color) => (isDark() && color === "#000000" ? "#ffffff" : color);

const PLOT = 310; // height of a chart without its legend
const DASHES = ["dot", "dash", "dashdot", "longdash"]; // of a method's second, third ... variant

/** Draw a chart that is as high as its legend asks: first with room for an entry in each line, then as is needed. */
async function drawChart(id, traces, more) {
  await Plotly.react(id, traces, layout({ height: PLOT + 22 * traces.length, ...more }), OPTIONS);
  const legend = at(id).querySelector(".legend .bg");
  await Plotly.relayout(id, { height: PLOT + (legend ? legend.getBBox().height : 0) });
}

function lines(points, y) {
  return Object.entries(data.looks).flatMap(([variant, look]) => {
    const line = points.filter((point) => point.variant === variant && point[y] !== null);
    if (!line.length) return [];
    const color = visible(look.color);
    const x = line.map((point) => point[at("bits-axis").value]);
    return [{
      type: "scatter", mode: "lines+markers", name: look.label, x, y: line.map((point) => point[y]),
      line: { color, dash: look.variant ? DASHES[(look.variant - 1) % DASHES.length] : "solid", width: 1.5 },
      marker: { color, symbol: look.symbol + (look.variant ? "-open" : ""), size: 8 },
      error_y: { type: "data", array: line.map((point) => point[y + "_std"] ?? 0), color, thickness: 1, width: 3 },
      customdata: line.map((point) => [point.bits, point.n]),
      hovertemplate: "%{fullData.name}<br>budget %{customdata[0]} bits, at %{x:.3f}<br>%{y:.4g} (n = %{customdata[1]})<extra></extra>",
    }];
  });
}

function drawCurves() {
  const workload = data.workloads[at("workload").value];
  const points = data.table.filter((row) => row.workload === at("workload").value);
  const xaxis = { title: { text: at("bits-axis").value + " bits per weight" } };
  const kl = { title: { text: "KL to full precision (nats)" }, type: "log", dtick: "D2", tickformat: ".1~g" };
  const drawn = [drawChart("kl-chart", lines(points.filter((point) => point.kl > 0), "kl"), { xaxis, yaxis: kl })];
  const bits = points.map((point) => point[at("bits-axis").value]);
  const reference = {
    type: "scatter", mode: "lines", name: "full precision", x: [Math.min(...bits), Math.max(...bits)],
    y: [workload.fp, workload.fp], line: { color: "#808080", width: 1 },
  };
  const score = { title: { text: workload.unit } };
  drawn.push(drawChart("score-chart", [...lines(points, "score"), reference], { xaxis, yaxis: score }));
  return Promise.all(drawn);
}

function drawLayers() {
  const workload = at("workload").value;
  const here = data.layers.filter((group) => group.workload === workload);
  const budgets = unique(here.map((group) => group.bits));
  const changed = fill(at("budget"), budgets.map((bits) => [bits, bits + " bits"]));
  const variants = (bits) => here.filter((group) => group.bits === bits).length;
  if (changed && budgets.length) at("budget").value = budgets.reduce((a, b) => (variants(b) > variants(a) ? b : a));
  const groups = here.filter((group) => String(group.bits) === at("budget").value);
  at("layer-chart").hidden = !groups.length;
  if (!groups.length) return;
  const had = Object.keys(data.quantities).filter((key) => groups.some((group) => group.values[key]));
  const rows = (key) => groups.filter((group) => group.values[key]).length;
  if (fill(at("quantity"), had.map((key) => [key, data.quantities[key]]))) {
    at("quantity").value = had.reduce((a, b) => (rows(b) > rows(a) ? b : a)); // the one that most methods have
  }
  const quantity = at("quantity").value;
  const shown = groups.filter((group) => group.values[quantity]);
  const names = unique(shown.flatMap((group) => group.names.map((place) => data.names[place])));
  const risk = quantity.endsWith("risk");
  const z = shown.map((group) => {
    const value = new Map(group.names.map((place, i) => [data.names[place], group.values[quantity][i]]));
    return names.map((name) => value.get(name) ?? null);
  });
  const trace = {
    type: "heatmap", x: names, y: shown.map((group) => data.looks[group.variant].label),
    z: risk ? z.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null))) : z,
    customdata: z, colorscale: "Cividis", xgap: 1, ygap: 1,
    colorbar: { title: { text: (risk ? "log10 " : "") + data.quantities[quantity], side: "right", font: { size: 11 } } },
    hovertemplate: "%{y}<br>%{x}<br>%{customdata:.4g}<extra></extra>",
  };
  const width = at("layer-chart").clientWidth, wide = width > 700;
  const ticks = names.filter((_, place) => place % Math.ceil((14 * names.length) / width) === 0);
  const short = (name) => (name.length > TICK ? "\u2026" + name.slice(-TICK) : name);
  Plotly.react("layer-chart", [trace], layout({
    height: 130 + 26 * Math.max(shown.length, 6) + (wide ? 70 : 0),
    xaxis: {
      type: "category", showticklabels: wide, tickvals: ticks, ticktext: ticks.map(short), tickangle: -45,
      tickfont: { size: 9 }, title: { text: wide ? "" : "layers" },
    },
    yaxis: { type: "category", autorange: "reversed" },
  }), OPTIONS);
}

function drawAll() {
  drawLayers();
  return drawCurves();
}

// ---------------------------------------------------------------------------------------------------------- comparer

const cell = (key, run) => (data.runs.columns[key].length === 1 ? data.runs.columns[key][0] : data.runs.columns[key][run]);

function asText(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : String(value);
}

function compare() {
  const [a, b] = [Number(at("run-a").value), Number(at("run-b").value)];
  const rows = [];
  for (const [group, keys] of Object.entries(data.runs.groups)) {
    const chosen = keys.filter((key) => at("all").checked || cell(key, a) !== cell(key, b));
    if (!chosen.length) continue;
    const head = element("tr", "", { className: "group" });
    head.append(element("td", group, { colSpan: 4 }));
    rows.push(head);
    for (const key of chosen) {
      const [one, other] = [cell(key, a), cell(key, b)];
      const both = typeof one === "number" && typeof other === "number";
      const row = document.createElement("tr");
      const difference = both && one !== other ? (other > one ? "+" : "") + asText(other - one) : "";
      const name = key.slice(key.indexOf(" ") + 1);
      row.append(...[name, asText(one), asText(other), difference].map((text) => element("td", text)));
      rows.push(row);
    }
  }
  if (!rows.length) {
    rows.push(document.createElement("tr"));
    rows[0].append(element("td", "no difference", { colSpan: 4 }));
  }
  at("differences").tBodies[0].replaceChildren(...rows);
  at("reproduce").textContent = `python -m bayesq.suite.reproduce ${cell("run path", b)}`;
}

// ------------------------------------------------------------------------------------------------------------- start

function connect() {
  for (const head of at("rows").tHead.rows[0].cells) head.querySelector("button").onclick = () => sortBy(head);
  at("filter").oninput = filterRows;
  fill(at("workload"), Object.entries(data.workloads).map(([name, workload]) => [name, workload.title]));
  const runs = data.runs.names.map((name, run) => [run, name]);
  for (const id of ["run-a", "run-b"]) {
    fill(at(id), runs);
    at(id).onchange = compare;
  }
  [at("run-a").value, at("run-b").value] = data.runs.first;
  at("all").onchange = compare;
  at("workload").onchange = drawAll;
  at("bits-axis").onchange = drawCurves;
  for (const id of ["budget", "quantity"]) at(id).onchange = drawLayers;
  at("theme").onclick = () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    drawAll();
  };
  matchMedia("(prefers-color-scheme: dark)").onchange = drawAll;
}

async function start() {
  if (!("DecompressionStream" in window)) {
    at("curves").append(element("p", "Charts need a browser of 2023 or later."));
    return;
  }
  data = JSON.parse(await unpacked("data"));
  connect();
  compare();
  document.head.append(element("script", await unpacked("plotly")));
  await drawAll();
  document.body.dataset.ready = "true";
}

start();
