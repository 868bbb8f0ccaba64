"""The report: self-contained, and nothing in it is taken for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from smidgen.evaluation.report import curve, render, write_report

LOG = [
    {"step": 10, "loss": 3.0, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 300.0},
    {"step": 20, "loss": 2.0, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 320.0, "eval_loss": 2.5},
]
EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"
PROOF = {
    "passed": False,
    "checks": [{"name": "loss", "passed": False, "text": EVIL, "numbers": {}}],
    "samples": [{"prompt": EVIL, "reference": EVIL, "before": "", "after": EVIL}],
}


class Page(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_refers_to_nothing_outside_and_runs_nothing():
    page = render(EVIL, EVIL, LOG, {EVIL: EVIL}, PROOF)
    parsed = Page(page)
    assert parsed.open == []
    assert not {"script", "img", "link", "iframe", "object"} & set(parsed.tags)
    assert not {"src", "href", "onerror"} & set(parsed.attributes)
    assert not re.search(r"https?:|url\(|@import", page)
    assert page.count("&lt;script&gt;") >= 6
    assert "failed" in page


def test_the_curve_has_both_losses_where_they_belong():
    drawn = curve(LOG, "loss")
    train = re.search(r'<polyline class="train" points="([^"]+)"', drawn)
    held = re.search(r'<circle class="held" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert train and held
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in train[1].split())
    assert x0 < x1 == float(held[1])
    assert y0 < float(held[2]) < y1  # the lower the loss, the further down
    assert "No step" in curve([], "loss")


def test_the_report_is_made_from_the_run_folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: x\n", encoding="utf-8")
    (tmp_path / "environment.json").write_text('{"torch": "2.0"}', encoding="utf-8")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG), encoding="utf-8")
    (tmp_path / "proof.json").write_text(json.dumps(PROOF), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "model: x" in page and "320 tokens/s" in page
