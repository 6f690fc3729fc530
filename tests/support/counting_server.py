"""A server of :class:`support.serving.CountingBatch` in a process of its own, whose forwards wait for a line.

``python -m support.counting_server FOLDER ROWS QUEUE`` prints its ports as one JSON object, and ends when its
standard input does. A line with a number lets so many forwards through, an empty one all.
"""

import asyncio
import json
import sys
import threading
from pathlib import Path

from support.serving import CountingBatch, GatedBatch
from unmask.models.registry import read_config
from unmask.serving.model import ServedModel
from unmask.serving.server import Server, ServerOptions


async def main(folder: Path, rows: int, queue: int) -> None:
    """Serve until standard input ends."""
    model = ServedModel.describe(folder, read_config(folder), name=None, rows=rows, context_length=64)
    batch = GatedBatch(CountingBatch(rows=rows))
    options = ServerOptions(
        port=0,
        metrics_port=0,
        max_queue_requests=queue,
        max_queue_tokens=100 * queue,
        max_request_s=1800,  # the first of very many waits until the last has come
    )
    server = Server(batch, model, options)
    await server.start()
    sys.stdout.write(json.dumps({"port": server.port, "metrics": server.metrics_port}) + "\n")
    sys.stdout.flush()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for line in sys.stdin:
            if forwards := line.strip():
                batch.let(int(forwards))
            else:
                batch.open()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, daemon=True).start()
    await ended.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
