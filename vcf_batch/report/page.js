
"use strict";
// Everything from the data is shown through textContent and attributes: a prompt is never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const scoreNames = data.scores.map((score) => score.name);
const scored = data.scores.filter((score) => score.count);
/** Rows that only a dot stands for, in the form of data.samples. They have a small picture, and no reference. */
const dotsAlone = data.points.map(([number, key, setting, prompt, picture, ...values]) => ({
  number, key, setting, prompt, isDot: true, references: 0, groups: [], pictures: { output: picture },
  scores: Object.fromEntries(scoreNames.map((name, place) => [name, values[place]])),
}));
const everything = [...data.samples, ...dotsAlone];

function make(name, attributes = {}, ...children) {
  const spaces = ["svg", "g", "rect", "line", "circle", "path", "text", "title"];
  const element = spaces.includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}
const count = (number) => number.toLocaleString("en-US");
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const score3 = (value) => (value === null ? "–" : value.toFixed(3));
function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
const date = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 10);
const clock = (seconds, exact) => new Date(seconds * 1000).toISOString().slice(11, exact ? 19 : 16);
/** About `most` round numbers from low to high. */
function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(+value.toFixed(10));
  return found;
}
/** Draws a chart into a host now, and again whenever the host gets another width. */
function chart(host, draw) {
  const redraw = () => host.clientWidth && host.replaceChildren(draw(host.clientWidth));
  let width = 0;
  new ResizeObserver(() => { if (host.clientWidth !== width) { width = host.clientWidth; redraw(); } }).observe(host);
  redraw();
  return redraw;
}
function options(select, entries) {
  for (const [value, text] of entries) select.append(make("option", { value }, text));
}
function definitions(entries) {
  return entries.map(([term, value, css]) => make("div", css ? { class: css } : {}, make("dt", {}, term), make("dd", {}, value)));
}

// Key figures

function showKeys() {
  $("name").textContent = data.name;
  $("address").textContent = data.address;
  $("model").textContent = `by ${data.model}`;
  if (data.done < data.rows) {
    $("progress").hidden = false;
    $("bar").style.width = `${(100 * data.done) / data.rows}%`;
    $("progress-text").textContent = `Not finished: ${count(data.done)} of ${plural(data.rows, "row")}. What follows is about these.`;
  }
  const time = data.time;
  const busy = time && time.end > time.begin;
  $("keys").append(...definitions([
    ["samples", count(data.counts.success)],
    ["failed", count(data.counts.failed), data.counts.failed ? "bad" : ""],
    ...(data.counts.rejected ? [["rejected", count(data.counts.rejected)]] : []),
    ...Object.entries(data.duplicates).map(([name, rows]) => [name, count(rows)]),
    ...scored.map((score) => [`mean ${score.name}`, score3(score.mean)]),
    ...(busy ? [["rows a second", (data.done / (time.end - time.begin)).toFixed(2)], ["from first to last shard", duration(time.end - time.begin)]] : []),
  ]));
}

// Samples

/** The picture of a sample at a place in data.pictures, with its size; null if there is none. */
function picture(place, alt) {
  if (place === undefined || place === null) return null;
  const [source, width, height] = data.pictures[place];
  const image = make("img", { src: source, alt });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 100));
  return { image, width, height };
}
function marksOf(sample, chosenScore) {
  return definitions(data.scores.filter((score) => (sample.scores[score.name] ?? null) !== null)
    .map((score) => [score.label, score3(sample.scores[score.name]), score.name === chosenScore ? "chosen" : ""]));
}
const withoutReference = (sample) => (sample.isDot ? "not in this page" : sample.setting === "text only" ? "text only" : "reference not available");
const factsOf = (sample) => (sample.isDot ? sample.setting : `in ${sample.shard} · ${sample.setting} · seed ${sample.seed}`);

