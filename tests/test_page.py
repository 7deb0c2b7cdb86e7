"""The page to draw on, one static file: its arithmetic against PyTorch's; strokes, keys and fingers in a real browser.

The browser's tests need `pip install playwright` and chromium; without them they are skipped. RECORD=1 pytest -n 0
-m "not slow" tests/test_page.py writes results/page.json and results/predict/page.png.
"""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.images.drawings import prepare_drawing
from fewshot.images.pictures import resize
from fewshot.tasks.splits import load_dataset

import base64
import json
import math
import os
import shutil
import statistics
from argparse import Namespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import REPO, one_line_error

import predict
from bench import export

COMMAND = 'RECORD=1 pytest -n 0 -m "not slow" tests/test_page.py'
recorded = {}

# Invented strokes in a unit square, x to the right and y down.
SIGMA = [[(0.8, 0.2), (0.2, 0.2), (0.55, 0.5), (0.2, 0.8), (0.8, 0.8)]]
PHI = [
    [(0.5 + 0.3 * math.cos(a / 14 * math.pi), 0.5 + 0.25 * math.sin(a / 14 * math.pi)) for a in range(29)],
    [(0.5, 0.1), (0.5, 0.9)],
]
CHAIR = [[(0.25, 0.15), (0.25, 0.85)], [(0.25, 0.5), (0.7, 0.5), (0.7, 0.85)]]
SPIRAL = [[(0.5 + a / 100 * math.cos(a / 3), 0.5 + a / 100 * math.sin(a / 3)) for a in range(36)]]
COMB = [[(0.15, 0.75), (0.85, 0.75)], *[[(x, 0.75), (x, 0.25)] for x in (0.15, 0.38, 0.62, 0.85)]]
SHAPES = [SIGMA, PHI, CHAIR]
SIDE = 200  # of a canvas


def by_another_hand(shape, amount=0.04):
    """The strokes drawn by somebody else: bent a little, in another size."""
    return [
        [(0.05 + 0.88 * x + amount * math.sin(4 * y), 0.08 + 0.82 * y + amount * math.cos(5 * x)) for x, y in s]
        for s in shape
    ]


def picture(shape, side=SIDE):
    """A drawing as a uint8 picture [side, side], ink on white paper."""
    image = np.full((side, side), 255, np.uint8)
    ys, xs = np.mgrid[:side, :side]
    for stroke in shape:
        for (x0, y0), (x1, y1) in zip(stroke, stroke[1:], strict=False):
            for t in np.linspace(0, 1, 60):
                at = side * np.array([x0 + t * (x1 - x0), y0 + t * (y1 - y0)])
                image[(xs - at[0]) ** 2 + (ys - at[1]) ** 2 < 12] = 0
    return image


def png(image):
    return iio.imwrite("<bytes>", image, extension=".png")


def url(image):
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


@pytest.fixture(scope="module")
def network():
    return predict.load_network(Namespace(checkpoint=None, device="cpu", dtype="float32"))


# --------------------------------------------------------------------------- without a browser


def test_the_committed_page_is_built_from_the_committed_network(network, tmp_path):
    """Byte for byte: whoever changes the network, the script or the style builds the page again."""
    predict.main(["--export_page", str(tmp_path / "page.html")])
    built, committed = (tmp_path / "page.html").read_bytes(), (REPO / "pretrained" / "page.html").read_bytes()
    assert built == committed, "build it again: python predict.py --export_page pretrained/page.html"
    assert len(built) <= 900_000


