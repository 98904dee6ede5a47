"""FSDP2 and distclip in one screen, on CPUs.

torchrun --standalone --nproc-per-node 2 examples/minimal.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import distclip


def make_model() -> nn.Module:
    layers = [nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)]
    model = nn.Sequential(*layers)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same first weights on every rank
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    clipper = distclip.Clipper(model, distclip.ClipNorm(1.0))  # after the model has been sharded
    clipper.plan.verify()  # once: do all ranks hold what they should?

    torch.manual_seed(rank)  # different batches on every rank
    for step in range(5):
        inputs = torch.randn(32, 16)
        targets = inputs.sum(dim=1, keepdim=True)
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        report = clipper.step(optimizer)  # clips by the norm of the whole model, and steps
        optimizer.zero_grad()
        if rank == 0:
            print(step, f"loss {loss.item():.2f}", report.to_dict())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
