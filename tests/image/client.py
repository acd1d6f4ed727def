"""The load of the demo, run in the container with `python -c`: the key comes from standard input.

It prints "REQUESTS FAILED EVENTS COMPLETE": requests for the models that clients sent one after the
other during a streamed chat, and of this its events, and 1 if it had all of them.
"""

import http.client
import json
import sys
import threading

PORT = 9090
key = sys.stdin.readline().strip()
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
CHAT = {"model": "grok-4.5", "stream": True, "messages": [{"role": "user", "content": "Count."}]}
enough = threading.Event()
statuses: list[int] = []


def ask() -> None:
    while not enough.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
        try:
            connection.request("GET", "/v1/models", headers=headers)
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        except (OSError, http.client.HTTPException):
            statuses.append(0)
        finally:
            connection.close()


clients = [threading.Thread(target=ask) for _ in range(int(sys.argv[1]))]
for client in clients:
    client.start()
connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), headers)
answer = connection.getresponse()
print("begun", flush=True)
body = answer.read()
enough.set()
for client in clients:
    client.join()
failed = sum(status != 200 for status in statuses)
complete = answer.status == 200 and body.endswith(b"data: [DONE]\n\n")
print(len(statuses), failed, body.count(b"data: "), int(complete))
