"""A producer process: address, name, batches, records per batch, pause in seconds between batches.

Prints ``ready`` once it is connected, and ``{"sent": n, "dropped": {...}}`` at its end. The i-th record that is sent
has request id ``<name>-<i // 50>`` and position ``i % 50``. It ends after its batches and, where a line ``wait`` was
written to it, not before another line comes.
"""

import json
import sys
import time
from dataclasses import replace

from attnhook.errors import DroppedError
from attnhook.sinks.zmq import ZmqSink
from tests.sinks.samples import record

address, name, frames, size, pause = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:6])
kinds = [record(position) for position in range(50)]
sink = ZmqSink()
sink.open(f"{address}?linger=30s")
print("ready", flush=True)
hold = sys.stdin.readline().strip() == "wait"
for _ in range(int(frames)):
    first = sink.sent
    try:
        sink.write([replace(kinds[i % 50], request_id=f"{name}-{i // 50}") for i in range(first, first + int(size))])
    except DroppedError:
        time.sleep(0.01)  # its numbers are used by the next batch
    time.sleep(pause)
if hold:
    print("sent", flush=True)
    sys.stdin.readline()
sink.close()
print(json.dumps({"sent": sink.sent, "dropped": sink.dropped}), flush=True)
