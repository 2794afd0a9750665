"""The shape of a model, from model_configs/NAME.yaml or any HF config.json of the four supported families."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import model_configs
from lens_megatron import hf_config, strict
from lens_megatron.errors import UsageError
from lens_megatron.folder_note import NOTE, check_template, noted_template
from lens_megatron.hf_config import to_hf_config

__all__ = [
    "AdvisedLayout",
    "Family",
    "Llama3Scaling",
    "MoESpec",
    "ModelConfig",
    "ModelSpec",
    "find_weights",
    "load_model_config",
    "load_model_spec",
    "shipped_models",
    "to_hf_config",
]

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]
_STRICT: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the low RoPE frequencies (HF rope_type "llama3")."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class MoESpec:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    experts: int
    experts_per_token: int
    expert_ffn_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} must be 1 to experts={self.experts}")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides the tensors and the arithmetic of a model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    family: Family
    layers: int
    hidden_size: int
    ffn_size: int  # of the dense MLP; unused when moe is set
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: Llama3Scaling | None = None
    moe: MoESpec | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "ffn_size", "heads", "kv_heads", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be above 0 (got {getattr(self, name)})")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: RoPE turns pairs")
        if (self.moe is not None) != (self.family == "qwen3_moe"):
            raise ValueError(f"moe must be given for family qwen3_moe and no other (family is {self.family})")
        # what the family fixes; a YAML that says otherwise would load another model's tensors
        if self.qkv_bias != (self.family == "qwen2"):
            raise ValueError(f"qkv_bias={self.qkv_bias} is not what family {self.family} has")
        if self.qk_norm != (self.family in ("qwen3", "qwen3_moe")):
            raise ValueError(f"qk_norm={self.qk_norm} is not what family {self.family} has")


@dataclass(frozen=True)
class AdvisedLayout:
    """A trainer's layout that fits by the arithmetic of planning/memory.py. Computed, not measured."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    gpus: int
    gpu_gb: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    ends_count_as_layers: bool = False
    recompute: Literal["none", "selective", "full"] = "full"
    offload_reference: bool = True  # the reference in host memory between its uses

    def __post_init__(self) -> None:
        if self.gpus % (self.tp * self.pp * self.cp):
            raise ValueError(f"tp x pp x cp = {self.tp * self.pp * self.cp} does not divide {self.gpus} GPUs")
        if self.gpus % (self.ep * self.pp):
            raise ValueError(f"ep x pp = {self.ep * self.pp} does not divide {self.gpus} GPUs")

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    def run_values(self) -> dict[str, dict[str, Any]]:
        """The sections of RUN.yaml that choose this layout."""
        parallel = {key: getattr(self, key) for key in ("tp", "pp", "cp", "ep", "dp", "ends_count_as_layers")}
        memory = {key: getattr(self, key) for key in ("recompute", "offload_reference")}
        return {"parallel": parallel, "memory": memory}


@dataclass(frozen=True)
class ModelConfig:
    """A model that we ship (model_configs/NAME.yaml), or what an HF folder says about itself."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    spec: ModelSpec
    # `chat`: the tokenizer's chat template. Else the whole prompt around {problem}, special tokens written out.
    template: str
    hub_id: str | None = None
    layouts: tuple[AdvisedLayout, ...] = ()
    name: str = ""  # the file's name
    template_from: str = ""  # for people: who says that this is the template

    def __post_init__(self) -> None:
        check_template(self.template)


def _shipped_folder() -> Path:
    return Path(model_configs.__file__).parent


def shipped_models() -> list[str]:
    """Names of the models in model_configs/."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def named_template(template: str | None, default: str) -> str:
    """A shipped model's, when it is the name of one."""
    if template is None:
        return default
    return load_model_config(template).template if template in shipped_models() else template


def template_origin(key: str, template: str | None, default: str) -> str:
    """Who says what `named_template` gives, for people. `key`: where `template` was given."""
    if template is None:
        return default
    return f"{key}, shipped with {template}" if template in shipped_models() else key


