"""What a user should know about a launch that trains layers with linear attention."""

from __future__ import annotations

from hydra_plugins.memfit.memory.delta_net import DeltaNet, fallback_saved_bytes, saved_bytes
from hydra_plugins.memfit.model.spec import ModelSpec


def kernel_note(model: ModelSpec) -> list[str]:
    """Return which kernels the prediction takes for granted; nothing for a model without such layers."""
    if not model.num_linear_attention_layers:
        return []
    net = DeltaNet.of(model)
    convolution, rule = 2 * net.channels >> 10, (fallback_saved_bytes(net) - saved_bytes(net)) >> 10
    return [
        f"{model.name}: its {model.num_linear_attention_layers} layers with linear attention are counted with the kernels of "
        f"flash-linear-attention and causal-conv1d. Without causal-conv1d a layer needs {convolution} KiB more for each token of "
        f"a micro-batch, without both (transformers computes in fp32 then) {rule} KiB: install them where the launch runs."
    ]
