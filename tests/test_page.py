"""The page to draw on, in a real browser: strokes, answers, wrong input, a phone's window; nothing leaves 127.0.0.1.

The browser's tests need gradio, playwright (requirements-page.txt, pip install playwright) and chromium; without them
they are skipped. RECORD=1 pytest -n 0 tests/test_page.py writes results/predict/page.png and results/page.json.
"""

from fewshot import experiment
from fewshot.experiment import UserError

import math
import os
import shutil
import socket
import statistics
import sys
import time
from argparse import Namespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import REPO, one_line_error

import page
import predict

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


def by_another_hand(shape, amount=0.04):
    """The strokes drawn by somebody else: bent a little, in another size."""
    return [
        [(0.05 + 0.88 * x + amount * math.sin(4 * y), 0.08 + 0.82 * y + amount * math.cos(5 * x)) for x, y in s]
        for s in shape
    ]


def picture(shape, side=200):
    """A drawing as a uint8 picture [side, side], ink on white paper."""
    image = np.full((side, side), 255, np.uint8)
    ys, xs = np.mgrid[:side, :side]
    for stroke in shape:
        for (x0, y0), (x1, y1) in zip(stroke, stroke[1:], strict=False):
            for t in np.linspace(0, 1, 60):
                at = side * np.array([x0 + t * (x1 - x0), y0 + t * (y1 - y0)])
                image[(xs - at[0]) ** 2 + (ys - at[1]) ** 2 < 12] = 0
    return image


def url(image):
    return page.data_url(1 - image / 255)


@pytest.fixture(scope="module")
def compare():
    args = Namespace(checkpoint=None, device="cpu", dtype="float32")
    return predict.comparer(predict.load_network(args), "auto")


# --------------------------------------------------------------------------- without a browser


def test_a_board_is_answered(compare):
    board = {"examples": [url(picture(SIGMA)), None, url(picture(PHI)), url(picture(CHAIR))]}
    found = page.reply(board | {"query": url(picture(by_another_hand(PHI)))}, compare)
    assert found["classes"] == [0, 2, 3] and int(np.argmax(found["probabilities"])) == 1
    assert sum(found["probabilities"]) == pytest.approx(1, abs=1e-5) and found["unknown"] in (True, False)
    assert np.array(found["plane"]).shape == (4, 2) and len(found["seen"]) == 4


def test_the_plane_keeps_the_distances_of_three_points(compare):
    """Two examples and a drawing lie in a plane: there the picture is exact."""
    images = [picture(shape)[None] for shape in (SIGMA, PHI, by_another_hand(PHI))]
    found = compare(images[:2], images[2])
    plane = np.array(found["plane"])
    distances = ((plane[:2] - plane[2]) ** 2).sum(axis=1)
    assert distances[0] - distances[1] == pytest.approx(
        math.log(found["probabilities"][1] / max(found["probabilities"][0], 1e-30)), rel=1e-3
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"examples": [None] * 3}, "at least two"),
        ({"examples": "many"}, "no board"),
        ({"examples": [None] * 11}, "no board"),
        ({"query": None}, "Now draw one"),
        ({"query": "data:image/png;base64,????"}, "the large box is no picture"),
        ({"query": "data:text/html,hello"}, "the large box is no picture"),
        ({"query": 17}, "the large box is no picture"),
        ({"query": page.PNG + "A" * page.LARGEST}, "the large box is no picture"),
        ({"query": page.PNG + "aGVsbG8="}, "cannot read the image"),
        ({"query": url(np.full((50, 50), 255, np.uint8))}, "No strokes found in the large box"),
        ({"examples": [url(picture(PHI)), url(np.full((9, 9), 255, np.uint8))]}, "No strokes found in box 2"),
    ],
)  # fmt: skip
def test_wrong_boards_get_a_line(compare, change, words):
    good = {"examples": [url(picture(SIGMA)), url(picture(PHI))], "query": url(picture(PHI))}
    found = page.reply(good | change, compare)
    assert set(found) == {"error"} and words in found["error"]
    assert set(page.reply(["nonsense"], compare)) == {"error"}


def test_a_huge_picture_is_refused_before_it_is_unpacked():
    blank = iio.imwrite("<bytes>", np.zeros((5000, 5000), np.uint8), extension=".png")  # 25 million pixels, few bytes
    import base64

    with pytest.raises(UserError, match="5000 x 5000"):
        page.picture_of(page.PNG + base64.b64encode(blank).decode(), "box 1")


