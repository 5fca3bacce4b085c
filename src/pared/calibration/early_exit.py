"""A batch ends at the last site that is collected, where nothing of what the block outputs is used."""

from dataclasses import dataclass, field


class Enough(Exception):  # noqa: N818 - no error
    """Everything that is collected of this batch has been read."""


@dataclass
class LastRead:
    """Finds in the first batch which site is collected last, and ends every later batch there.

    Nothing ends where that site is called more than once or is sent a part of the tokens, as one of several experts is,
    or where the first batch does not reach a site that a later one may.

    Attributes:
        expected: how many sites there are to collect.
        sites: in the order they were collected in the first batch.
        whole: whether the last of them was given one row for every token.
        known: whether the first batch is over.
    """

    expected: int
    sites: list[str] = field(default_factory=list)
    whole: bool = False
    known: bool = False

    def collected(self, site: str, whole: bool) -> None:
        """Take notice that everything of a site's call is collected."""
        if not self.known:
            self.sites.append(site)
            self.whole = whole
        elif self.whole and site == self.sites[-1] and len(self.sites) == len(set(self.sites)) == self.expected:
            raise Enough
