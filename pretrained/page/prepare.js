'use strict';
// The preparation of a drawing or photograph, as predict.py's prepare_drawing computes it with --ink auto.

const median = values => Float64Array.from(values).sort()[(values.length - 1) >> 1];  // the lower one, as torch takes

// Means of the picture [H, W] in h x w nearly equal boxes.
function shrink(grey, H, W, h, w) {
  const small = new Float64Array(h * w), edge = (i, n, N) => [Math.floor(i * N / n), Math.ceil((i + 1) * N / n)];
  for (let i = 0; i < h; i++) for (let j = 0; j < w; j++) {
    const [top, bottom] = edge(i, h, H), [left, right] = edge(j, w, W);
    let total = 0;
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) total += grey[y * W + x];
    small[i * w + j] = total / ((bottom - top) * (right - left));
  }
  return small;
}

// The brightness of the paper at each place under uneven light [H, W]: a polynomial of degree 4 through most pixels.
function paperOf(grey, H, W) {
  const [h, w] = [H, W].map(n => Math.max(1, Math.round(n * Math.min(1, 64 / Math.max(H, W)))));
  const small = shrink(grey, H, W, h, w), order = [];
  for (let d = 0; d <= 4; d++) for (let a = 0; a <= d; a++) order.push([a, d - a]);  // of y^a x^b
  const terms = order.map((_, t) => surface(order.map(([a, b], i) => [a, b, +(i === t)]), h, w));
  let paper = new Float64Array(h * w).fill(median(small)), found = [];
  for (const now of [0, 1, 2, 2, 2, 2, 4, 4, 4, 4, 4]) {
    const off = small.map((value, k) => Math.abs(value - paper[k])), limit = 2.5 * Math.max(1.4826 * median(off), 2);
    const used = off.map(value => +(value <= limit));
    found = fit(terms.slice(0, (now + 1) * (now + 2) / 2), small, used).map((weight, i) => [...order[i], weight]);
    paper = surface(found, h, w);
    if (small.every((value, k) => !used[k] || Math.abs(value - paper[k]) < 0.01)) break;
  }
  return surface(found, H, W);
}

// The sum of weight * y^a * x^b over all [a, b, weight] at each place of [H, W]; x and y run from -1 to 1.
function surface(weighted, H, W) {
  const values = new Float64Array(H * W), at = (i, n) => n > 1 ? 2 * i / (n - 1) - 1 : -1;
  for (let i = 0; i < H; i++) {
    const of = [0, 0, 0, 0, 0];  // of x^b in this row
    for (const [a, b, weight] of weighted) of[b] += weight * at(i, H) ** a;
    for (let j = 0; j < W; j++) {
      const x = at(j, W);
      values[i * W + j] = of[0] + x * (of[1] + x * (of[2] + x * (of[3] + x * of[4])));
    }
  }
  return values;
}

// Least squares of the used values in the terms [m][n]: the normal equations by Gauss's elimination.
function fit(terms, values, used) {
  const dot = (a, b) => { let total = 0; for (let k = 0; k < a.length; k++) total += a[k] * b[k]; return total; };
  const kept = terms.map(a => a.map((value, k) => value * used[k]));
  const M = terms.map((a, i) => [...kept.map((b, j) => dot(a, b) + (i === j ? 1e-6 : 0)), dot(kept[i], values)]);
  M.forEach((pivot, i) => M.forEach((row, r) => {
    const factor = row[i] / pivot[i];
    if (r !== i) for (let j = i; j < row.length; j++) row[j] -= factor * pivot[j];
  }));
  return M.map((row, i) => row[M.length] / row[i]);
}

// One line of n values as m, by triangles that reach as far as the scale: bilinear with antialiasing.
function resizeLine(line, m) {
  const n = line.length, scale = n / m, reach = Math.max(1, scale);
  return Float64Array.from({length: m}, (_, i) => {
    const centre = (i + 0.5) * scale, low = Math.max(0, Math.trunc(centre - reach + 0.5));
    let total = 0, weights = 0;
    for (let j = low; j < Math.min(n, Math.trunc(centre + reach + 0.5)); j++) {
      const weight = Math.max(0, 1 - Math.abs(j + 0.5 - centre) / reach);
      total += weight * line[j];
      weights += weight;
    }
    return total / weights;
  });
}

// A drawing or photograph, grey [H * W] in 0..255, as the training images look: [SIZE * SIZE] in 0..1, 1 is ink.
// null where there are no strokes.
function prepare(grey, H, W) {
  const paper = paperOf(grey, H, W);
  let level = grey.map((value, k) => (value - paper[k]) / Math.max(8, paper[k]));
  const noise = 3 * 1.4826 * median(level.map(Math.abs)), beyond = sign => sum(level.map(v => Math.max(0, sign * v - noise)));
  const sign = beyond(-1) > beyond(1) ? -1 : 1;
  level = level.map(value => Math.max(0, sign * value));
  const most = Math.max(1 / 255, level.reduce((a, b) => Math.max(a, b)));
  level = level.map(value => value / most);
  let [top, bottom, left, right] = [H, 0, W, 0];
  level.forEach((value, k) => {
    if (value <= 0.4) return;
    const y = k / W | 0, x = k % W;
    [top, bottom, left, right] = [Math.min(top, y), Math.max(bottom, y + 1), Math.min(left, x), Math.max(right, x + 1)];
  });
  if (!bottom) return null;
  const [h, w] = [bottom - top, right - left], side = Math.trunc(1.35 * Math.max(h, w)) + 2;
  const canvas = new Float64Array(side * side), [y0, x0] = [(side - h) >> 1, (side - w) >> 1];
  for (let y = 0; y < h; y++)
    canvas.set(level.subarray((top + y) * W + left, (top + y) * W + right), (y0 + y) * side + x0);
  const rows = [], columns = [];
  for (let y = 0; y < side; y++) rows.push(resizeLine(canvas.subarray(y * side, (y + 1) * side), SIZE));
  for (let x = 0; x < SIZE; x++) columns.push(resizeLine(rows.map(row => row[x]), SIZE));
  const small = Float64Array.from({length: SIZE * SIZE}, (_, k) => columns[k % SIZE][k / SIZE | 0]);
  const ink = small.reduce((a, b) => Math.max(a, b));
  return small.map(value => Math.min(1, Math.max(0, value / ink)));
}
