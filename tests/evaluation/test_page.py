"""The page of an evaluation in a browser: every answer reachable, hostile ones inert, nothing on the console."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lens_megatron.evaluation.page import evaluation_page
from lens_megatron.evaluation.results import model_result
from tests.evaluation.test_results import a_set, answered
from tests.reporting import synthetic
from tests.reporting.chromium import in_chromium

HOSTILE = synthetic.HOSTILE.replace("\ud83d", "")  # chromium ends itself when it prints half a character


def test_in_a_browser(tmp_path: Path) -> None:
    one, two = a_set("aime24", 2, 30), a_set("math500", 1, 45, 500)
    prompts = (replace(one.prompts[0], text=HOSTILE, answer=HOSTILE), *one.prompts[1:])
    one = replace(one, prompts=prompts)
    answers = answered(one, [[1, 0]] * 30) | answered(two, [[0]] * 45)
    answers = {key: replace(answer, response=HOSTILE, extracted=HOSTILE) for key, answer in answers.items()}
    results = [model_result(name, step, [one, two], answers, 0.95) for name, step in (("step 0", 0), ("step <b>", 5))]
    page = tmp_path / "page.html"
    page.write_text(evaluation_page(results, {"seed": 0}, ("step <b>", [one, two], answers)), encoding="utf-8")
    dom, console = in_chromium(page, tmp_path)
    assert console == []
    assert 'data-ready="yes"' in dom and 'data-answers="yes"' in dom
    assert dom.count('class="problem"') == 20 and dom.count('class="rollout success"') == 20
    assert dom.count("<svg") == 3  # two curves and their average
    assert "<b>&lt;" not in dom and "step &lt;b&gt;" in dom
    assert "30 of 30 problems" in dom and "aime24/29" in page.read_text() and "math500/44" in page.read_text()
