"""Megatron-core: any policy in its optimizers, and how its parameters are sharded."""

from distclip.adapters.megatron.handle import Handle as Handle
from distclip.adapters.megatron.handle import attach as attach
from distclip.adapters.megatron.layouts import MegatronLayouts as MegatronLayouts
from distclip.adapters.megatron.layouts import megatron_layouts as megatron_layouts
