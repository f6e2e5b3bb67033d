"use strict";
// Plays a recorded run. DATA is what page.py writes: see there for its keys.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const runs = DATA.runs, layers = DATA.layers;
const MOST_ROWS = 40; // of reads that are listed
const MARGIN = 0.2; // of a canvas' cell, left empty around it
let step = 0, timer = null;

// ---- what was in DRAM after each step; kept as states that are rebuilt when one goes back.
let state = null, stateAt = -1;

function fresh() {
  return layers.map((layer, number) => {
    const slotOf = new Int32Array(layer.units).fill(-1);
    const unitAt = new Int32Array(layer.slots).fill(-1);
    (DATA.initial ? DATA.initial[number] : []).forEach((unit, slot) => {
      unitAt[slot] = unit;
      if (unit >= 0) slotOf[unit] = slot;
    });
    return { slotOf, unitAt };
  });
}

function apply(number) {
  const run = runs[Math.floor(number / layers.length)];
  const at = number % layers.length, told = run.layers[at], here = state[at];
  for (const [slot] of told.changed) {
    if (here.unitAt[slot] >= 0) here.slotOf[here.unitAt[slot]] = -1;
  }
  for (const [slot, unit] of told.changed) {
    here.unitAt[slot] = unit;
    if (unit >= 0) here.slotOf[unit] = slot;
  }
}

function stateBefore(number) {
  if (state === null || stateAt > number) { state = fresh(); stateAt = 0; }
  while (stateAt < number) apply(stateAt++);
  return state;
}

// ---- drawing
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function prepared(id) {
  const canvas = $(id), ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = Number(canvas.getAttribute("height"));
  canvas.style.height = height + "px";
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.dataset.ratio !== String(ratio)) {
    canvas.dataset.ratio = String(ratio);
    canvas.height = height * ratio;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "12px system-ui, sans-serif";
  return { context, width, height };
}

function grid(id, count, colourOf) {
  const { context, width, height } = prepared(id);
  const cell = Math.max(2, Math.floor(Math.sqrt((width * height) / Math.max(1, count))));
  let across = Math.max(1, Math.floor(width / cell)), size = cell;
  while (Math.ceil(count / across) * size > height && size > 1) {
    size -= 0.25;
    across = Math.max(1, Math.floor(width / size));
  }
  const inner = size > 3 ? size * (1 - MARGIN) : size;
  for (let i = 0; i < count; i++) {
    context.fillStyle = colourOf(i);
    context.fillRect((i % across) * size, Math.floor(i / across) * size, inner, inner);
  }
}

function drawUnits(told, layer, before) {
  const kinds = ["used", "ahead", "read"], shades = {};
  for (const name of ["cold", "held", "used", "ahead", "read", "silent"]) shades[name] = colour(name);
  const kind = new Map();
  const active = told.active === null ? null : new Set(told.active);
  told.used.forEach((unit, i) => {
    kind.set(unit, active && !active.has(unit) ? "silent" : kinds[told.place[i]]);
  });
  const whole = layer.slots >= layer.units && told.slots.every((slot) => slot < 0);
  grid("units", layer.units, (unit) =>
    shades[kind.get(unit) || (whole || before.slotOf[unit] >= 0 ? "held" : "cold")]);
}

function drawSlots(told, layer, before) {
  const cold = colour("cold"), held = colour("held"), used = colour("used"), read = colour("read");
  const now = new Map();
  told.used.forEach((unit, i) => {
    const slot = told.slots[i];
    if (slot >= 0) now.set(slot, told.place[i] === 0 ? used : read);
  });
  grid("slots", layer.slots, (slot) => now.get(slot) || (before.unitAt[slot] >= 0 ? held : cold));
}

