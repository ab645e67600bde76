// The live page: asks the server once a second and draws what it answers.

import { Chart } from './charts.js';
import { factList, layerTable, serviceTable } from './tables.js';
import {
  age, duration, el, milliseconds, number, percent, plural, points, rate, ratioName, setText, visible, NONE,
} from './format.js';

const KEEP = 900, PERIOD = 1000, STATE_EVERY = 5, PATIENCE = 8000, KEY = 'bitdial-api-key';
const $ = (id) => document.getElementById(id);
const view = { state: null, stateAt: 0, model: null, rows: [], now: null, present: null, span: 300, shown: null, polls: 0, lost: null };
let marks = [];

// ---- asking ------------------------------------------------------------------------------------------------------------------

class NeedsKey extends Error {}

async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const answer = await fetch(path, {
    headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: 'no-store', signal: AbortSignal.timeout(PATIENCE),
  });
  if (answer.status === 401 || answer.status === 403) throw new NeedsKey();
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer.json();
}

async function askState() {
  view.state = await ask('/live/state');
  view.stateAt = performance.now();
  const names = view.state.models.map((model) => model.name);
  if (!names.includes(view.model)) {
    const wanted = new URLSearchParams(location.hash.slice(1)).get('model');
    choose(names.includes(wanted) ? wanted : names[0] ?? null);
  }
}

async function askHistory() {
  if (view.model === null) return;
  const name = view.model, since = view.now;
  const query = new URLSearchParams({ model: name });
  if (since !== null) query.set('since', since);
  const answer = await ask(`/live/history?${query}`);
  if (name !== view.model) return; // another was chosen meanwhile
  if (since !== null && answer.now < since - 5) { // the server was started anew
    view.rows = [];
    view.now = null;
    return;
  }
  view.now = Math.max(answer.now, since ?? answer.now); // a clock may step back a little
  view.present = answer.present;
  view.rows = view.rows.concat(answer.rows).filter((row) => row.t > answer.now - KEEP - 1);
}

async function poll() {
  const begun = performance.now();
  let pause = PERIOD;
  try {
    if (view.polls % STATE_EVERY === 0 || !view.state) await askState();
    await askHistory();
    view.polls += 1;
    view.lost = null;
    show();
    pause = Math.max(100, PERIOD - (performance.now() - begun));
  } catch (error) {
    if (error instanceof NeedsKey) {
      askKey();
      return;
    }
    view.lost ??= Date.now();
    trouble(error);
    view.polls = 0;
  }
  if (document.hidden) document.addEventListener('visibilitychange', poll, { once: true });
  else setTimeout(poll, pause);
}

function trouble(error) {
  const seconds = Math.round((Date.now() - view.lost) / 1000);
  setText($('trouble'), `No figures from the server for ${age(seconds)} (${error.message}). Trying again every second.`);
  $('trouble').hidden = false;
}

function askKey() {
  $('key-error').hidden = !sessionStorage.getItem(KEY);
  sessionStorage.removeItem(KEY);
  $('key').value = '';
  if (!$('key-dialog').open) $('key-dialog').showModal();
  $('key').focus();
  setText($('server'), 'An API key is needed.');
}

$('key-dialog').addEventListener('cancel', (event) => event.preventDefault());
$('key-form').addEventListener('submit', (event) => {
  event.preventDefault();
  const key = $('key').value.trim();
  if (!key || /[^\x21-\x7e]/.test(key)) { // cannot be a header's value
    $('key-error').hidden = false;
    return;
  }
  sessionStorage.setItem(KEY, key);
  $('key-dialog').close();
  poll();
});

// ---- choosing ----------------------------------------------------------------------------------------------------------------

function choose(name) {
  if (name === view.model) return;
  Object.assign(view, { model: name, rows: [], now: null, present: null, shown: null });
}

