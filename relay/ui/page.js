// The page of one relay. Listens to /events; what asks for the token is fetched. Texts are only ever set as text.
"use strict";

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US", { maximumFractionDigits: value < 10 ? 1 : 0 });
const KEPT_SECONDS = 300;
const SHORTEST_SECONDS = 60; // that a chart spans
const JOINED_SECONDS = 5; // points further apart are not joined by a line
const LONG_SECONDS = 1; // shorter transactions come and go

let points = [];
let state = null;
let token = sessionStorage.getItem("token");
let afterUnlock = null;
let heardAt = Date.now() / 1000;

// ---- small things ---------------------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function say(id, text) {
  const place = byId(id);
  if (place.textContent !== text) place.textContent = text; // a screen reader hears changes only
}

// Anew only where something is different: what a person has selected stays selected.
const drawn = {};

function show(id, children) {
  const now = children.map((child) => child.outerHTML).join("");
  if (drawn[id] === now) return;
  drawn[id] = now;
  byId(id).replaceChildren(...children);
}

function age(seconds) {
  if (seconds === null) return "?";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds >= 10) return age(seconds);
  return seconds >= 1 ? `${seconds.toFixed(1)} s` : `${number(seconds * 1000)} ms`;
}

const plural = (count, one, many) => `${number(count)} ${count === 1 ? one : many}`;

function moment(text) {
  return new Date(text.replace(" ", "T").replace(/([+-]\d\d)$/, "$1:00"));
}

// ---- charts ---------------------------------------------------------------------------------------------------------

function path(kind, d) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
  made.setAttribute("class", kind);
  made.setAttribute("d", d);
  return made;
}

function chart(id, label, lines, shown) {
  const last = points.length ? points[points.length - 1][0] : 0;
  const span = points.length ? Math.max(SHORTEST_SECONDS, last - points[0][0]) : SHORTEST_SECONDS;
  const known = lines.map(([column]) => points.filter((point) => point[column] !== null));
  const peak = Math.max(0, ...lines.flatMap(([column], i) => known[i].map((point) => point[column])));
  const x = (point) => (300 - ((last - point[0]) / span) * 300).toFixed(1);
  const paths = [path("base", "M0 63.5H300")];
  lines.forEach(([column, kind], i) => {
    const y = (point) => (62 - (peak ? point[column] / peak : 0) * 58).toFixed(1);
    const runs = [];
    known[i].forEach((point, at) => {
      if (!at || point[0] - known[i][at - 1][0] > JOINED_SECONDS) runs.push([]);
      runs[runs.length - 1].push(point);
    });
    for (const run of runs) {
      const line = run.map((point) => `${x(point)} ${y(point)}`).join("L");
      if (lines.length === 1) paths.push(path("area", `M${x(run[0])} 63.5L${line}L${x(run[run.length - 1])} 63.5Z`));
      paths.push(path(kind, `M${line}${run.length === 1 ? "h0.1" : ""}`));
    }
  });
  byId(id).replaceChildren(...paths);
  byId(id).setAttribute("aria-label", `${label}, the last ${age(span)}: at most ${shown(peak)}`);
  for (const since of document.querySelectorAll(".since")) {
    if (since.textContent !== `${age(span)} ago`) since.textContent = `${age(span)} ago`;
  }
  return peak;
}

function showPoints() {
  const recent = points.filter((point) => points[points.length - 1][0] - point[0] < 10);
  const latest = (column) => recent.reduceRight((found, point) => found ?? point[column], null);
  if (points.length) say("rate", number(points[points.length - 1][1]));
  say("median", duration(latest(2)));
  say("p99", duration(latest(3)));
  const peak = chart("rate-chart", "Events a second", [[1, "line"]], number);
  say("rate-beside", peak ? `at most ${number(peak)} in this time` : "nothing in this time");
  chart("delay-chart", "Delay of 99 in 100 events", [[3, "second"], [2, "line"]], duration);
  chart("pending-chart", "Events that wait", [[4, "line"]], number);
}

