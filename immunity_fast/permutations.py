"""The N! permutations of a gate's weights: random ones, and the worst of all without trying one.

Shapes: N experts, B images, K classes.
"""

import math

import torch
from torch import Tensor

from immunity_fast.runtime.precision import accumulation_dtype

MOST_EXPERTS = 8  # of which all permutations are tried: 40,320
SAMPLED = 5040  # permutations of more experts, drawn once and for all
CELLS = 1 << 22  # numbers that are held at once while permutations are tried


def random_orders(rows: int, num_experts: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(rows, N) int64 on `device`: each row a uniformly random order of the experts.

    Args:
        rows: how many.
        num_experts: N.
        generator: where they come from, on any device; None is PyTorch's default generator of `device`.
        device: where they are to be.
    """
    source = device if generator is None else generator.device
    keys = torch.rand(rows, num_experts, generator=generator, device=source, dtype=torch.float64)
    orders = keys.argsort(-1)
    if source.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        orders = orders.pin_memory()  # else the host would wait for what is under way on the GPU
    return orders.to(device, non_blocking=True)


def permuted(gate: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each row of a gate's weights in a random order of its own, as `RandomSwitchGate` with `switch="sample"`.

    Args:
        gate: (B, N) weights.
        generator: of the orders, on any device; None is PyTorch's default generator of the weights' device.

    Returns:
        (B, N).
    """
    return gate.gather(-1, random_orders(gate.shape[0], gate.shape[1], generator, gate.device))


def worst_margins(logits: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """max over all N! permutations π of Σ_i g_π(i) (p_im − p_i,label), for each class m: (B, K); −∞ for the label.

    A class wins under some permutation if and only if its margin is positive. No permutation is tried: a sum of
    products is largest where both factors are in the same order (the rearrangement inequality), so sorting finds it.

    Args:
        logits: (N, B, K) of the experts.
        gate: (B, N) weights.
        labels: (B,) integers in 0..K−1.
    """
    differences = _differences(logits, labels).sort(0).values
    weights = gate.sort(-1).values.T[..., None].to(differences.dtype)
    margins = (weights * differences).sum(0)
    return margins.scatter(-1, labels[:, None], -torch.inf)


def always_fooled(logits: Tensor, gate: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """(B,) bool: images that fool the mixture under every one of the N! permutations.

    With targets: that are the target then, exactly. Without: that are, each time, less likely the label than some class
    that is the same for all of them; images for which it would have to be another each time are left out.

    Args:
        logits: (N, B, K) of the experts.
        gate: (B, N) weights.
        labels: (B,) integers in 0..K−1.
        targets: the same, or None.
    """
    if targets is not None:
        return worst_margins(logits, gate, targets).amax(-1) < 0
    return _least_sums(_differences(logits, labels), gate).amax(-1) > 0  # of the label itself it is 0


def nobody_right(logits: Tensor, gate: Tensor, labels: Tensor, slack: float = 0.0) -> Tensor:
    """(B,) bool: images that neither the mixture under any of the N! permutations nor any expert alone gets right.

    Of the permutations those alone count that `always_fooled` does: under all of them the same class is likelier than
    the label. Their mean is then wrong, too.

    Args:
        logits: (N, B, K) of the experts.
        gate: (B, N) weights.
        labels: (B,) integers in 0..K−1.
        slack: by how much another class has to be likelier than the label, each time.
    """
    differences = _differences(logits, labels)
    alone = (differences.amax(-1) > slack).all(0)
    return alone & (_least_sums(differences, gate).amax(-1) > slack)


def _least_sums(differences: Tensor, gate: Tensor) -> Tensor:
    """min over all N! permutations π of Σ_i g_π(i) d_im, for each class m: (B, K), of d (N, B, K) and g (B, N)."""
    # The least sum of products: factors in opposite orders.
    weights = gate.sort(-1, descending=True).values.T[..., None].to(differences.dtype)
    return (weights * differences.sort(0).values).sum(0)


def worst_weights(logits: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """The gate's weights, for each image in the order that gives the largest of `worst_margins`.

    Args:
        logits: (N, B, K) of the experts.
        gate: (B, N) weights.
        labels: (B,) integers in 0..K−1.

    Returns:
        (B, N), differentiable with respect to `gate`, not to `logits`.
    """
    with torch.no_grad():
        rival = worst_margins(logits, gate, labels).argmax(-1)
        differences = _differences(logits, labels)
        towards = differences.gather(-1, rival.expand(len(logits), -1)[..., None])[..., 0].T
        ranks = towards.argsort(-1).argsort(-1)
    return gate.sort(-1).values.gather(-1, ranks)


def _differences(logits: Tensor, labels: Tensor) -> Tensor:
    """p_im − p_i,label: (N, B, K)."""
    probabilities = logits.softmax(-1, dtype=accumulation_dtype(logits))
    own = probabilities.gather(-1, labels.expand(len(logits), -1)[..., None])
    return probabilities - own


def orders_tried(num_experts: int) -> Tensor:
    """(P, N) int64: all N! orders of up to 8 experts; of more 5,040 random ones, the same each time.

    Args:
        num_experts: N.
    """
    if num_experts <= MOST_EXPERTS:
        orders = torch.zeros(1, 0, dtype=torch.int64)
        for expert in range(num_experts):  # at every place of each order of those before; faster than a list
            new = torch.full((len(orders), 1), expert)
            orders = torch.cat([torch.cat([orders[:, :i], new, orders[:, i:]], 1) for i in range(expert + 1)])
        return orders
    return random_orders(SAMPLED, num_experts, torch.Generator().manual_seed(0), torch.device("cpu"))


def share_is_exact(num_experts: int) -> bool:
    """Whether `shares_right` tries all N! permutations where they do not agree."""
    return num_experts <= MOST_EXPERTS


def shares_right(logits: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """Which share of the N! permutations answers rightly: the exact expectation of 0/1 accuracy. (B,) float64.

    A sort decides most images: all permutations are right where the worst is, and none where one class beats the label
    under each. For the others permutations are tried, by sums of products, without another pass of an expert: all N! of
    up to 8 experts; of more a fixed sample of 5,040, and the share is an estimate with an error of 0.7 % at most
    (standard deviation). A class that is exactly as likely as the label counts as wrong.

    Args:
        logits: (N, B, K) of the experts.
        gate: (B, N) weights.
        labels: (B,) integers in 0..K−1.
    """
    shares = (worst_margins(logits, gate, labels).amax(-1) < 0).double()
    split = ((shares == 0) & ~always_fooled(logits, gate, labels)).nonzero()[:, 0]
    if not len(split):
        return shares
    differences = _differences(logits[:, split], labels[split])
    own = torch.arange(differences.shape[-1], device=labels.device) == labels[split, None]
    weights = gate[split].to(differences.dtype)
    orders = orders_tried(len(logits)).to(labels.device)
    right = torch.zeros(len(split), dtype=torch.float64, device=labels.device)
    for some in torch.split(orders, max(1, CELLS // differences[0].numel())):
        margins = torch.einsum("bpn,nbk->bpk", weights[:, some], differences)
        right += margins.masked_fill(own[:, None], -math.inf).amax(-1).lt(0).sum(1)
    return shares.index_copy(0, split, right / len(orders))
