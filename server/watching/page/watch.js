// Follows a run: asks for the events after the last ones it knows, keeps what they say, and draws it.
"use strict";

const MOST_SITES = 200;
const MOST_ROWS = 200;
const SOON = 1000; // milliseconds between two questions while the run goes on
const LATER = 5000;

const byId = (id) => document.getElementById(id);

function newRun() {
  return {
    federation: "", rounds: 0, metrics: [], trainable: 0, phase: "", began: 0, lastTime: 0, round: 0, done: 0,
    sites: new Map(), losses: new Map(), seconds: new Map(), answered: new Map(), figures: new Map(), notes: new Map(),
    test: new Map(), phases: new Map(), openPhase: null, stages: new Map(), errors: [], stopped: null, up: 0, down: 0,
    unread: 0, began_round: 0, plan: [], used: null,
  };
}

let run = newRun();
let place = 0;
let facts = null;
let goesOn = false;
let serverTime = 0;

function site(name) {
  if (!run.sites.has(name)) run.sites.set(name, { state: "waiting", loss: null, examples: 0, seconds: 0, traffic: 0, failures: 0 });
  return run.sites.get(name);
}

function closePhase(time) {
  if (run.openPhase === null) return;
  const [name, since] = run.openPhase;
  run.phases.set(name, (run.phases.get(name) || 0) + Math.max(0, time - since));
  run.openPhase = null;
}

function fail(round, name, code, reason) {
  run.errors.push({ round, name, code, reason: reason || "" });
}

const TAKE = {
  run_started(event) {
    closePhase(run.lastTime || event.time); // a resumed run: nothing happened in between
    Object.assign(run, { federation: event.federation, rounds: event.rounds, metrics: event.metrics, trainable: event.trainable_parameters, stopped: null });
    run.began = run.began || event.time;
    event.sites.forEach(site);
  },
  phase_started(event) {
    closePhase(event.time);
    run.phase = event.phase;
    run.openPhase = [event.phase, event.time];
  },
  round_started(event) {
    run.round = event.round;
    run.began_round = event.time;
    const invited = new Set(event.sites);
    invited.forEach(site);
    for (const [name, known] of run.sites) known.state = invited.has(name) ? "training" : "waiting";
  },
  site_finished(event) {
    const known = site(event.site);
    known.state = "done";
    if (typeof event.train_loss === "number") known.loss = event.train_loss;
    known.examples += event.examples;
    known.seconds += event.seconds;
    known.traffic += event.bytes_up + event.bytes_down;
  },
  site_failed(event) {
    const known = site(event.site);
    known.state = `failed: ${event.code}`;
    known.failures += 1;
    fail(event.round, event.site, event.code, event.reason);
  },
  sum_opened(event) {
    for (const name of event.survivors) if (site(name).state === "training") site(name).state = "done";
  },
  stage_finished(event) {
    const [count, total, longest] = run.stages.get(event.stage) || [0, 0, 0];
    run.stages.set(event.stage, [count + 1, total + event.seconds, Math.max(longest, event.seconds)]);
  },
  round_finished(event) {
    run.done = Math.max(run.done, event.round);
    run.began_round = 0;
    run.losses.set(event.round, event.train_loss);
    run.seconds.set(event.round, event.seconds);
    run.answered.set(event.round, `${event.answered} of ${event.answered + event.failed}`);
    run.up += event.bytes_up;
    run.down += event.bytes_down;
  },
  round_rejected(event) {
    run.notes.set(event.round, "rejected");
    fail(event.round, "", "rejected", `${event.setting} allows ${figure(event.bound)}, found ${figure(event.value)}`);
  },
  round_lost(event) {
    run.notes.set(event.round, "lost");
    fail(event.round, "", "lost", event.reason);
  },
  round_validated(event) { run.figures.set(event.round, event.figures); },
  baseline_finished(event) { run.test.set(event.baseline, event.figures); },
  workers_planned(event) { run.plan = [`${count(event.workers)} workers`, ...event.plan]; },
  resources_used(event) { run.used = event; },
  batch_halved(event) {
    fail(event.round, event.site, "memory", `computes on ${event.after} records at once, not ${event.before}; the results are the same`);
  },
  slot_closed(event) {
    fail(event.round, event.site, "memory", `at most ${event.left} workers at once on ${event.device}`);
  },
  run_stopped(event) {
    closePhase(event.time);
    run.stopped = event;
    for (const known of run.sites.values()) if (known.state === "training") known.state = "waiting";
  },
};

