'use strict';
// The page: boxes to draw in, an answer after each stroke. Drawings live in this page's memory alone.

const find = name => document.querySelector(name);
const SIDE = 200, LETTERS = 'ABCDEFGHIJ', MOST = 5, KIND = 'few-shot classes', classes = [];

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function labelled(element, label) {
  element.setAttribute('aria-label', label);
  return element;
}

const button = (text, label, onclick) => labelled(make('button', {type: 'button', textContent: text, onclick}), label);

function chooser(text, label, accept, take) {  // a button that opens a file
  const input = make('input', {type: 'file', accept, onchange: () => {
    const [file] = input.files;
    input.value = '';
    if (file) take(file);
  }});
  return make('label', {textContent: text}, labelled(input, label));
}

// What is drawn on a canvas, read once: {seen: [SIZE * SIZE] or null without strokes, features, url}.
function read(canvas) {
  const {data} = canvas.getContext('2d').getImageData(0, 0, SIDE, SIDE);
  const grey = Float64Array.from({length: SIDE * SIDE}, (_, i) => (data[4 * i] + data[4 * i + 1] + data[4 * i + 2]) / 3);
  const seen = prepare(grey, SIDE, SIDE);
  return {seen, features: seen && embed(seen), url: canvas.toDataURL('image/png')};
}

function pad(label, changed) {
  const canvas = make('canvas', {width: SIDE, height: SIDE, tabIndex: 0}), pen = canvas.getContext('2d', {willReadFrequently: true});
  const mark = make('div', {className: 'pen'}), history = [];  // pictures before each stroke
  const self = {empty: true, now: null, at: [SIDE / 2, SIDE / 2], down: false};
  canvas.setAttribute('role', 'img');
  labelled(canvas, `box to draw in, ${label}; arrows move the pen, space puts it down or lifts it`);
  const wipe = () => { pen.fillStyle = '#fff'; pen.fillRect(0, 0, SIDE, SIDE); self.empty = true; };
  const remember = () => { history.push([self.empty, pen.getImageData(0, 0, SIDE, SIDE)]); if (history.length > 40) history.shift(); };
  const done = () => { self.now = null; undo.disabled = !history.length; changed(); };
  const line = (from, to) => {
    Object.assign(pen, {lineWidth: 7, lineCap: 'round', lineJoin: 'round', strokeStyle: '#000'});
    pen.beginPath(); pen.moveTo(...from); pen.lineTo(...to); pen.stroke();
    self.empty = false;
  };
  const show = () => {
    [mark.style.left, mark.style.top] = self.at.map(x => 100 * x / SIDE + '%');
    mark.classList.toggle('down', self.down);
  };
  self.read = () => self.empty ? null : self.now ??= read(canvas);
  self.clear = (quiet = false) => { if (!self.empty) remember(); wipe(); self.down = false; show(); if (!quiet) done(); };
  self.forget = () => { history.length = 0; self.clear(true); history.length = 0; undo.disabled = true; };
  self.put = image => {  // a picture as large as fits
    const scale = SIDE / Math.max(image.width, image.height), w = image.width * scale, h = image.height * scale;
    remember(); wipe();
    pen.imageSmoothingQuality = 'high';
    pen.drawImage(image, (SIDE - w) / 2, (SIDE - h) / 2, w, h);
    self.empty = false;
    done();
  };
  self.undo = () => {
    if (!history.length) return;
    const [empty, image] = history.pop();
    pen.putImageData(image, 0, 0);
    self.empty = empty;
    done();
  };
  let last = null;
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * SIDE / box.width, (event.clientY - box.top) * SIDE / box.height];
  };
  canvas.onpointerdown = event => {
    if (event.button) return;
    event.preventDefault();
    canvas.focus({preventScroll: true, focusVisible: false});
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    line(last, last);
  };
  canvas.onpointermove = event => {
    if (!last) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) { const to = place(each); line(last, to); last = to; }
  };
  canvas.onpointerup = canvas.onpointercancel = () => { if (last) { last = null; done(); } };
  canvas.onkeydown = event => {
    const step = {ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, -5], ArrowDown: [0, 5]}[event.key];
    if (step) {
      const to = self.at.map((x, i) => Math.min(SIDE - 4, Math.max(4, x + step[i])));
      if (self.down) line(self.at, to);
      self.at = to;
    } else if (event.key === ' ') {
      self.down = !self.down;
      if (self.down) { remember(); line(self.at, self.at); } else done();
    } else if (event.key.toLowerCase() === 'z') self.undo();
    else if (event.key === 'Delete' || event.key === 'Backspace') self.clear();
    else return;
    event.preventDefault();
    show();
  };
  canvas.onblur = () => { if (self.down) { self.down = false; show(); done(); } };
  const undo = button('undo', 'undo in ' + label, self.undo);
  const file = chooser('picture', 'picture for ' + label, 'image/*', async chosen => {
    try {
      self.put(await createImageBitmap(chosen, {imageOrientation: 'from-image'}));
    } catch { say(`This browser cannot read ${chosen.name} as a picture; choose a .png or .jpg file.`); }
  });
  self.tools = make('div', {className: 'tools'}, undo, button('clear', 'clear ' + label, () => self.clear()), file);
  self.element = make('div', {className: 'pad'}, make('div', {className: 'board'}, canvas, mark), self.tools);
  wipe();
  show();
  undo.disabled = true;
  return self;
}