// ---- the state ------------------------------------------------------------------------------------------------------

function verdict() {
  if (events.readyState !== EventSource.OPEN) {
    return ["bad", `Not connected to the relay. What is shown is ${age(Date.now() / 1000 - heardAt)} old.`];
  }
  const seen = state.database;
  const lanes = seen.lanes ?? [];
  const halted = lanes.filter((lane) => lane.halted !== null);
  const free = lanes.filter((lane) => lane.halted === null && !((lane.lease_seconds ?? 0) > 0));
  const old = points.length && seen.at ? points[points.length - 1][0] - seen.at : 0;
  if (state.live.length) return ["bad", `This relay hangs: ${state.live.join("; ")}. It should be restarted.`];
  if (halted.length) {
    return ["bad", `Lane ${halted[0].lane} is halted: ${halted[0].halted}. A person must look: relay resolve`];
  }
  if (state.away) return ["bad", `This relay waits: ${state.away}`];
  if (old > 8) return ["bad", `The database does not answer: what it knew is ${age(old)} old.`];
  if (!lanes.length) return ["", "Looking at the database …"];
  if (free.length) return ["warn", `No relay publishes lane ${free.map((lane) => lane.lane).join(", ")} at this moment.`];
  const well = lanes.length === 1 ? "The lane is published." : `All ${lanes.length} lanes are published.`;
  if (!seen.parked) return ["good", well];
  return ["warn", `${well} ${plural(seen.parked, "event is", "events are")} parked: Kafka refused them.`];
}

function laneState(lane, owned) {
  if (lane.halted !== null) return ["bad", `halted: ${lane.halted}`];
  if (!owned) return ["warn", lane.last_error ? `free: ${lane.last_error}` : "free"];
  return lane.last_error ? ["warn", `published; last error: ${lane.last_error}`] : ["good", "published"];
}

function laneRow(lane) {
  const owned = (lane.lease_seconds ?? 0) > 0;
  const ours = owned && lane.host === state.this.host && lane.pid === state.this.pid;
  const owner = owned ? `${lane.host ?? lane.owner} · ${lane.pid ?? "?"}` : "nobody";
  const [level, words] = laneState(lane, owned);
  const cell = (title, content, kind = "") => {
    return element("td", { className: kind, role: "cell", "data-title": title }, element("span", {}, ...[content].flat()));
  };
  return element(
    "tr", { role: "row" },
    cell("Lane", String(lane.lane)),
    cell("Owner", ours ? [owner, " ", element("span", { className: "badge", textContent: "this relay" })] : owner),
    cell("Batch", number(lane.batch), "number"),
    cell("Waiting", (lane.pending_is_exact ? "" : "about ") + number(lane.pending), "number"),
    cell("Oldest", lane.pending ? age(lane.oldest_seconds) : "–", "number"),
    cell("Floor lag", lane.floor_lag === null ? "its relay knows" : number(lane.floor_lag), "number"),
    cell("State", words, `state ${level}`),
  );
}

function writerItem(writer) {
  const since = writer.seconds === null ? "since when: not visible" : `open for ${age(writer.seconds)}`;
  if (writer.prepared !== null) {
    return element("li", {}, element("strong", { textContent: `prepared ${writer.prepared}` }), ` · ${since}`);
  }
  const who = `pid ${writer.pid} · ${writer.user ?? "?"} · ${writer.state ?? "not visible: GRANT pg_read_all_stats"}`;
  return element(
    "li", {},
    element("strong", { textContent: writer.application || "no application name" }), ` · ${since}`,
    element("p", { className: "quiet", textContent: who }),
  );
}

function relayItem(relay) {
  const ours = relay.host === state.this.host && relay.pid === state.this.pid;
  return element(
    "li", {},
    element("strong", { textContent: `${relay.host} · ${relay.pid}` }), " ",
    ours ? element("span", { className: "badge", textContent: "this relay" }) : null,
    element("p", {
      className: "quiet",
      textContent: `version ${relay.version} · up ${age(relay.up_seconds)} · last seen ${age(relay.silent_seconds)} ago`,
    }),
  );
}

