"""What touches every element of a gradient: the only room that knows kinds of devices.

A kernel takes dense tensors of one device and knows no policy, no layout and no rank.
"""

from distclip.kernels.loops import clamp_ as clamp_
from distclip.kernels.loops import power_sums as power_sums
from distclip.kernels.loops import scale_ as scale_
from distclip.kernels.loops import zero_ as zero_
