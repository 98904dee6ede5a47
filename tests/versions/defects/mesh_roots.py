"""A mesh that equals a slice of another mesh, and was not sliced from it."""

import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
assert both["tp"].size() == 1
alone = DeviceMesh("cpu", [0], mesh_dim_names=("tp",))
if hasattr(alone, "_get_root_mesh"):
    root = alone._get_root_mesh()
else:
    root = device_mesh._mesh_resources.get_root_mesh(alone)
axes = root.mesh_dim_names
dist.destroy_process_group()
assert axes == ("tp",), f"its root has the axes {axes}"
