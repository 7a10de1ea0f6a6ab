"""The page in a real browser: what it loads, shows, answers to hands and keys, and says when something fails."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'tokenexit[serve]'")
pytest.importorskip("python_multipart", reason="needs python-multipart: pip install 'tokenexit[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'tokenexit[serve]'")

from tests.serving.browser import CHROMIUM, Browser
from tests.serving.live import LABELS, Client, drawing, png, running, small_model
from tokenexit.checkpoints.calibration import Calibration
from tokenexit.inputs.labels import default_labels
from tokenexit.methods import DToP, Reduced
from tokenexit.reducers import MPM
from tokenexit.segmenter import ExitSegmenter
from tokenexit.serving.app import Limits

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: install chromium")

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def model() -> ExitSegmenter:
    return small_model()


@pytest.fixture(scope="module")
def client(model: ExitSegmenter) -> Iterator[Client]:
    with running(model) as client:
        yield client


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with Browser(DESKTOP) as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Browser:
    shared_browser.dress(*DESKTOP)
    shared_browser.problems.clear()
    shared_browser.addresses.clear()
    return shared_browser


@pytest.fixture
def page(browser: Browser, client: Client) -> Browser:
    """The page with its first sample shown, segmented with DToP."""
    return method(opened(browser, client), "dtop")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "street.png"
    drawing(48, 64, seed=5).save(path)
    return path


def opened(browser: Browser, client: Client) -> Browser:
    browser.open(f"http://127.0.0.1:{client.port}/")
    browser.until("document.getElementById('share').textContent !== '–'")
    return settled(browser)


def settled(page: Browser) -> Browser:
    """The page when its last answer is drawn."""
    page.until("document.getElementById('panels').getAttribute('aria-busy') === 'false'")
    return page


def text(page: Browser, selector: str) -> str:
    found: str = page.run(f"document.querySelector({selector!r}).innerText")
    return found


def upload(page: Browser, path: Path) -> Browser:
    """Choose a file, and wait until what it gives is drawn."""
    page.run("window.before = current")
    page.upload("#file", path)
    page.until("current !== window.before")
    return settled(page)


def turned(page: Browser, compute: float) -> Browser:
    """The dial moved to a place, as a hand does."""
    dial = "document.getElementById('compute')"
    page.run(f"{dial}.value = {compute}; {dial}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    return settled(page)


def method(page: Browser, name: str) -> Browser:
    page.click(f"label:has(input[value={name}])")
    return settled(page)


def predicted(client: Client, photo: Path, **asked: Any) -> Any:
    (found,) = client.predict(("street.png", photo.read_bytes()), **asked).json
    return found


def test_page__shows_a_sample_at_once_and_asks_nobody_else(page: Browser, client: Client) -> None:
    assert page.problems == []
    assert all(a.startswith((f"http://127.0.0.1:{client.port}/", "blob:", "data:")) for a in page.addresses)
    assert page.run("[...document.querySelectorAll('figcaption b')].map((b) => b.textContent)") == [
        "Overlay",
        "Exit map",
        "Prediction",
        "Image",
    ]
    legend = page.run("[...document.querySelectorAll('#exits tbody th')].map((th) => th.innerText)")
    assert legend == ["Exit 1, after block 1", "Exit 2, after block 3", "Stayed to the end"]
    assert page.run("document.querySelectorAll('#exits .swatch').length") == 3
    assert page.run("document.querySelector('.sample').getAttribute('aria-pressed')") == "true"


def test_page__begins_with_dense_on_an_uncalibrated_model_and_says_so(browser: Browser, client: Client) -> None:
    page = opened(browser, client)
    assert page.run("document.querySelector('[name=method]:checked').value") == "dense"
    assert page.run("document.querySelector('.dial').disabled")
    assert "This model is not calibrated: dense unless you choose another." in text(page, "#controls")


def test_page__begins_with_the_plan_of_a_calibration_and_names_it(browser: Browser, photo: Path) -> None:
    model = small_model()
    inside = {"name": "dtop", "threshold": [0.6, 0.9], "stop": 2}
    plan = {"name": "resized", "method": inside, "scale": 0.7}
    model.calibration = Calibration(model=model.fingerprint(), method=plan)
    with running(model) as client:
        page = upload(opened(browser, client), photo)
        assert page.run("document.querySelector('[name=method]:checked').value") == "resized"
        wanted = predicted(client, photo)
        assert wanted["method"] == "resized"
        assert page.run("views.resized.exit_stage.length") == wanted["tokens"] == 9 * 12
        method(page, "compare")
        heads = page.run("[...document.querySelectorAll('#exits thead th')].map((th) => th.innerText)")
        assert heads == ["Exit", "Dense", "DToP", "DoViT", "Resized"]


def test_upload__shows_what_the_api_says_of_the_image(page: Browser, client: Client, photo: Path) -> None:
    turned(upload(page, photo), 0.2)
    found = predicted(client, photo, method="dtop", compute=0.2)
    assert text(page, "#share") == f"{round(100 * found['share_of_dense'])} %"
    assert f"{found['tokens']} tokens" in text(page, "#gmacs")
    left = [exit["left"] for exit in found["exits"]] + [found["stayed"]]
    assert page.run("[...document.querySelectorAll('#exits td:nth-child(2)')].map((td) => +td.textContent)") == left
    assert page.run("+document.querySelector('#exits td:nth-child(3)').textContent") == found["exits"][0]["live"]
    largest = found["classes"][0]
    assert f"{largest['name']} {round(100 * largest['share'])} %" in text(page, "#classes").replace("\n", " ")


def test_images__have_the_colours_of_their_legends(page: Browser, client: Client, photo: Path) -> None:
    turned(upload(page, photo), 0.2)
    shown = page.run(
        "(() => { const c = document.querySelectorAll('.look canvas')[2];"
        " return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; })()"
    )
    mask = client.predict(("a.png", photo.read_bytes()), method="dtop", compute=0.2, format="png").body
    wanted = np.asarray(LABELS.palette)[np.asarray(Image.open(io.BytesIO(mask)))]
    assert shown[:2] == [64, 48]
    np.testing.assert_array_equal(np.reshape(shown[2], (48, 64, 4))[..., :3], wanted)
    exits = page.run(
        "coloured(views.dtop.exit_stage, 16, 12, about.colours).getContext('2d')"
        ".getImageData(0, 0, 16, 12).data.filter((_, i) => i % 4 < 3).join()"
    )
    stages = np.asarray(predicted(client, photo, method="dtop", compute=0.2)["exit_stage"])
    colours = np.asarray(client.get("/model").json["colours"])
    assert [int(v) for v in exits.split(",")] == colours[stages].ravel().tolist()


def test_exit_map__outlines_groups_of_merged_tokens(browser: Browser, photo: Path) -> None:
    model, by = small_model(), MPM((1, 2))
    with running(model, by=by) as client:
        page = turned(upload(method(opened(browser, client), "dtop"), photo), 0.2)
        lines = page.run(
            "(() => { const c = painted(64, 48, (context) => outlined(context, views.dtop, 64, 48));"
            " return [...c.getContext('2d').getImageData(0, 0, 64, 48).data].filter((_, i) => i % 4 === 3); })()"
        )
        thresholds = predicted(client, photo, method="dtop", compute=0.2)["threshold"]
        page.click(".look", 0.3, 0.3)
        said = text(page, "#readout")
        assert page.problems == []
    (groups,) = model.predict(Image.open(photo), Reduced(DToP(tuple(thresholds)), by)).groups
    pixels = groups.numpy().repeat(4, 0).repeat(4, 1)
    wanted = np.zeros((48, 64), dtype=bool)
    wanted[1:] |= pixels[1:] != pixels[:-1]
    wanted[:, 1:] |= pixels[:, 1:] != pixels[:, :-1]
    np.testing.assert_array_equal(np.reshape(lines, (48, 64)) > 0, wanted)
    patches = int((groups == groups[3, 4]).sum())
    assert (f"its token stands for {patches} patches and " in said) == (patches > 1)


def test_dial__moves_with_keys_and_all_follows(page: Browser) -> None:
    page.run("document.getElementById('compute').focus()")
    shares = []
    for key in ("Home", "End"):
        page.press(key)
        page.until(f"views.dtop.compute === {int(key == 'End')}")
        shares.append(int(settled(page).run("parseInt(document.getElementById('share').textContent)")))
        shares.append(page.run("views.dtop.stayed"))
    assert shares[0] < shares[2]
    assert shares[1] < shares[3]
    assert shares[3] == page.run("views.dtop.tokens")
    assert text(page, "#threshold") == "no token leaves"
    page.click("#reset")
    page.until("views.dtop.threshold[0] === 0.95")
    assert settled(page).run("document.getElementById('threshold').textContent") == "threshold 0.950"


def test_dial__of_many_moves_the_last_one_is_shown(page: Browser) -> None:
    for n in range(20):
        page.run(f"$('compute').value = {n / 40}; $('compute').dispatchEvent(new Event('input', {{bubbles: true}}))")
    page.until("views.dtop.compute === 0.475")
    assert len([a for a in page.addresses if a.endswith("/view")]) < 21


def test_click__tells_class_score_and_exit_of_the_pixel(page: Browser, client: Client, photo: Path) -> None:
    turned(upload(page, photo), 0.2)
    found = predicted(client, photo, method="dtop", compute=0.2)
    mask = client.predict(("a.png", photo.read_bytes()), method="dtop", compute=0.2, format="png").body
    labels = np.asarray(Image.open(io.BytesIO(mask)))
    for x, y in ((0.3, 0.3), (0.9, 0.6)):
        page.click(".look", x, y)
        where, said = text(page, "#readout").split("\n")
        column, row = (int(number) for number in where.removeprefix("Pixel ").split(", "))
        assert abs(column - 64 * x) <= 1
        assert abs(row - 48 * y) <= 1
        assert said.startswith(f"{LABELS.names[labels[row, column]]}, ")
        stage = found["exit_stage"][row // 4][column // 4]
        assert said.endswith(("its token left at exit 1, after block 1.", "its token left at exit 2, after block 3.",
                              "its token stayed through all 4 blocks.")[stage])  # fmt: skip
    assert page.run("document.querySelectorAll('.cross').length") == 4


def test_arrow_keys__walk_through_the_image(page: Browser, photo: Path) -> None:
    upload(page, photo)
    page.run("document.querySelector('.look').focus()")
    page.press("ArrowRight")
    first = text(page, "#readout").split("\n")[0]
    page.press("ArrowRight", shift=True)
    page.press("ArrowUp")
    assert (first, text(page, "#readout").split("\n")[0]) == ("Pixel 34, 24", "Pixel 42, 22")


def test_tab_key__reaches_every_control(page: Browser) -> None:
    page.run("document.activeElement.blur()")
    seen = set()
    for _ in range(24):
        page.press("Tab")
        seen.add(
            page.run("document.activeElement.id || document.activeElement.className || document.activeElement.name")
        )
    assert {"sample", "file", "method", "compute", "look", "mask", "json"} <= seen


def test_compare__shows_the_methods_side_by_side(page: Browser, client: Client, photo: Path) -> None:
    turned(method(upload(page, photo), "compare"), 0.3)
    assert page.run("[...document.querySelectorAll('#exits thead th')].map((th) => th.innerText)") == [
        "Exit",
        "Dense",
        "DToP",
        "DoViT",
    ]
    rows = page.run(
        "[...document.querySelectorAll('#exits tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    found = [predicted(client, photo, method=name, **({} if name == "dense" else {"compute": 0.3}))
             for name in ("dense", "dtop", "dovit")]  # fmt: skip
    assert rows[0][1:] == [str(f["exits"][0]["left"]) for f in found]
    assert rows[2][1:] == [str(f["stayed"]) for f in found]
    assert rows[3] == ["Of dense", *(f"{round(100 * f['share_of_dense'])} %" for f in found)]
    tops = page.run("[...document.querySelectorAll('figure')].map((f) => f.getBoundingClientRect().top)")
    assert len(tops) == 6
    assert len(set(tops[:3])) == len(set(tops[3:])) == 1
    page.click(".look")
    assert [line.split(":")[0] for line in text(page, "#readout").split("\n")[1:]] == ["Dense", "DToP", "DoViT"]


def test_downloads__are_the_apis_answers(page: Browser, client: Client, photo: Path, tmp_path: Path) -> None:
    turned(upload(page, photo), 0.25)
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#mask")
    wanted = client.predict(("street.png", photo.read_bytes()), method="dtop", compute=0.25, format="png").body
    assert arrived(page, tmp_path / "street-dtop.png") == wanted
    page.click("#json")
    assert b'"share_of_dense"' in arrived(page, tmp_path / "street-dtop.json")


def arrived(page: Browser, path: Path) -> bytes:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} was not downloaded"
        page.run("1")
        time.sleep(0.02)
    return path.read_bytes()


def test_a_damaged_file__is_said_and_the_page_goes_on(page: Browser, photo: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cat.png"
    damaged.write_bytes(photo.read_bytes()[:60])
    page.upload("#file", damaged)
    page.until("!document.getElementById('message').hidden")
    assert text(page, "#message") == "cat.png cannot be read as an image."
    upload(page, photo)
    assert page.run("document.getElementById('message').hidden")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_images__can_be_dropped_and_pasted(page: Browser, way: str) -> None:
    event = {
        "drop": "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})",
        "paste": "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})",
    }[way]
    page.run(
        "(async () => { const canvas = new OffscreenCanvas(30, 20); canvas.getContext('2d').fillRect(0, 0, 9, 9);"
        " const data = new DataTransfer(); data.items.add(new File([await canvas.convertToBlob()], 'mine.png'));"
        f" window.before = current; document.body.dispatchEvent({event}); }})()"
    )
    page.until("current !== window.before")
    settled(page)
    assert page.run("[current.name, views.dtop.height, views.dtop.width]") == ["mine.png", 20, 30]
    assert page.run("document.querySelector('[aria-pressed=true]')") is None


def test_what_the_server_says__is_shown(page: Browser) -> None:
    page.run("about.methods[1].name = 'unet', form.elements.method[1].value = 'unet', refresh()")
    page.until("!document.getElementById('message').hidden")
    assert text(page, "#message").startswith("Method 'unet' is unknown")


def test_large_images_and_forgotten_ones__are_sent_as_the_server_takes_them(
    browser: Browser, model: ExitSegmenter, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    drawing(300, 500).save(large)
    with running(model, limits=Limits(pixels=30_000, kept_bytes=1)) as client:
        page = upload(method(opened(browser, client), "dtop"), large)
        assert page.run("document.getElementById('message').hidden")
        assert 25_000 < page.run("views.dtop.width * views.dtop.height") <= 30_000
        client.form("/images", [("image", ("a.png", png()))])  # takes the place of the page's image
        turned(page, 0.1)
        assert page.run("views.dtop.compute") == 0.1
        assert page.run("document.getElementById('message').hidden")


def test_token__is_asked_for_once(browser: Browser, model: ExitSegmenter) -> None:
    with running(model, token="sesame") as client:
        browser.open(f"http://127.0.0.1:{client.port}/")
        for given in ("open", "sesame"):
            browser.until("!document.getElementById('ask').hidden")
            browser.run(f"document.getElementById('token').value = '{given}'")
            browser.click("#ask button")
        browser.until("document.getElementById('share').textContent !== '–'")
        assert browser.run("document.getElementById('ask').hidden && document.getElementById('message').hidden")
        opened(browser, client)


def test_many_classes__keep_their_names(browser: Browser, photo: Path) -> None:
    model = small_model(num_classes=300)
    model.preprocessing = replace(model.preprocessing, labels=default_labels(300))
    with running(model) as client:
        browser.open(f"http://127.0.0.1:{client.port}/")  # scenes say nothing to this model, so it has no samples
        page = method(upload(settled(browser), photo), "dtop")
        page.click(".look")
        mask = client.predict(("a.png", photo.read_bytes()), method="dtop", format="png").body
        assert np.asarray(Image.open(io.BytesIO(mask))).max() > 255
        name = page.run("about.classes[Math.max(...views.dtop.labels)]")
        assert int(name.removeprefix("class_")) > 255


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 600)], ids=str)
def test_page__fits_the_window_and_its_text_is_legible(page: Browser, size: tuple[int, int], dark: bool) -> None:
    page.dress(*size, dark=dark, phone=size[0] < 500)
    for chosen in ("compare", "dtop"):
        method(page, chosen)
        assert page.run("document.documentElement.scrollWidth") <= size[0]
    contrasts = page.run(
        """(() => {
          const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const paper = light(getComputedStyle(document.body).backgroundColor);
          return ["body", "#about", "#caption", "#share", "#reset", "#readout", "summary"].map((name) => {
            const ink = light(getComputedStyle(document.querySelector(name)).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
          });
        })()"""
    )
    assert min(contrasts) >= 4.5, contrasts
    assert (page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)") is dark
    image = np.asarray(Image.open(io.BytesIO(page.screenshot(whole=False))).convert("L"))
    assert bool(image.mean() < 128) is dark


def test_without_scripts__a_form_does_it(browser: Browser, client: Client) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(f"http://127.0.0.1:{client.port}/")
        assert text(browser, "form button.plain") == "Segment"
        assert browser.run("getComputedStyle(document.querySelector('main')).display") == "none"
        browser.click(".sample")
        browser.until("document.title.startsWith('Sample 1')")
        assert browser.run("document.images.length") == 4
        assert "of dense compute" in text(browser, "body")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
