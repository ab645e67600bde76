"""LitServe with a model that does nothing, one worker: the list of numbers goes through NumPy and comes back.

python litserve_server.py PORT
"""

from __future__ import annotations

import sys

import litserve
import numpy as np


class Echo(litserve.LitAPI):
    """Decodes to an array and encodes it again."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe acts on annotations
        return np.asarray(request["input"], np.float32)

    def predict(self, x):  # type: ignore[no-untyped-def]
        return x

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return {"output": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Echo(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, log_level="error", generate_client_file=False
    )
