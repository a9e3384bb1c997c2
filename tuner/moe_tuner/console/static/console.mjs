// The console: asks the tuner, shows what it says. Text comes in as text alone, never as markup.
import * as draw from "./draw.mjs";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const saving = navigator.connection?.saveData === true;
const EVERY_MS = { now: saving ? 10_000 : 2_000, heat: saving ? 30_000 : 5_000, list: 15_000, cost: 30_000 };
const TABLE_ROWS = 30;
const PATIENCE_MS = 30_000;

const state = {
  which: null, detail: null, rows: [], columns: [], step: 2, decisions: [], newest: null, opened: new Set(), heat: null,
  cell: [0, 0], right: "read", held: false, seen: false, asked: 0, tables: new Set(),
};

// Pieces of the page

function el(name, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "g"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) if (value !== null) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Say something aloud, once for each change. */
function say(words) {
  if ($("says").textContent !== words) $("says").textContent = words;
}

function wrong(words) {
  $("wrong").hidden = !words;
  if ($("wrong").textContent !== words) $("wrong").textContent = words;
}

function pairs(list, rows) {
  const known = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  list.replaceChildren(...known.flatMap(([name, value]) => [el("dt", null, name), el("dd", null, value)]));
}

function table(into, caption, heads, rows) {
  const cell = (value, index) => (index === 0 ? el("th", { scope: "row" }, value)
    : el("td", typeof value === "string" && /^[$\d–-]/.test(value) ? { class: "n" } : null, value ?? draw.DASH));
  into.replaceChildren(
    el("caption", null, caption),
    el("thead", null, el("tr", null, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", null, ...rows.map((row) => el("tr", null, ...row.map(cell)))),
  );
}

function options(select, values, kept) {
  if (values.length === select.options.length && values.every(([v], i) => select.options[i].value === v)) return;
  select.replaceChildren(...values.map(([value, words]) => el("option", { value }, words)));
  if (kept !== undefined && values.some(([value]) => value === kept)) select.value = kept;
}

// Asking

async function ask(path, query = {}, method = "GET", body = undefined) {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== null && value !== ""));
  const headers = method === "GET" ? {} : { "X-Moestack-Console": "1", "Content-Type": "application/json" };
  const answer = await fetch(`api/${path}${asked.size ? `?${asked}` : ""}`, {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body),
    signal: AbortSignal.timeout(PATIENCE_MS),
  });
  if (answer.status === 401 && path !== "session") {
    location.reload();
    throw new Error("signed out");
  }
  const found = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error(found?.error ?? `refused (${answer.status})`);
  return found;
}

const chosen = () => ({ deployment: state.which });

/** Ask again and again, one after another, while the page is looked at. */
function every(ms, work, wanted = () => true) {
  async function turn() {
    if (!document.hidden && !state.held && wanted()) {
      try {
        await work();
      } catch (error) {
        wrong(`${error.message}. Figures are of ${state.asked ? draw.clock(state.asked) : "no time yet"}.`);
      }
    }
    setTimeout(turn, ms);
  }
  return turn();
}

// What is now

async function now() {
  const { which } = state;
  if (which === null) return;
  const before = state.detail;
  const since = state.rows.length ? state.rows.at(-1)[0] : 0;
  const asked = { ...chosen(), span: $("span").value, since };
  const [detail, series] = await Promise.all([ask("status", chosen()), ask("series", asked)]);
  if (which !== state.which) return;
  Object.assign(state, { detail, asked: detail.atS, columns: series.columns, step: series.stepS });
  const kept = $("span").value === "fine" ? 450 : 720;
  state.rows = [...state.rows, ...series.rows.filter(([at]) => at > since)].slice(-kept);
  wrong("");
  $("fresh").textContent = `Figures of ${draw.moment(detail.atS)}, asked from the tuner on this address alone.`;
  if (before && before.report.paused !== detail.report.paused) {
    say(detail.report.paused ? "The tuner is paused." : "The tuner goes on.");
  }
  showNow(detail);
  showCharts();
  showOrders(detail);
  if (detail.newestDecisionS !== state.newest) {
    await decisions(state.newest !== null && detail.newestDecisionS !== undefined);
    state.newest = detail.newestDecisionS;
  }
}

