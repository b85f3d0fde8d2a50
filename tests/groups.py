"""Ends the process groups of a mesh, so that the same ranks can be split in another way."""

from __future__ import annotations

import gc

import torch.distributed as dist

from rlhf.parallel.mesh import parallel_state
from rlhf.train.learner import DistributedDataParallel


def close() -> None:
    """Destroy all groups except the world, and end their threads. Models must not be used afterwards.

    megatron-core only forgets its groups. Each gloo group has three threads, and one of them wakes 100 times per second
    until nothing refers to the group. The gradient hooks of megatron-core's models refer to the models, and these refer
    to the groups. Python's garbage collector does not see such hooks, so the models are emptied here.
    """
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    for model in gc.get_objects():
        if type(model) is DistributedDataParallel:
            vars(model).clear()
    gc.collect()
