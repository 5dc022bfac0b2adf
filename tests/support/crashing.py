"""A kernel that listens on its unix sockets and ends a second later, before it has answered."""

import json
import sys
import time

import zmq

connection = json.load(open(sys.argv[1]))
context = zmq.Context()
sockets = []
for kind in ("shell", "iopub", "stdin", "control", "hb"):
    sockets.append(context.socket(zmq.XPUB if kind == "iopub" else zmq.ROUTER))
    sockets[-1].bind(f"ipc://{connection['ip']}-{connection[kind + '_port']}")
time.sleep(1)
sys.exit(3)
