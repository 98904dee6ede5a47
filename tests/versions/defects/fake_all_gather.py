"""The all-gather of FSDP2 under FakeTensorMode, with which memory is estimated."""

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

dist.init_process_group("gloo")
with FakeTensorMode():
    dist.all_gather_into_tensor(torch.empty(1), torch.ones(1))
dist.destroy_process_group()
