"""The shipped models: published parameter counts, what transformers builds from the same shape, layouts that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from lens_megatron import strict
from lens_megatron.cli import main
from lens_megatron.mcore.layout import ParallelConfig, check_layout
from lens_megatron.model_spec import ModelConfig, load_model_config, shipped_models, to_hf_config
from lens_megatron.planning.memory import advised_bytes, advised_host_bytes, advised_parallel
from lens_megatron.planning.parameters import (
    count_active_parameters,
    count_parameters,
    layer_parameters,
)
from lens_megatron.planning.shards import chunks_of_stage

# As published: the number of values in each checkpoint's safetensors files.
PUBLISHED = {
    "llama-3.2-3b-instruct": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b-base": 4_022_468_096,
    "qwen3-8b-base": 8_190_735_360,
    "qwen3-14b-base": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}
TINY = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-tied", "tiny-qwen3-moe")
GIB = 1024**3


def build_on_meta(config: ModelConfig) -> transformers.PreTrainedModel:
    hf = to_hf_config(config.spec)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))


def test_exactly_these_models_are_shipped() -> None:
    assert set(shipped_models()) == {*PUBLISHED, *TINY}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_parameter_count_equals_the_published_one(name: str, published: int) -> None:
    assert count_parameters(load_model_config(name).spec) == published


@pytest.mark.parametrize("name", [*TINY, "llama-3.2-3b-instruct", "qwen2.5-7b", "qwen3-0.6b", "qwen3-30b-a3b"])
def test_transformers_builds_as_many_parameters_from_the_same_shape(name: str) -> None:
    config = load_model_config(name)
    assert sum(p.numel() for p in build_on_meta(config).parameters()) == count_parameters(config.spec)


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    spec = load_model_config("qwen3-30b-a3b").spec
    assert spec.moe is not None
    idle = 48 * (128 - 8) * 3 * 2048 * 768
    assert count_active_parameters(spec) == count_parameters(spec) - idle
    dense = load_model_config("qwen3-8b-base").spec
    assert count_active_parameters(dense) == count_parameters(dense)


@pytest.mark.parametrize("name", PUBLISHED)
def test_advised_layouts_are_possible_and_fit(name: str) -> None:
    config = load_model_config(name)
    assert config.layouts, "a shipped model advises at least one layout"
    for layout in config.layouts:
        values = layout.run_values()
        parallel = strict.build(ParallelConfig, values["parallel"], name)
        check_layout(config.spec, parallel, layout.gpus)
        assert advised_bytes(config.spec, layout).peak <= 0.9 * layout.gpu_gb * GIB, layout
        assert advised_host_bytes(config.spec, layout) <= 128 * GIB * layout.gpus, layout  # 1 TiB a node of 8


def test_advised_memory_settings_are_those_of_a_run() -> None:
    from lens_megatron.mcore.settings import MemoryConfig

    for name in PUBLISHED:
        for layout in load_model_config(name).layouts:
            strict.build(MemoryConfig, layout.run_values()["memory"], name)


def test_small_models_are_advised_for_one_gpu_and_eight() -> None:
    for name, published in PUBLISHED.items():
        gpus = {layout.gpus for layout in load_model_config(name).layouts}
        assert (1 in gpus) == (published < 4e9), name
        assert (8 in gpus) == (published < 20e9), name
        assert min(gpus) <= 4 or published > 9e9, name
        assert published < 2e9 or max(gpus) >= 64, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ranks_together_hold_the_model(name: str) -> None:
    config = load_model_config(name)
    spec, layer = config.spec, layer_parameters(config.spec)
    for layout in config.layouts:
        parallel = advised_parallel(layout)
        chunks = [chunk for stage in range(layout.pp) for chunk in chunks_of_stage(spec, parallel, stage)]
        together = sum(sum(chunk.dense) * layout.tp + sum(chunk.expert) * layout.ep for chunk in chunks)
        # norms and routers are repeated over the tensor ranks, vocabularies padded, a tied one copied; never more than that
        repeated = (layout.tp - 1) * (spec.layers * (layer.norms + layer.router) + spec.hidden_size)
        tables = 1 if spec.tied and layout.pp == 1 else 2
        padding = tables * spec.hidden_size * (-spec.vocab_size % 128)
        copy = spec.vocab_size * spec.hidden_size if spec.tied and layout.pp > 1 else 0
        assert together == count_parameters(spec) + repeated + padding + copy


def test_a_tied_embedding_is_copied_to_the_last_pipeline_stage() -> None:
    spec = load_model_config("qwen3-4b-base").spec
    split = [chunk for stage in range(2) for chunk in chunks_of_stage(spec, ParallelConfig(pp=2), stage)]
    assert sum(chunk.elements for chunk in split) == count_parameters(spec) + 151_936 * 2560
    assert [chunk.shared for chunk in split] == [(0,), (len(split[1].dense) - 1,)]


# How a turn ends and the answer begins, in each family's chat format.
CHATML = "<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_ask_for_a_boxed_answer_and_hand_over_to_the_assistant(name: str) -> None:
    config = load_model_config(name)
    before, after = config.template.split("{problem}")
    if name in ("llama-3.1-8b", "llama-3.1-70b"):  # bases that have never seen a chat
        assert before.startswith("<|begin_of_text|>Question:")
        return
    if config.spec.family == "llama":
        assert before.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n")
        assert before.endswith("<|start_header_id|>user<|end_header_id|>\n\n")
        assert after == BOXED + LLAMA
    else:
        assert before.endswith("<|im_start|>user\n")
        assert after == BOXED + CHATML
    assert config.hub_id is not None


def test_qwen_base_models_have_a_system_message_and_chat_models_have_none() -> None:
    for name in PUBLISHED:
        config = load_model_config(name)
        if config.spec.family != "llama":
            is_base = "base" in name or config.spec.family == "qwen2"
            assert config.template.startswith("<|im_start|>system\nYou are a helpful assistant.") == is_base, name


def test_tiny_models_fit_the_layout_tests() -> None:
    for name in TINY:
        spec = load_model_config(name).spec
        check_layout(spec, ParallelConfig(tp=2, pp=2), 4)
        check_layout(spec, ParallelConfig(pp=2, vpp=2), 2)
        assert spec.vocab_size % 2  # so that tensor parallelism has to pad
        assert count_parameters(spec) < 1_000_000
    families = {load_model_config(name).spec.family for name in TINY}
    assert families == {"llama", "qwen2", "qwen3", "qwen3_moe"}


def test_the_documentation_lists_every_model_and_layout_as_computed() -> None:
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    for name in shipped_models():
        config = load_model_config(name)
        assert f"| {name} | {count_parameters(config.spec):,} |" in text
        for layout in config.layouts:
            peak, host = advised_bytes(config.spec, layout).peak, advised_host_bytes(config.spec, layout) / layout.gpus
            where = f"| {layout.tp} | {layout.pp} | {layout.ep} | {layout.dp} | {layout.recompute} |"
            row = f"| {name} | {layout.gpus} x 80 GB {where} {peak / GIB:.1f} | {host / GIB:.1f} |"
            assert row in text, row


@pytest.mark.parametrize(("columns", "whole"), [(80, False), (129, False), (140, True)])
def test_the_table_fits_the_terminal(
    columns: int, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["models"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(shipped_models()) and "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)  # nothing is cut
    assert max(map(len, lines)) <= (columns if whole else 100)
    assert [name in title for name in ("heads/kv", "tied", "experts")] == [whole] * 3
    (line,) = (line for line in lines if line.startswith("qwen3-30b-a3b"))
    counts = ["30,532,122,624", "3,353,032,704"] if whole else ["30.5B", "3.35B"]
    assert line.split()[2:4] == counts and line.split()[-1] == "Qwen/Qwen3-30B-A3B"
