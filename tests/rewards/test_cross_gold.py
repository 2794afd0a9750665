"""A golden answer that passes for another problem's is a reward for anything: all pairs of a varied set, and none may."""

from __future__ import annotations

from itertools import permutations

from lens_megatron.rewards.config import RewardRule
from lens_megatron.rewards.judge import judge

# one value each; kinds that golden answers of GSM8K, MATH and the benchmarks have, close to each other on purpose
GOLDS = [
    "5", "-5", "50", "23", r"\frac{2}{3}", r"2\frac{1}{3}", r"\frac{3}{2}", "0.6667", "2.3", r"\sqrt{5}", r"5\sqrt{2}",
    r"5\pi", r"5\sqrt{3}", "5x", "x^5", "5^x", "5i", "(2,3)", "(3,2)", "[2,3]", "(2,3]", "2,3,5", r"\{2,3\} \cup \{5\}", "x>5",
    "x=23,y=5",
    r"\begin{pmatrix} 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 3 \\ 2 \end{pmatrix}", "23_5", "-23_5", "2:3", r"y = 5x + 23",
    r"\text{even}", r"\text{Ellipse}", "(A)", "(B)", r"73\%", r"74^\circ", r"75\text{ cm}", r"76\text{ cm}^2", r"\$77",
    "2^{200}", "2^{200}+1", "10^{-60}", r"\infty", r"\log 23", r"\cos 5", r"\frac{x+2}{3}", r"x+\frac{2}{3}",
]  # fmt: skip
# the same number in other units, where both units are said
MEASURES = [r"73\%", r"73^\circ", r"73\text{ cm}", r"73\text{ cm}^2", r"\$73", r"73\text{ hours}", r"73\text{ apples}"]


def test_no_golden_answer_passes_for_another() -> None:
    rule = RewardRule()
    passed = [
        (gold, other)
        for golds in (GOLDS, MEASURES)
        for gold, other in permutations(golds, 2)
        if judge(rule, gold, rf"\boxed{{{other}}}").reward > 0
    ]
    assert passed == []


def test_each_passes_for_itself() -> None:
    assert [g for g in (*GOLDS, *MEASURES) if judge(RewardRule(), g, rf"\boxed{{{g}}}").verdict != "correct"] == []
