"""What happened over a run: written while it trains, read afterwards.

`read_run` and what follows from it need NumPy (`distclip[cli]`), which `History` does not.
"""

from distclip.monitoring.history import History as History
from distclip.monitoring.history import Writer as Writer
from distclip.monitoring.writers import TensorBoardWriter as TensorBoardWriter
from distclip.monitoring.writers import WandbWriter as WandbWriter
