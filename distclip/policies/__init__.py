"""One file a policy: pure, and unaware of ranks and layouts."""

from distclip.policies._policy import About as About
from distclip.policies._policy import Policy as Policy
from distclip.policies._policy import Scope as Scope
from distclip.policies._policy import Stateless as Stateless
from distclip.policies._policy import check_not_negative as check_not_negative
from distclip.policies.adagc import AdaGC as AdaGC
from distclip.policies.agc import AGC as AGC
from distclip.policies.autoclip import AutoClip as AutoClip
from distclip.policies.both import Both as Both
from distclip.policies.norm import ClipNorm as ClipNorm
from distclip.policies.tensor import ClipBlockRMS as ClipBlockRMS
from distclip.policies.tensor import ClipTensorNorm as ClipTensorNorm
from distclip.policies.value import ClipValue as ClipValue
from distclip.policies.zclip import ZClip as ZClip