function showNow({ report, inForce, home, wouldSet, slo, maxLostGateMass }) {
  const s = report.signals;
  const held = report.paused ? ", paused" : "";
  const missing = report.signals.missing ?? [];
  pairs($("now"), [
    ["Mode", `${report.mode}${held}${report.spike ? ", answering a spike" : ""}`],
    ["SLO attained", s.sloAttained === undefined ? "no request ended in the window" : draw.share(s.sloAttained)],
    ["Spilled", draw.share(s.spillShare)],
    ["TTFT p95", `${draw.seconds(s.ttftP95S)} (promised ${draw.seconds(slo.ttftP95S)})`],
    ["ITL p95", `${draw.seconds(s.itlP95S)} (promised ${draw.seconds(slo.itlP95S)})`],
    ["Traffic", `${draw.number(s.arrivalsPerS)} requests a second, ${s.waiting ?? draw.DASH} waiting`],
    ["Lost gate mass", s.lostGateMass === undefined ? null
      : `${draw.share(s.lostGateMass)} (at most ${draw.share(maxLostGateMass)})`],
    ["In force", `${inForce ?? "not known yet"} (version ${report.version})`],
    ["Home", report.displaced ? home : null],
    ["Would set", wouldSet],
    ["Fast loop", report.fastReason],
    ["Slow loop", report.exploringReason],
    ["Changes", `${report.budget.used} of ${report.budget.perHour} this hour`],
    ["Trials", `${report.trialsToday} of ${report.trialsPerDay} today`],
    ["Not answering", missing.length ? el("span", { class: "bad" }, missing.join(", ")) : null],
    ["Log", report.journalProblem ? el("span", { class: "bad" }, report.journalProblem) : null],
  ]);
}

// Charts

const CHARTS = [
  { id: "met", title: "SLO attained, and spilled", unit: "shares of requests", word: draw.share, high: () => 1,
    lines: [["attained", "attained"], ["spilled", "spilled"]] },
  { id: "ttft", title: "TTFT p95", unit: "seconds", word: draw.seconds, lines: [["ttftP95S", "TTFT p95"]],
    goal: (detail) => detail.slo.ttftP95S },
  { id: "rate", title: "Arrivals", unit: "requests a second", word: draw.number, lines: [["arrivalsPerS", "arrivals"]] },
  { id: "skew", title: "Load of the busiest EP rank", unit: "over the mean of all", word: draw.number,
    lines: [["rankImbalance", "max/mean"]] },
];

function showCharts() {
  for (const chart of CHARTS) {
    const made = figure(chart);
    const old = $(`chart-${chart.id}`);
    // The table below a chart stays where it is: it may be open, and read.
    if (old) {
      old.querySelector("svg").replaceWith(made.querySelector("svg"));
      old.querySelector("figcaption").replaceWith(made.querySelector("figcaption"));
      const details = old.querySelector("details");
      if (details.open && !details.contains(document.activeElement)) fill(details.querySelector("table"), chart);
    } else $("charts").append(made);
  }
}

function column(name) {
  const index = state.columns.indexOf(name) + 1;
  return state.rows.map((row) => [row[0], row[index]]);
}

function figure(chart) {
  const lines = chart.lines.map(([name, words]) => ({ words, points: column(name) }));
  const goal = chart.goal?.(state.detail);
  const values = lines.flatMap((line) => line.points.map(([, value]) => value ?? 0));
  const high = chart.high?.() ?? draw.ceiling(Math.max(0, goal ?? 0, ...values));
  const width = Math.max(320, Math.min(1100, $("charts").clientWidth || 700));
  const to = state.rows.length ? state.rows.at(-1)[0] : state.asked;
  const from = state.rows.length ? Math.min(state.rows[0][0], to - 30 * state.step) : to - 60;
  const box = { left: 58, top: 8, width: width - 70, height: 96, from, to, high };
  const told = lines.map((line) => draw.summary(line.words, line.points.map(([, v]) => v), chart.word)).join("; ");
  const foot = box.top + box.height;
  const y = (value) => box.top + box.height * (1 - value / high);
  const changes = column("version").filter(([, v], i, all) => i > 0 && v !== all[i - 1][1]);
  const x = (at) => box.left + (box.width * (at - from)) / (to - from || 1);
  const svg = el("svg", { viewBox: `0 0 ${width} 128`, role: "img",
    "aria-label": `${chart.title}. ${told}. ${goal ? `Promised: ${chart.word(goal)}. ` : ""}${changes.length} changes of knobs.` },
    ...[0, 0.5, 1].flatMap((part) => [
      el("line", { class: "grid", x1: box.left, x2: box.left + box.width, y1: y(part * high), y2: y(part * high) }),
      el("text", { x: box.left - 6, y: y(part * high) + 4, "text-anchor": "end" }, chart.word(part * high)),
    ]),
    goal && goal <= high ? el("path", { class: "goal", d: `M${box.left} ${y(goal)}h${box.width}` }) : null,
    ...changes.map(([at]) => el("line", { class: "change", x1: x(at), x2: x(at), y1: foot, y2: foot + 6 })),
    ...lines.map((line, i) => el("path", { class: i ? "line two" : "line", d: draw.path(line.points, box, 3.5 * state.step) })),
    el("text", { x: box.left, y: 124 }, draw.clock(from)),
    el("text", { x: box.left + box.width, y: 124, "text-anchor": "end" }, draw.clock(to)));
  const keys = chart.lines.map(([, words], i) => `${words} ${i ? "dashed" : "solid"}`).join(", ");
  const notes = `${chart.unit}; ${keys}${goal ? "; dotted: promised" : ""}; marks below: changes of knobs`;
  const caption = el("figcaption", null, `${chart.title} `, el("span", null, notes));
  const sheet = el("table");
  const details = el("details", null, el("summary", null, `${chart.title} as a table`), sheet);
  details.addEventListener("toggle", () => details.open && fill(sheet, chart));
  return el("figure", { id: `chart-${chart.id}` }, caption, svg, details);
}

