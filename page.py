"""The page to draw on (`python predict.py --page`): a board of boxes in the browser, an answer after each stroke.

It knows nothing of networks: `serve` is given a function that compares a drawing with examples. The page is one Gradio
component with a script of its own, because what is drawn should go to this computer's memory and nowhere else: Gradio's
own canvas writes every drawing to a file. Served at 127.0.0.1 alone; fonts, scripts and answers all come from there,
and a header forbids the browser to ask anybody else. Everything else: docs/predict.md.
"""

from __future__ import annotations

from fewshot.experiment import UserError
from fewshot.images.pictures import read_image

import base64
import binascii
import importlib.util
import os
import socket
import threading
from collections.abc import Callable

import numpy as np

MOST = 10  # classes on the board
LARGEST = 2_000_000  # characters of a picture as the browser sends it, and pixels in it
PNG = "data:image/png;base64,"
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'"

# ---------------------------------------------------------------------------------- the server


def picture_of(url: object, where: str) -> np.ndarray:
    """The uint8 picture [C, H, W] in a data URL from the browser; UserError for anything else."""
    if not isinstance(url, str) or not url.startswith(PNG) or len(url) > LARGEST:
        raise UserError(f"{where} is no picture that the page can read; draw it again")
    try:
        data = base64.b64decode(url[len(PNG) :], validate=True)
    except binascii.Error:
        raise UserError(f"{where} is no picture that the page can read; draw it again") from None
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))  # of PNG's first chunk
    if width * height > LARGEST:
        raise UserError(f"{where} has {width} x {height} pixels; use a smaller picture")
    return read_image(data, where)


def data_url(image: np.ndarray) -> str:
    """A prepared picture [H, W] in [0, 1], 1 is ink, as the browser shows it."""
    import imageio.v3 as iio

    return PNG + base64.b64encode(iio.imwrite("<bytes>", np.uint8(255 * (1 - image)), extension=".png")).decode()


def reply(board: object, compare: Callable) -> dict:
    """What the page shows for a board {"examples": [data URL or None, ...], "query": data URL or None}.

    {"classes": numbers of the boxes that are drawn, "probabilities", "unknown", "plane": [x, y] of the prototypes and
    the query, "seen": the pictures as the network sees them}, or {"error": one line}.
    """
    try:
        examples = board.get("examples") if isinstance(board, dict) else None
        if not isinstance(examples, list) or len(examples) > MOST:
            raise UserError("the page has sent no board; load it again")
        drawn = [i for i, example in enumerate(examples) if example]
        if len(drawn) < 2:
            raise UserError("Draw at least two classes.")
        if not board.get("query"):
            raise UserError("Now draw one of them again, in the large box.")
        pictures = [picture_of(examples[i], f"box {i + 1}") for i in drawn]
        found = compare(pictures, picture_of(board["query"], "the large box"))
    except UserError as error:
        return {"error": str(error)}
    seen = found.pop("seen")
    if blank := [i for i, image in zip([*drawn, None], seen, strict=True) if not image.any()]:
        where = "the large box" if blank[0] is None else f"box {blank[0] + 1}"
        return {"error": f"No strokes found in {where}; draw them, or take another picture."}
    return {"classes": drawn, **found, "seen": [data_url(image) for image in seen]}