$('model').addEventListener('change', async () => {
  choose(view.state.models[Number($('model').value)].name);
  history.replaceState(null, '', '#' + new URLSearchParams({ model: view.model }));
  show();
  try {
    await askHistory();
    show();
  } catch { /* the next poll says what is wrong */ }
});
for (const button of document.querySelectorAll('input[name=window]')) {
  button.addEventListener('change', () => {
    view.span = Number(button.value);
    show();
  });
}
const restored = document.querySelector('input[name=window]:checked'); // browsers keep it over a reload
if (restored) view.span = Number(restored.value);

$('export').addEventListener('click', () => {
  const content = {
    format: 'bitdial-live-recording', version: 1, saved: new Date().toISOString(), server: view.state.server,
    model: current(), now: view.now, present: view.present, rows: view.rows,
  };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: 'application/json' }));
  const stamp = content.saved.slice(0, 19).replace(/[-:]/g, '');
  const link = el('a', { href: url, download: `bitdial-${view.model.replace(/[^\w.-]+/g, '_').slice(0, 80)}-${stamp}.json` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
});

const uptime = () => view.state.server.uptime_s + (performance.now() - view.stateAt) / 1000;
const current = () => view.state?.models.find((model) => model.name === view.model) ?? null;
const slo = () => { const ms = current()?.slo_ms; return typeof ms === 'number' ? ms / 1000 : NaN; };
const accuracyOf = (index) => current()?.accuracy?.[index] ?? null;

// ---- charts ------------------------------------------------------------------------------------------------------------------

const per = (total, count) => (count ? total / count : null);
const fromZero = (least) => (low, high) => [0, Math.max(high ?? 0, least) * 1.08];
const latencyRange = (low, high) => [0, Math.max(high ?? 0, Number.isFinite(slo()) ? slo() : 0, 0.001) * 1.12];

function accuracyRange(low, high) {
  const all = (current()?.accuracy ?? []).concat(low, high).filter((value) => typeof value === 'number');
  if (!all.length) return [0, 1];
  const least = Math.min(...all), most = Math.max(...all), room = Math.max((most - least) * 0.12, 0.0005);
  return [Math.max(0, least - room), most + 2.5 * room]; // room for the limit's name
}

const CHARTS = [
  new Chart({
    id: 'chart-load', title: 'Load', unit: 'requests per second', format: rate, tick: number, range: fromZero(1), series: [
      { label: 'offered', colour: 'main', area: true, value: (b) => b.arrivals / b.seconds },
      { label: 'answered', colour: 's1', dashed: true, value: (b) => b.answered / b.seconds },
      { label: 'shed, expired or failed', colour: 's0', value: (b) => b.refused / b.seconds }],
  }),
  new Chart({
    id: 'chart-latency', title: 'Latency', unit: 'from arrival to answer', format: duration, range: latencyRange,
    limits: () => [{ label: `SLO ${duration(slo())}`, value: slo() }], series: [
      { label: 'p99 (worst second)', colour: 's0', value: (b) => b.p99 },
      { label: 'p50', colour: 'main', value: (b) => per(b.p50, b.answered) }],
  }),
  new Chart({
    id: 'chart-ratio', title: 'Ratio', unit: 'share of the work at low precision', format: (v) => percent(v, 1),
    tick: (v) => ratioName(v), range: () => [0, 1], series: [
      { label: 'mean of the answered samples', colour: 'main', area: true, value: (b) => per(b.ratio, b.samples) }],
  }),
  new Chart({
    id: 'chart-accuracy', title: 'Expected accuracy', unit: 'measured at the ratios that ran', format: (v) => percent(v, 2),
    tick: (v) => `${Number((100 * v).toFixed(2))}\u00a0%`, range: accuracyRange,
    limits: () => [{ label: `ratio ${ratioName(current()?.ratios?.[0])}: ${percent(accuracyOf(0), 2)}`, value: accuracyOf(0) ?? NaN }],
    series: [{ label: 'mean of the answered samples', colour: 's1', value: (b) => (b.known === b.samples ? per(b.accuracy, b.known) : null) }],
  }),
  new Chart({
    id: 'chart-time', title: 'Where the time goes', unit: 'mean of the answered requests', format: duration, range: fromZero(0.001), series: [
      { label: 'waiting', colour: 's2', value: (b) => per(b.queue, b.answered) },
      { label: 'computing', colour: 'main', value: (b) => per(b.compute, b.answered) }],
  }),
  new Chart({
    id: 'chart-queue', title: 'Queue and batches', unit: 'most waiting requests; mean samples of a batch', format: number, range: fromZero(1), series: [
      { label: 'waiting', colour: 's2', area: true, value: (b) => b.depth },
      { label: 'samples per batch', colour: 'main', dashed: true, value: (b) => per(b.batchSamples, b.batches) }],
  }),
];
$('charts').append(...CHARTS.map((chart) => chart.figure));

