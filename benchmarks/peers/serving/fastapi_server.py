"""A plain FastAPI app on uvicorn: the list of numbers goes through NumPy and comes back.

python fastapi_server.py PORT
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

app = FastAPI()


@app.post("/predict")
async def predict(body: dict[str, Any]) -> dict[str, Any]:
    """Echo."""
    return {"output": np.asarray(body["input"], np.float32).tolist()}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", loop="uvloop", http="httptools")