def test_folding_batch_norm_into_the_convolution_changes_nothing():
    torch.manual_seed(0)
    encoder = predict.make_encoder(Namespace(encoder="conv4", width=5, image_size=28), 1).double()
    for i in range(4):
        for name in (f"gamma{i}", f"var{i}"):
            getattr(encoder, name).data.uniform_(0.5, 2)
        for name in (f"beta{i}", f"mean{i}"):
            getattr(encoder, name).data.normal_()
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    x, at, numbers = images, 0, torch.from_numpy(export.folded(encoder.state_dict()).astype(np.float64))
    for i in range(4):
        n = encoder.get_parameter(f"weight{i}").numel()
        kernels, biases = numbers[at : at + n].view(5, -1, 3, 3), numbers[at + n : at + n + 5]
        x, at = torch.relu(torch.nn.functional.max_pool2d(torch.conv2d(x, kernels, biases, padding=1), 2)), at + n + 5
    assert at == len(numbers)
    assert torch.allclose(x.flatten(1), encoder(images), atol=1e-5)  # the page holds float32 numbers


def test_the_policy_names_the_only_script_and_style(network):
    text = (REPO / "pretrained" / "page.html").read_text()
    policy = text.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert (
        policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy and "http" not in policy
    )
    assert "src=" not in text.split("<script>")[0] and "@import" not in text and "url(" not in text


@pytest.mark.parametrize(
    "flags, words",
    [
        (["somewhere", "--export_page", "x.html"], "DIR"),
        (["--export_page", "nowhere/x.html"], "folder"),
        (["--export_page", "x.html", "--page"], "--page"),
        (["--export_page", "x.html", "--unknown"], "--unknown"),
    ],
)
def test_flags_that_do_not_go_with_the_page(run_script, flags, words):
    one_line_error(run_script("predict.py", *flags), words)


def test_a_network_of_another_kind_gets_a_line(work, tmp_path):
    import protonet

    flags = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--encoder", "vit", "--log_dir", str(tmp_path)]
    protonet.main([*flags, "--run_name", "vit", "--train_steps", "2", "--eval_freq", "2"])
    with pytest.raises(UserError, match="conv4"):
        predict.main(["--export_page", str(tmp_path / "x.html"), "--checkpoint", str(tmp_path / "vit")])
    assert not (tmp_path / "x.html").exists()


