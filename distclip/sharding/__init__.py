"""Which rank holds which elements: the records with which users declare it by hand."""

from distclip.sharding.layout import Layout as Layout
from distclip.sharding.layout import LayoutFunction as LayoutFunction
from distclip.sharding.shard import BlockShard as BlockShard
from distclip.sharding.shard import FlatShard as FlatShard
from distclip.sharding.shard import ParamShard as ParamShard