function drawTime(run, at) {
  const { context, width, height } = prepared("time");
  const left = 74, right = width - 8, begin = run.begin;
  const end = Math.max(run.end, ...run.reads.map((read) => read[1]), begin + 1);
  const x = (time) => left + ((time - begin) / (end - begin)) * (right - left);
  context.fillStyle = colour("soft");
  context.fillText("compute", 4, 34);
  context.fillText("reads", 4, 96);
  context.fillStyle = colour("cold");
  context.fillRect(left, 18, x(run.end) - left, 26);
  run.layers.forEach((layer, number) => {
    context.fillStyle = colour("compute");
    context.globalAlpha = number === at ? 1 : 0.55;
    context.fillRect(x(layer.begin), 18, Math.max(1, x(layer.end) - x(layer.begin)), 26);
  });
  context.globalAlpha = 1;
  const edges = [];
  for (const [from, to, , count] of run.reads) edges.push([from, count], [to, -count]);
  edges.sort((a, b) => a[0] - b[0]);
  let flying = 0, most = 1;
  for (const [, change] of edges) { flying += change; most = Math.max(most, flying); }
  flying = 0;
  context.fillStyle = colour("read");
  edges.forEach(([time, change], i) => {
    flying += change;
    const until = i + 1 < edges.length ? edges[i + 1][0] : time;
    const tall = (flying / most) * 62;
    context.fillRect(x(time), 122 - tall, Math.max(0.5, x(until) - x(time)), tall);
  });
  context.fillStyle = colour("soft");
  context.fillText(run.reads.length ? `at most ${most}` : "none", 4, 112);
  context.fillText("0 ms", left, 150);
  const label = `${((end - begin) / 1000).toFixed(2)} ms`;
  context.fillText(label, right - context.measureText(label).width, 150);
}

function drawLayers(run, at) {
  const { context, width, height } = prepared("layers");
  const each = width / layers.length;
  run.layers.forEach((told, number) => {
    const scale = (height - 24) / Math.max(...run.layers.map((layer) => layer.used.length), 1);
    let top = height - 18;
    for (const [kind, name] of [[0, "used"], [1, "ahead"], [2, "read"]]) {
      const tall = told.place.filter((place) => place === kind).length * scale;
      context.fillStyle = colour(name);
      context.fillRect(number * each + 2, top - tall, Math.max(1, each - 4), tall);
      top -= tall;
    }
    context.fillStyle = colour(number === at ? "ink" : "soft");
    if (each > 14 || number % 4 === 0) {
      context.fillText((number === at ? "▲" : "") + number, number * each + each / 2 - 6, height - 4);
    }
  });
}

function draw() {
  if (!runs.length) { $("said").textContent = "Waiting for the first token."; return; }
  const token = Math.floor(step / layers.length), at = step % layers.length;
  const run = runs[token], told = run.layers[at], before = stateBefore(step)[at];
  drawUnits(told, layers[at], before);
  drawSlots(told, layers[at], before);
  drawTime(run, at);
  drawLayers(run, at);
  const count = (kind) => told.place.filter((place) => place === kind).length;
  const nbytes = run.reads.filter((read) => read[2] === at).reduce((sum, read) => sum + read[4], 0);
  $("said").textContent =
    `Token ${token + 1} of ${runs.length}, layer ${at}: ${told.used.length} of ` +
    `${layers[at].units} units used; ${count(0)} were in DRAM, ${count(1)} read ahead, ` +
    `${count(2)} read now` +
    (told.active === null ? "" : `; ${told.used.length - told.active.length} of them stayed silent`) +
    `. ${(nbytes / 1000).toFixed(1)} kB read in this layer's turn.`;
  showReads(run, at);
  showText(token);
  $("at").value = String(step);
  $("at").setAttribute("aria-valuetext", `token ${token + 1}, layer ${at}`);
}

// The reads that were begun in a layer's turn, the first of them one by one.
function showReads(run, at) {
  const rows = [];
  for (const [begin, end, layer, , , offsets, sizes] of run.reads) {
    if (layer !== at || !offsets) continue;
    offsets.forEach((offset, i) => rows.push([
      (offset * 512).toLocaleString("en"), (sizes[i] * 512).toLocaleString("en"),
      ((begin - run.begin) / 1000).toFixed(2), ((end - run.begin) / 1000).toFixed(2)]));
  }
  $("listed").replaceChildren(...rows.slice(0, MOST_ROWS).map((row) => {
    const line = document.createElement("tr");
    for (const text of row) {
      const cell = document.createElement("td");
      cell.textContent = text;
      line.append(cell);
    }
    return line;
  }));
  $("count").textContent = rows.length > MOST_ROWS
    ? `The first ${MOST_ROWS} of ${rows.length} reads.` : `${rows.length} reads.`;
}

