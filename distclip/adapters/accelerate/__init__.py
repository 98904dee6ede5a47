"""Any policy where `accelerator.clip_grad_norm_` stood, whatever `accelerator.prepare` made."""

from distclip.adapters.accelerate.handle import AcceleratedClipper as AcceleratedClipper
from distclip.adapters.accelerate.handle import prepare as prepare