function fill(sheet, chart) {
  const indexes = chart.lines.map(([name]) => state.columns.indexOf(name) + 1);
  const rows = draw.thinned(state.rows, TABLE_ROWS).reverse();
  table(sheet, `Newest first, every ${draw.seconds(state.step * Math.ceil(state.rows.length / TABLE_ROWS || 1))}`,
    ["Time", ...chart.lines.map(([, words]) => words)],
    rows.map((row) => [draw.clock(row[0]), ...indexes.map((index) => chart.word(row[index]))]));
}

// Experts

async function experts() {
  if (state.which === null) return;
  const { which } = state;
  try {
    const heat = await ask("experts", { ...chosen(), of: $("of").value, window: $("window").value, replica: $("replica").value });
    if (which !== state.which) return;
    state.heat = heat;
    options($("replica"), heat.replicas.map((name) => [name, name]), heat.replica);
    const window = heat.sinceStart ? `since it started, ${draw.seconds(heat.windowS)} ago` : `of the last ${draw.seconds(heat.windowS)}`;
    const group = heat.group > 1 ? ` A cell is the hottest of ${heat.group} neighbours.` : "";
    $("heat-says").textContent = `${heat.model || "Experts"}, replica ${heat.replica}, ${heat.ranks} EP ranks: `
      + `${draw.number(heat.tokens, 0)} tokens ${window}.${group}`;
  } catch (error) {
    state.heat = null;
    $("heat-says").textContent = `No map: ${error.message}.`;
  }
  showHeat();
}

const unit = () => ($("of").value.startsWith("rank") ? "rank" : "expert");

function showHeat() {
  const { heat } = state;
  const canvas = $("map");
  const rows = heat?.rows ?? [];
  const columns = Math.max(0, ...rows.map((row) => row.cells?.length ?? 0));
  canvas.width = Math.max(1, columns) * 4;
  canvas.height = Math.max(1, rows.length) * 4;
  canvas.style.height = `${Math.min(480, Math.max(48, 14 * rows.length))}px`;
  const paper = canvas.getContext("2d");
  rows.forEach((row, y) => {
    for (let x = 0; x < Math.max(1, columns); x += 1) {
      const load = row.cells?.[x];
      const rgb = load === undefined ? [128, 128, 128] : draw.scale(draw.heat(load / 100));
      paper.fillStyle = `rgb(${rgb.join()})`;
      paper.fillRect(4 * x, 4 * y, 4, 4);
      if (load === undefined) {
        paper.fillStyle = "rgb(40,40,40)";
        paper.fillRect(4 * x, 4 * y + (x % 4), 4, 1);
      }
    }
  });
  const worst = rows.reduce((most, row) => ((row.maxOverMean ?? 0) > (most?.maxOverMean ?? 0) ? row : most), null);
  canvas.setAttribute("aria-label", worst
    ? `${rows.length} layers by ${columns} columns. The most uneven layer is ${worst.layer}: ${unit()} ${worst.hottest} has `
      + `${draw.number(worst.maxOverMean)} times the mean.` : "No load is known.");
  if (worst && document.activeElement !== canvas) $("cell").textContent = canvas.getAttribute("aria-label");
  if (!$("heat-table").closest("details").open) return;
  table($("heat-table"), "Max over mean; dropped and rerouted as shares of slots",
    ["Layer", "Max/mean", `Hottest ${unit()}`, "By rank before", "after capacity", "Dropped", "Rerouted"],
    rows.map((row) => [String(row.layer), row.hooked ? draw.number(row.maxOverMean) : "not counted", String(row.hottest ?? draw.DASH),
      draw.number(row.ranksBefore), draw.number(row.ranksAfter), draw.share(row.droppedShare), draw.share(row.reroutedShare)]));
}

