"""Whether an artifact keeps what is asked of its accuracy and its licence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from l4pack.errors import L4packError, LicenceError, QualityError
from l4pack.evaluate.gates import judge, limits_of, require
from l4pack.evaluate.record import check_current, read_evaluations
from l4pack.publish.licence import Audit, audit
from l4pack.recipe import Gates


def broken(place: str, quality: Gates | None, licence: bool) -> list[L4packError]:
    """What an artifact does not keep: a folder, or `ORG/NAME` on the Hub where only its licence is asked for.

    Each is an error as the command of its own would raise it: QualityError, LicenceError, or what kept it from being
    found out.
    """
    asked: list[Callable[[], None]] = []
    if quality is not None:
        asked.append(partial(check_quality, Path(place), quality))
    if licence:
        asked.append(partial(check_licence, place))
    found = []
    for check in asked:
        try:
            check()
        except L4packError as error:
            found.append(error)
    return found


def check_quality(folder: Path, gates: Gates) -> None:
    """Raise QualityError for a gate that the most careful evaluation misses, or that nothing was measured for."""
    records = read_evaluations(folder)
    if not records:
        raise QualityError(f"{folder}: accuracy was not measured", hint=f"l4pack evaluate {folder} --against SOURCE")
    check_current(folder, records)
    require(judge(records[0], limits_of(gates, {})))


def check_licence(place: str) -> None:
    """Raise LicenceError for the first duty that is not met."""
    result = audit(place)
    if not result.ok:
        raise licence_error(result)


def licence_error(result: Audit) -> LicenceError:
    """The first finding of an audit, and how many more there are."""
    first = result.findings[0]
    more = f", and {len(result.findings) - 1} more" if len(result.findings) > 1 else ""
    return LicenceError(
        f"{first.where}: {first.message}{more}", hint=f"l4pack licence {result.where} --name {result.name} lists all"
    )