function showText(token) {
  const place = $("text"), mark = document.createElement("mark");
  mark.textContent = runs[token].text;
  const before = runs.slice(0, token).map((run) => run.text).join("");
  place.replaceChildren(document.createTextNode(DATA.prompt + before), mark);
  mark.scrollIntoView({ block: "nearest" });
}

// ---- playing
function go(number) {
  step = Math.max(0, Math.min(runs.length * layers.length - 1, number));
  draw();
}

function stride() { return $("unit").value === "token" ? layers.length : 1; }

function setPlaying(on) {
  if (timer !== null) clearInterval(timer);
  timer = null;
  if (on) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    timer = setInterval(() => {
      if (step >= runs.length * layers.length - 1 && !DATA.live) return setPlaying(false);
      go(step + stride());
    }, calm ? 1500 : 220);
  }
  $("play").textContent = on ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(on));
}

$("play").onclick = () => setPlaying(timer === null);
$("next").onclick = () => { setPlaying(false); go(step + stride()); };
$("back").onclick = () => { setPlaying(false); go(step - stride()); };
$("at").oninput = () => { setPlaying(false); go(Number($("at").value)); };
document.addEventListener("keydown", (event) => {
  if (/^(INPUT|SELECT|BUTTON|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === " ") { event.preventDefault(); setPlaying(timer === null); }
  if (event.key === "ArrowRight") $("next").onclick();
  if (event.key === "ArrowLeft") $("back").onclick();
});
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// ---- planned otherwise
const AXES = ["memory", "window", "chunk", "disk"], IDEAS = ["predict", "keep", "bundle", "many"];

function chosen() {
  let index = 0;
  for (const name of AXES) index = index * DATA.axes[name].length + Number($(name).value);
  for (const name of IDEAS) index = index * 2 + ($(name).checked ? 0 : 1);
  return DATA.planned[index];
}

function cells(row) {
  const [seconds, nbytes, reads, hits] = row;
  const short = (value) => Number(value.toPrecision(3)).toLocaleString("en");
  return [short(1e3 * seconds) + " ms", short(1 / seconds), short(nbytes / 1e6) + " MB",
          short(reads), (100 * hits).toFixed(1) + " %"];
}

function showPlanned() {
  for (const name of AXES) $("o-" + name).textContent = DATA.axes[name][Number($(name).value)];
  const columns = [DATA.measured, DATA.as_recorded, chosen()].map(cells);
  const names = ["time", "tokens/s", "read from flash", "reads of units", "units found in DRAM"];
  $("planned").replaceChildren(...names.map((name, row) => {
    const line = document.createElement("tr");
    for (const text of [name, ...columns.map((column) => column[row])]) {
      const cell = document.createElement("td");
      cell.textContent = text;
      line.append(cell);
    }
    return line;
  }));
}

function begin() {
  $("title").textContent = DATA.title;
  document.title = DATA.title;
  $("made").textContent = DATA.made;
  $("at").max = String(Math.max(0, runs.length * layers.length - 1));
  if (DATA.planned) {
    $("how").textContent = DATA.how;
    for (const name of AXES) {
      $(name).max = String(DATA.axes[name].length - 1);
      $(name).value = String(DATA.start[name]);
      $(name).oninput = showPlanned;
    }
    for (const name of IDEAS) $(name).onchange = showPlanned;
    showPlanned();
  } else {
    $("plan").hidden = true;
  }
  draw();
  if (DATA.live) poll();
}

// ---- live: the program that served this page is asked for what came since
async function poll() {
  try {
    const answer = await fetch("runs?from=" + runs.length);
    const told = await answer.json();
    const following = step >= runs.length * layers.length - layers.length;
    runs.push(...told.runs);
    $("at").max = String(Math.max(0, runs.length * layers.length - 1));
    if (told.runs.length && (following || runs.length === told.runs.length)) {
      go((runs.length - 1) * layers.length + (step % layers.length));
    }
    if (told.done) { DATA.live = false; $("made").textContent += " The run has ended."; return; }
  } catch (error) {
    DATA.live = false;
    $("made").textContent += " The program has ended.";
    return;
  }
  setTimeout(poll, 300);
}

begin();
