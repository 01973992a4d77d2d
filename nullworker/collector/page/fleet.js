// The fleet's page: asks /status every few seconds and draws what it says. The database is the truth.
import { $, jobOf, make, text, announce, facts, span, clockOf, keyed, makeRow, REASONS } from "./lib.js";

const POLL_MS = 3000; // a batch of a worker comes at most five times a second; a person needs less
const PATIENCE_MS = 8000; // for one answer: behind it, a tunnel that has died without a word
const RANK = ["silent while holding", "lost", "holding", "idle", "silent", "stopped"];
const ICON = { holding: "#2f6fed", idle: "#1d9a58", bad: "#d63c32", lost: "#8a93a0" };
const seen = { status: null, skew: 0, lost: null, silent: 0 };

const now = () => Date.now() + seen.skew; // the collector's clock, in ms
const clock = (iso) => clockOf(iso, now());
const rank = (worker) => RANK.indexOf(worker.state);

async function look() {
  const hours = $("hours").value;
  try {
    const answer = await fetch(`status?hours=${hours}`, { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const status = await answer.json();
    if (hours !== $("hours").value) return; // another window was asked for in the meantime
    Object.assign(seen, { status, hours: Number(hours), skew: Date.parse(status.now) - Date.now() });
    if (seen.lost) announce("The collector answers again.");
    seen.lost = null;
  } catch {
    if (!seen.lost) announce("The collector does not answer.");
    seen.lost ??= now();
  }
  draw();
}

function draw() {
  const { status } = seen;
  $("link").dataset.link = seen.lost ? "lost" : status ? "live" : "connecting";
  text($("link-text"), seen.lost ? "no answer" : status ? "live" : "connecting");
  const why = seen.lost
    ? `The collector has not answered since ${clock(seen.lost)}. This page tries again by itself; what you see is from before.`
    : status?.database.why && `Batches are refused, and the workers keep them: ${status.database.why}`;
  $("banner").hidden = !why;
  if (why) text($("banner"), why);
  document.body.classList.toggle("stale", Boolean(seen.lost));
  if (!status) return;
  text($("where"), `${status.database.path} · ${(status.database.bytes / 1e6).toFixed(1)} MB · version ${status.version}`);
  const workers = [...status.workers].sort((a, b) => rank(a) - rank(b) || a.worker.localeCompare(b.worker));
  const holders = workers.filter((worker) => worker.holding);
  const silent = holders.filter((worker) => worker.state === "silent while holding").length;
  drawFigures(status, holders, silent);
  drawHolders(holders);
  drawRows(workers, status.holds);
  if (silent > seen.silent) announce(`${silent} silent while holding.`);
  seen.silent = silent;
  const word = seen.lost ? "lost" : silent ? "bad" : holders.length ? "holding" : "idle";
  $("icon").href = `data:image/svg+xml,${encodeURIComponent(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" fill="${ICON[word]}"/></svg>`)}`;
  document.title = seen.lost ? "no answer · nullworker fleet" : `${holders.length} holding · nullworker fleet`;
}

function drawFigures({ workers, today }, holders, silent) {
  const up = workers.filter((worker) => ["holding", "idle"].includes(worker.state)).length;
  const values = {
    holding: `${holders.length - silent} of ${up}`,
    silent: String(silent),
    lost: String(today.consumers_lost),
    hours: span(today.held_hours * 3600),
    dollars: today.dollars === null ? "no price" : today.dollars.toFixed(2),
  };
  for (const [name, value] of Object.entries(values)) {
    const figure = document.querySelector(`[data-figure="${name}"]`);
    text(figure.querySelector("dd"), value);
    figure.classList.toggle("bad", ["silent", "lost"].includes(name) && value !== "0");
  }
}

function drawHolders(holders) {
  $("nothing").hidden = holders.length > 0;
  const create = () => make("li", {}, make("span", { class: "chip" }), ...[1, 2, 3].map(() => make("p", {}, make("span"), make("small"))));
  keyed($("held"), holders, (worker) => `${worker.worker} ${worker.holding}`, create, (node, worker) => {
    const [chip, who, when, what] = node.children;
    node.dataset.state = worker.state;
    text(chip, worker.state);
    const say = (cell, main, more) => [main, more].forEach((value, part) => text(cell.children[part], value ?? ""));
    say(who, worker.worker, worker.gpu);
    const left = (Date.parse(worker.ends_at) - now()) / 1000;
    say(when, `since ${clock(worker.held_since)}, ${span((now() - Date.parse(worker.held_since)) / 1000)}`,
      worker.state === "holding" ? `ends in ${span(left)}` : `not heard of for ${span(worker.silent_seconds)}`);
    say(what, worker.holding, [worker.kind, jobOf(worker.metadata)].filter(Boolean).join(" · "));
  });
}

function drawRows(workers, holds) {
  $("none").hidden = workers.length > 0;
  $("axis").hidden = !workers.length;
  const step = seen.hours / 4;
  if ($("axis").dataset.step !== String(step)) {
    $("axis").dataset.step = step;
    $("axis").replaceChildren(...[4, 3, 2, 1, 0].map((tick) => make("span", {}, tick ? `−${span(tick * step * 3600)}` : "now")));
  }
  const byWorker = Map.groupBy ? Map.groupBy(holds, (hold) => hold.worker) : holds.reduce((map, hold) => map.set(hold.worker, [...(map.get(hold.worker) ?? []), hold]), new Map());
  keyed($("rows"), workers, (worker) => worker.worker, () => makeRow(make("code")), (node, worker) => fillRow(node, worker, byWorker.get(worker.worker) ?? []));
}

function fillRow(node, worker, holds) {
  const [chip, name, lane, story] = node.querySelector("summary").children;
  node.dataset.state = worker.state;
  text(chip, worker.state);
  text(name, worker.worker);
  const began = now() - seen.hours * 3600e3;
  const place = (iso) => Math.min(Math.max((100 * (Date.parse(iso) - began)) / (now() - began), 0), 100);
  keyed(lane, holds, (hold) => hold.id, () => make("span", { class: "bar" }), (bar, hold) => {
    bar.dataset.state = hold.state;
    bar.title = `${hold.id} ${REASONS[hold.reason] ?? hold.reason ?? "held"}`;
    Object.assign(bar.style, { left: `${place(hold.held_at)}%`, width: `${place(hold.until) - place(hold.held_at)}%` });
  });
  const busy = holds.reduce((sum, hold) => sum + Math.max(Date.parse(hold.until) - Math.max(Date.parse(hold.held_at), began), 0), 0) / 1000;
  text(story.firstChild, [worker.gpu, worker.conflicts ? `${worker.conflicts} conflicting events` : null].filter(Boolean).join(" · "));
  text(story.lastChild, `${holds.length} ${holds.length === 1 ? "hold" : "holds"} · held ${span(busy)} · heard of ${span(worker.silent_seconds)} ago`);
  facts(node.querySelector("dl"), { ...worker, worker: null, state: null, silent_seconds: null, metadata: worker.metadata && JSON.stringify(worker.metadata, null, 1) });
}

$("hours").onchange = look;
text($("zone"), Intl.DateTimeFormat().resolvedOptions().timeZone);
setInterval(() => { if (!document.hidden) look(); }, POLL_MS);
document.onvisibilitychange = () => { if (!document.hidden) look(); };
look();
