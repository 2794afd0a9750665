"""The page in a browser: every plot drawn, no error on the console, hostile responses inert, and small enough."""

from __future__ import annotations

import dataclasses
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lens_megatron.cli import main
from lens_megatron.reporting import browser
from lens_megatron.reporting.document import embedded_json
from lens_megatron.rollout_table import RolloutRow
from lens_megatron.run_folder import RunFolder
from tests.reporting import synthetic
from tests.reporting.chromium import in_chromium
from tests.reporting.synthetic import HOSTILE, make_run

TITLES = (
    "Figure 2a: zero-reward prompts",
    "Figure 2a: zero-reward prompts, overall",
    "Figure 2b: interference scores of prompt tokens",
    "Figure 4: success",
    "Figure 4: evaluation, math500",
    "Figure 4: evaluation, average",
    "Figure 5: sampling accuracy of prompts, early, middle, late",
    "Figure 6: speed-up to the same success",
    "Figure 8: reward",
    "Figure 8: entropy",
    "Figure 8: response length",
    "Step time by phase",
    "KL to the reference",
    "Importance ratio",
    "Clip fraction",
    "Purified and improved prompts",
    "Trainer and engine",
)


class Page(HTMLParser):
    """Figures by title: how many plots and "nothing" notes each holds; scripts by type; text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, list[str]] = {}
        self.scripts: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self._inside: list[str] = []
        self._contents: list[str] = []
        self._title = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        kind = dict(attrs).get("class")
        if tag == "script":
            self.scripts.append(dict(attrs))
        if tag == "figure":
            self._contents, self._title = [], ""
        if tag in ("svg", "table") or kind == "nothing":
            self._contents.append("nothing" if kind == "nothing" else tag)
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self.figures[self._title] = self._contents
        if tag in self._inside:
            del self._inside[len(self._inside) - 1 - self._inside[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if "figure" in self._inside and self._inside[-1] == "h3":
            self._title += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make_run(folder / "lens<b>", "lens")
    make_run(folder / "grpo", "grpo", optimizer={"lr": 1e-6})
    assert main(["report", str(folder / "lens<b>"), str(folder / "grpo")]) == 0
    return folder / "lens<b>" / "report.html"


@pytest.mark.parametrize("size", ["1300,900", "400,800"])
def test_in_a_browser(page: Path, tmp_path: Path, size: str) -> None:
    dom, console = in_chromium(page, tmp_path, f"--window-size={size}")
    assert console == []
    assert 'data-ready="yes"' in dom  # the script ran to its end
    seen = Page(dom)
    for title in TITLES:
        assert "svg" in seen.figures[title] and "nothing" not in seen.figures[title], title
    assert (
        seen.figures["Figure 5: sampling accuracy of prompts, early, middle, late"] == ["svg"] * 3
    )  # lens Y, G; grpo Y
    assert all("svg" in found or "table" in found for found in seen.figures.values())
    # the browser shows the rescued prompt of the last step, its deleted tokens, and both kinds of rollouts
    shown = dom[dom.index('class="shown"') :]
    assert re.findall(r"<del [^>]*>(.*?)</del>", shown) == [" by", " the", " way"]
    assert "rgba(var(--heat), 0.800)" in shown and "Rollouts of the purified prompt (4)" in shown
    assert shown.count('class="rollout success"') == 3 and shown.count('class="rollout"') == 5
    assert HOSTILE.replace("\ud83d", "\\ud83d") in unescape(shown)
    assert "owned" not in dom[: dom.index("</title>")] and "img" not in seen.tags


def test_hover_and_choice(page: Path, tmp_path: Path) -> None:
    """As a reader would: over step 4 of Figure 4, then to the other run. (Without the policy: it refuses this script.)"""
    act = """<script>
    const chart = document.querySelector('svg[data-kind="line"]'), box = chart.getBoundingClientRect();
    const x = box.left + (54 + (3 / 5) * (408 - 54)) * box.width / 420;
    chart.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: box.top + 50}));
    const run = document.querySelector("select[name=run]");
    run.value = 1;
    run.dispatchEvent(new Event("change"));
    </script></body>"""
    copy = tmp_path / "copy.html"
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page.read_text(), flags=re.S)
    copy.write_text(without_policy.replace("</body>", act))
    dom, console = in_chromium(copy, tmp_path)
    assert console == []
    hover = dom[dom.index('<div id="hover"') :]
    assert re.findall(r"</?(?:b|span|i)[^>]*>([^<]+)", hover)[:3] == ["step 4", "lens&lt;b&gt;: 0.4", "grpo: 0.2"]
    assert "was not rolled out again" in dom[dom.index('class="shown"') :]


def test_a_mistake_in_the_script_would_be_seen(page: Path, tmp_path: Path) -> None:
    """The console check above can fail: a changed script is refused by the page's own policy, and said to be."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace('"use strict";', '"use strict"; missing();'))
    dom, console = in_chromium(broken, tmp_path)
    assert console and "data-ready" not in dom


