"""From rows to prompts: the question's tokens, the filter, and an order that resumes."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lens_megatron.data.config import DataConfig, SupervisedDataConfig
from lens_megatron.data.order import PromptOrder, epoch_order
from lens_megatron.data.prompts import PromptStream, encode_prompts, first_prompt, load_prompts
from lens_megatron.data.rows import Message, Row
from lens_megatron.data.supervised import load_supervised
from lens_megatron.data.template import Template
from lens_megatron.data.tokenizer import check_tokenizer, load_tokenizer, stop_tokens
from lens_megatron.errors import UsageError
from lens_megatron.model_spec import load_model_config

from .tokenizers import byte_level

BOXED = "<|im_start|>user\n{problem}\nPlease reason step by step.<|im_end|>\n<|im_start|>assistant\n"
CHAT = "chat"
BARE = "{problem}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_level(tmp_path_factory.mktemp("bpe"))


def row(question: str, *before: Message) -> Row:
    return Row("r", (*before, Message("user", question)), "1", "", "f.jsonl:1")


def pieces(tokenizer: Any, tokens: tuple[int, ...], span: tuple[int, int]) -> tuple[str, str, str]:
    decode = lambda ids: tokenizer.decode(ids)  # noqa: E731
    return decode(tokens[: span[0]]), decode(tokens[slice(*span)]), decode(tokens[span[1] :])


@pytest.mark.parametrize("template", [BOXED, CHAT, BARE])
def test_planted_noise_is_found_among_the_tokens(tokenizer: Any, template: str) -> None:
    text = "  Anna nearly sells 7 pears, supposedly.  "  # chat templates strip it
    spans = tuple((text.index(word), text.index(word) + len(word)) for word in ("nearly", "supposedly"))
    (encoded,) = Template(tokenizer, template).encode([replace(row(text), planted=spans)])
    assert tokenizer.decode([encoded.tokens[t] for t in encoded.planted]).split() == ["nearly", "supposedly"]
    (plain,) = Template(tokenizer, template).encode([row(text)])
    assert plain.planted == () and plain.tokens == encoded.tokens


@pytest.mark.parametrize("template", [BOXED, CHAT, "Question: {problem}\nAnswer:", BARE])
@pytest.mark.parametrize(
    "question",
    ["How many clips did Natalia sell?", "user", "assistant\nsystem", "Größe der 数 Menge", "x", "  padded question  "],
)
def test_the_span_is_the_question_and_nothing_else(tokenizer: Any, template: str, question: str) -> None:
    (encoded,) = Template(tokenizer, template).encode([row(question)])
    before, inside, after = pieces(tokenizer, encoded.tokens, encoded.question)
    rendered = question.strip() if template == CHAT else question
    around = "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n" if template == CHAT else template
    assert before + inside + after == around.replace("{problem}", rendered)
    # at most the last characters may be in a token that the question shares with the template
    assert inside.lstrip(" ") and rendered.lstrip(" ").startswith(inside.lstrip(" "))
    assert len(rendered.lstrip(" ")) - len(inside.lstrip(" ")) <= 2
    assert encoded.text == question


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aN \n.?<|>im_startuserß数0", min_size=1, max_size=40), st.sampled_from([BOXED, CHAT]))
def test_span_of_any_question(tokenizer: Any, question: str, template: str) -> None:
    assume(question.strip())
    try:
        (encoded,) = Template(tokenizer, template).encode([row(question)])
    except UsageError as error:
        assert "no token of the question" in str(error)
        return
    before, inside, _ = pieces(tokenizer, encoded.tokens, encoded.question)
    template_before = "<|im_start|>user\n"
    assert before.startswith(template_before)
    shared = before.removeprefix(template_before)  # characters of the question in a token with the template's newline
    assert not shared.strip() and len(shared) <= 2
    assert any(text.startswith(shared + inside) for text in (question, question.strip()))


def test_the_token_that_begins_every_text_is_there_once(tmp_path: Path) -> None:
    """Llama's tokenizers add one; a chat template writes its own."""
    from tokenizers.processors import TemplateProcessing

    llama = byte_level(tmp_path)
    llama.bos_token = "<|im_start|>"
    begin = llama.bos_token_id
    llama.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    assert llama("x")["input_ids"][0] == begin
    for template in (BARE, "Question: {problem}\nAnswer:", "<|im_start|>{problem}", CHAT):
        (encoded,) = Template(llama, template).encode([row("How many clips?")])
        assert encoded.tokens[0] == begin and encoded.tokens[1] != begin, template
        assert pieces(llama, encoded.tokens, encoded.question)[1].strip() == "How many clips?"