function card(sample, chosenScore) {
  const words = [];  // what stands on the button: its name has it too
  const tile = (name, instead) => {
    const found = picture(sample.pictures[name], "");
    const text = found ? (sample.references > 1 && name === "reference" ? `1 of ${sample.references}` : null) : instead;
    words.push(...(text ? [text] : []));
    return make("span", { class: "tile" }, found && found.image, found && text ? make("span", { class: "badge" }, text) : text);
  };
  const tiles = [tile("reference", withoutReference(sample)), tile("output", "no picture")];
  const open = make("button", { type: "button", class: "pair", "aria-haspopup": "dialog", "aria-keyshortcuts": "f",
    "aria-label": [...words, `open sample ${sample.key}`].join(", ") }, ...tiles);
  open.addEventListener("click", () => openViewer(shownSamples, sample, focusCard));
  open.addEventListener("keydown", (event) => onFlagKey(event, sample));
  return make("figure", { id: `row-${sample.number}` }, open,
    make("figcaption", {},
      make("p", { class: "prompt", title: sample.prompt }, sample.prompt || "(empty prompt)"),
      make("dl", { class: "marks" }, ...marksOf(sample, chosenScore)),
      make("div", { class: "foot" },
        make("p", { class: "quiet" }, make("span", { class: "key" }, sample.key), ` ${factsOf(sample)}`), flagButton(sample))));
}
const focusCard = (sample) => $(`row-${sample.number}`)?.querySelector(".pair").focus();
let shownSamples = [];

function showGallery() {
  const form = $("controls");
  const { group, score: name, order, setting, text } = form.elements;
  const score = data.scores.find((each) => each.name === name.value);
  const sign = score.higher ? -1 : 1;
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const value = (sample) => sample.scores[score.name] ?? null;
  const compare = {
    number: (a, b) => a.number - b.number,
    best: (a, b) => sign * (value(a) - value(b)) || a.number - b.number,
    worst: (a, b) => sign * (value(b) - value(a)) || a.number - b.number,
  }[order.value];
  const wanted = { random: "random", best: `best ${score.name}`, worst: `worst ${score.name}` }[group.value];
  const among = group.value === "flagged" ? everything.filter((sample) => flags.has(sample.key)) : data.samples;
  const found = among.filter((sample) => (!wanted || sample.groups.includes(wanted))
    && (!setting.value || sample.setting === setting.value)
    && words.every((word) => `${sample.key} ${sample.prompt}`.toLowerCase().includes(word))
    && (order.value === "number" || value(sample) !== null)).sort(compare);
  shownSamples = found;
  $("gallery").replaceChildren(...found.map((sample) => card(sample, score.name)));
  const share = { random: "drawn at random", best: `best by ${score.name}`, worst: `worst by ${score.name}`, all: "kept in this page", flagged: "flagged and kept in this page" }[group.value];
  $("shown").textContent = `${plural(found.length, "sample")}, ${share}, of ${count(data.counts.success)}`;
}

function setUpGallery() {
  const form = $("controls");
  options(form.elements.score, (scored.length ? scored : data.scores).filter((score) => !score.added).map((score) => [score.name, `${score.label} (${score.name})`]));
  const settings = [...new Set(data.samples.map((sample) => sample.setting))].sort();
  options(form.elements.setting, settings.map((setting) => [setting, setting]));
  $("setting-field").hidden = settings.length < 2;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "group") form.elements.order.value = { best: "best", worst: "worst" }[event.target.value] ?? "number";
    showGallery();
  });
  showGallery();
}

// One sample, large

let viewed = null;  // { list, sample, goBack }

