"""What the losses share: a loss maps the rain layers of all stages to a dict of named terms.

`loss` is what is minimised and `stage_t/loss` the part of stage t; other terms have names of their own.
"""

from torch import Tensor

Terms = dict[str, Tensor]


def charbonnier(difference: Tensor, epsilon: float) -> Tensor:
    """Mean of a smooth absolute value: square below `epsilon`, linear above."""
    return (difference.square() + epsilon**2).sqrt().mean()


def by_stage(losses: list[Tensor]) -> Terms:
    return {f"stage_{t}/loss": loss for t, loss in enumerate(losses, 1)}