function showWaiting(lanes) {
  const pending = lanes.reduce((sum, lane) => sum + lane.pending, 0);
  const oldest = lanes.filter((lane) => lane.pending).map((lane) => lane.oldest_seconds);
  const exact = lanes.every((lane) => lane.pending_is_exact);
  say("pending", (exact ? "" : "≈ ") + number(pending));
  const known = oldest.filter((seconds) => seconds !== null);
  say("oldest", known.length ? `the oldest for ${age(Math.max(...known))}` : pending ? "" : "all is published");
}

function showVerdict() {
  const [level, words] = verdict();
  byId("verdict").className = `verdict ${level}`;
  say("verdict", words);
  document.title = `${level === "bad" ? "! " : ""}${state.outbox ?? "outbox"} · outbox`;
}

function showState() {
  const seen = state.database;
  showVerdict();
  say("outbox", state.outbox ?? "outbox");
  say("this", `relay ${state.version} on ${state.this.host}, process ${state.this.pid}`);
  showLock();
  if (!seen.lanes) return;
  showWaiting(seen.lanes);
  show("lanes", seen.lanes.map(laneRow));
  const holders = seen.writers.filter((one) => one.seconds === null || one.seconds >= LONG_SECONDS);
  const brief = seen.writers.length - holders.length;
  const nobody = brief ? `Nobody for longer than ${LONG_SECONDS} s; ${plural(brief, "writer is", "writers are")} at work.` : "Nobody.";
  show("writers", holders.length ? holders.map(writerItem) : [element("li", { className: "quiet", textContent: nobody })]);
  show("relays", seen.relays.map(relayItem));
  say("parked-count", number(seen.parked));
  byId("parked-count").className = seen.parked ? "count some" : "count";
}

// ---- the token ------------------------------------------------------------------------------------------------------

function showLock() {
  const asks = state.this.asks_for_token;
  const off = "is off: give the relay a token, OUTBOX_UI_TOKEN.";
  byId("lock").hidden = !asks;
  say("lock", token ? "Lock" : "Unlock");
  byId("find").hidden = !asks;
  byId("find-hint").hidden = asks;
  say("find-hint", `Searching ${off} On a terminal: relay trace ID`);
  const may = state.database.may_change_parked;
  const owner = "This relay's user may not retry or discard, and need not. As the tables' owner: relay dead retry ID";
  byId("parked-hint").hidden = (asks && may !== false) || !state.database.parked;
  say("parked-hint", asks ? owner : `Seeing contents, retry and discard ${off} On a terminal: relay dead list`);
  document.body.classList.toggle("locked", !token);
  for (const button of document.querySelectorAll("#parked button")) {
    button.hidden = !asks || (button.dataset.act !== "show" && may === false);
  }
}

function authorised(given) {
  return { headers: { Authorization: `Bearer ${given}` }, cache: "no-store" };
}

// Calls `act` once there is a token: now, or after the dialog.
function unlocked(act) {
  if (token) {
    act();
    return;
  }
  afterUnlock = act;
  byId("unlock-error").textContent = "";
  byId("token").value = "";
  byId("unlock").showModal();
}

function forget() {
  token = null;
  sessionStorage.removeItem("token");
  for (const content of document.querySelectorAll("#parked pre")) hideContent(content);
  byId("found").replaceChildren();
  showLock();
}

async function unlock(event) {
  event.preventDefault();
  const given = byId("token").value.trim();
  try {
    const answer = await (await fetch("token", authorised(given))).json();
    if (!answer.right) {
      byId("unlock-error").textContent = "That is not this relay's token.";
      return;
    }
  } catch {
    byId("unlock-error").textContent = "The relay does not answer.";
    return;
  }
  token = given;
  sessionStorage.setItem("token", token);
  showLock();
  byId("unlock").close();
  const act = afterUnlock;
  afterUnlock = null;
  if (act) act();
}