def test_the_chat_template_keeps_turns_and_marks_the_last_question(tokenizer: Any) -> None:
    turns = (Message("system", "Be brief."), Message("user", "1+1?"), Message("assistant", "2"))
    (encoded,) = Template(tokenizer, CHAT).encode([row("1+1?", *turns)])
    before, inside, after = pieces(tokenizer, encoded.tokens, encoded.question)
    assert inside == "1+1?"
    assert before.count("1+1?") == 1 and before.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert after == "<|im_end|>\n<|im_start|>assistant\n"


def test_templates_that_cannot_work(tokenizer: Any) -> None:
    for bad in ("no slot", "{problem} {problem}"):
        with pytest.raises(UsageError, match="once"):
            Template(tokenizer, bad)
    turns = (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(UsageError, match=r"f.jsonl:1: several turns"):
        Template(tokenizer, BOXED).encode([row("c", *turns)])


@pytest.mark.parametrize("style", ["llama3", "plain"])
def test_prompts_do_not_change_overnight(tokenizer: Any, style: str) -> None:
    """A run that goes on after midnight would be refused: its prompts were others."""
    today = {
        "llama3": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}\n",
        "plain": "Today: {{ strftime_now('%d %b %Y') }}\n",
    }
    dated = deepcopy(tokenizer)
    dated.chat_template = today[style] + tokenizer.chat_template
    asked = [{"role": "user", "content": "x"}]
    assert not dated.apply_chat_template(asked, tokenize=False).startswith(
        "Today: 26 Jul 2024"
    )  # it would write the day
    assert Template(dated, CHAT).render(row("x")).text.startswith("Today: 26 Jul 2024\n<|im_start|>")


def test_a_chat_template_that_rewrites_the_question_is_refused(tokenizer: Any) -> None:
    changed = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    changed.chat_template = "{{ messages[-1]['content'] | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(UsageError, match="place cannot be told"):
        Template(changed, CHAT).encode([row("one two")])
    changed.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        Template(changed, CHAT)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_long_prompts_are_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [{"prompt": "a " * n, "answer": n} for n in (1, 40, 3, 60)])
    loaded = load_prompts(DataConfig(source, max_prompt_tokens=30), tokenizer, BARE)
    assert [prompt.answer for prompt in loaded.prompts] == ["1", "3"]
    assert loaded.too_long == 2
    with pytest.raises(
        UsageError, match=r"all 4 prompts are longer than data.max_prompt_tokens=1 \(the shortest has 2\)"
    ):
        load_prompts(DataConfig(source, max_prompt_tokens=1), tokenizer, BARE)


def test_system_messages_without_a_place_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    source = write(tmp_path / "d.jsonl", [{"prompt": chat, "answer": 1}, {"prompt": "q", "answer": 1}])
    assert load_prompts(DataConfig(source), tokenizer, BARE).systems_dropped == 1
    assert load_prompts(DataConfig(source, template=CHAT), tokenizer, BARE).systems_dropped == 0


