"""A record of each task, as every other file sees it: clean text, its privacy unit and its natural group."""

from dataclasses import dataclass

__all__ = ["InstructionRecord", "Record", "TextRecord", "TokensRecord"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What all records have. `unit` is the person, matter or document that owns it; `group` its natural owner."""

    unit: str
    group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord(Record):
    """Text classification: a text and its label."""

    text: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensRecord(Record):
    """Token classification: words and as many BIO tags."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionRecord(Record):
    """Causal language modelling: a question, an optional context, and the answer."""

    instruction: str
    input: str
    output: str
