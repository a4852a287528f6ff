"""Hours of the week in which a site's machine may train: 'mon-fri 18:00-06:00', local time."""

import re
from dataclasses import dataclass
from datetime import datetime

__all__ = ["Window"]

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = "|".join(_DAYS)
_FORM = re.compile(rf"({_DAY})(?:-({_DAY}))? ([0-2][0-9]):([0-5][0-9])-([0-2][0-9]):([0-5][0-9])")
_MINUTES = 24 * 60


@dataclass(frozen=True)
class Window:
    """Days (0 is Monday), and minutes since midnight from `begin` to before `end`.

    An `end` at or before `begin` is on the next day: the window belongs to the day on which it begins.
    """

    days: frozenset[int]
    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> "Window":
        """From 'DAY HH:MM-HH:MM' or 'DAY-DAY HH:MM-HH:MM'.

        Raises:
            ValueError: it is written in another way.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"must be written like 'mon-fri 18:00-06:00' or 'sat 00:00-24:00', found {text!r}")
        first, last, *numbers = found.groups()
        start, stop = _DAYS.index(first), _DAYS.index(last or first)
        days = frozenset(day % 7 for day in range(start, (stop if stop >= start else stop + 7) + 1))
        hours = [int(number) for number in numbers]
        begin, end = 60 * hours[0] + hours[1], 60 * hours[2] + hours[3]
        if begin >= _MINUTES or end > _MINUTES or begin == end:
            raise ValueError(f"must begin before 24:00, end by 24:00 and have a length, found {text!r}")
        return cls(days, begin, end)

    def holds(self, moment: datetime) -> bool:
        """Whether a moment of local time lies in it."""
        day, minute = moment.weekday(), 60 * moment.hour + moment.minute
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        return (day in self.days and minute >= self.begin) or ((day - 1) % 7 in self.days and minute < self.end)
