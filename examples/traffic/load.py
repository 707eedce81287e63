"""Calls at times of their own, however long answers take: python3 load.py PORT PATH RATE SECONDS.

RATE calls a second, by chance (Poisson). A caller waits for a second. Prints what became of them.
"""

import asyncio
import collections
import random
import re
import sys
import time

PORT, PATH, RATE, SECONDS = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
PATIENCE = 1.0
free, counts = [], collections.Counter()


async def call():
    pair = None
    try:
        async with asyncio.timeout(PATIENCE):
            pair = free.pop() if free else await asyncio.open_connection("127.0.0.1", PORT)
            reader, writer = pair
            writer.write(f"GET {PATH} HTTP/1.1\r\nHost: web\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            await reader.readexactly(int(re.search(r"(?i)content-length: (\d+)", head).group(1)))
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        counts["too late"] += 1
        if pair:
            pair[1].transport.abort()
        return
    free.append(pair)
    limit = re.search(r"(?i)x-weft-overflow: (\w+)", head)
    counts[f"refused ({limit.group(1)})" if limit else head[9:12]] += 1


async def main():
    begun, due, tasks = time.monotonic(), 0.0, set()
    while due < SECONDS:
        await asyncio.sleep(max(0, begun + due - time.monotonic()))
        task = asyncio.create_task(call())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += random.expovariate(RATE)
    await asyncio.gather(*tasks)
    print(f"{sum(counts.values())} calls:", ", ".join(f"{what} {count}" for what, count in sorted(counts.items())))


asyncio.run(main())