def start(compare: Callable, port: int):
    """Serve the page; returns its address and a function that ends it."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Gradio asks its own page whether it is there. A proxy cannot answer that, and the page asks nobody else.
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        del os.environ[name]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError as error:
        is_there = importlib.util.find_spec("gradio")
        why = f"does not start here ({error})" if is_there else "is not installed"
        raise UserError(f"--page needs Gradio, which {why}: pip install -r requirements-page.txt") from None

    def answer(board):
        return reply(board, compare)

    with gr.Blocks(title="Which character is it?", analytics_enabled=False) as blocks:
        gr.HTML(html_template=BOARD, css_template=STYLE, js_on_load=SCRIPT, server_functions=[answer], most=MOST)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from Google
    if port == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, theme=theme,
            css=CONTAINER, footer_links=[], ssr_mode=False,
            app_kwargs={"middleware": [Middleware(OnlyHere)]},
        )  # fmt: skip
    except OSError:
        raise UserError(f"--port {port} is taken; use another, or 0 for any that is free") from None
    return address, blocks.close


class OnlyHere:
    """ASGI middleware: every answer tells the browser to ask no other address."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], (b"content-security-policy", POLICY.encode())]}
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(compare: Callable, port: int) -> None:
    """Serve the page until Ctrl-C.

    compare(examples, query), uint8 pictures [C, H, W], returns {"probabilities": [N], "unknown": bool,
    "plane": [N + 1, 2], "seen": [N + 1] float32 [H, W]}.
    """
    address, close = start(compare, port)
    print(f"draw at {address} (on this computer alone; Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("the page is closed")
    finally:
        close()


# ---------------------------------------------------------------------------------- the browser

BOARD = """
<main>
  <h1>Which character is it?</h1>
  <p class="lead">Draw one character in each box, then draw one of them again.</p>
  <section class="examples" aria-label="examples"></section>
  <button class="add" type="button">+ class</button>
  <section class="question">
    <div class="query"></div>
    <div class="answer" aria-live="polite">
      <p class="message">Draw at least two classes.</p>
      <p class="verdict"></p>
      <div class="bars"></div>
    </div>
    <figure class="plane" hidden>
      <svg viewBox="0 0 320 260" role="img" aria-label="the examples and your drawing in two dimensions"></svg>
      <figcaption>Near means alike to the network. The framed drawing is yours.</figcaption>
    </figure>
  </section>
  <p class="foot"><button class="over" type="button">Start over</button> Nothing leaves this computer or is stored.</p>
</main>
"""

# Gradio's own frame: white also where the system prefers dark windows, and with narrow margins for phones.
CONTAINER = """
body, .gradio-container { background: #fff !important; }
.gradio-container .fillable { padding: 12px !important; }
"""

STYLE = """
main { max-width: 860px; margin: 0 auto; padding: 4px 0 20px; font: 16px/1.4 system-ui, sans-serif; color: #1d2733; }
h1 { font-size: 26px; font-weight: 650; margin: 4px 0 0; color: #1d2733; }
.lead { margin: 2px 0 14px; color: #55606c; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); gap: 12px; max-width: 720px; }
.pad { display: flex; flex-direction: column; gap: 4px; }
canvas { width: 100%; aspect-ratio: 1; background: #fff; border: 1.5px solid #b8c1cb; border-radius: 8px;
  touch-action: none; cursor: crosshair; display: block; box-sizing: border-box; }
.pad input[type=text] { width: 100%; box-sizing: border-box; border: none; background: none; padding: 0 2px;
  font: 600 15px system-ui, sans-serif; color: #1d2733; text-align: center; }
.pad input[type=text]:focus { outline: 2px solid #0072B2; border-radius: 4px; }
.tools { display: flex; justify-content: space-between; }
.tools button, .tools label { font-size: 13px; font-weight: 400; color: #55606c; background: none; border: none;
  padding: 4px 2px; cursor: pointer; text-decoration: underline; text-underline-offset: 2px; }
.tools button:hover, .tools label:hover { color: #0072B2; }
.tools input { position: absolute; width: 1px; height: 1px; opacity: 0; }
.tools label:focus-within { outline: 2px solid #0072B2; border-radius: 4px; }
.add { margin-top: 10px; }
.question { display: grid; grid-template-columns: 230px minmax(150px, 1fr) minmax(200px, 300px); gap: 20px;
  margin-top: 22px; padding-top: 20px; border-top: 1px solid #dde2e7; align-items: start; }
.query canvas { border: 2px solid #0072B2; }
.message { margin: 0; color: #55606c; }
.message:empty, .verdict:empty { display: none; }
.verdict { margin: 0 0 10px; font-size: 24px; font-weight: 650; color: #1d2733; overflow-wrap: anywhere; }
.verdict small { display: block; font-size: 14px; font-weight: 400; color: #55606c; }
.bar { display: grid; grid-template-columns: minmax(28px, auto) 1fr 50px; gap: 8px; align-items: center;
  margin: 5px 0; font-size: 14px; }
.bar b { font-weight: 600; color: #1d2733; max-width: 90px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.bar i { display: block; height: 10px; border-radius: 5px; background: #e8ecf0; overflow: hidden; }
.bar i span { display: block; height: 100%; background: #0072B2; border-radius: 5px; }
.bar em { font-style: normal; text-align: right; white-space: nowrap; color: #55606c;
  font-variant-numeric: tabular-nums; }
figure { margin: 0; }
svg { width: 100%; display: block; }
figcaption { font-size: 13px; color: #55606c; }
.foot { margin: 22px 0 0; font-size: 14px; color: #55606c; }
.add, .over { font-size: 14px; font-weight: 400; padding: 5px 12px; border: 1.5px solid #b8c1cb; border-radius: 8px;
  background: #fff; color: #1d2733; cursor: pointer; }
.over { margin-right: 10px; }
.add:hover, .over:hover { border-color: #0072B2; color: #0072B2; }
@media (max-width: 800px) {
  .question { grid-template-columns: minmax(0, 1fr); gap: 16px; }
  .query { max-width: 230px; }
  .plane { max-width: 400px; }
}
"""

SCRIPT = """
const find = name => element.querySelector(name);
const SIDE = 200, LETTERS = 'ABCDEFGHIJ', pads = [];
let asked = 0;

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(message) {
  find('.message').textContent = message;
  find('.verdict').replaceChildren();
  find('.bars').replaceChildren();
  find('.plane').hidden = true;
}

function pad(label) {
  const canvas = make('canvas', {width: SIDE, height: SIDE});
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', 'box to draw in, ' + label);
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  const self = {canvas, empty: true, clear, picture: () => self.empty ? null : canvas.toDataURL('image/png')};
  let last = null;
  function clear() {
    pen.fillStyle = '#fff';
    pen.fillRect(0, 0, SIDE, SIDE);
    self.empty = true;
  }
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * SIDE / box.width, (event.clientY - box.top) * SIDE / box.height];
  };
  const line = (from, to) => {
    pen.lineWidth = 7; pen.lineCap = pen.lineJoin = 'round'; pen.strokeStyle = '#000';
    pen.beginPath(); pen.moveTo(...from); pen.lineTo(...to); pen.stroke();
    self.empty = false;
  };
  canvas.onpointerdown = event => {
    if (event.button) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    line(last, last);
  };
  canvas.onpointermove = event => {
    if (!last) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) { const to = place(each); line(last, to); last = to; }
  };
  canvas.onpointerup = canvas.onpointercancel = () => { if (last) { last = null; ask(); } };
  const file = make('input', {type: 'file', accept: 'image/*', onchange: async () => {
    const chosen = file.files[0];
    file.value = '';
    if (!chosen) return;
    try {
      const image = await createImageBitmap(chosen, {imageOrientation: 'from-image'});
      const scale = SIDE / Math.max(image.width, image.height), w = image.width * scale, h = image.height * scale;
      clear();
      pen.imageSmoothingQuality = 'high';
      pen.drawImage(image, (SIDE - w) / 2, (SIDE - h) / 2, w, h);
      self.empty = false;
      ask();
    } catch { asked++; say('This browser cannot read ' + chosen.name + ' as a picture; choose a .png or .jpg file.'); }
  }});
  file.setAttribute('aria-label', 'picture for ' + label);
  const tools = make('div', {className: 'tools'},
    make('button', {type: 'button', textContent: 'clear', onclick: () => { clear(); ask(); }}),
    make('label', {textContent: 'picture'}, file));
  clear();
  return [self, make('div', {className: 'pad'}, canvas, tools)];
}

function add() {
  const letter = LETTERS[pads.length], [self, box] = pad(letter);
  self.name = make('input', {type: 'text', value: letter, maxLength: 20, onchange: ask, spellcheck: false});
  self.name.setAttribute('aria-label', 'name of class ' + letter);
  box.prepend(self.name);
  pads.push(self);
  find('.examples').append(box);
  find('.add').hidden = pads.length === props.most;
}

find('.add').onclick = add;
for (let i = 0; i < 3; i++) add();
const [query, queryBox] = pad('your drawing');
find('.query').append(queryBox);
find('.over').onclick = () => { for (const each of [...pads, query]) each.clear(); ask(); };

async function ask() {
  const mine = ++asked;
  let found;
  try {
    found = await server.answer({examples: pads.map(each => each.picture()), query: query.picture()});
  } catch { found = {error: 'No answer; is predict.py still running?'}; }
  if (mine !== asked) return;  // a later stroke has asked again
  if (found.error) say(found.error); else show(found);
}

function show({classes, probabilities, unknown, plane, seen}) {
  const names = classes.map(i => pads[i].name.value || LETTERS[i]);
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]), best = order[0];
  const percent = p => (p > 0.995 ? '> 99' : p < 0.005 ? '< 1' : Math.round(100 * p)) + ' %';
  find('.message').textContent = '';
  find('.verdict').replaceChildren(unknown ? 'None of these' : names[best],
    make('small', {textContent: unknown ? 'It is like no example. If it had to be one of them:'
      : percent(probabilities[best]) + ' among these classes'}));
  find('.bars').replaceChildren(...order.map(i => {
    const filled = make('span');
    filled.style.width = 100 * probabilities[i] + '%';
    if (unknown) filled.style.background = '#9aa5b1';
    return make('div', {className: 'bar'}, make('b', {textContent: names[i]}), make('i', {}, filled),
      make('em', {textContent: percent(probabilities[i])}));
  }));
  draw(plane, seen, [...names, ''], unknown ? -1 : best);
}

function draw(plane, seen, names, best) {
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
  svg.replaceChildren(part('rect', {x: 0.75, y: 0.75, width: W - 1.5, height: H - 1.5, rx: 8, fill: '#fff',
    stroke: '#dde2e7', 'stroke-width': 1.5}));
  if (best >= 0) svg.append(part('line', {x1: spots[best][0], y1: spots[best][1], x2: spots[last][0],
    y2: spots[last][1], stroke: '#0072B2', 'stroke-width': 2}));
  spots.forEach(([x, y], i) => {
    svg.append(part('image', {href: seen[i], x: x - size / 2, y: y - size / 2, width: size, height: size}),
      part('rect', {x: x - size / 2, y: y - size / 2, width: size, height: size, rx: 4, fill: 'none',
        stroke: i === last ? '#0072B2' : '#b8c1cb', 'stroke-width': i === last ? 2.5 : 1}));
  });
  const away = i => spots[last][1] > spots[i][1] ? -size / 2 - 5 : size / 2 + 13;  // not under your drawing
  names.forEach((name, i) => svg.append(part('text', {x: spots[i][0], y: spots[i][1] + away(i), 'text-anchor': 'middle',
    'font-size': 12, fill: '#1d2733', stroke: '#fff', 'stroke-width': 3, 'paint-order': 'stroke'},
    name.length > 12 ? name.slice(0, 11) + '…' : name)));
  find('.plane').hidden = false;
}
"""
