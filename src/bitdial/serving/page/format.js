// Numbers and names as people read them, and elements whose text is never parsed as markup.

const NBSP = '\u00a0';
export const NONE = '–';

/** Control, format and lone surrogate characters written out: they could reorder or hide the text around them. */
export function visible(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]/gu, (c) => '\\u' + c.codePointAt(0).toString(16).padStart(4, '0'));
}

/** An element with attributes (null ones are left out) and children; strings become text. */
export function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined)
    .map((child) => (child instanceof Node ? child : visible(child))));
  return node;
}

/** Sets the text only where it changed, so that a selection in the page survives. */
export function setText(node, text) {
  const shown = visible(text);
  if (node.textContent !== shown) node.textContent = shown;
}

const known = (value) => typeof value === 'number' && Number.isFinite(value);

/** 1234.5 -> "1,235"; small ones keep three significant digits. */
export function number(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  const digits = size >= 99.95 || Number.isInteger(value) ? 0 : size >= 9.995 ? 1 : 2;
  return value.toLocaleString('en-US', { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export const rate = (value) => (known(value) ? number(value) + NBSP + '/s' : NONE);

/** Seconds -> "41.2 ms", "1.52 s". */
export function duration(seconds) {
  if (!known(seconds)) return NONE;
  return seconds < 0.9995 ? milliseconds(seconds * 1000) + NBSP + 'ms' : number(seconds) + NBSP + 's';
}

export function milliseconds(value) {
  return known(value) && value !== 0 && value < 0.995 ? String(Number(value.toPrecision(2))) : number(value);
}

/** 0.8787 -> "87.9 %". */
export const percent = (share, digits = 1) => (known(share) ? (100 * share).toFixed(digits) + NBSP + '%' : NONE);

/** 0.5 -> "50 %", 0.125 -> "12.5 %". */
export const ratioName = (ratio) => (known(ratio) ? String(Number((100 * ratio).toPrecision(4))) + NBSP + '%' : NONE);

/** A difference of two shares in percentage points with its sign. */
export function points(difference) {
  const shown = (100 * difference).toFixed(2);
  if (Number(shown) === 0) return '±0.00';
  return (difference > 0 ? '+' : '\u2212') + shown.replace('-', '');
}

export function bigNumber(value) {
  if (!known(value)) return NONE;
  for (const [limit, suffix] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
    if (Math.abs(value) >= limit) return String(Number((value / limit).toPrecision(3))) + NBSP + suffix;
  }
  return String(value);
}

/** 4 210 s -> "1 h 10 min". */
export function age(seconds) {
  if (!known(seconds)) return NONE;
  const s = Math.floor(seconds), minutes = Math.floor(s / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${s % 60} s` : `${s} s`;
}

export const plural = (count, one, many = one + 's') => `${number(count)}${NBSP}${count === 1 ? one : many}`;