// ---- tiles -------------------------------------------------------------------------------------------------------------------

const TILES = {};
for (const [id, label] of [['load', 'Offered load'], ['latency', 'Latency p99'], ['slo', 'Within the SLO'], ['ratio', 'Mean ratio'],
  ['accuracy', 'Expected accuracy'], ['queue', 'Waiting requests'], ['workers', 'Workers']]) {
  const tile = { label: el('dt', {}, label), value: el('dd', { class: 'value' }, NONE), sub: el('dd', { class: 'sub' }) };
  tile.box = el('div', { class: 'tile', id: `tile-${id}` }, tile.label, tile.value, tile.sub);
  TILES[id] = tile;
  $('tiles').append(tile.box);
}
for (const id of ['ratio', 'accuracy']) TILES[id].box.classList.add('own');

function tile(id, value, sub, bad = false) {
  setText(TILES[id].value, value);
  setText(TILES[id].sub, sub);
  TILES[id].box.classList.toggle('bad', bad);
}

function sum(rows) {
  const total = { arrivals: 0, arrived_samples: 0, answered: 0, answered_samples: 0, met: 0, late: 0, shed: 0, expired: 0, failed: 0, ratio: 0,
    accuracy: 0, known: 0, p50: 0, p99: null, switches: 0 };
  for (const row of rows) {
    for (const key of ['arrivals', 'arrived_samples', 'answered', 'answered_samples', 'met', 'late', 'shed', 'expired', 'failed', 'switches']) {
      total[key] += row[key];
    }
    if (!row.answered) continue;
    total.ratio += (row.ratio ?? 0) * row.answered_samples;
    total.p50 += row.p50 * row.answered;
    total.p99 = Math.max(total.p99 ?? 0, row.p99);
    if (row.accuracy !== null) {
      total.accuracy += row.accuracy * row.answered_samples;
      total.known += row.answered_samples;
    }
  }
  return total;
}