function take(event) {
  try {
    if (Object.hasOwn(TAKE, event.event)) TAKE[event.event](event);
  } catch {
    run.unread += 1; // written by another version
  }
  if (typeof event.time === "number") run.lastTime = event.time;
}

// Words, as in the terminal.

function figure(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "-" : String(value);
  const size = Math.abs(value);
  if (size && size < 0.0005) return value.toExponential(1);
  if (size >= 1e7) return value.toExponential(2);
  return size < 10 ? value.toFixed(3) : size < 100 ? value.toFixed(2) : value.toLocaleString("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });
}

function duration(seconds) {
  if (typeof seconds !== "number") return "-";
  if (seconds < 9.95) return seconds ? `${seconds.toFixed(1)} s` : "0 s";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const [large, small, units] = whole < 3600 ? [Math.floor(whole / 60), whole % 60, "ms"] : [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), "hm"];
  return small ? `${large} ${units[0]} ${small} ${units[1]}` : `${large} ${units[0]}`;
}

function share(part) {
  return `${(100 * part).toFixed(0)} %`;
}

function size(bytes) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (bytes < 999.5) return `${unit === "B" || bytes >= 99.95 ? bytes.toFixed(0) : bytes.toFixed(1)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toFixed(1)} TB`;
}

const count = (number) => number.toLocaleString("en");
const title = (metric) => metric.slice(metric.lastIndexOf(":") + 1).replaceAll("_", " ");

// Drawing. Text goes in as text, never as HTML: names are other people's.

function put(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

function show(id, shown) { byId(id).hidden = !shown; }

function fill(id, headings, rows, { caption, texts = [] } = {}) {
  const table = byId(id);
  const head = document.createElement("tr");
  headings.forEach((heading, column) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = heading;
    if (texts.includes(column)) cell.className = "text";
    head.append(cell);
  });
  const body = rows.map((cells) => {
    const row = document.createElement("tr");
    cells.forEach((text, column) => {
      const cell = document.createElement(column ? "td" : "th");
      if (!column) cell.scope = "row";
      if (texts.includes(column)) cell.className = "text";
      cell.textContent = text;
      row.append(cell);
    });
    return row;
  });
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...body);
  if (caption !== undefined) table.caption.textContent = caption;
}

function status() {
  if (run.stopped) return run.stopped.status;
  return goesOn ? "running" : place ? "stopped" : "waiting";
}

function drawHead() {
  const word = status();
  put("title", run.federation || "Run");
  put("run", facts ? facts.run : "");
  put("status", word);
  byId("status").className = `status ${word}`;
  document.title = `${word === "running" ? `${run.done}/${run.rounds} ` : ""}${run.federation || "run"} - ${word}`;
  const reasons = {
    stopped: "The process of this run ended without a word: it was killed, or the machine stopped. What was finished is kept.",
    waiting: "Nothing has happened yet.",
  };
  const reason = run.stopped ? run.stopped.reason : reasons[word] || "";
  put("reason", reason);
  show("reason", reason !== "");
  const now = run.stopped || !goesOn ? run.lastTime : serverTime;
  const bar = byId("bar");
  bar.max = Math.max(1, run.rounds);
  bar.value = Math.min(run.done, bar.max);
  const parts = [`${run.done} of ${run.rounds} rounds`];
  if (word === "running" && run.phase) parts.push(`phase ${run.phase}`);
  if (run.began) parts.push(goesOn && !run.stopped ? `${duration(now - run.began)} so far` : `took ${duration(now - run.began)}`);
  const left = secondsLeft(now);
  if (left !== null && word === "running") parts.push(`about ${duration(left)} of rounds left`);
  if (run.up || run.down) parts.push(`${size(run.up)} up, ${size(run.down)} down`);
  put("progress", parts.join(", "));
  const metric = run.metrics[0];
  const known = [...run.figures.keys()].sort((a, b) => a - b);
  const newest = known[known.length - 1];
  put("result", metric && known.length ? `${title(metric)} ${figure(run.figures.get(newest)[metric])} after round ${newest}` : "");
  const port = location.port || "80";
  put("tunnel", `ssh -L ${port}:127.0.0.1:${port} THIS-MACHINE`);
  put("trouble", run.unread ? `${count(run.unread)} lines of the event stream could not be read and are left out.` : "");
  show("trouble", run.unread > 0);
}

