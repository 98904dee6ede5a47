"""Megatron-core: how its parameters are sharded, and any policy in its optimizers."""

from distclip.adapters.megatron.layouts import MegatronLayouts as MegatronLayouts
from distclip.adapters.megatron.layouts import megatron_layouts as megatron_layouts
