"""Writes down every attempt of a process, and of the processes it starts, to reach the network.

Python imports this file at its start when its folder is on the path. Unix sockets do not leave the machine.
"""

import os
import sys

EVENTS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"}


def watch(event: str, arguments: tuple) -> None:
    if event in EVENTS and not (event == "socket.connect" and isinstance(arguments[1], (str, bytes))):
        with open(os.environ["NETWORK_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{event} {arguments!r}\n")


sys.addaudithook(watch)
