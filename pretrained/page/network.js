'use strict';
// The network and the comparison, as predict.py computes them; NETWORK is written in by the export.
// An image is a flat array of rows; features and logits are numbers in double precision.

const BYTES = Uint8Array.from(atob(NETWORK.weights), c => c.charCodeAt(0));
const FLOATS = new Float32Array(BYTES.buffer);  // of each block [out, in, 3, 3] kernels, then [out] biases: little endian
const SIZE = NETWORK.size;

// One block of Conv4 over [C, side, side]: convolution 3x3 with bias (batch norm is folded in), 2x2 max, ReLU.
// Rows stay two pixels wider than the image, so that one loop runs over all of it; its last two columns are not used.
function block(input, C, side, kernels, biases) {
  const out = biases.length, half = side >> 1, wide = side + 2, plane = wide * (wide + 1), n = side * wide;
  const padded = new Float64Array(C * plane), result = new Float64Array(out * half * half), sums = new Float64Array(n);
  for (let c = 0; c < C; c++) for (let y = 0; y < side; y++)
    padded.set(input.subarray((c * side + y) * side, (c * side + y + 1) * side), c * plane + (y + 1) * wide + 1);
  for (let o = 0; o < out; o++) {
    sums.fill(biases[o]);
    for (let c = 0; c < C; c++) for (let row = 0; row < 3; row++) {
      const k = ((o * C + c) * 3 + row) * 3, [a, b, d] = [kernels[k], kernels[k + 1], kernels[k + 2]];
      for (let i = 0, at = c * plane + row * wide; i < n; i++, at++)
        sums[i] += a * padded[at] + b * padded[at + 1] + d * padded[at + 2];
    }
    for (let y = 0; y < half; y++) for (let x = 0; x < half; x++) {
      const at = 2 * (y * wide + x);
      result[(o * half + y) * half + x] = Math.max(0, sums[at], sums[at + 1], sums[at + wide], sums[at + wide + 1]);
    }
  }
  return result;
}

// Features [D] of a prepared picture [SIZE * SIZE], shrunk so that squared distances are divided by sqrt(D).
function embed(picture) {
  let x = Float64Array.from(picture), C = 1, side = SIZE, at = 0;
  for (let i = 0; i < 4; i++) {
    const kernels = FLOATS.subarray(at, at += NETWORK.width * C * 9), biases = FLOATS.subarray(at, at += NETWORK.width);
    x = block(x, C, side, kernels, biases);
    [C, side] = [NETWORK.width, side >> 1];
  }
  return x.map(value => value / x.length ** 0.25);
}

const sum = values => values.reduce((a, b) => a + b, 0);
const distance = (a, b) => a.reduce((total, value, i) => total + (value - b[i]) ** 2, 0);

// examples: for each class the features of its pictures; query: features. The answer of predict.py: probabilities,
// whether it is none of these, and the places of prototypes and query in their two principal components.
function compare(examples, query) {
  const centres = examples.map(own => own[0].map((_, d) => sum(own.map(f => f[d])) / own.length));
  const logits = centres.map(c => -distance(query, c)), most = Math.max(...logits), best = logits.indexOf(most);
  const shares = logits.map(l => Math.exp(l - most)), strange = -most / (1 + 1 / examples[best].length);
  return {logits, probabilities: shares.map(s => s / sum(shares)), unknown: strange > NETWORK.threshold,
    plane: principal([...centres, query])};
}

// The points [n, D] in their two principal components, by Jacobi's rotations of their centred products [n, n].
function principal(points) {
  const n = points.length, mean = points[0].map((_, d) => sum(points.map(p => p[d])) / n);
  const centred = points.map(p => p.map((value, d) => value - mean[d]));
  const A = centred.map(p => centred.map(q => sum(p.map((value, d) => value * q[d]))));
  const V = A.map((_, i) => A.map((_, j) => +(i === j)));
  for (let sweep = 0; sweep < 30; sweep++) for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) {
    if (Math.abs(A[p][q]) < 1e-300) continue;
    const theta = (A[q][q] - A[p][p]) / (2 * A[p][q]);
    const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.hypot(theta, 1)), c = 1 / Math.hypot(t, 1), s = t * c;
    for (let k = 0; k < n; k++) [A[k][p], A[k][q]] = [c * A[k][p] - s * A[k][q], s * A[k][p] + c * A[k][q]];
    for (let k = 0; k < n; k++) [A[p][k], A[q][k]] = [c * A[p][k] - s * A[q][k], s * A[p][k] + c * A[q][k]];
    for (let k = 0; k < n; k++) [V[k][p], V[k][q]] = [c * V[k][p] - s * V[k][q], s * V[k][p] + c * V[k][q]];
  }
  const order = A.map((_, i) => i).sort((i, j) => A[j][j] - A[i][i]);
  return V.map(row => [0, 1].map(i => row[order[i]] * Math.sqrt(Math.max(0, A[order[i]][order[i]]))));
}