function openViewer(list, sample, goBack) {
  viewed = { list, sample, goBack };
  showViewed();
  if (!$("viewer").open) $("viewer").showModal();
}
/** A picture with what it is, and what its size is if it was reduced. */
function exhibit(sample, name, label) {
  const found = picture(sample.pictures[name], name === "output" ? `${label}: ${sample.prompt}` : label);
  if (!found) return null;
  const told = make("figcaption", { class: "quiet" }, label);
  const { image, width, height } = found;
  image.addEventListener("load", () => {
    image.style.setProperty("--own", `${width}px`);
    const isWhole = image.naturalWidth === width;
    told.textContent = `${label}, ${width} × ${height} pixels${isWhole ? "" : `, reduced to ${image.naturalWidth} × ${image.naturalHeight}`}`;
    if (!isWhole) $("viewer-reduced").hidden = false;
  });
  return make("figure", { class: "exhibit" }, image, told);
}
function showViewed() {
  const { list, sample } = viewed;
  const at = list.indexOf(sample);
  $("viewer-key").textContent = sample.key;
  $("viewer-place").textContent = `${at + 1} of ${list.length}`;
  $("viewer-reduced").hidden = true;
  $("viewer-reduced").textContent = "Pictures are reduced where this page would be larger than 3 MB."
    + (sample.shard ? ` The image itself is ${sample.key}.${data.ending} in ${sample.shard}.tar.` : "");
  $("viewer-output").replaceChildren(exhibit(sample, "output", "output") ?? make("p", { class: "quiet" }, "This page has no picture of it."));
  const more = sample.references > 1 ? `reference, 1 of ${sample.references}` : "reference";
  const beside = [exhibit(sample, "reference", more), exhibit(sample, "content", "content twin"), exhibit(sample, "style", "style image")].filter(Boolean);
  const without = sample.isDot ? "The plot has a small picture of it alone." : sample.setting === "text only" ? "Text only: it has no reference." : "Its reference is not available.";
  $("viewer-beside").replaceChildren(...(sample.pictures.reference == null ? [make("p", { class: "quiet" }, without)] : []), ...beside);
  $("viewer-prompt").textContent = sample.prompt || "(empty prompt)";
  $("viewer-scores").replaceChildren(...marksOf(sample, ""));
  $("viewer-facts").textContent = factsOf(sample);
  $("viewer-before").disabled = at <= 0;
  $("viewer-next").disabled = at >= list.length - 1;
  showFlags();
}
function step(by) {
  const { list, sample } = viewed;
  const next = list[list.indexOf(sample) + by];
  if (!next) return;
  viewed.sample = next;
  // A button that is disabled while it has the focus would lose it to the page behind.
  const focused = document.activeElement;
  showViewed();
  if (focused?.disabled) $("viewer-close").focus();
  $("viewer").scrollTop = 0;
}
function setUpViewer() {
  const dialog = $("viewer");
  $("viewer-before").addEventListener("click", () => step(-1));
  $("viewer-next").addEventListener("click", () => step(1));
  $("viewer-close").addEventListener("click", () => dialog.close());
  $("viewer-flag").addEventListener("click", () => toggleFlag(viewed.sample));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) {
      event.preventDefault();
      step(by);
    } else onFlagKey(event, viewed.sample);
  });
  dialog.addEventListener("close", () => {
    viewed.goBack(viewed.sample);
    refreshFlagged();
  });
}

// Flags: keys, kept by the browser under the run's fingerprint

const flagsName = `vcf-batch flags ${data.fingerprint}`;
let flags = readFlags();
let keepsFlags = true;

