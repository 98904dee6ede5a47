"""distclip for trainers and optimizers; each imports its framework only when used."""

from distclip.adapters import deepspeed as deepspeed
from distclip.adapters.megatron import MegatronLayouts as MegatronLayouts
from distclip.adapters.megatron import megatron_layouts as megatron_layouts
