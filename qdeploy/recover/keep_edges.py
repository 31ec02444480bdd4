"""The first and the last weighted layer stay float: they are small, and their errors meet nothing that evens them out.

The first reads the image itself, the last writes the answer (a rule of thumb since Zhou et al. 2016, arXiv 1606.06160,
section 2.7; Krishnamoorthi 2018, arXiv 1806.08342, names the same layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qdeploy.plan import plan
from qdeploy.recover.recovery import Recovery

NAME = "keep-edges"


def keep_edges(recovery: Recovery) -> Recovery:
    """The recovery with its first and its last weighted layer in float.

    Raises:
        InputError: The recovery has no means, or the model no weighted layer.
    """
    return keep_float(recovery, ("first", "last")).with_step(NAME)


def keep_float(recovery: Recovery, patterns: Sequence[str]) -> Recovery:
    """The recovery with more nodes in float; what steps have done for the others stays.

    Args:
        recovery: As far as it has come.
        patterns: As for `plan`: "first", "last", or patterns of node or weight names.

    Raises:
        InputError: The recovery has no means, or a pattern matches nothing.
    """
    before, means = recovery.plan, recovery.require_means(NAME)
    means = replace(means, keep=(*means.keep, *patterns))
    bare = plan(before.model, recovery.statistics, before.contract, means.reader, means.keep)
    after = replace(
        bare,
        ranges={name: before.ranges.get(name, chosen) for name, chosen in bare.ranges.items()},
        activations={name: before.activations.get(name, affine) for name, affine in bare.activations.items()},
        weights={name: before.weights.get(name, affine) for name, affine in bare.weights.items()},
        replaced={name: array for name, array in before.replaced.items() if name in bare.weights},
        biases={name: array for name, array in before.biases.items() if bare.nodes[name].quantized},
        steps=before.steps,
    )
    return replace(recovery, plan=after, means=means)