function point(x, y) {
  const rows = state.heat?.rows ?? [];
  if (!rows.length) return;
  const columns = Math.max(1, ...rows.map((row) => row.cells?.length ?? 0));
  state.cell = [Math.min(columns - 1, Math.max(0, x)), Math.min(rows.length - 1, Math.max(0, y))];
  const row = rows[state.cell[1]];
  const load = row.cells?.[state.cell[0]];
  const first = state.cell[0] * state.heat.group;
  const words = load === undefined ? (row.hooked ? "idle" : "not counted") : `${draw.number(load / 100)} × the layer's mean`;
  $("cell").textContent = `Layer ${row.layer}, ${unit()} ${first}: ${words}.`;
}

// Decisions

async function decisions(aloud) {
  const { rows } = await ask("decisions", { ...chosen(), limit: 50 });
  state.decisions = rows;
  $("why-says").textContent = rows.length ? "" : "No decision was taken yet.";
  $("why").replaceChildren(...rows.map(decided));
  if (aloud && rows.length) say(`New decision: ${rows[0].loop} loop, ${rows[0].action}: ${rows[0].reason}`);
}

const effect = (e) => e && `${draw.number(e.ratio, 3)} of the incumbent's cost${e.low === undefined ? ""
  : `, 95 % interval ${draw.number(e.low, 3)} to ${draw.number(e.high, 3)} over ${e.pairs} pairs`}`;

function decided(row) {
  const key = `${row.time} ${row.action}`;
  const version = row.version === undefined ? "" : ` → version ${row.version}`;
  const list = el("dl");
  const seen = Object.entries(row.signals).filter(([name, value]) => typeof value === "number" && !["lagS", "windowS"].includes(name));
  pairs(list, [
    ["Changed", (row.changed ?? []).join(", ") || "nothing"],
    ["Before", row.before], ["After", row.after],
    ["Mode", row.mode],
    ["Foreseen", effect(row.predicted)], ["Measured", effect(row.measured)],
    ["In force", row.ackSeconds === undefined ? null : `on every rank after ${draw.seconds(row.ackSeconds)}`],
    ["Not from, refused", (row.faults ?? []).join(", ")],
    ["Note", row.note],
    ["Seen", seen.map(([name, value]) => `${name} ${draw.number(value, 4)}`).join(", ")],
  ]);
  const details = el("details", state.opened.has(key) ? { open: "" } : null,
    el("summary", null, `${draw.moment(row.time)} ${row.loop} ${row.action}${version}${row.sent ? "" : " (not sent)"}: ${row.reason}`), list);
  details.addEventListener("toggle", () => (details.open ? state.opened.add(key) : state.opened.delete(key)));
  return el("li", null, details);
}

// Costs, plan, list

