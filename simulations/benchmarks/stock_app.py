"""A Flower app whose rounds are four message phases and nothing else, written as Flower's own examples are.

It stands alone: `flwr run` ships this file, so it imports nothing of Coadapt. The first phase carries arrays to the
clients and the third brings arrays of the same size back, as a protocol that masks its vectors would.
"""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

PHASES = 4
BROUGHT = 3
LOOK_SECONDS = 0.5

client = ClientApp()
server = ServerApp()


def arrays(values: int) -> ArrayRecord:
    """So many float32 of noise: equal bytes would be sent once."""
    return ArrayRecord({"vector": torch.rand(values)})


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Answer at once."""
    asked = message.content.config_records["asked"]
    content = RecordDict({"said": ConfigRecord({"phase": asked["phase"]})})
    if asked["phase"] == BROUGHT:
        content["arrays"] = arrays(int(asked["values"]))  # type: ignore[arg-type]
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Write a list of rounds to the file `into`: for each, the seconds since 1970 at its beginning and phases' ends."""
    asked = {name: int(context.run_config[name]) for name in ("rounds", "sites", "values")}
    while len(nodes := list(grid.get_node_ids())) < asked["sites"]:
        time.sleep(LOOK_SECONDS)
    rounds = []
    for _ in range(asked["rounds"]):
        times = [time.time()]
        for phase in range(1, PHASES + 1):
            content = RecordDict({"asked": ConfigRecord({"phase": phase, "values": asked["values"]})})
            if phase == 1:
                content["arrays"] = arrays(asked["values"])
            replies = list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))
            if len(replies) < len(nodes) or any(reply.has_error() for reply in replies):
                raise RuntimeError("a client did not answer")
            times.append(time.time())
        rounds.append(times)
    into = Path(str(context.run_config["into"]))
    into.with_suffix(".part").write_text(json.dumps(rounds), encoding="utf-8")
    into.with_suffix(".part").replace(into)
