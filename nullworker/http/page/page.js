// The status page: asks /status and /reservations, is woken by /events, and draws what they say.
// Everything shown is read from the worker: an event only triggers a new read, so the page cannot drift from the log.
import { $, REASONS, announce, clockOf, facts, jobOf, keyed, make, makeRow, span, text } from "./lib.js";

const ROWS = 12; // reservations at first, and with each "Show older"
const WAITING_SHOWN = 5, FEED = 100; // of the queue, those whose turn comes first; of the events, the newest
const POLL_MS = 5000; // health and the autoscaler change without an event
const PATIENCE_MS = 8000; // for one answer: behind it, a tunnel that has died without a word
const RETRY_MS = [500, 1000, 2000, 4000]; // pauses between tries while there is no answer
const STEPS = [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400, 604800]; // of the axis, seconds

const ICON = { held: "#2f6fed", ready: "#1d9a58", starting: "#c98a12", draining: "#c98a12", errored: "#d63c32", lost: "#8a93a0" };
const seen = { status: null, list: [], skew: 0, limit: ROWS, lost: null, heldId: undefined, turn: 0 };

const known = new Map(); // metadata by reservation, of the events that were seen

// -- time ---------------------------------------------------------------------------------------------------------
const now = () => Date.now() + seen.skew; // the worker's clock, in ms: the browser's may be wrong
const clock = (iso) => clockOf(iso, now());

function countdown(seconds) {
  const whole = Math.max(Math.ceil(seconds), 0);
  const [hours, minutes, rest] = [whole / 3600, (whole / 60) % 60, whole % 60].map((part) => String(Math.floor(part)).padStart(2, "0"));
  return whole >= 3600 ? `${Number(hours)}:${minutes}:${rest}` : `${Number(minutes)}:${rest}`;
}

// -- asking -------------------------------------------------------------------------------------------------------
let source = null, turns = 0, tries = 0, due = null, again = null;

