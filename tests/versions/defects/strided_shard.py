"""FSDP2 over tensor parallelism, along one dim of six elements."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
model = nn.Module()
whole = torch.arange(6.0)
model.weight = nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)]))
fully_shard(model, mesh=mesh["fsdp"])
again = model.weight.full_tensor().detach()
dist.destroy_process_group()
assert torch.equal(whole, again), f"{whole.tolist()} came back as {again.tolist()}"
