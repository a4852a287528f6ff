"""The Flower app of a site: an order's bytes go to the vault, the vault's answer goes back. No torch, no records."""

import os
from pathlib import Path

from client.relay import failure
from client.vault_client import call_vault
from common.flower import ClientApp, Context, Message, pack, unpack

__all__ = ["SOCKET", "app"]

# Environment variable with the path of the vault's socket; `client/node.py` sets it.
SOCKET = "COADAPT_VAULT_SOCKET"

app = ClientApp()


@app.query("order")
def order(message: Message, context: Context) -> Message:
    """Hand an order to the vault; whatever goes wrong is told in a fixed word."""
    try:
        return Message(pack(call_vault(Path(os.environ[SOCKET]), unpack(message.content))), reply_to=message)
    except Exception as error:
        return failure(message, error)
