// The page: a client of /images, /view and /predict. All it shows is drawn from the last answer of the server.
"use strict";
document.documentElement.classList.add("js");

const $ = (id) => document.getElementById(id);
const form = $("controls");
const titleOf = (name) => about.methods.find((m) => m.name === name).title;

let about;              // of the model: classes, colours, methods
let current = null;     // the image: { blob, name, id, bitmap, number }
let views = {};         // by method: the last answer, with its decoded maps
let point = null;       // what was clicked: [x, y] in [0, 1]
let busy = false;       // one request is under way
let stale = false;      // and what it was asked for has changed since
let edge = 0;           // number of the last image that was chosen: answers for others are dropped

// ---------------------------------------------------------------------------------------------------- the server

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

// A server that is busy is asked again after a while.
async function ask(path, options = {}, tries = 5) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Refused(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  if (answer.status === 429 && tries) {
    await new Promise((done) => setTimeout(done, 1000));
    return ask(path, options, tries - 1);
  }
  const said = await answer.json().catch(() => ({}));
  if (answer.status === 401) $("ask").hidden = false;
  throw new Refused(answer.status, sentence(said.detail || `The server answered with status ${answer.status}.`));
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function say(error) {
  $("message").hidden = !error;
  $("message").textContent = error ? error.message : "";
}

async function send(image) {
  const body = new FormData();
  body.append("image", image.blob, image.name);
  image.id = (await (await ask("images", { method: "POST", body })).json()).id;
}

async function fetchView(image, method, compute) {
  const fetched = async () => {
    const body = JSON.stringify({ image: image.id, method, compute: method === "dense" ? null : compute });
    return decoded(await (await ask("view", { method: "POST", body, headers: { "Content-Type": "application/json" } })).json());
  };
  try {
    return await fetched();
  } catch (error) {
    if (error.status !== 404) throw error;
    await send(image);                  // the server made room for other images
    return fetched();
  }
}

function decoded(view) {
  const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const labels = bytes(view.labels);
  const wide = labels.length > view.size[0] * view.size[1];
  const groups = new Uint32Array(bytes(view.groups).buffer);
  return { ...view, labels: wide ? new Uint16Array(labels.buffer) : labels, scores: bytes(view.scores), exit_stage: bytes(view.exit_stage), groups };
}

// ---------------------------------------------------------------------------------------------------- what is asked

const chosenMethod = () => form.elements.method.value;
const shownMethods = () =>
  chosenMethod() === "compare" ? about.methods.filter((m) => !m.refusal).map((m) => m.name) : [chosenMethod()];

// The last request wins: while one is running, others only mark its answer stale, so the server is never flooded.
async function refresh() {
  stale = true;
  if (busy || !current) return;
  busy = true;
  $("panels").setAttribute("aria-busy", "true");
  try {
    while (stale) {
      stale = false;
      const number = edge, compute = Number($("compute").value), asked = current;
      if (!asked.id) await send(asked);
      const found = {};
      for (const method of shownMethods()) {
        const known = views[method];
        const same = known && known.number === number && (method === "dense" || known.compute === compute);
        found[method] = same ? known : await fetchView(asked, method, compute);
        Object.assign(found[method], { number, compute });
        if (number !== edge) break;
      }
      if (number !== edge) continue;
      views = { ...(views.dense && views.dense.number === number ? { dense: views.dense } : {}), ...found };
      say(null);
      draw();
    }
  } catch (error) {
    say(error);
  } finally {
    busy = false;
    $("panels").setAttribute("aria-busy", "false");
    if (stale) refresh();
  }
}

async function choose(blob, name, sample = null) {
  if (!about) return;                   // the server asks for its token first
  const number = ++edge;
  try {
    let bitmap = await createImageBitmap(blob);
    const factor = Math.sqrt(about.pixels / (bitmap.width * bitmap.height));
    if (factor < 1) ({ blob, bitmap } = await shrunk(bitmap, factor));
    if (number !== edge) return;
    current = { blob, bitmap, name, id: null };
    point = null;
    document.querySelectorAll(".sample").forEach((b) => b.setAttribute("aria-pressed", String(b.value === String(sample))));
    await refresh();
  } catch (error) {
    say(error instanceof Refused ? error : new Error(`${name} cannot be read as an image.`));
  }
}

// Cameras have more pixels than the server accepts: larger images are shrunk to its limit.
async function shrunk(bitmap, factor) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.floor(bitmap.width * factor * 0.98);
  canvas.height = Math.floor(bitmap.height * factor * 0.98);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
  return { blob, bitmap: canvas };
}

// ---------------------------------------------------------------------------------------------------- images

