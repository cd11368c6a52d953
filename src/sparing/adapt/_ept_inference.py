"""Guess the task of a row from how the layers' inputs resemble EPT's task embeddings."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparing.adapt import _ept_contrast as contrast
from sparing.errors import ConfigError
from sparing.tuners import TunerLayer

if TYPE_CHECKING:
    from sparing.adapt.ept import EPTTuner


@torch.no_grad()
def infer_tasks(tuner: "EPTTuner", adapter_name: str, inputs: Mapping[str, Any]) -> Tensor:
    """The task with the largest similarity, averaged over layers (EPT, eq. 9).

    Arguments and errors as for `EPTTuner.infer_tasks`.
    """
    routers = tuner.routers(adapter_name)
    if not routers.config.uses_embeddings:
        raise ConfigError(
            f"adapter {adapter_name!r}",
            expected="an adapter with router='task', whose embeddings tell tasks apart",
            found=f"router={routers.config.router!r}",
            mend="Say which task it is with model.set_task.",
        )
    embeddings, total = routers.all_gates().embeddings, []

    def watch(layer: nn.Module, args: tuple[Any, ...]) -> None:
        adapter: Any = layer.adapters[adapter_name]
        if adapter.pooling is None:
            return
        x = args[0]
        one = tuner.passes.running
        rows = contrast.pooled(x, adapter.pooling, one.real_tokens(x.shape) if one else None)
        embedding = embeddings[routers.numbers[adapter.name]]
        total.append(contrast.similarities(rows, embedding, routers.config.tau).cpu())

    handles = [
        module.register_forward_pre_hook(watch)
        for module in tuner.model.modules()
        if isinstance(module, TunerLayer) and adapter_name in module.adapters
    ]
    training = tuner.model.training
    tuner.model.eval()
    tuner.disable_adapter_layers()
    try:
        tuner.model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        tuner.enable_adapter_layers()
        tuner.model.train(training)
    return torch.stack(total).mean(0).argmax(-1)
