"""The report's only script: sortable tables, the ratio slider and the line that explains a cell of the map.

The page is complete without it. The script makes no request, evaluates no text and writes names with textContent only.
"""

from __future__ import annotations

SCRIPT = """
'use strict';
(function () {
  function each(selector, root, use) { Array.prototype.forEach.call(root.querySelectorAll(selector), use); }

  each('table.sortable', document, function (table) {
    var body = table.tBodies[0];
    each('thead th', table, function (head) {
      var button = document.createElement('button');
      button.type = 'button';
      while (head.firstChild) button.appendChild(head.firstChild);
      head.appendChild(button);
      button.addEventListener('click', function () {
        var down = head.getAttribute('aria-sort') === 'ascending';
        each('thead th', table, function (other) { other.removeAttribute('aria-sort'); });
        head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
        var column = head.cellIndex;
        function key(row) {
          var cell = row.cells[column], value = cell.getAttribute('data-value');
          return value === null ? cell.textContent.trim() : parseFloat(value);
        }
        var rows = Array.prototype.slice.call(body.rows);
        rows.sort(function (a, b) {
          var x = key(a), y = key(b);
          var order = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y));
          return down ? -order : order;
        });
        rows.forEach(function (row) { body.appendChild(row); });
      });
    });
  });

  var block = document.getElementById('map-data'), dial = document.getElementById('dial');
  if (!block || !dial) return;
  var map = JSON.parse(block.textContent), slider = dial.querySelector('input');
  var name = dial.querySelector('b'), facts = dial.querySelector('output');
  dial.hidden = false;

  function show() {
    var at = Number(slider.value);
    name.textContent = map.ratios[at];
    slider.setAttribute('aria-valuetext', map.ratios[at]);
    facts.textContent = map.facts[at];
    each('path[data-low]', document, function (path) {
      path.classList.toggle('off', path.getAttribute('data-low').charAt(at) !== '1');
    });
    each('[data-shares]', document, function (cell) {
      cell.textContent = cell.getAttribute('data-shares').split('|')[at];
    });
    each('tr[data-ratio]', document, function (row) {
      row.classList.toggle('mark', Number(row.getAttribute('data-ratio')) === at);
    });
  }
  slider.addEventListener('input', show);
  show();

  var info = document.getElementById('cell-info'), rest = info.textContent;
  each('td.cells', document, function (cell) {
    var layer = map.layers[Number(cell.getAttribute('data-layer'))];
    cell.addEventListener('mousemove', function (event) {
      var box = cell.querySelector('svg').getBoundingClientRect();
      var channel = (event.clientX - box.left) / box.width * layer.bounds[layer.bounds.length - 1], g = 0;
      while (g + 2 < layer.bounds.length && channel >= layer.bounds[g + 1]) g += 1;
      var low = layer.low[g], first = low.indexOf('1');
      info.textContent = layer.name + ': group ' + g +
        (layer.channels ? ', channels ' + layer.bounds[g] + '\\u2013' + (layer.bounds[g + 1] - 1) : '') +
        (first < 0 ? ', always 8-bit' : ', low from ' + map.ratios[first]) +
        (layer.shift.length ? ', activation shift ' + layer.shift[g] : '');
    });
    cell.addEventListener('mouseleave', function () { info.textContent = rest; });
  });
}());
"""
