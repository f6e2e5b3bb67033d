"""Servers of the tests' own, which answer as OpenAI-compatible ones do."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np


class Echoing:
    """Answers as vLLM does: with a prompt's own log-probabilities."""

    def __init__(self, logits, name="token_id:{}".format):
        self.logits, self.name, self.asked = logits, name, []

    def models(self):
        return {"data": [{"id": "tiny"}]}

    def complete(self, body):
        assert body["model"] == "tiny" and body["echo"]
        self.asked.append(body["prompt"])
        rows = [None, *self.logits(body["prompt"])]
        tokens = [*body["prompt"], 7]
        return {"choices": [{"logprobs": {
            "tokens": [self.name(token) for token in tokens],
            "token_logprobs": [
                None if row is None else row[token]
                for row, token in zip(rows, tokens, strict=True)
            ],
            "top_logprobs": [
                None if row is None else {
                    self.name(i): row[i] for i in np.argsort(row)[-body["logprobs"]:].tolist()
                }
                for row in rows
            ],
        }}]}  # fmt: skip


class LlamaCpp(Echoing):
    """Answers as llama.cpp's server does: of the token that it writes alone."""

    def complete(self, body):
        if body.get("echo"):
            raise ValueError("Only no echo is supported")
        self.asked.append(body["prompt"])
        row = self.logits(body["prompt"])[-1]
        top = np.argsort(row)[-body["logprobs"] :].tolist()
        entry = {"top_logprobs": [{"id": i, "token": "?", "logprob": row[i]} for i in top]}
        return {"choices": [{"logprobs": {"content": [entry]}}]}


class Silent(LlamaCpp):
    """Takes the wish for an echo and leaves it out of account."""

    def complete(self, body):
        return super().complete({**body, "echo": False})


class Answers(Echoing):
    """Answers whatever is asked with the same."""

    def __init__(self, answer):
        self.answer = answer

    def complete(self, body):
        return self.answer


@contextmanager
def serving(engine):
    """The address of a server whose answers an engine gives."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(engine.models)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(lambda: engine.complete(body))

        def answer(self, give):
            try:
                code, text = 200, give()
            except ValueError as error:
                code, text = 400, {"error": {"message": str(error)}}
            raw = text if isinstance(text, bytes) else json.dumps(text).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
