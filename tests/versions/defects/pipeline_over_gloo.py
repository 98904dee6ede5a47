"""A pipeline of two stages on CPUs."""

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

dist.init_process_group("gloo")
rank = dist.get_rank()
stage = PipelineStage(torch.nn.Linear(2, 2), rank, 2, torch.device("cpu"))
ScheduleGPipe(stage, 2).step(*([torch.ones(2, 2)] if rank == 0 else []))
dist.barrier()
dist.destroy_process_group()
