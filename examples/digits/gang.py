"""The processes of a job as one group, which adds up arrays over TCP.

Rank 0 listens on MASTER_PORT, which p2pit keeps free for the job on the machine of rank 0; the
others connect to the host they find in HOST_GROUP0_PROCESS0. A sum goes by way of rank 0, which
adds in the order of the ranks and gives everybody the same bits: what is computed from sums
alone stays the same in all processes.

Nothing here waits for ever: a rank that ends, or says nothing for a while, is an error in all
the others. (Where one ends with an error p2pit ends the others, too.)
"""

import os
import select
import socket
import struct
import time

import numpy as np

# Before they meet, one rank may be installing packages while another has them.
MEET_WITHIN_S = float(os.environ.get("MEET_WITHIN_S", 900))
# Rank 0 judges and saves between two sums, which takes well below a second.
ANSWER_WITHIN_S = float(os.environ.get("ANSWER_WITHIN_S", 120))
HELLO_WITHIN_S = 10
RETRY_AFTER_S = 0.2

# Job, rank, number of ranks.
HELLO = struct.Struct("!64sII")
LENGTH = struct.Struct("!Q")
WELCOME = b"welcome\n"


class GangError(Exception):
    """What is wrong with the other processes."""


class Gang:
    """All processes of the job. With just one of them, nothing is sent anywhere."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self._hosts = _hosts()
        # By rank: of rank 0 all others, of the others rank 0.
        self._peers = {}
        if self.size > 1:
            deadline = time.monotonic() + MEET_WITHIN_S
            self._listen(deadline) if self.rank == 0 else self._connect(deadline)

    def sum(self, array):
        """The sum of the arrays of all ranks."""
        received = self._to_root(array.tobytes())
        if self.rank > 0:
            return np.frombuffer(self._from_root(None, array.nbytes), array.dtype)
        total = array.copy()
        for other in received:
            total += np.frombuffer(other, array.dtype)
        self._from_root(total.tobytes(), array.nbytes)
        return total

    def broadcast(self, array):
        """The array of rank 0; those of the others have the same size and type."""
        received = self._from_root(array.tobytes() if self.rank == 0 else None, array.nbytes)
        return np.frombuffer(received, array.dtype)

    def check_same(self, digest, what):
        """That all ranks have the same digest; what it is the digest of, for the error."""
        received = self._to_root(digest)
        everybody = self._from_root(
            b"".join([digest, *received]) if self.rank == 0 else None, len(digest) * self.size
        )
        digests = [everybody[i : i + len(digest)] for i in range(0, len(everybody), len(digest))]
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise GangError(f"the {what} of {self._name(rank)} and of rank 0 differ")

    def close(self):
        for peer in self._peers.values():
            peer.close()

    def _to_root(self, payload):
        """Of each other rank, in order, what it sent; rank 0 gets it, the others nothing."""
        if self.rank == 0:
            return [self._receive(rank, len(payload)) for rank in range(1, self.size)]
        self._send(0, payload)
        return []

    def _from_root(self, payload, length):
        """What rank 0 gives to all."""
        if self.rank > 0:
            return self._receive(0, length)
        for rank in range(1, self.size):
            self._send(rank, payload)
        return payload

    def _send(self, rank, payload):
        try:
            self._peers[rank].sendall(LENGTH.pack(len(payload)) + payload)
        except OSError as error:
            raise GangError(f"{self._name(rank)} is gone: {error}") from error

    def _receive(self, rank, length):
        try:
            (coming,) = LENGTH.unpack(_read(self._peers[rank], LENGTH.size))
            if coming != length:
                raise GangError(f"{self._name(rank)} sent {coming} bytes instead of {length}")
            return _read(self._peers[rank], length)
        except TimeoutError as error:
            text = f"{self._name(rank)} said nothing for {ANSWER_WITHIN_S:g} s"
            raise GangError(text) from error
        except OSError as error:
            raise GangError(f"{self._name(rank)} is gone: {error}") from error

    def _listen(self, deadline):
        port = _port()
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        both = family == socket.AF_INET6
        try:
            server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise GangError(f"cannot listen on port {port}: {error}") from error
        with server:
            while len(self._peers) < self.size - 1:
                left = max(deadline - time.monotonic(), 0)
                ready, _, _ = select.select([server, *self._peers.values()], [], [], left)
                if not ready:
                    missing = [rank for rank in range(1, self.size) if rank not in self._peers]
                    names = ", ".join(map(self._name, missing))
                    raise GangError(f"not here within {MEET_WITHIN_S:g} s: {names}")
                for rank, peer in self._peers.items():
                    # It has nothing to say before it is welcomed.
                    if peer in ready:
                        raise GangError(f"{self._name(rank)} is gone before all were here")
                if server in ready:
                    self._admit(server.accept()[0])
        for rank, peer in self._peers.items():
            try:
                peer.sendall(WELCOME)
            except OSError as error:
                raise GangError(f"{self._name(rank)} is gone: {error}") from error

    def _admit(self, peer):
        """Keeps a process of this job; whoever else found the port is not answered."""
        try:
            peer.settimeout(HELLO_WITHIN_S)
            job, rank, size = HELLO.unpack(_read(peer, HELLO.size))
            is_expected = 0 < rank < self.size and rank not in self._peers
            if (job, size) != (_job(), self.size) or not is_expected:
                raise OSError("not of this job")
        except OSError:
            peer.close()
            return
        self._keep(rank, peer)

    def _connect(self, deadline):
        host, port = self._hosts[0], _port()
        while True:
            left = max(deadline - time.monotonic(), 0.001)
            try:
                peer = socket.create_connection((host, port), timeout=left)
                break
            except OSError as error:
                if time.monotonic() + RETRY_AFTER_S > deadline:
                    text = f"no rank 0 at {host}, port {port}, within {MEET_WITHIN_S:g} s: {error}"
                    raise GangError(text) from error
                # It may not have come to listening yet.
                time.sleep(RETRY_AFTER_S)
        self._keep(0, peer)
        try:
            peer.sendall(HELLO.pack(_job(), self.rank, self.size))
            # Rank 0 answers once all are there.
            peer.settimeout(left)
            welcome = _read(peer, len(WELCOME))
        except TimeoutError as error:
            text = f"not all were here within {MEET_WITHIN_S:g} s: {self._name(0)} waits for them"
            raise GangError(text) from error
        except OSError as error:
            raise GangError(f"{self._name(0)} is gone before all were here: {error}") from error
        if welcome != WELCOME:
            raise GangError(f"something else answers at {host}, port {port}")
        peer.settimeout(ANSWER_WITHIN_S)

    def _keep(self, rank, peer):
        peer.settimeout(ANSWER_WITHIN_S)
        # Each step waits for a short message.
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[rank] = peer

    def _name(self, rank):
        return f"rank {rank} on {self._hosts.get(rank, 'an unknown host')}"


def _hosts():
    """The host of each rank, in the order of groups and of the processes in them."""
    hosts = []
    for group in range(int(os.environ.get("NUM_GROUPS", 0))):
        for process in range(int(os.environ[f"NUM_PROCESSES_GROUP{group}"])):
            hosts.append(os.environ[f"HOST_GROUP{group}_PROCESS{process}"])
    return dict(enumerate(hosts))


def _job():
    return os.environ.get("JOB_ID", "").encode()[:64].ljust(64, b"\0")


def _port():
    return int(os.environ["MASTER_PORT"])


def _read(peer, length):
    """Exactly this many bytes."""
    received = bytearray()
    while len(received) < length:
        part = peer.recv(min(length - len(received), 1 << 20))
        if not part:
            raise ConnectionError("it closed the connection")
        received += part
    return bytes(received)
