"""The relay as Flower runs it at a site: a frame from a message goes to the vault, the vault's answer goes back.

It runs anew for every message, imports no torch, and can open no record. Which vault, the site's own environment says;
a message has no say in it.
"""

import os
from pathlib import Path

from client.relay import failure
from client.vault_client import call_vault
from common.errors import ServiceError
from common.flower import ClientApp, Context, Message, pack, unpack

__all__ = ["SOCKET", "app"]

# Environment variable with the path of the vault's Unix socket.
SOCKET = "COADAPT_VAULT_SOCKET"

app = ClientApp()


@app.train()
@app.evaluate()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """Carry one frame; whatever goes wrong is told in a fixed word, and never raised into Flower."""
    try:
        socket = os.environ.get(SOCKET)
        if not socket:
            raise ServiceError(f"the relay does not know its vault: {SOCKET} is not set; start it with client.node")
        return Message(pack(call_vault(Path(socket), unpack(message.content))), reply_to=message)
    except Exception as error:
        return failure(message, error)
