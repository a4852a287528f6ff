"""Finding the terms of a domain in its text: words that the tokenizer splits, fixed expressions, Chinese terms.

Words and Chinese are told apart by their characters. A word needs no measure, since writing marks its borders. What
several words or characters make is a term where they keep together: normalised pointwise mutual information of the
weakest border inside (Bouma 2009, equation 9, in [-1, 1]), and where many different neighbours stand beside it, which
only Chinese needs: entropy of the neighbours in nats (Jin and Tanaka-Ishii 2006, section 2).
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from server.distillation.pieces import Text, encode_all

__all__ = ["cut_terms", "find_terms", "gain", "has_han", "space_sign"]

_HAN = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # and kana: written without spaces too
_HAN_RUN = re.compile(f"[{_HAN}]+")
_WORD = re.compile(r"\w+(?:-\w+)*")
_MOST_WORDS, _MOST_CHARACTERS = 4, 8
_BORDER = "\0"
_USUAL = 50  # the most frequent words of the corpus
# Words that bind others: an expression may hold them ("loss of heterozygosity"), not begin or end with them. Other
# languages have the rule for short and usual words alone.
_BINDING_WORDS = """
about above after again against also am any are as at be because been before being below between both but by can
could did do does during each either every few for from further get had has have having he hence her here how
however if in into is it its just let like may me might more most much must my need neither never no nor not of
off on once only or other our out over own please same shall she should since so some such than that the their
them then there these they this those through to too under until up upon very want was we were what when where
whether which while who whom whose why will with within without would you your
"""
_BINDING = frozenset(_BINDING_WORDS.split())
_BINDING_HAN = frozenset("的了和与或及等之")

Gram = tuple[str, ...]


def has_han(text: str) -> bool:
    """Whether a text is written, in part at least, without spaces: Chinese characters or kana."""
    return _HAN_RUN.search(text) is not None


def space_sign(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sign with which pieces after a space begin: "\u0120" of bytes, "\u2581" of SentencePiece, or "" for none."""
    last = "".join(tokenizer.tokenize("a b")[1:])
    return last[0] if last.startswith(("\u0120", "\u2581")) else ""


def cut_terms(tokenizer: PreTrainedTokenizerBase, terms: Sequence[str]) -> list[list[int]]:
    """The ids into which each term is cut in running text: Latin ones with the space before them."""
    lead = " " if space_sign(tokenizer) else ""
    return list(encode_all(tokenizer, [term if has_han(term) else lead + term for term in terms]))


def gain(tokenizer: PreTrainedTokenizerBase, cut: Sequence[int]) -> int:
    """Tokens that a term cut so would save as one token; at least one where it is unknown now, 0: it is whole."""
    return max(len(cut) - 1, int(tokenizer.unk_token_id is not None and tokenizer.unk_token_id in cut))


def find_terms(
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    most: int,
    least_count: int = 5,
    association: float = 0.5,
    entropy: float = 1.0,
) -> list[str]:
    """At most `most` terms of the texts that the tokenizer splits, those first that would save most tokens.

    A term occurs at least `least_count` times on its own, not counting where it is part of a longer one that was taken.
    Words of a text given as words are never joined, as such a task never sees two of them together.
    """
    lower = _ignores_case(tokenizer)
    runs = [run for text in texts for run in _runs(text, lower=lower)]
    words = [run for run in runs if not has_han(run[0])]
    han = [run for run in runs if has_han(run[0])]
    single = _counted(words, 1, least_count)
    joined = _counted(words, _MOST_WORDS, least_count)
    grams = _counted(han, _MOST_CHARACTERS, least_count)
    usual = {gram[0] for gram in sorted(single, key=lambda gram: -single[gram])[:_USUAL]}
    counts: dict[str, int] = {gram[0]: count for gram, count in single.items() if not gram[0].isdigit()}
    counts |= {
        " ".join(gram): count
        for gram, count in joined.items()
        if len(gram) > 1
        and _content(gram[0], usual)
        and _content(gram[-1], usual)
        and _association(gram, count, joined, sum(map(len, words))) >= association
    }
    held = {
        gram: count
        for gram, count in grams.items()
        if len(gram) > 1
        and not _BINDING_HAN & {gram[0], gram[-1]}
        and _association(gram, count, grams, sum(map(len, han))) >= association
    }
    beside = _neighbours(han, held)
    counts |= {"".join(gram): count for gram, count in held.items() if min(map(_entropy, beside[gram])) >= entropy}
    return _best(counts, tokenizer, most=most, least_count=least_count)