def load_model_config(name_or_folder: str | Path, cache: Path | None = None) -> ModelConfig:
    """A shipped name (or its hub id), a folder with a config.json, or a hub id whose files are in the local cache.
    `cache`: another Hugging Face cache than this process's."""
    given = str(name_or_folder)
    shipped = _shipped(given)
    if shipped is not None:
        return shipped
    folder = Path(given)
    if not folder.exists():
        cached = _cached_snapshot(given, cache)
        if cached is None:
            raise UsageError(
                f"model {given!r}: not a folder, not in the Hugging Face cache{_where(cache)}, and not a shipped model "
                f"({', '.join(shipped_models())}){_download_hint(given)}"
            )
        folder = cached
    file = folder if folder.is_file() else folder / "config.json"
    if not file.is_file():
        raise UsageError(f"{file}: No such file or directory; a model folder needs a config.json")
    spec = strict.build(ModelSpec, hf_config.spec_fields(strict.read_json(file), str(file)), str(file))
    template, origin = _template_of(file.parent)
    return ModelConfig(spec=spec, template=template, name=file.resolve().parent.name, template_from=origin)


def load_model_spec(name_or_folder: str | Path) -> ModelSpec:
    """The shape alone."""
    return load_model_config(name_or_folder).spec


def check_same_shape(reference: str, its_spec: ModelSpec, model: str, spec: ModelSpec) -> None:
    if its_spec != spec:
        raise UsageError(f"reference {reference}: not of the same shape as {model}")


def find_weights(name_or_folder: str | Path, cache: Path | None = None) -> Path:
    """The folder with config.json, tokenizer and safetensors. Never downloads: every rank of a job may ask."""
    given = str(name_or_folder)
    shipped = _shipped(given)
    if shipped is None and Path(given).is_dir():
        return Path(given)
    hub_id = given if shipped is None else shipped.hub_id
    if hub_id is None:
        raise UsageError(f"model {given!r} has a shape but no published weights; give a folder with weights")
    folder = _cached_snapshot(hub_id, cache)
    if folder is None:
        raise UsageError(
            f"model {given!r}: no folder, and no weights in the Hugging Face cache{_where(cache)}{_download_hint(hub_id)}"
        )
    return folder


def is_shipped(name: str) -> bool:
    """By its name, or its hub id where no folder is called so."""
    return _shipped(name) is not None


def _shipped(given: str) -> ModelConfig | None:
    names = shipped_models()
    if given in names:
        return _read_shipped(given)
    if "/" not in given or Path(given).exists():
        return None
    # a hub id: `Qwen/Qwen3-8B-Base` is `qwen3-8b-base`, so only the file with that name has to be read
    name = given.rsplit("/", 1)[1].lower()
    config = _read_shipped(name) if name in names else None
    return config if config is not None and config.hub_id == given else None


def _read_shipped(name: str) -> ModelConfig:
    path = _shipped_folder() / f"{name}.yaml"
    more = {"name": name, "template_from": f"shipped with {name}"}
    return strict.build(ModelConfig, {**strict.read_yaml(path), **more}, f"model_configs/{path.name}")


def _where(cache: Path | None) -> str:
    return "" if cache is None else f" {cache}"


def _cached_snapshot(hub_id: str, cache: Path | None) -> Path | None:
    """The folder of a model in a Hugging Face cache, by default this process's."""
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")) or hub_id.endswith("/"):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id, "config.json", cache_dir=cache)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _download_hint(given: str) -> str:
    looks_like_hub_id = given.count("/") == 1 and not given.startswith((".", "/", "~"))
    return f"; download it with: hf download {given}" if looks_like_hub_id else ""


def _template_of(folder: Path) -> tuple[str, str]:
    """The template, and who says so: what wrote the weights knows it, the rest is a guess."""
    noted = noted_template(folder)
    if noted is not None:
        return noted, f"{NOTE} of the model's folder"
    settings = folder / "tokenizer_config.json"
    has_chat = (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and bool(strict.read_json(settings).get("chat_template"))
    )
    return ("chat", "the tokenizer's chat template") if has_chat else ("{problem}", "the problem alone")