function painted(width, height, paint) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  paint(canvas.getContext("2d"), width, height);
  return canvas;
}

function coloured(values, width, height, colours) {
  return painted(width, height, (context) => {
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const packed = colours.map(([r, g, b]) => new Uint32Array(Uint8Array.of(r, g, b, 255).buffer)[0]);
    values.forEach((value, i) => { pixels[i] = packed[value]; });
    context.putImageData(image, 0, 0);
  });
}

// Thin lines between merged tokens, each of which stands for a group of patches.
function outlined(context, { groups, grid: [rows, columns], extent }, w, h) {
  context.globalAlpha = 0.3;
  context.fillStyle = "#ffffff";
  const x = (column) => Math.round((column * w) / extent[1]), y = (row) => Math.round((row * h) / extent[0]);
  groups.forEach((group, i) => {
    const row = Math.floor(i / columns), column = i % columns;
    if (row && groups[i - columns] !== group) context.fillRect(x(column), y(row), x(column + 1) - x(column), 1);
    if (column && groups[i - 1] !== group) context.fillRect(x(column), y(row), 1, y(row + 1) - y(row));
  });
}

const LOOKS = {
  Image: (view) => painted(current.bitmap.width, current.bitmap.height, (context) => context.drawImage(current.bitmap, 0, 0)),
  Prediction: (view) => coloured(view.labels, view.size[1], view.size[0], about.palette),
  Overlay: (view) => painted(view.size[1], view.size[0], (context, w, h) => {
    context.drawImage(current.bitmap, 0, 0, w, h);
    context.globalAlpha = 0.5;
    context.drawImage(LOOKS.Prediction(view), 0, 0);
  }),
  "Exit map": (view) => {
    const tiles = coloured(view.exit_stage, view.grid[1], view.grid[0], about.colours);
    const zoom = Math.max(1, Math.ceil(900 / view.size[1]));    // so that edges of tokens stay where they are
    return painted(view.size[1] * zoom, view.size[0] * zoom, (context, w, h) => {
      context.drawImage(current.bitmap, 0, 0, w, h);
      context.globalCompositeOperation = "saturation";
      context.fillStyle = "#808080";
      context.fillRect(0, 0, w, h);
      context.globalCompositeOperation = "source-over";
      context.globalAlpha = 0.72;
      context.imageSmoothingEnabled = false;
      context.drawImage(tiles, 0, 0, view.extent[1], view.extent[0], 0, 0, w, h);
      outlined(context, view, w, h);
    });
  },
};

function draw() {
  const methods = shownMethods().filter((method) => views[method]);
  if (!methods.length) return;
  const compare = chosenMethod() === "compare";
  const wanted = compare
    ? [...methods.map((m) => [m, "Overlay"]), ...methods.map((m) => [m, "Exit map"])]
    : ["Overlay", "Exit map", "Prediction", "Image"].map((look) => [methods[0], look]);
  const panels = $("panels");
  panels.style.setProperty("--columns", compare ? methods.length : 2);
  panels.classList.toggle("compare", compare);
  while (panels.children.length > wanted.length) panels.lastChild.remove();
  while (panels.children.length < wanted.length) panels.append(panel());
  wanted.forEach(([method, look], i) => fill(panels.children[i], method, look, compare));
  drawFigures(methods.map((method) => views[method]), compare);
  drawClasses(methods.map((method) => views[method]), compare);
  drawPoint();
  drawThreshold();
}

function panel() {
  const figure = document.createElement("figure");
  figure.innerHTML = '<figcaption><b></b><span></span></figcaption><div class="look" tabindex="0" role="img"></div>';
  const look = figure.lastChild;
  look.addEventListener("click", (event) => {
    const box = look.getBoundingClientRect();
    mark((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  });
  look.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const view = Object.values(views)[0], far = event.shiftKey ? 4 : 1;
    const [x, y] = point || [0.5, 0.5];
    mark(x + (far * step[0]) / (2 * view.extent[1]), y + (far * step[1]) / (2 * view.extent[0]));
  });
  return figure;
}

function fill(figure, method, look, compare) {
  const view = views[method], box = figure.lastChild, ratio = `${view.width} / ${view.height}`;
  const [title, note] = figure.firstChild.children;
  title.textContent = compare ? `${titleOf(method)}${look === "Overlay" ? "" : ", exit map"}` : look;
  note.textContent = compare && look === "Overlay" ? `${percent(view.share_of_dense)}, ${milliseconds(view)} ms` : "";
  box.style.setProperty("--ratio", ratio);
  box.setAttribute("aria-label", described(view, method, look));
  const canvas = LOOKS[look](view);
  if (look !== "Prediction") canvas.className = "smooth";
  const cross = box.querySelector(".cross");
  box.replaceChildren(canvas, ...(cross ? [cross] : []));
}

