"""`longcat inspect`: the text in colours, the figures, and the page, which is looked at in a real browser."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page, sync_playwright
from tokenizers import Tokenizer
from typer.testing import CliRunner, Result

from longcat_cli import example_tokenizer, loading
from longcat_cli.commands import app
from longcat_cli.inspection_report import Colours, Held, Report, _shade, pieces, si
from longcat_core.inspection import Inspection, held, inspect
from longcat_core.planning.imbalance import read_counts
from longcat_core.reference import LongcatForCausalLM
from longcat_core.weights.checkpoint import read_config
from tests.cases import DEFAULT, published, write_checkpoint

TEXT = 'def area(width, height):\n    return width * height  # <b>龙猫</b> & "co"\n'
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
"""No sandbox, as a container's root has none; no calls home."""


def run(directory: Path, text: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["inspect", str(directory), "--text", str(text), *options])


def assert_refused(result: Result, complaint: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("longcat inspect: ")
    assert re.search(complaint, result.stderr), result.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "area.py"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def found(source: Path) -> Inspection:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    return inspect(LongcatForCausalLM.from_checkpoint(source), tokenizer.encode(TEXT).ids)


def test_the_text_is_shown_whole_with_its_figures(source: Path, text: Path, found: Inspection) -> None:
    result = run(source, text)
    assert result.exit_code == 0, result.output
    shown = result.stdout.replace("⏎\n", "\n")
    assert shown.startswith(TEXT)
    activated = found.activated_parameters(DEFAULT)
    assert re.search(rf"tokens +{len(found.tokens)}\b", shown)
    assert f"mean {found.ffn_experts.double().mean():.2f} of {DEFAULT.moe_topk} choices" in shown
    assert f"mean {si(float(activated.mean()))}, p5 {si(float(activated.quantile(0.05)))}" in shown
    assert f"{found.draft_acceptance():.1%}" in shown


def test_a_text_of_a_token_or_two_has_no_place_with_a_draft(source: Path, text: Path) -> None:
    assert "no drafts" in run(source, text, "--tokens", "2").stdout


def test_a_terminal_obeys_nothing_in_the_text(source: Path, text: Path) -> None:
    text.write_text("a\x1b]0;evil\x07b\x1b[2Jc", encoding="utf-8")
    shown = run(source, text).stdout
    assert shown.startswith("a�]0;evil�b�[2Jc")
    assert "\x1b" not in shown


def test_a_text_is_read_with_the_ends_of_lines_that_it_has(source: Path, text: Path) -> None:
    text.write_bytes("a\r\nb\rc\u3000d".encode())
    result = run(source, text)
    assert result.stdout.startswith("a␍⏎\nb␍c\u3000d\n")
    tokens = Tokenizer.from_file(str(source / "tokenizer.json")).encode("a\r\nb\rc\u3000d").ids
    assert re.search(rf"tokens +{len(tokens)}\b", result.stdout)


def test_only_the_beginning_is_read_where_that_is_asked_for(source: Path, text: Path, found: Inspection) -> None:
    result = run(source, text, "--tokens", "9")
    assert re.search(rf"tokens +9, the first of {len(found.tokens)}\b", result.stdout)
    assert not result.stdout.replace("⏎\n", "\n").startswith(TEXT)


def test_a_text_longer_than_the_context_is_read_to_its_end(source: Path, text: Path) -> None:
    text.write_text(TEXT * 50, encoding="utf-8")
    result = run(source, text)
    assert result.exit_code == 0, result.output
    assert f"{DEFAULT.max_position_embeddings:,}, the first of" in result.stdout


def test_a_checkpoint_without_an_mtp_layer_has_no_drafts_to_show(source: Path, text: Path, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", DEFAULT, published(DEFAULT, with_mtp=False))
    shutil.copy(source / "tokenizer.json", directory)
    page = tmp_path / "page.html"
    result = run(directory, text, "--html", str(page))
    assert "no draft layer (MTP)" in result.stdout
    assert 'id="drafts"' not in page.read_text(encoding="utf-8")


def report(found: Inspection, source: Path) -> Report:
    encoding = Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT)
    return Report("model", "area.py", DEFAULT, found, pieces(TEXT, encoding.offsets), len(encoding.ids))


def test_more_ffn_experts_are_a_darker_shade(found: Inspection, source: Path) -> None:
    shown = report(found, source).taken
    for layer in (None, 0, 1):
        darkness = [-int(shade.background[1:3], 16) for shade in shown.shades(layer)]
        by_value: dict[float, set[int]] = {}
        for value, shade in zip(shown.values(layer).tolist(), darkness, strict=True):
            by_value.setdefault(value, set()).add(shade)
        assert all(len(shades) == 1 for shades in by_value.values())
        ordered = [by_value[value].pop() for value in sorted(by_value)]
        assert ordered == sorted(ordered)
        assert ordered[0] < ordered[-1]


def test_letters_stand_out_from_their_ground(found: Inspection, source: Path) -> None:
    """At 4.5 to 1 or more, as WCAG 2 has it for text."""

    def luminance(colour: str) -> float:
        channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for shade in [_shade(step / 100) for step in range(101)]:
        ground, letters = sorted((luminance(shade.background), luminance(shade.text)))
        assert (letters + 0.05) / (ground + 0.05) >= 4.5


def test_the_scale_tells_its_values_apart(found: Inspection, source: Path) -> None:
    narrow = found._replace(ffn_experts=torch.tensor([[792, 812], [793, 811]]))
    for inspection in (found, narrow):
        for layer in (None, 0, 1):
            values = [value for value, _ in report(inspection, source).taken.scale(layer)]
            assert len(set(values)) == len(values)
            assert [float(value) for value in values] == sorted(map(float, values))
            steps = [float(after) - float(value) for value, after in pairwise(values)]
            assert max(steps) < 1.4 * min(steps)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(31.3e9, "31.3 B"), (9.996e8, "1 B"), (999_600, "1 M"), (4_020_000, "4.02 M"), (999.4, "999"), (0, "0")],
)
def test_numbers_are_shown_with_three_digits(number: float, shown: str) -> None:
    assert si(number) == shown


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_the_pieces_are_the_text(source: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    encoding = tokenizer.encode(text)
    found = pieces(text, encoding.offsets)
    assert "".join(found) == text
    assert len(found) == len(encoding.ids)


# -- the page ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser_page(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of `TEXT` in Chromium; it may call nobody, and must not complain."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium; install Debian's package `chromium`, as .ci/run does")
    folder = tmp_path_factory.mktemp("page")
    (folder / "area.py").write_text(TEXT, encoding="utf-8")
    result = run(source, folder / "area.py", "--html", str(folder / "page.html"))
    assert result.exit_code == 0, result.output
    called: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page()
        page.on("request", lambda request: called.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((folder / "page.html").as_uri())
        yield page
        browser.close()
    assert called == [(folder / "page.html").as_uri()]
    assert complaints == []


def backgrounds(page: Page) -> list[str]:
    script = "all => all.map(token => getComputedStyle(token).backgroundColor)"
    colours: list[list[str]] = [
        re.findall(r"\d+", colour) for colour in page.locator("#text span").evaluate_all(script)
    ]
    return ["#" + "".join(f"{int(channel):02x}" for channel in colour) for colour in colours]


def test_the_page_has_the_text_and_the_figures(browser_page: Page, found: Inspection, source: Path) -> None:
    assert (browser_page.locator("#text").text_content() or "").replace("⏎\n", "\n") == TEXT
    assert browser_page.title() == "area.py in model"
    shown = dict(
        zip(browser_page.locator("dt").all_text_contents(), browser_page.locator("dd").all_text_contents(), strict=True)
    )
    assert shown == dict(report(found, source).facts())


def test_the_page_is_coloured_by_the_mean_or_the_layer_that_is_chosen(
    browser_page: Page, found: Inspection, source: Path
) -> None:
    wanted = {name: [s.background for s in report(found, source).taken.shades(layer)] for name, layer in VIEWS.items()}
    assert backgrounds(browser_page) == wanted["mean"]
    for name in ("layer 1", "layer 0", "mean"):
        browser_page.get_by_role("button", name=name, exact=True).click()
        assert backgrounds(browser_page) == wanted[name]
        pressed = browser_page.locator('[data-view][aria-pressed="true"]')
        assert pressed.all_text_contents() == [name]
    assert wanted["layer 0"] != wanted["layer 1"]


VIEWS: dict[str, int | None] = {"mean": None, "layer 0": 0, "layer 1": 1}


def test_the_page_shows_the_drafts_when_asked(browser_page: Page, found: Inspection) -> None:
    assert found.drafts is not None
    wanted = ["none", "none", *("accepted" if each else "rejected" for each in found.drafts[2:].tolist())]
    assert browser_page.locator("#text span").evaluate_all("all => all.map(each => each.className)") == wanted
    under = "all => all.map(token => parseFloat(getComputedStyle(token).borderBottomWidth) > 0)"
    assert not any(browser_page.locator("#text span").evaluate_all(under))
    browser_page.get_by_role("button", name="drafts").click()
    assert browser_page.locator("#text span").evaluate_all(under) == [each != "none" for each in wanted]


def test_a_tokens_numbers_are_in_its_title(browser_page: Page, found: Inspection) -> None:
    title = browser_page.locator("#text span").nth(3).get_attribute("title") or ""
    counts = found.ffn_experts[:, 3].tolist()
    assert f"FFN experts layer 0: {counts[0]}, layer 1: {counts[1]}; " in title
    assert title.endswith(("draft accepted", "draft rejected"))
    browser_page.locator("#text span").nth(3).hover()
    assert browser_page.locator("#numbers").text_content() == title
    browser_page.locator("#text span").nth(0).focus()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        browser_page.keyboard.press(key)
        shown = browser_page.locator("#text span").nth(place).get_attribute("title")
        assert browser_page.locator("#numbers").text_content() == shown


def test_the_charts_are_drawn_within_the_page(browser_page: Page, found: Inspection) -> None:
    assert browser_page.locator("svg").count() == 1 + DEFAULT.num_layers
    assert browser_page.locator("svg").nth(1).locator("rect").count() == DEFAULT.n_routed_experts
    width = browser_page.evaluate("document.documentElement.clientWidth")
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= width
    heights = browser_page.locator("svg rect").evaluate_all("all => all.map(bar => bar.getBBox().height)")
    assert min(heights) >= 0
    assert max(heights) > 10


def test_the_choices_are_recorded_for_a_plan(source: Path, text: Path, found: Inspection, tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    assert str(file) in run(source, text, "--record", str(file)).stdout.replace("\n", "")
    assert json.loads(file.read_text()) == {"logical_count": found.load.tolist()}
    assert read_counts(file) == found.load.tolist()


# -- where the mean is held ----------------------------------------------------------------------------


HELD = ["--ffn-experts", "1.5"]


@pytest.fixture(scope="module")
def held_at(source: Path) -> Inspection:
    model = LongcatForCausalLM.from_checkpoint(source)
    tokens = Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
    with held(model, 1.5):
        return inspect(model, tokens)


def test_a_text_is_coloured_by_what_a_lower_mean_takes_from_each_token(
    source: Path, text: Path, found: Inspection, held_at: Inspection
) -> None:
    result = run(source, text, *HELD)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(TEXT.replace("\n", "⏎\n"))
    assert "FFN experts that 1.5 take away, mean of the layers: " in result.stdout
    assert re.search(r"held at 1.5 +mean 1.5\d in every layer", result.stdout)
    nats = [f"{float(each.nats[1:].mean()):.3f}" for each in (held_at, found)]
    assert f"{nats[0]}, as published {nats[1]}" in result.stdout
    held_report = replace(report(found, source), held=Held(1.5, held_at, [0.0, 0.0]))
    assert held_report.taken_away is not None
    less = (found.ffn_experts - held_at.ffn_experts).double()
    assert torch.equal(held_report.taken_away.values(None), less.mean(dim=0))
    assert len(less.unique()) > 2, "it takes from tokens differently"


def test_the_page_has_a_view_of_what_is_taken_away(
    source: Path, text: Path, found: Inspection, held_at: Inspection, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert run(source, text, "--html", str(page), *HELD).exit_code == 0
    written = page.read_text(encoding="utf-8")
    views = json.loads(re.findall(r"const views = (.*);\n", written)[0])
    assert views.keys() == {"taken away", *VIEWS}
    colours = Colours(found.ffn_experts - held_at.ffn_experts)
    assert [shade[0] for shade in views["taken away"]["shades"]] == [each.background for each in colours.shades(None)]
    assert views["mean"] != views["taken away"]
    counts = held_at.ffn_experts[:, 3].tolist()
    assert f"; held at 1.5: layer 0: {counts[0]}, layer 1: {counts[1]}; " in written


def test_a_mean_that_cannot_be_held_is_refused(source: Path, text: Path) -> None:
    assert_refused(run(source, text, "--ffn-experts", "4"), "--ffn-experts: 4, wanted more than 0 and less than 4, the")
    short = run(source, text, "--ffn-experts", "0.2", "--tokens", "1")
    assert_refused(short, "--ffn-experts: a mean of 0.2 FFN experts: no bias .* for these tokens; give a longer text")


# -- what is refused -----------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert_refused(run(source, tmp_path / "absent.py", "--html", str(page)), "No such file.*absent.py")
    assert_refused(run(tmp_path / "absent", text, "--html", str(page)), "absent/config.json: no such file")
    text.write_bytes(b"\xff\xfe")
    assert_refused(run(source, text, "--html", str(page)), "area.py: not UTF-8")
    text.write_bytes(b"")
    assert_refused(run(source, text, "--html", str(page)), "area.py: no tokens, wanted a text")
    assert not page.exists()


def test_what_is_no_utf_8_is_refused_or_shown_as_such(source: Path, text: Path, tmp_path: Path) -> None:
    named, page = tmp_path / os.fsdecode(b"caf\xe9.py"), tmp_path / "page.html"
    shutil.copy(text, named)
    assert run(source, named, "--html", str(page)).exit_code == 0
    assert "<title>caf\N{REPLACEMENT CHARACTER}.py in" in page.read_text(encoding="utf-8")
    directory = Path(shutil.copytree(source, tmp_path / "model"))
    (directory / "config.json").write_bytes(b'{"hidden_size": "caf\xe9"}')
    assert_refused(run(directory, text), "config.json: not JSON")


def test_a_layer_that_is_not_there_is_refused(source: Path, text: Path) -> None:
    assert_refused(run(source, text, "--layer", "2"), "--layer: 2, wanted 0 to 1; the model has 2")


def test_another_models_tokenizer_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(source, tmp_path / "model"))
    example_tokenizer.write(directory, 1000, DEFAULT.max_position_embeddings)
    assert_refused(run(directory, text), r"tokenizer.json: token \d+ in .*area.py, wanted below the vocabulary of 320")


def test_a_model_that_memory_cannot_hold_is_refused(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.os, "sysconf", lambda name: 1)
    assert read_config(source).total_parameters > 1
    assert_refused(run(source, text), "GB to load it in float32, and this machine has 0 GB of memory")


def test_the_pages_data_cannot_end_its_script(source: Path, tmp_path: Path) -> None:
    """The text is the user's, or somebody else's."""
    path = tmp_path / "evil.html"
    path.write_text("</script><script>alert(1)</script>", encoding="utf-8")
    page = tmp_path / "page.html"
    assert run(source, path, "--html", str(page)).exit_code == 0
    written = page.read_text(encoding="utf-8")
    assert written.count("<script>") == 1
    assert json.loads(re.findall(r"const views = (.*);\n", written)[0]).keys() == VIEWS.keys()
