"""Gradient clipping that is right and fast on any sharded PyTorch training."""

from distclip import torch_version as torch_version  # isort: split

from distclip import adapters as adapters
from distclip import functional as functional
from distclip import monitoring as monitoring
from distclip import sharding as sharding
from distclip.api import clip_grad_norm_ as clip_grad_norm_
from distclip.api import clip_grad_value_ as clip_grad_value_
from distclip.api import clip_grads_with_norm_ as clip_grads_with_norm_
from distclip.api import get_total_norm as get_total_norm
from distclip.clipper import Clipper as Clipper
from distclip.decision import Decision as Decision
from distclip.errors import CollectiveError as CollectiveError
from distclip.errors import LayoutError as LayoutError
from distclip.errors import NonFiniteGradientError as NonFiniteGradientError
from distclip.errors import SkippedStepsError as SkippedStepsError
from distclip.monitoring import History as History
from distclip.norms.plan import Plan as Plan
from distclip.parity import parity as parity
from distclip.policies import AGC as AGC
from distclip.policies import AGGC as AGGC
from distclip.policies import AdaGC as AdaGC
from distclip.policies import AdaGN as AdaGN
from distclip.policies import AutoClip as AutoClip
from distclip.policies import ClipBlockRMS as ClipBlockRMS
from distclip.policies import ClipNorm as ClipNorm
from distclip.policies import ClipTensorNorm as ClipTensorNorm
from distclip.policies import ClipValue as ClipValue
from distclip.policies import EmptyState as EmptyState
from distclip.policies import Minimum as Minimum
from distclip.policies import NormContext as NormContext
from distclip.policies import Policy as Policy
from distclip.policies import PolicyBase as PolicyBase
from distclip.policies import Scope as Scope
from distclip.policies import SkipSpike as SkipSpike
from distclip.policies import StatelessPolicy as StatelessPolicy
from distclip.policies import ZClip as ZClip
from distclip.report import Report as Report
from distclip.sharding import Layout as Layout
from distclip.version import __version__ as __version__