function described(view, method, look) {
  const largest = view.classes.slice(0, 3).map((c) => `${c.name} ${percent(c.share)}`).join(", ");
  if (look === "Image") return `Image, ${view.width} by ${view.height} pixels`;
  if (look === "Exit map") return `Exit map of ${titleOf(method)}: ${percent(view.stayed / view.tokens)} of tokens stayed to the end`;
  return `${look} of ${titleOf(method)}: ${largest}`;
}

// ---------------------------------------------------------------------------------------------------- figures

const percent = (share) => `${Math.round(100 * share)} %`;
const digits = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
const milliseconds = (view) => (view.milliseconds >= 10 ? view.milliseconds.toFixed(0) : view.milliseconds.toFixed(1));

const exitName = (n) => (n < about.exits.length ? `Exit ${n + 1}, after block ${about.exits[n]}` : "Stayed to the end");

function drawFigures(shown, compare) {
  const [view] = shown;
  $("cost").hidden = compare;
  $("share").textContent = percent(view.share_of_dense);
  $("milliseconds").textContent = milliseconds(view);
  $("gmacs").textContent = `${digits(view.gmacs)} of ${digits(view.dense_gmacs)} GMACs, ${view.tokens} tokens`;
  $("caption").textContent = compare ? "Tokens by exit, and cost" : "Where tokens left";
  const heads = compare ? shown.map((one) => titleOf(one.method)) : ["left", "live after"];
  const left = (one) => [...one.exits.map((exit) => exit.left), one.stayed];
  const exits = left(view).map((count, n) => [exitName(n), ...(compare ? shown.map((one) => left(one)[n]) : [count, view.exits[n]?.live ?? ""])]);
  const costs = [["Of dense", (one) => percent(one.share_of_dense)], ["GMACs", (one) => digits(one.gmacs)], ["Milliseconds", milliseconds]];
  const rows = compare ? [...exits, ...costs.map(([title, figure]) => [title, ...shown.map(figure)])] : exits;
  const filled = (row, values, tag) => {
    row.replaceChildren(...values.map((value, n) => {
      const cell = document.createElement(n ? tag : "th");
      if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : "row";
      cell.textContent = value;
      return cell;
    }));
    return row;
  };
  filled($("exits").tHead.rows[0], ["Exit", ...heads], "th");
  $("exits").tBodies[0].replaceChildren(...rows.map((values, n) => {
    const row = filled(document.createElement("tr"), values, "td");
    if (n < exits.length) row.firstChild.prepend(swatch(about.colours[n]));
    if (!compare) {
      row.lastChild.className = "bar";
      row.lastChild.style.setProperty("--part", `${(100 * row.lastChild.textContent) / view.tokens}%`);
    }
    return row;
  }));
}

function swatch(colour) {
  const square = document.createElement("span");
  square.className = "swatch";
  square.style.setProperty("--colour", `rgb(${colour})`);
  return square;
}

function drawClasses(shown, compare) {
  const shares = Object.fromEntries(shown.flatMap((view) => view.classes.map((c) => [c.id, c.share])));
  $("classes").replaceChildren(...about.classes.map((name, k) => {
    const entry = document.createElement("li");
    entry.className = shares[k] ? "" : "none";
    entry.innerHTML = "<span></span> <small></small>";
    entry.children[0].textContent = name;
    entry.children[1].textContent = compare ? "" : shares[k] ? (shares[k] < 0.01 ? "< 1 %" : percent(shares[k])) : "–";
    entry.prepend(swatch(about.palette[k]));
    return entry;
  }));
}

function mark(x, y) {
  const inside = (value) => Math.min(Math.max(value, 0), 0.9999);
  point = [inside(x), inside(y)];
  drawPoint();
}

