"""Does clipping on ranks do what it would do in one process? For your model, in your CI."""

from distclip.parity.clips import Clip as Clip
from distclip.parity.comparison import Cell as Cell
from distclip.parity.comparison import Outcome as Outcome
from distclip.parity.comparison import compare as compare
from distclip.parity.kit import parity as parity
from distclip.parity.pieces import Assembled as Assembled
from distclip.parity.pieces import Piece as Piece
from distclip.parity.pieces import assemble as assemble
from distclip.parity.pieces import gradient_pieces as gradient_pieces
from distclip.parity.report import ParityReport as ParityReport
from distclip.parity.whole import whole_gradients as whole_gradients