def test_without_gradio_one_line_says_what_to_install(monkeypatch, compare):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-page\.txt"):
        page.start(compare, 0)
    assert (REPO / "requirements-page.txt").read_text().startswith("gradio")


def test_flags_that_do_not_go_with_the_page(run_script):
    one_line_error(run_script("predict.py", "somewhere", "--page"), "--page")
    one_line_error(run_script("predict.py", "--page", "--classes", "x.npz"), "--classes")


def test_the_time_of_an_answer(compare):
    """Measured without a browser beside it; RECORD=1 writes results/page.json."""
    board = {"examples": [url(picture(shape)) for shape in [*SHAPES, SPIRAL, COMB]], "query": url(picture(PHI))}
    page.reply(board, compare)
    taken, used = [], time.process_time()
    for _ in range(20):
        time.sleep(0.2)  # as between strokes
        begin = time.perf_counter()
        assert "error" not in page.reply(board, compare)
        taken.append(1000 * (time.perf_counter() - begin))
    found = {"median_ms": round(statistics.median(taken), 1), "most_ms": round(max(taken), 1), "answers": len(taken)}
    found |= {"cpu_ms": round(1000 * (time.process_time() - used) / len(taken), 1), "classes": 5}
    if os.environ.get("RECORD"):
        found |= {"processor": experiment.processor(), "device": f"cpu, {torch.get_num_threads()} threads"}
        found |= {"busy": os.getloadavg()[0] > os.cpu_count()}
        found["command"] = "RECORD=1 pytest -n 0 tests/test_page.py -k time"
        experiment.write_json(REPO / "results" / "page.json", found)


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def served(compare, tmp_path_factory):
    """The page's address, the addresses that the server connected to, and the folder where Gradio would keep files."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    if not shutil.which("chromium"):
        pytest.skip("needs chromium")
    called, connect = [], socket.socket.connect
    files = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(files))
        patch.setattr(socket.socket, "connect", lambda self, to: (called.append(to), connect(self, to))[1])
        address, close = page.start(compare, 0)
        yield address, called, files
        close()


@pytest.fixture(scope="module")
def chromium(served):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


class Sheet:
    """An open page, with every request of the browser and every complaint of its console."""

    def __init__(self, chromium, address, **options):
        self.page = chromium.new_page(**({"viewport": {"width": 1040, "height": 800}} | options))
        self.asked, self.complaints = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("canvas", timeout=120_000)

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

    def wait(self, name, words):
        """Until the text of .name holds the words."""
        self.page.wait_for_function(
            "([name, words]) => document.querySelector('.' + name).textContent.includes(words)",
            arg=[name, words],
            timeout=60_000,
        )

    def probabilities(self):
        return dict(
            zip(
                self.page.locator(".bar b").all_inner_texts(),
                self.page.locator(".bar em").all_inner_texts(),
                strict=True,
            )
        )


@pytest.fixture
def sheet(chromium, served):
    sheet = Sheet(chromium, served[0])
    yield sheet
    assert not sheet.complaints
    sheet.page.close()


def test_draw_classify_clear(sheet, served):
    sheet.wait("message", "at least two")
    for number, shape in enumerate(SHAPES):
        sheet.draw(sheet.box(number), shape)
    sheet.wait("message", "Now draw one")
    for letter, shape in zip("ABC", SHAPES, strict=True):
        sheet.page.locator(".query button").click()
        sheet.wait("message", "Now draw one")
        sheet.draw(sheet.query, by_another_hand(shape))
        sheet.page.wait_for_function("document.querySelectorAll('.bar').length === 3")
        sheet.page.wait_for_load_state("networkidle")
        assert sheet.page.locator(".bar b").first.inner_text() == letter
        assert set(sheet.probabilities()) == set("ABC")
        assert sheet.page.locator("svg image").count() == 4 and sheet.page.locator(".plane").is_visible()
    sheet.page.get_by_label("name of class C").fill("chair")
    sheet.page.keyboard.press("Enter")
    sheet.wait("verdict", "chair")
    sheet.page.locator(".pad").nth(1).get_by_text("clear").click()  # a class less
    sheet.page.wait_for_function("document.querySelectorAll('.bar').length === 2")
    sheet.page.get_by_text("Start over").click()
    sheet.wait("message", "at least two")
    assert not sheet.page.locator(".plane").is_visible() and sheet.page.locator(".bar").count() == 0


def test_nothing_leaves_this_computer_and_nothing_is_stored(chromium, served):
    """Every request of the browser goes to the page's own address, so do the server's; no file appears."""
    address, called, files = served
    sheet = Sheet(chromium, address)
    response = sheet.page.request.get(address)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    for number, shape in enumerate(SHAPES):
        sheet.draw(sheet.box(number), shape)
    sheet.draw(sheet.query, SPIRAL)
    sheet.page.locator(".query input[type=file]").set_input_files(
        {"name": "phi.png", "mimeType": "image/png", "buffer": iio.imwrite("<bytes>", picture(PHI), extension=".png")}
    )
    sheet.wait("verdict", "B")
    sheet.page.wait_for_timeout(2000)  # whatever it might load late
    outside = [asked for asked in sheet.asked if not asked.startswith((address, "data:", "blob:"))]
    assert not outside and len(sheet.asked) > 10
    assert {to[0] for to in called if isinstance(to, tuple)} <= {"127.0.0.1", "localhost", "::1"}
    assert not [file for file in files.rglob("*") if file.is_file()]
    sheet.page.close()


def test_wrong_input_gets_a_line(sheet):
    upload = sheet.page.locator(".pad input[type=file]").first.set_input_files
    upload({"name": "notes.png", "mimeType": "image/png", "buffer": b"not a picture"})
    sheet.wait("message", "cannot read notes.png")
    for number, shape in enumerate(SHAPES[:2]):
        sheet.draw(sheet.box(number), shape)
    blank = iio.imwrite("<bytes>", np.full((60, 90), 255, np.uint8), extension=".png")
    sheet.page.locator(".query input[type=file]").set_input_files(
        {"name": "blank.png", "mimeType": "image/png", "buffer": blank}
    )
    sheet.wait("message", "No strokes found in the large box")
    photo = np.stack([np.pad(picture(by_another_hand(PHI)), 40, constant_values=255) * 0.7] * 3, axis=-1)
    sheet.page.locator(".query input[type=file]").set_input_files(
        {"name": "photo.jpg", "mimeType": "image/jpeg",
         "buffer": iio.imwrite("<bytes>", photo.astype(np.uint8), extension=".jpg")}
    )  # fmt: skip
    sheet.page.wait_for_function("document.querySelectorAll('.bar').length === 2")
    assert sheet.page.locator(".bar b").first.inner_text() == "B"


def test_none_of_these(sheet):
    for number, shape in enumerate(SHAPES):
        sheet.draw(sheet.box(number), shape)
    sheet.draw(sheet.query, COMB)
    sheet.wait("verdict", "None of these")


def test_ten_classes_and_no_more(sheet):
    for _ in range(7):
        sheet.page.get_by_text("+ class").click()
    assert sheet.page.locator(".examples canvas").count() == 10
    assert not sheet.page.get_by_text("+ class").is_visible()
    sheet.draw(sheet.box(9), PHI)
    sheet.draw(sheet.box(5), SIGMA)
    sheet.draw(sheet.query, by_another_hand(PHI))
    sheet.page.wait_for_function("document.querySelectorAll('.bar').length === 2")
    assert sheet.page.locator(".bar b").first.inner_text() == "J"


def test_a_phone(chromium, served):
    """390 x 844: nothing is wider than the window, boxes are large enough for a finger, and fingers draw."""
    sheet = Sheet(chromium, served[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
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
    sheet.page.wait_for_function("document.querySelectorAll('.bar').length === 3")
    assert sheet.page.locator(".bar b").first.inner_text() == "B"
    assert sheet.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert sheet.page.evaluate("window.scrollY") >= scrolled  # a stroke does not scroll the page away
    sheet.page.close()


def test_a_taken_port_gets_a_line(served, compare):
    with pytest.raises(UserError, match=r"--port \d+ is taken"):
        page.start(compare, int(served[0].rstrip("/").rsplit(":", 1)[1]))


def test_the_picture_of_the_page(chromium, served):
    """Four classes and an answer; RECORD=1 writes results/predict/page.png."""
    sheet = Sheet(chromium, served[0], viewport={"width": 900, "height": 700}, device_scale_factor=1.5)
    sheet.page.get_by_text("+ class").click()
    for number, shape in enumerate([*SHAPES, SPIRAL]):
        sheet.draw(sheet.box(number), shape)
    sheet.draw(sheet.query, by_another_hand(PHI))
    sheet.wait("verdict", "B")
    sheet.page.mouse.move(0, 0)
    shown = sheet.page.screenshot(full_page=True)
    sheet.page.close()
    assert shown.startswith(b"\x89PNG")
    if os.environ.get("RECORD"):
        experiment.write_atomically(REPO / "results" / "predict" / "page.png", lambda out: out.write(shown))