function secondsLeft(now) {
  if (!run.seconds.size || run.done >= run.rounds) return null;
  const one = [...run.seconds.values()].reduce((sum, each) => sum + each, 0) / run.seconds.size;
  const elapsed = run.began_round ? Math.max(0, now - run.began_round) : 0;
  return Math.max(0, one - elapsed) + one * (run.rounds - run.done - 1);
}

function points(values, of) {
  return [...values].map(([round, value]) => [round, of(value)]).filter(([, value]) => typeof value === "number").sort((a, b) => a[0] - b[0]);
}

function drawCurves() {
  const loss = [
    { name: "training", points: points(run.losses, (value) => value) },
    { name: "held-out records", points: points(run.figures, (value) => value.loss) },
  ];
  const figures = [
    curveFigure("Loss", loss, figure),
    ...run.metrics.filter((metric) => metric !== "loss").slice(0, 5).map((metric) =>
      curveFigure(title(metric), [{ name: title(metric), points: points(run.figures, (value) => value[metric]) }], figure)),
    curveFigure("Seconds of each round", [{ name: "seconds", points: points(run.seconds, (value) => value) }], figure),
  ].filter((made) => made !== null);
  byId("curves").replaceChildren(...figures);
  show("no-curves", !figures.length);
  const rounds = [...new Set([...run.losses.keys(), ...run.figures.keys()])].sort((a, b) => b - a);
  show("rounds-numbers", rounds.length > 0);
  fill("rounds", ["round", "train loss", ...run.metrics.map(title), "answered", "time"], rounds.slice(0, MOST_ROWS).map((round) => [
    run.notes.has(round) ? `${round} ${run.notes.get(round)}` : String(round),
    figure(run.losses.get(round)),
    ...run.metrics.map((metric) => figure((run.figures.get(round) || {})[metric])),
    run.answered.get(round) || "-",
    duration(run.seconds.get(round)),
  ]));
  show("test-section", run.test.size > 0);
  fill("test", ["training", ...run.metrics.map(title)], [...run.test].map(([name, found]) => [name, ...run.metrics.map((metric) => figure(found[metric]))]));
}

function drawPrivacy() {
  if (!facts) return;
  const promise = facts.privacy;
  if (promise === null) {
    put("privacy", "The run is not private: its adapter may give single records away.");
    return;
  }
  const each = `each ${promise.unit} at each site`;
  const paid = Object.values(facts.paid);
  const allowed = `epsilon ${promise.epsilon} at delta ${promise.delta.toExponential(0)} for ${each}`;
  const spent = paid.length
    ? ` Spent so far: epsilon ${figure(Math.max(...paid))} ${paid.length < run.sites.size ? `at the site that paid most of ${paid.length} whose ledgers were read` : "at the site that paid most"}.`
    : facts.simulated ? " Nothing is spent so far." : ` What is spent stands in the sites' own ledgers; ${run.done} of ${run.rounds} rounds are finished.`;
  put("privacy", `Allowed for the whole run: ${allowed}.${spent}${promise.protects ? "" : " privacy.unsafe_seed makes the noise known: this protects nobody."}`);
}