function drawPoint() {
  for (const look of document.querySelectorAll(".look")) {
    let cross = look.querySelector(".cross");
    if (!point) { cross?.remove(); continue; }
    if (!cross) {
      cross = document.createElement("div");
      cross.className = "cross";
      look.append(cross);
    }
    [cross.style.left, cross.style.top] = point.map((value) => `${100 * value}%`);
  }
  if (!point) return;
  const [x, y] = point;
  const lines = shownMethods().filter((m) => views[m]).map((method) => {
    const view = views[method], [height, width] = view.size;
    const at = Math.floor(y * height) * width + Math.floor(x * width);
    const token = Math.floor(y * view.extent[0]) * view.grid[1] + Math.floor(x * view.extent[1]);
    const score = view.scores[at] >= 254 ? "over 99 %" : percent(view.scores[at] / 255);
    const exit = view.exit_stage[token], end = exit >= about.exits.length;
    const where = end ? `stayed through all ${about.blocks} blocks` : `left at exit ${exit + 1}, after block ${about.exits[exit]}`;
    const line = document.createElement("div");
    line.innerHTML = "<span></span><b></b><span></span>";
    line.children[0].textContent = chosenMethod() === "compare" ? `${titleOf(method)}: ` : "";
    line.children[1].textContent = about.classes[view.labels[at]];
    const patches = view.groups.reduce((count, group) => count + (group === view.groups[token]), 0);
    line.children[2].textContent = `, ${score}; its token ${patches > 1 ? `stands for ${patches} patches and ` : ""}${where}.`;
    return line;
  });
  const view = Object.values(views)[0], where = document.createElement("div");
  where.className = "quiet";
  where.textContent = `Pixel ${Math.floor(x * view.width)}, ${Math.floor(y * view.height)}`;
  $("readout").replaceChildren(where, ...lines);
}

function drawDial() {
  const offers = about.methods.filter((m) => (chosenMethod() === "compare" ? m.compute !== null : m.name === chosenMethod()));
  const offer = offers.find((m) => m.calibrated) || offers[0];
  const dial = document.querySelector(".dial");
  dial.disabled = !offer || offer.compute === null;
  $("reset").hidden = dial.disabled;
  $("reset").textContent = offer?.calibrated ? "as calibrated" : "default";
  $("reset").value = offer?.compute ?? "";
}

function drawThreshold() {
  const view = views[chosenMethod()];
  const numbers = view?.threshold?.flat();
  const short = (value) => (value >= 1 ? "1" : value.toFixed(3));
  const text = !numbers ? "" : Number($("compute").value) === 1 ? "no token leaves"
    : `threshold ${[...new Set(numbers.map(short))].slice(0, 4).join(" / ")}`;
  $("threshold").textContent = text || "\u00a0";
  $("compute").setAttribute("aria-valuetext", `${percent($("compute").value)}${text ? `, ${text}` : ""}`);
}

// ---------------------------------------------------------------------------------------------------- downloads

async function download(format, suffix) {
  if (!current) return say(new Error("Choose an image first."));
  const method = shownMethods().find((m) => m !== "dense") || "dense";
  const body = new FormData();
  body.append("images", current.blob, current.name);
  body.append("method", method);
  body.append("format", format);
  if (method !== "dense") body.append("compute", $("compute").value);
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await (await ask("predict", { method: "POST", body })).blob());
    link.download = `${current.name.replace(/\.[^.]*$/, "")}-${method}${suffix}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(null);
  } catch (error) {
    say(error);
  }
}

// ---------------------------------------------------------------------------------------------------- beginning

const chooseSample = async (number) => {
  const answer = await ask(`samples/${number}.png`);
  await choose(await answer.blob(), `sample-${Number(number) + 1}.png`, number);
};

async function start() {
  about = await (await ask("model")).json();
  $("about").textContent =
    `${about.name} · ${about.blocks} blocks, exits after ${about.exits.join(", ")} · ${about.classes.length} classes`;
  const radio = [...form.elements.method].find((input) => input.value === about.usual && !input.disabled);
  if (radio) radio.checked = true;
  drawDial();
  if ($("reset").value) $("compute").value = $("reset").value;
  if (document.querySelector(".sample")) await chooseSample(0);
  else $("panels").setAttribute("aria-busy", "false");   // scenes say nothing to a model of other classes
}

const trying = (work) => (...given) => work(...given).catch(say);

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("click", (event) => {
  const sample = event.target.closest(".sample");
  if (sample) { event.preventDefault(); trying(chooseSample)(sample.value); }
});
form.addEventListener("change", (event) => {
  if (event.target.name === "method") { drawDial(); refresh(); }
});
$("compute").addEventListener("input", refresh);
$("reset").addEventListener("click", () => { $("compute").value = $("reset").value; refresh(); });
$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) choose(file, file.name);
  event.target.value = "";              // so that the same file can be chosen again
});
$("mask").addEventListener("click", () => download("png", ".png"));
$("json").addEventListener("click", () => download("json", ".json"));
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("ask").hidden = true;
  say(null);
  trying(start)();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) choose(file, file.name);
  });
}
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) choose(file, file.name || "pasted.png");
});
document.querySelectorAll(".origin").forEach((code) => { code.textContent = new URL(".", location.href).href; });
trying(start)();
