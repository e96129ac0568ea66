"""Ours, way by way: the rows that comparisons with many models have of it."""

from typing import Any

from recbole.config import Config

from recbole_unlearn.models.support import no_step
from recbole_unlearn.settings.config import UNLIMITED
from recbole_unlearn.settings.conflicts import DERIVED_FORMS, plain_adam, unfit

STEP, TOUCHED = "one corrected step", "touched rows"
WAYS: dict[str, dict[str, Any]] = {
    STEP: {"method": "influence", "undone_limit": UNLIMITED},
    TOUCHED: {"method": "replay", "replay_rows": "touched"},
    "exact, paired": {"method": "replay", "replay_rows": "all", "coupling": "paired"},
    "exact, fresh": {"method": "replay", "replay_rows": "all", "coupling": "fresh"},
}


def ways_of(config: Config) -> dict[str, dict[str, Any]]:
    """Those of `WAYS` that a configuration's model has: name in the tables -> settings that differ."""
    missing = set() if config["model"] in DERIVED_FORMS and plain_adam(config) else {TOUCHED}
    missing |= {STEP} if no_step(config) or unfit(config, config["damping"]) else set()
    return {name: settings for name, settings in WAYS.items() if name not in missing}
