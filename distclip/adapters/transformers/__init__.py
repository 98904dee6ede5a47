"""Any policy in the Trainer of transformers, and in those that inherit from it (TRL, axolotl)."""

from distclip.adapters.transformers.callback import DistClip as DistClip
from distclip.adapters.transformers.train_calls import DistClipMixin as DistClipMixin
