"""The report is one safe, self-contained page whose script works in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dynquant.analysis.plots.groups import PlanResults
from dynquant.analysis.report.page import summary_sentence, write_report
from dynquant.analysis.report.tables import evaluation_table
from dynquant.errors import PlanError, WriteError
from tests.helpers.synthetic_models import DENSE, Shape, synthetic_model

EVALUATION = {"kl": {"mean": 0.01234567, "interval": [0.011, 0.013]}, "per token": list(range(50)), "top1": 0.93}
BROWSER = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), None
)
BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def moe(drawn_moe):
    return drawn_moe.made


@pytest.fixture(scope="module")
def report(drawn_moe, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, drawn_moe.made.results, drawn_moe.files, measured=evaluation_table(EVALUATION))
    return path


def test_report_is_one_file_without_requests(report):
    text = report.read_bytes().decode("ascii")
    page = Page(text)
    assert page.open == []
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert [p.name for p in report.parent.iterdir() if p.is_file()] == ["report.html"]


def test_names_are_escaped(report):
    page = Page(report.read_text())
    assert len(page.all("script")) == 1
    assert "evil/<script>alert(1)</script>" in "".join(page.words)


def test_report_is_accessible(report):
    page = Page(report.read_text())
    assert len(page.all("h1")) == 1 and len(page.all("h2")) == 10
    assert len(page.all("img")) == 7 and all(len(image["alt"]) > 20 for image in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head.get("scope") == "col" for head in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_report_states_plan_and_provenance(moe, report):
    words = "".join(Page(report.read_text()).words)
    for entry in moe.plan.entries:
        assert entry.name in words
    expected = [moe.plan.hash, moe.plan.fingerprint, "preset r1-iq1_s", f"{moe.plan.predicted_bytes:,} bytes", "a" * 64]
    expected += ["calibration.jsonl", "200,000 tokens", "holds a super weight", "0.012346", "50 values", "1229", "-900"]
    for text in expected:
        assert text in words, text
    assert f"{moe.plan.bits_per_weight:.3f}" in words


def test_absent_plots_are_named(tmp_path):
    made = synthetic_model(Shape(layers=2, hidden=256))
    write_report(tmp_path / "r.html", PlanResults(made.plan), {})
    words = "".join(Page((tmp_path / "r.html").read_text()).words)
    assert words.count("Not drawn: this plot needs") == 7 and "this model has none" in words


def test_summary_sentence_of_mixed_and_plain_plans(moe):
    sentence = summary_sentence(moe.plan)
    assert sentence.startswith("Routed gate/up and routed down (9 of 10 tensors) crushed to 1.6")
    assert "attention" in sentence.split("; ", 1)[1]
    assert summary_sentence(synthetic_model(DENSE).plan).startswith("Nothing is crushed")


def test_refusals(tmp_path, moe):
    other = moe.table.model_copy(update={"fingerprint": "e" * 64})
    with pytest.raises(PlanError, match="eeee"):
        write_report(tmp_path / "r.html", PlanResults(moe.plan, other, moe.stats), {})
    (tmp_path / "r.html").mkdir()
    with pytest.raises(WriteError, match="could not be written"):
        write_report(tmp_path / "r.html", PlanResults(moe.plan, moe.table, moe.stats), {})


def browse(tmp_path, *arguments: str) -> str:
    command = [BROWSER, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.nightly
@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")
def test_browser_draws_the_page(report, tmp_path):
    picture = tmp_path / "page.png"
    browse(tmp_path, f"--screenshot={picture}", "--window-size=1280,4000", report.as_uri())
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (4000, 1280, 3)
    thirds = [pixels[:1300], pixels[1300:2600], pixels[2600:]]
    assert all(part.std() > 20 for part in thirds)
    red = (pixels[..., 0] > 140) & (pixels[..., 1] < 30) & (pixels[..., 2] < 60)
    assert red.sum() > 5000, "crushed cells of the plan map are drawn, so embedded plots are not blocked"


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")
def test_browser_runs_the_script(moe, report, tmp_path):
    document = browse(tmp_path, "--dump-dom", report.as_uri() + "#sort=6-down")
    page = Page(document[document.index("<html") :])
    num_sortable = sum("data-sortable" in table for table in page.all("table"))
    assert page.all("html")[0]["data-ready"] == str(num_sortable) and num_sortable >= 4
    assert len([link for link in page.all("a") if link["href"].startswith("#")]) == 10
    body = document[document.index('id="plan"') :]
    assert 'aria-sort="descending"' in body
    first = re.search(r"<tbody>\s*<tr><td>([^<]+)</td>", body).group(1)
    largest = max(entry.bytes for entry in moe.plan.entries)
    assert next(entry.bytes for entry in moe.plan.entries if entry.name == first) == largest