def test_the_onnx_file_computes_what_pytorch_computes(network, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    predict.main(["--export_onnx", str(tmp_path / "net.onnx")])
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    images, labels = torch.rand(7, 1, 28, 28), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    classes = predict.Classes(list("abc"), images, labels)
    for M in (1, 4):
        query = torch.rand(M, 1, 28, 28)
        one_hot = torch.nn.functional.one_hot(labels, 3).float()
        given = {"support": images.numpy(), "one_hot": one_hot.numpy(), "query": query.numpy()}
        logits, features = session.run(["logits", "features"], given)
        _, expected, distances = predict.compare(network, classes, query)
        assert np.abs(features - expected.numpy()).max() < 1e-4
        assert np.abs(logits + distances.numpy()).max() < 1e-3


def test_onnx_without_its_package_gets_a_line(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-onnx\.txt"):
        predict.main(["--export_onnx", str(tmp_path / "net.onnx")])


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("playwright")
    if not shutil.which("chromium"):
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        yield browser
        browser.close()


class Sheet:
    """The page, opened from its file, with every request of the browser and every complaint of its console."""

    def __init__(self, chromium, **options):
        context = chromium.new_context(**({"viewport": {"width": 1040, "height": 800}} | options))
        self.page, self.asked, self.complaints = context.new_page(), [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.address = (REPO / "pretrained" / "page.html").as_uri()
        self.page.goto(self.address)

    @property
    def query(self):
        return self.page.locator(".query canvas")

    def box(self, number):
        return self.page.locator(".examples canvas").nth(number)

    def draw(self, canvas, shape):
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        for stroke in shape:
            points = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in stroke]
            self.page.mouse.move(*points[0])
            self.page.mouse.down()
            for point in points[1:]:
                self.page.mouse.move(*point)
            self.page.mouse.up()

    def text(self, name):
        return self.page.locator("." + name).inner_text()

    def says(self, words):
        """Wait until the page says so: pictures are read in the background."""
        wanted = "words => document.querySelector('.answer').textContent.includes(words)"
        self.page.wait_for_function(wanted, arg=words, timeout=30_000)

    def first(self):
        """The likeliest class."""
        return self.page.locator(".bar b").first.inner_text()

    def close(self):
        assert not self.complaints, self.complaints
        assert self.asked == [self.address], "the page has asked somebody"
        self.page.context.close()


@pytest.fixture
def sheet(chromium):
    sheet = Sheet(chromium)
    yield sheet
    sheet.close()


# Embeds pictures of a canvas's size, each read as a box of the page is, and keeps the features.
READ = """async urls => {
  const canvas = document.createElement('canvas'), out = [];
  [canvas.width, canvas.height] = [200, 200];
  for (const url of urls) {
    canvas.getContext('2d', {willReadFrequently: true}).drawImage(await picture(url), 0, 0);
    const {seen, features} = read(canvas);
    (window.known ??= []).push(features);
    out.push([...seen]);
  }
  return out;
}"""
ASK = """tasks => tasks.map(([support, query]) => {
  const found = compare(support.map(own => own.map(i => window.known[i])), window.known[query]);
  return [found.logits, found.unknown];
})"""


@pytest.mark.thorough
def test_the_arithmetic_of_600_tasks_is_pytorchs(sheet, network):
    """Drawings of test classes on the canvas, five known and five unknown classes of one shot: logits, "none of these"
    and the prepared pictures. A full set where Omniglot is at hand, else 60 tasks of glyphs."""
    real = bool(os.environ.get("OMNIGLOT_DIR"))
    data = load_dataset("omniglot" if real else "glyphs", image_size=105 if real else 28)
    num_tasks, rng = 600 if real else 60, np.random.default_rng(7)
    pool = rng.choice(data.splits["test"], 60, replace=False)  # of which tasks are made
    numbers = {(c, d): i for i, (c, d) in enumerate((c, d) for c in pool for d in range(12))}
    images = [255 - resize(data.images[[data.starts[c] + d]], SIDE)[0, 0] for c, d in numbers]
    seen = []
    for at in range(0, len(images), 60):
        seen += sheet.page.evaluate(READ, [url(image) for image in images[at : at + 60]])
    mine = torch.stack([prepare_drawing(torch.from_numpy(image[None]), "auto", 28) for image in images])
    prepared = torch.tensor(seen).view(-1, 1, 28, 28)
    assert (prepared - mine).abs().max() < 1 / 255
    tasks = []
    for _ in range(num_tasks):
        classes = rng.choice(pool, 10, replace=False)
        asked = classes[rng.integers(10)]  # as often unknown as known
        support = [[numbers[c, int(rng.integers(6))]] for c in classes[:5]]
        tasks.append((support, numbers[asked, 6 + int(rng.integers(6))]))
    answers, right, known = sheet.page.evaluate(ASK, tasks), 0, 0
    for (support, query), (logits, unknown) in zip(tasks, answers, strict=True):
        rows = [i for (i,) in support]
        classes = predict.Classes(["?"] * 5, prepared[rows].double().float(), torch.arange(5))
        _, _, distances = predict.compare(network, classes, prepared[[query]])
        assert (torch.tensor(logits) + distances[0]).abs().max() < 1e-4
        strange = float(predict.strangeness(distances, torch.ones(5))[0])
        assert unknown == (strange > network.threshold) or abs(strange - network.threshold) < 1e-4
        names = list(numbers)
        if names[query][0] in [names[i][0] for i in rows]:
            known, right = known + 1, right + (names[rows[int(np.argmax(logits))]][0] == names[query][0])
    assert right >= 0.9 * known and known > num_tasks / 4
    recorded.update(tasks=num_tasks, dataset=data.name, known=int(known), right=int(right))


def test_draw_classify_undo_clear(sheet):
    assert "at least two" in sheet.text("message")
    for number, shape in enumerate(SHAPES):
        sheet.draw(sheet.box(number), shape)
    assert "Now draw one" in sheet.text("message")
    for letter, shape in zip("ABC", SHAPES, strict=True):
        sheet.page.get_by_label("clear your drawing").click()
        assert "Now draw one" in sheet.text("message")
        sheet.draw(sheet.query, by_another_hand(shape))
        assert sheet.first() == letter and sheet.page.locator(".bar").count() == 3
        assert sheet.page.locator("svg image").count() == 4 and sheet.page.locator(".plane").is_visible()
    before = sheet.page.locator(".bars").inner_text()
    sheet.draw(sheet.query, [[(0.1, 0.1), (0.9, 0.9)]])
    assert sheet.page.locator(".bars").inner_text() != before
    sheet.page.get_by_label("undo in your drawing").click()
    assert sheet.page.locator(".bars").inner_text() == before
    sheet.page.get_by_label("name of class C").fill("chair")
    sheet.page.keyboard.press("Enter")
    assert "chair" in sheet.text("verdict")
    sheet.page.get_by_label("clear class B").click()  # a class less
    assert sheet.page.locator(".bar").count() == 2
    sheet.page.get_by_label("undo in class B").click()  # and there it is again
    assert sheet.page.locator(".bar").count() == 3
    sheet.page.get_by_text("start over").click()
    assert "at least two" in sheet.text("message")
    assert not sheet.page.locator(".plane").is_visible() and sheet.page.locator(".bar").count() == 0


def test_a_keyboard_draws(sheet):
    def key(label, *keys):
        sheet.page.get_by_label(f"box to draw in, {label}").focus()
        for each, times in keys:
            for _ in range(times):
                sheet.page.keyboard.press(each)

    key("class A", ("Space", 1), ("ArrowRight", 12), ("ArrowDown", 12), ("Space", 1))  # an angle
    key("class B", ("Space", 1), ("ArrowDown", 15), ("Space", 1))  # a line
    key("your drawing", ("Space", 1), ("ArrowRight", 11), ("ArrowDown", 13), ("Space", 1))
    assert sheet.first() == "A"
    key("your drawing", ("z", 1))
    assert "Now draw one" in sheet.text("message")
    key("your drawing", ("Space", 1), ("ArrowDown", 14), ("Space", 1))
    assert sheet.first() == "B"
    key("your drawing", ("Delete", 1))
    assert "Now draw one" in sheet.text("message")


def test_up_to_five_examples_and_ten_classes(sheet):
    for _ in range(7):
        sheet.page.get_by_text("+ class").click()
    assert sheet.page.locator(".examples canvas").count() == 10
    assert sheet.page.get_by_text("+ class").is_disabled()
    more = sheet.page.get_by_label("another example of class J")
    for amount in (0.0, 0.02, -0.02, 0.04):
        sheet.draw(sheet.box(9), by_another_hand(PHI, amount))
        more.click()
    sheet.draw(sheet.box(9), by_another_hand(PHI, 0.01))
    assert more.is_disabled() and sheet.page.get_by_label("remove example 4 of class J").count() == 1
    sheet.draw(sheet.box(5), SIGMA)
    sheet.draw(sheet.query, by_another_hand(PHI, -0.03))
    assert sheet.first() == "J" and sheet.page.locator(".bar").count() == 2
    before = sheet.page.locator(".plane").inner_html()
    sheet.page.get_by_label("remove example 1 of class J").click()
    assert sheet.page.locator(".plane").inner_html() != before


def test_none_of_these(sheet):
    for number, shape in enumerate(SHAPES):
        sheet.draw(sheet.box(number), shape)
    sheet.draw(sheet.query, COMB)
    assert "None of these" in sheet.text("verdict")


def test_classes_saved_and_loaded(sheet, tmp_path):
    for number, shape in enumerate(SHAPES):
        sheet.draw(sheet.box(number), shape)
    sheet.page.get_by_label("another example of class B").click()
    sheet.draw(sheet.box(1), by_another_hand(PHI, 0.02))
    sheet.page.get_by_label("name of class A").fill("<b>sigma</b>")
    sheet.draw(sheet.query, by_another_hand(PHI))
    before = sheet.page.locator(".bars").inner_text()
    with sheet.page.expect_download() as download:
        sheet.page.get_by_text("save classes").click()
    download.value.save_as(tmp_path / "classes.json")
    sheet.page.get_by_text("start over").click()
    sheet.page.locator("input.load").set_input_files(tmp_path / "classes.json")
    sheet.says("Now draw one")
    assert sheet.page.get_by_label("name of class A").input_value() == "<b>sigma</b>"  # a name is never markup
    sheet.draw(sheet.query, by_another_hand(PHI))
    assert sheet.page.locator(".bars").inner_text() == before
    saved = json.loads((tmp_path / "classes.json").read_text())
    strange = [
        b"nonsense",
        b"[]",
        json.dumps(saved | {"kind": "others"}).encode(),
        json.dumps(saved | {"classes": saved["classes"] * 5}).encode(),
        json.dumps(saved | {"classes": [{"name": "x", "examples": ["http://127.0.0.1:9/x.png"]}]}).encode(),
    ]
    for content in strange:
        file = {"name": "strange.json", "mimeType": "application/json", "buffer": content}
        sheet.page.locator("input.load").set_input_files(file)
        sheet.says("strange.json is not a file of")
        assert sheet.page.get_by_label("name of class A").input_value() == "<b>sigma</b>"  # what was there stays
        sheet.page.get_by_label("clear your drawing").click()


def test_wrong_pictures_get_a_line(sheet):
    upload = sheet.page.get_by_label("picture for class A").set_input_files
    upload({"name": "notes.png", "mimeType": "image/png", "buffer": b"not a picture"})
    sheet.says("cannot read notes.png")
    for number, shape in enumerate(SHAPES[:2]):
        sheet.draw(sheet.box(number), shape)
    ask = sheet.page.get_by_label("picture for your drawing").set_input_files
    ask({"name": "blank.png", "mimeType": "image/png", "buffer": png(np.full((60, 90), 255, np.uint8))})
    sheet.says("No strokes found in the large box")
    photo = np.stack([np.pad(picture(by_another_hand(PHI)), 40, constant_values=255) * 0.7] * 3, axis=-1)
    jpg = iio.imwrite("<bytes>", photo.astype(np.uint8), extension=".jpg")
    ask({"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": jpg})
    sheet.page.wait_for_function("document.querySelectorAll('.bar').length === 2")
    assert sheet.first() == "B"


def test_a_phone(chromium):
    """390 x 844: nothing is wider than the window, boxes are large enough for a finger, and fingers draw."""
    sheet = Sheet(chromium, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    touch = sheet.page.context.new_cdp_session(sheet.page)

    def finger(canvas, shape):
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        for stroke in shape:
            for n, (x, y) in enumerate(stroke):
                point = {"x": box["x"] + box["width"] * x, "y": box["y"] + box["height"] * y}
                kind = "touchMove" if n else "touchStart"
                touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
            touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    for number, shape in enumerate(SHAPES):
        assert sheet.box(number).bounding_box()["width"] >= 90
        finger(sheet.box(number), shape)
    scrolled = sheet.page.evaluate("window.scrollY")
    finger(sheet.query, by_another_hand(PHI))
    assert sheet.first() == "B" and sheet.page.locator(".bar").count() == 3
    assert sheet.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert sheet.page.evaluate("window.scrollY") >= scrolled  # a stroke does not scroll the page away
    sheet.close()


def test_every_control_has_a_name_for_a_screen_reader(sheet):
    unnamed = """() => [...document.querySelectorAll('button, input, canvas, svg')]
      .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')?.textContent.trim()))
      .map(e => e.outerHTML)"""
    assert sheet.page.evaluate(unnamed) == []
    assert sheet.page.evaluate("document.querySelector('.answer').getAttribute('aria-live')") == "polite"


@pytest.mark.thorough
@pytest.mark.skipif(not os.environ.get("OMNIGLOT_DIR"), reason="needs OMNIGLOT_DIR")
def test_fifty_real_drawings_as_predict_labels_them(sheet, network):
    """Five test characters of one example each, ten drawings each to label."""
    data, rng = load_dataset("omniglot", image_size=105), np.random.default_rng(5)
    chosen = rng.choice(data.splits["test"], 5, replace=False)
    drawers = [rng.permutation(20)[:11] for _ in chosen]
    rows = [data.starts[c] + d for c, of in zip(chosen, drawers, strict=True) for d in of]
    images = [255 - data.images[row, 0] for row in rows]
    seen = sheet.page.evaluate(READ.replace("[200, 200]", "[105, 105]").replace("read(canvas)", """(() => {
      const {data} = canvas.getContext('2d').getImageData(0, 0, 105, 105);
      const seen = prepare(Float64Array.from({length: 105 * 105}, (_, i) => data[4 * i]), 105, 105);
      return {seen, features: embed(seen)}; })()"""), [url(image) for image in images])  # fmt: skip
    assert len(seen) == 55
    support = [[11 * c] for c in range(5)]
    asked = [11 * c + i for c in range(5) for i in range(1, 11)]
    answers = sheet.page.evaluate(ASK, [(support, query) for query in asked])
    prepared = torch.stack([prepare_drawing(torch.from_numpy(image[None]), "auto", 28) for image in images])
    classes = predict.Classes(["?"] * 5, prepared[::11], torch.arange(5))
    _, _, distances = predict.compare(network, classes, prepared[asked])
    assert [int(np.argmax(logits)) for logits, _ in answers] == distances.argmin(dim=1).tolist()
    right = sum(int(np.argmax(logits)) == i // 10 for i, (logits, _) in enumerate(answers))
    assert right >= 45
    recorded.update(drawings=50, drawings_right=int(right))


@pytest.mark.thorough
def test_the_time_of_an_answer(sheet):
    """A stroke in the large box to the shown answer, five classes; RECORD=1 writes results/page.json."""
    for _ in range(2):
        sheet.page.get_by_text("+ class").click()
    for number, shape in enumerate([*SHAPES, SPIRAL, COMB]):
        sheet.draw(sheet.box(number), shape)
    sheet.draw(sheet.query, by_another_hand(PHI))
    took = """() => { query.now = null; const begin = performance.now(); ask(); return performance.now() - begin; }"""
    taken = [sheet.page.evaluate(took) for _ in range(30)][10:]
    assert sheet.first() == "B"
    recorded.update(median_ms=round(statistics.median(taken), 1), most_ms=round(max(taken), 1), classes=5)


@pytest.mark.thorough
def test_the_picture_of_the_page(chromium):
    """Four classes and an answer; RECORD=1 writes results/predict/page.png and results/page.json."""
    sheet = Sheet(chromium, viewport={"width": 900, "height": 700}, device_scale_factor=1.5)
    sheet.page.get_by_text("+ class").click()
    for number, shape in enumerate([*SHAPES, SPIRAL]):
        sheet.draw(sheet.box(number), shape)
    sheet.draw(sheet.query, by_another_hand(PHI))
    assert sheet.first() == "B"
    sheet.page.mouse.move(0, 0)
    shown = sheet.page.screenshot(full_page=True)
    sheet.close()
    assert shown.startswith(b"\x89PNG")
    if os.environ.get("RECORD"):
        experiment.write_atomically(REPO / "results" / "predict" / "page.png", lambda out: out.write(shown))
        found = recorded | {"bytes": (REPO / "pretrained" / "page.html").stat().st_size, "command": COMMAND}
        found |= {"browser": f"Chromium {chromium.version}", "processor": experiment.processor()}
        experiment.write_json(REPO / "results" / "page.json", found | {"git_commit": experiment.git_commit()})
