// What the pages share: nodes, words and times. It asks nothing and keeps nothing.

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
// What a reservation is called: its caller's metadata as `job=42 user=ada`, and nothing where there is none.
export const jobOf = (metadata) => Object.entries(metadata ?? {}).map(([name, value]) => `${name}=${plain(value)}`).join(" ");

export const text = (node, value) => { if (node.textContent !== value) node.textContent = value; };
export const announce = (words) => text($("announce"), words);

const clockFormat = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const dayFormat = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
// A time of today, or of another day with that; `now`: the time in ms by the clock that counts.
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

// A list of what is known, drawn anew only when it has changed.
export function facts(list, values) {
  const shown = Object.entries(values).filter(([, value]) => value !== null && value !== undefined);
  if (list.dataset.key === JSON.stringify(shown)) return;
  list.dataset.key = JSON.stringify(shown);
  list.replaceChildren(...shown.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}