def test_the_template_may_be_a_shipped_models(tokenizer: Any, tmp_path: Path) -> None:
    text = load_model_config("qwen3-8b-base").template
    source = write(tmp_path / "d.jsonl", [{"prompt": "q", "answer": 1, "response": "1"}])
    loaded = load_prompts(DataConfig(source, template="qwen3-8b-base"), tokenizer, BARE)
    assert tokenizer.decode(loaded.prompts[0].tokens) == text.replace("{problem}", "q")
    supervised = SupervisedDataConfig(source, template="qwen3-8b-base")
    assert load_supervised(supervised, tokenizer, BARE)[0][0].prompt == loaded.prompts[0].tokens
    for wrong in ("qwen3-8b-bsae", ""):
        with pytest.raises(
            UsageError, match=r"data\.template: \{problem\} once, 'chat' or the name of a shipped model"
        ):
            load_prompts(DataConfig(source, template=wrong), tokenizer, BARE)


def test_the_first_prompt_in_a_line(tokenizer: Any) -> None:
    def line(question: str, template: str) -> str:
        (encoded,) = Template(tokenizer, template).encode([row(question)])
        return first_prompt(tokenizer, encoded.tokens, "data.template")

    assert line("add 3 1", "{problem} = ") == "first prompt: 'add 3 1 = ' (template: data.template)"
    assert line("q", CHAT) == (
        r"first prompt: '<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n' (template: data.template)"
    )
    long = line("What is it, " * 40, BOXED)
    assert long.startswith(r"first prompt: '<|im_start|>user\nWhat is it,") and " ... " in long
    assert long.endswith(r"step.<|im_end|>\n<|im_start|>assistant\n' (template: data.template)")
    assert len(long) < 2 * 80


def test_tokenizer_and_model_must_fit(tokenizer: Any, tmp_path: Path) -> None:
    size = len(tokenizer)
    check_tokenizer(tokenizer, size)
    check_tokenizer(tokenizer, size + 300)  # padded
    for other in (size - 1, size + 5000):
        with pytest.raises(UsageError, match="do not belong together"):
            check_tokenizer(tokenizer, other)


def test_a_folder_without_tokenizer_is_told_as_that(tmp_path: Path) -> None:
    for kept in ("config.json", "tokenizer_config.json"):  # of which transformers makes an empty tokenizer
        (tmp_path / kept).write_text('{"model_type": "qwen2"}')
        with pytest.raises(UsageError, match=r"has no tokenizer \(tokenizer.json\): copy it from the model"):
            load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="no tokenizer that transformers can load"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match="no tokenizer that transformers can load"):
        load_tokenizer(str(tmp_path / "not_there"))


def test_stop_tokens_of_the_tokenizer_its_turns_and_the_generation_config(tokenizer: Any) -> None:
    ids = tokenizer.get_vocab()
    assert set(stop_tokens(tokenizer)) == {ids["<|endoftext|>"], ids["<|im_end|>"]}
    extra = Path(tokenizer.name_or_path) / "generation_config.json"
    extra.write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert set(stop_tokens(tokenizer)) == {ids["<|endoftext|>"], ids["<|im_end|>"], 5, 6}
    extra.unlink()


def test_each_epoch_visits_every_prompt_once_in_another_order() -> None:
    ids = [f"p{i}" for i in range(50)]
    order = PromptOrder(ids, seed=3)
    epochs = [[i for _ in range(5) for i in order.take(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))
    assert epochs[0] != PromptOrder(ids, seed=4).take(50)


def test_in_the_datas_own_order_every_prompt_has_its_turn() -> None:
    """Ten prompts by three: the tenth opens a batch that the second epoch completes, as often as the others come."""
    order = PromptOrder([f"p{i}" for i in range(10)], seed=3, shuffle=False)
    batches = [order.take(3) for _ in range(10)]
    assert [i for batch in batches for i in batch] == list(range(10)) * 3
    assert batches[3] == [9, 0, 1] and (order.epoch, order.position) == (2, 10)


def test_a_shuffled_batch_never_spans_two_epochs() -> None:
    ids = [f"p{i}" for i in range(10)]
    order = PromptOrder(ids, seed=3)
    batches = [order.take(3) for _ in range(6)]
    epochs = [epoch_order(ids, 3, epoch) for epoch in (0, 1)]
    assert batches == [epoch[start : start + 3] for epoch in epochs for start in (0, 3, 6)]


def test_the_order_is_the_same_everywhere() -> None:
    assert epoch_order(["a", "b", "c", "d", "e"], seed=0, epoch=0) == [3, 2, 0, 4, 1]


def test_adding_rows_moves_no_row_past_another() -> None:
    few, many = [f"p{i}" for i in range(20)], [f"p{i}" for i in range(30)]
    assert epoch_order(few, 1, 2) == [i for i in epoch_order(many, 1, 2) if i < 20]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(0, 11), st.booleans())
