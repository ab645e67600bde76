// Line charts of the last minutes, drawn as SVG. All charts share one time axis and one cursor.

import { el, setText, visible, NONE } from './format.js';

const SVG = 'http://www.w3.org/2000/svg';
const LEFT = 46, RIGHT = 8, TOP = 10, BOTTOM = 20;

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = visible(text);
  return node;
}

/** Round steps that cut low..high into about `count` parts. */
export function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const places = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) places.push(k * step + 0); // no negative zero
  return places;
}

function timeLabel(ago) {
  if (ago === 0) return 'now';
  return ago % 60 ? `\u2212${ago}\u00a0s` : `\u2212${ago / 60}\u00a0min`;
}

/** Sums of the rows of every `step` seconds: [{from, seconds, ...sums}], oldest first, without gaps from `start` to `end`. */
export function buckets(rows, start, end, step) {
  const first = Math.floor(start / step), parts = [];
  for (let k = first; k * step < end; k += 1) {
    const from = Math.max(k * step, start);
    parts.push({
      from, seconds: Math.min((k + 1) * step, end) - from, arrivals: 0, answered: 0, refused: 0, samples: 0, arrivedSamples: 0,
      p50: 0, p99: null, ratio: 0, accuracy: 0, known: 0, batches: 0, batchSamples: 0, depth: 0, oldest: 0, queue: 0, compute: 0,
    });
  }
  for (const row of rows) {
    const part = parts[Math.floor(row.t / step) - first];
    if (!part || row.t < start || row.t >= end) continue;
    part.arrivals += row.arrivals;
    part.arrivedSamples += row.arrived_samples;
    part.refused += row.shed + row.expired + row.failed;
    part.batches += row.batches;
    part.batchSamples += row.batch_samples;
    part.depth = Math.max(part.depth, row.queue_depth);
    part.oldest = Math.max(part.oldest, row.oldest_wait);
    if (!row.answered) continue;
    part.answered += row.answered;
    part.samples += row.answered_samples;
    part.p50 += row.p50 * row.answered;
    part.queue += row.queue * row.answered;
    part.compute += row.compute * row.answered;
    part.p99 = Math.max(part.p99 ?? 0, row.p99);
    part.ratio += (row.ratio ?? 0) * row.answered_samples;
    if (row.accuracy !== null) {
      part.accuracy += row.accuracy * row.answered_samples;
      part.known += row.answered_samples;
    }
  }
  return parts;
}

const shared = { charts: new Set(), ago: null };

function moveCursor(ago) {
  shared.ago = ago;
  for (const chart of shared.charts) chart.showCursor();
}

export class Chart {
  /**
   * title, unit    of the caption
   * series         [{label, colour ("main", "s0", ...), dashed, area, value: (bucket) => number or null}]
   * format         a value as text
   * limits         () => [{label, value}]: horizontal lines
   * range          (lowest, highest) => [low, high] of the vertical axis
   */
  constructor(options) {
    Object.assign(this, options);
    this.values = this.series.map(() => el('b', {}, NONE));
    this.when = el('li', { class: 'when' });
    const legend = el('ul', { class: 'legend' }, this.series.map((one, k) => {
      const key = svg('svg', { viewBox: '0 0 22 10', 'aria-hidden': 'true' });
      key.append(svg('path', { d: 'M1 5H21', class: this.lineClass(one) }));
      return el('li', {}, key, one.label, this.values[k]);
    }), this.when);
    this.plot = el('div', { class: 'plot' });
    this.figure = el('figure', { id: this.id }, el('figcaption', {}, this.title + ' ', el('span', {}, this.unit)), legend, this.plot);
    this.root = svg('svg', { role: 'img' });
    this.plot.append(this.root);
    this.parts = [];
    this.plot.addEventListener('pointermove', (event) => {
      const box = this.plot.getBoundingClientRect();
      const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
      moveCursor(share >= 0 && share <= 1 ? (1 - share) * this.span : null);
    });
    for (const kind of ['pointerleave', 'pointercancel']) this.plot.addEventListener(kind, () => moveCursor(null));
    shared.charts.add(this);
  }

  lineClass(one) { return `line c-${one.colour}${one.dashed ? ' dashed' : ''}`; }