// What the relay's command says: {exit_code, document} or {exit_code, error}.
async function asked(where, method = "GET") {
  try {
    const answer = await fetch(where, { method, ...authorised(token) });
    if (answer.status === 401) {
      forget();
      return { error: "The relay has another token by now: unlock again." };
    }
    return answer.ok ? await answer.json() : { error: (await answer.text()).trim() };
  } catch {
    return { error: "The relay does not answer." };
  }
}

// ---- parked events --------------------------------------------------------------------------------------------------

function hideContent(content) {
  content.hidden = true;
  content.textContent = "";
  const button = content.closest("li").querySelector("[data-act=show]");
  button.textContent = "Content";
  button.setAttribute("aria-expanded", "false");
}

function contentText(document_) {
  const { format, data, why, bytes_left_out: left } = document_.content;
  const headers = document_.headers ? `headers ${JSON.stringify(JSON.parse(document_.headers))}\n` : "";
  const head = `key ${document_.key ?? "none"} · ${plural(document_.bytes ?? 0, "byte", "bytes")} · ${format}\n${headers}`;
  const body = format === "hex" || format === "text" ? data : JSON.stringify(data, null, 2);
  return `${head}${why ? `${why}\n` : ""}\n${body ?? "no value: a tombstone"}${left ? ` … ${number(left)} more` : ""}`;
}

async function during(item, work) {
  const buttons = [...item.querySelectorAll("button")];
  buttons.forEach((button) => { button.disabled = true; });
  await work();
  buttons.forEach((button) => { button.disabled = false; });
}

async function showContent(item, id) {
  const content = item.querySelector("pre");
  if (!content.hidden) {
    hideContent(content);
    return;
  }
  const answer = await asked(`parked/${id}`);
  content.textContent = answer.document ? contentText(answer.document) : answer.error;
  content.hidden = false;
  const button = item.querySelector("[data-act=show]");
  button.textContent = "Hide";
  button.setAttribute("aria-expanded", "true");
}

async function change(item, id, what) {
  const said = item.querySelector(".said");
  said.textContent = what === "retry" ? "Being put back …" : "Being deleted …";
  const answer = await asked(`parked/${id}/${what}`, "POST");
  said.textContent = answer.error ?? "";
  if (answer.error) return;
  const events = answer.document.events;
  const put = `${plural(events, "event", "events")} put back to be published: ${id} and what is parked of its key.`;
  const done = what === "retry" ? put : `Deleted: ${id}.`;
  byId("parked-said").textContent = events ? done : `${id} is not parked any more.`;
  byId("parked-said").focus(); // the item will be gone, and the focus in it
}

function confirmDiscard(item, id) {
  byId("sure-event").textContent = id;
  byId("sure-discard").onclick = () => {
    byId("sure").close();
    during(item, () => change(item, id, "discard"));
  };
  byId("sure").showModal();
}

function parkedItem(event) {
  const item = element("li", { className: event.held ? "held" : "" });
  const button = (act, text, work, kind = "") => element("button", {
    type: "button", textContent: text, className: kind, "data-act": act, "aria-describedby": `p-${event.id}`,
    onclick: () => unlocked(work),
  });
  const show = button("show", "Content", () => during(item, () => showContent(item, event.id)));
  show.setAttribute("aria-expanded", "false");
  const about = [`topic ${event.topic}`, `lane ${event.lane}`, plural(event.bytes ?? 0, "byte", "bytes")];
  const since = moment(event.died_at);
  const namespace = event.type.slice(0, event.type.lastIndexOf(".") + 1);
  item.append(
    element(
      "div", { className: "about" },
      element(
        "strong", {},
        element("span", { className: "namespace", textContent: namespace }), element("wbr"), event.type.slice(namespace.length),
      ),
      element("time", { className: "quiet", dateTime: since.toISOString(), textContent: since.toLocaleString() }),
    ),
    element("p", { className: "quiet", textContent: about.join(" · ") }),
    element("p", { className: "error", textContent: event.error }),
    element(
      "div", { className: "line" },
      element("code", { id: `p-${event.id}`, textContent: event.id }),
      element(
        "div", { className: "acts" },
        show,
        button("retry", "Retry", () => during(item, () => change(item, event.id, "retry"))),
        button("discard", "Discard", () => confirmDiscard(item, event.id), "danger"),
      ),
    ),
    element("pre", { hidden: true, tabIndex: 0, "aria-label": "Content" }),
    element("p", { className: "said", role: "status" }),
  );
  return item;
}

