"""Any policy in the place of torchtitan's own clipping, with its training steps as they are."""

from distclip.adapters.torchtitan.install import Installed as Installed
from distclip.adapters.torchtitan.install import install as install
