"""The same script in a process that it starts: the main module that its `__spec__` names.

`multiprocessing` imports that module as `__mp_main__`, and Lightning starts the other ranks by
`python -m` its name, with the arguments of the script.
"""

from __future__ import annotations

from distclip.run import script

if __name__ == "__main__":
    script.run_again()
elif __name__ == "__mp_main__":
    script.run_in_spawned_process(globals())
