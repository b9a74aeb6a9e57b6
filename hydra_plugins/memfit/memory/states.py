"""Model states of one rank: parameters, gradients, optimizer states (ZeRO's terms), sharded over N ranks.

Symbols: P parameters, P_t parameters with gradients, N ranks that share one copy.

Source: Rajbhandari et al., ZeRO (arXiv 1910.02054), section 3.1 and 5; the fp32 master copy and the lazily created AdamW
moments as torch's FSDP and ``torch.optim.AdamW`` hold them.
"""

from __future__ import annotations

from hydra_plugins.memfit.base.units import ceil_div

FP32 = 4
BF16 = 2

ADAM_MOMENTS = 2
"""exp_avg and exp_avg_sq; created inside the first ``optimizer.step()`` and alive from then on."""


def sharded_bytes(*, parameters: int, bytes_per_parameter: int, ranks: int) -> int:
    """
    Return the bytes of one rank's share of a tensor list.

        M = P · b / N

    Leaves out: FSDP1's padding of each flat parameter to a multiple of N elements (at most N·b bytes a unit).

    >>> sharded_bytes(parameters=1_000, bytes_per_parameter=4, ranks=8)
    500
    """
    return ceil_div(parameters * bytes_per_parameter, ranks)


def adam_state_bytes(*, trainable_parameters: int, bytes_per_parameter: int = FP32, ranks: int) -> int:
    """
    Return the bytes of one rank's AdamW moments.

        M = 2 · P_t · b / N

    >>> adam_state_bytes(trainable_parameters=1_000, ranks=1)
    8000
    """
    return sharded_bytes(
        parameters=trainable_parameters, bytes_per_parameter=ADAM_MOMENTS * bytes_per_parameter, ranks=ranks
    )


def adam_step_temporary_bytes(*, trainable_parameters: int, bytes_per_parameter: int = FP32, ranks: int) -> int:
    """
    Return the bytes that one AdamW step allocates and frees: the list of square roots of exp_avg_sq (foreach).

        M = P_t · b / N

    Leaves out: the gradient-norm clip (one scalar a tensor).
    Source: torch ``_multi_tensor_adam`` (``_foreach_sqrt``); op-level traces of FSDP1 and FSDP2 show the same term.
    """
    return sharded_bytes(parameters=trainable_parameters, bytes_per_parameter=bytes_per_parameter, ranks=ranks)


def lora_parameters(*, sites: tuple[tuple[int, int, int], ...], rank: int) -> int:
    """
    Return the parameters of LoRA adapters of rank r on linear modules (in_features, out_features, count).

        P_t = r · Σ count · (in + out)

    Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1.

    >>> lora_parameters(sites=((10, 20, 3),), rank=8)
    720
    """
    return rank * sum(count * (fan_in + fan_out) for fan_in, fan_out, count in sites)
