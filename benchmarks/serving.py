"""`anyglot serve` under load: 64 clients with mixed requests against the same requests one by one, on loopback.

The server is a process of its own with the shipped model; the clients are coroutines of this one, on plain sockets, so
that they take little of the machine. Every request (pictures, speech, transcriptions, descriptions; drawn with seeds)
is first answered alone; under load each answer must be that one again, byte for byte, so a lost request or an answer
to someone else shows. Also the server's memory before and after. Peer: the server itself without concurrency.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from anyglot_synth.nanoworld.language import describe
from anyglot_synth.nanoworld.scene import sample_scene

NANO = Path(__file__).parent.parent / "recipes" / "anyglot_recipes" / "weights" / "nano"
CHAT, SPEECH, IMAGES, HEAR = (
    f"/v1/{path}" for path in ("chat/completions", "audio/speech", "images/generations", "audio/transcriptions")
)
HOW = {"temperature": 1}


@dataclass
class Ask:
    """A request, and the digest of its answer when it was alone."""

    kind: str
    path: str
    body: bytes
    content_type: str = "application/json"
    alone: str = ""


class Client:
    """One connection with keep-alive."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, method: str, path: str, body: bytes = b"", content_type: str = "") -> tuple[int, bytes]:
        """Status and body of the response."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        reader, writer = self.streams
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if found := re.search(r"content-length: (\d+)", answer):
            content = await reader.readexactly(int(found.group(1)))
        else:
            content = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                content += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        return int(answer.split()[1]), content

    async def ask(self, ask: Ask) -> tuple[str, bytes]:
        """Digest of the answer without what is new each time, and the answer."""
        status, content = await self.send("POST", ask.path, ask.body, ask.content_type)
        if status != 200:
            return f"{status} {content[:200]!r}", content
        lasting = content if content[:1] != b"{" else re.sub(rb'"(id|created)":("[^"]*"|\d+)', b"", content)
        return hashlib.sha256(lasting).hexdigest(), content

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()


def ask_json(kind: str, path: str, **content: Any) -> Ask:
    return Ask(kind, path, json.dumps(content).encode())


def form(file: bytes, **fields: object) -> tuple[bytes, str]:
    """A multipart form and its content type."""
    edge = "7d3f1c0b9a"
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
    ]
    head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
    return b"".join([*parts, head, file, f"\r\n--{edge}--\r\n".encode()]), f"multipart/form-data; boundary={edge}"


async def prepare(client: Client, scenes: int) -> list[Ask]:
    """Requests of four kinds; what the first two answer is what the others ask about."""
    rng, asks = np.random.default_rng(0), list[Ask]()
    for i in range(scenes):
        text = describe(sample_scene(rng, "train"))
        picture = ask_json("text->image", IMAGES, prompt=text, seed=i, **HOW)
        speech = ask_json("text->speech", SPEECH, input=text, voice="x", seed=i, **HOW)
        seen = json.loads((await client.ask(picture))[1])["data"][0]["b64_json"]
        heard = (await client.ask(speech))[1]
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{seen}"}}
        messages = [{"role": "user", "content": [part]}]
        body, kind = form(heard, seed=i, temperature=1)
        described = ask_json("image->text", CHAT, messages=messages, seed=i, **HOW)
        asks += [picture, speech, described, Ask("speech->text", HEAR, body, kind)]
    return asks


async def memory(port: int) -> float:
    """Resident MiB of the server."""
    client = Client(port)
    _, page = await client.send("GET", "/metrics")
    client.close()
    found = re.search(rb"^process_resident_memory_bytes (\S+)", page, re.MULTILINE)
    assert found is not None
    return float(found.group(1)) / 2**20


async def load(port: int, asks: list[Ask], clients: int, seconds: float) -> tuple[int, list[str], float]:
    """Requests answered, what was wrong with some of them, and the time from first to last."""
    began, answered, wrong = time.perf_counter(), 0, list[str]()

    async def one(number: int) -> None:
        nonlocal answered
        client, turn = Client(port), number
        while time.perf_counter() - began < seconds:
            ask = asks[turn % len(asks)]
            turn += 1 + clients % len(asks)
            try:
                digest, _ = await client.ask(ask)
            except (OSError, EOFError) as error:
                wrong.append(f"{ask.kind} was lost: {error!r}")
                client.close()
                client = Client(port)
                continue
            answered += 1
            if digest != ask.alone:
                wrong.append(f"{ask.kind}: {digest} instead of {ask.alone}")
        client.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return answered, wrong, time.perf_counter() - began


async def measure(port: int, arguments: argparse.Namespace) -> dict[str, float]:
    client = Client(port)
    asks = await prepare(client, arguments.scenes)
    began = time.perf_counter()
    for ask in asks:
        ask.alone, _ = await client.ask(ask)
        assert len(ask.alone) == 64, ask.alone
    single = len(asks) / (time.perf_counter() - began)
    client.close()
    await load(port, asks, arguments.clients, min(2.0, arguments.seconds))  # warm: every row has been in use
    before = await memory(port)
    answered, wrong, seconds = await load(port, asks, arguments.clients, arguments.seconds)
    after = await memory(port)
    many = answered / seconds
    print(f"one by one {single:.1f} requests/s, {arguments.clients} clients {many:.1f} requests/s, {answered} in all")
    print(f"memory of the server: {before:.0f} MiB before, {after:.0f} MiB after")
    print(f"{len(wrong)} answers lost or wrong", *sorted(set(wrong))[:5], sep="\n  ")
    return {
        "throughput of 64 clients over one by one": round(many / single, 2),
        "right answers of all": round(1 - len(wrong) / max(1, answered), 5),
        "memory after over before (1 is best)": round(after / before, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=8, help="four requests each")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "anyglot_recipes.cli", "serve", "--model", str(NANO), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", server.stderr.readline())
            assert found is not None, server.stderr.read()
            ratios = asyncio.run(measure(int(found.group(1)), arguments))
        finally:
            server.terminate()
    versions = {name: version(name) for name in ("torch", "fastapi", "uvicorn")}
    print(json.dumps({"benchmark": "serving", "ratios": ratios, "versions": versions}))


if __name__ == "__main__":
    main()
