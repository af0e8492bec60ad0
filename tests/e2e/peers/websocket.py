"""A WebSocket server and client, for tests/e2e/upgrades.rs. Prints one line for each thing that happens.

    websocket.py serve                      an echo; /push… sends by itself every 20 ms
    websocket.py client URL KEY how         how: once, or until the connection ends: quiet, chatty, pushed
"""

import asyncio
import sys
import time

import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve


def say(*words):
    print(*words, flush=True)


async def echo(peer):
    if "/push" in peer.request.path:
        while True:
            await peer.send("pushed")
            await asyncio.sleep(0.02)
    async for message in peer:
        await peer.send(message)


async def server():
    async with serve(echo, "127.0.0.1", 0, max_size=None) as listening:
        say("port", listening.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().create_future()


async def client(url, key, how):
    # Pingora 0.9.1 ends a tunnel at once when it reads the upstream's 101 before it has noticed the end of the request's
    # (empty) body; which comes first is chance.
    for attempt in range(10):
        if await session(url, key, how):
            return


async def session(url, key, how):
    is_open = False
    try:
        async with connect(url, additional_headers={"x-api-key": key}, max_size=None, ping_interval=None) as peer:
            for message in ["hello", "ü" * 1000, bytes(range(256)) * 4096, ""]:
                if how != "pushed":
                    await peer.send(message)
                    assert await peer.recv() == message
            await (await peer.ping())
            is_open = True
            say("open")
            if how == "once":
                await peer.close()
                say("closed", peer.close_code)
                return True
            while True:
                if how == "chatty":
                    await peer.send("again")
                    await asyncio.sleep(0.02)
                await peer.recv()
    except websockets.exceptions.InvalidStatus as refused:
        say("refused", refused.response.status_code)
    except websockets.exceptions.ConnectionClosed:
        if not is_open:
            return False
        say("ended", int(time.time() * 1000))
    return True


if sys.argv[1] == "serve":
    asyncio.run(server())
else:
    asyncio.run(client(*sys.argv[2:5]))
