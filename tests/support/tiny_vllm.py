"""Small stand-ins for a vLLM server and its model: a scripted HTTP server, a stub program, a tiny tokenizer."""

from __future__ import annotations

import json
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from biomerge_lib.core.records import Record
from biomerge_lib.prompts.tokenizer import ADDED_TOKENS

KEY = "a-key"
MODEL_ID = "tiny-run"
EOS = "<eos>"
SENTENCES = [
    "Aspirin can trigger asthma attacks .",
    "No effect was seen .",
    "Naloxone reverses hypotension in rats .",
    "β-blockers reduce angina .",
    "Cocaine causes seizures and cocaine causes death .",
    "Patients had renal failure .",
    "Lithium , sodium and potassium .",
    "Dopamine is a transmitter .",
]
MENTIONS = [
    [(0, 7), (20, 26)],
    [],
    [(0, 8), (18, 29)],
    [(0, 10), (18, 24)],
    [(0, 7)],
    [(13, 26)],
    [(0, 7)],
    [(0, 8)],
]


def make_records(count: int = 8) -> list[Record]:
    return [
        Record(text=SENTENCES[i % 8], spans=tuple(MENTIONS[i % 8]), doc_id=f"d{i}", dataset="toy")
        for i in range(count)
    ]


def train_bpe():
    """A byte-level BPE of a few merges, as the ``tokenizers`` library makes it, with EOS and the five tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, " 0-7 ; 20-34"], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED_TOKENS])
    return tokenizer


def save_tokenizer_files(folder: Path) -> Path:
    """tokenizer.json and tokenizer_config.json, without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    train_bpe().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class FakeServer:
    """The part of vLLM's protocol that the client uses, answering as scripted.

    ``reply(prompt_ids, nth)`` gives the answer to the ``nth`` request (from 1) for a prompt: a text, an HTTP status,
    a dictionary (the body), ``"close"`` (the connection drops) or ``"hang"`` (no answer until the test ends).
    """

    def __init__(self, tokenizer, reply: Callable[[tuple[int, ...], int], object] = lambda ids, nth: " 0-7"):
        self.tokenizer = tokenizer
        self.reply = reply
        self.model_id, self.root, self.max_model_len = MODEL_ID, None, 512
        self.bodies: list[dict] = []
        self.asked: Counter = Counter()
        self.in_flight = self.most_in_flight = 0
        self._together = threading.Barrier(1)
        self._lock = threading.Lock()
        self._released = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                fake._models(self)

            def do_POST(self):
                fake._completion(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, *_):
                pass

        self._http = Server(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._released.set()
        self._http.shutdown()
        self._http.server_close()

    def answer_together(self, count: int) -> None:
        """Answer no request before so many have come."""
        self._together = threading.Barrier(count)

    @property
    def requests(self) -> int:
        return len(self.bodies)

    def _models(self, handler) -> None:
        if handler.headers["Authorization"] != f"Bearer {KEY}":
            return self._send(handler, 401, {"error": "Unauthorized"})
        card = {
            "id": self.model_id,
            "object": "model",
            "root": self.root,
            "max_model_len": self.max_model_len,
        }
        self._send(handler, 200, {"object": "list", "data": [card]})

    def _completion(self, handler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        ids = tuple(body["prompt"])
        with self._lock:
            self.bodies.append(body)
            self.asked[ids] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            reply = self.reply(ids, self.asked[ids])
        self._together.wait(60)
        with self._lock:
            self.in_flight -= 1
        if reply == "hang":
            self._released.wait(30)
        elif reply == "close":
            handler.close_connection = True
            handler.connection.close()
        elif isinstance(reply, int):
            self._send(handler, reply, {"error": {"message": f"scripted {reply}"}}, {"retry-after-ms": "5"})
        elif isinstance(reply, dict):
            self._send(handler, 200, reply)
        else:
            answer_ids = self.tokenizer(reply, add_special_tokens=False)["input_ids"]
            eos = [self.tokenizer.eos_token_id]
            choice = {"index": 0, "text": reply, "finish_reason": "stop", "token_ids": [*answer_ids, *eos]}
            choice["prompt_token_ids"] = list(ids)
            self._send(
                handler, 200, {"id": "x", "object": "text_completion", "model": "m", "choices": [choice]}
            )

    @staticmethod
    def _send(handler, status: int, body: dict, headers: dict | None = None) -> None:
        payload = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(payload)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)


STUB_SERVER = """
import http.server, json, os, signal, subprocess, sys, threading
arguments = {flag: value for flag, value in zip(sys.argv, sys.argv[1:]) if flag.startswith("--")}
# An engine process that does not mind SIGTERM, as a worker in a long kernel.
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
mind = "import time; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", ignore if os.environ.get("STUB_STUBBORN") else mind])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        self.send_response(200 if known or self.path == "/health" else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": arguments["--served-model-name"]}]}).encode())

http.server.ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""


def make_stub_python(folder: Path, *, version: str = "vllm==0.0.1", run: str | None = None) -> str:
    """A program that looks like an interpreter with vLLM and runs the stub server (or the shell line ``run``)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stub_server.py").write_text(STUB_SERVER)
    # A server is started with "-c CODE" and arguments, and its version asked for with "-c CODE" alone.
    start = run or f'shift 2; exec {sys.executable} {folder}/stub_server.py "$@"'
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nif [ $# = 2 ]; then echo "{version}"; exit 0; fi\n{start}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def make_model_folder(folder: Path) -> Path:
    """A folder that passes for a model (nothing loads it)."""
    save_tokenizer_files(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder
