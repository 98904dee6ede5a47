"""Any policy in Lightning: a callback of its Trainer, and a function in the place of Fabric's."""

from distclip.adapters.lightning.callback import DistClip as DistClip
from distclip.adapters.lightning.fabric import clip_gradients as clip_gradients
from distclip.adapters.lightning.fabric import fabric_clipper as fabric_clipper
