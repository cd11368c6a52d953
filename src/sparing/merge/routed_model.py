"""A bank of experts as a model of transformers: it loads, runs, generates and saves."""

from dataclasses import asdict
from typing import Any

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)

from sparing.errors import CheckpointError
from sparing.merge.routed import Experts, Router, Routing, attach, set_routing
from sparing.surgery import widths

_AUTO = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)


class MadeItConfig(PretrainedConfig):
    """Configuration of `MadeItModel`.

    Arguments:
        base_config: of the model that experts were added to.
        architecture: its class in transformers.
        modules: for every layer with experts: `ranks`, `router_ranks`, `members` and `bias`.
        tasks: names, in the order of arrival.
        routing: options of `Routing`.
    """

    model_type = "made_it"

    def __init__(
        self,
        base_config: dict[str, Any] | PretrainedConfig | None = None,
        architecture: str = "",
        modules: dict[str, dict[str, Any]] | None = None,
        tasks: list[str] | None = None,
        routing: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(base_config, dict):
            known = dict(base_config)
            base_config = AutoConfig.for_model(known.pop("model_type"), **known)
        self.base_config = base_config
        self.architecture = architecture
        self.modules = modules or {}
        self.tasks = tasks or []
        self.routing = routing or {}
        if base_config is not None:
            for shared in ("is_encoder_decoder", "tie_word_embeddings"):
                kwargs.setdefault(shared, getattr(base_config, shared, False))
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """That of the base, which knows vocabulary and layers."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(*args, **kwargs)


class MadeItModel(PreTrainedModel, GenerationMixin):
    """The base model with a bank of experts in its linear layers, which routes by itself.

    Load it with `from_pretrained`, of this class or of transformers' automatic ones once this one
    is imported. Calls and `generate` are those of the base model.

    Arguments:
        config: of the bank.

    Attributes:
        base: the model of transformers.
    """

    config_class = MadeItConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MadeItConfig) -> None:
        super().__init__(config)
        kind = getattr(transformers, config.architecture, None)
        if kind is None:
            raise CheckpointError(
                "config.json",
                expected="an architecture of transformers",
                found=repr(config.architecture),
                mend="Load it with a version of transformers that has this class.",
            )
        self.base: Any = kind(config.base_config)
        self.main_input_name = self.base.main_input_name
        router = Router(Routing(**config.routing), len(config.tasks))
        for name, bank in config.modules.items():
            layer: nn.Module = self.base.get_submodule(name)
            experts = Experts(
                widths(layer),
                bank["ranks"],
                bank["router_ranks"],
                bank["members"],
                bias=bank["bias"],
                router=router,
            )
            attach(layer, experts)
        router.watch(self.base)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the base."""
        return self.base(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """That of the base."""
        self.base.generation_config = self.generation_config
        return self.base.generate(*args, **kwargs)

    def set_routing(self, routing: Routing) -> None:
        """Route in another way from now on, and after saving and loading."""
        set_routing(self, routing)
        self.config.routing = asdict(routing)

    def get_input_embeddings(self) -> nn.Module:
        """That of the base."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """That of the base."""
        embeddings: nn.Module | None = self.base.get_output_embeddings()
        return embeddings


AutoConfig.register(MadeItConfig.model_type, MadeItConfig)
for _kind in _AUTO:
    _kind.register(MadeItConfig, MadeItModel)
