"""The relay: carries an envelope from Flower to the vault and back. It imports no torch and reads no record."""

from typing import Protocol

from client.state import SiteState
from common.errors import error_code
from common.flower import ConfigRecord, Context, Message, RecordDict, pack, unpack

__all__ = ["AnswersEnvelopes", "failure", "relay"]

STATE = "site"


class AnswersEnvelopes(Protocol):
    """What the relay knows of a vault."""

    def answer(self, data: bytes, state: SiteState) -> tuple[bytes, SiteState]:
        """Answer one envelope; never raises for what the envelope or the records hold."""


def relay(message: Message, context: Context, vault: AnswersEnvelopes) -> Message:
    """Give the message's envelope to the vault and reply with its answer.

    The site's state lies in Flower's context.
    """
    record = context.state.config_records.get(STATE)
    state = SiteState(**record) if record else SiteState()  # type: ignore[arg-type]
    answer, state = vault.answer(unpack(message.content), state)
    context.state[STATE] = ConfigRecord(vars(state))
    return Message(pack(answer), reply_to=message)


def failure(message: Message, error: BaseException) -> Message:
    """A reply that says that no vault could answer, in a fixed word: the text of an error may hold a record."""
    return Message(RecordDict({"failure": ConfigRecord({"code": error_code(error)})}), reply_to=message)
