"use strict";
/* The data of the page. A layer is decoded when it is first looked at, and once.

   Words: a row is the attention of one query position; rows are numbered in order of position. The row at
   position p belongs to token p + 1, which was chosen from it. A choice is the index of a captured layer, or
   MEAN. A view holds a choice's entries of all rows: row r has positions[i] with scores[i] for start[r] <= i <
   end[r]. */

const attention = (() => {
  const MEAN = -1;
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const rows = meta.rows.length;
  const positions = meta.tokens.length;
  // a row at the last position chose a token that the text does not hold: most often the end of the turn
  const tokens = rows && meta.rows[rows - 1] === positions - 1 ? positions + 1 : positions;

  const rowOfToken = new Int32Array(tokens).fill(-1);
  meta.rows.forEach((position, row) => { rowOfToken[position + 1] = row; });

  // stored values are round(65535 * sqrt(v))
  const VALUES = new Float32Array(65536);
  for (let i = 0; i < 65536; i++) VALUES[i] = (i / 65535) ** 2;

  function bytes(id) {
    const text = document.getElementById(id).textContent;
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer;
    const binary = atob(text);
    const out = new Uint8Array(binary.length);
    for (let i = 0; i < out.length; i++) out[i] = binary.charCodeAt(i);
    return out.buffer;
  }

  function decode(id) {
    const stored = new Uint16Array(bytes(id));
    const out = new Float32Array(stored.length);
    for (let i = 0; i < out.length; i++) out[i] = VALUES[stored[i]];
    return out;
  }

  function once(make) {
    const made = new Map();
    return (choice) => {
      if (!made.has(choice)) made.set(choice, make(choice));
      return made.get(choice);
    };
  }

  function layerView(layer) {
    const { k } = meta;
    const Positions = meta.positionBytes === 2 ? Uint16Array : Uint32Array;
    const none = meta.positionBytes === 2 ? 0xffff : 0xffffffff;
    const found = new Positions(bytes("positions-" + layer));
    const start = new Uint32Array(rows);
    const end = new Uint32Array(rows);
    for (let row = 0; row < rows; row++) {
      let stop = row * k;
      start[row] = stop;
      while (stop < (row + 1) * k && found[stop] !== none) stop++;
      end[row] = stop;
    }
    return { start, end, positions: found, scores: decode("scores-" + layer) };
  }

  /* Per row the union of the layers' positions, each with its score summed over the layers and divided by
     their number: what a layer did not report counts as 0. */
  function meanView() {
    const layers = meta.layers.length;
    const views = meta.layers.map((_, layer) => view(layer));
    const start = new Uint32Array(rows);
    const end = new Uint32Array(rows);
    let found = new Uint32Array(rows * meta.k * 2);
    let scores = new Float32Array(found.length);
    const sums = new Float32Array(positions);
    const touched = new Uint32Array(positions);
    let at = 0;
    for (let row = 0; row < rows; row++) {
      let count = 0;
      for (const { start, end, positions, scores } of views) {
        for (let i = start[row]; i < end[row]; i++) {
          const position = positions[i];
          if (sums[position] === 0) touched[count++] = position;
          sums[position] += scores[i] || 1e-30; // a stored 0 is still a reported position
        }
      }
      if (at + count > found.length) {
        found = grown(found, at + count);
        scores = grown(scores, found.length);
      }
      start[row] = at;
      for (let i = 0; i < count; i++, at++) {
        found[at] = touched[i];
        scores[at] = sums[touched[i]] / layers;
        sums[touched[i]] = 0;
      }
      end[row] = at;
    }
    return { start, end, positions: found, scores };
  }

  function grown(array, least) {
    const larger = new array.constructor(Math.max(least, 2 * array.length));
    larger.set(array);
    return larger;
  }

  const view = once((choice) => (choice === MEAN ? meanView() : layerView(choice)));

  /* The index of the other direction: position s was looked at by rows[i] with scores[i] for
     start[s] <= i < start[s + 1], rows ascending. */
  const reverse = once((choice) => {
    const seen = view(choice);
    const start = new Uint32Array(positions + 1);
    for (let row = 0; row < rows; row++) {
      for (let i = seen.start[row]; i < seen.end[row]; i++) start[seen.positions[i] + 1]++;
    }
    for (let i = 0; i < positions; i++) start[i + 1] += start[i];
    const next = start.slice();
    const from = new Uint32Array(start[positions]);
    const scores = new Float32Array(start[positions]);
    for (let row = 0; row < rows; row++) {
      for (let i = seen.start[row]; i < seen.end[row]; i++) {
        const at = next[seen.positions[i]]++;
        from[at] = row;
        scores[at] = seen.scores[i];
      }
    }
    return { start, rows: from, scores };
  });

  /* The attention sinks: positions with a tenth or more of all reported mass, reported by at least half of the
     rows; else the one with the most, if that is 2% or more. `share` is their part of the reported mass. */
  const sinks = once((choice) => {
    const { start, end, positions: at, scores } = view(choice);
    const mass = new Float64Array(positions);
    const count = new Uint32Array(positions);
    let total = 0;
    for (let row = 0; row < rows; row++) {
      for (let i = start[row]; i < end[row]; i++) {
        mass[at[i]] += scores[i];
        count[at[i]]++;
        total += scores[i];
      }
    }
    if (total === 0) return { positions: new Set(), share: 0 };
    let found = [];
    let largest = 0;
    for (let i = 0; i < positions; i++) {
      if (mass[i] > mass[largest]) largest = i;
      if (mass[i] >= total / 10 && count[i] >= rows / 2) found.push(i);
    }
    if (!found.length && mass[largest] >= total / 50) found = [largest];
    return { positions: new Set(found), share: found.reduce((sum, i) => sum + mass[i], 0) / total };
  });

  /* One row of a per-layer table; for MEAN the mean over the layers. */
  function table(name, width) {
    const layerTable = once((layer) => decode(name + "-" + layer));
    return (choice, row) => {
      if (width === 0) return new Float32Array(0);
      const cut = (layer) => layerTable(layer).subarray(row * width, (row + 1) * width);
      if (choice !== MEAN) return cut(choice);
      const mean = new Float32Array(width);
      for (let layer = 0; layer < meta.layers.length; layer++) {
        cut(layer).forEach((value, i) => { mean[i] += value / meta.layers.length; });
      }
      return mean;
    };
  }

  /* What to show for one token: the tokens it looked at (or that looked at it), best first, with scores and
     distances. null where the row was not captured. */
  function entries(choice, direction, token) {
    const shown = { tokens: [], scores: [], distances: [] };
    let from, start, end;
    if (direction === "to") {
      const row = rowOfToken[token];
      if (row < 0) return null;
      from = view(choice);
      start = from.start[row];
      end = from.end[row];
    } else {
      if (token >= positions) return shown;
      from = reverse(choice);
      start = from.start[token];
      end = from.start[token + 1];
    }
    const { scores } = from;
    const order = Array.from({ length: end - start }, (_, i) => start + i);
    if (direction === "by" || choice === MEAN) order.sort((a, b) => scores[b] - scores[a] || a - b);
    for (const i of order) {
      const other = direction === "to" ? from.positions[i] : meta.rows[from.rows[i]] + 1;
      shown.tokens.push(other);
      shown.scores.push(scores[i]);
      // distances are counted as the histogram counts them: from the row's position, one before the token it chose
      shown.distances.push(direction === "to" ? token - 1 - other : other - 1 - token);
    }
    return shown;
  }

  return {
    MEAN, meta, rows, positions, tokens, rowOfToken, view, sinks, entries,
    fingerprint: table("fingerprints", meta.fingerprint.size),
    spans: table("spans", meta.spans.length),
  };
})();
