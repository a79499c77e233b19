"""Both pages in a headless Chromium: no errors, no requests, hovering and picking, two widths."""

import time
from pathlib import Path

import browser
import pytest
from made_up import made_up_journey, write_run

from gpt.reports import html, run_report, tour
from gpt.reports.runs import read_runs
from gpt.sampling.settings import Settings

pytestmark = pytest.mark.skipif(browser.PATH is None, reason="no Chromium is installed")
SOURCE = tour.Source(Path("x"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """One browser for all of these tests."""
    with browser.start(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(autouse=True)
def nothing_wrong(tab):
    """No test leaves an error on the console or has fetched anything but its file."""
    yield
    tab.settle()
    assert not tab.errors
    assert all(url.startswith(("file://", "data:")) for url in tab.seen)


@pytest.fixture(scope="module")
def small_tour(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "tour.html"
    journey, model = made_up_journey(3, 4, 8, T=0, n_new=3, prompt="今天 <script>alert(1)</script>")
    html.write(path, tour.build(journey, model, SOURCE, Settings()))
    return path


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", restart=90, text="<script>alert(1)</script>今天")
    write_run(folder / "b", loss=2.5)
    html.write(folder / "r.html", run_report.build(read_runs([folder / "a", folder / "b"])))
    return folder / "r.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_pages_fit_their_width_and_follow_the_scheme(tab, small_tour, two_runs, width, dark):
    for path in (small_tour, two_runs):
        tab.open(path, width, dark=dark)
        assert tab.ask("document.documentElement.scrollWidth") <= width
        paper = tab.ask("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") is not dark
        assert tab.ask("document.body.innerText").count("<script>alert(1)</script>")


def test_a_value_is_read_off_by_mouse_and_by_keys(tab, two_runs):
    tab.open(two_runs)
    tab.hover(".frame[data-panel=loss]", across=0.5)
    said = tab.text(".chart .tip")
    assert "step 100" in said and "a training" in said and "b validation" in said
    tab.ask("document.querySelector('.frame').focus()")
    tab.press("ArrowRight")
    assert tab.text(".chart .tip") != said
    tab.click(".legend label:nth-child(2) input")
    tab.hover(".frame[data-panel=loss]", across=0.25)
    assert "b training" not in tab.text(".chart .tip")
    assert (
        tab.ask("getComputedStyle(document.querySelector('svg [data-run=\"1\"]')).display")
        == "none"
    )


def test_a_head_is_picked_and_a_cell_hovered(tab, small_tour):
    tab.open(small_tour)
    tab.click(".thumb[title='layer 2, head 3']")
    assert tab.text("#cell").startswith("Layer 2, head 3:")
    assert tab.ask("document.querySelector('.thumb[aria-checked=true]').title") == "layer 2, head 3"
    before = tab.text("#cell")
    tab.hover("#map", across=0.3, down=0.95)
    assert tab.text("#cell") != before
    tab.click("#tokens button:nth-child(4)")
    assert "(3) gives" in tab.text("#cell") and "(3) ask" in tab.text("#question")
    assert tab.ask("document.querySelectorAll('#scores tbody tr.self').length") == 1
    assert "−∞" in tab.text("#scores")  # it was read in the prefill: later keys are masked
    shown = tab.text("#scores tbody tr:nth-child(2)")
    assert "%" in shown


def test_the_tour_is_walked_by_keys_alone(tab, small_tour):
    tab.open(small_tour)
    tab.ask("document.querySelector('.thumb[aria-checked=true]').focus()")
    before = tab.text("#cell")
    tab.press("ArrowDown" if "Layer 1" in before else "ArrowUp")
    assert tab.text("#cell").split(":")[0] != before.split(":")[0]
    tab.ask("document.querySelector('#steps button').focus()")
    tab.press("ArrowRight")
    assert "Decode step 1" in tab.text(".step:not(.away) h3")
    tab.ask("document.querySelector('#map').focus()")
    before = tab.text("#cell")
    tab.press("ArrowUp")
    assert tab.text("#cell") != before


def test_a_head_of_many_numbers_is_shown(tab, tmp_path):
    """More of them than a script can hand to one call."""
    journey, model = made_up_journey(1, 1, 8192, T=20, n_new=1)
    html.write(tmp_path / "t.html", tour.build(journey, model, SOURCE, Settings()))
    tab.open(tmp_path / "t.html")
    assert tab.ask("document.querySelectorAll('#scores tbody tr').length") == 20


@pytest.mark.slow
def test_large_pages_open_quickly(tab, tmp_path):
    """The report of 100,000 steps, and the largest tour that is promised: the best of three, since
    a machine may have something else to do."""
    write_run(tmp_path / "long", n_steps=100_000)
    html.write(tmp_path / "r.html", run_report.build(read_runs([tmp_path / "long"])))
    journey, model = made_up_journey(12, 12, 64, T=57, n_new=8)
    html.write(tmp_path / "t.html", tour.build(journey, model, SOURCE, Settings()))
    for name, seconds in (("r.html", 2), ("t.html", 10)):
        spent = []
        for _ in range(3):
            began = time.perf_counter()
            tab.open(tmp_path / name)
            spent.append(time.perf_counter() - began)
        assert min(spent) < seconds


def test_a_printed_page_shows_every_step(tab, small_tour):
    tab.open(small_tour)
    tab.send("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.querySelectorAll('.step')].filter((s) => s.offsetHeight).length"
    assert tab.ask(shown) == 3
    tab.send("Emulation.setEmulatedMedia", media="screen")