function showTiles(start, end) {
  const after = (seconds) => view.rows.filter((row) => row.t >= end - seconds && row.t < end);
  const lasts = (seconds) => Math.max(1, Math.min(seconds, end - start));
  const few = sum(after(5)), ten = sum(after(10)), all = sum(after(view.span));
  const window = `last ${view.span / 60}\u00a0min`;
  tile('load', rate(few.arrivals / lasts(5)),
    `answered ${rate(few.answered / lasts(5))}, ${number(few.arrived_samples / lasts(5))} samples/s; last 5\u00a0s`);
  tile('latency', duration(ten.p99), `worst of the last 10\u00a0s; p50 ${duration(per(ten.p50, ten.answered))}, SLO ${duration(slo())}`,
    ten.p99 !== null && ten.p99 > slo());
  const counted = all.answered + all.shed + all.expired + all.failed, share = counted ? all.met / counted : NaN;
  tile('slo', percent(share, share > 0.999 && share < 1 ? 3 : 2),
    `${window}: ${number(all.late)} late, ${number(all.shed)} shed, ${number(all.expired)} expired, ${number(all.failed)} failed`, share < 0.99);
  const present = view.present ?? {};
  tile('ratio', percent(per(all.ratio, all.answered_samples), 1),
    `${window}; now ${ratioName(present.ratio)}, ${plural(all.switches, 'switch', 'switches')}`);
  const accuracy = all.known && all.known === all.answered_samples ? all.accuracy / all.known : null, best = accuracyOf(0);
  tile('accuracy', percent(accuracy, 2), accuracy === null ? (best === null ? 'not measured for this model' : window) :
    `${window}; ${points(accuracy - best)} points against ratio ${ratioName(current()?.ratios?.[0])}`);
  tile('queue', number(present.queue_depth ?? 0),
    `${plural(present.queue_samples ?? 0, 'sample')}, oldest ${duration(present.oldest_wait ?? 0)}`);
  const wanted = workersWanted(current()?.workers), running = present.workers ?? NaN;
  const reloads = present.reloads ?? {};
  tile('workers', wanted === null ? number(running) : `${number(running)} of ${number(wanted)}`,
    `running; ${plural(present.restarts ?? 0, 'restart')}, ${plural(reloads.ok ?? 0, 'reload')}` +
    (reloads.failed ? `, ${number(reloads.failed)} failed` : ''), wanted !== null && running < wanted);
}

const workersWanted = (workers) => (Array.isArray(workers) ? workers.length : typeof workers === 'number' ? workers : null);

// ---- all of it ---------------------------------------------------------------------------------------------------------------

function showModels(models) {
  const select = $('model'), names = models.map((model) => model.name);
  if (names.join('\n') !== view.listed) {
    view.listed = names.join('\n');
    select.replaceChildren(...names.map((name, at) => el('option', { value: String(at) }, name)));
  }
  select.value = String(names.indexOf(view.model));
  $('model-label').hidden = names.length < 2;
}

function show() {
  if (!view.state) return;
  const { server, models } = view.state, model = current();
  $('trouble').hidden = true;
  setText($('server'), [`bitdial ${server.version ?? ''}`, server.processor, `up ${age(uptime())}`].filter(Boolean).join(' · '));
  $('controls').hidden = $('content').hidden = !model;
  showModels(models);
  if (!model) {
    setText($('server'), $('server').textContent + ' · no models');
    return;
  }
  setText($('title'), model.name);
  document.title = `${visible(model.name)} – bitdial`;
  setText($('state'), model.state ?? 'unknown');
  $('state').className = `badge${model.state === 'ready' ? ' ready' : ''}`;
  $('state').hidden = false;
  if (model.message) {
    setText($('trouble'), model.message);
    $('trouble').hidden = false;
  }
  const kept = JSON.stringify([model.name, model.digest, model.table, model.layers, model.engine, model.policy, model.slo_ms]);
  if (view.shown !== kept) { // tables are built anew only when what they show has changed
    view.shown = kept;
    marks = [serviceTable($('service'), model.table, model.accuracy), layerTable($('layers'), model.layers)];
    factList($('facts'), model);
  }
  const at = view.present ? view.present.index : 0;
  for (const mark of marks) mark(at);
  setText($('layers-lead'), `Share of each layer’s multiply-accumulates (MACs) at low precision while the dial is at ${ratioName(model.ratios?.[at])}.`);
  if (view.now === null) return;
  const end = Math.floor(view.now), first = view.rows.length ? view.rows[0].t : end;
  const up = uptime() / (model.engine?.dilation || 1); // rows are in the model's seconds, which may be modelled ones
  const start = Number.isFinite(up) ? Math.min(first, Math.ceil(end - up)) : first;
  showTiles(start, end);
  for (const chart of CHARTS) chart.draw(view.rows, start, end, view.span);
}

let resizing = 0;
new ResizeObserver(() => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(show);
}).observe($('charts'));

poll();
