"""What the processes that train together, each on samples of its own, know of each other."""

import torch
from torch import Tensor


def group_mean(local: Tensor, group_name: str) -> Tensor:
    """The mean over a process group of a tensor that each of its processes has. It has no gradient.

    The functional collective, unlike `torch.distributed.all_reduce`, can be traced by a compiler.

    Args:
        local: this process' tensor, floating-point, of the same shape in all processes.
        group_name: `ProcessGroup.group_name` of a `torch.distributed` group.

    Returns:
        A tensor of the shape, dtype and device of `local`.
    """
    ones_and_local = torch.cat([local.new_ones(1), local.detach().flatten()])
    total = torch.ops._c10d_functional.all_reduce(ones_and_local, "sum", group_name)
    total = torch.ops._c10d_functional.wait_tensor(total)
    mean: Tensor = (total[1:] / total[0]).view_as(local)
    return mean


def group_ratio(totals: Tensor, count: Tensor, group_name: str) -> Tensor:
    """Sums over the samples of all processes, divided by how many these are; 0 where there are none. No gradient.

    Args:
        totals: sums over this process' samples, floating-point, of the same shape in all processes.
        count: how many they are, ().
        group_name: see `group_mean`.

    Returns:
        A tensor of the shape, dtype and device of `totals`.
    """
    mean = group_mean(torch.cat([totals.flatten(), count.to(totals.dtype).view(1)]), group_name)
    return (mean[:-1] / torch.where(mean[-1] > 0, mean[-1], 1)).view_as(totals)
