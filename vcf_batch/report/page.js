
"use strict";
// Everything from the data is shown through textContent and attributes: a prompt is never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const scoreNames = data.scores.map((score) => score.name);
const scored = data.scores.filter((score) => score.count);

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

function card(sample, chosenScore) {
  const tile = (picture, alt, instead) => {
    if (picture === null) return make("div", { class: "tile" }, instead);
    const image = make("img", { src: data.pictures[picture], alt });
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 100));
    const badge = sample.references > 1 && alt === "reference" ? make("span", { class: "badge" }, `1 of ${sample.references}`) : null;
    return make("div", { class: "tile" }, image, badge);
  };
  const instead = sample.setting === "text only" ? "text only" : "reference not available";
  const marks = data.scores.filter((score) => sample.scores[score.name] !== null)
    .map((score) => [score.label, score3(sample.scores[score.name]), score.name === chosenScore ? "chosen" : ""]);
  return make("figure", { id: `row-${sample.number}` },
    make("div", { class: "pair" }, tile(sample.reference, "reference", instead), tile(sample.output, `output: ${sample.prompt}`)),
    make("figcaption", {},
      make("p", { class: "prompt", title: sample.prompt }, sample.prompt || "(empty prompt)"),
      make("dl", { class: "marks" }, ...definitions(marks)),
      make("p", { class: "quiet" }, make("span", { class: "key" }, sample.key), ` in ${sample.shard} · ${sample.setting} · seed ${sample.seed}`)));
}

function showGallery() {
  const form = $("controls");
  const { group, score: name, order, setting, text } = form.elements;
  const score = data.scores.find((each) => each.name === name.value);
  const sign = score.higher ? -1 : 1;
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const value = (sample) => sample.scores[score.name];
  const compare = {
    number: (a, b) => a.number - b.number,
    best: (a, b) => sign * (value(a) - value(b)) || a.number - b.number,
    worst: (a, b) => sign * (value(b) - value(a)) || a.number - b.number,
  }[order.value];
  const wanted = { random: "random", best: `best ${score.name}`, worst: `worst ${score.name}` }[group.value];
  const found = data.samples.filter((sample) => (!wanted || sample.groups.includes(wanted))
    && (!setting.value || sample.setting === setting.value)
    && words.every((word) => `${sample.key} ${sample.prompt}`.toLowerCase().includes(word))
    && (order.value === "number" || value(sample) !== null)).sort(compare);
  $("gallery").replaceChildren(...found.map((sample) => card(sample, score.name)));
  const share = { random: "drawn at random", best: `best by ${score.name}`, worst: `worst by ${score.name}`, all: "kept in this page" }[group.value];
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

function showScatter() {
  const column = (name) => 3 + scoreNames.indexOf(name);
  const across = scored.filter((score) => score.name !== "clip_score" && score.higher !== null);
  if (!scored.some((score) => score.name === "clip_score") || !across.length) {
    $("tradeoff-section").hidden = true;
    return;
  }
  options($("across"), across.map((score) => [score.name, `${score.name}, ${score.higher ? "higher" : "lower"} is closer`]));
  const settings = [...new Set(data.points.map((point) => point[2]))].filter((setting) => setting !== "text only").sort();
  options($("highlight"), settings.map((setting) => [setting, setting]));
  $("highlight-field").hidden = settings.length < 2;
  const draw = (width) => {
    const height = Math.min(Math.max(width * 0.45, 260), 440), left = 44, bottom = 40, top = 8, right = 8;
    const name = $("across").value, highlight = $("highlight").value;
    const points = data.points.filter((point) => point[column(name)] !== null && point[column("clip_score")] !== null);
    const scale = (values, from, to) => {
      const low = Math.min(...values), high = Math.max(...values), room = (high - low) * 0.04 || 0.01;
      const place = (value) => from + ((value - low + room) / (high - low + 2 * room)) * (to - from);
      return [place, ticks(low - room, high + room, Math.max(Math.floor(Math.abs(to - from) / 90), 2))];
    };
    const [x, xTicks] = scale(points.map((point) => point[column(name)]), left, width - right);
    const [y, yTicks] = scale(points.map((point) => point[column("clip_score")]), height - bottom, top);
    const dots = make("g", { class: "dots" });
    const drawn = points.map((point) => {
      const circle = make("circle", {
        cx: x(point[column(name)]).toFixed(1), cy: y(point[column("clip_score")]).toFixed(1), r: points.length > 400 ? 3 : 4,
        class: highlight && point[2] !== highlight ? "dim" : "",
      });
      dots.append(circle);
      return circle;
    });
    const picture = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `clip_score against ${name} of ${points.length} samples` },
      ...xTicks.flatMap((tick) => [
        make("line", { class: "axis", x1: x(tick), x2: x(tick), y1: top, y2: height - bottom }),
        make("text", { x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, String(tick))]),
      ...yTicks.flatMap((tick) => [
        make("line", { class: "axis", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
        make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(tick))]),
      make("text", { x: width - right, y: height - 4, "text-anchor": "end" }, name),
      make("text", { x: left + 6, y: top + 12 }, "clip_score"),
      dots);
    let last = null;
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const [px, py] = [event.clientX - box.left, event.clientY - box.top];
      let nearest = -1, distance = 24 ** 2;
      drawn.forEach((circle, place) => {
        const d = (circle.getAttribute("cx") - px) ** 2 + (circle.getAttribute("cy") - py) ** 2;
        if (d < distance) [nearest, distance] = [place, d];
      });
      last?.classList.remove("at");
      last = drawn[nearest] ?? null;
      if (!last) return;
      last.classList.add("at");
      const point = points[nearest];
      const marks = scoreNames.filter((each) => point[column(each)] !== null).map((each) => `${each} ${score3(point[column(each)])}`);
      const sample = data.samples.find((each) => each.number === point[0]);
      $("readout").textContent = `${point[1]} · ${point[2]} · ${marks.join(" · ")}${sample ? ` · ${sample.prompt}` : ""}`;
    });
    return picture;
  };
  const redraw = chart($("scatter"), draw);
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
  host.append(make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
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

showKeys();
setUpGallery();
showHistograms();
showCategories();
showCalibration();
showScatter();
showFailures();
showTime();
showConfiguration();
