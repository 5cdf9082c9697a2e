"""Clients that leave in the middle: afterwards no page is taken, no place in the queue, and answers are what they were.

    python tests/long/disconnect_campaign.py --disconnects 1000 --out benchmarks/results/serve-disconnects-2026-01-01

Each client asks for a random kind of answer and leaves at a random moment, by closing or by resetting the connection:
while it still sends, before the answer, after the headers, or after some of the stream. Exit codes: 0 nothing leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from served import MODEL, MemoryWatch, campaign_server, get_json, server_process, stats, wait_until_idle

from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic

AT_ONCE = 24
MOMENTS = ("sending", "waiting", "headers", "streaming", "ending")
PROBE = {"model": MODEL, "prompt": "The price of a red coat", "max_tokens": 24, "temperature": 0}


def request_of(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body: streams mostly, several choices now and then, prompts that share beginnings."""
    shared = [20 + n % 50 for n in range(rng.choice((0, 33, 64, 200)))]
    own = [rng.randint(10, 4000) for _ in range(rng.randint(1, 120))]
    common = {
        "model": MODEL,
        "max_tokens": rng.choice((8, 64, 300)),
        "stream": rng.random() < 0.8,
        "n": rng.choice((1, 1, 1, 3)),
    }
    if rng.random() < 0.5:
        return "/v1/completions", {**common, "prompt": [*shared, *own], "ignore_eos": True}
    text = " ".join(rng.choice(("order", "coat", "你好", "where", "🙂")) for _ in range(rng.randint(1, 60)))
    return "/v1/chat/completions", {**common, "messages": [{"role": "user", "content": text}], "ignore_eos": True}


async def leave(host: str, port: int, rng: random.Random) -> str:
    """One client. Returns: when it left, and how."""
    route, body = request_of(rng)
    data = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    whole, moment = head.encode() + data, rng.choice(MOMENTS)
    reader, writer = await asyncio.open_connection(host, port)
    how = "reset" if rng.random() < 0.5 else "closed"
    try:
        writer.write(whole[: rng.randint(1, len(whole) - 1)] if moment == "sending" else whole)
        await writer.drain()
        await _read_until(moment, reader, rng)
    except ConnectionError:
        how = "ended by the server"
    finally:
        if how == "reset":
            # With no time to linger, close sends RST instead of FIN.
            own: Any = writer.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return f"{moment}, {how}"


async def _read_until(moment: str, reader: asyncio.StreamReader, rng: random.Random) -> None:
    if moment in ("sending", "waiting"):
        await asyncio.sleep(rng.uniform(0, 0.1))
        return
    with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(20):
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(rng.randint(1, 12) if moment != "headers" else 0):
                if not await reader.read(1 if moment == "ending" else 400):
                    return


async def campaign(url: str, count: int, seed: int) -> Counter[str]:
    """`count` clients that leave, some at once. Returns: how they left."""
    place = urlsplit(url)
    assert place.hostname and place.port
    rng, left, gate = random.Random(seed), Counter[str](), asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with gate:
            left[await leave(str(place.hostname), int(place.port or 0), random.Random(seed * 1_000_003 + number))] += 1

    await asyncio.gather(*(one(rng.randrange(10**9)) for _ in range(count)))
    return left


def run(count: int, seed: int) -> dict[str, Any]:
    """The whole campaign. Returns: the result as plain data."""
    with tempfile.TemporaryDirectory() as folder, campaign_server(Path(folder)) as target:
        probe = get_json(f"{target.url}/v1/completions", PROBE)["choices"][0]["text"]
        asyncio.run(campaign(target.url, 50, seed + 1))  # memory that any use takes, before it is watched
        before = wait_until_idle(target)
        began = time.monotonic()
        with MemoryWatch(server_process(target)) as memory:
            left = asyncio.run(campaign(target.url, count, seed))
            after = wait_until_idle(target)
            time.sleep(1)
        seconds = time.monotonic() - began
        again = get_json(f"{target.url}/v1/completions", PROBE)["choices"][0]["text"]
        health = get_json(f"{target.url}/health")
        end = wait_until_idle(target)
        restarts = stats(target)["restarts"]
    leaked = end["engine"]["pages_used"]
    return {
        "schema": "tunesmith.disconnects",
        "schema_version": 1,
        "disconnects": sum(left.values()),
        "left": dict(left.most_common()),
        "seconds": seconds,
        "pages_leaked": leaked,
        "places_leaked": end["places_taken"],
        "still_running": end["engine"]["num_running"] + end["engine"]["num_waiting"],
        "engine_restarts": restarts,
        "same_answer_after": probe == again,
        "health": health,
        "memory_start_bytes": memory.mean_between(0, 3),
        "memory_end_bytes": memory.mean_between(seconds - 3, seconds),
        "stats": {"before": before, "after": after},
        "passed": not leaked and not end["places_taken"] and not restarts and probe == again
        and not end["engine"]["num_running"] and not end["engine"]["num_waiting"],
        "environment": environment_fingerprint(),
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a folder for disconnects.json")
    arguments = parser.parse_args()
    result = run(arguments.disconnects, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(arguments.out / "disconnects.json", result)
    shown = {key: value for key, value in result.items() if key not in ("environment", "stats")}
    print(json.dumps(shown, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