function readFlags() {
  try {
    const found = JSON.parse(localStorage.getItem(flagsName) ?? "[]");
    return new Set(found.filter((key) => /^[\w-]{1,128}$/.test(key)));
  } catch {
    return new Set();
  }
}
function keepFlags() {
  try {
    localStorage.setItem(flagsName, JSON.stringify([...flags]));
  } catch {
    keepsFlags = false;  // Private windows and frames may have no storage.
  }
  showFlags();
  refreshFlagged();
}
function refreshFlagged() {
  if ($("controls").elements.group.value !== "flagged" || $("viewer").open) return;
  const hadFocus = $("gallery").contains(document.activeElement);
  showGallery();
  if (hadFocus) ($("gallery").querySelector("button") ?? $("flags-title")).focus();
}
function toggleFlag(sample) {
  if (!flags.delete(sample.key)) flags.add(sample.key);
  keepFlags();
}
function onFlagKey(event, sample) {
  if (event.key.toLowerCase() !== "f" || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  event.preventDefault();
  toggleFlag(sample);
}
function showFlag(button, key) {
  button.setAttribute("aria-pressed", flags.has(key));
}
function flagButton(sample) {
  const button = make("button", { type: "button", class: "flag", "data-key": sample.key, "aria-label": `Flag ${sample.key}` }, "Flag");
  button.addEventListener("click", () => toggleFlag(sample));
  showFlag(button, sample.key);
  return button;
}
function showFlags() {
  for (const button of document.querySelectorAll("#gallery .flag")) showFlag(button, button.dataset.key);
  for (const dot of document.querySelectorAll(".dots [data-key]")) dot.classList.toggle("flagged", flags.has(dot.dataset.key));
  if (viewed) {
    const told = flags.has(viewed.sample.key) ? "flagged" : "";
    showFlag($("viewer-flag"), viewed.sample.key);
    $("viewer-place").textContent = [$("viewer-place").textContent.split(",")[0], told].filter(Boolean).join(", ");
  }
  $("flags-list").hidden = !flags.size;
  $("flags-count").textContent = (flags.size ? `${plural(flags.size, "sample")} flagged.` : "None yet.")
    + (keepsFlags ? "" : " This browser does not keep them: export the list before you close the page.");
  $("flags-keys").value = [...flags].sort().join("\n");
}
function setUpFlags() {
  const name = `${data.name.replace(/[^\w.-]+/g, "-").replace(/^[-.]+/, "") || "output"}-flagged.txt`;
  $("flags-export").textContent = `vcf-batch export ${data.argument} TARGET --exclude ${name}`;
  $("flags-repair").textContent = `vcf-batch repair ${data.argument} --keys ${name}`;
  $("flags-save").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([`${$("flags-keys").value}\n`], { type: "text/plain" }));
    make("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    $("flags-told").textContent = `Saved as ${name}.`;
  });
  $("flags-copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(`${$("flags-keys").value}\n`);
      $("flags-told").textContent = `${plural(flags.size, "key")} copied.`;
    } catch {
      $("flags-keys").select();
      $("flags-told").textContent = "This browser does not let the page copy. The keys are selected: copy them by Ctrl+C.";
    }
  });
  $("flags-clear").addEventListener("click", () => {
    if (!confirm(`Remove the flags of ${plural(flags.size, "sample")}?`)) return;
    flags = new Set();
    keepFlags();
    $("flags-title").focus();  // The button is gone.
  });
  addEventListener("storage", (event) => {
    if (event.key !== flagsName) return;
    flags = readFlags();
    showFlags();
    refreshFlagged();
  });
  showFlags();
}

// Scores

