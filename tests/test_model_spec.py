"""config.json -> ModelSpec in both of transformers' spellings, and the refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from lens_megatron import strict
from lens_megatron.errors import UsageError
from lens_megatron.model_spec import (
    Llama3Scaling,
    ModelConfig,
    ModelSpec,
    MoESpec,
    find_weights,
    load_model_config,
    load_model_spec,
    to_hf_config,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN2 = {
    **{k: v for k, v in LLAMA.items() if k not in ("architectures", "rope_scaling")},
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 2,
}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 32, "attention_bias": False}
MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "qwen3_moe": MOE}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def load(config: dict[str, Any], folder: Path) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return load_model_spec(folder)


def test_llama_with_transformers_4_keys(tmp_path: Path) -> None:
    assert load(LLAMA, tmp_path) == ModelSpec(
        family="llama",
        layers=2,
        hidden_size=64,
        ffn_size=96,
        heads=8,
        kv_heads=2,
        head_dim=8,  # missing in the file: hidden_size / heads
        vocab_size=100,
        norm_eps=1e-5,
        rope_theta=500000.0,
        max_positions=131072,
        tied=True,
        qkv_bias=False,
        qk_norm=False,
        rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
    )


def test_transformers_5_keys_mean_the_same(tmp_path: Path) -> None:
    rope = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    modern = {**without(LLAMA, "rope_theta", "rope_scaling"), "rope_parameters": rope}
    assert load(modern, tmp_path) == load(LLAMA, tmp_path)
    moe = {**without(MOE, "num_experts"), "num_local_experts": 4}
    assert load(moe, tmp_path).moe == MoESpec(4, 2, 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_itself_saves_is_read_back(family: str, tmp_path: Path) -> None:
    spec = load(FAMILIES[family], tmp_path)
    saved = tmp_path / "saved"
    transformers.AutoConfig.for_model(**FAMILIES[family]).save_pretrained(saved)
    assert load_model_spec(saved) == spec


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", ["both", "transformers 4", "transformers 5"])
def test_to_hf_config_round_trips_and_transformers_agrees(family: str, spelling: str, tmp_path: Path) -> None:
    spec = load(FAMILIES[family], tmp_path)
    written = to_hf_config(spec)
    if spelling == "transformers 4":
        written = without(written, "rope_parameters", "dtype")
    elif spelling == "transformers 5":
        written = without(written, "rope_scaling", "rope_theta", "torch_dtype")
    assert load(written, tmp_path) == spec
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == family
    assert theirs.head_dim == spec.head_dim
    assert theirs.rope_parameters["rope_theta"] == spec.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("default" if spec.rope_scaling is None else "llama3")
    assert theirs.rope_parameters.get("factor") == (None if spec.rope_scaling is None else spec.rope_scaling.factor)
    assert str(theirs.dtype).removeprefix("torch.") == "bfloat16"
    assert theirs.tie_word_embeddings is spec.tied
    if spec.moe is not None:
        assert (theirs.num_experts, theirs.num_experts_per_tok, theirs.norm_topk_prob) == (4, 2, True)


def test_what_the_family_fixes(tmp_path: Path) -> None:
    qwen2 = load(QWEN2, tmp_path)  # its config.json has no key for the biases that it always has
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, 8)
    assert load(without(QWEN3, "head_dim"), tmp_path).head_dim == 128  # transformers' default, not 64 / 8
    assert load(without(MOE, "head_dim"), tmp_path).head_dim == 8
    qwen3 = load(QWEN3, tmp_path)
    assert (qwen3.qkv_bias, qwen3.qk_norm) == (False, True)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    spec = load(without(LLAMA, "num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings"), tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert spec.kv_heads == theirs.num_key_value_heads == 8
    assert spec.rope_theta == theirs.rope_parameters["rope_theta"] == 10000.0
    assert spec.tied is theirs.tie_word_embeddings is False


LLAMA3 = LLAMA["rope_scaling"]
REFUSED = {
    "other family": ({**LLAMA, "model_type": "gemma3"}, ["model_type", "gemma3", "qwen3_moe"]),
    "no family": (without(LLAMA, "model_type"), ["model_type", "None"]),
    "another head": ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, ["LlamaForCausalLM"]),
    "attention bias": ({**LLAMA, "attention_bias": True}, ["attention_bias", "o_proj"]),
    "attention bias of qwen3": ({**QWEN3, "attention_bias": True}, ["attention_bias"]),
    "mlp bias": ({**LLAMA, "mlp_bias": True}, ["mlp_bias"]),
    "activation": ({**LLAMA, "hidden_act": "gelu"}, ["hidden_act", "silu"]),
    "quantised": ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8", "bf16"]),
    "sliding window": ({**QWEN2, "use_sliding_window": True}, ["use_sliding_window"]),
    "sliding layers": ({**QWEN3, "layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
    "dense layers": ({**MOE, "mlp_only_layers": [0]}, ["mlp_only_layers"]),
    "sparse step": ({**MOE, "decoder_sparse_step": 2}, ["decoder_sparse_step"]),
    "router not normalised": ({**MOE, "norm_topk_prob": False}, ["norm_topk_prob", "true"]),
    "router by default not normalised": (without(MOE, "norm_topk_prob"), ["norm_topk_prob", "true"]),
    "yarn": ({**QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling.rope_type", "yarn", "llama3"]),
    "yarn, new keys": (
        {**without(QWEN2, "rope_theta"), "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        ["rope_parameters.rope_type", "yarn"],
    ),
    "low factor": ({**LLAMA, "rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, ["low_freq_factor", "2.0", "1"]),
    "high factor": ({**LLAMA, "rope_scaling": {**LLAMA3, "high_freq_factor": 8.0}}, ["high_freq_factor", "4"]),
    "original length": (
        {**LLAMA, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}},
        ["original_max_position_embeddings", "8192"],
    ),
    "two thetas": ({**LLAMA, "rope_scaling": {**LLAMA3, "rope_theta": 1e4}}, ["rope_theta", "twice"]),
    "partial rope": ({**LLAMA, "partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "rope per layer kind": (
        {**without(QWEN3, "rope_theta"), "rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ["rope_parameters", "one set"],
    ),
    "missing size": (without(LLAMA, "hidden_size"), ["hidden_size is missing"]),
    "missing experts": (without(MOE, "num_experts"), ["num_experts is missing"]),
    "missing kv heads": (without(QWEN3, "num_key_value_heads"), ["num_key_value_heads is missing"]),
    "text for a number": ({**LLAMA, "num_hidden_layers": "2"}, ["num_hidden_layers", "whole number"]),
    "zero": ({**LLAMA, "vocab_size": 0}, ["vocab_size", "above 0"]),
    "epsilon": ({**LLAMA, "rms_norm_eps": -1}, ["rms_norm_eps", "above 0"]),
    "kv heads that divide nothing": ({**LLAMA, "num_key_value_heads": 3}, ["kv_heads=3", "heads=8"]),
    "heads that divide nothing": ({**LLAMA, "num_attention_heads": 7}, ["head_dim", "64", "7"]),
    "too few experts": ({**MOE, "num_experts_per_tok": 5}, ["experts_per_token=5", "experts=4"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_with_file_and_key(case: str, tmp_path: Path) -> None:
    config, words = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        load(config, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "config.json") in message
    for word in words:
        assert word in message, message


def test_a_sliding_window_that_is_switched_off_is_no_obstacle(tmp_path: Path) -> None:
    assert load({**QWEN2, "sliding_window": 4096, "layer_types": ["full_attention"] * 2}, tmp_path).layers == 2


def test_files_that_are_not_there_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json: No such file"):
        load_model_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(UsageError, match=r"config\.json: not JSON"):
        load_model_spec(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UsageError, match="expected a JSON object"):
        load_model_spec(tmp_path)


def test_names_hub_ids_and_what_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = load_model_config("qwen3-8b-base")
    assert by_name.name == "qwen3-8b-base"
    assert load_model_config("Qwen/Qwen3-8B-Base") == by_name
    with pytest.raises(UsageError, match=r"not a shipped model .*qwen3-8b-base"):
        load_model_spec("qwen3-9b")
    with pytest.raises(UsageError, match="hf download someone/Qwen3-8B-Base"):
        load_model_spec("someone/Qwen3-8B-Base")  # the same last part is not the same model


def test_find_weights_gives_folders_and_never_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_weights(tmp_path) == tmp_path
    with pytest.raises(UsageError, match="no published weights"):
        find_weights("tiny-llama")

    def cached(repo_id: str, filename: str, cache_dir: Path | None) -> str | None:
        return str(tmp_path / filename) if repo_id == "Qwen/Qwen3-0.6B" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert find_weights("qwen3-0.6b") == tmp_path
    with pytest.raises(UsageError, match=r"hf download Qwen/Qwen3-1\.7B"):
        find_weights("qwen3-1.7b")


def test_a_folder_with_a_chat_template_is_asked_through_it(tmp_path: Path) -> None:
    load(QWEN3, tmp_path)
    assert load_model_config(tmp_path).template == "{problem}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_model_config(tmp_path).template == "chat"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_model_config(tmp_path).template == "{problem}"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_model_config(tmp_path).template == "chat"


def test_a_template_must_have_one_place_for_the_problem() -> None:
    spec = load_model_spec("tiny-qwen3")
    for text in ("no place for it", "{problem} {problem}"):
        with pytest.raises(ValueError, match="exactly once"):
            ModelConfig(spec=spec, template=text)


def test_a_spec_that_contradicts_its_family_is_refused(tmp_path: Path) -> None:
    spec = load(QWEN2, tmp_path)
    for change in ({"qkv_bias": False}, {"qk_norm": True}, {"moe": MoESpec(4, 2, 8)}, {"head_dim": 7}):
        with pytest.raises(ValueError, match=r"family|odd"):
            replace(spec, **change)  # type: ignore[arg-type]


def test_model_yaml_is_strict() -> None:
    tree = strict.to_tree(ModelSpec, load_model_spec("tiny-qwen3"))
    with pytest.raises(UsageError, match="unknown key 'layer'; did you mean 'layers'"):
        strict.build(ModelSpec, {**tree, "layer": 3}, "x.yaml")
