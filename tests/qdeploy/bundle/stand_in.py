"""A stand-in for an inference server: the Open Inference Protocol v2 as tritonclient speaks it, over one ONNX file.

It is no Triton: it batches nothing and knows one model. `trouble` decides what becomes of each request for inference.
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime as ort

TYPES = {"float32": "FP32", "int64": "INT64"}
NAMES = {f"tensor({kind})": short for kind, short in (("float", "FP32"), ("int64", "INT64"))}


def metadata(session, name):
    def tensors(listed):
        return [
            {
                "name": each.name,
                "datatype": NAMES[each.type],
                "shape": [d if isinstance(d, int) else -1 for d in each.shape],
            }
            for each in listed
        ]

    found = {"name": name, "versions": ["1"], "platform": "stand-in"}
    return {**found, "inputs": tensors(session.get_inputs()), "outputs": tensors(session.get_outputs())}


def handler(session, name, trouble, edit):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_):
            pass

        def reply(self, code, content, headers=()):
            self.send_response(code)
            for key, value in (("Content-Length", str(len(content))), *headers):
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            if self.path != f"/v2/models/{name}":
                return self.reply(400, json.dumps({"error": f"unknown model: {self.path}"}).encode())
            return self.reply(200, json.dumps(edit(metadata(session, name))).encode())

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            size = int(self.headers["Inference-Header-Content-Length"])
            inputs, rest = {}, body[size:]
            for each in json.loads(body[:size])["inputs"]:
                length = each["parameters"]["binary_data_size"]
                kind = {short: numpy for numpy, short in TYPES.items()}[each["datatype"]]
                inputs[each["name"]] = np.frombuffer(rest[:length], kind).reshape(each["shape"])
                rest = rest[length:]
            outputs = trouble(self, session.run(None, inputs))
            if outputs is None:
                return None
            head = [
                {
                    "name": spec.name,
                    "datatype": TYPES[array.dtype.name],
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": array.nbytes},
                }
                for spec, array in zip(session.get_outputs(), outputs, strict=True)
            ]
            text = json.dumps({"model_name": name, "model_version": "1", "outputs": head}).encode()
            content = text + b"".join(array.tobytes() for array in outputs)
            return self.reply(200, content, [("Inference-Header-Content-Length", str(len(text)))])

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that went away is what some tests are about."""


@contextmanager
def http_server(model, name, trouble=lambda _, outputs: outputs, edit=lambda said: said):
    """Serves an ONNX file; gives the URL."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    server = Server(("127.0.0.1", 0), handler(session, name, trouble, edit))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def grpc_server(model, name):
    """Serves an ONNX file over gRPC; gives the URL."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from tritonclient.grpc import service_pb2 as messages
    from tritonclient.grpc import service_pb2_grpc as services

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])

    class Service(services.GRPCInferenceServiceServicer):
        def ModelMetadata(self, request, context):  # noqa: N802 - the protocol's name
            if request.name != name:
                context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model: {request.name}")
            return messages.ModelMetadataResponse(**metadata(session, name))

        def ModelInfer(self, request, _):  # noqa: N802 - the protocol's name
            inputs = {
                each.name: np.frombuffer(raw, np.float32).reshape(each.shape)
                for each, raw in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            reply = messages.ModelInferResponse(model_name=name, model_version="1")
            for spec, array in zip(session.get_outputs(), session.run(None, inputs), strict=True):
                reply.outputs.add(name=spec.name, datatype=NAMES[spec.type], shape=array.shape)
                reply.raw_output_contents.append(array.tobytes())
            return reply

    server = grpc.server(ThreadPoolExecutor(4))
    services.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def slow(seconds):
    """Trouble: an answer that comes late."""

    def wait(_, outputs):
        time.sleep(seconds)
        return outputs

    return wait
