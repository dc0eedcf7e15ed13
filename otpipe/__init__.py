"""otpipe: private LLM inference. The server runs the model and learns nothing of the prompt.

>>> from otpipe import Client
>>> with Client("host:7431") as client:
...     for piece in client.generate("In the beginning"):
...         print(piece, end="", flush=True)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Client, gateway and ranks share the cores of a small machine. OpenMP's default is to spin after
# each parallel region, which steals those cores from the process whose turn it is. This must be
# set before torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from otpipe.client.client import Client

__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> object:
    """Import the client on first use, so that ``import otpipe`` stays cheap."""
    if name == "Client":
        from otpipe.client.client import Client

        return Client
    raise AttributeError(f"module 'otpipe' has no attribute {name!r}")
