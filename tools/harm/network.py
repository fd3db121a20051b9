"""Two machines as network namespaces, joined by a wire that can be cut, lose packets, or deliver them late and in another order.

    namespace 0: tun0 10.77.0.1  <──  this process reads packets, keeps them for a while, writes them  ──>  tun0 10.77.0.2: namespace 1

Needs root, and the `ip` command.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 9000
_HEARD_BYTES = 2**16
_ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class Quality:
    """What becomes of packets: the share that is lost, and how long each is kept, [least, most] seconds."""

    lost: float = 0.0
    delay_s: tuple[float, float] = (0.0, 0.0)


GOOD, CUT = Quality(), Quality(lost=1.0)


class TwoMachines:
    """Namespaces with a wire between them, until `close`.

    Attributes:
        heard: the first bytes of each TCP connection, one way, by where they go (address, port) and the port they come from.
    """

    def __init__(self, name: str) -> None:
        self.heard: dict[tuple[str, int, int], bytearray] = {}
        self.names = [f"{name}-{i}" for i in range(2)]
        self.quality = GOOD
        self._over = threading.Event()
        self._ends = [
            self._make(*machine) for machine in zip(self.names, _ADDRESSES, reversed(_ADDRESSES), strict=True)
        ]
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()

    def command(self, machine: int) -> list[str]:
        """What to begin a command with that runs on a machine; its name there is in SLURMD_NODENAME."""
        return ["ip", "netns", "exec", self.names[machine], "env", f"SLURMD_NODENAME=m{machine}"]

    def spoil(self, quality: Quality, seconds: float) -> None:
        """For so long."""
        self.quality = quality
        threading.Timer(seconds, lambda: setattr(self, "quality", GOOD)).start()

    def close(self) -> None:
        self._over.set()
        self._carrier.join()
        for end, name in zip(self._ends, self.names, strict=True):
            os.close(end)
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def _make(self, name: str, address: str, peer: str) -> int:
        subprocess.run(["ip", "netns", "add", name], check=True)
        with ThreadPoolExecutor(1) as other:  # only a thread can be in another namespace, and it must not come back
            end = other.submit(_open_tun, name).result()
        for command in (
            f"addr add {address} peer {peer} dev tun0",
            f"link set tun0 mtu {_MTU} up",
            "link set lo up",
        ):
            subprocess.run(["ip", "-n", name, *command.split()], check=True)
        return end

    def _carry(self) -> None:
        dice = random.Random(0)
        kept: list[tuple[float, int, int, bytes]] = []  # when it is due, its number, where to, what
        number = 0
        while not self._over.is_set():
            pause = min(0.05, max(0.0, kept[0][0] - time.monotonic())) if kept else 0.05
            readable, _, _ = select.select(self._ends, [], [], pause)
            for end in readable:
                packet, quality = os.read(end, _MTU + 100), self.quality
                self._hear(packet)
                if dice.random() >= quality.lost:
                    due = time.monotonic() + dice.uniform(*quality.delay_s)
                    heapq.heappush(kept, (due, number, self._ends[1 - self._ends.index(end)], packet))
                    number += 1
            while kept and kept[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(kept)
                os.write(end, packet)

    def _hear(self, packet: bytes) -> None:
        if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
            return
        start = (packet[0] & 15) * 4
        source, target = struct.unpack_from("!HH", packet, start)
        content = packet[start + (packet[start + 12] >> 4) * 4 :]
        stream = self.heard.setdefault((socket.inet_ntoa(packet[16:20]), target, source), bytearray())
        if len(stream) < _HEARD_BYTES:
            stream += content


def _open_tun(namespace: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open("rb") as place:
        if libc.setns(place.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {namespace}")
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", b"tun0", _IFF_TUN | _IFF_NO_PI))
    return tun