def test_a_page_for_itself(page: Path) -> None:
    text = page.read_text()
    assert [script.get("type") for script in Page(text).scripts] == ["application/json", None]
    assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\(""", text)
    assert "<b>" not in re.sub(r"<script.*", "", text, flags=re.S)  # the run's name is text, too


def test_hostile_text_cannot_leave_its_script_element(page: Path) -> None:
    text = page.read_text()
    data = re.findall(r'<script type="application/json" id="rollouts">(.*?)</script>', text, flags=re.S)
    assert len(data) == 1 and not set("<>&") & set(data[0])
    runs = json.loads(data[0])["runs"]
    assert [run["name"] for run in runs] == ["lens<b>", "grpo"]
    assert HOSTILE.replace("\ud83d", "\\ud83d") in runs[0]["steps"][0]["prompts"][0]["rollouts"][-5]["text"]
    assert json.loads(embedded_json({"a": "</script><!--&\u2028"})) == {"a": "</script><!--&\u2028"}


def test_one_run_without_purification_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "grpo", "grpo")
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "grpo"), "--out", str(out)]) == 0
    seen = Page(out.read_text())
    for title in ("Figure 2b: interference scores of prompt tokens", "Purified and improved prompts", "Deleted tokens"):
        assert seen.figures[title] == ["nothing"]
    assert seen.figures["Figure 6: speed-up to the same success"] == ["nothing"]
    assert not (tmp_path / "grpo" / "report.html").exists()


def test_what_was_changed_when_a_run_was_resumed_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "grpo", "grpo", optimizer={"lr": 1e-6})
    assert main(["report", str(tmp_path / "grpo")]) == 0
    out = tmp_path / "grpo" / "report.html"
    assert "when a run was resumed" not in out.read_text()
    folder.begin({**folder.read_config(), "optimizer": {"lr": 2e-6}}, 4)
    assert main(["report", str(tmp_path / "grpo")]) == 0
    page = out.read_text()
    assert "Changed when a run was resumed (1)" in page
    assert re.search(r">optimizer.lr<.*?>1e-06 until step 4<.*?>2e-06<", page)


def test_a_run_of_one_bare_step(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "bare")
    folder.append_metrics({"step": 1, "reward": 0.0})
    assert main(["report", str(folder.path)]) == 0
    seen = Page((folder.path / "report.html").read_text())
    assert seen.figures["Figure 8: reward"] == ["svg"] and seen.figures["Figure 4: success"] == ["nothing"]
    assert all(found for found in seen.figures.values())


def test_the_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(step: int, lens: bool) -> list[RolloutRow]:
        return [
            dataclasses.replace(row, prompt_id=f"{row.prompt_id}-{k}", response_text="数学 " * 2000 + "END")
            for k in range(20)
            for row in rollouts(step, lens, n=16)
        ]

    rollouts = synthetic.rollouts
    monkeypatch.setattr(synthetic, "rollouts", many)
    make_run(tmp_path / "a", "lens", steps=400)
    make_run(tmp_path / "b", "grpo", steps=400)
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = (tmp_path / "a" / "report.html").read_text()
    assert 1_000_000 < len(text.encode()) < 5_000_000
    data = json.loads(re.findall(r'id="rollouts">(.*?)</script>', text, flags=re.S)[0])
    for run in data["runs"]:
        for step in run["steps"]:
            assert step["of"] == 80 and 1 <= len(step["prompts"]) <= browser.PROMPTS_A_STEP
    last = data["runs"][0]["steps"][0]["prompts"][0]["rollouts"][0]["text"]
    assert last.endswith("END") and "3,003 characters left out" in last


def test_prompts_in_the_order_of_interest(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "lens")
    entry = browser.step_entry(folder, 6, 10**9)
    assert [prompt["id"] for prompt in entry["prompts"]] == ["toy-1", "toy-0", "toy-2", "toy-3"]
    rescued = entry["prompts"][0]
    assert rescued["deleted"] == [6, 7, 8] and rescued["shares"][7] == 1 and rescued["scores"][0] is None
    assert [(one["purified"], one["index"]) for one in rescued["rollouts"]] == [
        (p, k) for p in (False, True) for k in range(4)
    ]
    assert [prompt["id"] for prompt in browser.step_entry(folder, 6, 1)["prompts"]] == ["toy-1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such run folder"),
        (["run", "--out", "no/such/folder/x.html"], "--out no/such/folder/x.html: No such file or directory"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", "grpo")
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_first_middle_last() -> None:
    assert browser.first_middle_last([]) == []
    assert browser.first_middle_last([7]) == [7]
    assert browser.first_middle_last([1, 5, 6, 9]) == [1, 6, 9]
