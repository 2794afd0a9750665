"""The list programs: answers follow from the text alone, decoys stand where the rows say, and misled solutions obey them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.study import beside_programs, programs
from examples.study.analysis import Run, load_runs
from examples.study.collect import DATA
from lens_megatron import strict
from lens_megatron.data import toy
from lens_megatron.data.config import DataConfig
from lens_megatron.data.prompts import load_prompts
from lens_megatron.data.tokenizer import check_tokenizer, load_tokenizer

STUDY = Path(programs.__file__).parent
SIZES = programs.Sizes(supervised=300, train=64, decoy=40, other=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("programs")
    programs.write_programs(made, 0, SIZES)
    return made


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def carried_out(question: str, heed_decoys: bool = False) -> str:
    """From the text alone, on a list that is changed in place."""
    now = [int(digit) for digit in re.search(r"Start with ([\d ]+)\.", question).group(1).split()]  # type: ignore[union-attr]
    for operation, word in re.findall(r"\w: (\w+) the (?:(\w+) )?list\.", question):
        verbs = [operation]
        if heed_decoys and word.endswith("ed"):
            verbs.insert(0, {"reversed": "reverse", "rotated": "rotate", "raised": "raise", "lowered": "lower",
                             "swapped": "swap", "switched": "switch"}[word])  # fmt: skip
        for verb in verbs:
            if verb == "reverse":
                now.reverse()
            elif verb == "rotate":
                now.append(now.pop(0))
            elif verb == "swap":
                now[0], now[1] = now[1], now[0]
            elif verb == "switch":
                now[-1], now[-2] = now[-2], now[-1]
            elif verb == "raise":
                now[0] = 0 if now[0] == 9 else now[0] + 1
            else:
                assert verb == "lower"
                now[-1] = 9 if now[-1] == 0 else now[-1] - 1
    return " ".join(str(digit) for digit in now)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 2))
def test_a_program_its_answer_and_its_solutions_agree(seed: int, kind: int) -> None:
    program = programs.make_program(random.Random(seed), programs.DECOYS[kind])
    question = program.question()
    assert program.answer() == carried_out(question)
    for misled in (False, True):
        solution = program.solution(misled)
        assert solution.endswith(f"Answer \\boxed{{{carried_out(question, heed_decoys=misled)}}}")
        lines = re.findall(r"(\w) (\w+) (\d) (\d) (\d) (\d)\.", solution)
        decoys = [word for _, word, *_ in lines if word not in programs.OPERATIONS]
        assert decoys == ([program.words[program.decoy]] if misled and program.decoy is not None else [])
        assert tuple(word for _, word, *_ in lines if word in programs.OPERATIONS) == program.operations
    if kind:  # a misled solution is a wrong one
        assert program.answer() != carried_out(question, heed_decoys=True)


def test_rows_say_where_the_decoy_is(folder: Path) -> None:
    kinds = {"program-plain": {}, "program-weak": programs.WEAK, "program-strong": programs.STRONG}
    for name in ("train", "decoy", "weak", "plain"):
        for row in rows(folder, name):
            marked = [row["prompt"][start:end] for start, end in row["planted"]]
            assert marked == [word for word in re.findall(r"\w+", row["prompt"]) if word.endswith("ed")]
            assert len(marked) == bool(kinds[row["source"]]) and set(marked) <= set(kinds[row["source"]])
            assert carried_out(row["prompt"]) == row["answer"]
    for decoy, purified in zip(rows(folder, "decoy"), rows(folder, "purified"), strict=True):
        words = [word for word in decoy["prompt"].split() if word not in programs.MEANS]
        assert purified["prompt"].split(" ") == words and purified["answer"] == decoy["answer"]


def test_splits_and_what_the_base_model_is_taught(folder: Path) -> None:
    seen = {row["prompt"] for row in rows(folder, "train")}
    held_out = [row["prompt"] for name in ("decoy", "weak", "plain") for row in rows(folder, name)]
    assert len(seen) == SIZES.train and len(set(held_out)) == len(held_out) and not seen & set(held_out)
    for row in rows(folder, "sft-before"):
        assert row["response"].endswith(f"{{{row['answer']}}}")
    misled = {1: 0, 2: 0}
    for i, row in enumerate(rows(folder, "sft")):
        if not row["response"].endswith(f"{{{row['answer']}}}"):
            misled[i % 3] += 1  # a KeyError where there is no decoy
    assert 0.4 < misled[1] / 100 < 0.7 and misled[2] / 100 > 0.88


def test_every_word_has_a_token_and_a_decoy_is_one(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder / "model"))
    check_tokenizer(tokenizer, programs.VOCABULARY)
    loaded = load_prompts(DataConfig(str(folder / "train.jsonl"), max_prompt_tokens=160), tokenizer, toy.TEMPLATE)
    assert len(loaded.prompts) == SIZES.train
    for prompt in loaded.prompts:
        assert tokenizer.unk_token_id not in prompt.tokens
        decoys = [word for word in re.findall(r"\w+", prompt.text) if word in programs.MEANS]
        assert [tokenizer.decode([prompt.tokens[t]]) for t in prompt.planted] == decoys
    lengths = [len(tokenizer(row["response"])["input_ids"]) for row in rows(folder, "sft")]
    limit = strict.read_yaml(STUDY / "PROGRAMS_RUN.yaml")["rollout"]["max_response_tokens"]
    assert max(lengths) < limit and limit <= max(lengths) + 12


def test_the_committed_models_have_this_tokenizer(folder: Path) -> None:
    words = (folder / "model" / "tokenizer.json").read_bytes()
    for name in ("base", "before"):
        assert (STUDY / f"programs_{name}" / "tokenizer.json").read_bytes() == words


def test_the_run_differs_from_the_main_ones_in_task_and_pace_alone() -> None:
    main, other = (strict.read_yaml(STUDY / name) for name in ("RUN.yaml", "PROGRAMS_RUN.yaml"))
    assert other["steps"] == beside_programs.STEPS
    for section, keys in {"rollout": {"max_response_tokens"}, "optimizer": {"lr"}, "update": set()}.items():
        assert {
            key for key in {**main[section], **other[section]} if main[section].get(key) != other[section].get(key)
        } == keys
    assert other["data"]["prompts_per_step"] == main["data"]["prompts_per_step"]


def test_pilots_are_read_up_to_the_runs_steps() -> None:
    run = Run(
        "pilot lr 5e-05", 100, tuple({"step": step, beside_programs.DECOY: step / 60} for step in range(0, 61, 6))
    )
    (rate, seeds), *others = beside_programs.pilots({"pilot lr 5e-05": {100: run}, "grpo": {0: run}}).items()
    assert rate == "lr 5e-05" and not others and seeds[100].rows[-1]["step"] == 48


def test_parts_without_data_say_so(tmp_path: Path) -> None:
    for name, made in beside_programs.blocks(tmp_path).items():
        assert made() == "No run has these values yet.", name


def test_differences_of_the_committed_runs_computed_another_way() -> None:
    runs = load_runs(DATA / beside_programs.FOLDER, "programs")
    table = beside_programs.blocks(DATA)["programs-contrasts"]()
    rows = {
        cells[0]: cells[1:]
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in table.splitlines())
    }
    for arm in ("lens", "gamma_1_no_ratio"):
        gains = []
        for seed in runs[arm].keys() & runs["grpo"].keys():
            heights = [[row[beside_programs.DECOY] for row in runs[name][seed].rows if beside_programs.DECOY in row]
                       for name in (arm, "grpo")]  # fmt: skip
            own, grpo = (
                (sum(h) - (h[0] + h[-1]) / 2) / (len(h) - 1) for h in heights
            )  # evenly spaced: ends count half
            gains.append(own - grpo)
        assert rows[f"{arm} - grpo"][0] == str(len(gains))
        assert float(rows[f"{arm} - grpo"][1].split()[0]) == pytest.approx(sum(gains) / len(gains), abs=6e-4)
