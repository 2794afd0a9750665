r"""Hand-written pairs: kind, golden answer, response, and whether a careful teacher would call it correct.

FALSE_NEGATIVES are right answers that the grader refuses: it errs on that side. A pair moves out of there when it
is taught; nothing may ever be judged correct that is marked False.
"""

from __future__ import annotations

from tests.rewards import pairs_expressions, pairs_numbers, pairs_text

PAIRS = [*pairs_numbers.PAIRS, *pairs_expressions.PAIRS, *pairs_text.PAIRS]

FALSE_NEGATIVES: list[tuple[str, str, str]] = [
    ("set", r"\{1\}", r"\boxed{1}"),
    ("several", "1,-2", r"\boxed{(1,-2)}"),
    ("tuple", "(3,2)", r"\boxed{x=3, y=2}"),
    ("degree", r"30^\circ", r"\boxed{\frac{\pi}{6}}"),
    ("base", "2:3", r"\boxed{4:6}"),
    ("unit", "5000000", r"\boxed{5 \text{ million}}"),
    ("expression", r"\ln x", r"\boxed{\log x}"),
    ("around", "5", "The answer is 5 because 2 + 3 is 5."),
]
