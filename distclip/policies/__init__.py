"""One file per policy: pure functions of tensors, without ranks and layouts."""

from distclip.policies.adagc import AdaGC as AdaGC
from distclip.policies.adagn import AdaGN as AdaGN
from distclip.policies.agc import AGC as AGC
from distclip.policies.aggc import AGGC as AGGC
from distclip.policies.autoclip import AutoClip as AutoClip
from distclip.policies.base import EmptyState as EmptyState
from distclip.policies.base import GroupSpec as GroupSpec
from distclip.policies.base import Minimum as Minimum
from distclip.policies.base import NormContext as NormContext
from distclip.policies.base import Policy as Policy
from distclip.policies.base import PolicyBase as PolicyBase
from distclip.policies.base import Scope as Scope
from distclip.policies.base import StatelessPolicy as StatelessPolicy
from distclip.policies.base import accept as accept
from distclip.policies.base import check_policy as check_policy
from distclip.policies.base import never_negative as never_negative
from distclip.policies.base import raises as raises
from distclip.policies.base import vetoes as vetoes
from distclip.policies.checks import check_not_negative as check_not_negative
from distclip.policies.clip_norm import ClipNorm as ClipNorm
from distclip.policies.clip_norm import TorchClipNorm as TorchClipNorm
from distclip.policies.clip_tensor import ClipBlockRMS as ClipBlockRMS
from distclip.policies.clip_tensor import ClipTensorNorm as ClipTensorNorm
from distclip.policies.clip_value import ClipValue as ClipValue
from distclip.policies.skip_spike import SkipSpike as SkipSpike
from distclip.policies.zclip import ZClip as ZClip
