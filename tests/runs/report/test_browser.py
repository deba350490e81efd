"""The page in a real browser: it opens without an error, fetches nothing, sorts, and can be read by everyone.

Skipped where there is no Chromium (Debian's package); axe-core's rules where its npm package is neither in
node_modules nor named by AXE_CORE, the path of axe.min.js.
"""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from jaxft.runs.report.writing import write_report
from tests.runs.report.browser import CHROMIUM, browser
from tests.runs.report.made import HOSTILE, compared, made

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
WIDE, PHONE = 1280, 390
COLUMN = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[{}].innerText.split('\\n')[0])"


@pytest.fixture(scope="module")
def tab():
    with browser() as found:
        yield found


@pytest.fixture(scope="module", params=["run", "runs", "comparison"])
def page(request, tmp_path_factory):
    """A page of one run, of several with hostile texts, and of a comparison."""
    folder = tmp_path_factory.mktemp(request.param)
    places = [
        compared(folder / "which") if request.param == "comparison" else made(folder / "lora")
    ]
    if request.param == "runs":
        places += [
            made(folder / "<img src=x onerror=alert(1)>", "dora", **{"data.train": HOSTILE[:-2]}),
            made(folder / "vera", "vera", steps=7),
            made(folder / "dpo", recipe="dpo"),
        ]
    write_report(folder / "page.html", places)
    return folder / "page.html"


def test_opens_without_an_error_and_fetches_nothing(tab, page):
    tab.open(page)
    told = tab.told("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not told
    requests = {event["request"]["url"] for event in tab.told("Network.requestWillBeSent")}
    assert requests == {page.as_uri()}
    assert tab.evaluate("document.title") != "owned"


def test_its_policy_lets_no_other_script_run(tab, page):
    tab.open(page)
    tab.evaluate(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    )
    assert tab.evaluate("document.title") != "1"
    assert "Content Security Policy" in str(tab.told("Log.entryAdded"))


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_nothing_sticks_out_at_any_width(tab, page, width):
    tab.open(page, width)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    letters = "[...document.querySelectorAll('svg[role=img]')].filter(s => s.getBoundingClientRect().width)"
    outside = (
        letters + ".flatMap(s => [...s.querySelectorAll('text')].filter(t => {"
        "const a = t.getBoundingClientRect(), b = s.getBoundingClientRect();"
        "return a.left < b.left - 2 || a.right > b.right + 2 || a.bottom > b.bottom + 2}).map(t => t.textContent))"
    )
    assert tab.evaluate(outside) == []


def test_looks_another_way_on_a_phone_and_in_the_dark(tab, page, tmp_path):
    pictures = {}
    for name, width, scheme in (
        ("wide", WIDE, "light"),
        ("phone", PHONE, "light"),
        ("dark", WIDE, "dark"),
    ):
        tab.open(page, width, scheme=scheme)
        pictures[name] = matplotlib.image.imread(tab.screenshot(tmp_path / f"{name}.png"))[..., :3]
    assert pictures["wide"].shape[1] == WIDE
    assert pictures["phone"].shape[1] == PHONE
    assert pictures["phone"].shape[0] > pictures["wide"].shape[0]  # stacked
    for picture in pictures.values():
        assert len(np.unique((picture * 8).astype(int).reshape(-1, 3), axis=0)) > 20
    assert pictures["wide"].mean() > 0.8
    assert pictures["dark"].mean() < 0.3


def test_heads_sort_by_click_and_by_keyboard(tab, page):
    tab.open(page)
    heads = tab.evaluate(
        "[...document.querySelectorAll('table.sortable thead th')].map(h => h.innerText)"
    )
    column = next(i for i, head in enumerate(heads) if head.startswith("trained parameters"))
    if not tab.evaluate("document.querySelectorAll('table.sortable button').length"):
        assert page.parent.name.startswith("run0")  # one row is not sorted
        return
    before = tab.evaluate(COLUMN.format(0))
    button = (
        f"document.querySelectorAll('table.sortable thead th')[{column}].querySelector('button')"
    )
    orders = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => Number(r.cells[{}].dataset.order))"
    tab.evaluate(f"{button}.click()")
    rising = tab.evaluate(orders.format(column))
    assert rising == sorted(rising)
    tab.evaluate(f"{button}.focus()")
    tab.press("Enter", 13)
    falling = tab.evaluate(orders.format(column))
    assert falling == sorted(falling, reverse=True)
    sort = tab.evaluate(f"{button}.closest('th').getAttribute('aria-sort')")
    assert sort == "descending"
    assert "falling" in tab.evaluate("document.getElementById('said').textContent")
    tab.evaluate("document.querySelector('table.sortable thead button').click()")
    assert tab.evaluate(COLUMN.format(0)) == sorted(before, key=str.lower)


def test_one_cost_is_shown_at_a_time_and_chosen_by_keyboard(tab, page):
    tab.open(page)
    shown = "[...document.querySelectorAll('.choice figure')].map(f => getComputedStyle(f).display)"
    if not tab.evaluate("document.querySelectorAll('.choice').length"):
        assert page.parent.name.startswith("run0")
        return
    assert tab.evaluate(shown)[0] == "block"
    assert set(tab.evaluate(shown)[1:]) == {"none"}
    tab.evaluate("document.querySelector('.choice input').focus()")
    tab.press("ArrowRight", 39)
    assert tab.evaluate(shown)[:2] == ["none", "block"]


def test_is_printed_in_full(tab, page):
    tab.open(page)
    assert tab.printed().startswith(b"%PDF")
    tab.open(page, medium="print", scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "[...document.querySelectorAll('.choice figure')].filter(f => getComputedStyle(f).display == 'none')"
    assert tab.evaluate(f"{hidden}.length") == 0


@pytest.mark.skipif(not AXE.is_file(), reason="needs the npm package axe-core")
@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "dark"), (PHONE, "light")])
def test_axe_finds_nothing(tab, page, width, scheme):
    tab.open(page, width, scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    tab.evaluate(AXE.read_text() + ";0")
    found = (
        "r.violations.map(v => v.id + ': ' + v.nodes.map(n => n.html.slice(0, 200)).join(' | '))"
    )
    assert tab.evaluate(f"axe.run().then(r => {found})") == []
    assert tab.evaluate("axe.run().then(r => r.passes.length)") > 20
