"""A stranger on the network: sends a port what its protocol is made of, malformed, too large, or of another run.

python stranger.py HOST PORT KIND COUNT SECRET REPLAYED      KIND: https or zmq

Prints, as JSON, how often which HTTP status came; 0 stands for no answer.
"""

import contextlib
import json
import random
import socket
import ssl
import sys
from collections import Counter
from pathlib import Path

ZMTP = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"%s" + bytes(1) + bytes(31)  # a greeting of version 3.1
ROUTES = (
    "/health",
    "/v1/models",
    "/metrics",
    "/collective_rpc",
    "/pause",
    "/async_rlhf/sample",
    "/async_rlhf/pause?how=abort",
)


def http_message(dice: random.Random, secret: str) -> bytes:
    route, method = dice.choice(ROUTES).encode(), dice.choice([b"GET", b"POST"])
    shown = dice.choice([b"", b"Authorization: Bearer %s\r\n" % secret.encode(), b"Authorization: Bearer \r\n"])
    body = dice.randbytes(dice.randrange(300))
    head = b"%s %s HTTP/1.1\r\nHost: x\r\n%s" % (method, route, shown)
    return dice.choice(
        [
            head + b"Connection: close\r\n\r\n",
            head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
            head + b"Content-Length: %d\r\n\r\n" % 2**62 + body,
            head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + body,
            head + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
            head[: dice.randrange(len(head))],
            body,
        ]
    )


def zmtp_message(dice: random.Random) -> bytes:
    greeting = ZMTP % dice.choice([b"NULL", b"PLAIN", b"CURVE", b"?"]).ljust(20, b"\0")
    return dice.choice(
        [
            dice.randbytes(dice.randint(0, 200)),
            greeting[: dice.randint(0, len(greeting))],
            greeting + b"\x04" + bytes([dice.randrange(256)]) + dice.randbytes(dice.randint(0, 300)),
            greeting + b"\x02" + (2**62).to_bytes(8, "big") + dice.randbytes(64),
            greeting + b"\x04\x26\x05READY" + dice.randbytes(33) + b"\x00\x07command",
            greeting + b"\x04\xc8\x05HELLO" + dice.randbytes(194),
        ]
    )


def main() -> None:
    host, port, kind, count, secret = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
    replayed = [bytes.fromhex(line) for line in Path(sys.argv[6]).read_text().split()]
    dice, statuses = random.Random(port), Counter()
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    for _ in range(count):
        message = http_message(dice, secret) if kind == "https" else zmtp_message(dice)
        encrypted = kind == "https" and dice.random() < 0.7
        if replayed and dice.random() < 0.2:
            message, encrypted = dice.choice(replayed), False
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as stranger:
            stranger.settimeout(2 if encrypted else 0.02)
            if encrypted:
                stranger = anybody.wrap_socket(stranger)
            stranger.sendall(message)
            answer = b""
            if b"Connection: close" in message or dice.random() < 0.02:
                with contextlib.suppress(TimeoutError):
                    answer = stranger.recv(1000)
            status = answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/") else "0"
            statuses[status] += 1
            if encrypted:
                stranger.close()
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
