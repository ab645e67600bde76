// Tables of what does not change from second to second: the service table, the layers, the facts of a model.

import { el, setText, number, milliseconds, percent, ratioName, bigNumber, NONE } from './format.js';

const isList = Array.isArray;

/** Milliseconds by batch size and ratio. Returns a function that marks the column of a ratio's index. */
export function serviceTable(table, data, accuracy) {
  table.replaceChildren();
  if (!data || !isList(data.ratios) || !isList(data.batches) || !isList(data.seconds)) {
    table.append(el('tbody', {}, el('tr', {}, el('td', { class: 'muted' }, 'Not measured yet.'))));
    return () => {};
  }
  const columns = data.ratios.map((_, index) => index);
  const cell = (index, tag, text) => el(tag, { class: 'num', 'data-index': index, scope: tag === 'th' ? 'col' : null }, text);
  const head = el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'Samples in the batch'),
    columns.map((index) => cell(index, 'th', 'ratio ' + ratioName(data.ratios[index])))));
  const body = el('tbody', {}, data.batches.map((batch, row) => el('tr', {}, el('th', { scope: 'row' }, number(batch)),
    columns.map((index) => cell(index, 'td', milliseconds(1000 * data.seconds[index][row]))))));
  const largest = data.batches.length - 1, size = data.batches[largest];
  const speed = columns.map((index) => size / data.seconds[index][largest]);
  const known = isList(accuracy) ? accuracy : data.accuracy || [];
  const foot = el('tfoot', {},
    el('tr', {}, el('th', { scope: 'row' }, 'Samples/s, largest batch'), columns.map((index) => cell(index, 'td', number(speed[index])))),
    el('tr', {}, el('th', { scope: 'row' }, `Against ratio ${ratioName(data.ratios[0])}`),
      columns.map((index) => cell(index, 'td', (speed[index] / speed[0]).toFixed(2) + '\u00a0×'))),
    el('tr', {}, el('th', { scope: 'row' }, 'Measured accuracy'), columns.map((index) => cell(index, 'td', percent(known[index], 2)))));
  table.append(head, body, foot);
  return (at) => {
    for (const one of table.querySelectorAll('[data-index]')) one.classList.toggle('mark', Number(one.dataset.index) === at);
  };
}

/** One row per layer. Returns a function that shows the shares at a ratio's index. */
export function layerTable(table, layers) {
  table.replaceChildren();
  if (!isList(layers) || !layers.length) {
    table.append(el('tbody', {}, el('tr', {}, el('td', { class: 'muted' }, 'No layers are known.'))));
    return () => {};
  }
  const total = layers.reduce((sum, layer) => sum + (layer.macs || 0), 0);
  const meters = [];
  const meter = (shares, label) => {
    const fill = el('b', {}), text = el('span', {});
    meters.push({ fill, text, shares });
    return el('td', { class: 'share' }, el('div', { class: 'meter' }, el('i', { 'aria-hidden': 'true' }, fill), text));
  };
  const body = el('tbody', {}, layers.map((layer) => el('tr', {},
    el('th', { scope: 'row', class: 'mono' }, layer.name), el('td', {}, layer.kind || NONE),
    el('td', { class: 'num' }, bigNumber(layer.macs)),
    layer.eligible === false ? el('td', { class: 'share muted' }, 'always 8-bit') : meter(layer.low_share || []))));
  const count = Math.max(0, ...layers.map((layer) => (layer.low_share || []).length));
  const whole = Array.from({ length: count }, (_, index) => layers.reduce(
    (sum, layer) => sum + (layer.macs || 0) * ((layer.eligible === false ? 0 : layer.low_share?.[index]) || 0), 0) / (total || 1));
  const foot = el('tfoot', {}, el('tr', {}, el('th', { scope: 'row' }, `${layers.length} layers`), el('td', {}),
    el('td', { class: 'num' }, bigNumber(total)), meter(whole)));
  table.append(el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'Layer'), el('th', { scope: 'col' }, 'Kind'),
    el('th', { scope: 'col', class: 'num' }, 'MACs per sample'), el('th', { scope: 'col' }, 'At low precision now'))), body, foot);
  return (at) => {
    for (const { fill, text, shares } of meters) {
      const share = shares[at];
      fill.style.width = `${100 * Math.min(Math.max(share || 0, 0), 1)}%`;
      setText(text, percent(share, 1));
    }
  };
}

const tensor = (one) => `${one.name}: ${one.dtype} [${(one.shape || []).map((n) => (n === -1 ? 'batch' : n)).join(', ')}]`;

function plain(value) {
  if (value === null || value === undefined) return NONE;
  if (isList(value)) return value.map(plain).join(', ');
  return typeof value === 'object' ? Object.entries(value).map(([key, item]) => `${key} ${plain(item)}`).join(', ') : String(value);
}

/** What is known of the model, as a list of terms. */
export function factList(list, model) {
  const facts = [['File (SHA-256)', model.digest, 'mono'], ['Policy', model.policy], ['SLO', model.slo_ms == null ? null : `${model.slo_ms} ms`],
    ['Ratios', (model.ratios || []).map(ratioName).join(', ')], ['Inputs', (model.inputs || []).map(tensor).join('; '), 'mono'],
    ['Outputs', (model.outputs || []).map(tensor).join('; '), 'mono'],
    ...Object.entries(model.engine || {}).map(([key, value]) => [`Engine: ${key}`, plain(value)])];
  list.replaceChildren(...facts.filter(([, value]) => value !== null && value !== undefined && value !== '')
    .flatMap(([name, value, kind]) => [el('dt', {}, name), el('dd', { class: kind || null }, value)]));
}