def _best(counts: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, *, most: int, least_count: int) -> list[str]:
    """Longer terms first take the occurrences of shorter ones inside them; then by tokens saved."""
    names = sorted(counts, key=lambda name: (-len(name), name))
    pieces = {name: gain(tokenizer, cut) for name, cut in zip(names, cut_terms(tokenizer, names), strict=True)}
    alone = dict(counts)
    saved: dict[str, int] = {}
    for name in names:
        count, fewer = alone[name], pieces[name]
        if count < least_count or not fewer:
            continue
        saved[name] = count * fewer
        for part in _parts(name):
            if part in alone:
                alone[part] -= count
    return sorted(saved, key=lambda name: (-saved[name], name))[:most]


def _parts(name: str) -> set[str]:
    """What lies inside a term: runs of its words, or of its characters where they are Chinese."""
    units, between = (list(name), "") if has_han(name) else (name.split(" "), " ")
    size = len(units)
    spans = ((start, stop) for start in range(size) for stop in range(start + 1, size + 1) if stop - start < size)
    return {between.join(units[start:stop]) for start, stop in spans}


def _ignores_case(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.tokenize("A") == tokenizer.tokenize("a"))


def _runs(text: Text, *, lower: bool) -> Iterator[list[str]]:
    """Runs of words with one space between them, and runs of Chinese characters."""
    for raw in [text] if isinstance(text, str) else text:
        part = raw.lower() if lower else raw
        yield from (list(run) for run in _HAN_RUN.findall(part))
        for stretch in _HAN_RUN.split(part):
            run: list[str] = []
            end = -1
            for found in _WORD.finditer(stretch):
                if run and stretch[end : found.start()] != " ":
                    yield run
                    run = []
                run.append(found[0])
                end = found.end()
            if run:
                yield run


def _counted(runs: Sequence[list[str]], longest: int, least_count: int) -> dict[Gram, int]:
    """Runs of 1 to `longest` units that occur at least `least_count` times.

    A long run is counted only where both shorter ones inside it are frequent: it cannot be more frequent than they.
    """
    kept: dict[Gram, int] = {}
    for size in range(1, longest + 1):
        found: Counter[Gram] = Counter()
        for run in runs:
            for start in range(len(run) - size + 1):
                gram = tuple(run[start : start + size])
                if size == 1 or (gram[:-1] in kept and gram[1:] in kept):
                    found[gram] += 1
        frequent = {gram: count for gram, count in found.items() if count >= least_count}
        if not frequent:
            break
        kept |= frequent
    return kept


def _association(gram: Gram, count: int, counts: Mapping[Gram, int], total: int) -> float:
    """NPMI of the weakest border inside: ln(p(xy) / (p(x) p(y))) / -ln p(xy), shares taken of all units."""
    together = math.log(count / total)
    if together == 0.0:
        return 1.0
    return min(
        (together - math.log(counts[gram[:cut]] / total) - math.log(counts[gram[cut:]] / total)) / -together
        for cut in range(1, len(gram))
    )


def _neighbours(runs: Sequence[list[str]], held: Mapping[Gram, int]) -> dict[Gram, tuple[Counter[str], Counter[str]]]:
    """What stands before and after each gram; every border of a run counts as a neighbour of its own."""
    beside: dict[Gram, tuple[Counter[str], Counter[str]]] = {gram: (Counter(), Counter()) for gram in held}
    longest = max(map(len, held), default=0)
    for place, run in enumerate(runs):
        for size in range(2, min(longest, len(run)) + 1):
            for start in range(len(run) - size + 1):
                sides = beside.get(tuple(run[start : start + size]))
                if sides is not None:
                    end = start + size
                    sides[0][run[start - 1] if start else f"{_BORDER}{place}"] += 1
                    sides[1][run[end] if end < len(run) else f"{_BORDER}{place}"] += 1
    return beside


def _entropy(neighbours: Counter[str]) -> float:
    total = sum(neighbours.values())
    return -sum(count / total * math.log(count / total) for count in neighbours.values())


def _content(word: str, usual: Collection[str]) -> bool:
    """Whether an expression may begin or end with a word: not if it binds others, nor if it is short and usual."""
    return word.lower() not in _BINDING and (len(word) > 3 or word not in usual)