def test_a_resumed_order_goes_on_as_if_never_stopped(
    size: int, takes: list[int], stop_after: int, shuffle: bool
) -> None:
    takes = [min(take, size) for take in takes]
    ids = [f"p{i}" for i in range(size)]
    whole = PromptOrder(ids, 0, shuffle)
    expected = [whole.take(take) for take in takes]
    assert all(len(set(batch)) == len(batch) for batch in expected), "no prompt twice in one batch"
    first = PromptOrder(ids, 0, shuffle)
    got = [first.take(take) for take in takes[:stop_after]]
    second = PromptOrder(ids, 0, shuffle)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [second.take(take) for take in takes[stop_after:]]
    assert got == expected


def test_a_checkpoint_of_other_data_is_refused(tokenizer: Any) -> None:
    template = Template(tokenizer, BARE)
    rows = [Row(f"r{i}", (Message("user", f"question {i}"),), str(i), "", "f") for i in range(9)]
    prompts = encode_prompts(rows, template)
    stream = PromptStream(prompts, seed=1)
    stream.take(4)
    state = stream.state_dict()
    PromptStream(prompts, seed=1).load_state_dict(state)
    changed = encode_prompts([*rows[:8], Row("r8", rows[8].messages, "another answer", "", "f")], template)
    for other, seed, message in [(prompts[:8], 1, "not those"), (changed, 1, "not those"), (prompts, 2, "seed 1")]:
        fresh = PromptStream(other, seed=seed)
        with pytest.raises(UsageError, match=message):
            fresh.load_state_dict(state)
        assert fresh.epoch == 0 and len(fresh.take(2)) == 2
    with pytest.raises(UsageError, match="10 prompts a step from a data set of 9"):
        stream.take(10)


def test_supervised_rows(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "response": "It is 2."}, {"prompt": "2+2?", "response": "4"}]
    rows.append({"prompt": "a long question " * 20, "response": "no"})
    data = SupervisedDataConfig(write(tmp_path / "s.jsonl", rows), max_prompt_tokens=20)
    (first, _), too_long = load_supervised(data, tokenizer, "Question: {problem}\n")
    assert tokenizer.decode(first.prompt) == "Question: 1+1?\n" and too_long == 1
    assert tokenizer.decode(first.response) == "It is 2.<|endoftext|>"
    with pytest.raises(UsageError, match="all 3 prompts are longer"):
        load_supervised(replace(data, max_prompt_tokens=1), tokenizer, BARE)
    named = write(tmp_path / "n.jsonl", [{"q": "1+1?", "a": "It is 2."}])
    renamed = SupervisedDataConfig(named, prompt_key="q", response_key="a", template="Question: {problem}\n")
    assert load_supervised(renamed, tokenizer, BARE) == ([replace(first, id="n/1")], 0)
    with pytest.raises(UsageError, match=r"t.jsonl:1: no 'response'"):
        other = write(tmp_path / "t.jsonl", [{"prompt": "1+1?", "answer": "2"}])
        load_supervised(SupervisedDataConfig(other), tokenizer, BARE)
