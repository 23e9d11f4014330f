"""Run with a Python that has openpi-client: its own client against a server. python openpi_client_check.py PORT"""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

port = int(sys.argv[1])
picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
sent = {
    "observation/image": picture, "observation/wrist_image": picture[::-1], "prompt": "lift the red cube",
    "observation/state": np.arange(8) / 8,
}  # fmt: skip
client = WebsocketClientPolicy("127.0.0.1", port, api_key="a-token-of-some-length")
found = {"metadata": {k: v for k, v in client.get_server_metadata().items() if isinstance(v, int | str)}}
reply = client.infer(sent)
found["actions"], found["dtype"] = reply["actions"].tolist(), str(reply["actions"].dtype)
found["timing"] = sorted(reply["server_timing"])
try:
    client.infer({"prompt": "x"})
except RuntimeError as error:
    found["error"] = str(error)
found["again"] = client.infer(sent)["actions"].shape
broker = ActionChunkBroker(client, 4)
found["broker"] = [broker.infer(sent)["actions"].tolist() for _ in range(5)]
print(json.dumps(found))
