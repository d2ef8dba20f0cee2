"""The first import of every command: until its guard stands, Ctrl-C ends it at once, without a traceback."""

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

_is_command = ROOT in Path(getattr(sys.modules["__main__"], "__file__", None) or "").parents[:2]
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
