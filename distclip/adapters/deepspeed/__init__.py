"""Any policy on a DeepSpeed engine, ZeRO 0 to 3, instead of the engine's own clipping."""

from distclip.adapters.deepspeed.handle import Handle as Handle
from distclip.adapters.deepspeed.handle import attach as attach