function histogram(score) {
  const host = make("div", { class: "chart" });
  const [low, median, high] = score.quantiles;
  const draw = (width) => {
    const height = 150, bottom = 24, top = 18;
    const end = score.start + score.width * score.bars.length;
    const x = (value) => ((value - score.start) / (end - score.start)) * width;
    const most = Math.max(...score.bars);
    const bars = make("g", { class: "bars" });
    score.bars.forEach((bar, place) => {
      const from = score.start + place * score.width;
      const length = (bar / most) * (height - bottom - top);
      const middle = from + score.width / 2;
      bars.append(make("rect", {
        x: x(from) + 0.5, width: Math.max(x(from + score.width) - x(from) - 1, 1), y: height - bottom - length, height: length,
        rx: 1, class: middle >= low && middle <= high ? "inside" : "",
      }, make("title", {}, `${from.toFixed(3)} to ${(from + score.width).toFixed(3)}: ${count(bar)}`)));
    });
    const labels = ticks(score.start, end, Math.max(Math.floor(width / 80), 2))
      .map((tick) => make("text", { x: x(tick), y: height - 6, "text-anchor": x(tick) < 14 ? "start" : x(tick) > width - 14 ? "end" : "middle" }, String(tick)));
    return make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Histogram of ${score.name}` },
      bars,
      make("line", { class: "axis", x1: 0, x2: width, y1: height - bottom, y2: height - bottom }),
      make("line", { class: "mean", x1: x(score.mean), x2: x(score.mean), y1: top - 6, y2: height - bottom }),
      ...labels);
  };
  const box = make("div", {},
    make("h3", {}, score.name),
    make("p", { class: "quiet" }, score.meaning),
    host,
    make("p", { class: "quiet" }, `mean ${score3(score.mean)} · median ${score3(median)} · 5 % below ${score3(low)}, above ${score3(high)} · ${score3(score.low)} to ${score3(score.high)} · ${plural(score.count, "sample")}`));
  return [box, () => chart(host, draw)];
}

function showHistograms() {
  for (const [box, start] of scored.map(histogram)) {
    $("histograms").append(box);
    start();
  }
  if (!scored.length) $("histograms").append(make("p", { class: "quiet" }, "No sample has a score."));
}

function table(heads, lines) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  const rows = lines.map((line) => make("tr", {}, ...line.map((text) => make("td", {}, text))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

function showCategories() {
  $("categories-section").hidden = !data.categories.length;
  for (const { name, lines } of data.categories) {
    const told = lines.map(([value, ...counts]) => [value, ...counts.map(count)]);
    $("categories").append(table([name, "rows", "rejected", "failed", "samples"], told));
  }
}

function showCalibration() {
  const [heads, ...lines] = data.calibration;
  $("calibration-section").hidden = !heads;
  if (heads) $("calibration").append(table(heads, lines));
}

// Trade-off

/** Shows the sample of a dot beside the plot. */
function showDot(sample) {
  const marks = scoreNames.filter((name) => (sample.scores[name] ?? null) !== null).map((name) => `${name} ${score3(sample.scores[name])}`);
  $("readout").replaceChildren(...[
    picture(sample.pictures.output, "")?.image ?? make("p", { class: "quiet" }, "no picture"),
    make("p", {}, make("span", { class: "key" }, sample.key), ` · ${sample.setting}`),
    make("p", { class: "quiet" }, marks.join(" · ")),
    make("p", { class: "quiet clamp" }, sample.prompt),
  ]);
}

function showScatter() {
  const across = scored.filter((score) => score.name !== "clip_score" && score.higher !== null);
  if (!scored.some((score) => score.name === "clip_score") || !across.length) {
    $("tradeoff-section").hidden = true;
    return;
  }
  $("dots-told").textContent = data.cut.includes("points") ? "Each dot is a sample; some are left out, as the page is full."
    : data.drawn < data.counts.success ? `Each dot is a sample: ${count(data.drawn)} drawn at random, and the best and the worst by each score.` : "Each dot is a sample.";
  options($("across"), across.map((score) => [score.name, `${score.name}, ${score.higher ? "higher" : "lower"} is closer`]));
  const settings = [...new Set(everything.map((sample) => sample.setting))].filter((setting) => setting !== "text only").sort();
  options($("highlight"), settings.map((setting) => [setting, setting]));
  $("highlight-field").hidden = settings.length < 2;
  let current = null;  // the sample of the one dot that Tab reaches
  const draw = (width) => {
    const height = Math.min(Math.max(width * 0.5, 260), 440), left = 44, bottom = 40, top = 8, right = 8;
    const name = $("across").value, highlight = $("highlight").value;
    const has = (sample, score) => (sample.scores[score] ?? null) !== null;
    const points = everything.filter((sample) => has(sample, name) && has(sample, "clip_score"))
      .sort((a, b) => a.scores[name] - b.scores[name] || a.number - b.number);
    const scale = (values, from, to) => {
      const low = Math.min(...values), high = Math.max(...values), room = (high - low) * 0.04 || 0.01;
      const place = (value) => from + ((value - low + room) / (high - low + 2 * room)) * (to - from);
      return [place, ticks(low - room, high + room, Math.max(Math.floor(Math.abs(to - from) / 90), 2))];
    };
    const [x, xTicks] = scale(points.map((sample) => sample.scores[name]), left, width - right);
    const [y, yTicks] = scale(points.map((sample) => sample.scores.clip_score), height - bottom, top);
    const dots = make("g", { class: "dots" });
    const circles = points.map((sample) => make("circle", {
      cx: x(sample.scores[name]).toFixed(1), cy: y(sample.scores.clip_score).toFixed(1), r: points.length > 400 ? 3.5 : 4.5,
      class: highlight && sample.setting !== highlight ? "dim" : "", "data-key": sample.key, tabindex: -1, role: "button", "aria-haspopup": "dialog",
      "aria-label": `${sample.key}, ${name} ${score3(sample.scores[name])}, clip_score ${score3(sample.scores.clip_score)}`,
    }));
    dots.append(...circles);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `clip_score against ${name} of ${plural(points.length, "sample")}` },
      ...xTicks.flatMap((tick) => [
        make("line", { class: "axis", x1: x(tick), x2: x(tick), y1: top, y2: height - bottom }),
        make("text", { x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, String(tick))]),
      ...yTicks.flatMap((tick) => [
        make("line", { class: "axis", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
        make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(tick))]),
      make("text", { x: width - right, y: height - 4, "text-anchor": "end" }, name),
      make("text", { x: left + 6, y: top + 12 }, "clip_score"),
      dots);
    const upwards = points.map((_, place) => place).sort((a, b) => points[a].scores.clip_score - points[b].scores.clip_score);
    let at = Math.max(points.indexOf(current), 0);
    const mark = (place) => {
      circles[at]?.classList.remove("at");
      circles[at]?.setAttribute("tabindex", -1);
      at = place;
      current = points[place];
      circles[at].classList.add("at");
      circles[at].setAttribute("tabindex", 0);
      showDot(points[at]);
    };
    circles[at]?.setAttribute("tabindex", 0);
    if (points[at] === current) circles[at]?.classList.add("at");
    circles.forEach((circle, place) => circle.addEventListener("focus", () => mark(place)));
    const open = () => openViewer(points, points[at], (sample) => circles[points.indexOf(sample)]?.focus());
    svg.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const rank = upwards.indexOf(at);
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: points.length - 1 }[event.key]
        ?? { ArrowUp: upwards[rank + 1], ArrowDown: upwards[rank - 1] }[event.key];
      if (event.key.startsWith("Arrow") || next !== undefined) {
        event.preventDefault();
        circles[next]?.focus();
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        open();
      } else onFlagKey(event, points[at]);
    });
    const nearest = (event) => {
      const box = svg.getBoundingClientRect();
      let found = -1, distance = 24 ** 2;
      circles.forEach((circle, place) => {
        const d = (circle.getAttribute("cx") - event.clientX + box.left) ** 2 + (circle.getAttribute("cy") - event.clientY + box.top) ** 2;
        if (d < distance) [found, distance] = [place, d];
      });
      return found;
    };
    svg.addEventListener("pointermove", (event) => {
      const found = nearest(event);
      if (found >= 0 && found !== at) mark(found);
    });
    svg.addEventListener("click", (event) => {
      const found = nearest(event);
      if (found < 0) return;
      mark(found);
      open();
    });
    return svg;
  };
  const redraw = chart($("scatter"), (width) => {
    const hadFocus = $("scatter").contains(document.activeElement);
    queueMicrotask(() => {  // once the plot is in the page
      showFlags();
      if (hadFocus) $("scatter").querySelector("[tabindex='0']")?.focus();
    });
    return draw(width);
  });
  for (const id of ["across", "highlight"]) $(id).addEventListener("input", redraw);
}

// Failures, throughput, configuration

function showFailures() {
  const host = $("failures");
  if (!data.causes.length) {
    host.append(make("p", { class: "quiet" }, "None."));
    return;
  }
  const rows = data.causes.map((cause) => make("tr", {},
    make("td", {}, count(cause.count)), make("td", {}, cause.status),
    make("td", {}, make("details", {}, make("summary", {}, cause.text),
      make("p", { class: "quiet" }, "For example ", make("span", { class: "key" }, cause.key), `: ${cause.example}`)))));
  const head = make("tr", {}, ...["rows", "status", "cause"].map((text) => make("th", { scope: "col" }, text)));
  host.append(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

function showTime() {
  const time = data.time;
  if (!time) {
    $("time-section").hidden = true;
    return;
  }
  const edges = time.rates.map((_, place) => time.start + place * time.seconds);
  const [long, short] = [time.end - time.begin > 86400, time.end - time.begin < 600];
  const when = (seconds) => (long ? `${date(seconds)} ` : "") + clock(seconds, short);
  $("time-lead").textContent = `Rows a second in ${plural(time.rates.length, "interval")} of ${duration(time.seconds)}, ${long ? "" : `on ${date(time.begin)} `}from ${when(time.begin)} to ${when(time.end)} UTC.`;
  chart($("throughput"), (width) => {
    const height = 180, left = 44, bottom = 28, top = 10;
    const most = Math.max(...time.rates) || 1;
    const x = (value) => left + ((Math.min(Math.max(value, time.begin), time.end) - time.begin) / (time.end - time.begin)) * (width - left);
    const y = (rate) => height - bottom - (rate / most) * (height - bottom - top);
    const steps = time.rates.map((rate, place) => `L${x(edges[place]).toFixed(1)},${y(rate).toFixed(1)}H${x(edges[place] + time.seconds).toFixed(1)}`).join("");
    const line = `M${left},${y(0)}${steps}V${y(0)}`;
    const labels = Math.max(Math.floor(width / (long ? 220 : 120)), 2);
    return make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Rows a second over time" },
      ...ticks(0, most, 3).flatMap((tick) => [
        make("line", { class: "axis", x1: left, x2: width, y1: y(tick), y2: y(tick) }),
        make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(tick))]),
      make("path", { class: "area", d: `${line}Z` }), make("path", { class: "edge", d: line }),
      ...Array.from({ length: labels + 1 }, (_, place) => {
        const at = time.begin + ((time.end - time.begin) * place) / labels;
        return make("text", { x: x(at), y: height - 6, "text-anchor": place === 0 ? "start" : place === labels ? "end" : "middle" }, when(at));
      }));
  });
  const phases = time.phases.filter(([, seconds]) => seconds >= 0.001 * time.worker_seconds);
  for (const [phase, seconds] of phases) {
    const bar = make("div");
    bar.style.width = `${Math.min((100 * seconds) / (time.worker_seconds || 1), 100)}%`;
    $("phases").append(make("div", {}, make("span", {}, phase), make("div", { class: "track" }, bar), make("span", {}, duration(seconds))));
  }
  if (phases.length) $("phases").prepend(make("p", { class: "quiet" }, `Where ${duration(time.worker_seconds)} of workers went. Phases overlap.`));
}

function showConfiguration() {
  for (const [heading, facts] of Object.entries(data.configuration)) {
    $("configuration").append(make("div", {}, make("h3", {}, heading), make("dl", { class: "facts" }, ...definitions(Object.entries(facts)))));
  }
}

function showCut() {
  const names = { points: "dots", categories: "categories", calibration: "lines of the calibration", causes: "causes", samples: "samples" };
  $("cut").hidden = !data.cut.length;
  $("cut").textContent = `Left out, to keep this page below 3 MB: some ${data.cut.map((name) => names[name]).join(", some ")}.`;
}

showKeys();
setUpGallery();
setUpViewer();
setUpFlags();
showHistograms();
showCategories();
showCalibration();
showScatter();
showFailures();
showTime();
showConfiguration();
showCut();