async function costs() {
  if (state.which === null) return;
  try {
    const c = await ask("costs", chosen());
    const of = (limit) => (limit === undefined ? "" : ` of ${draw.usd(limit)}`);
    $("cost-says").textContent = c.storeError ? `The budget store cannot be used, so nothing is spent: ${c.storeError}` : "";
    pairs($("cost"), [
      ["Closed APIs today", `${draw.usd(c.todayUsd)}${of(c.usdPerDay)}; forecast ${draw.usd(c.forecastDayUsd)}`],
      ["This month", `${draw.usd(c.monthUsd)}${of(c.usdPerMonth)}; forecast ${draw.usd(c.forecastMonthUsd)}`],
      ["Held by gateways", Number(c.heldUsd) ? draw.usd(c.heldUsd) : null],
      ["Own GPUs", c.rent && `prefill ${draw.usd(c.rent.prefillUsd)}, decode ${draw.usd(c.rent.decodeUsd)}, idle ${draw.usd(c.rent.idleUsd)}`],
      ...(c.breakEven ?? []).map((row) => [`Break-even with ${row.target}`,
        `own GPUs cost the same from ${draw.number(row.tokensPerMonth, 0)} tokens a month (at ${draw.usd(row.usdPerMTokens)} a million)`]),
      ["Break-even", c.breakEvenMissing && `not known: ${c.breakEvenMissing}`],
      ...(c.prices ?? []).map((row) => [`Price of ${row.target}`,
        `${draw.usd(row.inputUsdPerM)} in, ${draw.usd(row.outputUsdPerM)} out a million (${row.source}${row.dated ? `, ${row.dated}` : ""})`]),
    ]);
    const rows = (when, list) => (list ?? []).map((row) => [when, row.tenant ?? "(not known)", row.model ?? "(gone)", row.target, draw.usd(row.usd)]);
    table($("cost-table"), "Spend on closed APIs", ["When", "Tenant", "Model", "Target", "USD"],
      [...rows("today", c.today), ...rows("month", c.month)]);
  } catch (error) {
    $("cost-says").textContent = `Not known: ${error.message}.`;
    $("cost").replaceChildren();
    $("cost-table").replaceChildren();
  }
}

function showPlan({ plan, slo, bounds, report, maxLostGateMass }) {
  const range = (low, high) => `${low ?? "the policy's floor"} to ${high ?? "no bound"}`;
  table($("plan"), "What was planned, promised and allowed", ["What", "Value", "Why"], [
    ...(plan ?? []).map((row) => [row.what, row.value, row.why || " "]),
    ["Promise", `TTFT p95 ${draw.seconds(slo.ttftP95S)}, ITL p95 ${draw.seconds(slo.itlP95S)}`, "spec.slo"],
    ["γ", range(bounds.capacityFactorMin, bounds.capacityFactorMax), `overflow ${bounds.overflow}`],
    ["maxActiveSeqs", range(bounds.activeSeqsMin, bounds.activeSeqsMax), "bounds of the tuner"],
    ["missProbability", range(bounds.missProbabilityMin, bounds.missProbabilityMax), "bounds of the tuner"],
    ["Lost gate mass", `at most ${draw.share(maxLostGateMass)}`, "spec.quality"],
    ["Changes", `${report.budget.perHour} an hour, ${report.trialsPerDay} trials a day`, "spec.tuning.changeBudget"],
    ["Pinned", (report.pins ?? []).join(", ") || "nothing", "by the resource, or by order"],
  ]);
}

async function list() {
  const { rows, more } = await ask("deployments");
  options($("which"), rows.map((row) => [row.deployment, row.deployment]), state.which ?? undefined);
  if (state.which === null && rows.length) state.which = $("which").value;
  table($("list"), "What this tuner looks after", ["Deployment", "Mode", "SLO attained", "Spilled", "Requests/s", "USD today", "Doing"],
    rows.map((row) => [row.deployment, row.tuned ? `${row.mode}${row.paused ? ", paused" : ""}` : "not tuned", draw.share(row.sloAttained),
      draw.share(row.spillShare), draw.number(row.arrivalsPerS), draw.usd(row.usdToday), row.problem ?? row.doing ?? ""]));
  $("more").textContent = more ? `${more} more are not shown.` : rows.length ? "" : "No deployment is tuned here.";
}

// Pause and pin

function showRight() {
  const may = state.right === "operate";
  const nobody = !state.operators;
  const lost = !may && $("act").contains(document.activeElement);
  $("act").hidden = !may;
  $("unlock").hidden = may || nobody;
  $("nobody").hidden = !nobody;
  if (lost) $("operator").focus();
}

function showOrders({ report, knobs }) {
  const orders = report.orders;
  const pins = Object.entries(orders?.pins ?? {});
  $("ordered").textContent = `Ordered: ${[...(orders?.paused ? ["paused"] : []),
    ...pins.map(([name, value]) => (value === null ? name : `${name} at ${value}`))].join(", ") || "nothing is held"}.`;
  $("pause").textContent = orders?.paused ? "Resume the tuner" : "Pause the tuner";
  options($("knob"), knobs.map((name) => [name, name]), $("knob").value);
  options($("pinned"), pins.map(([name]) => [name, name]), $("pinned").value);
  $("unpin").hidden = pins.length === 0;
  showPlan(state.detail);
}

