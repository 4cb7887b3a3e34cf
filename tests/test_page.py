"""The page with forty sliders: what it draws is what the command draws; in a browser, with `make test-page`."""

import contextlib
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import app
from DDNM import main as reconstruct
from images import to_uint8
from utils import InputError, parse, resolve_device

FLAGS = ["--device", "cpu", "--steps", "5"]


@pytest.fixture(scope="module")
def studio():
    page, networks, rule, walk, architecture = parse(
        "", app.Page, app.NetworkSettings, app.RuleSettings, app.WalkSettings,
        argv=FLAGS, extra=app.COMMAND_ONLY, presets=app.CONFIGS,
    )  # fmt: skip
    return app.Studio(app.load_networks(networks, {}, resolve_device("cpu")), rule, walk, page, app.given_flags(FLAGS))


@pytest.fixture
def wish(studio):
    return app.Wish(tuple(studio.changed("a hat", next(iter(studio.faces.values())))), 3, 6, "nlbp+gradient")


def test_every_attribute_has_a_slider_and_every_change_names_attributes(studio):
    assert sorted(i for group in app.grouped(studio.attributes).values() for i in group) == list(range(40))
    for words in app.CHANGES.values():
        assert {word[1:] for word in words.split()} <= set(studio.attributes)
    for face in studio.faces.values():
        assert all(low < y < high for y, (low, high) in zip(face, studio.range, strict=True))


def test_a_link_carries_the_state(studio, wish):
    state = wish.link().removeprefix("?state=")
    assert app.Wish.from_link(state, studio.range) == wish
    for broken in (state[:-9], "x", state.swapcase(), app.Wish((1.0,), 0, 5, "none").link()[7:]):
        with pytest.raises(InputError, match="the link"):
            app.Wish.from_link(broken, studio.range)


def test_the_command_draws_the_same_picture(studio, wish, tmp_path, monkeypatch):
    given, honest = [], app.sampling
    monkeypatch.setattr(app, "sampling", lambda *arguments, **_: given.append(arguments[5]) or iter(()))
    for rule in app.RULES:
        assert not list(studio.draw(app.replace(wish, rule=rule)))
        said = reconstruct.parse(shlex.split(studio.command(app.replace(wish, rule=rule)))[2:])
        assert said.rule == app.replace(studio.rule, guidance=rule) and said.walk.eta == studio.walk.eta
        assert given.pop() == said.rule.build(wish.steps)
    monkeypatch.setattr(app, "sampling", honest)
    (early, _), (share, picture) = studio.draw(wish)
    assert early == 5 / 6 and share == 1
    monkeypatch.chdir(tmp_path)
    Path("face.csv").write_text(studio.table(wish))
    words = shlex.split(studio.command(wish))[2:]
    at = words.index("--image_folder")
    assert reconstruct.main([*words[:at], *words[at + 2 :], "--out", "page"]) == 0
    with Image.open("page/reconstruction/face.png") as saved:
        assert np.array_equal(np.asarray(saved), to_uint8(picture).permute(1, 2, 0).numpy())


def test_what_differs_is_framed_and_said(studio):
    target = studio.changed("a hat", next(iter(studio.faces.values())))
    logits = torch.tensor(target)
    logits[studio.attributes.index("Wearing_Hat")] *= -1
    html = app.chips("g sees", studio.attributes, logits, target)
    assert "Wearing Hat (missing)" in html and html.count("differs") == 1 and "98% as wanted" in html


# --- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(studio):
    pytest.importorskip("gradio")
    blocks = app.build(studio).queue(max_size=24)  # room for the twenty visitors, not for an event of every slider
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, css=app.STYLE, max_file_size=app.LARGEST_UPLOAD)
    yield url
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    with playwright.sync_playwright() as p:
        with contextlib.closing(p.chromium.launch(executable_path="/usr/bin/chromium", args=quiet.split())) as chromium:
            yield chromium


@pytest.fixture
def tab(browser, address, request):
    size = {"width": getattr(request, "param", 1280), "height": 900}
    with contextlib.closing(browser.new_page(viewport=size)) as tab:
        tab.set_default_timeout(60_000)
        tab.goto(address)
        tab.wait_for_selector("figure.pic img")
        yield tab


def press(tab, name):
    tab.get_by_role("button", name=name, exact=True).click()


def open_tab(tab, name):
    button = tab.get_by_role("tab", name=name, exact=True)
    if not button.is_visible():  # on a narrow screen the last tabs are in a menu
        tab.locator(".overflow-menu > button").first.click()
        tab.locator(".overflow-dropdown button", has_text=name).click()
    else:
        button.click()


