// Shared by both pages: nodes, words and times. It sends no request and has no state.

export const REASONS = {
  explicit: "released by its consumer", session_end: "session closed by its owner", consumer_exit: "its command has ended",
  extend: "by its consumer", ping: "renewed by its owner", duration_elapsed: "its time was over",
  queue_timeout: "waited too long", queue_full: "the queue was full", busy: "the slot was taken",
  client_disconnect: "its caller hung up", not_ready: "the worker was not ready", errored: "the consumer was unhealthy",
  draining: "the worker was stopping", log_unavailable: "the log could not be written",
  consumer_unhealthy: "the consumer became unhealthy", consumer_lost: "its consumer died", consumer_absent: "no consumer came",
  attached: "by its consumer, attached", worker_error: "a fault of the worker", duplicate: "its request was live already", worker_restart: "the worker was restarted",
};

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));
// The name of a reservation: its caller's metadata as `job=42 user=ada`; empty without metadata.
export const jobOf = (metadata) => Object.entries(metadata ?? {}).map(([name, value]) => `${name}=${plain(value)}`).join(" ");

export const text = (node, value) => { if (node.textContent !== value) node.textContent = value; };
export const announce = (words) => text($("announce"), words);

const clockFormat = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const dayFormat = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
// A time, preceded by its day if that is not today. `now`: ms, by the server's clock.
export function clockOf(iso, now) {
  const moment = new Date(iso);
  return (moment.toDateString() === new Date(now).toDateString() ? "" : dayFormat.format(moment) + ", ") + clockFormat.format(moment);
}

export function span(seconds) {
  if (seconds < 10) return `${Math.round(Math.max(seconds, 0) * 10) / 10} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60 ? (whole % 60) + " s" : ""}`.trim();
  const minutes = Math.round(whole / 60);
  if (minutes < 2880) return `${Math.floor(minutes / 60)} h ${minutes % 60 ? (minutes % 60) + " min" : ""}`.trim();
  return `${Math.round(minutes / 1440)} days`;
}

// Makes the children of `list` one node for each item. A node is kept for its key, so that focus and open details survive.
export function keyed(list, items, key, create, fill) {
  const old = new Map([...list.children].map((node) => [node.dataset.key, node]));
  items.forEach((item, index) => {
    const node = old.get(key(item)) ?? create(item);
    node.dataset.key = key(item);
    if (list.children[index] !== node) list.insertBefore(node, list.children[index] ?? null);
    old.delete(key(item));
    fill(node, item);
  });
  for (const node of old.values()) node.remove();
}

// A row of a timeline: state, name, lane of bars and story; opened, it shows facts.
export function makeRow(name, ...bars) {
  const lane = make("span", { class: "lane", "aria-hidden": "true" }, ...bars);
  const story = make("span", { class: "story" }, make("span", { class: "why" }), make("span", { class: "took" }));
  return make("li", {}, make("details", {}, make("summary", {}, make("span", { class: "chip" }), name, lane, story), make("dl")));
}

// A list of names and values, redrawn only when it has changed.
export function facts(list, values) {
  const shown = Object.entries(values).filter(([, value]) => value !== null && value !== undefined);
  if (list.dataset.key === JSON.stringify(shown)) return;
  list.dataset.key = JSON.stringify(shown);
  list.replaceChildren(...shown.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}