function drawSites() {
  const urgency = (state) => (state.startsWith("failed") ? 0 : state === "training" ? 1 : 2);
  let order = [...run.sites];
  if (order.length > MOST_SITES) order.sort((a, b) => urgency(a[1].state) - urgency(b[1].state));
  const hidden = order.length - MOST_SITES;
  const paid = facts && Object.keys(facts.paid).length ? facts.paid : null;
  const states = {};
  for (const [, known] of order) {
    const word = known.state.split(":")[0];
    states[word] = (states[word] || 0) + 1;
  }
  const said = Object.entries(states).map(([word, number]) => `${count(number)} ${word}`).join(", ");
  const caption = `${count(order.length)} sites: ${said || "none"}${hidden > 0 ? `; the first ${MOST_SITES} are shown, those that failed or train before others` : ""}`;
  fill("sites", ["site", "state", "train loss", "examples", "training", "bytes", "failures", ...(paid ? ["epsilon"] : [])], order.slice(0, MOST_SITES).map(([name, known]) => [
    name, goesOn || known.state !== "training" ? known.state : "was training", figure(known.loss), count(known.examples), duration(known.seconds), size(known.traffic), count(known.failures),
    ...(paid ? [figure(paid[name])] : []),
  ]), { caption, texts: [1] });
}

function drawPhases() {
  const times = new Map(run.phases);
  if (run.openPhase) {
    const [name, since] = run.openPhase;
    times.set(name, (times.get(name) || 0) + Math.max(0, (goesOn ? serverTime : run.lastTime) - since));
  }
  const all = [...times.values()].reduce((sum, each) => sum + each, 0);
  fill("phases", ["phase", "time", "share"], [...times].map(([name, seconds]) => [
    goesOn && run.openPhase && run.openPhase[0] === name ? `${name} (now)` : name, duration(seconds), all ? `${((100 * seconds) / all).toFixed(0)} %` : "-",
  ]));
  put("plan", run.plan.join("; "));
  show("plan", run.plan.length > 0);
  const used = run.used;
  put("used", used ? [
    `${goesOn && !run.stopped ? "Now" : "Last"}: processors ${share(used.processors)}`, `memory ${size(used.memory)}`,
    ...used.gpus.map((each, place) => `GPU ${place} ${share(each)}, ${size(used.gpu_memory[place])}`),
  ].join(", ") : "");
  show("used", Boolean(used));
  show("stages-wide", run.stages.size > 0);
  fill("stages", ["stage", "mean", "longest", "in all"], [...run.stages].map(([name, [number, total, longest]]) => [
    name, duration(total / number), duration(longest), duration(total),
  ]));
}

function drawErrors() {
  show("no-errors", !run.errors.length);
  show("errors-wide", run.errors.length > 0);
  const hidden = run.errors.length - MOST_ROWS;
  fill("errors", ["round", "site", "code", "reason"], run.errors.slice(-MOST_ROWS).reverse().map((each) => [
    String(each.round), each.name || "all", each.code, each.reason || "-",
  ]), { caption: `The newest first${hidden > 0 ? `; ${count(hidden)} older ones are left out` : ""}`, texts: [1, 2, 3] });
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error || String(answer.status));
  return body;
}

async function follow() {
  let changed = false;
  try {
    for (let more = true; more; ) {
      const piece = await ask(`/events?after=${place}`);
      if (piece.anew) run = newRun();
      piece.events.forEach(take);
      run.unread += piece.damaged;
      changed = changed || piece.events.length > 0 || piece.anew || goesOn !== piece.goes_on;
      ({ next: place, more, goes_on: goesOn, now: serverTime } = piece);
    }
    if (changed || facts === null) facts = await ask("/run");
    drawHead();
    drawPhases();
    if (changed) [drawCurves, drawSites, drawErrors].forEach((draw) => draw());
    drawPrivacy();
  } catch (error) {
    put("trouble", `coadapt watch does not answer (${error.message}); what is shown may be old.`);
    show("trouble", true);
  }
  setTimeout(follow, goesOn ? SOON : LATER);
}

follow();
