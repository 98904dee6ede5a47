"""One file a policy: pure, and unaware of ranks and layouts."""

from distclip.policies._policy import Policy as Policy
from distclip.policies._policy import Scope as Scope
from distclip.policies._policy import check_not_negative as check_not_negative
from distclip.policies.norm import ClipNorm as ClipNorm