async function order(change, words) {
  try {
    const seen = state.detail?.report.orders?.version ?? 0;
    await ask("orders", {}, "PUT", { ...chosen(), seen, ...change });
  } catch (error) {
    say(`Refused: ${error.message}`);
    await session();
    return;
  }
  say(words);
  refresh(now);
}

async function session() {
  const { right, operators } = await ask("session");
  Object.assign(state, { right, operators });
  showRight();
}

// The page as a whole

function theme(value) {
  if (value) document.documentElement.dataset.theme = value;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem("moestack-colours", value);
  } catch { /* a browser that keeps nothing forgets the choice */ }
}

function legend() {
  const paper = $("legend").getContext("2d");
  for (let x = 0; x < 220; x += 1) {
    paper.fillStyle = `rgb(${draw.scale(x / 219).join()})`;
    paper.fillRect(x, 0, 1, 14);
  }
}

function another() {
  Object.assign(state, { rows: [], newest: null, detail: null, heat: null });
  $("charts").replaceChildren();
  $("replica").replaceChildren(el("option", { value: "" }, "the first"));
}

function refresh(work) {
  work().catch((error) => wrong(error.message));
}

function listen() {
  $("theme").addEventListener("change", () => theme($("theme").value));
  $("which").addEventListener("change", () => {
    state.which = $("which").value;
    another();
    for (const work of [now, experts, costs]) refresh(work);
  });
  $("span").addEventListener("change", () => { state.rows = []; refresh(now); });
  for (const id of ["of", "window", "replica"]) $(id).addEventListener("change", () => refresh(experts));
  $("heat-table").closest("details").addEventListener("toggle", showHeat);
  $("hold").addEventListener("click", () => {
    state.held = !state.held;
    $("hold").setAttribute("aria-pressed", String(state.held));
    say(state.held ? "The page stands still." : "The page is updated again.");
  });
  $("leave").addEventListener("click", async () => { await ask("session", {}, "DELETE"); location.reload(); });
  $("map").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    point(state.cell[0] + step[0], state.cell[1] + step[1]);
  });
  $("map").addEventListener("pointermove", (event) => {
    const box = $("map").getBoundingClientRect();
    point(Math.floor(((event.clientX - box.left) / box.width) * ($("map").width / 4)),
      Math.floor(((event.clientY - box.top) / box.height) * ($("map").height / 4)));
  });
  $("unlock").addEventListener("submit", async (event) => {
    event.preventDefault();
    const token = $("operator").value.trim();
    $("operator").value = "";
    try {
      await ask("session", {}, "POST", { token });
      await session();
      say(state.right === "operate" ? "Unlocked for 15 minutes." : "This token may look, and change nothing.");
      if (state.right === "operate") $("pause").focus();
    } catch (error) {
      say(`Refused: ${error.message}`);
    }
  });
  $("lock").addEventListener("click", async () => { await ask("session", { only: "operate" }, "DELETE"); await session(); say("Locked."); });
  $("pause").addEventListener("click", () => {
    const paused = !state.detail?.report.orders?.paused;
    order({ paused }, paused ? "The tuner is paused." : "The tuner goes on.");
  });
  $("pin").addEventListener("submit", (event) => {
    event.preventDefault();
    order({ pins: { [$("knob").value]: $("value").value.trim() || null } }, `Pinned ${$("knob").value}.`);
  });
  $("unpin").addEventListener("submit", (event) => {
    event.preventDefault();
    order({ unpin: [$("pinned").value] }, `Unpinned ${$("pinned").value}.`);
  });
  new IntersectionObserver(([entry]) => {
    const first = entry.isIntersecting && !state.seen && state.heat === null;
    state.seen = entry.isIntersecting;
    if (first) refresh(experts);
  }).observe($("heat-section"));
}

async function start() {
  let kept = "";
  try {
    kept = localStorage.getItem("moestack-colours") ?? "";
  } catch { /* as above */ }
  $("theme").value = kept;
  theme($("theme").value);
  legend();
  listen();
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) history.replaceState(null, "", location.pathname);
  try {
    if (token) await ask("session", {}, "POST", { token });
    await Promise.all([session(), list()]);
  } catch (error) {
    wrong(error.message);
  }
  every(EVERY_MS.now, now);
  every(EVERY_MS.cost, costs);
  every(EVERY_MS.heat, experts, () => state.seen);
  setTimeout(() => every(EVERY_MS.list, async () => { await list(); await session(); }), EVERY_MS.list);
}

start();
