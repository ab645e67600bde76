"""The Open Inference Protocol v2 over HTTP: tensors in JSON and in binary, metadata documents. No network code in here."""

from bitdial.serving.protocol.encoding import decode_body
from bitdial.serving.protocol.metadata import model_config, model_metadata, server_metadata
from bitdial.serving.protocol.request import InferRequest, RequestReader
from bitdial.serving.protocol.response import error_body, infer_response

__all__ = [
    "InferRequest",
    "RequestReader",
    "decode_body",
    "error_body",
    "infer_response",
    "model_config",
    "model_metadata",
    "server_metadata",
]