function addClass(name) {
  const letter = LETTERS[classes.length], self = pad('class ' + letter, () => { list(); ask(); });
  self.kept = [];  // further examples, as `read` gives them
  self.name = labelled(make('input', {type: 'text', value: name ?? letter, maxLength: 20, onchange: ask, spellcheck: false}),
    'name of class ' + letter);
  const thumbs = make('div', {className: 'thumbs'});
  const more = button('+ example', 'another example of class ' + letter, () => {
    self.kept.push(self.read());
    self.forget();
    list(); ask();
  });
  const list = self.list = () => {
    more.disabled = !self.read()?.seen || self.kept.length >= MOST - 1;
    thumbs.replaceChildren(...self.kept.map((each, i) => {
      const remove = button('', `remove example ${i + 1} of class ${letter}`, () => { self.kept.splice(i, 1); list(); ask(); });
      remove.append(make('img', {src: each.url, alt: ''}));
      return remove;
    }));
  };
  self.tools.append(more);
  self.element.prepend(self.name);
  self.element.append(thumbs);
  self.examples = () => [...self.kept, self.read()].filter(each => each?.seen);
  classes.push(self);
  find('.examples').append(self.element);
  find('.add').disabled = classes.length === LETTERS.length;
  list();
  return self;
}

function say(message) {
  find('.message').textContent = message;
  find('.verdict').replaceChildren();
  find('.bars').replaceChildren();
  find('.plane').hidden = true;
}

const query = pad('your drawing', ask);

function ask() {
  const known = classes.filter(each => each.examples().length), drawn = query.read();
  const blank = classes.find(each => each.read() && !each.read().seen);
  if (blank) return say(`No strokes found in the box of ${blank.name.value}; draw them, or take another picture.`);
  if (known.length < 2) return say('Draw at least two classes.');
  if (!drawn) return say('Now draw one of them again, in the large box.');
  if (!drawn.seen) return say('No strokes found in the large box; draw them, or take another picture.');
  const examples = known.map(each => each.examples());
  const found = compare(examples.map(own => own.map(each => each.features)), drawn.features);
  answer(known.map(each => each.name.value), found, [...examples.map(own => own[0].url), drawn.url]);
}

function answer(names, {probabilities, unknown, plane}, urls) {
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]), best = order[0];
  const percent = p => (p > 0.995 ? '> 99' : p < 0.005 ? '< 1' : Math.round(100 * p)) + ' %';
  find('.message').textContent = '';
  find('.verdict').replaceChildren(unknown ? 'None of these' : names[best], make('small', {textContent: unknown
    ? 'It is like no example. If it had to be one of them:' : percent(probabilities[best]) + ' among these classes'}));
  find('.bars').replaceChildren(...order.map(i => {
    const filled = make('span', {className: unknown ? 'none' : ''});
    filled.style.width = 100 * probabilities[i] + '%';
    return make('div', {className: 'bar'}, make('b', {textContent: names[i]}), make('i', {}, filled),
      make('em', {textContent: percent(probabilities[i])}));
  }));
  draw(plane, urls, [...names, ''], unknown ? -1 : best);
}