async function ask(path, body) {
  const init = { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" };
  if (body) Object.assign(init, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  const answer = await fetch(path, init);
  return { ok: answer.ok, date: answer.headers.get("Date"), json: await answer.json() };
}

async function look() {
  const turn = ++turns;
  const { json: status, date } = await ask("status");
  const waiting = Math.min(status.queue.length, 200);
  const { json: found } = await ask(`reservations?limit=${seen.limit + waiting + 1}`);
  if (turn < seen.turn) return; // a later look was answered first
  const held = status.held;
  const theirs = held ? Date.parse(held.held_at) + held.held_seconds * 1000 : Date.parse(date) + 500;
  if (held || Math.abs(theirs - now()) > 2000) seen.skew = theirs - Date.now(); // a Date header is to the second
  Object.assign(seen, { turn, status, list: found.reservations ?? seen.list });
  draw();
}


const lookSoon = () => { due ??= setTimeout(() => { due = null; look().catch(lost); }, 100); };

async function connect() {
  again = null;
  try { await look(); } catch { return lost(); }
  source?.close();
  $("events").replaceChildren();
  source = new EventSource(`events?after=${Math.max(seen.status.log.last_seq - 40, 0)}`);
  source.onopen = found;
  source.onerror = lost;
  source.onmessage = (message) => { feed(JSON.parse(message.data)); lookSoon(); };
}

function found() {
  if (seen.lost) announce("The worker answers again.");
  [seen.lost, tries] = [null, 0];
  draw();
}

function lost() {
  source?.close();
  clearTimeout(due);
  source = due = null;
  if (!seen.lost) announce("The worker does not answer.");
  seen.lost ??= Date.now();
  again ??= setTimeout(connect, RETRY_MS[Math.min(tries++, RETRY_MS.length - 1)]);
  draw();
}

// -- drawing ------------------------------------------------------------------------------------------------------
function draw() {
  const { status } = seen;
  const link = seen.lost ? "lost" : source?.readyState === EventSource.OPEN ? "live" : "connecting";
  $("link").dataset.link = link;
  text($("link-text"), link === "lost" ? "no answer" : link);
  $("banner").hidden = !seen.lost;
  if (seen.lost) text($("banner"), `The worker has not answered since ${clock(seen.lost)}. This page tries again by itself; what you see is from before.`);
  document.body.classList.toggle("stale", Boolean(seen.lost));
  for (const id of ["release", "extend", "confirm-yes"]) $(id).disabled = Boolean(seen.lost);
  if (!status) return;
  const instance = status.instance === null ? "" : `instance ${status.instance} · `;
  text($("where"), `${instance}${status.url} · version ${status.version}`);
  drawHeld(status);
  drawChecks(status);
  drawRows();
  tick();
}

function drawHeld({ state, held, queue, ...status }) {
  const word = seen.lost ? "lost" : held ? "held" : state;
  $("now").dataset.state = word;
  text($("state"), { held: "held", ready: "idle", lost: "not answering" }[word] ?? word);
  text($("kind"), held && !seen.lost ? `A ${held.kind} reservation is` : "This worker is");
  const cause = status.log.why ?? status.consumer.why ?? (status.autoscaler.key_loaded ? null : status.autoscaler.trouble ?? "the key is not loaded");
  const ended = seen.list.find((row) => row.ended_at)?.ended_at;
  const words = { ready: `Nothing is held${ended ? ` since ${clock(ended)}` : ""}. The next reservation gets the slot at once.`, draining: "New reservations are refused: the worker stops.", held: jobOf(held?.metadata), lost: held ? `${jobOf(held.metadata) || "A reservation"} was held when it last did.` : "Nothing was held when it last did." };
  text($("headline"), words[word] ?? cause ?? "");
  $("icon").href = `data:image/svg+xml,${encodeURIComponent(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" fill="${ICON[word]}"/></svg>`)}`;
  $("held").hidden = !held;
  if (held) {
    text($("since"), `held since ${clock(held.held_at)}`);
    text($("until"), `ends ${clock(held.ends_at)}`);
    for (const [button, verb] of [["release", "Release"], ["extend", "Extend"]]) {
      if ($(button).dataset.id !== held.id) $(button).replaceChildren(`${verb} `, make("code", {}, held.id));
      $(button).dataset.id = held.id;
    }
    facts($("facts"), { waited: span(held.queued_seconds), request: held.request_idx });
  }
  const id = held?.id ?? null;
  if (![undefined, id].includes(seen.heldId)) announce(held ? `Reservation ${id} is held until ${clock(held.ends_at)}.` : "Nothing is held any more.");
  seen.heldId = id;
}

function attachment({ attached, attached_at }) {
  return attached ? `; attached since ${clock(attached_at)}` : attached_at ? "; its connection is broken" : "";
}

function drawChecks({ state, queue, consumer, autoscaler, sink, log }) {
  const reports = autoscaler.reports_to;
  const trouble = reports && (autoscaler.trouble || !autoscaler.key_loaded);
  const size = log.bytes < 1e6 ? `${Math.ceil(log.bytes / 1e3)} kB` : `${(log.bytes / 1e6).toFixed(1)} MB`;
  const checks = [
    ["Worker", { ready: "good", errored: "bad" }[state] ?? "wait", state, { ready: "takes reservations", errored: "refuses reservations until the cause is gone", draining: "refuses new reservations, and stops", starting: "takes no reservations yet" }[state]],
    ["Queue", queue.length >= queue.limit && queue.limit ? "bad" : queue.length ? "wait" : "good", queue.length ? `${queue.length} waiting` : "empty", queue.length ? `the first for ${span(queue.oldest_seconds)}; room for ${queue.limit}` : `room for ${queue.limit}`],
    ["Consumer", consumer.healthy === null ? "off" : consumer.healthy ? "good" : state === "starting" ? "wait" : "bad", consumer.healthy === null ? "not asked" : consumer.healthy ? "healthy" : "unhealthy",
      (consumer.why ?? (consumer.url ? (consumer.last === "healthy" ? `${consumer.url} answers` : `at the last look: ${consumer.last}`) : "BACKEND_HEALTH_URL is unset")) + attachment(consumer)],
    ["Autoscaler", !reports ? "off" : trouble ? "bad" : autoscaler.backlog ? "wait" : "good", !reports ? "standalone" : trouble ? "trouble" : "connected",
      !reports ? "this worker reports to nobody" : [autoscaler.trouble ?? `reports to ${reports.join(", ")}`, autoscaler.key_loaded ? null : "no key to verify with", autoscaler.backlog ? `${autoscaler.backlog} outcomes not acknowledged` : null].filter(Boolean).join("; ")],
    ...(sink ? [["Sink", sink.trouble ? "bad" : sink.backlog ? "wait" : "good", sink.trouble ? "trouble" : "connected", [sink.trouble ?? `sends events to ${sink.url}`, sink.backlog ? `${sink.backlog} not accepted` : null].filter(Boolean).join("; ")]] : []),
    ["Event log", log.why || log.unwritten ? "bad" : "good", log.why ? "not writable" : "writable", log.why ? `${log.why}; ${log.unwritten} events wait in memory` : `${size}, the last event is ${log.last_seq}, ${log.path}`],
  ];
  const list = $("checks");
  if (!list.children.length) list.append(...checks.map(() => make("li", {}, make("span", { class: "mark", "aria-hidden": "true" }), make("h3"), make("strong"), make("p"))));
  checks.forEach(([name, level, word, why], index) => {
    const [, ...nodes] = list.children[index].children;
    list.children[index].dataset.level = level;
    [name, word, why].forEach((value, part) => text(nodes[part], value));
  });
}

function drawRows() {
  const waiting = seen.list.filter((row) => row.state === "queued");
  const rest = seen.list.filter((row) => row.state !== "queued");
  const shown = [...waiting.slice(-WAITING_SHOWN), ...rest.slice(0, seen.limit)];
  const bars = () => ["wait", "bar", "rest"].map((part) => make("span", { class: part }));
  keyed($("rows"), shown, (each) => each.id, () => makeRow(make("span", { class: "job" }), ...bars()), fillRow);
  $("none").hidden = !($("axis").hidden = shown.length === 0);
  $("older").hidden = rest.length <= seen.limit;
}

function fillRow(row, each) {
  row.dataset.state = each.state;
  row.record = each;
  const [chip, job, , story] = row.querySelector("summary").children;
  text(chip, each.state);
  text(job, jobOf(each.metadata) || each.id);
  job.title = `${job.textContent} (${each.id})`;
  text(story.firstChild, [each.kind === "session" ? "session" : null, REASONS[each.reason] ?? each.reason ?? `since ${clock(each.held_at ?? each.queued_at)}`].filter(Boolean).join(" · "));
  const [metadata, result] = [each.metadata, each.result].map((value) => value && JSON.stringify(value, null, 1));
  facts(row.querySelector("dl"), { ...each, state: null, metadata, result });
}

function feed(event) {
  const id = event.reservation_id;
  if (event.data.metadata) known.set(id, jobOf(event.data.metadata));
  const job = known.get(id) || jobOf(seen.list.find((row) => row.id === id)?.metadata) || id;
  const item = make("li", { "data-state": event.kind }, make("time", { datetime: event.at, title: event.at }, clock(event.at)),
    make("span", { class: "chip" }, event.kind), make("span", { class: "job", title: id }, job), make("span", { class: "why" }, REASONS[event.reason] ?? event.reason ?? ""));
  $("events").prepend(item);
  while ($("events").children.length > FEED) $("events").lastChild.remove();
  if (known.size > 4 * FEED) known.delete(known.keys().next().value);
}

// What moves with the clock: the countdown and the bars. The axis is four steps of the past, and one of what comes.
function tick() {
  const { status } = seen, at = now();
  if (!status) return;
  if (status.held) {
    const [start, end] = [Date.parse(status.held.held_at), Date.parse(status.held.ends_at)];
    text($("left"), countdown((end - at) / 1000));
    $("elapsed").value = Math.min(Math.max((at - start) / Math.max(end - start, 1), 0), 1);
    $("now").classList.toggle("near", end - at < 0.1 * (end - start));
  }
  const who = status.instance === null ? "nullworker" : `${status.instance} · nullworker`;
  document.title = `${seen.lost ? "no answer" : status.held ? $("countdown").textContent : $("state").textContent} · ${who}`;
  const rows = [...$("rows").children];
  const oldest = Math.min(...rows.slice(0, 8).map((row) => Date.parse(row.record.queued_at)));
  const step = STEPS.find((each) => 4000 * each >= at - oldest) ?? STEPS.at(-1);
  if ($("axis").dataset.step !== String(step)) {
    $("axis").dataset.step = step;
    $("axis").replaceChildren(...[-4, -3, -2, -1, 0, 1].map((tick) => make("span", {}, tick ? `${tick < 0 ? "−" : "+"}${span(Math.abs(tick) * step)}` : "now")));
  }
  const place = (time) => Math.min(Math.max(80 + (20 * (time - at)) / (1000 * step), 0), 100);
  for (const row of rows) drawBar(row, place, at);
}

function drawBar(row, place, at) {
  const each = row.record, [wait, bar, rest] = row.querySelector(".lane").children;
  const [queued, held, ends, ended] = [each.queued_at, each.held_at, each.ends_at, each.ended_at].map((time) => time && Date.parse(time));
  const put = (node, from, to) => {
    node.hidden = from === null || to === null || place(to) <= 0;
    if (!node.hidden) Object.assign(node.style, { left: `${place(from)}%`, width: `${place(to) - place(from)}%` });
  };
  put(wait, queued, held ?? ended ?? at);
  put(bar, held ?? ended, ended ?? at);
  put(rest, each.state === "held" ? at : null, ends);
  row.querySelector(".lane").classList.toggle("before", place(ended ?? at) <= 0);
  const waited = ((held ?? ended ?? at) - queued) / 1000;
  const parts = [waited >= 0.5 || !held ? `waited ${span(waited)}` : null, held ? `held ${span(((ended ?? at) - held) / 1000)}` : null, ended && clock(each.ended_at)];
  text(row.querySelector(".took"), parts.filter(Boolean).join(" · "));
}

// -- acting: always on the reservation that the button names --------------------------------------------------------
const say = (words, level = "good") => { $("outcome").dataset.level = level; text($("outcome"), words); };

async function act(path, body, words) {
  try {
    const { ok, json } = await ask(path, body);
    if (ok && json.released !== false) say(words(json));
    else say(`${body.reservation_id}: ${json.reason ?? json.error}`, "bad");
  } catch {
    say("The worker did not answer; whether it was done shows when it is back.", "bad");
  }
  lookSoon();
}

$("release").onclick = () => {
  const told = seen.status.held?.kind === "session" ? "The session is closed" : "Its caller gets the answer “released”";
  const next = seen.status.queue.length ? "goes to the next in the queue" : "is free";
  $("confirm-yes").dataset.id = $("release").dataset.id;
  const job = jobOf(seen.status.held?.metadata);
  text($("confirm-job"), job && `${job}, `);
  text($("confirm-id"), $("release").dataset.id);
  text($("confirm-text"), `${told}, and the slot ${next}. This cannot be taken back.`);
  $("confirm").showModal();
};
$("confirm-no").onclick = () => $("confirm").close();
$("confirm-yes").onclick = async () => {
  const { id } = $("confirm-yes").dataset;
  $("confirm").close();
  await act("release", { reservation_id: id }, () => `Released ${id}.`);
  $("state").focus();
};
$("extend-form").onsubmit = (submit) => {
  submit.preventDefault();
  const { id } = $("extend").dataset;
  act("extend", { reservation_id: id, seconds: Number($("extend-by").value) }, (json) => `${id} now ends ${clock(json.ends_at)}.`);
};
$("older").onclick = () => { seen.limit += ROWS; lookSoon(); };
text($("zone"), Intl.DateTimeFormat().resolvedOptions().timeZone);
const lookAgain = () => { if (source && !document.hidden) lookSoon(); };
setInterval(tick, 1000);
setInterval(lookAgain, POLL_MS);
document.onvisibilitychange = lookAgain;
connect();