  /** Draws rows up to `end` (whole seconds), `span` seconds back, not before `start`. */
  draw(rows, start, end, span) {
    this.span = span;
    this.end = end;
    const width = Math.max(this.plot.clientWidth, 160), height = Math.max(this.plot.clientHeight, 100);
    const inner = width - LEFT - RIGHT;
    const step = Math.max(1, Math.ceil(span / (inner / 2.5)));
    this.parts = buckets(rows, Math.max(start, end - span), end, step);
    const lines = this.series.map((one) => this.parts.map((part) => one.value(part)));
    const limits = (this.limits ? this.limits() : []).filter((limit) => Number.isFinite(limit.value));
    const all = lines.flat().filter((value) => value !== null);
    const [low, high] = this.range(all.length ? Math.min(...all) : null, all.length ? Math.max(...all) : null);
    const x = (time) => LEFT + inner * (1 - (end - time) / span);
    const y = (value) => TOP + (height - TOP - BOTTOM) * (1 - (Math.min(Math.max(value, low), high) - low) / (high - low));
    this.x = x;
    const nodes = [];
    for (const value of ticks(low, high, 4)) {
      nodes.push(svg('path', { class: 'grid', d: `M${LEFT} ${y(value).toFixed(1)}H${width - RIGHT}` }));
      nodes.push(svg('text', { x: LEFT - 6, y: (y(value) + 4).toFixed(1), 'text-anchor': 'end' }, (this.tick || this.format)(value)));
    }
    const narrow = inner < 330, every = span <= 60 ? (narrow ? 20 : 10) : span <= 300 ? (narrow ? 120 : 60) : (narrow ? 300 : 180);
    for (let ago = 0; ago <= span; ago += every) {
      const anchor = ago === 0 ? 'end' : ago === span ? 'start' : 'middle';
      nodes.push(svg('text', { x: x(end - ago).toFixed(1), y: height - 4, 'text-anchor': anchor }, timeLabel(ago)));
    }
    nodes.push(svg('path', { class: 'axis', d: `M${LEFT} ${height - BOTTOM}H${width - RIGHT}` }));
    this.series.forEach((one, k) => {
      const runs = this.runs(lines[k], x, y);
      const path = runs.map((run) => 'M' + run.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join('L') + (run.length === 1 ? 'h0' : '')).join('');
      if (one.area) {
        const base = (height - BOTTOM).toFixed(1);
        const filled = runs.map((run) => `M${run[0][0].toFixed(1)} ${base}L` + run.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join('L') +
          `L${run[run.length - 1][0].toFixed(1)} ${base}Z`).join('');
        nodes.push(svg('path', { class: `area c-${one.colour}`, d: filled }));
      }
      nodes.push(svg('path', { class: this.lineClass(one), d: path, 'data-series': visible(one.label) }));
    });
    for (const limit of limits) {
      if (limit.value < low || limit.value > high) continue;
      const place = y(limit.value);
      nodes.push(svg('path', { class: 'limit', d: `M${LEFT} ${place.toFixed(1)}H${width - RIGHT}` }));
      const below = place < TOP + 14;
      nodes.push(svg('text', { class: 'limit-text', x: LEFT + 6, y: (below ? place + 14 : place - 5).toFixed(1) }, limit.label));
    }
    this.cursor = svg('path', { class: 'cursor', d: '' });
    nodes.push(this.cursor);
    this.root.setAttribute('viewBox', `0 0 ${width} ${height}`);
    this.root.replaceChildren(...nodes);
    this.height = height;
    this.showCursor();
    this.root.setAttribute('aria-label', this.summary(lines));
  }

  /** Points of a line, cut where there is no value. */
  runs(values, x, y) {
    const runs = [];
    let run = null;
    values.forEach((value, k) => {
      if (value === null) {
        run = null;
        return;
      }
      if (!run) runs.push(run = []);
      run.push([x(this.parts[k].from + this.parts[k].seconds / 2), y(value)]);
    });
    return runs;
  }

  summary(lines) {
    const minutes = this.span / 60;
    const told = this.series.map((one, k) => {
      const values = lines[k].filter((value) => value !== null);
      if (!values.length) return `${one.label}: no data`;
      const last = this.format(values[values.length - 1]);
      return `${one.label}: last ${last}, from ${this.format(Math.min(...values))} to ${this.format(Math.max(...values))}`;
    });
    return visible(`${this.title}, ${this.unit}, last ${minutes} ${minutes === 1 ? 'minute' : 'minutes'}. ${told.join('; ')}.`);
  }

  /** Values at the cursor in the legend; without a cursor the latest. */
  showCursor() {
    if (!this.parts.length || !this.cursor) return;
    const last = this.parts.length - 1;
    let at = last;
    if (shared.ago !== null) {
      const time = this.end - shared.ago;
      const found = this.parts.findIndex((part) => time < part.from + part.seconds);
      at = found < 0 ? last : found;
    }
    const part = this.parts[at];
    this.series.forEach((one, k) => {
      const value = one.value(part);
      setText(this.values[k], value === null ? NONE : this.format(value));
    });
    if (shared.ago === null) {
      this.cursor.setAttribute('d', '');
      setText(this.when, '');
    } else {
      const place = this.x(part.from + part.seconds / 2).toFixed(1);
      this.cursor.setAttribute('d', `M${place} ${TOP}V${this.height - BOTTOM}`);
      const ago = Math.round(this.end - part.from - part.seconds / 2);
      setText(this.when, ago >= 120 ? `${Math.floor(ago / 60)} min ${ago % 60} s ago` : `${ago} s ago`);
    }
  }
}