function draw(plane, urls, names, best) {
  const svg = find('svg'), W = 320, H = 260, size = 40, last = plane.length - 1;
  const part = (tag, values, text = '') => {
    const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
    for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
    made.textContent = text;
    return made;
  };
  const xs = plane.map(p => p[0]), ys = plane.map(p => p[1]), middle = v => (Math.min(...v) + Math.max(...v)) / 2;
  const span = Math.max((Math.max(...xs) - Math.min(...xs)) / (W - 66), (Math.max(...ys) - Math.min(...ys)) / (H - 84));
  const scale = 1 / Math.max(span, 1e-9);  // one for both: distances are those of the plane
  const spots = plane.map(([x, y]) => [W / 2 + (x - middle(xs)) * scale, H / 2 + (y - middle(ys)) * scale]);
  svg.replaceChildren(part('rect', {x: 0.75, y: 0.75, width: W - 1.5, height: H - 1.5, rx: 8, fill: 'none',
    stroke: 'var(--faint)', 'stroke-width': 1.5}));
  if (best >= 0) svg.append(part('line', {x1: spots[best][0], y1: spots[best][1], x2: spots[last][0], y2: spots[last][1],
    stroke: 'var(--accent)', 'stroke-width': 2}));
  spots.forEach(([x, y], i) => svg.append(
    part('image', {href: urls[i], x: x - size / 2, y: y - size / 2, width: size, height: size}),
    part('rect', {x: x - size / 2, y: y - size / 2, width: size, height: size, rx: 4, fill: 'none',
      stroke: i === last ? 'var(--accent)' : 'var(--line)', 'stroke-width': i === last ? 2.5 : 1})));
  const away = i => spots[last][1] > spots[i][1] ? -size / 2 - 5 : size / 2 + 13;  // not under your drawing
  names.forEach((name, i) => svg.append(part('text', {x: spots[i][0], y: spots[i][1] + away(i), 'text-anchor': 'middle',
    'font-size': 12, fill: 'var(--text)', stroke: 'var(--paper)', 'stroke-width': 3, 'paint-order': 'stroke'},
    name.length > 12 ? name.slice(0, 11) + '…' : name)));
  find('.plane').hidden = false;
}

// --------------------------------------------------------------------------------- classes as a file

function save() {
  const content = {kind: KIND, classes: classes.filter(each => each.examples().length).map(each =>
    ({name: each.name.value, examples: each.examples().map(example => example.url)}))};
  if (!content.classes.length) return say('Draw at least two classes.');
  const address = URL.createObjectURL(new Blob([JSON.stringify(content)], {type: 'application/json'}));
  make('a', {href: address, download: 'classes.json'}).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function picture(url) {
  return new Promise((resolve, reject) => {
    if (typeof url !== 'string' || !url.startsWith('data:image/png;base64,') || url.length > 1e6) return reject();
    const image = new Image();
    [image.onload, image.onerror] = [() => resolve(image), reject];
    image.src = url;
  });
}

async function load(file) {
  try {
    const content = JSON.parse(await file.text()), found = content.classes;
    const sound = content.kind === KIND && found.length >= 1 && found.length <= LETTERS.length
      && found.every(each => typeof each.name === 'string' && each.examples.length >= 1 && each.examples.length <= MOST);
    if (!sound) throw new Error();
    const pictures = await Promise.all(found.map(each => Promise.all(each.examples.map(picture))));
    start(Math.max(2, found.length));
    found.forEach((each, i) => {
      classes[i].name.value = each.name.slice(0, 20);
      pictures[i].forEach((image, j) => {
        classes[i].put(image);
        if (j === pictures[i].length - 1) return;
        classes[i].kept.push(classes[i].read());
        classes[i].forget();
      });
      classes[i].list();
    });
    ask();
  } catch { say(`${file.name} is not a file of "save classes"; choose another.`); }
}

function start(count) {
  classes.length = 0;
  find('.examples').replaceChildren();
  for (let i = 0; i < count; i++) addClass();
  query.forget();
  ask();
}

find('.query').append(query.element);
find('.add').onclick = () => addClass();
find('.save').onclick = save;
find('.load').onchange = event => { const [file] = event.target.files; event.target.value = ''; if (file) load(file); };
find('.over').onclick = () => start(3);
start(3);
