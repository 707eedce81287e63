"""WebSockets that say back what they are sent, for a server of ASGI (hypercorn); `x-over` tells by which HTTP one came."""


async def app(scope, receive, send):
    if scope["type"] != "websocket":
        raise NotImplementedError(scope["type"])
    await receive()
    over = [(b"x-over", scope["http_version"].encode())]
    await send({"type": "websocket.accept", "headers": over})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") == "close":
            await send({"type": "websocket.close", "code": 4001, "reason": "asked to"})
            return
        await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})