@pytest.mark.page
def test_a_face_is_drawn_and_saved(tab, studio, wish, tmp_path):
    natural = tab.locator("figure.pic img").first.get_attribute("src")
    slider = tab.get_by_label("number input for Blond Hair")
    slider.fill("-12")
    slider.press("Enter")
    tab.wait_for_function("(old) => document.querySelector('figure.pic img').src !== old", arg=natural)
    press(tab, "Draw")
    tab.wait_for_selector("text=An independent judge sees")
    with tab.expect_download() as download:
        tab.locator("a[download='face.png']").click()
    saved = np.asarray(Image.open(download.value.path()))
    state = tab.get_by_label("Link to this face").input_value().split("?state=")[1]
    again = studio.picture(app.Wish.from_link(state, studio.range))
    assert np.array_equal(saved, to_uint8(again).permute(1, 2, 0).numpy())
    tab.goto(f"{tab.url.split('?')[0]}?state={state}")
    tab.wait_for_selector("figure.pic img")
    tab.wait_for_function("() => [...document.querySelectorAll('input')].some(i => i.value === '-12')")


wide_and_narrow = pytest.mark.parametrize("tab", [1280, 390], indirect=True)


@pytest.mark.page
@wide_and_narrow
def test_the_page_fits_and_moves_all_sliders_without_filling_the_queue(tab):
    natural = tab.locator("figure.pic img").first.get_attribute("src")
    tab.get_by_label("a hat").check()
    tab.wait_for_function("(old) => document.querySelector('figure.pic img').src !== old", arg=natural)
    tab.wait_for_timeout(1000)
    assert tab.get_by_text("currently busy").count() == 0
    sliders, face = (tab.locator(".columns > .column").nth(i).bounding_box() for i in range(2))
    if tab.viewport_size["width"] < 700:
        assert face["y"] + face["height"] <= sliders["y"] and sliders["width"] > 300
    else:
        assert face["x"] >= sliders["x"] + sliders["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]


def draw_long(tab):
    steps = tab.get_by_label("number input for Steps")
    steps.fill("200")
    steps.press("Enter")
    press(tab, "Draw")
    tab.wait_for_selector("text=x0 after")


@pytest.mark.page
@pytest.mark.parametrize("end", [lambda tab: press(tab, "Stop"), lambda tab: tab.close()], ids=["stop", "close"])
def test_a_drawing_ends_when_it_is_stopped_or_its_tab_closed(tab, studio, end):
    asked = []
    with studio.networks.prior.register_forward_pre_hook(lambda *_: asked.append(time.monotonic())):
        draw_long(tab)
        end(tab)
        while time.monotonic() - asked[-1] < 3:
            time.sleep(0.1)
    assert len(asked) < 200


@pytest.mark.page
def test_what_is_no_picture_is_said(tab, tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    open_tab(tab, "Edit")
    tab.set_input_files("input[type=file]", str(tmp_path / "x.png"))
    tab.wait_for_selector("text=cannot identify")


@pytest.mark.page
def test_a_portrait_is_edited(tab, studio):
    open_tab(tab, "Edit")
    portrait = next((app.CONFIGS.parent / "exp/datasets/faces").rglob("*.jpg"))
    tab.set_input_files("input[type=file]", str(portrait))
    tab.wait_for_selector("text=the portrait.")
    press(tab, "Draw with these sliders")
    tab.wait_for_selector("text=Of the 40 attributes that were to stay")


@pytest.mark.page
@wide_and_narrow
def test_rules_are_compared_and_a_walk_is_walked(tab):
    open_tab(tab, "Compare")
    press(tab, "Draw by every rule, from the same noise")
    tab.wait_for_selector("text=nlbp+gradient: g")
    open_tab(tab, "Walk")
    press(tab, "These sliders are the start")
    tab.wait_for_selector("text=The start is kept")
    press(tab, "Walk from the start to these sliders")
    tab.wait_for_selector("text=100% of the way")
    press(tab, "Several seeds of these sliders")
    tab.wait_for_selector("text=seed 11")


@pytest.mark.page
def test_twenty_visitors_each_get_their_own_picture(address, studio):
    client = pytest.importorskip("gradio_client")
    logits = next(iter(studio.faces.values()))
    wishes = [app.Wish(logits, seed, 5, "nlbp") for seed in range(20)]

    def visit(wish: app.Wish) -> str:
        visitor = client.Client(address, verbose=False, httpx_kwargs={"timeout": 300})
        return visitor.predict(*wish.logits, wish.seed, wish.steps, wish.rule, api_name="/draw")[0]

    with ThreadPoolExecutor(len(wishes)) as visitors:
        for wish, html in zip(wishes, visitors.map(visit, wishes), strict=True):
            assert app.data_uri(studio.picture(wish)) in html