// Items that are still parked stay as they are, with what is open in them.
function showParked(listed) {
  const list = byId("parked");
  const there = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const items = listed.map((event) => {
    const key = `${event.id} ${event.died_at}`;
    const item = there.get(key) ?? parkedItem(event);
    item.dataset.key = key;
    return item;
  });
  if (items.length !== list.children.length || items.some((item, at) => list.children[at] !== item)) {
    list.replaceChildren(...items);
  }
  const more = (state?.database.parked ?? 0) - listed.length;
  say("parked-more", !listed.length ? "None." : more > 0 ? `${number(more)} more: relay dead list` : "");
  if (state) showLock();
}

// ---- search ---------------------------------------------------------------------------------------------------------

function foundText(found) {
  if (found.found === "outbox") return `Waits in the outbox: topic ${found.topic}, lane ${found.lane}, seq ${found.seq}.`;
  if (found.found === "parked") return `Parked since ${moment(found.died_at).toLocaleString()}: ${found.error}`;
  if (found.found === "kafka") return `In Kafka: topic ${found.topic}, partition ${found.partition}, offset ${found.offset}.`;
  const places = found.topics.length ? `the topics ${found.topics.join(", ")}` : "a topic that is known here";
  const missing = found.missing.map((topic) => ` Kafka does not show topic ${topic}.`);
  const gaps = Object.entries(found.gaps).map(([topic, why]) => ` ${topic}: ${why}.`);
  return `Not found: not in the outbox, not parked, not in ${places}.${missing.join("")}${gaps.join("")}`;
}

async function find() {
  const id = byId("event").value.trim().toLowerCase();
  byId("find-button").disabled = true;
  byId("found").replaceChildren(element("p", { className: "quiet", textContent: "Looking; topics may take a while …" }));
  const topic = byId("topic").value.trim();
  const answer = await asked(`trace/${id}${topic ? `?topic=${encodeURIComponent(topic)}` : ""}`);
  byId("find-button").disabled = false;
  const words = answer.document ? foundText(answer.document) : answer.error;
  byId("found").replaceChildren(
    element("p", { className: answer.document ? "" : "error", textContent: words }),
    element("code", { className: "quiet", textContent: id }),
  );
}

// ---- begin ----------------------------------------------------------------------------------------------------------

byId("lock").onclick = () => (token ? forget() : unlocked(null));
byId("unlock-form").onsubmit = unlock;
byId("unlock-cancel").onclick = () => byId("unlock").close();
byId("unlock").onclose = () => { byId("token").value = ""; };
byId("sure-cancel").onclick = () => byId("sure").close();
byId("find").onsubmit = (event) => {
  event.preventDefault();
  unlocked(find);
};

const events = new EventSource("events");
events.onopen = () => {
  byId("live").className = "live on";
  say("live", "live");
};
events.onerror = () => {
  byId("live").className = "live off";
  say("live", events.readyState === EventSource.CLOSED ? "reload this page" : "trying again");
  if (state) showVerdict();
};
events.addEventListener("history", (event) => {
  points = JSON.parse(event.data);
  showPoints();
});
events.addEventListener("point", (event) => {
  const point = JSON.parse(event.data);
  if (points.length && points[points.length - 1][0] === point[0]) return;
  points.push(point);
  points = points.filter((one) => point[0] - one[0] <= KEPT_SECONDS);
  showPoints();
  if (state) showState();
});
events.addEventListener("state", (event) => {
  state = JSON.parse(event.data);
  heardAt = Date.now() / 1000;
  showState();
});
events.addEventListener("parked", (event) => showParked(JSON.parse(event.data)));
